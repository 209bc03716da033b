"""Batches follow from their seed, and hold what the shards say at the right positions."""

import pytest
import torch

from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.models.target_logits import TargetLogits
from dflash_ray.training.batches import BatchSource, draft_vocabulary
from dflash_ray.training.fit import fit
from dflash_ray.training.left_out import LeftOut
from dflash_ray.training.losses import IGNORE
from dflash_ray.training.prompts import gather_prompts
from dflash_ray.training.regenerate import regenerate
from dflash_ray.training.shards import ShardStore
from dflash_ray.training.tap_sources import OnlineTaps, StoredTaps
from tests.tiny import SHAPE
from tests.training.conftest import recipe, share, write_prompt_file

BLOCK_SIZE = 5
TAPPED = (0, 2)
LAST_LAYER = SHAPE["num_hidden_layers"] - 1


@pytest.fixture(scope="module")
def config(target_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("batches")
    write_prompt_file(directory / "prompts.jsonl", 12)
    config = recipe(target_dir, directory, regenerate={"with_last_layer": True}, fit={"distillation_weight": 0.5})
    gather_prompts(config, LeftOut())
    regenerate(config, LeftOut())
    return config


@pytest.fixture(scope="module")
def store(config) -> ShardStore:
    return ShardStore(config.shards_dir)


def new_source(store, vocabulary: torch.Tensor, last_layer_id: int | None = None) -> BatchSource:
    t2d = torch.full((SHAPE["vocab_size"],), IGNORE)
    t2d[vocabulary] = torch.arange(len(vocabulary))
    indices = range(len(store.conversations))
    layer_ids = TAPPED if last_layer_id is None else (*TAPPED, last_layer_id)
    return BatchSource(store, indices, t2d, 6, BLOCK_SIZE, StoredTaps(store, layer_ids), len(TAPPED))


def test_labels_are_the_tokens_after_the_anchor_as_far_as_the_drafter_knows_them(store):
    vocabulary = draft_vocabulary(store.conversations, 8, SHAPE["vocab_size"])
    batch = new_source(store, vocabulary).at([3], seed=1)
    tokens = store.conversations[3].token_ids.tolist()
    known = vocabulary.tolist()
    for anchor, anchor_id, labels in zip(batch.anchors[0], batch.anchor_ids[0], batch.labels[0], strict=True):
        assert anchor >= store.conversations[3].prompt_len and anchor_id == tokens[anchor]
        for slot, label in enumerate(labels.tolist(), start=1):
            token = tokens[anchor + slot] if anchor + slot < len(tokens) else None
            assert label == (known.index(token) if token in known else IGNORE)


def test_the_draft_vocabulary_is_the_most_frequent_answer_tokens(store):
    answers = torch.cat([one.token_ids[one.prompt_len :] for one in store.conversations])
    vocabulary = draft_vocabulary(store.conversations, 4, SHAPE["vocab_size"])
    counts = torch.bincount(answers, minlength=SHAPE["vocab_size"])
    assert counts[vocabulary].min() >= counts.sort(descending=True).values[3]
    assert vocabulary.tolist() == sorted(vocabulary.tolist())


def test_workers_share_a_batch_without_overlap(store):
    source = new_source(store, torch.arange(SHAPE["vocab_size"]))
    whole = source.draw(4, seed=7)
    parts = [source.draw(4, seed=7, rank=rank, world_size=2) for rank in (0, 1)]
    assert torch.equal(torch.cat([part.anchors for part in parts]), whole.anchors[[0, 2, 1, 3]])


def test_the_targets_logits_are_rebuilt_at_the_rows_that_predict_the_slots(store, config):
    target = resolve_target(config.target)
    batch = new_source(store, torch.arange(SHAPE["vocab_size"]), LAST_LAYER).at([0, 5], seed=2)
    logits = TargetLogits(target)(batch.last_hidden.float(), target.load_head())
    valid = batch.labels != IGNORE
    assert (logits.argmax(-1) == batch.labels)[valid].float().mean() > 0.95  # the stored rows are bfloat16


def test_a_drafter_is_fitted_to_the_targets_logits(config):
    short = config.model_copy(update={"fit": config.fit.model_copy(update={"max_steps": 3})})
    fit(short)
    assert (config.trained_dir / "model.safetensors").is_file()


def test_layers_that_the_shards_lack_are_named(store):
    with pytest.raises(ValueError, match=r"layers \[1\] are not in the shards"):
        StoredTaps(store, (1,))


def test_the_target_beside_the_drafter_gives_the_taps_that_the_shards_would_hold(store, config):
    layer_ids, indices = (*TAPPED, LAST_LAYER, LAST_LAYER), [3, 0, 5]  # the last may be tapped and distilled from
    online = OnlineTaps(store, resolve_target(config.target), layer_ids, torch.float32, "cpu")(indices)
    stored = StoredTaps(store, layer_ids)(indices)
    assert online.dtype == stored.dtype and online.shape == stored.shape
    for row, index in enumerate(indices):
        length = len(store.conversations[index].token_ids) - 1
        assert torch.allclose(online[row, :length].float(), stored[row, :length].float(), rtol=0.02, atol=1e-3)


def test_shards_without_taps_hold_the_same_conversations_and_train_a_drafter(store, config):
    online = config.model_copy(
        update={
            "work_dir": config.work_dir.with_name("without_taps"),
            "regenerate": config.regenerate.model_copy(update={"with_taps": False}),
            "fit": config.fit.model_copy(update={"online_taps": True, "max_steps": 3}),
        }
    )
    share(config, online, "prompts")
    regenerate(online, LeftOut())
    light = ShardStore(online.shards_dir)
    assert light.layout.layer_ids == ()
    for one, other in zip(light.conversations, store.conversations, strict=True):
        assert torch.equal(one.token_ids, other.token_ids)
    fit(online)
    assert (online.trained_dir / "model.safetensors").is_file()
