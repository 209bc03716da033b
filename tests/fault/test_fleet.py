"""Several routers and target groups, of which some go away, in one process: who leads, and what becomes of requests."""

import asyncio

import pytest

from dflash_ray.core.errors import OverloadedError, RequestError, UnavailableError
from tests.directories import LocalDirectory
from tests.toy import STOP_TOKEN, answer
from tests.toy_processes import TTL_S, Cluster, until

MAX_NEW_TOKENS = 60


def prompts(count: int) -> list[list[int]]:
    """Prompts whose answers do not end by themselves."""
    candidates = [[a, b, 3] for a in range(1, 40) for b in range(1, 20)]
    return [prompt for prompt in candidates if STOP_TOKEN not in answer(prompt, MAX_NEW_TOKENS)][:count]


class Load:
    """Answers under way."""

    def __init__(self, cluster: Cluster, count: int, **options) -> None:
        self.prompts = prompts(count)
        self.tokens: list[list[int]] = [[] for _ in self.prompts]
        self.answers = [
            asyncio.create_task(cluster.generate(prompt, MAX_NEW_TOKENS, tokens=tokens, **options))
            for prompt, tokens in zip(self.prompts, self.tokens, strict=True)
        ]
        assert len(self.prompts) == count

    async def have_begun(self) -> None:
        await until(lambda: all(len(tokens) >= 3 for tokens in self.tokens))
        assert not any(answer.done() for answer in self.answers)

    async def are_right(self) -> None:
        async with asyncio.timeout(60):
            answers = await asyncio.gather(*self.answers)
        assert answers == [answer(prompt, MAX_NEW_TOKENS) for prompt in self.prompts]


async def test_two_routers_share_two_groups():
    async with Cluster() as cluster:
        for _ in range(2):
            await cluster.router()
        await cluster.led(0, 0)
        for _ in range(2):
            await cluster.group()
        await cluster.led(1, 1)


async def test_a_group_that_nobody_else_takes_is_led_by_the_router_that_has_one_already():
    async with Cluster() as cluster:
        router, other = await cluster.router(), await cluster.router()
        other.fleet._leases.take = lambda target_id: asyncio.sleep(0)  # it is there, and takes none
        for _ in range(2):
            await cluster.group()
        await until(lambda: len(router.fleet.led) == 2)


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_a_router_that_goes_away_loses_no_request(how):
    async with Cluster() as cluster:
        first, second = await cluster.router(), await cluster.router()
        for _ in range(2):
            await cluster.group()
        await cluster.led(1, 1)
        load = Load(cluster, 16)
        await load.have_begun()
        await getattr(first, how)()
        await load.are_right()
        assert cluster.num_resumed
        await until(lambda: len(second.fleet.led) == 2)


async def test_requests_of_a_group_that_is_lost_go_on_at_another_group_of_the_router():
    async with Cluster() as cluster:
        router = await cluster.router()
        groups = [await cluster.group(), await cluster.group()]
        await cluster.led(2)
        load = Load(cluster, 16)
        await load.have_begun()
        assert all(group.opened for group in groups)
        await groups[0].kill()
        await load.are_right()
        assert len(router.fleet.pipelines) == 1


async def test_requests_go_with_the_lease_of_their_group():
    async with Cluster() as cluster:
        first = await cluster.router()
        group = await cluster.group()
        await cluster.led(1)
        load = Load(cluster, 16)
        await load.have_begun()
        second = await cluster.router()
        del cluster.directory.plain._leases[group.id]  # as when the first was silent for a TTL
        cluster.directory.plain.lease(group.id, second.id, TTL_S, asyncio.get_running_loop().time())
        await until(lambda: second.fleet.led)
        await load.are_right()
        assert not first.fleet.pipelines and not first.fleet._leases.target_ids


async def test_while_nobody_leads_a_group_requests_wait_for_it_to_come_back():
    async with Cluster() as cluster:
        router = await cluster.router()
        await cluster.router()
        group = await cluster.group()
        await until(lambda: cluster.routers.has_ready)
        load = Load(cluster, 8)
        await load.have_begun()
        await group.kill()
        await until(lambda: not cluster.routers.has_ready)
        late = asyncio.create_task(cluster.generate(prompts(1)[0], MAX_NEW_TOKENS))
        await asyncio.sleep(0.5)
        await cluster.group()
        await load.are_right()
        assert await late == answer(prompts(1)[0], MAX_NEW_TOKENS)
        assert router.fleet.info()["num_groups"] <= 1


async def test_a_directory_that_is_killed_under_load_fences_nobody():
    async with Cluster() as cluster:
        for _ in range(2):
            await cluster.router()
        groups = [await cluster.group(step_s=0.05), await cluster.group(step_s=0.05)]
        await cluster.led(1, 1)
        epochs = [group.epoch for group in groups]
        load = Load(cluster, 16)
        await load.have_begun()
        cluster.directory.is_away = True
        await asyncio.sleep(0.5)
        cluster.directory.restart()
        await load.are_right()
        await until(lambda: len(cluster.directory.plain._leases) == 2)
        assert [group.epoch for group in groups] == epochs
        assert cluster.num_resumed == 0
        assert cluster.routers.has_ready


async def test_peers_that_do_not_answer_delay_neither_leases_nor_other_peers():
    async with Cluster() as cluster:
        silent_drafter = await cluster.drafter(is_silent=True)
        silent_group = await cluster.group(is_silent=True)
        group = await cluster.group()
        router = await cluster.router()
        await until(lambda: router.fleet.led)
        await until(lambda: silent_drafter.num_hellos)
        loop = asyncio.get_running_loop()
        end = loop.time() + 2 * TTL_S + 1
        while loop.time() < end:
            for target_id in (group.id, silent_group.id):
                assert await cluster.directory.lease(target_id, "another", TTL_S) is None
            await asyncio.sleep(0.05)
        assert [pipeline.target_id for pipeline in router.fleet.led] == [group.id]


async def test_a_drafter_for_other_features_is_asked_once_and_a_dead_one_less_and_less_often():
    async with Cluster() as cluster:
        unfit = await cluster.drafter(is_silent=False)
        dead = await cluster.drafter(is_silent=False)
        await dead._server.server.stop(None)  # its entry stays
        router = await cluster.router()
        await cluster.group()
        await until(lambda: unfit.num_hellos)
        attempts = router.fleet._attempts._by_key
        await until(lambda: any(attempt.back_off.pause_s >= 2 for attempt in attempts.values()))
        assert unfit.num_hellos == 1
        unfit._tasks[0].cancel()  # or its entry would come back
        await cluster.directory.unregister("drafter", unfit.id)
        await until(lambda: not any(unfit.id in key for key in attempts))


async def test_an_answer_is_never_continued_by_another_model():
    async with Cluster() as cluster:
        await cluster.router()
        old = await cluster.group(model="old", step_s=0.05)
        await until(lambda: cluster.routers.has_ready)
        load = Load(cluster, 4, wait_s=2.0)
        await load.have_begun()
        new = await cluster.group(model="new")
        await until(lambda: {"new", "old"} <= set(cluster.routers._known.entries[0].info["models"]))
        await old.kill()
        outcomes = await asyncio.gather(*load.answers, return_exceptions=True)
        assert all(isinstance(outcome, UnavailableError) for outcome in outcomes)
        assert "model was replaced" in outcomes[0].message
        assert not new.opened
        assert await cluster.generate(prompts(1)[0], MAX_NEW_TOKENS) == answer(prompts(1)[0], MAX_NEW_TOKENS)
        assert new.opened


async def test_an_answer_waits_for_its_model_to_come_back():
    async with Cluster() as cluster:
        first, second = await cluster.router(), await cluster.router()
        old = await cluster.group(model="old", step_s=0.05)
        await until(lambda: cluster.routers.has_ready)
        load = Load(cluster, 4)
        await load.have_begun()
        new = await cluster.group(model="new")
        await until(lambda: first.fleet.led and second.fleet.led)
        await old.kill()
        await asyncio.sleep(1.0)
        await cluster.group(model="old")
        await load.are_right()
        assert not new.opened


async def test_a_pipeline_hands_its_requests_over_when_its_group_comes_back_with_another_model():
    async with Cluster() as cluster:
        await cluster.router()
        old = await cluster.group(model="old", step_s=0.05)
        await until(lambda: cluster.routers.has_ready)
        load = Load(cluster, 4, wait_s=2.0)
        await load.have_begun()
        await old.kill()
        new = await cluster.group(model="new")
        outcomes = await asyncio.gather(*load.answers, return_exceptions=True)
        assert all(isinstance(outcome, UnavailableError) for outcome in outcomes)
        assert not new.opened


async def test_a_request_that_ends_group_after_group_is_stopped_wherever_it_goes():
    poison = 49
    async with Cluster() as cluster:
        for _ in range(2):
            await cluster.router()
        groups = [await cluster.group() for _ in range(5)]
        await cluster.led(2, 3)
        for group in groups:
            group.poison = poison
        load = Load(cluster, 8)
        await load.have_begun()
        with pytest.raises(RequestError, match="three times"):
            await cluster.generate([poison, 1, 2])
        await load.are_right()
        assert [group.is_dead for group in groups].count(True) == 3


async def test_a_router_whose_queue_is_full_sends_no_request_away_for_good():
    async with Cluster("router.max_running=2", "router.max_waiting=0") as cluster:
        first, _second = await cluster.router(), await cluster.router()
        for _ in range(2):
            await cluster.group()
        await cluster.led(1, 1)
        load = Load(cluster, 4)
        await load.have_begun()
        await first.kill()  # its two requests find the other router's queue full, and wait
        await load.are_right()


async def test_a_request_that_one_router_has_no_room_for_goes_to_another_and_is_refused_when_all_are_full():
    async with Cluster("router.max_running=1", "router.max_waiting=0") as cluster, Cluster() as other:
        for _ in range(2):
            await cluster.router()
            await cluster.group(step_s=0.2)
        await cluster.led(1, 1)
        other.directory.plain = cluster.directory.plain  # a second gateway, which knows nothing of the first's requests
        await other.led(1, 1)
        mine, theirs = Load(cluster, 1), Load(other, 1)
        await mine.have_begun()
        await theirs.have_begun()
        for gateway in (cluster, other):
            with pytest.raises(OverloadedError):
                await gateway.generate(prompts(1)[0])


async def test_a_router_that_refuses_is_not_asked_in_a_tight_loop():
    async with Cluster() as cluster:
        router = await cluster.router()
        await cluster.group()
        await until(lambda: cluster.routers.has_ready)
        await router.kill()
        with pytest.raises(UnavailableError):
            await cluster.generate(prompts(1)[0], wait_s=2.0)
        assert 3 <= cluster.num_resumed <= 12


async def test_channels_to_routers_that_are_gone_are_closed():
    async with Cluster() as cluster:
        router = await cluster.router()
        await cluster.group()
        await until(lambda: cluster.routers.has_ready)
        await cluster.generate(prompts(1)[0], 3)
        assert list(cluster.routers._links) == [router.id]
        await router.stop()
        await until(lambda: not cluster.routers._links)


async def test_a_router_that_cannot_reach_the_directory_goes_on():
    async with Cluster() as cluster:
        directory = LocalDirectory()
        directory.plain = cluster.directory.plain
        await cluster.router(directory)
        await cluster.group()
        await cluster.led(1)
        load = Load(cluster, 4)
        await load.have_begun()
        directory.is_away = True
        await load.are_right()
        assert cluster.num_resumed == 0
