"""Prompts are recorded only where that is configured, redacted, and at no request's cost."""

import json
import os
import stat
import time

import pytest
from pydantic import ValidationError

from dflash_ray.config import ConfigError, DflashRayConfig, TrafficConfig, load_config
from dflash_ray.core.errors import InvalidRequestError
from dflash_ray.gateway.openai_types import ChatCompletionRequest
from dflash_ray.gateway.requests import RequestBuilder
from dflash_ray.gateway.traffic import TrafficRecorder
from dflash_ray.pb import generation_pb2
from dflash_ray.text.tokenizer import ChatTokenizer

CONFIG = load_config(None, [])
MODEL = CONFIG.model.served_name
PATTERNS = (r"\S+@\S+",)


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(CONFIG.model)


def chat(content: str, **values) -> ChatCompletionRequest:
    return ChatCompletionRequest(model=MODEL, messages=[{"role": "user", "content": content}], **values)


def records(directory) -> list[dict]:
    return [json.loads(line) for path in directory.glob("*.jsonl") for line in path.read_text().splitlines()]


def explode(text: str) -> str:
    raise RuntimeError(text)


def test_nothing_is_recorded_unless_configured():
    assert DflashRayConfig().gateway.traffic is None


def test_chats_of_both_apis_are_recorded_redacted_and_for_the_owner_alone(tokenizer, tmp_path):
    directory = tmp_path / "traffic"
    recorder = TrafficRecorder(TrafficConfig(directory=directory, retention_days=30, redact_patterns=PATTERNS))
    builder = RequestBuilder(CONFIG, tokenizer, recorder)
    builder.from_chat(chat("write to a@b.org please"), "1")
    message = generation_pb2.GenerateRequest(model=MODEL)
    message.chat.messages.add(role="user", content="grüße von c@d.org")
    builder.from_grpc(message, "2")
    with pytest.raises(InvalidRequestError):
        builder.from_chat(chat("refused", top_logprobs=3), "3")
    recorder.close()
    recorded = records(directory)
    contents = [record["messages"][-1]["content"] for record in recorded]
    assert contents == ["write to [redacted] please", "grüße von [redacted]"]
    assert all(abs(record["time"] - time.time()) < 60 for record in recorded)
    (file,) = directory.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_files_past_their_retention_are_deleted(tmp_path):
    old, other = tmp_path / "old.jsonl", tmp_path / "notes.txt"
    for path in (old, other):
        path.write_text("{}\n")
        os.utime(path, (time.time() - 40 * 86400,) * 2)
    recorder = TrafficRecorder(TrafficConfig(directory=tmp_path, retention_days=30, redact_patterns=PATTERNS))
    recorder.record([{"role": "user", "content": "hi"}])
    recorder.close()
    assert not old.exists() and other.exists()
    assert len(records(tmp_path)) == 1


def test_a_hook_that_fails_costs_the_record_and_its_text_is_not_logged(tokenizer, tmp_path, caplog):
    section = TrafficConfig(directory=tmp_path, retention_days=30, redact_hook=f"{__name__}:explode")
    recorder = TrafficRecorder(section)
    assert RequestBuilder(CONFIG, tokenizer, recorder).from_chat(chat("my secret"), "1").prompt_ids
    recorder.close()
    assert not records(tmp_path)
    assert "RuntimeError" in caplog.text and "secret" not in caplog.text


@pytest.mark.parametrize(
    ("values", "named"),
    [({}, "redact_patterns or redact_hook"), ({"redact_patterns": ["("]}, "no regular expression")],
)
def test_a_redaction_that_is_missing_or_wrong_is_refused_with_its_key(values, named, tmp_path):
    with pytest.raises(ValidationError, match=named):
        TrafficConfig(directory=tmp_path, retention_days=1, **values)


def test_a_hook_that_cannot_be_loaded_is_named(tmp_path):
    section = TrafficConfig(directory=tmp_path, retention_days=1, redact_hook="no_such_module:f")
    with pytest.raises(ConfigError, match=r"gateway\.traffic\.redact_hook"):
        TrafficRecorder(section)
