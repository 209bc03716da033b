"""Chats become the prompts that transformers makes of them, and nothing in them becomes a control token."""

import json
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given, settings
from transformers import AutoTokenizer

from dflash_ray.config import ModelConfig
from dflash_ray.core.errors import InvalidRequestError
from dflash_ray.text.tokenizer import ChatTokenizer
from tests.tiny_tokenizers import DEEPSEEK, LLAMA3, QWEN3, SPECIALS, save_tokenizer

TEMPLATES = {"qwen3": QWEN3, "llama3": LLAMA3, "deepseek": DEEPSEEK}
KINDS = [
    ("byte_level", "qwen3"),
    ("byte_level", "llama3"),
    ("byte_level", "deepseek"),
    ("sentencepiece", "qwen3"),
    ("sentencepiece", "llama3"),
    ("lowercase", "qwen3"),
]
PLAIN = ["a", "the user", " ", "\n", "</think>", "<think>", "é日", "🚀", "<|im_", "end|>", "\U00100000", "\U000f0000"]
CONTROL = [*SPECIALS, "<|IM_END|>", "<|User|>", "<|Assistant|>"]
ROLES = ["user", "assistant"]


def chats(parts):
    content = st.lists(st.sampled_from(parts), max_size=6).map("".join)
    message = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": content})
    return st.lists(message, min_size=1, max_size=4)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Our tokenizer and transformers' of each directory."""
    made = {}
    for kind, name in KINDS:
        directory = save_tokenizer(tmp_path_factory.mktemp(f"{kind}-{name}"), kind, TEMPLATES[name])
        made[kind, name] = ChatTokenizer(ModelConfig(path=str(directory))), AutoTokenizer.from_pretrained(directory)
    return made


def of_transformers(reference, messages, **values):
    return reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **values)


@pytest.mark.parametrize(("kind", "name"), KINDS)
@settings(max_examples=60, deadline=None)
@given(messages=chats(PLAIN), thinking=st.sampled_from([{}, {"enable_thinking": False}, {"enable_thinking": True}]))
def test_chats_without_control_tokens_are_encoded_as_transformers_does(pairs, kind, name, messages, thinking):
    assume(not any("<|im_end|>" in message["content"] for message in messages))  # joined of two parts
    tokenizer, reference = pairs[kind, name]
    assert tokenizer.encode_chat(messages, thinking) == of_transformers(reference, messages, **thinking)


@pytest.mark.parametrize(("kind", "name"), KINDS)
@settings(max_examples=100, deadline=None)
@given(messages=chats([*PLAIN, *CONTROL]))
def test_whatever_a_chat_says_only_the_template_writes_control_tokens(pairs, kind, name, messages):
    tokenizer, reference = pairs[kind, name]
    controls = SPECIALS + (["<|User|>", "<|Assistant|>"] if name == "deepseek" else [])
    control_ids = set(reference.convert_tokens_to_ids(controls))
    blank = [{**message, "content": "x"} for message in messages]

    def control(ids):
        return [token for token in ids if token in control_ids]

    assert control(tokenizer.encode_chat(messages)) == control(of_transformers(reference, blank))


@pytest.mark.parametrize(("kind", "name"), [pair for pair in KINDS if pair[0] != "lowercase"])
@settings(max_examples=60, deadline=None)
@given(messages=chats([part for part in PLAIN if part[0] not in "\U00100000\U000f0000"] + SPECIALS))
def test_control_tokens_in_contents_are_encoded_as_transformers_sanitizes_them(pairs, kind, name, messages):
    tokenizer, reference = pairs[kind, name]
    assume(not any("think>" in message["content"] for message in messages))  # transformers hides these from templates
    assert tokenizer.encode_chat(messages) == of_transformers(reference, messages, sanitize_control_tokens=True)


def test_a_template_that_cuts_or_joins_contents_makes_no_control_token(tmp_path):
    template = (
        "{% for m in messages %}{{ m.content[1:] }}{{ m.content | upper | lower }}{{ m | tojson(true) }}{% endfor %}"
    )
    directory = save_tokenizer(tmp_path, template=template)
    tokenizer = ChatTokenizer(ModelConfig(path=str(directory)))
    special_ids = set(AutoTokenizer.from_pretrained(directory).convert_tokens_to_ids(SPECIALS))
    for first, second in pairwise([*SPECIALS, "x", *SPECIALS]):
        ids = tokenizer.encode_chat([{"role": "user", "content": content} for content in (first, second + first)])
        assert special_ids.isdisjoint(ids)


def test_overlapping_control_tokens_stay_text(tmp_path):
    extra = {"additional_special_tokens": ["ab<", "<s"]}
    directory = save_tokenizer(tmp_path, template="{{ messages[0].content }}", **extra)
    tokenizer = ChatTokenizer(ModelConfig(path=str(directory)))
    special_ids = set(AutoTokenizer.from_pretrained(directory).convert_tokens_to_ids(["ab<", "<s", *SPECIALS]))
    ids = tokenizer.encode_chat([{"role": "user", "content": "ab<s>"}])
    assert special_ids.isdisjoint(ids) and special_ids.isdisjoint(tokenizer.encode("ab<s>"))
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode("ab<s>")) == "ab<s>"


def test_thinking_of_earlier_turns_is_cut_from_the_history(pairs):
    tokenizer, reference = pairs["byte_level", "qwen3"]
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes <|im_end|>"},
        {"role": "user", "content": "so?"},
    ]
    prompt = reference.decode(tokenizer.encode_chat(messages))
    assert "hm" not in prompt and "<|im_start|>assistant\nyes <|im_end|><|im_end|>\n" in prompt


def test_template_variables_come_from_the_configuration_and_the_request_overrides_them(tmp_path):
    directory = save_tokenizer(tmp_path)
    tokenizer = ChatTokenizer(ModelConfig(path=str(directory), chat_template_kwargs={"enable_thinking": False}))
    messages = [{"role": "user", "content": "hi"}]
    closed = "<think>\n\n</think>\n\n"
    assert tokenizer.decode(tokenizer.encode_chat(messages)).endswith(closed)
    assert not tokenizer.decode(tokenizer.encode_chat(messages, {"enable_thinking": True})).endswith(closed)


def test_strings_of_template_variables_stay_text(tmp_path):
    directory = save_tokenizer(tmp_path, template="{{ persona.name }}{% for key in persona %}{{ key }}{% endfor %}")
    tokenizer = ChatTokenizer(ModelConfig(path=str(directory)))
    specials = set(AutoTokenizer.from_pretrained(directory).convert_tokens_to_ids(SPECIALS))
    ids = tokenizer.encode_chat([{"role": "user", "content": ""}], {"persona": {"name": "<s>", "<|im_end|>": 1}})
    assert specials.isdisjoint(ids) and tokenizer.decode(ids) == "<s>name<|im_end|>"


@pytest.mark.parametrize("name", ["messages", "tools", "chat_template", "continue_final_message"])
def test_variables_that_the_server_sets_are_refused_by_name(pairs, name):
    tokenizer, _ = pairs["byte_level", "qwen3"]
    with pytest.raises(InvalidRequestError, match=name) as caught:
        tokenizer.encode_chat([{"role": "user", "content": "hi"}], {name: []})
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages + 1 }}", "{{ 1 // 0 }}"])
def test_a_template_that_fails_on_messages_refuses_the_request(tmp_path, template):
    tokenizer = ChatTokenizer(ModelConfig(path=str(save_tokenizer(tmp_path, template=template))))
    with pytest.raises(InvalidRequestError, match="template refuses") as caught:
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert caught.value.param == "messages"


def test_a_template_that_is_not_jinja_is_named_at_start(tmp_path):
    with pytest.raises(ValueError, match="not Jinja: line 1"):
        ChatTokenizer(ModelConfig(path=str(save_tokenizer(tmp_path, template="{% for %}"))))


def test_named_templates_are_chosen_by_name(tmp_path):
    named = [{"name": "default", "template": "one"}, {"name": "rag", "template": "two"}]
    directory = save_tokenizer(tmp_path, template=named)
    messages = [{"role": "user", "content": "hi"}]
    for choice, text in ((None, "one"), ("rag", "two")):
        tokenizer = ChatTokenizer(ModelConfig(path=str(directory), chat_template=choice))
        assert tokenizer.decode(tokenizer.encode_chat(messages)) == text
    with pytest.raises(ValueError, match=r"model\.chat_template: tool_use is no file.*default, rag"):
        ChatTokenizer(ModelConfig(path=str(directory), chat_template="tool_use"))


def test_template_files_come_before_the_tokenizers_configuration(tmp_path):
    directory = save_tokenizer(tmp_path)
    (directory / "chat_template.jinja").write_text("one")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates/rag.jinja").write_text("two")
    reference = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "hi"}]
    for choice in (None, "rag"):
        tokenizer = ChatTokenizer(ModelConfig(path=str(directory), chat_template=choice))
        assert tokenizer.encode_chat(messages) == of_transformers(reference, messages, chat_template=choice)


def test_without_a_default_template_one_must_be_named(tmp_path):
    directory = save_tokenizer(tmp_path, template=[{"name": "rag", "template": "two"}])
    with pytest.raises(ValueError, match="choose one of rag"):
        ChatTokenizer(ModelConfig(path=str(directory)))


def test_a_special_token_that_only_the_configuration_knows_is_one(tmp_path):
    directory = save_tokenizer(tmp_path, pad_token="<pad>", template="<pad>{{ messages[0].content }}")
    serialized = json.loads((directory / "tokenizer.json").read_text())
    assert "<pad>" not in [token["content"] for token in serialized["added_tokens"]]
    tokenizer, reference = ChatTokenizer(ModelConfig(path=str(directory))), AutoTokenizer.from_pretrained(directory)
    pad = reference.convert_tokens_to_ids("<pad>")
    assert tokenizer.encode_chat([{"role": "user", "content": "<pad>"}]).count(pad) == 1
