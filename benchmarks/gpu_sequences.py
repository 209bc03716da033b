"""Sequences in an engine, stepped as a router would: chains of drafts, right or wrong, over so many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle

import numpy as np

from dflash_ray.sampling.parameters import SamplingParams
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.step import Drafts, Opening, StepInput, StepOutput, chain_parents

_NEVER = 1 << 20  # tokens


class Sequences:
    """Attributes:
    texts: committed tokens behind the prompt, by sequence; the last one is the anchor.
    """

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._lens: dict[int, int] = {}
        self._next_id = 1
        self.texts: dict[int, list[int]] = {}

    def open(self, num_tokens: int, seed: int = 0) -> int:
        """Prefills a random prompt in one pass."""
        sequence_id, self._next_id = self._next_id, self._next_id + 1
        tokens = np.random.default_rng(seed).integers(0, self._vocab_size, num_tokens)
        opening = Opening(
            sequence_id, tokens, num_tokens, _NEVER, sampling=SamplingParams(temperature=0.0), wants_features=True
        )
        ids = np.array([sequence_id], np.uint64)
        output = self._engine.step(StepInput(open=[opening], prefill_ids=ids, prefill_lens=np.array([num_tokens])))
        self._lens[sequence_id], self.texts[sequence_id] = num_tokens, []
        self._take([sequence_id], output)
        return sequence_id

    def close(self, sequence_ids: Sequence[int]) -> None:
        self._engine.close(list(sequence_ids))
        for sequence_id in sequence_ids:
            del self._lens[sequence_id]

    def step(self, sequence_ids: Sequence[int], drafts: Sequence[Sequence[int]]) -> StepOutput:
        """Verifies drafts[i] of sequence_ids[i]."""
        counts = np.array([len(one) for one in drafts])
        tokens = np.array([token for one in drafts for token in one], dtype=np.int64)
        lens = np.array([self._lens[sequence_id] for sequence_id in sequence_ids])
        step = StepInput(
            verify_ids=np.array(sequence_ids, np.uint64),
            base_lens=lens,
            drafts=Drafts(counts, tokens, chain_parents(counts)),
        )
        output = self._engine.step(step)
        self._take(sequence_ids, output)
        return output

    def _take(self, sequence_ids: Sequence[int], output: StepOutput) -> None:
        at = 0
        for sequence_id, count in zip(sequence_ids, output.num_tokens.tolist(), strict=True):
            self.texts[sequence_id] += output.token_ids[at : at + count].tolist()
            self._lens[sequence_id] += count
            at += count


def differing(
    sequences: Sequences, num_prompts: int, num_tokens: int, prompt_tokens: int, batches: Sequence[int]
) -> int:
    """Prompts whose greedy text with drafts is another than without, in batches of other sizes.

    Drafts are the plain text's own tokens, of which the last is wrong, so that steps keep some and drop some.
    """
    plain: dict[int, list[int]] = {}
    for seeds in _batches(num_prompts, list(reversed(batches))):
        plain |= _generate(sequences, seeds, num_tokens, prompt_tokens, None)
    texts: dict[int, list[int]] = {}
    for seeds in _batches(num_prompts, batches):
        texts |= _generate(sequences, seeds, num_tokens, prompt_tokens, plain)
    return sum(texts[seed] != plain[seed] for seed in plain)


def _batches(num_prompts: int, sizes: Sequence[int]) -> Iterator[list[int]]:
    """Seeds 0, 1, ... in batches of these sizes, over and over."""
    left = list(range(num_prompts))
    for size in cycle(sizes):
        if not left:
            return
        yield left[:size]
        left = left[size:]


def _generate(
    sequences: Sequences,
    seeds: Sequence[int],
    num_tokens: int,
    prompt_tokens: int,
    plain: dict[int, list[int]] | None,
) -> dict[int, list[int]]:
    """Texts by seed; those of a batch end one after the other, so that it shrinks."""
    ids = {seed: sequences.open(prompt_tokens, seed) for seed in seeds}
    turn = 0
    while running := [seed for seed in seeds if len(sequences.texts[ids[seed]]) < num_tokens]:
        drafts: list[list[int]] = []
        for seed in running:
            at, count = len(sequences.texts[ids[seed]]), (turn + seed) % 8
            known = [] if plain is None else plain[seed][at : at + count]
            drafts.append([*known[:-1], known[-1] ^ 1] if known else [])
        sequences.step([ids[seed] for seed in running], drafts)
        turn += 1
    texts = {seed: sequences.texts[ids[seed]][:num_tokens] for seed in seeds}
    sequences.close(list(ids.values()))
    return texts
