"""Processes stopped with SIGSTOP under load: they are alive and silent, as in a hung collective or a frozen node."""

import os
import signal

import pytest

from tests.applications import application
from tests.fault.test_processes_killed import entries_of, generate_sixteen, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("rank", [1, 0])
async def test_a_stopped_rank_is_noticed_and_its_group_comes_back_with_the_same_tokens(rank):
    with application("target.tp_size=2", "target.step_timeout_s=20") as app:
        undisturbed = await generate_sixteen(app)
        before = (await entries_of("target"))[0]

        async def stop() -> None:
            os.kill(before.info["pids"][rank], signal.SIGSTOP)

        assert await generate_sixteen(app, stop) == undisturbed
        after = (await entries_of("target"))[0]
        assert set(after.info["pids"]).isdisjoint(before.info["pids"])

        async def is_gone() -> bool:
            return not any(os.path.exists(f"/proc/{pid}") for pid in before.info["pids"])

        await until(is_gone)


async def test_a_stopped_drafter_costs_no_token_and_its_sequences_go_on_with_the_other_one():
    with application("drafter.num_replicas=2", "drafter.step_timeout_s=5") as app:
        undisturbed = await generate_sixteen(app)
        victim = (await entries_of("drafter"))[0]

        async def stop() -> None:
            os.kill(victim.info["pid"], signal.SIGSTOP)

        try:
            assert await generate_sixteen(app, stop) == undisturbed
        finally:
            os.kill(victim.info["pid"], signal.SIGCONT)
