"""Prompts come from files, traffic and the target; bad lines are named, near-duplicates and old traffic left out."""

import gzip
import json
import os
import time

import pytest

from dflash_ray.config import ConfigError, ModelConfig, TrafficConfig
from dflash_ray.gateway.tokenizer import ChatTokenizer
from dflash_ray.training.config import SelfGeneratedSection
from dflash_ray.training.prompt_files import Prompt, read_prompts
from dflash_ray.training.prompts import gather_prompts, self_generated_prompts, user_turn, without_near_duplicates
from dflash_ray.training.traffic import captured_prompts
from tests.training.conftest import END, recipe, write_prompt_file

GOOD_LINE = '{"prompt": "hello"}\n'


def prompt(text: str) -> Prompt:
    return Prompt([{"role": "user", "content": text}], "test")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "is not JSON"),
        ("\n", "is not JSON"),
        ("[1]", "must be an object"),
        ('{"text": "hello"}', "needs `prompt`"),
        ('{"prompt": 3}', "needs `prompt`"),
        ('{"messages": ["hello"]}', "needs `prompt`"),
        ('{"prompt": "  "}', "the user says nothing"),
        ('{"messages": [{"role": "assistant", "content": "hello"}]}', "the user says nothing"),
    ],
)
def test_a_bad_line_is_named(line, complaint, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(GOOD_LINE + line)
    with pytest.raises(ValueError, match=f"line 2: .*{complaint}"):
        read_prompts(file)


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(GOOD_LINE.encode() + b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2: is not JSON"):
        read_prompts(file)


def test_an_empty_file_is_refused(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.touch()
    with pytest.raises(ValueError, match="is empty"):
        read_prompts(file)


def test_a_pickle_is_refused_before_it_is_opened(tmp_path):
    with pytest.raises(ValueError, match="never loaded"):
        read_prompts(tmp_path / "prompts.pkl")


def test_what_an_assistant_said_last_is_left_out(tmp_path):
    file = tmp_path / "chats.jsonl"
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user", "assistant")]
    file.write_text(json.dumps({"messages": turns}))
    (read,) = read_prompts(file)
    assert read.messages == turns[:4] and read.source == "chats"


def test_near_duplicates_are_left_out():
    text = "Please explain in a few simple words why the sky over the sea is blue in the morning"
    texts = [text, text.upper() + "  ", text + "!", "Write a poem about rain"]
    kept = list(without_near_duplicates([prompt(text) for text in texts], 0.8))
    assert [one.text for one in kept] == [texts[0], texts[3]]


def test_the_split_depends_on_the_prompt_alone():
    prompts = [prompt(str(i)) for i in range(2000)]
    held_out = [one.is_held_out(0.1) for one in prompts]
    assert held_out == [Prompt(one.messages, "elsewhere").is_held_out(0.1) for one in prompts]
    assert 140 < sum(held_out) < 260


def mask_digits(text: str) -> str:
    return "".join("#" if character.isdigit() else character for character in text)


def capture_traffic(directory, **ages_in_days: float) -> None:
    for name, age in ages_in_days.items():
        file, written = directory / f"{name}.jsonl", time.time() - age * 86400
        file.write_text(json.dumps({"prompt": f"{name}: mail me at a@b.org or call 555", "time": written}) + "\n")
        os.utime(file, (written, written))


def test_traffic_is_redacted_by_patterns_and_hook(tmp_path):
    capture_traffic(tmp_path, today=0)
    section = TrafficConfig(
        directory=tmp_path,
        retention_days=30,
        redact_patterns=(r"\S+@\S+",),
        redact_hook=f"{__name__}:mask_digits",
    )
    (read,) = captured_prompts(section)
    assert read.text == "today: mail me at [redacted] or call ###"
    assert read.source == "traffic"


def test_traffic_past_its_retention_is_neither_used_nor_kept(tmp_path):
    capture_traffic(tmp_path, today=0, old=31)
    section = TrafficConfig(directory=tmp_path, retention_days=30, redact_patterns=("x",))
    assert [one.text.split(":")[0] for one in captured_prompts(section)] == ["today"]
    assert [file.name for file in tmp_path.iterdir()] == ["today.jsonl"]


def test_a_redaction_that_cannot_be_loaded_stops_before_traffic_is_read(tmp_path):
    capture_traffic(tmp_path, today=0)
    section = TrafficConfig(directory=tmp_path, retention_days=30, redact_hook="no_such_module:f")
    with pytest.raises(ConfigError, match=r"prompts.traffic.redact_hook"):
        list(captured_prompts(section))


def test_the_users_turn_is_found_in_any_template(target_dir):
    tokenizer = ChatTokenizer(ModelConfig(path=str(target_dir)))
    prefix, end = user_turn(tokenizer)
    assert "".join(map(tokenizer.token_text, prefix)) == "<|start|>user "
    assert tokenizer.token_text(end) == END


def test_the_target_continues_its_own_chat_prefix_after_each_stem(target_dir, tmp_path):
    config, again = (recipe(target_dir, tmp_path / name) for name in ("once", "again"))
    section = SelfGeneratedSection(num_prompts=30, stems=("Sum: ",), max_new_tokens=60, temperature=2.0)
    written = self_generated_prompts(config, section)
    assert {one.source for one in written} == {"self", "self: Sum:"}
    assert all(one.text.startswith("Sum: ") for one in written if one.source != "self")
    assert written == self_generated_prompts(again, section)


def test_self_generated_prompts_are_not_written_twice(target_dir, tmp_path):
    config = recipe(target_dir, tmp_path)
    section = SelfGeneratedSection(num_prompts=3, stems=("Sum: ",), max_new_tokens=40, temperature=2.0)
    written = self_generated_prompts(config, section)
    (piece,) = config.prompts_dir.glob("self_generated-*/*.jsonl")
    before = piece.stat().st_mtime_ns
    assert self_generated_prompts(config, section) == written
    assert piece.stat().st_mtime_ns == before


def test_compressed_prompts_are_read_like_plain_ones(tmp_path):
    plain, packed = tmp_path / "questions.jsonl", tmp_path / "questions.jsonl.gz"
    write_prompt_file(plain, 6)
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_prompts(packed) == read_prompts(plain)


@pytest.mark.parametrize("damage", [lambda data: data[:-12], lambda data: b"{}" + data], ids=["cut off", "no gzip"])
def test_a_damaged_archive_is_named(tmp_path, damage):
    path = tmp_path / "questions.jsonl.gz"
    path.write_bytes(damage(gzip.compress(b'{"prompt": "hello"}\n' * 400)))
    with pytest.raises(ValueError, match=r"questions\.jsonl\.gz: cannot be unpacked"):
        read_prompts(path)


def test_a_sample_of_a_file_is_the_same_each_time_and_not_what_is_held_out(target_dir, tmp_path):
    write_prompt_file(tmp_path / "questions.jsonl", 400)
    sections = {"files": [str(tmp_path / "questions.jsonl")], "prompts_per_file": 80, "held_out_fraction": 0.2}
    counts = []
    for run in ("a", "b"):
        config = recipe(target_dir, tmp_path / run, prompts=sections)
        counts.append(gather_prompts(config))
    assert counts[0] == counts[1]
    num_train, num_held_out = counts[0]
    assert 70 <= num_train + num_held_out <= 80 and 4 <= num_held_out <= 28
    assert (tmp_path / "a/run/prompts/train.jsonl").read_bytes() == (
        tmp_path / "b/run/prompts/train.jsonl"
    ).read_bytes()
