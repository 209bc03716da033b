"""The bound by which long texts are refused is never above what the tokenizer makes of them."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from dflash_ray.config import ModelConfig
from dflash_ray.core.errors import InvalidRequestError
from dflash_ray.text.token_sizes import token_sizes
from dflash_ray.text.tokenizer import ChatTokenizer
from tests.tiny_tokenizers import save_tokenizer

PARTS = [
    "the",
    "assistant",
    " " * 40,
    "\n" * 9,
    "é",
    "e\u0301",
    "\u1112\u1161\u11ab",
    "日本",
    "\x04" * 30,
    "<|im_end|>",
]
TEXTS = st.lists(st.sampled_from(PARTS) | st.characters(exclude_categories=["Cs"]), max_size=40).map("".join)


@pytest.fixture(scope="module", params=["embedded", "byte_level", "sentencepiece", "nfc"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    if request.param == "embedded":
        return ChatTokenizer(ModelConfig())._tokenizer
    kind = "byte_level" if request.param == "nfc" else request.param
    directory = save_tokenizer(tmp_path_factory.mktemp(request.param), kind)
    loaded = Tokenizer.from_file(str(directory / "tokenizer.json"))
    if request.param == "nfc":
        loaded.normalizer = normalizers.NFC()
    return loaded


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_the_bound_is_never_above_the_number_of_tokens(tokenizer, text):
    sizes = token_sizes(tokenizer)
    assert sizes is not None
    assert sizes.min_tokens([text]) <= len(tokenizer.encode(text, add_special_tokens=False).ids)
    assert sizes.min_tokens(["a" * 1000 * sizes.max_bytes]) == 1000


def bpe(**model) -> Tokenizer:
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, [], **model))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    return tokenizer


def test_a_tokenizer_that_may_drop_any_length_of_text_has_no_bound():
    assert token_sizes(bpe()) is not None
    stripping = bpe()
    stripping.add_special_tokens([AddedToken("<end>", rstrip=True)])
    dropping = [bpe(unk_token="!"), stripping, Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))]
    for normalizer in (normalizers.Strip(), normalizers.Replace(" ", ""), normalizers.NFKC()):
        dropping.append(bpe())
        dropping[-1].normalizer = normalizer
    for split in (pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(" ", "removed")):
        dropping.append(bpe())
        dropping[-1].pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel()])
    assert [token_sizes(tokenizer) for tokenizer in dropping] == [None] * len(dropping)


def test_what_cannot_fit_is_refused_without_tokenizing(tmp_path, monkeypatch):
    tokenizer = ChatTokenizer(ModelConfig(path=str(save_tokenizer(tmp_path))))
    monkeypatch.setattr(tokenizer, "_encode_piece", lambda _: pytest.fail("tokenized"))
    for encode in (
        lambda: tokenizer.encode("the user" * 1000, context=100, field="text"),
        lambda: tokenizer.encode_chat([{"role": "user", "content": "the user" * 1000}], context=100),
    ):
        with pytest.raises(InvalidRequestError, match=r"at least 6.. tokens.*context length is 100") as caught:
            encode()
        assert caught.value.param in ("text", "messages") and caught.value.code == "context_length_exceeded"


def test_a_text_of_many_control_tokens_is_refused_as_soon_as_it_is_too_long(tmp_path):
    tokenizer = ChatTokenizer(ModelConfig(path=str(save_tokenizer(tmp_path))))
    with pytest.raises(InvalidRequestError, match=r"at least 10. tokens"):
        tokenizer.encode("<s>" * 300, context=100)
