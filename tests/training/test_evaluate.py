"""Intervals and tables say what was counted."""

import json
from pathlib import Path

import pytest

from dflash_ray.core.stats import AcceptanceStats
from dflash_ray.training.config import TrainingConfig
from dflash_ray.training.evaluate import Result, confidence_interval, markdown_table
from tests.training.conftest import recipe, run_step, save_recipe


def stats(*accepted: int) -> AcceptanceStats:
    one = AcceptanceStats(4)
    for count in accepted:
        one.record(4, count)
    return one


def test_prompts_that_all_fare_alike_leave_no_doubt():
    low, high = confidence_interval([stats(1, 3)] * 5, 0.95, 200)
    assert low == high == pytest.approx(3.0)


def test_the_interval_narrows_with_more_prompts():
    few, many = (confidence_interval([stats(0), stats(4)] * count, 0.95, 500) for count in (4, 100))
    assert few[0] < many[0] < 3.0 < many[1] < few[1]


def test_one_prompt_has_no_interval():
    assert confidence_interval([stats(1, 2)], 0.95, 200) == (None, None)


def test_the_table_has_a_line_for_each_result():
    result = Result("sums", 0.0, 4, 3, 2, 10, 1.5, 1.25, 1.75, [0.4, 0.1, 0.0], {7: 1.75, 15: 2.0})
    assert markdown_table([result], 0.95).splitlines()[-1] == (
        "| sums (2) | 0 | 4 | 1.50 (1.25 to 1.75) | 10 | 7: 1.75, 15: 2.00 | 40% 10% 0% |"
    )


def results_of(config: TrainingConfig) -> list[dict]:
    return json.loads(config.results_file.read_text())["results"]


@pytest.fixture(scope="module")
def answers(pipeline, tmp_path_factory) -> Path:
    """Shards of the greedy answers to the prompts that the pipeline evaluates on."""
    config, _, _ = pipeline
    directory = tmp_path_factory.mktemp("answers")
    held_out = config.prompts_dir / "held_out.jsonl"
    prompts = {"files": [str(held_out)], "held_out_fraction": 0.0, "near_duplicate_similarity": None}
    regenerated = {"max_new_tokens": config.evaluate.max_new_tokens}
    recorded = recipe(Path(config.target), directory, prompts=prompts, regenerate=regenerated)
    recipe_file = save_recipe(recorded, directory / "recipe.yaml")
    run_step("prompts", recipe_file)
    run_step("regenerate", recipe_file)
    return recorded.shards_dir


def test_following_recorded_answers_counts_what_decoding_counts(pipeline, answers, tmp_path):
    config, _, _ = pipeline
    recipe_file = save_recipe(config, tmp_path / "recipe.yaml")
    common = ["evaluate.temperatures=[0.0]", "evaluate.prompts_per_category=100"]
    run_step("evaluate", recipe_file, *common)
    decoded = results_of(config)
    run_step("evaluate", recipe_file, *common, f"evaluate.answers={answers}")
    followed = results_of(config)
    for one, other in zip(followed, decoded, strict=True):
        assert all(one[key] == other[key] for key in ("category", "block_size", "num_prompts"))
        # Recorded taps are bfloat16: where two drafts are nearly as likely, the other one may be drafted.
        assert one["num_passes"] == pytest.approx(other["num_passes"], rel=0.02)
        for key in ("acceptance_length", "accepted_at", "tree_acceptance_lengths"):
            assert one[key] == pytest.approx(other[key], abs=0.02)
    assert followed[0]["acceptance_length"] > 1.1


def test_fit_trains_on_several_directories_and_follows_recorded_answers_meanwhile(pipeline, answers, tmp_path):
    config, _, _ = pipeline
    mine = config.model_copy(update={"work_dir": tmp_path / "run"})
    steps = {"shards": (config.shards_dir, answers), "max_steps": 4, "held_out_every_steps": 2}
    mine = mine.model_copy(update={"fit": config.fit.model_copy(update=steps)})
    greedy = {"answers": answers, "temperatures": (0.0,)}
    mine = mine.model_copy(update={"evaluate": config.evaluate.model_copy(update=greedy)})
    run_step("fit", save_recipe(mine, tmp_path / "recipe.yaml"))
    run = json.loads((mine.fit_dir / "run.json").read_text())
    assert {name.split("/")[0] for name in run["shards"]} == {"1", "2"}
    points = [json.loads(line) for line in (mine.fit_dir / "curves.jsonl").read_text().splitlines()]
    followed = [point for point in points if point["part"] == "followed"]
    assert [point["step"] for point in followed] == [2, 4]
    assert all(point["by_category"].keys() == {"all", "sums", "words"} for point in followed)


def test_a_worker_in_another_directory_finds_what_fit_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"fit": {"shards": ["a", "b"]}, "evaluate": {"answers": "answers", "temperatures": [0.0]}}
    config = TrainingConfig.model_validate(values).with_absolute_paths()
    assert config.shard_dirs == (tmp_path / "a", tmp_path / "b")
    assert config.evaluate.answers == tmp_path / "answers"
