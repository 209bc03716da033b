"""Attempts to connect run side by side, one for each key, and less often where they fail."""

import asyncio

import pytest

from dflash_ray.router.attempts import Attempts, FinalError


class Peer:
    """Counts attempts, which end as it is told."""

    def __init__(self) -> None:
        self.num_attempts = 0
        self.outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def connect(self) -> None:
        self.num_attempts += 1
        await self.outcome


async def tick(attempts: Attempts, *peers: Peer) -> None:
    for peer in peers:
        attempts.start(peer, peer.connect)
    await asyncio.sleep(0.01)


async def test_one_that_does_not_answer_is_asked_once_and_delays_no_other():
    attempts, silent, other = Attempts(), Peer(), Peer()
    other.outcome.set_result(None)
    for _ in range(3):
        await tick(attempts, silent, other)
    assert attempts.is_running(silent) and not attempts.is_running(other)
    assert silent.num_attempts == 1 and other.num_attempts == 3
    await attempts.close()


@pytest.mark.parametrize("error", [ConnectionError("refused"), RuntimeError("unexpected"), FinalError("unfit")])
async def test_one_that_failed_is_left_alone_for_a_while(error):
    attempts, peer = Attempts(), Peer()
    peer.outcome.set_exception(error)
    for _ in range(3):
        await tick(attempts, peer)
    assert peer.num_attempts == 1
    attempts.keep(())
    await tick(attempts, peer)
    assert peer.num_attempts == 2, "a new entry starts anew"
    await attempts.close()


async def test_an_attempt_for_what_is_gone_is_cancelled():
    attempts, gone, kept = Attempts(), Peer(), Peer()
    await tick(attempts, gone, kept)
    attempts.keep({kept})
    await asyncio.sleep(0.01)
    assert gone.outcome.cancelled() and attempts.is_running(kept)
    await attempts.close()
    assert kept.outcome.cancelled()
