"""What an outbox packs is what a gateway unpacks, entry by entry."""

import asyncio
import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from dflash_ray.core.errors import (
    HandedOverError,
    InvalidRequestError,
    OtherModelError,
    OverloadedError,
    UnavailableError,
)
from dflash_ray.core.stats import DecodePass
from dflash_ray.gateway.token_chunks import TokenChunk, unpack
from dflash_ray.pb import common_pb2, router_pb2
from dflash_ray.router import outbox as outboxes
from dflash_ray.router.actions import Emit
from dflash_ray.router.outbox import Outbox
from tests.toy import emit_of

ERRORS = [
    InvalidRequestError("is wrong", "prompt"),
    OverloadedError("full"),
    UnavailableError("away"),
    OtherModelError("another"),
    HandedOverError("lost", 2),
]


def logprobs(count: int) -> common_pb2.TokenLogprobs:
    return common_pb2.TokenLogprobs(
        chosen=[-0.5] * count, num_top=1, top_token_ids=[7] * count, top_logprobs=[-0.25] * count
    )


TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=9)
COUNTS = st.integers(0, 2**31)
CHUNKS = st.builds(
    TokenChunk,
    token_ids=TOKENS,
    finish_reason=st.sampled_from([0, 0, common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH]),
    decode_pass=st.none() | st.builds(DecodePass, COUNTS, COUNTS, COUNTS),
    logprobs=st.none() | st.builds(logprobs, st.integers(0, 3)),
    prompt_logprobs=st.none()
    | st.builds(lambda n: common_pb2.PromptLogprobs(start=1, logprobs=logprobs(n)), st.integers(0, 3)),
    num_cached_tokens=st.integers(0, 3),
)
ENTRIES = st.tuples(st.integers(1, 2**63), CHUNKS | st.sampled_from(["model", *ERRORS]))


def put(outbox: Outbox, call_id: int, entry: TokenChunk | str | Exception) -> None:
    if isinstance(entry, TokenChunk):
        outbox.add(emit_of(call_id, entry))
    elif isinstance(entry, str):
        outbox.add_taken(call_id, entry)
    else:
        outbox.add_error(call_id, entry)


async def all_of(outbox: Outbox) -> list[router_pb2.RouterResponse]:
    """What has been put in, over the wire."""
    outbox.close()
    messages = []
    while (message := await outbox.take()) is not None:
        messages.append(router_pb2.RouterResponse.FromString(message.SerializeToString()))
    return messages


def comparable(entry: TokenChunk | str | Exception) -> object:
    if isinstance(entry, Exception):
        return type(entry), str(entry), getattr(entry, "num_losses", 0)
    return TokenChunk(model_fingerprint=entry) if isinstance(entry, str) else entry


@given(entries=st.lists(ENTRIES, max_size=20), size=st.sampled_from([1, 8, 1 << 18]))
def test_a_gateway_reads_what_a_router_wrote_however_it_is_cut_into_messages(entries, size):
    async def run() -> list[tuple[int, object]]:
        outbox = Outbox()
        for entry in entries:
            put(outbox, *entry)
        messages = await all_of(outbox)
        assert all(message.progress.call_ids for message in messages)
        return [(call_id, comparable(chunk)) for message in messages for call_id, chunk in unpack(message.progress)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outboxes, "_MAX_VALUES", size)
        assert asyncio.run(run()) == [(call_id, comparable(entry)) for call_id, entry in entries]


def joined(entries: list[tuple[int, int, TokenChunk]]) -> Emit:
    """One action for the calls of several streams; `entries` are stream, call id and what the call is told."""
    parts = [emit_of(call_id, chunk, stream) for stream, call_id, chunk in entries]
    names = [column.name for column in dataclasses.fields(Emit)][:-3]
    columns = [np.concatenate([getattr(part, name) for part in parts]) for name in names]
    logprobs = {i: part.logprobs[0] for i, part in enumerate(parts) if part.logprobs}
    cached = {i: part.num_cached_tokens[0] for i, part in enumerate(parts) if part.num_cached_tokens}
    return Emit(*columns, logprobs, {}, cached)


@given(entries=st.lists(st.tuples(st.integers(1, 2), st.integers(1, 2**63), CHUNKS), min_size=1, max_size=8))
def test_what_a_pass_brought_is_shared_out_to_the_streams_of_its_calls(entries):
    entries = [
        (stream, call_id, dataclasses.replace(chunk, prompt_logprobs=None)) for stream, call_id, chunk in entries
    ]
    emit = joined(entries)
    parts = dict(emit.by_stream())
    assert parts.keys() == {stream for stream, _, _ in entries}
    for number, part in parts.items():
        outbox = Outbox()
        outbox.add(part)
        got = [pair for message in asyncio.run(all_of(outbox)) for pair in unpack(message.progress)]
        assert got == [(call_id, chunk) for stream, call_id, chunk in entries if stream == number]


async def test_what_comes_while_a_gateway_takes_nothing_waits_in_one_message():
    outbox = Outbox()
    for step in range(100):
        for call_id in range(8):
            put(outbox, call_id, TokenChunk([step]))
    [message] = await all_of(outbox)
    assert len(message.progress.call_ids) == 800


async def test_many_log_probabilities_are_cut_into_messages_of_bounded_size():
    outbox = Outbox()
    values = [-0.5] * 2000
    part = common_pb2.TokenLogprobs(chosen=values, num_top=20, top_token_ids=[9] * 40_000, top_logprobs=values * 20)
    for _ in range(60):
        put(outbox, 1, TokenChunk(prompt_logprobs=common_pb2.PromptLogprobs(start=1, logprobs=part)))
    messages = await all_of(outbox)
    assert sum(len(message.progress.call_ids) for message in messages) == 60
    assert max(message.ByteSize() for message in messages) < 2 << 20


def test_columns_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError):
        list(unpack(router_pb2.Progress(call_ids=[1], num_tokens=[2], token_ids=b"\x01\0\0\0")))
    with pytest.raises(ValueError):
        list(unpack(router_pb2.Progress(call_ids=[1, 2], num_tokens=[1], token_ids=b"\x01\0\0\0")))
