"""A mailbox gives its reader all that came, in order, errors last, and says when nothing comes."""

import asyncio

import pytest

from dflash_ray.gateway.mailbox import Mailbox


async def test_a_reader_takes_all_that_came_and_then_the_error_that_followed_it():
    mailbox: Mailbox[int] = Mailbox()
    for item in (1, 2, ValueError("no more"), 3):
        mailbox.put(item)
    assert await mailbox.take() == [1, 2]
    with pytest.raises(ValueError, match="no more"):
        await mailbox.take()


async def test_a_reader_that_waits_is_woken_once_by_what_comes_together():
    mailbox: Mailbox[int] = Mailbox()
    taken: list[list[int]] = []

    async def read() -> None:
        while sum(map(len, taken)) < 4:
            taken.append(await mailbox.take())

    reading = asyncio.create_task(read())
    await asyncio.sleep(0)
    mailbox.put(1)
    mailbox.put(2)
    await asyncio.sleep(0.01)
    mailbox.put(3)
    mailbox.put(4)
    await reading
    assert taken == [[1, 2], [3, 4]]


async def test_silence_is_told_again_and_again_until_something_comes():
    mailbox: Mailbox[int] = Mailbox(silence_s=0.02)
    for _ in range(3):
        assert await mailbox.take() == []
    mailbox.put(1)
    assert await mailbox.take() == [1]
    assert await mailbox.take() == []
    mailbox.close()


async def test_what_came_while_a_reader_was_cancelled_is_still_there():
    mailbox: Mailbox[int] = Mailbox()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await mailbox.take()
    mailbox.put(1)
    assert await mailbox.take() == [1]
