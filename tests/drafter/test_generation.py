"""Whole generations: the reference's own loop against this engine's, and transformers' DFlash against BlockDrafter."""

import time

import pytest
import torch
from torch.nn import functional as F
from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel

from dflash_ray.config import load_config
from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.models.drafter_checkpoint import load_drafter, save_drafter
from dflash_ray.sampling.ranks import SingleRank
from dflash_ray.target_group.colocated import ColocatedDrafter
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.model import RankModel
from dflash_ray.target_group.runner import GroupRunner
from dflash_ray.target_group.step import EntryStatus
from dflash_ray.target_group.tensor_parallel import create_store, init_process_group
from tests.drafter.parity import load_reference
from tests.drafter.published import BLOCK, MASK, VOCAB, changed, dflash2, random_weights, sliding
from tests.steps import opening, step_of, verify_step

CONFIG = load_config(None, ["target.kv_cache_tokens=2048", "target.page_size=4", "model.max_model_len=256"])
NUM_NEW = 50
PROMPTS = torch.randint(0, MASK, (4, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def process_group():
    is_ours = not torch.distributed.is_initialized()
    if is_ours:
        init_process_group(create_store("127.0.0.1", 1, 60), 0, 1, "cpu", True, 0)
    yield
    if is_ours:
        torch.distributed.destroy_process_group()


def greedy_texts(model) -> torch.Tensor:
    return model.generate(PROMPTS, attention_mask=torch.ones_like(PROMPTS), max_new_tokens=NUM_NEW, do_sample=False)


def save_trained(directory, values, target):
    """A drafter that has seen some of the target's texts, so that drafts are accepted now and then."""
    from dflash import model as reference

    save_drafter(directory, values, random_weights(values, spread=0.7))
    drafter, model = load_reference(directory), target.load_model().requires_grad_(False)
    texts = greedy_texts(model)
    with torch.no_grad():
        taps = reference.extract_context_feature(
            model(texts, output_hidden_states=True).hidden_states, drafter.target_layer_ids
        )
    trained = [p for name, p in drafter.named_parameters() if "candidate_selector" not in name]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    generator = torch.Generator().manual_seed(2)
    for _ in range(120):
        start = int(torch.randint(PROMPTS.shape[1], texts.shape[1] - BLOCK, (1,), generator=generator))
        block = torch.full((len(texts), BLOCK), MASK)
        block[:, 0] = texts[:, start]
        hidden = drafter(
            target_hidden=taps[:, :start],
            noise_embedding=reference._raw_input_embeddings(model, block),
            position_ids=torch.arange(start + BLOCK)[None],
        )
        logits = drafter.compute_logits(hidden[:, 1:], model.lm_head)
        loss = F.cross_entropy(logits.flatten(0, 1), texts[:, start + 1 : start + BLOCK].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = {name.replace("_codebook.weight", "_codebook"): p.detach() for name, p in drafter.named_parameters()}
    save_drafter(directory, values, weights)


def new_engine(directory, target) -> Engine:
    """A target group of one rank with its colocated drafter."""
    checkpoint = load_drafter(directory, target)
    rank = RankModel(target, CONFIG, 0, 1, checkpoint.build_projector(), checkpoint.config.target_layer_ids)
    runner = GroupRunner(rank, SingleRank())
    drafter = ColocatedDrafter(BlockDrafter(checkpoint, target), CONFIG.drafter_context_tokens, raises=True)
    return Engine(runner, CONFIG.target.num_pages, CONFIG.target.page_size, 256, drafter)


def decode(engine: Engine, prompt: list[int], drafts_from: int = 0, **sampling) -> tuple[list[int], list[int]]:
    """Tokens, and how many each step produced; blocks of the colocated drafter are used after `drafts_from` tokens."""
    start = opening(1, prompt, max_new=NUM_NEW, wants_features=True, **sampling)
    step = step_of([start], {1: len(prompt)}, draft={1: BLOCK - 1})
    tokens, produced = [], []
    while True:
        output = engine.step(step)
        assert output.statuses.tolist() == [EntryStatus.OK]
        if tokens:
            produced.append(len(output.token_ids))
        tokens += output.token_ids.tolist()
        if output.finishes[0]:
            return tokens, produced
        drafts = output.colocated_drafts.block(0).draft_ids if len(tokens) >= drafts_from else []
        drafts = drafts[: NUM_NEW - len(tokens) - 1]
        num_wanted = min(BLOCK - 1, max(1, NUM_NEW - len(tokens) - 2))
        step = verify_step({1: [*prompt, *tokens]}, {1: drafts}, draft={1: num_wanted})


@pytest.mark.usefixtures("needs_reference")
@pytest.mark.parametrize(
    "values",
    [changed(), sliding("sliding", "full", dflash_config={"target_layer_ids": [4, 1, 2]}), dflash2()],
    ids=["full", "sliding", "dflash2"],
)
def test_tokens_and_acceptance_lengths_are_those_of_the_references_loop(
    values, target, tmp_path, monkeypatch, process_group
):
    from dflash import model as reference

    save_trained(tmp_path, values, target)
    engine = new_engine(tmp_path, target)
    monkeypatch.setattr(reference, "_cuda_time", time.perf_counter)
    theirs, model = load_reference(tmp_path), target.load_model()
    lengths = []
    for prompt in PROMPTS:
        tokens, produced = decode(engine, prompt.tolist())
        expected = reference.dflash_generate(theirs, model, prompt[None], NUM_NEW, None, return_stats=True)
        assert tokens == expected.output_ids[0, len(prompt) :].tolist()
        # Near the end the reference drafts a shorter block, which is another input.
        steps, at = expected.acceptance_lengths, 1
        while steps and at + BLOCK <= NUM_NEW:
            length = steps.pop(0)
            assert produced.pop(0) == length
            at += length
            lengths.append(length)
    assert len(set(lengths)) > 2, "drafts that are never or always accepted would compare nothing"


@pytest.mark.usefixtures("needs_reference")
def test_sampled_text_with_a_selectors_drafts_is_plain_decodings(target, tmp_path, process_group):
    save_trained(tmp_path, dflash2(), target)
    engine = new_engine(tmp_path, target)
    num_accepted = 0
    for seed, prompt_ids in enumerate(PROMPTS):
        prompt, sampling = prompt_ids.tolist(), {"temperature": 0.8, "seed": seed}
        plain, _ = decode(engine, prompt, drafts_from=NUM_NEW, **sampling)
        tokens, produced = decode(engine, prompt, **sampling)
        assert tokens == plain
        num_accepted += NUM_NEW - 1 - len(produced)
    assert num_accepted > 20


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_blocks_of_transformers_own_dflash_are_the_same(kind, target, tmp_path):
    """A second implementation of the published layout, driven by `generate` with real contexts."""
    values = changed(is_causal=False) if kind == "full" else sliding("sliding", "full", is_causal=False)
    weights = random_weights(values)
    save_drafter(tmp_path, values, weights)
    assistant = MuseGlimmerAssistantModel(_assistant_config(values)).eval()
    assistant.load_state_dict({_assistant_name(name): tensor for name, tensor in weights.items()})
    model = target.load_model()
    checkpoint = load_drafter(tmp_path, target)
    drafter, projector = BlockDrafter(checkpoint, target), checkpoint.build_projector()
    drafter.open(1)
    forward, num_blocks = assistant.forward, 0

    def compare(noise_embeds, context_hidden_states, position_ids, **rest):
        nonlocal num_blocks
        out = forward(noise_embeds, context_hidden_states=context_hidden_states, position_ids=position_ids, **rest)
        start = int(position_ids[0, 0])
        drafter.extend_one(1, start, projector(context_hidden_states[0]))
        anchor = int((noise_embeds[0, 0] == model.get_input_embeddings().weight).all(-1).nonzero())
        expected = model.lm_head(out.last_hidden_state[0, 1:]).log_softmax(-1)
        proposal = drafter.propose([1], [anchor], [BLOCK - 1], VOCAB)[0]
        mine = torch.empty_like(expected).scatter_(-1, proposal.candidate_ids, proposal.logprobs)
        assert torch.allclose(mine, expected, atol=1e-4)
        num_blocks += 1
        return out

    assistant.forward = compare
    prompt = PROMPTS[:1]
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        assistant_model=assistant,
        speculation_type="dflash",
        max_new_tokens=30,
        do_sample=False,
    )
    assert num_blocks > 5


def _assistant_config(values) -> MuseGlimmerAssistantConfig:
    shape = {key: values[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")}
    shape |= {key: values[key] for key in ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "block_size")}
    kinds = values.get("layer_types", ["full_attention"] * values["num_hidden_layers"])
    return MuseGlimmerAssistantConfig(
        **shape,
        **values["dflash_config"],
        layer_types=kinds,
        # Its bidirectional window still shows a row at the distance of its size; the published one ends before.
        sliding_window=values.get("sliding_window", 2048) - 1,
        rope_parameters={"rope_type": "default", "rope_theta": values["rope_theta"]},
    )


def _assistant_name(name: str) -> str:
    return {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}.get(name, name)
