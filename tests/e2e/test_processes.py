"""Gateway, router, target ranks and drafters are processes of their own, joined by gRPC streams."""

import asyncio

import psutil

from dflash_ray.rpc.directory import DirectoryClient
from tests.applications import PROMPTS, Client, request


async def test_every_role_runs_in_its_own_process_and_streams_join_them(smollm2_app):
    directory = DirectoryClient()
    routers, targets, drafters = [await directory.entries(kind) for kind in ("router", "target", "drafter")]
    assert (len(routers), len(targets), len(drafters)) == (1, 1, 2)
    rank_pids = targets[0].info["pids"]
    assert len(rank_pids) == smollm2_app.config.target.tp_size
    pids = [routers[0].info["pid"], *rank_pids, *(drafter.info["pid"] for drafter in drafters)]
    assert len(set(pids)) == len(pids)

    async with Client(smollm2_app.grpc_address) as client:
        await asyncio.gather(*(client.generate(request(prompt["prompt"])) for prompt in PROMPTS[:4]))
    peers = {
        f"{connection.raddr.ip.removeprefix('::ffff:')}:{connection.raddr.port}"
        for connection in psutil.Process(routers[0].info["pid"]).net_connections("tcp")
        if connection.status == psutil.CONN_ESTABLISHED and connection.raddr
    }
    assert {targets[0].address, *(drafter.address for drafter in drafters)} <= peers
