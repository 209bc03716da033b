"""Server-sent events that are prepared are byte for byte those that are written out."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dflash_ray.config import ModelConfig
from dflash_ray.core.stats import AcceptanceStats
from dflash_ray.gateway.choice import ChoiceDelta
from dflash_ray.gateway.openai_responses import ResponseWriter, event
from dflash_ray.gateway.openai_types import ChatCompletionRequest, CompletionRequest
from dflash_ray.gateway.requests import GenerationRequest
from dflash_ray.pb import common_pb2, router_pb2
from dflash_ray.text.tokenizer import ChatTokenizer
from tests.gateways import shared_tokenizer

STOP = common_pb2.FINISH_REASON_STOP
HELLO = [{"role": "user", "content": "hi"}]
OPTIONS = [{}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return shared_tokenizer(ModelConfig())


def writer(tokenizer: ChatTokenizer, kind: str, options: dict, with_ids: bool, num_choices: int) -> ResponseWriter:
    values = {"stream": True, "stream_options": options, "return_token_ids": with_ids, "n": num_choices}
    if kind == "chat":
        body = ChatCompletionRequest.model_validate({"messages": HELLO, **values})
    else:
        body = CompletionRequest.model_validate({"prompt": "hi", **values})
    request = GenerationRequest(
        "r", [1, 2], common_pb2.SamplingParams(), common_pb2.StoppingParams(), router_pb2.Speculation(), num_choices
    )
    made = ResponseWriter(kind, "r", 'a "model"\0text\0', tokenizer, body, [request])
    made._created = 1
    return made


DELTAS = st.builds(
    lambda index, text, ids: ChoiceDelta(index, text, ids),
    st.integers(0, 1),
    st.text(st.sampled_from('ab"\\\n\0é日🍕\u2028'), max_size=5) | st.just("\0text\0"),
    st.lists(st.integers(0, 9), max_size=3),
)


@given(
    deltas=st.lists(DELTAS, max_size=12),
    kind=st.sampled_from(["chat", "completion"]),
    options=st.sampled_from(OPTIONS),
    with_ids=st.booleans(),
)
def test_the_events_of_deltas_are_their_chunks_written_out(tokenizer, deltas, kind, options, with_ids):
    prepared, written = (writer(tokenizer, kind, options, with_ids, 2) for _ in range(2))
    ends = [ChoiceDelta(index, "!", [3], None, STOP, None, AcceptanceStats()) for index in range(2)]
    for delta in [*deltas, *ends]:
        copies = [ChoiceDelta(delta.index, delta.text, list(delta.token_ids), None, delta.finish_reason) for _ in "ab"]
        assert prepared.events(copies[0]) == "".join(map(event, written.chunks(copies[1])))
    assert [*prepared.last_chunks()] == [*written.last_chunks()]
