"""`evaluate`: the acceptance of a drafter by decoding held-out prompts through the engine that serves.

The drafter drafts beside the target as a colocated drafter does, the target verifies for real, so every figure is what
a server with these settings counts. To compare drafters, the target's greedy answers may be recorded once and followed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import bootstrap
from tqdm import tqdm

from dflash_ray.config import ModelConfig
from dflash_ray.core.files import write_text
from dflash_ray.core.stats import AcceptanceStats, merge
from dflash_ray.models.block_drafter import BlockDrafter
from dflash_ray.models.drafter_checkpoint import DrafterCheckpoint, resolve_drafter
from dflash_ray.models.target_checkpoint import TargetCheckpoint, resolve_target
from dflash_ray.text.tokenizer import ChatTokenizer
from dflash_ray.training.config import EvaluateSection, TrainingConfig
from dflash_ray.training.decoding import BatchDecoder, Decoded, DecodeRequest, local_decoder
from dflash_ray.training.follow import GreedyAnswer, follow
from dflash_ray.training.left_out import BadRow, LeftOut
from dflash_ray.training.prompt_files import Prompt, read_prompts, tokens_of
from dflash_ray.training.shards import ShardStore
from dflash_ray.training.trees import accepted_by_tree

ALL = "all"
_RESAMPLING_SEED = 0


@dataclass(frozen=True)
class Result:
    """Acceptance of one category of prompts at one setting.

    Attributes:
        draft_tokens: verified in a pass; the block without its anchor.
        acceptance_length: mean tokens a pass, the target's own included.
        low, high: bounds of its confidence interval, resampled over prompts; None for a single prompt.
        accepted_at: share of passes whose draft in slot 1, 2, ... was accepted.
        tree_acceptance_lengths: by number of nodes, what trees over the block's candidates would have accepted at the
            same anchors; empty above temperature 0.
    """

    category: str
    temperature: float
    block_size: int
    draft_tokens: int
    num_prompts: int
    num_passes: int
    acceptance_length: float
    low: float | None
    high: float | None
    accepted_at: list[float]
    tree_acceptance_lengths: dict[int, float]


@dataclass(frozen=True)
class _Measured:
    """One prompt's passes, the blocks drafted in them, and the drafts that trees of so many nodes would have got."""

    stats: AcceptanceStats
    num_blocks: int
    accepted_by_tree: dict[int, int]


def evaluate(config: TrainingConfig, left_out: LeftOut) -> list[Result]:
    """Decodes at every temperature and block size; writes results.json and results.md. Raises ValueError."""
    section = config.evaluate
    target = resolve_target(config.target)
    drafter = resolve_drafter(section.drafter or str(config.trained_dir), target)
    if section.answers is None:
        results = _decode_prompts(config, drafter, left_out)
    else:
        results = follow_answers(config, drafter, target)
    if not results:
        raise ValueError(f"evaluate: no answer was long enough for a draft; {left_out.text or 'give other prompts'}")
    values = {
        "drafter": drafter.fingerprint,
        "target": target.fingerprint,
        "dtype": config.engine.dtype,
        "seed": config.seed,
        "settings": section.model_dump(mode="json"),
        "results": [asdict(result) for result in results],
    }
    write_text(config.results_file, json.dumps(values, indent=2) + "\n")
    write_text(config.results_file.with_suffix(".md"), markdown_table(results, section.confidence))
    return results


def _decode_prompts(config: TrainingConfig, drafter: DrafterCheckpoint, left_out: LeftOut) -> list[Result]:
    section = config.evaluate
    tokenizer = ChatTokenizer(ModelConfig(path=config.target))
    prompts = _choose_prompts(config, tokenizer, left_out)
    sources = [prompt.source for prompt, _ in prompts]
    results: list[Result] = []
    with local_decoder(config.target, config.engine, tokenizer.eos_ids, drafter=drafter) as decoder:
        settings = [(t, b) for t in section.temperatures for b in usable_block_sizes(section, drafter)]
        for temperature, block_size in tqdm(settings, desc="evaluate", unit="setting"):
            measured = _decode(config, decoder, prompts, temperature, block_size, left_out)
            results += _by_category(section, sources, measured, temperature, block_size)
    return results


def follow_answers(config: TrainingConfig, drafter: DrafterCheckpoint, target: TargetCheckpoint) -> list[Result]:
    """The acceptance over the recorded greedy answers of evaluate.answers, at every block size."""
    section = config.evaluate
    answers = choose_answers(section, drafter.config.target_layer_ids, target)
    sources = [source for source, _ in answers]
    block_drafter = BlockDrafter(drafter, target)
    projector = drafter.build_projector()
    stop_ids = ChatTokenizer(ModelConfig(path=config.target)).eos_ids
    num_candidates = max(section.tree_nodes, default=0)
    results: list[Result] = []
    for block_size in usable_block_sizes(section, drafter):
        greedy = [answer for _, answer in answers]
        followed = follow(block_drafter, projector, greedy, stop_ids, block_size - 1, num_candidates)
        measured = [
            _measure(one, answer.token_ids, section.tree_nodes) for one, answer in zip(followed, greedy, strict=True)
        ]
        results += _by_category(section, sources, measured, 0.0, block_size)
    return results


def follow_whole_blocks(
    config: TrainingConfig, drafter: DrafterCheckpoint, target: TargetCheckpoint
) -> dict[str, Result]:
    """As `follow_answers`, at the drafter's own block size alone; by category."""
    section = config.evaluate.model_copy(update={"block_sizes": (drafter.config.block_size,)})
    results = follow_answers(config.model_copy(update={"evaluate": section}), drafter, target)
    return {result.category: result for result in results}


def choose_answers(
    section: EvaluateSection, layer_ids: tuple[int, ...], target: TargetCheckpoint
) -> list[tuple[str, GreedyAnswer]]:
    """The first of evaluate.answers of each category, cut to max_new_tokens, with their sources.

    Raises ValueError when they are of another target, lack a layer of `layer_ids` or hold nothing to follow.
    """
    assert section.answers is not None
    store = ShardStore(section.answers)
    if store.layout.target != target.fingerprint:
        raise ValueError(f"evaluate.answers: {section.answers} was answered by other weights")
    if missing := set(layer_ids) - set(store.layout.layer_ids):
        raise ValueError(f"evaluate.answers: {section.answers} lacks layers {sorted(missing)}, which the drafter taps")
    chosen: dict[str, list[GreedyAnswer]] = defaultdict(list)
    for index, conversation in enumerate(store.conversations):
        of_source = chosen[conversation.prompt.source]
        if conversation.temperature == 0 and len(of_source) < section.prompts_per_category:
            token_ids = conversation.token_ids[: conversation.prompt_len + section.max_new_tokens].tolist()
            taps = store.taps(index, layer_ids)[: len(token_ids) - 1]
            of_source.append(GreedyAnswer(conversation.prompt_len, token_ids, taps))
    answers = [(source, answer) for source in sorted(chosen) for answer in chosen[source]]
    if not any(len(answer.token_ids) - answer.prompt_len > 1 for _, answer in answers):
        raise ValueError("evaluate.answers: holds no answers at temperature 0 that are longer than a token")
    return answers


def usable_block_sizes(section: EvaluateSection, drafter: DrafterCheckpoint) -> list[int]:
    """The configured sizes, those beyond the drafter's own replaced by it."""
    return sorted({min(size, drafter.config.block_size) for size in section.block_sizes})


def _choose_prompts(
    config: TrainingConfig, tokenizer: ChatTokenizer, left_out: LeftOut
) -> list[tuple[Prompt, list[int]]]:
    """The first prompts of each category with their tokens; those without room for an answer are left out."""
    section = config.evaluate
    longest = min(config.engine.max_model_len, tokenizer.context_length or config.engine.max_model_len)
    room = longest - section.max_new_tokens
    chosen: dict[str, list[tuple[Prompt, list[int]]]] = defaultdict(list)
    for prompt in read_prompts(section.prompts or config.prompts_dir / "held_out.jsonl", left_out):
        if len(chosen[prompt.source]) == section.prompts_per_category:
            continue
        try:
            token_ids = tokens_of(prompt, tokenizer)
            if len(token_ids) > room:
                raise BadRow("too long to leave room for evaluate.max_new_tokens")
        except BadRow as bad:
            left_out.add(prompt.place, bad)
        else:
            chosen[prompt.source].append((prompt, token_ids))
    prompts = [pair for source in sorted(chosen) for pair in chosen[source]]
    if not prompts:
        raise ValueError(f"evaluate.prompts: nothing is left; {left_out.text}")
    return prompts


def _decode(
    config: TrainingConfig,
    decoder: BatchDecoder,
    prompts: Sequence[tuple[Prompt, list[int]]],
    temperature: float,
    block_size: int,
    left_out: LeftOut,
) -> list[_Measured]:
    """What each prompt showed; nothing where the target gave it up."""
    tree_nodes = config.evaluate.tree_nodes if temperature == 0 else ()
    requests = [
        DecodeRequest(
            token_ids,
            config.evaluate.max_new_tokens,
            temperature,
            seed=prompt.digest ^ config.seed,
            draft_tokens=block_size - 1,
            num_candidates=max(tree_nodes, default=0),  # a tree of n nodes is at most n wide
        )
        for prompt, token_ids in prompts
    ]
    done = {}
    for index, decoded in decoder.run(requests):
        if decoded.error:
            row = prompts[index][0].place, f"given up by the target: {decoded.error}"
            if row not in left_out.rows:
                left_out.add(*row)
            decoded.stats = AcceptanceStats(block_size - 1)
        done[index] = _measure(decoded, [*prompts[index][1], *decoded.token_ids], tree_nodes)
    return [done[index] for index in range(len(prompts))]


def _measure(decoded: Decoded, tokens: list[int], tree_nodes: Sequence[int]) -> _Measured:
    """What decoding to `tokens`, prompt included, showed."""
    trees = {count: accepted_by_tree(decoded.blocks, tokens, count) for count in tree_nodes}
    return _Measured(decoded.stats, len(decoded.blocks), trees)


def _by_category(
    section: EvaluateSection,
    sources: Sequence[str],
    measured: Sequence[_Measured],
    temperature: float,
    block_size: int,
) -> Iterator[Result]:
    """One result for each category and one for all; prompts that ended with their first token say nothing."""
    groups: dict[str, list[_Measured]] = defaultdict(list)
    for source, one in zip(sources, measured, strict=True):
        if one.stats.num_steps:
            groups[ALL].append(one)
            groups[source].append(one)
    for category, group in groups.items():
        stats = [one.stats for one in group]
        total = merge(stats)
        low, high = confidence_interval(stats, section.confidence, section.resamples)
        num_blocks = max(1, sum(one.num_blocks for one in group))
        yield Result(
            category,
            temperature,
            block_size,
            block_size - 1,
            len(group),
            total.num_steps,
            total.acceptance_length,
            low,
            high,
            [count / total.num_steps for count in total.accepted_per_position()],
            {n: 1 + sum(one.accepted_by_tree[n] for one in group) / num_blocks for n in group[0].accepted_by_tree},
        )


def confidence_interval(
    stats: Sequence[AcceptanceStats], confidence: float, resamples: int
) -> tuple[float | None, float | None]:
    """Percentile bootstrap of the acceptance length over prompts, whose passes are not independent of each other."""
    if len(stats) < 2:
        return None, None
    accepted = np.array([one.num_accepted for one in stats])
    passes = np.array([one.num_steps for one in stats])
    interval = bootstrap(
        (accepted, passes),
        lambda a, p, axis=-1: 1.0 + a.sum(axis=axis) / p.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(_RESAMPLING_SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def markdown_table(results: Sequence[Result], confidence: float) -> str:
    """The results as a table, a line for each category and setting."""
    lines = [
        f"| prompts | temperature | block size | acceptance length ({confidence:.0%} interval) | passes "
        "| trees | accepted at slot 1, 2, ... |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        interval = "" if result.low is None else f" ({result.low:.2f} to {result.high:.2f})"
        slots = " ".join(f"{share:.0%}" for share in result.accepted_at)
        trees = ", ".join(f"{n}: {length:.2f}" for n, length in result.tree_acceptance_lengths.items())
        lines.append(
            f"| {result.category} ({result.num_prompts}) | {result.temperature:g} | {result.block_size} "
            f"| {result.acceptance_length:.2f}{interval} | {result.num_passes} | {trees} | {slots} |"
        )
    return "\n".join(lines) + "\n"
