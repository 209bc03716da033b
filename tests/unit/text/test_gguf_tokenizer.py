"""Tokenizers of GGUF files: as transformers reads them, or refused by name."""

import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from dflash_ray.config import ModelConfig
from dflash_ray.text.tokenizer import ChatTokenizer
from tests.tiny_tokenizers import QWEN3, SPECIALS, save_tokenizer

TEXTS = st.lists(st.sampled_from(["the user", "in", " ", "  ", "\n", "12", "3", "hi", "é", "'s", "<think>"])).map(
    "".join
)
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def write(
    directory: Path,
    split: str | None = "gpt-2",
    kind: str = "gpt2",
    rope_scaling: str | None = None,
    markers: tuple[str, ...] = (),
    **metadata,
) -> Path:
    """A GGUF file without tensors, with the vocabulary of the byte-level tests."""
    tokenizer = Tokenizer.from_file(str(save_tokenizer(directory / "other") / "tokenizer.json"))
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    plain = ("<think>", "</think>")
    types = {**dict.fromkeys(SPECIALS, CONTROL), **dict.fromkeys(plain, USER_DEFINED)}
    tokens = [token for token, _ in vocab if token in types or "|>" not in token]
    tokens += markers
    types |= dict.fromkeys(markers, CONTROL)

    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer = GGUFWriter(directory / "model.gguf", "llama")
    writer.add_context_length(64)
    if rope_scaling is not None:
        writer.add_string("llama.rope.scaling.type", rope_scaling)
    writer.add_tokenizer_model(kind)
    if split is not None:
        writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([types.get(token, NORMAL) for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_chat_template(QWEN3)
    for key, value in metadata.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return directory


def load(directory: Path) -> ChatTokenizer:
    return ChatTokenizer(ModelConfig(path=str(directory)))


@pytest.fixture(scope="module", params=["gpt-2", "smollm", "qwen2", "gpt-4o"])
def pair(request, tmp_path_factory):
    directory = write(tmp_path_factory.mktemp("gguf"), request.param, add_bos_token=request.param == "qwen2")
    return load(directory), AutoTokenizer.from_pretrained(directory, gguf_file="model.gguf")


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_texts_are_encoded_as_transformers_reads_the_file(pair, text):
    tokenizer, reference = pair
    assert tokenizer.encode(text, add_special_tokens=True) == reference(text)["input_ids"]
    messages = [{"role": "user", "content": text}]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chat(messages) == expected


def test_digits_stand_alone_where_llama_cpp_splits_them(tmp_path):
    tokenizer = load(write(tmp_path, "starcoder"))
    pieces = [tokenizer.token_text(token) for token in tokenizer.encode("in 12")]
    assert pieces == ["in", " ", "1", "2"]


@pytest.mark.parametrize("split", ["llama-bpe", "tekken"])
def test_families_that_begin_with_bos_do_so_unless_the_file_says_otherwise(tmp_path, split):
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    bos = AutoTokenizer.from_pretrained(write(tmp_path / "with", split) / "other").bos_token_id
    assert load(tmp_path / "with").encode("hi", add_special_tokens=True)[0] == bos
    without = load(write(tmp_path / "without", split, add_bos_token=False))
    assert bos not in without.encode("hi", add_special_tokens=True)


def test_ends_of_text_turn_and_message_all_stop(tmp_path):
    directory = write(tmp_path, eot_token_id=5, eom_token_id=6)
    end = AutoTokenizer.from_pretrained(directory, gguf_file="model.gguf").eos_token_id
    assert load(directory).eos_ids == (5, 6, end)


def test_the_file_states_the_context_length(tmp_path):
    assert load(write(tmp_path)).context_length == 64


@pytest.mark.parametrize(
    ("split", "kind", "named"),
    [("viking", "gpt2", "tokenizer.ggml.pre 'viking'"), (None, "gpt2", "pre None"), ("default", "bert", "'bert'")],
)
def test_a_pre_tokenizer_that_is_not_known_is_refused_by_name(tmp_path, split, kind, named):
    with pytest.raises(ValueError, match=named) as caught:
        load(write(tmp_path, split, kind))
    assert "put the model's tokenizer.json beside model.gguf" in str(caught.value)


def test_positions_that_the_target_would_not_scale_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"rope\.scaling\.type 'yarn'"):
        load(write(tmp_path, rope_scaling="yarn"))


def test_markers_outside_the_byte_alphabet_are_control_tokens_with_their_own_ids(tmp_path):
    plain = load(write(tmp_path))
    marker = "<\u2581turn\u2581>"
    marked = load(write(tmp_path, markers=(marker,)))
    assert marked.vocab_size == plain.vocab_size + 1
    assert marked.token_text(plain.vocab_size) == marker
    assert marked.encode(f"hi{marker}") == plain.encode("hi") + plain.encode(marker)
