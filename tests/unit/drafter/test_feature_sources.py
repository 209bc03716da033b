"""A drafter fetches rows from target groups over gRPC: what it drafts from, what it waits for, and what it reports."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
import torch

from dflash_ray.core.watchdog import Watchdog
from dflash_ray.drafter import arrivals
from dflash_ray.drafter.arrivals import Arrivals
from dflash_ray.drafter.drafts import Drafts
from dflash_ray.drafter.feature_sources import FeatureSources
from dflash_ray.drafter.sessions import DraftSessions
from dflash_ray.models.draft_contexts import ContextRows
from dflash_ray.models.draft_proposals import DraftProposal, DraftProposals
from dflash_ray.pb import drafter_pb2, target_pb2
from dflash_ray.target_group.feature_streams import SharedRows
from tests.feature_groups import (
    FINGERPRINT,
    LIMIT,
    PIECE_ROWS,
    WIDTH,
    FeatureGroup,
    feature_group,
    subscribed_ids,
    truth,
)
from tests.toy import drafts_of

ROOM = 20_000
LONG_MS = 20_000


class Recorder:
    """Keeps the first value of each row, and drafts the sequence that its rows are of."""

    name, fingerprint, max_draft_tokens, feature_width = "recorder", FINGERPRINT, 7, WIDTH

    def __init__(self) -> None:
        self.contexts: dict[int, torch.Tensor] = {}

    def open(self, session: int) -> None:
        self.contexts[session] = torch.empty(0)

    def close(self, session: int) -> None:
        del self.contexts[session]

    def extend(self, rows: ContextRows) -> None:
        at = 0
        for session, start, count in zip(rows.sessions, rows.starts, rows.counts, strict=True):
            assert start == len(self.contexts[session])
            self.contexts[session] = torch.cat([self.contexts[session], rows.features[at : at + count, 0]])
            at += count

    def catch_up(self) -> None:
        pass

    def propose(self, sessions, anchor_ids, num_draft_tokens, num_candidates, draws, tree_width=1) -> DraftProposals:
        proposals = []
        for session in sessions:
            context = self.contexts[session]
            sequence_id = int(context[0]) // 1000
            assert torch.equal(context, truth(sequence_id, 0, len(context))[:, 0])
            proposals.append(DraftProposal(torch.tensor([[sequence_id]]), torch.zeros(1, 1)))
        return DraftProposals.of(proposals)


class Replica:
    """The parts of a replica behind its gRPC service."""

    def __init__(self, room: int = ROOM, fingerprint: str = FINGERPRINT, reads_shared_memory: bool = True) -> None:
        self.arrivals = Arrivals()
        self.sessions = DraftSessions(Recorder(), room)
        self.sources = FeatureSources("d", fingerprint, WIDTH, LIMIT, self.arrivals, reads_shared_memory)
        watchdog = Watchdog(600, "a draft pass")
        self._drafts = Drafts(self.sessions, self.arrivals, self.sources, watchdog, on_busy=lambda start, end: None)
        self.drop_stream, self.close = self._drafts.drop_stream, self._drafts.close

    async def open(self, group: FeatureGroup, *sequence_ids: int, most: int = 10**6, **source) -> None:
        """Tells it of sequences, as routers do."""
        reply = await self._drafts.answer(0, open_request(group.address, sequence_ids, most, **source))
        assert not reply.missing_ids

    async def draft(self, wait_ms: int = LONG_MS, stream: int = 0, **committed: int) -> dict[int, int | str]:
        """Drafts, or why there is none, by sequence; committed lengths as `s7=20`."""
        ids, count = [int(name.removeprefix("s")) for name in committed], len(committed)
        request = drafter_pb2.DraftRequest(
            epoch=1,
            max_wait_ms=wait_ms,
            sequence_ids=ids,
            committed_lens=committed.values(),
            anchor_token_ids=[0] * count,
            num_draft_tokens=[1] * count,
            temperatures=[0.0] * count,
            seeds=[0] * count,
            wants_distributions=[False] * count,
        )
        async with asyncio.timeout(60):
            reply = await self._drafts.answer(stream, request)
        answers: dict[int, int | str] = {sequence_id: ids[0] for sequence_id, ids in drafts_of(reply.blocks).items()}
        for sequence_id, reason in zip(reply.missing_ids, reply.missing_reasons, strict=True):
            answers[sequence_id] = drafter_pb2.MissingReason.Name(reason).removeprefix("MISSING_REASON_")
        assert answers.keys() == set(ids), "every proposal is answered"
        return answers


def open_request(
    address: str, sequence_ids: tuple[int, ...], most: int = 10**6, epoch: int = 1, step_id: int = 0
) -> drafter_pb2.DraftRequest:
    return drafter_pb2.DraftRequest(
        epoch=epoch,
        source=drafter_pb2.FeatureSource(address=address, step_id=step_id),
        open=sequence_ids,
        open_lens=[most] * len(sequence_ids),
    )


@pytest.fixture
async def replica() -> AsyncIterator[Replica]:
    replica = Replica()
    yield replica
    await replica.close()


@pytest.fixture(params=[False, True], ids=["in messages", "in shared memory"])
async def group(request) -> AsyncIterator[FeatureGroup]:
    async with feature_group(shares=request.param) as group:
        yield group


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_draft_waits_for_rows_that_are_on_their_way(group, replica):
    await replica.open(group, 7, step_id=1)
    waiting = asyncio.create_task(replica.draft(s7=21))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    group.receive(opens=[7])
    group.compute(s7=10)
    group.step(s7=20)
    assert await waiting == {7: 7}
    group.step(s7=24)
    assert await replica.draft(s7=25) == {7: 7}


async def test_a_long_prompts_context_is_there_before_its_first_draft_is_asked_for(group, replica):
    group.receive(opens=[7])
    await replica.open(group, 7)
    for end in (500, 1000, 1500):
        group.step(s7=end)
    await until(lambda: replica.sessions.num_context_rows == 1500)
    assert await replica.draft(wait_ms=0, s7=1501) == {7: 7}


async def test_rows_that_do_not_come_in_time_hold_up_one_request_and_the_others_are_drafted_for(group, replica):
    group.receive(opens=[1, 2])
    await replica.open(group, 1, 2)
    group.step(s1=10, s2=10)
    assert await replica.draft(s1=11, s2=11) == {1: 1, 2: 2}
    assert await replica.draft(wait_ms=50, s1=15, s2=11) == {1: "COMING", 2: 2}
    started = asyncio.get_running_loop().time()
    assert await replica.draft(s1=15, s2=11) == {1: "COMING", 2: 2}, "it is not waited for a second time"
    assert asyncio.get_running_loop().time() - started < LONG_MS / 1000
    group.step(s1=14)
    await until(lambda: replica.arrivals.ends[replica.arrivals.session((0, 1))] == 14)
    assert await replica.draft(s1=15, s2=11) == {1: 1, 2: 2}


async def test_a_proposal_that_the_sequence_has_passed_is_said_to_be(group, replica):
    group.receive(opens=[1])
    await replica.open(group, 1)
    group.step(s1=10)
    assert await replica.draft(s1=11) == {1: 1}
    assert await replica.draft(s1=9) == {1: "PASSED"}
    assert await replica.draft(s1=11) == {1: 1}


async def test_what_the_target_has_not_is_lost_at_once(group, replica):
    group.receive(opens=[1])
    await replica.open(group, 1, 2)
    await replica.open(group, 3, epoch=9)
    group.step(s1=10)
    assert await replica.draft(s1=11, s2=11, s3=11) == {1: 1, 2: "LOST", 3: "LOST"}
    group.receive(closes=[1])
    assert await replica.draft(s1=15) == {1: "LOST"}


async def test_a_sequence_that_is_opened_again_goes_on_from_the_rows_that_are_held(group, replica):
    group.receive(opens=[1])
    await replica.open(group, 1)
    group.step(s1=100)
    await replica.draft(s1=101)
    group.receive(opens=[1], closes=[1])
    await replica.open(group, 1, most=100, step_id=group.step_id)
    group.compute(s1=60)
    group.step(s1=104)
    assert await replica.draft(s1=105) == {1: 1}
    assert group.num_read == 104


async def test_a_context_with_rows_of_another_past_starts_again(group, replica):
    group.receive(opens=[1])
    await replica.open(group, 1)
    group.step(s1=100)
    await replica.draft(s1=101)
    group.receive(opens=[1], closes=[1])
    await replica.open(group, 1, most=99, step_id=group.step_id)
    group.compute(s1=100)
    assert await replica.draft(s1=101) == {1: 1}
    assert group.num_read == 200


async def test_rows_without_room_end_their_session_and_no_more_of_them_are_fetched(group):
    replica = Replica(room=50)
    group.receive(opens=[1, 2])
    await replica.open(group, 1, 2)
    group.step(s1=40)
    assert await replica.draft(s1=41) == {1: 1}
    group.step(s2=20)
    assert await replica.draft(s1=41, s2=21) == {1: 1, 2: "REFUSED"}
    await until(lambda: 2 not in subscribed_ids(group.streams))
    assert replica.sessions.num_context_rows == 40
    await replica.close()


async def test_a_stream_that_breaks_loses_what_comes_over_it_and_is_opened_again(replica):
    async with feature_group() as group:
        group.receive(opens=[1])
        await replica.open(group, 1)
        group.step(s1=10)
        assert await replica.draft(s1=11) == {1: 1}
        waiting = asyncio.create_task(replica.draft(s1=15))
        await asyncio.sleep(0.05)
    assert await waiting == {1: "LOST"}, "the end of the stream is the end of the wait"
    async with feature_group(port=int(group.address.rpartition(":")[2])) as back:
        back.receive(opens=[1])
        back.compute(s1=14)
        await replica.open(back, 1)
        assert await replica.draft(s1=15) == {1: 1}
        assert back.num_read == 4, "the rows that are held are not fetched again"


async def test_a_target_that_cannot_be_reached_costs_the_drafts_and_nothing_hangs(group, replica):
    async with feature_group() as gone:
        pass
    group.receive(opens=[2])
    group.compute(s2=5)
    await replica.open(gone, 1)
    await replica.open(group, 2)
    assert await replica.draft(s1=11, s2=6) == {1: "LOST", 2: 2}


async def test_features_of_another_drafters_fc_are_not_taken(group, caplog):
    replica = Replica(fingerprint="another fc")
    group.receive(opens=[1])
    group.compute(s1=10)
    await replica.open(group, 1)
    assert await replica.draft(s1=11) == {1: "LOST"}
    assert "'another fc'" in caplog.text and FINGERPRINT in caplog.text
    await replica.close()


async def test_two_routers_share_the_stream_to_a_target_and_the_last_one_ends_it(group, replica):
    group.receive(opens=[1])
    group.compute(s1=10)
    await replica.open(group, 1)
    await replica._drafts.answer(5, open_request(group.address, (1,)))
    assert await replica.draft(s1=11) == await replica.draft(stream=5, s1=11) == {1: 1}
    assert group.num_streams == 1 and len(replica.sessions) == 2
    replica.drop_stream(0)
    assert await replica.draft(stream=5, s1=11) == {1: 1} and len(replica.sessions) == 1
    replica.drop_stream(5)
    await until(lambda: not group.streams._streams)


async def test_a_drafter_that_cannot_keep_up_stops_reading_and_misses_nothing(group, monkeypatch):
    monkeypatch.setattr(arrivals, "_MAX_WAITING_BYTES", 4 * PIECE_ROWS * WIDTH * 4)
    replica = Replica(reads_shared_memory=False)
    group.receive(opens=[1])
    await replica.open(group, 1)
    hold, release = asyncio.Event(), asyncio.Event()
    run = replica._drafts._run

    async def slow(work):
        hold.set()
        await release.wait()
        return await run(work)

    replica._drafts._run = slow
    group.step(s1=100 * PIECE_ROWS)
    await hold.wait()
    await until(lambda: not replica.arrivals._has_room.is_set())
    release.set()
    assert await replica.draft(s1=100 * PIECE_ROWS + 1) == {1: 1}
    await replica.close()


@pytest.fixture
async def sharing() -> AsyncIterator[FeatureGroup]:
    async with feature_group(shares=True) as group:
        yield group


async def until_mapped(group: FeatureGroup) -> None:
    await until(lambda: any(stream.names_rows for stream in group.streams._streams))


async def test_rows_in_shared_memory_are_named_and_none_are_sent(sharing, replica, monkeypatch):
    await replica.open(sharing, 7, step_id=1)
    await until_mapped(sharing)
    monkeypatch.setattr(sharing.streams, "_read", None)
    sharing.receive(opens=[7])
    for end in (10, 16, 2000):
        sharing.step(s7=end)
        assert await replica.draft(s7=end + 1) == {7: 7}


@pytest.mark.parametrize("place", [{"name": "another"}, {"fd": 10**6}, {"num_pages": 1}], ids=str)
async def test_rows_are_sent_where_the_memory_is_not_to_be_had(sharing, replica, place):
    offer = sharing.streams._shared.offer
    offer.MergeFrom(target_pb2.FeatureMemory(**place))
    sharing.streams._shared = SharedRows(offer, None)
    sharing.receive(opens=[7])
    await replica.open(sharing, 7)
    sharing.step(s7=20)
    assert await replica.draft(s7=21) == {7: 7}


async def test_a_drafter_may_want_its_rows_in_messages(sharing):
    replica = Replica(reads_shared_memory=False)
    sharing.streams._shared = SharedRows(sharing.streams._shared.offer, None)
    sharing.receive(opens=[7])
    await replica.open(sharing, 7)
    sharing.step(s7=20)
    assert await replica.draft(s7=21) == {7: 7}
    await replica.close()


async def test_rows_whose_page_was_handed_on_before_they_were_taken_are_lost_and_nothing_else_is_drafted_from(
    sharing, replica
):
    sharing.receive(opens=[1, 2])
    await replica.open(sharing, 1, 2)
    await until_mapped(sharing)
    hold = threading.Event()
    replica._drafts._compute.submit(hold.wait)
    sharing.step(s1=40, s2=40)
    await until(lambda: replica.arrivals.ends[replica.arrivals.session((0, 1))] == 40)
    sharing.receive(opens=[3], closes=[1])
    sharing.compute(s3=8)
    hold.set()
    assert await replica.draft(s1=41, s2=41) == {1: "LOST", 2: 2}
    assert await replica.draft(s2=41) == {2: 2}
