"""An answer ends with the token that completes a stop string, whatever was drafted and however its tokens came."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from dflash_ray.config import ModelConfig
from dflash_ray.core.stats import DecodePass
from dflash_ray.gateway.choice import Choice
from dflash_ray.gateway.requests import GenerationRequest
from dflash_ray.gateway.token_chunks import TokenChunk
from dflash_ray.pb import common_pb2, router_pb2
from dflash_ray.text.tokenizer import ChatTokenizer

EOS = 2
STOP, LENGTH = common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH
TEXT = "One, two, three.\nFür 日本語 🍕 four, five: six; seven two three."


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(ModelConfig())


def request(stops: list[str], min_tokens: int = 0, include: bool = False) -> GenerationRequest:
    stopping = common_pb2.StoppingParams(max_new_tokens=1000, min_new_tokens=min_tokens, stop_token_ids=[EOS])
    sampling = common_pb2.SamplingParams(num_logprobs=1)
    speculation = router_pb2.Speculation()
    return GenerationRequest("r", [1], sampling, stopping, speculation, 1, stops, include, (EOS,))


def logprobs(ids: list[int]) -> common_pb2.TokenLogprobs:
    return common_pb2.TokenLogprobs(
        chosen=[-float(i) for i in ids], num_top=1, top_token_ids=ids, top_logprobs=[-float(i) for i in ids]
    )


def chunks(ids: list[int], sizes: list[int], reason: int) -> list[TokenChunk]:
    """The first token from the prefill, then passes whose tokens are all drafts but the last."""
    parts, at = [ids[:1]], 1
    for size in [*sizes, len(ids)]:
        if at < len(ids):
            parts.append(ids[at : at + size])
            at += size
    made = [TokenChunk()]
    for i, part in enumerate(parts):
        decode_pass = DecodePass(4, len(part) - 1, 4) if i else None
        made.append(TokenChunk(part, decode_pass=decode_pass, logprobs=logprobs(part)))
    made[-1].finish_reason = reason
    return made


def run(tokenizer: ChatTokenizer, asked: GenerationRequest, parts: list[TokenChunk]):
    """Text, tokens, log-probabilities, the end and the statistics of a whole answer."""
    choice = Choice(asked, 0, tokenizer)
    text, ids, chosen = "", [], []
    for part in parts:
        delta = choice.take(part)
        text, ids = text + delta.text, ids + delta.token_ids
        if delta.logprobs is not None:
            chosen += delta.logprobs.chosen
            assert list(delta.logprobs.top_token_ids) == delta.token_ids
        if delta.finish_reason:
            return text, ids, chosen, (delta.finish_reason, delta.stop), delta.stats
    raise AssertionError("the answer does not end")


def test_a_stop_string_inside_accepted_drafts_ends_tokens_logprobs_and_statistics_with_its_last_token(tokenizer):
    ids = tokenizer.encode("One two three four five six seven eight nine ten")
    asked = request([" four"])
    # One pass brings "two" to "seven": all but the last are accepted drafts.
    text, tokens, chosen, end, stats = run(tokenizer, asked, chunks(ids, [6], LENGTH))
    assert text == "One two three" and end == (STOP, " four")
    assert tokens == ids[:4] and chosen == [-float(i) for i in ids[:4]]
    assert (stats.num_steps, stats.num_accepted, stats.num_spec_tokens) == (1, 3, 4)


@settings(max_examples=150, deadline=None)
@given(
    start=st.integers(0, 20),
    stops=st.lists(st.sampled_from([", t", "three", "e", "語", "🍕", ".", " two three.", "xyz"]), max_size=3),
    sizes=st.lists(st.integers(1, 6), max_size=30),
    min_tokens=st.integers(0, 25),
    include=st.booleans(),
    is_stopped=st.booleans(),
)
def test_what_comes_out_does_not_depend_on_the_chunks(tokenizer, start, stops, sizes, min_tokens, include, is_stopped):
    ids = tokenizer.encode(TEXT)[start:]
    ids = [*ids, EOS] if is_stopped else ids
    reason = STOP if is_stopped else LENGTH
    asked = request(stops, min(min_tokens, len(ids) - 1), include)
    one_by_one = run(tokenizer, asked, chunks(ids, [1] * len(ids), reason))
    in_chunks = run(tokenizer, asked, chunks(ids, sizes, reason))
    assert in_chunks[:4] == one_by_one[:4]
    text, tokens, _, (_, stop), stats = in_chunks
    assert tokens == ids[: len(tokens)]
    assert stats.num_steps + stats.num_accepted in (len(tokens) - 1, len(tokens))
    whole = tokenizer.decode(tokens)
    if isinstance(stop, str):
        assert whole.startswith(text if include else text + stop) and len(tokens) > asked.stopping.min_new_tokens
    else:
        assert text == whole == tokenizer.decode(ids)


def test_min_tokens_holds_stop_strings_back_until_one_is_completed_later(tokenizer):
    ids = tokenizer.encode("a b a b a b a b")
    for min_tokens, expected in [(0, "a"), (1, "a"), (2, "a b a"), (3, "a b a"), (4, "a b a b a")]:
        text, tokens, _, end, _ = run(tokenizer, request([" b"], min_tokens), chunks(ids, [], LENGTH))
        assert (text, end) == (expected, (STOP, " b"))
        assert len(tokens) > min_tokens


def test_a_stop_string_may_begin_within_min_tokens(tokenizer):
    ids = tokenizer.encode("One two three four")
    assert run(tokenizer, request([" two three"], 2), chunks(ids, [], LENGTH))[0] == "One"
    assert run(tokenizer, request([" two three"], 3), chunks(ids, [], LENGTH))[0] == "One two three four"


def test_a_token_that_stops_is_text_only_where_the_request_says_so(tokenizer):
    ids = tokenizer.encode("One two three")
    for include, expected in [(False, "One two"), (True, "One two three")]:
        text, tokens, _, end, _ = run(tokenizer, request([], include=include), chunks(ids, [2], STOP))
        assert (text, tokens, end) == (expected, ids, (STOP, ids[-1]))


def test_an_empty_chunk_says_nothing(tokenizer):
    delta = Choice(request([]), 0, tokenizer).take(TokenChunk())
    assert not delta.text and not delta.token_ids and not delta.finish_reason
