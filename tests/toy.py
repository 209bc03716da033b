"""A deterministic toy language model and a target made of it that answers the scheduler's steps."""

from __future__ import annotations

from dflash_ray.pb import common_pb2, drafter_pb2, router_pb2, target_pb2
from dflash_ray.router.limits import TargetLimits

VOCAB = 50
STOP_TOKEN = 7
PIECE_ROWS = 4
BYTES_A_ROW = 8


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


def token_request(prompt: list[int], max_new: int, draft_tokens: int) -> router_pb2.GenerateTokensRequest:
    return router_pb2.GenerateTokensRequest(
        token_ids=prompt,
        prompt_len=len(prompt),
        stopping=common_pb2.StoppingParams(max_new_tokens=max_new),
        speculation=router_pb2.Speculation(policy=router_pb2.SPECULATION_POLICY_FIXED, draft_tokens=draft_tokens),
    )


def features(sequence_id: int, start: int, num_rows: int) -> common_pb2.ContextFeatures:
    return common_pb2.ContextFeatures(
        sequence_id=sequence_id, start=start, num_rows=num_rows, data=bytes(BYTES_A_ROW * num_rows)
    )


class ToyTarget:
    """Pages, statuses and tokens as the contract says; no model behind it."""

    def __init__(self, num_pages: int = 64, page_size: int = 4, max_batch_tokens: int = 64) -> None:
        self.limits = TargetLimits(1, 200, VOCAB, page_size, num_pages, max_batch_tokens)
        self.sequences: dict[int, dict] = {}
        self.features: list[common_pb2.ContextFeatures] = []  # of the last step

    @property
    def used_pages(self) -> int:
        return sum(s["pages"] for s in self.sequences.values())

    def close(self, ids) -> None:
        for sequence_id in ids:
            self.sequences.pop(sequence_id, None)

    def replay(self, sequence_id: int, start: int) -> common_pb2.ContextFeatures:
        """One piece, empty when there is nothing."""
        sequence = self.sequences.get(sequence_id)
        return features(sequence_id, start, min(PIECE_ROWS, max(0, sequence["kv"] - start)) if sequence else 0)

    def step(self, step: target_pb2.Step) -> target_pb2.StepResult:
        self.close(step.close)
        self.features = []
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
            for at in range(start - rows, start, PIECE_ROWS):
                self.features.append(features(sequence_id, at, min(PIECE_ROWS, start - at)))

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


class ToyDrafter:
    """Holds context rows as the contract says and drafts whatever it is given."""

    needs_features = True

    def __init__(self, num_rows: int = 10_000) -> None:
        self.num_rows = num_rows
        self.sessions: dict[int, int] = {}
        self.request: drafter_pb2.DraftRequest | None = None

    def take(self, request: drafter_pb2.DraftRequest) -> None:
        assert self.request is None, "one request is in flight at a time"
        self.request = request

    def answer(self, draft) -> drafter_pb2.DraftReply:
        """`draft` makes tokens of (sequence id, committed length, how many)."""
        request, self.request = self.request, None
        reply = drafter_pb2.DraftReply(request_id=request.request_id)
        missing = {}
        for sequence_id in request.close:
            self.sessions.pop(sequence_id, None)
        for part in request.contexts:
            fault = self._extend(part)
            if fault is not None:
                missing.setdefault(part.sequence_id, fault)
        for i, sequence_id in enumerate(request.sequence_ids):
            held = self.sessions.get(sequence_id, 0)
            committed_len, count = request.committed_lens[i], request.num_draft_tokens[i]
            if sequence_id in missing:
                continue
            if held != committed_len - 1:
                self.sessions.pop(sequence_id, None) if held >= committed_len else None
                missing[sequence_id] = (held if held < committed_len else 0, False)
                continue
            tokens = draft(sequence_id, committed_len, count)
            reply.blocks.add(
                sequence_id=sequence_id, epoch=request.epochs[i], committed_len=committed_len,
                num_slots=len(tokens), num_candidates=1, candidate_ids=tokens,
            )  # fmt: skip
        for sequence_id, (have_len, is_refused) in missing.items():
            reply.missing.add(sequence_id=sequence_id, have_len=have_len, is_refused=is_refused)
        return reply

    def _extend(self, part) -> tuple[int, bool] | None:
        held = self.sessions.get(part.sequence_id, 0)
        if part.start > held:
            return held, False
        grown = max(held, part.start + part.num_rows)
        if sum(self.sessions.values()) - held + grown > self.num_rows:
            self.sessions.pop(part.sequence_id, None)
            return 0, True
        self.sessions[part.sequence_id] = grown
        return None
