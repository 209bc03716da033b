"""Entries that expire, and leases that outlive the directory that granted them."""

import asyncio
import time

from dflash_ray.rpc.directory import NOTHING_SEEN, Directory, DirectoryActor, Entry, keep_registered
from dflash_ray.rpc.known_entries import KnownEntries, refresh
from tests.directories import LocalDirectory


def ids(directory: Directory, kind: str, now: float) -> list[str]:
    return [entry.id for entry in directory.view(kind, now).entries]


def test_entries_leave_the_directory_when_they_are_silent():
    directory = Directory()
    directory.register(Entry("drafter", "a", "host:1"), ttl_s=5, now=0)
    directory.register(Entry("drafter", "b", "host:2"), ttl_s=5, now=3)
    assert ids(directory, "drafter", 4) == ["a", "b"]
    assert ids(directory, "drafter", 6) == ["b"]


def test_a_lease_has_one_holder_and_a_new_holder_a_higher_epoch():
    directory = Directory()
    first = directory.lease("t", "r1", ttl_s=5, now=0)
    assert directory.lease("t", "r1", ttl_s=5, now=3) == first
    assert directory.lease("t", "r2", ttl_s=5, now=4) is None
    second = directory.lease("t", "r2", ttl_s=5, now=9)
    assert second > first
    directory.release("t", "r1")
    assert directory.lease("t", "r1", ttl_s=5, now=10) is None
    directory.release("t", "r2")
    assert directory.lease("t", "r1", ttl_s=5, now=10) > second


def test_a_renewal_keeps_the_epoch_even_after_the_lease_ran_out_and_nobody_else_was_granted_it():
    directory = Directory()
    epoch = directory.lease("t", "r1", ttl_s=5, now=0)
    assert directory.renew("t", "r1", epoch, ttl_s=5, now=20)
    assert directory.lease("t", "r2", ttl_s=5, now=24) is None
    second = directory.lease("t", "r2", ttl_s=5, now=30)
    assert not directory.renew("t", "r1", epoch, ttl_s=5, now=31)
    assert not directory.renew("t", "r1", epoch, ttl_s=5, now=60), "an old epoch never comes back"
    assert directory.renew("t", "r2", second, ttl_s=5, now=60)


def test_a_restarted_directory_grants_nothing_before_the_holder_had_a_lease_ttl_to_show_its_epoch():
    restarted = Directory(started_at=100)
    assert restarted.lease("t", "r2", ttl_s=5, now=100) is None
    assert restarted.lease("t", "r2", ttl_s=5, now=104.9) is None
    assert restarted.renew("t", "r1", 41, ttl_s=5, now=104.9)
    assert restarted.lease("t", "r2", ttl_s=5, now=106) is None, "the holder was fenced"
    assert restarted.lease("t", "r2", ttl_s=5, now=110) > 41, "epochs rise over a restart"


def test_a_restarted_directory_grants_the_group_of_a_holder_that_is_gone():
    assert Directory(started_at=100).lease("t", "r2", ttl_s=5, now=105) is not None


def test_a_directory_that_was_held_up_gives_holders_the_time_to_renew():
    directory = Directory()
    directory.register(Entry("target", "t", "host:1"), ttl_s=5, now=0)
    epoch = directory.lease("t", "r1", ttl_s=5, now=0)
    directory.woke(20)
    assert directory.view("target", now=20).age_s == 0, "that the entry is absent says nothing"
    assert directory.lease("t", "r2", ttl_s=5, now=20) is None
    assert directory.renew("t", "r1", epoch, ttl_s=5, now=21)


def test_the_actor_takes_a_long_silence_for_its_own():
    actor = DirectoryActor()
    ttl_s = 0.2
    time.sleep(ttl_s)  # since it started
    epoch = actor.lease("t", "r1", ttl_s)
    assert actor.renew("t", "r1", epoch, ttl_s)
    time.sleep(2 * ttl_s)
    assert actor.lease("t", "r2", ttl_s) is None, "the holder had no chance to renew"
    assert actor.renew("t", "r1", epoch, ttl_s)


def test_of_two_that_show_an_epoch_to_a_restarted_directory_the_later_holder_wins_whoever_comes_first():
    for order in ([("r1", 5), ("r2", 6)], [("r2", 6), ("r1", 5)]):
        restarted = Directory(started_at=100)
        for router_id, epoch in order:
            restarted.renew("t", router_id, epoch, ttl_s=5, now=101)
        assert restarted.renew("t", "r2", 6, ttl_s=5, now=102)
        assert not restarted.renew("t", "r1", 5, ttl_s=5, now=102)


def test_a_target_that_is_silent_for_a_while_does_not_lose_its_leader():
    directory = Directory()
    directory.register(Entry("target", "t", "host:1"), ttl_s=5, now=0)
    epoch = directory.lease("t", "r1", ttl_s=5, now=4)
    assert ids(directory, "target", 6) == []
    directory.register(Entry("target", "t", "host:1"), ttl_s=5, now=7)
    assert directory.lease("t", "r2", ttl_s=5, now=7) is None
    assert directory.renew("t", "r1", epoch, ttl_s=5, now=7)


def test_leases_of_targets_that_are_gone_are_forgotten():
    directory = Directory()
    directory.register(Entry("target", "t", "host:1"), ttl_s=5, now=0)
    directory.lease("t", "r1", ttl_s=5, now=0)
    directory.view("target", now=6)
    assert not directory._leases


async def test_nobody_is_forgotten_because_the_directory_is_away_or_has_just_started():
    directory = LocalDirectory()
    known = KnownEntries(directory, "router", ttl_s=2.0)
    await directory.register(Entry("router", "a", "host:1"), ttl_s=2.0)
    assert [entry.id for entry in await known.refresh()] == ["a"]
    directory.is_away = True
    assert [entry.id for entry in await known.refresh()] == ["a"]
    directory.restart()
    assert [entry.id for entry in await known.refresh()] == ["a"]
    await directory.register(Entry("router", "b", "host:2"), ttl_s=2.0)
    assert [entry.id for entry in await known.refresh()] == ["a", "b"]
    async with asyncio.timeout(10):  # those that have not come within a TTL are gone
        while [entry.id for entry in await known.refresh()] != ["b"]:
            await directory.register(Entry("router", "b", "host:2"), ttl_s=2.0)
            await asyncio.sleep(0.02)


async def test_a_reader_that_has_not_asked_for_a_while_does_not_take_the_dead_for_living():
    directory = LocalDirectory()
    known = KnownEntries(directory, "gateway", ttl_s=0.1)
    await directory.register(Entry("gateway", "dead", "host:1"), ttl_s=600)
    assert [entry.id for entry in await known.refresh()] == ["dead"]
    await asyncio.sleep(0.2)
    directory.restart()
    assert await known.refresh() == []


async def test_an_entry_is_registered_again_as_soon_as_it_changes():
    directory = LocalDirectory()
    info = {"ready": False}
    task = asyncio.create_task(keep_registered(directory, lambda: Entry("router", "a", "host:1", dict(info)), 600.0))
    try:
        for is_ready in (False, True):
            info["ready"] = is_ready
            async with asyncio.timeout(10):
                while [entry.info["ready"] for entry in await directory.entries("router")] != [is_ready]:
                    await asyncio.sleep(0.02)
    finally:
        task.cancel()


async def test_an_entry_whose_registration_failed_comes_before_the_next_renewal_is_due():
    directory = LocalDirectory(is_away=True)
    task = asyncio.create_task(keep_registered(directory, lambda: Entry("router", "a", "host:1"), 600.0))
    try:
        await asyncio.sleep(0.05)
        directory.is_away = False
        async with asyncio.timeout(20):  # a third of the TTL is 200 s
            while not await directory.entries("router"):
                await asyncio.sleep(0.02)
    finally:
        task.cancel()


async def test_a_watcher_hears_of_what_it_has_not_seen_at_once_and_then_of_the_next_change():
    actor = DirectoryActor()
    actor.register(Entry("target", "t", "host:1"), 600.0)
    views = await actor.watch({"target": NOTHING_SEEN, "drafter": NOTHING_SEEN}, 600.0)
    assert [entry.id for entry in views["target"].entries] == ["t"]
    seen = {kind: view.version for kind, view in views.items()}
    watching = asyncio.create_task(actor.watch(seen, 600.0))
    await asyncio.sleep(0.02)
    actor.register(Entry("target", "t", "host:1"), 600.0)  # a renewal
    actor.register(Entry("router", "r", "host:2"), 600.0)  # another kind
    await asyncio.sleep(0.02)
    assert not watching.done()
    actor.register(Entry("drafter", "d", "host:3"), 600.0)
    async with asyncio.timeout(10):
        assert [entry.id for entry in (await watching)["drafter"].entries] == ["d"]


async def test_a_watcher_hears_that_an_entry_has_expired_or_changed_or_left():
    actor = DirectoryActor()
    for change, left in (
        (lambda: None, []),
        (lambda: actor.register(Entry("router", "r", "host:1", {"ready": True}), 600.0), ["r"]),
        (lambda: actor.unregister("router", "r"), []),
    ):
        actor.register(Entry("router", "r", "host:1"), 0.2)
        seen = {"router": (await actor.watch({"router": NOTHING_SEEN}, 0.0))["router"].version}
        change()
        async with asyncio.timeout(10):
            assert [entry.id for entry in (await actor.watch(seen, 600.0))["router"].entries] == left


async def test_a_watcher_is_answered_when_its_time_is_over_though_nothing_has_changed():
    actor = DirectoryActor()
    seen = {"router": (await actor.watch({"router": NOTHING_SEEN}, 0.0))["router"].version}
    async with asyncio.timeout(10):
        assert (await actor.watch(seen, 0.02))["router"].entries == []


async def test_a_directory_that_was_restarted_answers_watchers_of_the_one_before_at_once():
    seen = {"router": (await DirectoryActor().watch({"router": NOTHING_SEEN}, 0.0))["router"].version}
    async with asyncio.timeout(10):
        assert (await DirectoryActor().watch(seen, 600.0))["router"].entries == []


async def test_a_patient_reader_gets_every_kind_with_one_call_as_soon_as_one_has_changed():
    directory = LocalDirectory()
    known = [KnownEntries(directory, kind, ttl_s=1000.0) for kind in ("target", "drafter")]
    await refresh(directory, known, is_patient=True)
    waiting = asyncio.create_task(refresh(directory, known, is_patient=True))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await directory.register(Entry("drafter", "d", "host:1"), ttl_s=1000.0)
    async with asyncio.timeout(10):
        await waiting
    assert [[entry.id for entry in each.entries] for each in known] == [[], ["d"]]
