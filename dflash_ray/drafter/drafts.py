"""From a request to its reply: sessions open and close, rows are waited for, one pass, who is missing and why."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from dflash_ray.core.arrays import Flags, Ints, column
from dflash_ray.core.watchdog import Watchdog
from dflash_ray.drafter.arrivals import NO_SESSION, Arrivals
from dflash_ray.drafter.feature_sources import FeatureSources
from dflash_ray.drafter.rows import Rows
from dflash_ray.drafter.sessions import COMING, LOST, PASSED, DraftSessions, Draws, Key, Proposals, Reason
from dflash_ray.pb import common_pb2, drafter_pb2

logger = logging.getLogger(__name__)
T = TypeVar("T")
_READY = 0  # in place of a reason why there is no draft
_PROPOSAL_COLUMNS = (
    "committed_lens",
    "anchor_token_ids",
    "num_draft_tokens",
    "temperatures",
    "seeds",
)


class Drafts:
    """Requests of all routers' streams over the sessions of one replica.

    Everything here runs on the event loop but what `_run` is given, which has the sessions to itself.

    Args:
        on_busy: called with the start and the end, in seconds of time.monotonic(), of work on the sessions.
    """

    def __init__(
        self,
        sessions: DraftSessions,
        arrivals: Arrivals,
        sources: FeatureSources | None,
        watchdog: Watchdog,
        on_busy: Callable[[float, float], None],
    ) -> None:
        self._sessions = sessions
        self._arrivals = arrivals
        self._sources = sources
        self._watchdog = watchdog
        self._on_busy = on_busy
        # OpenMP keeps a pool of threads for each calling thread, so all passes come from one.
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="draft")
        self._taking: asyncio.Task[None] | None = None

    async def answer(self, stream: int, request: drafter_pb2.DraftRequest) -> drafter_pb2.DraftReply:
        """Closes, opens and drafts, in this order; every proposal gets a block or is missing.

        Raises ValueError when the request is malformed; what it asks for may be done in part then.
        """
        received_ns = time.perf_counter_ns()
        _check_columns(request)
        if self._taking is None or self._taking.done():
            self._taking = asyncio.create_task(self._take_rows())
        self._close([(stream, sequence_id) for sequence_id in request.close])
        self._open(stream, request)
        self._take_tokens(stream, request)
        reply = drafter_pb2.DraftReply(request_id=request.request_id)
        if request.sequence_ids:
            sequence_ids, committed_lens = column(request.sequence_ids), column(request.committed_lens)
            sessions = self._arrivals.sessions(stream, sequence_ids.tolist())
            if await self._has_waited(sessions, committed_lens, request):
                sessions = self._arrivals.sessions(stream, sequence_ids.tolist())
            await self._draft(sessions, sequence_ids, committed_lens, request, reply)
        reply.queue_ns = max(0, time.perf_counter_ns() - received_ns - reply.draft_ns)
        return reply

    def drop_stream(self, stream: int) -> None:
        """Forgets every session of a stream that has ended."""
        self._close(self._arrivals.of_stream(stream))
        if self._sources is not None:
            self._sources.drop_stream(stream)

    def _close(self, keys: Iterable[Key]) -> None:
        closed = self._arrivals.close(keys)
        if closed:
            if self._sources is not None:
                self._sources.unsubscribe(closed)
            # Not awaited: the handler may be ending by cancellation, and the thread keeps the order of its work.
            work = asyncio.get_running_loop().run_in_executor(self._compute, self._sessions.close, closed)
            work.add_done_callback(lambda _: self._arrivals.release(closed))

    def _open(self, stream: int, request: drafter_pb2.DraftRequest) -> None:
        """Subscribes to the rows of sequences, from those that have come on."""
        if not request.open:
            return
        if self._sources is None:
            raise ValueError("open: this drafter reads token ids alone")
        arrivals, keys = self._arrivals, [(stream, sequence_id) for sequence_id in request.open]
        known = zip(keys, request.open_lens, strict=True)
        self._close(
            [key for key, most in known if (at := arrivals.session(key)) != NO_SESSION and arrivals.ends[at] > most]
        )
        sessions = [arrivals.open(key) for key in keys]
        self._sources.unsubscribe(sessions)
        source = self._sources.open(request.source.address, stream)
        source.subscribe(request.epoch, request.source.step_id, sessions, list(request.open))

    def _take_tokens(self, stream: int, request: drafter_pb2.DraftRequest) -> None:
        if not request.token_sequence_ids:
            return
        sessions = [self._arrivals.open((stream, sequence_id)) for sequence_id in request.token_sequence_ids]
        rows = Rows.of(
            np.array(sessions),
            column(request.token_starts),
            column(request.num_tokens),
            np.array(request.token_ids, dtype=np.uint32),
        )
        self._arrivals.put(rows)  # behind a gap they are not kept, and the proposal says so

    async def _has_waited(self, sessions: Ints, committed_lens: Ints, request: drafter_pb2.DraftRequest) -> bool:
        """Gives rows that are on their way some time to come, in which sessions may end; False where there are none."""
        arrivals = self._arrivals
        is_known = sessions != NO_SESSION
        sessions, wanted = sessions[is_known], committed_lens[is_known] - 1
        is_lacking = arrivals.ends[sessions] < wanted
        arrivals.is_behind[sessions[~is_lacking]] = False
        is_lacking &= arrivals.is_coming[sessions] & ~arrivals.is_behind[sessions]
        if not is_lacking.any():
            return False
        sessions, wanted = sessions[is_lacking], wanted[is_lacking]
        await arrivals.wait(sessions, wanted, request.max_wait_ms / 1000)
        arrivals.is_behind[sessions] = arrivals.ends[sessions] < wanted
        return True

    async def _draft(
        self,
        sessions: Ints,
        sequence_ids: Ints,
        committed_lens: Ints,
        request: drafter_pb2.DraftRequest,
        reply: drafter_pb2.DraftReply,
    ) -> None:
        """Drafts for the sessions whose rows have come, and says why there is nothing for the others."""
        reasons = self._reasons(sessions, committed_lens)
        is_ready = reasons == _READY
        if is_ready.any():
            wanted = Proposals(
                sessions,
                sequence_ids,
                committed_lens,
                column(request.anchor_token_ids),
                column(request.num_draft_tokens),
                Draws(
                    np.array(request.temperatures, dtype=np.float32),
                    np.array(request.seeds, dtype=np.uint64),
                    _flags(request.wants_distributions, len(sessions)),
                ),
            )
            if not is_ready.all():
                wanted = wanted.only(is_ready)
            rows = self._arrivals.take(wanted.sessions)
            lost, blocks, missing, reply.draft_ns = await self._run(
                lambda: self._extend_and_propose(rows, wanted, request)
            )
            self._lose(lost)
            reply.blocks.CopyFrom(blocks)
            for session, reason in (missing | lost).items():
                reasons[sessions == session] = reason
        places = (reasons != _READY).nonzero()[0]
        if len(places):
            is_known = sessions[places] != NO_SESSION
            reply.missing_ids.extend(sequence_ids[places].tolist())
            reply.have_lens.extend(np.where(is_known, self._arrivals.ends[sessions[places]], 0).tolist())
            reply.missing_reasons.extend(reasons[places].tolist())

    def _reasons(self, sessions: Ints, committed_lens: Ints) -> Ints:
        """[n] why there can be no draft, or _READY where all rows have come."""
        ends, faults = self._arrivals.ends[sessions], self._arrivals.faults[sessions]
        lacking = np.where(self._arrivals.is_coming[sessions], COMING, LOST)
        reasons = np.where(ends >= committed_lens, PASSED, np.where(ends < committed_lens - 1, lacking, _READY))
        reasons = np.where(faults != _READY, faults, reasons)
        reasons[sessions == NO_SESSION] = LOST
        return reasons

    def _extend_and_propose(
        self, rows: list[Rows], wanted: Proposals, request: drafter_pb2.DraftRequest
    ) -> tuple[dict[int, Reason], common_pb2.DraftBlocks, dict[int, Reason], int]:
        """Sessions that were lost, blocks, why others have none, and how long it took."""
        started_ns = time.perf_counter_ns()
        lost = self._sessions.extend(rows)
        if lost:
            wanted = wanted.only(~np.isin(wanted.sessions, list(lost)))
        blocks, missing = self._sessions.propose(wanted, request.tree_width, request.epoch)
        for session, reason in missing.items():
            if reason != PASSED:
                lost[session] = reason
        return lost, blocks, missing, time.perf_counter_ns() - started_ns

    async def _take_rows(self) -> None:
        """Takes rows while nothing is to be drafted, so that they are there when it is."""
        while True:
            rows = await self._arrivals.next_turn()
            if rows:
                self._lose(await self._run(lambda rows=rows: self._sessions.extend_ahead(rows)))

    def _lose(self, lost: dict[int, Reason]) -> None:
        """Sessions that the compute thread has dropped."""
        if lost:
            sessions = list(lost)
            self._arrivals.lose(sessions, list(lost.values()))
            if self._sources is not None:
                self._sources.unsubscribe(sessions)

    async def _run(self, work: Callable[[], T]) -> T:
        """Runs work on the compute thread."""
        return await asyncio.get_running_loop().run_in_executor(self._compute, self._timed, work)

    def _timed(self, work: Callable[[], T]) -> T:
        start = time.monotonic()
        try:
            with self._watchdog.watch():
                return work()
        finally:
            self._on_busy(start, time.monotonic())

    async def close(self) -> None:
        """Ends the streams to target groups."""
        if self._taking is not None:
            self._taking.cancel()
        if self._sources is not None:
            await self._sources.close()


def _flags(values: Sequence[bool], count: int) -> Flags:
    """A column that is empty where it is False for all."""
    return np.array(values, dtype=np.bool_) if values else np.zeros(count, dtype=np.bool_)


def _check_columns(request: drafter_pb2.DraftRequest) -> None:
    """Raises ValueError that names the column whose length is not that of its ids."""
    parts = {
        "sequence_ids": _PROPOSAL_COLUMNS,
        "open": ("open_lens",),
        "token_sequence_ids": ("token_starts", "num_tokens"),
    }
    if request.wants_distributions:
        parts["sequence_ids"] = (*_PROPOSAL_COLUMNS, "wants_distributions")
    for ids, names in parts.items():
        count = len(getattr(request, ids))
        for name in names:
            if len(getattr(request, name)) != count:
                raise ValueError(f"{name} has {len(getattr(request, name))} elements for {count} {ids}")
        if len(set(getattr(request, ids))) != count:
            raise ValueError(f"{ids}: a sequence is in the request twice")
    if len(request.token_ids) != sum(request.num_tokens):
        raise ValueError(f"token_ids has {len(request.token_ids)} elements for {sum(request.num_tokens)} tokens")
