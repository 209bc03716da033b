"""Draft requests of one replica: which sessions a stream holds, and what it gets for a request.

All work on tensors happens here, on the one thread that the servicer gives it. Knows nothing of gRPC streams.
"""

from __future__ import annotations

import logging
import time

import torch

from dflash_ray.models.context_features import rows_of
from dflash_ray.models.dflash2 import Draw
from dflash_ray.models.draft_contexts import DraftContexts, DraftMethod, Extension, to_block
from dflash_ray.pb import common_pb2, drafter_pb2

logger = logging.getLogger(__name__)
_PROPOSAL_COLUMNS = (
    "epochs",
    "committed_lens",
    "anchor_token_ids",
    "num_draft_tokens",
    "temperatures",
    "seeds",
    "wants_distributions",
)


class DraftSessions:
    """Sessions of all streams over one draft method.

    Two routers may use the same sequence id, so sessions are keyed by (stream, sequence).

    Args:
        max_context_tokens: context rows held over all sessions.
    """

    def __init__(self, method: DraftMethod, max_context_tokens: int) -> None:
        self._method = method
        self._contexts: DraftContexts[tuple[int, int]] = DraftContexts(method, max_context_tokens)

    def __len__(self) -> int:
        return len(self._contexts)

    @property
    def num_context_rows(self) -> int:
        return self._contexts.num_rows

    def answer(self, stream: int, request: drafter_pb2.DraftRequest) -> drafter_pb2.DraftReply:
        """Closes, extends and drafts, in this order; every proposal gets a block or a MissingContext.

        Raises ValueError when the request is malformed; what it asks for may be done in part then.
        """
        start_ns = time.perf_counter_ns()
        _check_columns(request)
        for sequence_id in request.close:
            self._contexts.close((stream, sequence_id))
        at_fault: dict[int, drafter_pb2.MissingContext] = {}
        for context in request.contexts:
            self._extend(stream, context, at_fault)
        reply = drafter_pb2.DraftReply(request_id=request.request_id)
        ready = self._ready_entries(stream, request, at_fault)
        if ready:
            self._propose(stream, request, ready, reply, at_fault)
        reply.missing.extend(at_fault.values())
        reply.draft_ns = time.perf_counter_ns() - start_ns
        return reply

    def drop_stream(self, stream: int) -> None:
        """Forgets every session of a stream that has ended."""
        self._contexts.close_all(lambda key: key[0] == stream)

    def _extend(
        self, stream: int, context: common_pb2.ContextFeatures, at_fault: dict[int, drafter_pb2.MissingContext]
    ) -> None:
        """Takes a context's rows; one that cannot be taken puts its sequence among those at fault."""
        sequence_id = context.sequence_id
        width = self._method.feature_width
        features = rows_of(context, width) if width else None
        if len(context.token_ids) != context.num_rows and (context.token_ids or not width):
            raise ValueError(f"contexts: {len(context.token_ids)} token_ids of sequence {sequence_id} for its rows")
        if sequence_id in at_fault:
            return  # what follows a gap, or rows that found no room, cannot be taken either
        try:
            extension = self._contexts.extend((stream, sequence_id), context.start, features, context.token_ids)
        except Exception:
            logger.exception("rows could not be taken; their session is dropped")
            extension = Extension.GAP
        if extension is not Extension.HELD:
            at_fault[sequence_id] = drafter_pb2.MissingContext(
                sequence_id=sequence_id,
                have_len=self._contexts.context_len((stream, sequence_id)),
                is_refused=extension is Extension.REFUSED,
            )

    def _ready_entries(
        self, stream: int, request: drafter_pb2.DraftRequest, at_fault: dict[int, drafter_pb2.MissingContext]
    ) -> list[int]:
        ready = []
        for i, sequence_id in enumerate(request.sequence_ids):
            if sequence_id in at_fault:
                continue
            held, wanted = self._contexts.context_len((stream, sequence_id)), request.committed_lens[i] - 1
            if held == wanted and held:
                ready.append(i)
                continue
            if held > wanted:  # the router's sequence was rebuilt: this context belongs to another past
                self._contexts.close((stream, sequence_id))
                held = 0
            at_fault[sequence_id] = drafter_pb2.MissingContext(sequence_id=sequence_id, have_len=held)
        return ready

    def _propose(
        self,
        stream: int,
        request: drafter_pb2.DraftRequest,
        ready: list[int],
        reply: drafter_pb2.DraftReply,
        at_fault: dict[int, drafter_pb2.MissingContext],
    ) -> None:
        """Adds a block for each entry that is ready, or puts all of them among those at fault."""
        try:
            proposals = self._contexts.propose(
                [(stream, request.sequence_ids[i]) for i in ready],
                [request.anchor_token_ids[i] for i in ready],
                [min(request.num_draft_tokens[i], self._method.max_draft_tokens) for i in ready],
                max(1, request.num_candidates),
                [Draw(request.temperatures[i], request.seeds[i], request.wants_distributions[i]) for i in ready],
            )
        except Exception as error:
            # A draft is advice: the router goes on without it, and the sessions at fault are rebuilt.
            logger.exception("a draft pass failed; its sessions are dropped")
            is_full = isinstance(error, torch.OutOfMemoryError)
            for i in ready:
                sequence_id = request.sequence_ids[i]
                at_fault[sequence_id] = drafter_pb2.MissingContext(sequence_id=sequence_id, is_refused=is_full)
            return
        for i, proposal in zip(ready, proposals, strict=True):
            reply.blocks.append(
                to_block(request.sequence_ids[i], request.epochs[i], request.committed_lens[i], proposal)
            )


def _check_columns(request: drafter_pb2.DraftRequest) -> None:
    """Raises ValueError when a column of the proposals has another length than sequence_ids."""
    count = len(request.sequence_ids)
    for name in _PROPOSAL_COLUMNS:
        if len(getattr(request, name)) != count:
            raise ValueError(f"{name} has {len(getattr(request, name))} elements for {count} sequence_ids")
    if len(set(request.sequence_ids)) != count:
        raise ValueError("sequence_ids: a sequence is in the request twice")
