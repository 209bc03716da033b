"""A load step brings drafters, its end takes them away, and no request notices."""

import asyncio

import pytest

from dflash_ray.rpc.directory import DirectoryClient
from tests.applications import PROMPTS, Client, application, request

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SCALING = (
    "drafter.autoscaling={min_replicas: 1, max_replicas: 3, target_busy_fraction: 0.05, "
    "look_back_period_s: 2, upscale_delay_s: 1, downscale_delay_s: 5}"
)


async def num_drafters() -> int:
    return len(await DirectoryClient().entries("drafter"))


async def test_drafters_follow_the_load_and_no_request_fails():
    with application(SCALING) as app:
        assert await num_drafters() == 1
        peak = 1
        done = asyncio.Event()
        async with Client(app.grpc_address) as client:

            async def load(i: int) -> int:
                count = 0
                while not done.is_set():
                    output = await client.generate(request(PROMPTS[i]["prompt"], max_new_tokens=48))
                    assert output.token_ids
                    count += 1
                return count

            workers = [asyncio.create_task(load(i)) for i in range(8)]
            async with asyncio.timeout(240):
                while peak < 2:
                    await asyncio.sleep(1)
                    peak = max(peak, await num_drafters())
            done.set()
            assert all(await asyncio.gather(*workers))
        async with asyncio.timeout(240):
            while await num_drafters() > 1:
                await asyncio.sleep(1)
