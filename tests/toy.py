"""A deterministic toy language model and a target made of it that answers the scheduler's steps."""

from __future__ import annotations

from dflash_ray.pb import common_pb2, target_pb2
from dflash_ray.router.scheduler import TargetLimits

VOCAB = 50
STOP_TOKEN = 7


def next_token(tokens: list[int]) -> int:
    """Repeats itself often enough for n-grams to be right now and then."""
    return (tokens[-1] * 3 + tokens[-2] + len(tokens) // 5) % VOCAB if len(tokens) > 1 else (tokens[-1] + 1) % VOCAB


def answer(prompt: list[int], max_new_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_new_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == STOP_TOKEN:
            break
    return tokens[len(prompt) :]


class ToyTarget:
    """Pages, statuses and tokens as the contract says; no model behind it."""

    def __init__(self, num_pages: int = 64, page_size: int = 4) -> None:
        self.limits = TargetLimits(1, 200, VOCAB, page_size, num_pages, max_batch_tokens=64)
        self.sequences: dict[int, dict] = {}

    @property
    def used_pages(self) -> int:
        return sum(s["pages"] for s in self.sequences.values())

    def close(self, ids) -> None:
        for sequence_id in ids:
            self.sequences.pop(sequence_id, None)

    def step(self, step: target_pb2.Step) -> target_pb2.StepResult:
        self.close(step.close)
        for message in step.open:
            self.sequences[message.sequence_id] = {
                "tokens": list(message.token_ids), "kv": 0, "pages": 0, "message": message
            }  # fmt: skip
        result = target_pb2.StepResult(step_id=step.step_id)
        for sequence_id, length in zip(step.prefill_ids, step.prefill_lens, strict=True):
            self._entry(result, sequence_id, length, None)
        offset = 0
        for sequence_id, base, count in zip(step.verify_ids, step.base_lens, step.num_drafts, strict=True):
            drafts = list(step.draft_token_ids[offset : offset + count])
            offset += count
            self._entry(result, sequence_id, base, drafts)
        result.free_pages = self.limits.num_pages - self.used_pages
        return result

    def _entry(self, result, sequence_id, length, drafts) -> None:
        sequence = self.sequences.get(sequence_id)
        tokens, accepted, status = [], 0, target_pb2.ENTRY_STATUS_OK
        if sequence is None:
            status = target_pb2.ENTRY_STATUS_UNKNOWN
        elif drafts is not None and length != len(sequence["tokens"]):
            status = target_pb2.ENTRY_STATUS_STALE
        elif not self._reserve(sequence, length if drafts is None else 1 + len(drafts)):
            status = target_pb2.ENTRY_STATUS_NO_PAGES
        elif drafts is None:
            sequence["kv"] += min(length, len(sequence["tokens"]) - sequence["kv"])
            if sequence["kv"] == len(sequence["tokens"]):
                tokens = [next_token(sequence["tokens"])]
        else:
            known = list(sequence["tokens"])
            for draft in [*drafts, None]:
                tokens.append(next_token(known + tokens))
                if tokens[-1] != draft:
                    break
                accepted += 1
            sequence["kv"] += 1 + accepted
        kept, reason = self._cut(sequence, tokens)
        start = sequence["kv"] if sequence else 0
        result.sequence_ids.append(sequence_id)
        result.statuses.append(status)
        result.num_accepted_drafts.append(min(accepted, len(kept)))
        result.num_tokens.append(len(kept))
        result.token_ids.extend(kept)
        result.finish_reasons.append(reason)
        result.committed_lens.append(len(sequence["tokens"]) if sequence else 0)
        if status == target_pb2.ENTRY_STATUS_OK and sequence["message"].wants_features:
            rows = (1 + accepted) if drafts is not None else length
            rows = min(rows, start)
            result.features.append(
                common_pb2.ContextFeatures(sequence_id=sequence_id, start=start - rows, num_rows=rows)
            )

    def _reserve(self, sequence, rows) -> bool:
        needed = -(-(sequence["kv"] + rows) // self.limits.page_size) - sequence["pages"]
        if needed > self.limits.num_pages - self.used_pages:
            return False
        sequence["pages"] += max(0, needed)
        return True

    def _cut(self, sequence, tokens):
        reason = common_pb2.FINISH_REASON_UNSPECIFIED
        kept = []
        for token in tokens:
            kept.append(token)
            sequence["tokens"].append(token)
            message = sequence["message"]
            if token == STOP_TOKEN:
                return kept, common_pb2.FINISH_REASON_STOP
            if len(sequence["tokens"]) >= message.prompt_len + message.stopping.max_new_tokens:
                return kept, common_pb2.FINISH_REASON_LENGTH
        return kept, reason
