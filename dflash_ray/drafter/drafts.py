"""From a request to its reply: sessions open and close, rows are waited for, one pass, who is missing and why."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from dflash_ray.core.watchdog import Watchdog
from dflash_ray.drafter.arrivals import Arrival, Arrivals, Wait
from dflash_ray.drafter.feature_sources import FeatureSources
from dflash_ray.drafter.sessions import COMING, LOST, PASSED, DraftSessions, Key, Proposal, Reason, Rows
from dflash_ray.models.dflash2 import Draw
from dflash_ray.pb import common_pb2, drafter_pb2

logger = logging.getLogger(__name__)
T = TypeVar("T")
_PROPOSAL_COLUMNS = (
    "committed_lens",
    "anchor_token_ids",
    "num_draft_tokens",
    "temperatures",
    "seeds",
    "wants_distributions",
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
            keys = [(stream, sequence_id) for sequence_id in request.sequence_ids]
            arrivals = [self._arrivals.get(key) for key in keys]
            await self._wait(arrivals, request)
            await self._draft(keys, arrivals, request, reply)
        reply.queue_ns = max(0, time.perf_counter_ns() - received_ns - reply.draft_ns)
        return reply

    def drop_stream(self, stream: int) -> None:
        """Forgets every session of a stream that has ended."""
        self._close(self._arrivals.of_stream(stream))
        if self._sources is not None:
            self._sources.drop_stream(stream)

    def _close(self, keys: Iterable[Key]) -> None:
        closed = [(key, arrival) for key in keys if (arrival := self._arrivals.close(key)) is not None]
        if closed:
            if self._sources is not None:
                self._sources.unsubscribe([arrival for _, arrival in closed])
            # Not awaited: the handler may be ending by cancellation, and the thread keeps the order of its work.
            self._compute.submit(self._sessions.close, [key for key, _ in closed])

    def _open(self, stream: int, request: drafter_pb2.DraftRequest) -> None:
        """Subscribes to the rows of sequences, from those that have come on."""
        if not request.open:
            return
        if self._sources is None:
            raise ValueError("open: this drafter reads token ids alone")
        keys = [(stream, sequence_id) for sequence_id in request.open]
        known = zip(keys, request.open_lens, strict=True)
        self._close([key for key, most in known if (held := self._arrivals.get(key)) is not None and held.end > most])
        wanted = [(self._arrivals.open(key), key[1]) for key in keys]
        self._sources.unsubscribe([arrival for arrival, _ in wanted])
        source = self._sources.open(request.source.address, stream)
        source.subscribe(request.epoch, request.source.step_id, wanted)

    def _take_tokens(self, stream: int, request: drafter_pb2.DraftRequest) -> None:
        at = 0
        columns = (request.token_sequence_ids, request.token_starts, request.num_tokens)
        for sequence_id, start, count in zip(*columns, strict=True):
            arrival = self._arrivals.open((stream, sequence_id))
            # Behind a gap they are not kept, and the proposal says so.
            self._arrivals.put(arrival, start, None, request.token_ids[at : at + count])
            at += count

    async def _wait(self, arrivals: list[Arrival | None], request: drafter_pb2.DraftRequest) -> None:
        """Gives rows that are on their way some time to come."""
        wait = Wait()
        lacking = []
        for arrival, committed_len in zip(arrivals, request.committed_lens, strict=True):
            if arrival is None:
                continue
            if arrival.end >= committed_len - 1:
                arrival.is_behind = False
            elif arrival.is_coming and not arrival.is_behind:
                arrival.wait_for(committed_len - 1, wait)
                lacking.append(arrival)
        await wait.over(request.max_wait_ms / 1000)
        for arrival in lacking:
            arrival.is_behind = arrival.end < arrival.wanted
            arrival.wait = None

    async def _draft(
        self,
        keys: list[Key],
        arrivals: list[Arrival | None],
        request: drafter_pb2.DraftRequest,
        reply: drafter_pb2.DraftReply,
    ) -> None:
        """Drafts for the sessions whose rows have come."""
        proposals, sources, faults = _ready(keys, arrivals, request)
        if proposals:
            rows = self._arrivals.take(sources)
            lost, blocks, missing, reply.draft_ns = await self._run(
                lambda: self._extend_and_propose(rows, proposals, request)
            )
            self._lose(lost)
            faults |= missing | lost
            reply.blocks.CopyFrom(blocks)
        for key, reason in faults.items():
            arrival = self._arrivals.get(key)
            reply.missing_ids.append(key[1])
            reply.have_lens.append(0 if arrival is None else arrival.end)
            reply.missing_reasons.append(reason)

    def _extend_and_propose(
        self, rows: list[Rows], proposals: list[Proposal], request: drafter_pb2.DraftRequest
    ) -> tuple[dict[Key, Reason], common_pb2.DraftBlocks, dict[Key, Reason], int]:
        """Sessions that were lost, blocks, why others have none, and how long it took."""
        started_ns = time.perf_counter_ns()
        lost = self._sessions.extend(rows)
        if lost:
            proposals = [one for one in proposals if one.key not in lost]
        blocks, missing = self._sessions.propose(proposals, request.tree_width, request.epoch)
        for key, reason in missing.items():
            if reason != PASSED:
                lost[key] = reason
        return lost, blocks, missing, time.perf_counter_ns() - started_ns

    async def _take_rows(self) -> None:
        """Takes rows while nothing is to be drafted, so that they are there when it is."""
        while True:
            rows = await self._arrivals.next_turn()
            if rows:
                self._lose(await self._run(lambda rows=rows: self._sessions.extend(rows)))

    def _lose(self, lost: dict[Key, Reason]) -> None:
        """Sessions that the compute thread has dropped."""
        for key, reason in lost.items():
            arrival = self._arrivals.get(key)
            if arrival is not None:
                self._arrivals.lose(arrival, reason)
                if self._sources is not None:
                    self._sources.unsubscribe([arrival])

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


def _ready(
    keys: list[Key], arrivals: list[Arrival | None], request: drafter_pb2.DraftRequest
) -> tuple[list[Proposal], list[Arrival], dict[Key, Reason]]:
    """Proposals whose rows have come, where these are, and why there is none for the others."""
    ready: list[Proposal] = []
    sources: list[Arrival] = []
    faults: dict[Key, Reason] = {}
    columns = (
        request.committed_lens, request.anchor_token_ids, request.num_draft_tokens,
        request.temperatures, request.seeds, request.wants_distributions,
    )  # fmt: skip
    for key, arrival, committed_len, anchor_id, count, *draw in zip(keys, arrivals, *columns, strict=True):
        if arrival is None or arrival.fault is not None:
            faults[key] = LOST if arrival is None or arrival.fault is None else arrival.fault
        elif arrival.end >= committed_len:
            faults[key] = PASSED
        elif arrival.end < committed_len - 1:
            faults[key] = COMING if arrival.is_coming else LOST
        else:
            ready.append(Proposal(key, committed_len, anchor_id, count, Draw(*draw)))
            sources.append(arrival)
    return ready, sources, faults


def _check_columns(request: drafter_pb2.DraftRequest) -> None:
    """Raises ValueError that names the column whose length is not that of its ids."""
    parts = {
        "sequence_ids": _PROPOSAL_COLUMNS,
        "open": ("open_lens",),
        "token_sequence_ids": ("token_starts", "num_tokens"),
    }
    for ids, names in parts.items():
        count = len(getattr(request, ids))
        for name in names:
            if len(getattr(request, name)) != count:
                raise ValueError(f"{name} has {len(getattr(request, name))} elements for {count} {ids}")
        if len(set(getattr(request, ids))) != count:
            raise ValueError(f"{ids}: a sequence is in the request twice")
    if len(request.token_ids) != sum(request.num_tokens):
        raise ValueError(f"token_ids has {len(request.token_ids)} elements for {sum(request.num_tokens)} tokens")
