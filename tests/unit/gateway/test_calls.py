"""Text is made beside the event loop, unless it takes less than handing it over; calls' chunks keep their order."""

from __future__ import annotations

import asyncio
import threading

from dflash_ray.gateway.calls import Call, TextThread
from dflash_ray.gateway.token_chunks import TokenChunk
from dflash_ray.pb import common_pb2


class Listens:
    """Notes what it is given, and on which threads it was made."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.threads: list[int] = []

    def make(self, chunk: TokenChunk) -> int:
        self.threads.append(threading.get_ident())
        return len(chunk.token_ids)

    def on_chunk(self, chunk: TokenChunk, made: int) -> None:
        self.heard.append(made)

    def on_failure(self, error: Exception) -> None:
        self.heard.append(-1)


async def told(*messages: list[TokenChunk | Exception]) -> tuple[Listens, list[bool]]:
    """Who listened, and of each chunk whether it was made on the event loop."""
    text, listener = TextThread(), Listens()
    call: Call[int] = Call(1, listener, lambda _: None)
    for message in messages:
        text.submit([(call, chunk) for chunk in message])
    async with asyncio.timeout(5):
        while len(listener.heard) < sum(map(len, messages)):
            await asyncio.sleep(0.001)
    text.close()
    return listener, [ident == threading.get_ident() for ident in listener.threads]


async def test_a_few_tokens_are_made_on_the_event_loop():
    listener, on_loop = await told([TokenChunk([1, 2])], [TokenChunk([3])])
    assert listener.heard == [2, 1] and all(on_loop)


async def test_many_tokens_calls_or_log_probabilities_are_made_on_the_thread():
    scored = TokenChunk([1], logprobs=common_pb2.TokenLogprobs(chosen=[-1.0]))
    for message in ([TokenChunk(list(range(100)))], [TokenChunk([1])] * 8, [scored]):
        _, on_loop = await told(message)
        assert not any(on_loop)


async def test_a_few_tokens_wait_for_the_many_that_came_before_them():
    listener, on_loop = await told([TokenChunk(list(range(100)))], [TokenChunk([1])], [ValueError("over")])
    assert listener.heard == [100, 1, -1] and not any(on_loop)


async def test_what_cannot_be_made_ends_its_call_alone():
    class Fails(Listens):
        def make(self, chunk: TokenChunk) -> int:
            raise ValueError("no text")

    text, fails, other = TextThread(), Fails(), Listens()
    calls = [Call(number, listener, lambda _: None) for number, listener in enumerate((fails, other))]
    text.submit([(call, TokenChunk([1])) for call in calls])
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert fails.heard == [-1] and other.heard == [1]
    text.close()
