"""Gateway, router, target ranks and drafters are processes of their own, joined by gRPC streams."""

import asyncio
from collections import Counter
from pathlib import Path

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


# Of a Ray instance on this machine: no dashboard, no monitors, no exporters.
PROCESSES = Counter(
    {
        "gcs_server": 1,
        "raylet": 1,
        "ray::DashboardAgent": 1,
        "ray::RuntimeEnvAgent": 1,
        "ray::ServeController": 1,
        "ray::ProxyActor": 1,
        "ray::DirectoryActor": 1,
        "ray::ServeReplica:dflash_ray:Gateway": 1,
        "ray::ServeReplica:dflash_ray:Router": 1,
        "ray::ServeReplica:dflash_ray:Target": 1,
        "ray::RankActor": 1,
        "ray::ServeReplica:dflash_ray:Drafter": 2,
    }
)


def name_of(process: psutil.Process) -> str:
    program = process.cmdline()[0].split()[0]
    return program.partition(".")[0] if program.startswith("ray::") else Path(program).name


def test_beside_the_application_run_only_the_processes_of_rays_that_it_needs(smollm2_app):
    names = Counter(name_of(process) for process in psutil.Process().children(recursive=True))
    del names["ray::IDLE"]  # started ahead, and ended when nobody wants them
    assert names == PROCESSES
