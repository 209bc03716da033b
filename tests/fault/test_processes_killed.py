"""Processes killed with SIGKILL under load: no token changes, nothing hangs."""

import asyncio
import os
import signal

import httpx
import pytest

from dflash_ray.rpc.directory import DirectoryClient, Kind
from tests.applications import PROMPTS, Application, Client, application, request

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MAX_NEW_TOKENS = 64


async def generate_sixteen(app: Application, disturb=None):
    async with Client(app.grpc_address) as client:
        prompts = [prompt["prompt"] for prompt in PROMPTS[:16]]
        running = [
            asyncio.create_task(client.generate(request(prompt, max_new_tokens=MAX_NEW_TOKENS))) for prompt in prompts
        ]
        if disturb is not None:
            await asyncio.sleep(2.0)
            await disturb()
        return [output.token_ids for output in await asyncio.gather(*running)]


async def until(condition, timeout_s: float = 120.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.5)


async def entries_of(kind: Kind):
    return await DirectoryClient().entries(kind)


async def test_a_killed_drafter_fails_no_request_and_changes_no_token():
    with application("drafter.num_replicas=2") as app:
        undisturbed = await generate_sixteen(app)
        victim = (await entries_of("drafter"))[0]

        async def kill() -> None:
            os.kill(victim.info["pid"], signal.SIGKILL)

        assert await generate_sixteen(app, kill) == undisturbed

        async def is_replaced() -> bool:
            ids = {entry.id for entry in await entries_of("drafter")}
            return len(ids) == 2 and victim.id not in ids

        await until(is_replaced)


async def test_a_killed_target_rank_brings_the_whole_group_back_and_requests_finish_with_the_same_tokens():
    with application("target.tp_size=2") as app:
        undisturbed = await generate_sixteen(app)
        before = (await entries_of("target"))[0]

        async def kill() -> None:
            os.kill(before.info["pids"][1], signal.SIGKILL)

        assert await generate_sixteen(app, kill) == undisturbed
        after = (await entries_of("target"))[0]
        assert set(after.info["pids"]).isdisjoint(before.info["pids"])

        async def is_healthy() -> bool:
            async with httpx.AsyncClient() as http:
                return (await http.get(f"{app.http_url}/health")).status_code == 200

        await until(is_healthy)
