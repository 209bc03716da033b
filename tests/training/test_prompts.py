"""Prompts come from files, traffic and the target; bad lines are named, near-duplicates and old traffic left out."""

import gzip
import json
import os
import time

import pytest

from dflash_ray.config import ConfigError, ModelConfig, TrafficConfig
from dflash_ray.text.tokenizer import ChatTokenizer
from dflash_ray.training.config import SelfGeneratedSection
from dflash_ray.training.left_out import LeftOut
from dflash_ray.training.prompt_files import Prompt, read_prompts
from dflash_ray.training.prompts import gather_prompts, self_generated_prompts, user_turn, without_near_duplicates
from dflash_ray.training.recorded_prompts import recorded_prompts
from tests.training.conftest import END, recipe, run_step, save_recipe, write_prompt_file

GOOD_LINE = '{"prompt": "hello"}\n'


def prompt(text: str) -> Prompt:
    return Prompt([{"role": "user", "content": text}], "test")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"prompt": "\xff"}', "not JSON"),
        ('{"prompt": ' + "9" * 5000 + "}", "not JSON"),
        ("[1]", "not an object"),
        ('{"text": "hello"}', "without `prompt`"),
        ('{"prompt": 3}', "without `prompt`"),
        ('{"messages": ["hello"]}', "without `prompt`"),
        ('{"messages": [{"role": "user", "content": null}]}', "without `prompt`"),
        ('{"prompt": "  "}', "without words of the user"),
        ('{"messages": []}', "without words of the user"),
        ('{"messages": [{"role": "assistant", "content": "hello"}]}', "without words of the user"),
        ('{"messages": [{"role": "system", "content": "hello"}]}', "without words of the user"),
        ('{"prompt": "\\ud83d"}', "with half a surrogate pair"),
        ('{"prompt": "hello", "source": "\\ud83d"}', "with half a surrogate pair"),
        ('{"conversations": [{"from": "tool", "value": "hello"}]}', "with a turn from none of human, gpt and system"),
        ('{"conversations": [{"from": ["human"], "value": "hello"}]}', "with a turn from none of"),
        ('{"conversations": [{"from": "human", "value": 3}]}', "without `prompt`"),
        ('{"conversations": "hello"}', "without `prompt`"),
    ],
)
def test_a_bad_line_is_left_out_and_named(line, reason, tmp_path):
    file, left_out = tmp_path / "prompts.jsonl", LeftOut()
    file.write_bytes(GOOD_LINE.encode() + line.encode("latin-1") + b"\n\n" + GOOD_LINE.encode())
    assert [one.text for one in read_prompts(file, left_out)] == ["hello", "hello"]
    ((place, found),) = left_out.rows
    assert place == f"{file}, line 2" and found.startswith(reason)


def test_what_is_left_out_is_summed_up_by_reason_with_the_first_places():
    left_out = LeftOut()
    assert left_out.text == "" and not left_out
    for number in range(5):
        left_out.add(f"a.jsonl, line {number}", "not JSON")
    left_out.add("b.jsonl, line 1", "not an\nobject")
    assert left_out.text == (
        "left out 6 rows: 5 not JSON (a.jsonl, line 0; a.jsonl, line 1; a.jsonl, line 2; ...),"
        " 1 not an object (b.jsonl, line 1)"
    )
    for number in range(20):
        left_out.add("c.jsonl, line 1", f"reason {number}")
    assert left_out.text.endswith(", 14 for other reasons")


def test_a_run_goes_on_without_bad_lines_and_says_how_many_there_were(target_dir, tmp_path):
    config = recipe(target_dir, tmp_path)
    (file,) = config.prompts.files
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    file.write_text("{\n" + file.read_text() + "[]\n")
    files = f"prompts.files=[{file}, {empty}]"
    output = run_step("prompts", save_recipe(config, tmp_path / "recipe.yaml"), files)
    assert output.splitlines()[-1] == (
        f"left out 3 rows: 1 not JSON ({file}, line 1), 1 not an object ({file}, line 102), 1 without a line ({empty})"
    )
    assert len(read_prompts(config.prompts_dir / "train.jsonl", LeftOut())) > 50


def test_a_run_ends_when_nothing_is_left(target_dir, tmp_path):
    config = recipe(target_dir, tmp_path)
    config.prompts.files[0].write_text("{\n[]\n")
    with pytest.raises(ValueError, match=r"^prompts: nothing is left; left out 2 rows: 1 not JSON"):
        gather_prompts(config, LeftOut())
    assert not config.prompts_dir.exists()


SHAREGPT = {
    "id": "a",
    "conversations": [
        {"from": "gpt", "value": "Go on, "},
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "Bye"},
        {"from": "gpt", "value": "Bye."},
    ],
}


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.json", "chats.json.gz"])
def test_conversations_of_sharegpt_are_read_like_messages(name, tmp_path):
    """As lines, and as the one array that they are shared as."""
    file, left_out = tmp_path / name, LeftOut()
    text = json.dumps(SHAREGPT) if name == "chats.jsonl" else json.dumps([SHAREGPT, 3], indent=2)
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    (read,) = read_prompts(file, left_out)
    assert read.messages == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    assert left_out.rows == ([] if name == "chats.jsonl" else [(f"{file}, item 2", "not an object")])


def test_lines_in_a_file_named_json_are_lines(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(GOOD_LINE * 2)
    assert len(read_prompts(file, LeftOut())) == 2


def test_a_pickle_is_refused_before_it_is_opened(tmp_path):
    with pytest.raises(ValueError, match="never loaded"):
        read_prompts(tmp_path / "prompts.pkl", LeftOut())


def test_what_an_assistant_said_last_is_left_out(tmp_path):
    file = tmp_path / "chats.jsonl"
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user", "assistant")]
    file.write_text(json.dumps({"messages": turns}))
    (read,) = read_prompts(file, LeftOut())
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
    (read,) = recorded_prompts(section, LeftOut())
    assert read.text == "today: mail me at [redacted] or call ###"
    assert read.source == "traffic"


def test_traffic_past_its_retention_is_neither_used_nor_kept(tmp_path):
    capture_traffic(tmp_path, today=0, old=31)
    section = TrafficConfig(directory=tmp_path, retention_days=30, redact_patterns=("x",))
    assert [one.text.split(":")[0] for one in recorded_prompts(section, LeftOut())] == ["today"]
    assert [file.name for file in tmp_path.iterdir()] == ["today.jsonl"]


def refuse_555(text: str) -> str:
    if "555" in text:
        raise KeyError(text)
    return text


def test_traffic_that_the_recorder_did_not_finish_or_the_redaction_does_not_get_through_is_left_out(tmp_path):
    capture_traffic(tmp_path, today=0)
    file, now = tmp_path / "today.jsonl", time.time()
    rows = [{"prompt": "good", "time": now}, {"prompt": "no time"}, {"prompt": "bad time", "time": float("nan")}]
    file.write_text(file.read_text() + "".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "cut o')
    section = TrafficConfig(directory=tmp_path, retention_days=30, redact_hook=f"{__name__}:refuse_555")
    left_out = LeftOut()
    assert [one.text for one in recorded_prompts(section, left_out)] == ["good"]
    assert left_out.rows == [
        (f"{file}, line 1", "whose redaction failed with KeyError"),
        (f"{file}, line 3", "without `time`, in seconds since 1970"),
        (f"{file}, line 4", "without `time`, in seconds since 1970"),
        (f"{file}, line 5", "not JSON"),
    ]


def test_a_redaction_that_cannot_be_loaded_stops_before_traffic_is_read(tmp_path):
    capture_traffic(tmp_path, today=0)
    section = TrafficConfig(directory=tmp_path, retention_days=30, redact_hook="no_such_module:f")
    with pytest.raises(ConfigError, match=r"prompts.traffic.redact_hook"):
        list(recorded_prompts(section, LeftOut()))


def test_the_users_turn_is_found_in_any_template(target_dir):
    tokenizer = ChatTokenizer(ModelConfig(path=str(target_dir)))
    prefix, end = user_turn(tokenizer)
    assert "".join(map(tokenizer.token_text, prefix)) == "<|start|>user "
    assert tokenizer.token_text(end) == END


def test_the_target_continues_its_own_chat_prefix_after_each_stem(target_dir, tmp_path):
    config, again = (recipe(target_dir, tmp_path / name) for name in ("once", "again"))
    section = SelfGeneratedSection(num_prompts=30, stems=("Sum: ",), max_new_tokens=60, temperature=2.0)
    written = self_generated_prompts(config, section, LeftOut())
    assert {one.source for one in written} == {"self", "self: Sum:"}
    assert all(one.text.startswith("Sum: ") for one in written if one.source != "self")
    assert written == self_generated_prompts(again, section, LeftOut())


def test_self_generated_prompts_are_not_written_twice(target_dir, tmp_path):
    config = recipe(target_dir, tmp_path)
    section = SelfGeneratedSection(num_prompts=3, stems=("Sum: ",), max_new_tokens=40, temperature=2.0)
    written = self_generated_prompts(config, section, LeftOut())
    (piece,) = config.prompts_dir.glob("self_generated-*/*.jsonl")
    before = piece.stat().st_mtime_ns
    assert self_generated_prompts(config, section, LeftOut()) == written
    assert piece.stat().st_mtime_ns == before


def test_compressed_prompts_are_read_like_plain_ones(tmp_path):
    plain, packed = tmp_path / "questions.jsonl", tmp_path / "questions.jsonl.gz"
    write_prompt_file(plain, 6)
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_prompts(packed, LeftOut()) == read_prompts(plain, LeftOut())


@pytest.mark.parametrize("damage", [lambda data: data[:-12], lambda data: b"{}" + data], ids=["cut off", "no gzip"])
def test_a_damaged_archive_is_named(tmp_path, damage):
    path = tmp_path / "questions.jsonl.gz"
    path.write_bytes(damage(gzip.compress(b'{"prompt": "hello"}\n' * 400)))
    with pytest.raises(ValueError, match=r"questions\.jsonl\.gz: cannot be unpacked"):
        read_prompts(path, LeftOut())


def test_a_sample_of_a_file_is_the_same_each_time_and_not_what_is_held_out(target_dir, tmp_path):
    write_prompt_file(tmp_path / "questions.jsonl", 400)
    sections = {"files": [str(tmp_path / "questions.jsonl")], "prompts_per_file": 80, "held_out_fraction": 0.2}
    counts = []
    for run in ("a", "b"):
        config = recipe(target_dir, tmp_path / run, prompts=sections)
        counts.append(gather_prompts(config, LeftOut()))
    assert counts[0] == counts[1]
    num_train, num_held_out = counts[0]
    assert 70 <= num_train + num_held_out <= 80 and 4 <= num_held_out <= 28
    assert (tmp_path / "a/run/prompts/train.jsonl").read_bytes() == (
        tmp_path / "b/run/prompts/train.jsonl"
    ).read_bytes()
