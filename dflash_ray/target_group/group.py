"""The ranks of one target group: placed, started together, watched, and ended together."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Any

import ray
from ray.util import placement_group_table
from ray.util.placement_group import PlacementGroup, get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dflash_ray.config import DflashRayConfig
from dflash_ray.target_group.rank import RankActor, RankPlace

logger = logging.getLogger(__name__)
_PING_PERIOD_S = 5.0


class GroupStartError(RuntimeError):
    """The ranks did not come up; the text says which one failed and why."""


class TargetGroup:
    """Started ranks. `info` has what the directory entry needs."""

    def __init__(self, ranks: list[Any], runs: list[Any], info: dict[str, Any], silence_s: float) -> None:
        self._ranks = ranks
        self._runs = runs
        self._silence_s = silence_s
        self.info = info

    @classmethod
    async def start(cls, config: DflashRayConfig, target_id: str, env: dict[str, str]) -> TargetGroup:
        """Creates one actor a rank in the current placement group and loads them concurrently."""
        placement_group = get_current_placement_group()
        places = _places(placement_group, config.target.tp_size)
        ranks = [_create(config, target_id, place, bundle, placement_group, env) for place, bundle in places]
        try:
            async with asyncio.timeout(config.target.init_timeout_s):
                rendezvous = await ranks[0].rendezvous.remote()
                infos = await asyncio.gather(*(rank.load.remote(rendezvous) for rank in ranks))
        except (ray.exceptions.RayError, TimeoutError) as error:
            kill(ranks)
            raise GroupStartError(f"target group {target_id} did not start: {error}") from error
        info = {
            "address": infos[0]["address"],
            "pids": [info["pid"] for info in infos],
            "node_ids": [info["node_id"] for info in infos],
            "tp_size": config.target.tp_size,
        }
        return cls(ranks, [rank.run.remote() for rank in ranks], info, config.target.step_timeout_s)

    async def wait_for_death(self) -> str:
        """Returns when any rank is gone or silent, with the reason, after ending the others."""
        watchers = [asyncio.ensure_future(_outcome(run)) for run in self._runs]
        watchers.append(asyncio.create_task(self._silence()))
        done, pending = await asyncio.wait(watchers, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        self.kill()
        return next(iter(done)).result()

    async def _silence(self) -> str:
        """Returns when a rank's process does not answer: a rank can't tell that it was stopped itself."""
        while True:
            await asyncio.sleep(min(_PING_PERIOD_S, self._silence_s))
            try:
                async with asyncio.timeout(self._silence_s):
                    await asyncio.gather(*(rank.ping.remote() for rank in self._ranks))
            except TimeoutError:
                return f"a rank did not answer for {self._silence_s:.0f} s"
            except ray.exceptions.RayError as error:
                return str(error).splitlines()[0]

    def kill(self) -> None:
        """Ends every rank; ranks that are out of step with each other are of no use."""
        kill(self._ranks)


async def _outcome(run: Any) -> str:
    try:
        await run
    except ray.exceptions.RayError as error:
        return str(error).splitlines()[0]
    return "a rank returned"


def kill(ranks: list[Any]) -> None:
    """Ends actors; those already gone are ignored by Ray."""
    for rank in ranks:
        ray.kill(rank, no_restart=True)


def _places(placement_group: PlacementGroup | None, tp_size: int) -> list[tuple[RankPlace, int]]:
    """Ranks and their bundles, sorted by node so that neighbours share one; rank 0 is in bundle 0's node."""
    if placement_group is None:
        return [(RankPlace(rank, tp_size, rank, True), -1) for rank in range(tp_size)]
    nodes = placement_group_table(placement_group)["bundles_to_node_id"]
    order = sorted(range(tp_size), key=lambda bundle: (nodes[bundle] != nodes[0], nodes[bundle], bundle))
    share_host = len(set(nodes.values())) == 1
    seen: Counter[str] = Counter()
    places = []
    for rank, bundle in enumerate(order):
        places.append((RankPlace(rank, tp_size, seen[nodes[bundle]], share_host), bundle))
        seen[nodes[bundle]] += 1
    return places


def rank_options(config: DflashRayConfig, placement_group: PlacementGroup | None, bundle: int) -> dict[str, Any]:
    """Ray's options of the actor in a bundle, which has the CPUs; its GPU must be asked for to be assigned."""
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": config.target.num_gpus}
    if placement_group is not None:
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(placement_group, bundle)
    return options


def _create(
    config: DflashRayConfig,
    target_id: str,
    place: RankPlace,
    bundle: int,
    placement_group: PlacementGroup | None,
    env: dict[str, str],
) -> Any:
    options = rank_options(config, placement_group, bundle) | {
        "max_restarts": 0,
        "max_task_retries": 0,
        "max_concurrency": 4,
        "name": f"target-{target_id}-rank{place.rank}",
    }
    if env:
        options["runtime_env"] = {"env_vars": env}
    return ray.remote(RankActor).options(**options).remote(config, target_id, place)
