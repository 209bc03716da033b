"""A deterministic toy language model and a target made of it that answers the scheduler's steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from dflash_ray.core.arrays import packed, unpacked
from dflash_ray.core.draft_blocks import BlockColumns, DraftBlock, to_message
from dflash_ray.pb import common_pb2, drafter_pb2, router_pb2, target_pb2
from dflash_ray.router.actions import Emit
from dflash_ray.router.limits import TargetLimits
from dflash_ray.router.sequence import RouterSequence
from dflash_ray.router.speculation.records import Policy

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


def drafts_of(message: common_pb2.DraftBlocks) -> dict[int, list[int]]:
    """The drafts of a message's blocks, by sequence."""
    blocks = BlockColumns.of(message)
    return {block.sequence_id: block.draft_ids for block in map(blocks.block, range(len(blocks.sequence_ids)))}


def token_request(
    prompt: list[int], max_new: int, draft_tokens: int, policy: int = router_pb2.SPECULATION_POLICY_FIXED
) -> router_pb2.GenerateTokensRequest:
    return router_pb2.GenerateTokensRequest(
        token_ids=prompt,
        prompt_len=len(prompt),
        stopping=common_pb2.StoppingParams(max_new_tokens=max_new),
        speculation=router_pb2.Speculation(policy=policy, draft_tokens=draft_tokens),
    )


def tokens_of(data: bytes) -> list[int]:
    """What travelled as packed token ids."""
    return unpacked("token_ids", data).tolist()


class ToyTarget:
    """Pages, statuses and tokens as the contract says; no model behind it.

    Args:
        finds: how many pages of a sequence are found computed whenever it is prefilled; of entries but the first of a
            step, whether they wait.
        draft: of a drafter of its own, what it drafts behind known tokens, at most so many; None where there is none.
    """

    def __init__(
        self,
        num_pages: int = 64,
        page_size: int = 4,
        max_batch_tokens: int = 64,
        finds: Callable[[int], int] | None = None,
        draft: Callable[[list[int], int], list[int]] | None = None,
    ) -> None:
        self.finds, self.draft = finds, draft
        self.limits = TargetLimits(
            1, 200, VOCAB, page_size, num_pages, max_batch_tokens,
            colocated_draft_tokens=4 if draft else 0, feature_fingerprint="toy",
        )  # fmt: skip
        self.sequences: dict[int, dict] = {}
        self.step_id = 0  # the last one that was run

    @property
    def used_pages(self) -> int:
        return sum(s["pages"] for s in self.sequences.values())

    def close(self, ids) -> None:
        for sequence_id in ids:
            self.sequences.pop(sequence_id, None)

    def step(self, step: target_pb2.Step) -> target_pb2.StepResult:
        self.step_id = step.step_id
        self.close(step.close)
        for message in step.open:
            self.sequences[message.sequence_id] = {
                "tokens": list(message.token_ids), "kv": 0, "pages": 0, "cached": 0, "message": message,
                "base": 0, "is_over": False, "block": None,
            }  # fmt: skip
        result = target_pb2.StepResult(step_id=step.step_id)
        self._waits = False
        for sequence_id, length in zip(step.prefill_ids, step.prefill_lens, strict=True):
            length = self._find(sequence_id, length)
            self._entry(result, sequence_id, length, None)
            sequence = self.sequences.get(sequence_id, {"kv": 0, "cached": 0})
            result.kv_lens.append(sequence["kv"])
            result.cached_lens.append(sequence["cached"])
        offset = 0
        own_parents: list[int] = []
        nodes: list[int] = []
        own_counts = step.num_own_drafts or [0] * len(step.verify_ids)
        columns = (step.verify_ids, step.base_lens, step.num_drafts, own_counts)
        for sequence_id, base, count, num_own in zip(*columns, strict=True):
            drafts = tokens_of(step.draft_token_ids)[offset : offset + count]
            parents = step.draft_parents[offset : offset + count] or range(count)
            offset += count
            assert all(parent <= node for node, parent in enumerate(parents)), "parents come before their children"
            chosen = list(zip(parents, drafts, strict=True))
            if step.num_own_drafts:
                assert not (count and num_own)
                own = self._own(sequence_id, num_own)
                result.num_own_drafts.append(len(own))
                own_parents += [parent for parent, _ in own]
                chosen = chosen or own
            nodes += self._entry(result, sequence_id, base, chosen, step.is_ahead)
        if step.tree_width > 1:
            result.own_parents = packed(np.array(own_parents))
            result.accepted_drafts = packed(np.array(nodes))
        result.own_log_probs = np.full(len(own_parents), -0.5, "<f4").tobytes()
        for sequence_id, count in zip(step.colocated_draft_ids, step.colocated_num_drafts, strict=True):
            self._draft(sequence_id, count, step.tree_width)
        result.free_pages = self.limits.num_pages - self.used_pages
        return result

    def _own(self, sequence_id: int, count: int) -> list[tuple[int, int]]:
        """Parents and tokens of own drafts that there are for the tokens that are known now."""
        sequence = self.sequences.get(sequence_id)
        if sequence is None or sequence["block"] is None or sequence["block"][0] != len(sequence["tokens"]):
            return []
        room = self._max_len(sequence) - len(sequence["tokens"]) - 1
        return sequence["block"][1][: max(0, min(count, room))]

    def _draft(self, sequence_id: int, count: int, tree_width: int) -> None:
        sequence = self.sequences.get(sequence_id)
        if sequence is None or sequence["is_over"] or sequence["kv"] != len(sequence["tokens"]) - 1:
            return
        assert self.draft is not None and sequence["message"].wants_features
        tokens = np.array(self.draft(sequence["tokens"], count), np.uint32)[:, None]
        block = DraftBlock(sequence_id, len(sequence["tokens"]), tokens, np.zeros(tokens.shape, np.float32))
        block = branching(block) if tree_width > 1 else block
        parents = range(len(tokens)) if block.parents is None else block.parents.tolist()
        sequence["block"] = (block.committed_len, list(zip(parents, block.draft_ids, strict=True)))

    def _max_len(self, sequence) -> int:
        message = sequence["message"]
        return min(self.limits.max_model_len, message.prompt_len + message.stopping.max_new_tokens)

    def _find(self, sequence_id: int, length: int) -> int:
        """Takes rows as found, and returns those that are left to compute of the `length` that were asked for."""
        sequence = self.sequences.get(sequence_id)
        if sequence is None or not self.finds:
            return length
        left = (len(sequence["tokens"]) - 1 - sequence["kv"]) // self.limits.page_size
        count = min(self.finds(sequence_id), left) * self.limits.page_size
        if sequence["kv"] % self.limits.page_size == 0 and count and self._reserve(sequence, count):
            sequence["kv"] += count
            sequence["cached"] += count
        waits, self._waits = self._waits, True
        return 0 if waits and self.finds(sequence_id + 1) else length

    def _entry(self, result, sequence_id, length, drafts, is_ahead=False) -> list[int]:
        """Adds an entry to the result; returns the places of the drafts that were accepted."""
        sequence = self.sequences.get(sequence_id)
        tokens, nodes, status = [], [], target_pb2.ENTRY_STATUS_OK
        if sequence is None:
            status = target_pb2.ENTRY_STATUS_UNKNOWN
        elif drafts is not None and sequence["is_over"]:
            status = target_pb2.ENTRY_STATUS_ENDED
        elif drafts is not None and length != (sequence["base"] if is_ahead else len(sequence["tokens"])):
            status = target_pb2.ENTRY_STATUS_STALE
        elif not self._reserve(sequence, length if drafts is None else 1 + len(drafts)):
            status = target_pb2.ENTRY_STATUS_NO_PAGES
        elif drafts is None:
            sequence["kv"] += min(length, len(sequence["tokens"]) - sequence["kv"])
            if length and sequence["kv"] == len(sequence["tokens"]):
                tokens = [next_token(sequence["tokens"])]
        else:
            known = list(sequence["tokens"])
            node: int | None = 0
            while node is not None:
                tokens.append(next_token(known + tokens))
                node = drafts.index((node, tokens[-1])) + 1 if (node, tokens[-1]) in drafts else None
                nodes += [] if node is None else [node]
            sequence["kv"] += 1 + len(nodes)
        kept, reason = self._cut(sequence, tokens)
        del nodes[len(kept) :]
        result.sequence_ids.append(sequence_id)
        result.statuses.append(status)
        result.num_accepted_drafts.append(len(nodes))
        result.num_tokens.append(len(kept))
        result.token_ids += packed(np.array(kept, np.uint32))
        result.finish_reasons.append(reason)
        result.committed_lens.append(len(sequence["tokens"]) if sequence else 0)
        return nodes

    def _reserve(self, sequence, rows) -> bool:
        needed = -(-(sequence["kv"] + rows) // self.limits.page_size) - sequence["pages"]
        if needed > self.limits.num_pages - self.used_pages:
            return False
        sequence["pages"] += max(0, needed)
        return True

    def _cut(self, sequence, tokens):
        reason = common_pb2.FINISH_REASON_UNSPECIFIED
        kept = []
        if tokens:
            sequence["base"] = len(sequence["tokens"])
        for token in tokens:
            kept.append(token)
            sequence["tokens"].append(token)
            if token == STOP_TOKEN:
                reason = common_pb2.FINISH_REASON_STOP
            elif len(sequence["tokens"]) >= self._max_len(sequence):
                reason = common_pb2.FINISH_REASON_LENGTH
            if reason:
                sequence["is_over"] = True
                break
        return kept, reason


def branching(chain: DraftBlock) -> DraftBlock:
    """A tree of as many nodes in which each token of a chain has a sibling, the second one first."""
    count = len(chain.candidate_ids)
    kept = chain.candidate_ids[: (count + 1) // 2, 0]
    tokens = np.stack(((kept + 1) % VOCAB, kept), axis=1).reshape(-1)[:count]
    parents = np.arange(count) // 2 * 2
    return replace(chain, candidate_ids=tokens[:, None].astype(np.uint32), parents=parents)


class ToyDrafter:
    """Holds as many context rows as its target has computed, and drafts whatever it is given.

    Attributes:
        is_cut_off: it reaches no target.
        lag: rows of each sequence that are still on their way.
    """

    needs_features = True

    def __init__(self, num_rows: int = 10_000) -> None:
        self.num_rows = num_rows
        self.sessions: dict[int, int] = {}
        self.sources: dict[int, dict] = {}  # sequence id -> the target's sequence of that time
        self.pending: dict[int, int] = {}  # sequence id -> the step that opens it
        self.starts: list[tuple[int, int]] = []  # of every subscription: sequence id, first row
        self.refused: set[int] = set()
        self.is_cut_off = False
        self.lag = 0
        self.request: drafter_pb2.DraftRequest | None = None

    def take(self, request: drafter_pb2.DraftRequest) -> None:
        assert self.request is None, "one request is in flight at a time"
        self.request = request

    def forget(self) -> None:
        """Loses its sessions and where their rows came from."""
        self.sessions.clear()
        self.sources.clear()
        self.pending.clear()

    def answer(self, draft, target: ToyTarget) -> drafter_pb2.DraftReply:
        """`draft` makes tokens of (sequence id, committed length, how many); with siblings where trees are wanted."""
        request, self.request = self.request, None
        for sequence_id in request.close:
            for known in (self.sessions, self.sources, self.pending):
                known.pop(sequence_id, None)
        for sequence_id, most in zip(request.open, request.open_lens, strict=True):
            if self.sessions.get(sequence_id, 0) > most:
                del self.sessions[sequence_id]
            self.sources.pop(sequence_id, None)
            if not self.is_cut_off:
                self.pending[sequence_id] = request.source.step_id
                self.starts.append((sequence_id, self.sessions.get(sequence_id, 0)))
        self._fetch(target)
        reply = drafter_pb2.DraftReply(request_id=request.request_id)
        blocks = []
        wanted = zip(request.sequence_ids, request.committed_lens, request.num_draft_tokens, strict=True)
        for sequence_id, committed_len, count in wanted:
            reason = self._reason(sequence_id, self.sessions.get(sequence_id, 0) - (committed_len - 1))
            if reason is None:
                tokens = np.array(draft(sequence_id, committed_len, count), dtype=np.uint32)[:, None]
                log_probs = np.zeros(tokens.shape, dtype=np.float32)
                chain = DraftBlock(sequence_id, committed_len, tokens, log_probs)
                blocks.append(branching(chain) if request.tree_width > 1 else chain)
            else:
                reply.missing_ids.append(sequence_id)
                reply.have_lens.append(self.sessions.get(sequence_id, 0))
                reply.missing_reasons.append(reason)
        self.refused.clear()
        reply.blocks.CopyFrom(to_message(request.epoch, blocks))
        return reply

    def _reason(self, sequence_id: int, surplus: int) -> drafter_pb2.MissingReason | None:
        """Why nothing is proposed."""
        if sequence_id in self.refused:
            return drafter_pb2.MISSING_REASON_REFUSED
        if surplus == 0 and self.sessions.get(sequence_id):
            return None
        if surplus > 0:
            return drafter_pb2.MISSING_REASON_PASSED
        is_coming = sequence_id in self.sources or sequence_id in self.pending
        return drafter_pb2.MISSING_REASON_COMING if is_coming else drafter_pb2.MISSING_REASON_LOST

    def _fetch(self, target: ToyTarget) -> None:
        """Takes the rows that the target has computed, as long as there is room."""
        for sequence_id in [one for one, step_id in self.pending.items() if step_id <= target.step_id]:
            del self.pending[sequence_id]
            if sequence_id in target.sequences:
                self.sources[sequence_id] = target.sequences[sequence_id]
        for sequence_id, source in list(self.sources.items()):
            if target.sequences.get(sequence_id) is not source:
                del self.sources[sequence_id]
                continue
            rows = max(self.sessions.get(sequence_id, 0), source["kv"] - self.lag)
            others = sum(held for other, held in self.sessions.items() if other != sequence_id)
            if others + rows > self.num_rows:
                self.sessions.pop(sequence_id, None)
                del self.sources[sequence_id]
                self.refused.add(sequence_id)
            else:
                self.sessions[sequence_id] = rows


def emit_of(call_id: int, told, stream: int = 0) -> Emit:
    """The action that tells one call of a stream something; `told` is a gateway's TokenChunk."""
    sequence = RouterSequence(0, router_pb2.GenerateTokensRequest(), [], Policy.OFF, 0, stream, call_id)
    return Emit.one(
        sequence,
        told.token_ids,
        told.finish_reason,
        told.decode_pass,
        told.logprobs,
        told.prompt_logprobs,
        told.num_cached_tokens,
    )
