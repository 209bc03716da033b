"""Draft requests of one replica: which sessions a stream holds, and what it gets for a request.

All work on tensors happens here, on the one thread that the servicer gives it. Knows nothing of gRPC streams.
"""

from __future__ import annotations

import time

import torch

from dflash_ray.drafter.methods import DraftMethod, Proposal
from dflash_ray.models.dflash2 import Draw
from dflash_ray.pb import common_pb2, drafter_pb2


class DraftSessions:
    """Sessions of all streams over one draft method.

    Two routers may use the same sequence id, so sessions are keyed by (stream, sequence).
    """

    def __init__(self, method: DraftMethod) -> None:
        self._method = method
        self._sessions: dict[tuple[int, int], int] = {}
        self._next_session = 0

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def num_context_rows(self) -> int:
        return sum(self._method.context_len(session) for session in self._sessions.values())

    def answer(self, stream: int, request: drafter_pb2.DraftRequest) -> drafter_pb2.DraftReply:
        """Closes, extends and drafts, in this order; every proposal gets a block or a MissingContext."""
        start_ns = time.perf_counter_ns()
        for sequence_id in request.close:
            self._close(stream, sequence_id)
        for context in request.contexts:
            self._extend(stream, context)
        reply = drafter_pb2.DraftReply(request_id=request.request_id)
        ready = self._ready_entries(stream, request, reply)
        if ready:
            proposals = self._method.propose(
                [self._sessions[stream, request.sequence_ids[i]] for i in ready],
                [request.anchor_token_ids[i] for i in ready],
                [min(request.num_draft_tokens[i], self._method.max_draft_tokens) for i in ready],
                max(1, request.num_candidates),
                [Draw(request.temperatures[i], request.seeds[i], request.wants_distributions[i]) for i in ready],
            )
            for i, proposal in zip(ready, proposals, strict=True):
                reply.blocks.append(_to_block(request, i, proposal))
        reply.draft_ns = time.perf_counter_ns() - start_ns
        return reply

    def drop_stream(self, stream: int) -> None:
        """Forgets every session of a stream that has ended."""
        for owner, sequence_id in list(self._sessions):
            if owner == stream:
                self._close(stream, sequence_id)

    def _close(self, stream: int, sequence_id: int) -> None:
        session = self._sessions.pop((stream, sequence_id), None)
        if session is not None:
            self._method.close(session)

    def _extend(self, stream: int, context: common_pb2.ContextFeatures) -> None:
        key = (stream, context.sequence_id)
        if key not in self._sessions:
            if context.start != 0:
                return  # the proposal reports what is missing
            self._sessions[key] = self._next_session
            self._method.open(self._next_session)
            self._next_session += 1
        session = self._sessions[key]
        held = self._method.context_len(session)
        if context.start <= held < context.start + context.num_rows:
            features = _features(context) if self._method.needs_features else None
            self._method.extend(session, context.start, list(context.token_ids), features)

    def _ready_entries(
        self, stream: int, request: drafter_pb2.DraftRequest, reply: drafter_pb2.DraftReply
    ) -> list[int]:
        ready = []
        for i, sequence_id in enumerate(request.sequence_ids):
            session = self._sessions.get((stream, sequence_id))
            held = 0 if session is None else self._method.context_len(session)
            wanted = request.committed_lens[i] - 1
            if session is not None and held == wanted:
                ready.append(i)
                continue
            if held > wanted:  # the router's sequence was rebuilt: this context belongs to another past
                self._close(stream, sequence_id)
                held = 0
            reply.missing.append(drafter_pb2.MissingContext(sequence_id=sequence_id, have_len=held))
        return ready


def _features(context: common_pb2.ContextFeatures) -> torch.Tensor:
    """Context features as a tensor [num_rows, hidden_size] that shares no memory with the message."""
    dtype = torch.bfloat16 if context.dtype == common_pb2.DATA_TYPE_BFLOAT16 else torch.float32
    return torch.frombuffer(bytearray(context.data), dtype=dtype).view(context.num_rows, -1)


def _to_block(request: drafter_pb2.DraftRequest, i: int, proposal: Proposal) -> common_pb2.DraftBlock:
    return common_pb2.DraftBlock(
        sequence_id=request.sequence_ids[i],
        epoch=request.epochs[i],
        committed_len=request.committed_lens[i],
        num_slots=proposal.num_slots,
        num_candidates=proposal.num_candidates,
        candidate_ids=proposal.candidate_ids,
        log_probs=proposal.log_probs,
        is_drawn=proposal.is_drawn,
    )
