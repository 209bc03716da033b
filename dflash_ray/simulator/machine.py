"""A virtual target group and its drafters: they answer the scheduler's messages, and say how long that takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dflash_ray.core.arrays import packed, unpacked
from dflash_ray.core.draft_blocks import DraftBlock, to_message
from dflash_ray.pb import common_pb2, drafter_pb2, router_pb2, target_pb2
from dflash_ray.router.limits import TargetLimits
from dflash_ray.simulator.profile import Profile
from dflash_ray.simulator.workload import Request

VOCAB = 50_021  # a prime, so that no text repeats itself before it is as long
_STRIDE = 7_919
_PAGE = 16


def token_at(number: int, position: int) -> int:
    """What the virtual model says."""
    return (number * 104_729 + position * _STRIDE) % VOCAB


def message_of(request: Request, policy: router_pb2.SpeculationPolicy) -> router_pb2.GenerateTokensRequest:
    """A request as the gateway sends it."""
    return router_pb2.GenerateTokensRequest(
        token_ids=[token_at(request.number, position) for position in range(request.prompt_tokens)],
        prompt_len=request.prompt_tokens,
        sampling=common_pb2.SamplingParams(repetition_penalty=1.0, top_p=1.0),
        stopping=common_pb2.StoppingParams(max_new_tokens=request.output_tokens),
        speculation=router_pb2.Speculation(policy=policy),
    )


@dataclass(slots=True)
class _Sequence:
    request: Request
    length: int  # committed tokens
    computed: int = 0
    has_features: bool = False
    base: int = 0  # committed tokens before the last ones
    is_over: bool = False
    block: DraftBlock | None = None  # of the colocated drafter


def draft(request: Request, sequence_id: int, length: int, count: int) -> DraftBlock:
    """What a drafter proposes behind `length` tokens."""
    right, sure = request.draws(length, count)
    tokens = [token_at(request.number, length + i) + (0 if is_right else 1) for i, is_right in enumerate(right)]
    ids = np.array(tokens, np.uint32)[:, None] % VOCAB
    return DraftBlock(sequence_id, length, ids, np.log(sure).astype(np.float32)[:, None])


@dataclass
class VirtualTarget:
    """One group. Its sequences say what the workload says.

    Attributes:
        requests: by sequence id.
        draft_len: of the colocated drafter; 0 where drafters are remote.
        plain_seconds: of plain passes that do in the same batches what the passes did; prompts' rows once.
    """

    profile: Profile
    requests: dict[int, Request]
    draft_len: int = 0
    busy_seconds: float = 0.0
    draft_busy_seconds: float = 0.0
    plain_seconds: float = 0.0
    slowdown: Callable[[], float] = lambda: 1.0  # by drafters at work on the same cores
    _sequences: dict[int, _Sequence] = field(default_factory=dict)

    @property
    def limits(self) -> TargetLimits:
        profile = self.profile
        return TargetLimits(
            1,
            profile.max_model_len,
            VOCAB,
            _PAGE,
            profile.kv_cache_tokens // _PAGE,
            profile.max_batch_tokens,
            colocated_draft_tokens=self.draft_len,
            address="virtual",
            feature_fingerprint="virtual",
        )

    def close(self, ids: list[int]) -> None:
        for sequence_id in ids:
            self._sequences.pop(sequence_id, None)

    def run(self, step: target_pb2.Step) -> tuple[target_pb2.StepResult, float]:
        """The result of a step, and the seconds until it is there."""
        self.close(list(step.close))
        for message in step.open:
            request = self.requests[message.sequence_id]
            self._sequences[message.sequence_id] = _Sequence(
                request, len(message.token_ids), has_features=message.wants_features
            )
        result = target_pb2.StepResult(step_id=step.step_id)
        context = 0
        for sequence_id, rows in zip(step.prefill_ids, step.prefill_lens, strict=True):
            sequence = self._sequences[sequence_id]
            sequence.computed += rows
            context += sequence.computed
            result.kv_lens.append(sequence.computed)
            result.cached_lens.append(0)
            self._commit(result, sequence_id, sequence, int(sequence.computed == sequence.length), 0)
        drafts = unpacked("draft_token_ids", step.draft_token_ids).tolist()
        at = num_own = num_ended = 0
        own_counts = step.num_own_drafts or [0] * len(step.verify_ids)
        columns = (step.verify_ids, step.base_lens, step.num_drafts, own_counts)
        for sequence_id, base, count, most_own in zip(*columns, strict=True):
            sequence = self._sequences[sequence_id]
            assert base == (sequence.base if step.is_ahead else sequence.length) or sequence.is_over
            own = self._own(step, sequence, most_own, result)
            num_own += len(own)
            if sequence.is_over:
                self._commit(result, sequence_id, sequence, 0, 0)
                result.statuses[-1] = target_pb2.ENTRY_STATUS_ENDED
                num_ended += 1
                continue
            accepted = 0
            for token in own or drafts[at : at + count]:
                if token != token_at(sequence.request.number, sequence.length + accepted):
                    break
                accepted += 1
            at += count
            context += sequence.length
            sequence.computed = sequence.length + accepted
            self._commit(result, sequence_id, sequence, 1 + accepted, accepted)
        count = len(step.verify_ids) - num_ended
        rows = count + len(drafts) + num_own
        prefill_rows = sum(step.prefill_lens)
        seconds = self.profile.pass_seconds(count, rows, context, prefill_rows) * self.slowdown()
        drafting = self._draft(step, result)
        self.plain_seconds += self.profile.pass_seconds(count, count, context, prefill_rows)
        if accepted := sum(result.num_accepted_drafts):
            self.plain_seconds += self.profile.pass_seconds(count, count, context, 0) * accepted / count
        result.timings.forward_ns = int(seconds * 1e9)
        result.timings.draft_ns = int(drafting * 1e9)
        result.free_pages = self.limits.num_pages - sum(-(-s.length // _PAGE) for s in self._sequences.values())
        self.busy_seconds += seconds
        self.draft_busy_seconds += drafting
        return result, seconds + drafting

    def _commit(
        self, result: target_pb2.StepResult, sequence_id: int, sequence: _Sequence, count: int, accepted: int
    ) -> None:
        sequence.base = sequence.length if count else sequence.base
        request = sequence.request
        left = request.prompt_tokens + request.output_tokens - sequence.length
        count = min(count, left)
        tokens = [token_at(request.number, sequence.length + i) for i in range(count)]
        sequence.length += count
        result.sequence_ids.append(sequence_id)
        result.statuses.append(target_pb2.ENTRY_STATUS_OK)
        result.committed_lens.append(sequence.length)
        result.num_accepted_drafts.append(min(accepted, count))
        result.num_tokens.append(count)
        result.token_ids += packed(np.array(tokens, np.int64))
        is_over = sequence.is_over = sequence.is_over or (count > 0 and count == left)
        result.finish_reasons.append(
            common_pb2.FINISH_REASON_LENGTH if is_over and count else common_pb2.FINISH_REASON_UNSPECIFIED
        )

    def _own(self, step: target_pb2.Step, sequence: _Sequence, most: int, result: target_pb2.StepResult) -> list[int]:
        """The colocated drafter's drafts that an entry verifies."""
        own: list[int] = []
        if step.num_own_drafts:
            block, room = sequence.block, sequence.request.prompt_tokens + sequence.request.output_tokens
            if block is not None and block.committed_len == sequence.length and not sequence.is_over:
                most = max(0, min(most, room - sequence.length - 1))
                if step.least_own_log_prob < 0:
                    most = min(most, int(np.count_nonzero(block.log_probs[:, 0].cumsum() >= step.least_own_log_prob)))
                own = block.draft_ids[:most]
                result.own_log_probs += block.log_probs[:most, 0].astype("<f4").tobytes()
            result.num_own_drafts.append(len(own))
        return own

    def _draft(self, step: target_pb2.Step, result: target_pb2.StepResult) -> float:
        """The colocated drafter behind the pass."""
        blocks = []
        for sequence_id, count in zip(step.colocated_draft_ids, step.colocated_num_drafts, strict=True):
            sequence = self._sequences[sequence_id]
            assert sequence.has_features
            if sequence.computed == sequence.length - 1 and not sequence.is_over:
                sequence.block = draft(sequence.request, sequence_id, sequence.length, min(count, self.draft_len))
                blocks.append(sequence.block)
        slots = sum(len(block.candidate_ids) for block in blocks)
        new_rows = sum(result.num_tokens) if self.draft_len else 0
        return self.profile.draft_seconds(len(blocks), slots, new_rows) if self.draft_len else 0.0


@dataclass
class VirtualDrafter:
    """One replica, which has every row by the time it is asked."""

    profile: Profile
    requests: dict[int, Request]
    busy_seconds: float = 0.0
    _held: dict[int, int] = field(default_factory=dict)

    def answer(self, message: drafter_pb2.DraftRequest) -> tuple[drafter_pb2.DraftReply, float]:
        """The reply to a request, and the seconds until it is there."""
        for sequence_id in message.close:
            self._held.pop(sequence_id, None)
        for sequence_id in message.open:
            self._held.setdefault(sequence_id, 0)
        blocks, new_rows = [], 0
        columns = (message.sequence_ids, message.committed_lens, message.num_draft_tokens)
        for sequence_id, length, count in zip(*columns, strict=True):
            new_rows += max(0, length - 1 - self._held.get(sequence_id, 0))
            self._held[sequence_id] = length - 1
            blocks.append(draft(self.requests[sequence_id], sequence_id, length, min(count, self.profile.draft_len)))
        reply = drafter_pb2.DraftReply(request_id=message.request_id, blocks=to_message(message.epoch, blocks))
        seconds = self.profile.draft_seconds(len(blocks), sum(len(b.candidate_ids) for b in blocks), new_rows)
        self.busy_seconds += seconds
        return reply, seconds
