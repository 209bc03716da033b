"""The Ray actor of one rank, as the group calls it. Imports without torch, which the replica has no use for."""

from __future__ import annotations

from dataclasses import dataclass

from dflash_ray.config import DflashRayConfig


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where a rank runs, as the group decided.

    Attributes:
        node_rank: index among the group's ranks on the same node.
        share_host: all ranks of the group are on one node.
    """

    rank: int
    tp_size: int
    node_rank: int
    share_host: bool

    def local_rank(self, device: str) -> int:
        """LOCAL_RANK, by which DeepSpeed chooses the device: a process sees no GPU but its own, number 0."""
        return 0 if device == "cuda" else self.node_rank


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the ranks meet: rank 0's TCPStore."""

    host: str
    port: int


class RankActor:
    """Hosts a TargetRank. The group calls rendezvous (rank 0), load, and run, whose end is the rank's death."""

    def __init__(self, config: DflashRayConfig, target_id: str, place: RankPlace) -> None:
        from dflash_ray.target_group.worker import TargetRank

        self._rank = TargetRank(config, target_id, place)

    async def rendezvous(self) -> Rendezvous:
        return await self._rank.rendezvous()

    async def load(self, rendezvous: Rendezvous) -> dict[str, object]:
        return await self._rank.load(rendezvous)

    async def run(self) -> None:
        await self._rank.run()

    async def ping(self) -> None:
        """Answers while the process can, whatever its compute thread does."""
