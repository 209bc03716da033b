"""The leases that a router holds on target groups."""

from __future__ import annotations

import asyncio
import logging

from dflash_ray.rpc.directory import DirectoryClient

logger = logging.getLogger(__name__)


class Leases:
    """Leases by target id, each with the epoch it was granted under. While the directory is away all stay held."""

    def __init__(self, directory: DirectoryClient, router_id: str, ttl_s: float) -> None:
        self._directory = directory
        self._router_id = router_id
        self._ttl_s = ttl_s
        self._epochs: dict[str, int] = {}

    @property
    def target_ids(self) -> list[str]:
        return list(self._epochs)

    def holds(self, target_id: str, epoch: int) -> bool:
        return self._epochs.get(target_id) == epoch

    async def take(self, target_id: str) -> int | None:
        """The epoch, or None while the directory does not grant it. Raises ConnectionError."""
        epoch = await self._directory.lease(target_id, self._router_id, self._ttl_s)
        if epoch is not None:
            self._epochs[target_id] = epoch
        return epoch

    async def renew(self) -> list[str]:
        """Renews all at once; returns the groups that were granted to other routers, whose leases are gone."""
        held = await asyncio.gather(*(self._renew(target_id, epoch) for target_id, epoch in self._epochs.items()))
        return [target_id for target_id in held if target_id is not None]

    async def _renew(self, target_id: str, epoch: int) -> str | None:
        try:
            is_held = await self._directory.renew(target_id, self._router_id, epoch, self._ttl_s)
        except ConnectionError as error:
            logger.warning("the lease of %s is renewed later: %s", target_id, error)
            return None
        if is_held or not self.holds(target_id, epoch):
            return None
        del self._epochs[target_id]
        return target_id

    async def give_back(self, target_id: str) -> None:
        """Lets others lead the group at once, or when the lease runs out if the directory is away."""
        if self._epochs.pop(target_id, None) is None:
            return
        try:
            await self._directory.release(target_id, self._router_id)
        except ConnectionError as error:
            logger.warning("the lease of %s is left to run out: %s", target_id, error)
