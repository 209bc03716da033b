"""The whole pipeline through its commands: a drafter that was trained accepts more than one that was not."""

import json

import pytest
import torch

from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.models.drafter_checkpoint import resolve_drafter
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.training.left_out import LeftOut
from dflash_ray.training.prompt_files import read_prompts
from dflash_ray.training.shards import Conversation, ShardStore
from tests.training.conftest import run_step, save_recipe


def acceptance_length(results: list[dict], temperature: float, block_size: int) -> float:
    return next(
        result["acceptance_length"]
        for result in results
        if (result["category"], result["temperature"], result["block_size"]) == ("all", temperature, block_size)
    )


def test_training_raises_the_acceptance_length(pipeline):
    _, untrained, trained = pipeline
    for block_size in (4, 5):
        before, after = (acceptance_length(results, 0.0, block_size) for results in (untrained, trained))
        assert before < 1.2
        assert after > before + 0.3


def test_results_cover_categories_temperatures_and_the_drafters_own_block_size(pipeline):
    _, _, trained = pipeline
    covered = {(result["category"], result["temperature"], result["block_size"]) for result in trained}
    assert covered == {(c, t, b) for c in ("all", "sums", "words") for t in (0.0, 1.0) for b in (4, 5)}
    for result in trained:
        assert result["low"] <= result["acceptance_length"] <= result["high"]
        assert len(result["accepted_at"]) == result["draft_tokens"]
        assert result["acceptance_length"] == pytest.approx(1 + sum(result["accepted_at"]))


def test_no_prompt_is_on_both_sides_of_the_split(pipeline):
    config, _, _ = pipeline
    train, held_out = (
        {prompt.text for prompt in read_prompts(config.prompts_dir / name, LeftOut())}
        for name in ("train.jsonl", "held_out.jsonl")
    )
    assert train and held_out and not train & held_out


def test_the_exported_drafter_loads_and_drafts(pipeline):
    config, _, _ = pipeline
    target = resolve_target(config.target)
    drafter = BlockDrafter(resolve_drafter(str(config.export.output_dir), target), target)
    drafter.open(1)
    drafter.extend_one(1, 0, torch.randn(6, target.config.hidden_size))
    (proposal,) = drafter.propose([1], [5], [4], 1)
    assert proposal.candidate_ids.shape == (4, 1)


def test_the_model_card_names_data_recipe_and_results(pipeline):
    config, _, trained = pipeline
    card = (config.export.output_dir / "README.md").read_text()
    run_record = json.loads((config.fit_dir / "run.json").read_text())
    for digest in run_record["shards"].values():
        assert digest in card
    assert "| sums |" in card and "Seed 0" in card
    assert f"{acceptance_length(trained, 0.0, 4):.2f}" in card
    assert (config.export.output_dir / "training.yaml").is_file()


def test_fit_leaves_curves_for_people_and_for_tensorboard(pipeline):
    config, _, _ = pipeline
    points = [json.loads(line) for line in (config.fit_dir / "curves.jsonl").read_text().splitlines()]
    assert {point["part"] for point in points} == {"train", "held_out"}
    assert (config.fit_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((config.fit_dir / "events").glob("events.out.tfevents.*"))


def capture(config, directory, lines: list[dict], *overrides: str) -> ShardStore:
    file = directory / "conversations.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    other = config.model_copy(update={"work_dir": directory / "run"})
    recipe_file = save_recipe(other, directory / "recipe.yaml")
    run_step("capture", recipe_file, f"capture.conversations=[{file}]", *overrides)
    return ShardStore(other.shards_dir)


def answered(conversations: list[Conversation]) -> list[dict]:
    """As lines for `capture`."""
    return [
        {"prompt": one.prompt.text, "response_ids": one.token_ids[one.prompt_len :].tolist(), "source": "x"}
        for one in conversations
    ]


def test_captured_conversations_get_the_taps_that_regenerating_gave(pipeline, tmp_path):
    config, _, _ = pipeline
    regenerated = ShardStore(config.shards_dir)
    chosen = regenerated.conversations[:5]
    captured = capture(config, tmp_path, answered(chosen))
    for index, one in enumerate(chosen):
        assert torch.equal(captured.conversations[index].token_ids, one.token_ids)
        assert captured.conversations[index].prompt_len == one.prompt_len
        taps = (store.taps(index, config.drafter.tap_layer_ids).float() for store in (captured, regenerated))
        torch.testing.assert_close(*taps, rtol=0.02, atol=0.02)


def test_conversations_captured_without_taps_are_the_same(pipeline, tmp_path, monkeypatch):
    config, _, _ = pipeline
    chosen = ShardStore(config.shards_dir).conversations[:3]
    monkeypatch.delattr("dflash_ray.training.regenerate.local_decoder")  # no model runs
    captured = capture(config, tmp_path, answered(chosen), "regenerate.with_taps=false")
    assert captured.layout.layer_ids == ()
    for one, other in zip(captured.conversations, chosen, strict=True):
        assert torch.equal(one.token_ids, other.token_ids) and one.prompt_len == other.prompt_len


def test_long_captured_answers_are_cut_and_prompts_without_room_left_out(pipeline, tmp_path):
    config, _, _ = pipeline
    lines = [{"prompt": "abc" * count, "response_ids": list(range(3, 80))} for count in (1, 40)]
    (stored,) = capture(config, tmp_path, lines, "regenerate.max_length=60").conversations
    assert len(stored.token_ids) == 59
    assert stored.token_ids[stored.prompt_len :].tolist() == list(range(3, 3 + 59 - stored.prompt_len))
