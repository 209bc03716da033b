"""Steps of an engine, as its callers build them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dflash_ray.sampling.parameters import SamplingParams
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.step import Drafts, Opening, StepInput, StepOutput, chain_parents
from dflash_ray.target_group.step_check import StepLimits, check_step

PROMPT = [5, 17, 80, 3, 44, 9, 61]
VOCAB = 96
LIMITS = StepLimits(max_batch_tokens=4096, max_model_len=256, vocab_size=VOCAB)


def ids(values: Iterable[int]) -> np.ndarray:
    return np.array(list(values), dtype=np.uint64)


def ints(values: Iterable[int]) -> np.ndarray:
    return np.array(list(values), dtype=np.int64)


def opening(
    sequence_id: int = 1,
    tokens: Sequence[int] = PROMPT,
    prompt_len: int | None = None,
    max_new: int = 40,
    stops: Sequence[int] = (),
    min_new: int = 0,
    wants_features: bool = False,
    cache_salt: bytes = b"",
    **sampling: Any,
) -> Opening:
    values = {"seed": 11} | sampling
    if "bias_ids" in values:
        values["bias_ids"] = ints(values["bias_ids"])
        values["bias_values"] = np.array(values["bias_values"], dtype=np.float32)
    return Opening(
        sequence_id,
        ints(tokens),
        prompt_len or len(tokens),
        max_new,
        min_new,
        ints(stops),
        SamplingParams(**values),
        wants_features,
        cache_salt,
    )


def step_of(
    open: Sequence[Opening] = (),
    prefill: Mapping[int, int] | Sequence[tuple[int, int]] = (),
    verify: Mapping[int, tuple[int, Sequence[int]]] | None = None,
    close: Sequence[int] = (),
    draft: Mapping[int, int] | None = None,
    own: Mapping[int, int] | None = None,
    options: Mapping[str, Any] | None = None,
    **drafts: Sequence[float],
) -> StepInput:
    """A step that was checked.

    Args:
        prefill: rows by sequence. verify: committed length and drafts by sequence. draft: how many tokens the colocated
            drafter is to draft, by sequence. own: how many own drafts to verify, by sequence. options: other fields of
            the step. drafts: other columns of `Drafts`.
    """
    chunks = list(prefill.items()) if isinstance(prefill, Mapping) else list(prefill)
    verify, draft = verify or {}, draft or {}
    dtypes = {"candidate_probs": np.float32}
    counts = ints(len(tokens) for _, tokens in verify.values())
    columns = {name: np.array(values, dtype=dtypes.get(name, np.int64)) for name, values in drafts.items()}
    step = StepInput(
        close=ids(close),
        open=list(open),
        prefill_ids=ids(sequence_id for sequence_id, _ in chunks),
        prefill_lens=ints(length for _, length in chunks),
        verify_ids=ids(verify),
        base_lens=ints(base_len for base_len, _ in verify.values()),
        drafts=Drafts(
            **{
                "counts": counts,
                "token_ids": ints(token for _, tokens in verify.values() for token in tokens),
                "parents": chain_parents(counts),
            }
            | columns
        ),
        draft_ids=ids(draft),
        draft_counts=ints(draft.values()),
        own_counts=ints(own.get(at, 0) for at in verify) if own else ints([]),
        **(options or {}),
    )
    check_step(step, LIMITS)
    return step


def verify_step(known: Mapping[int, Sequence[int]], drafts: Mapping[int, Sequence[int]], **options: Any) -> StepInput:
    """A step that brings drafts for sequences whose tokens are `known`."""
    return step_of(verify={at: (len(known[at]), draft) for at, draft in drafts.items()}, **options)


def tokens_of(output: StepOutput) -> dict[int, list[int]]:
    """Committed tokens by sequence."""
    stops = np.cumsum(output.num_tokens)
    parts = np.split(output.token_ids, stops[:-1])
    return {sequence_id: part.tolist() for sequence_id, part in zip(output.sequence_ids.tolist(), parts, strict=True)}


def run(engine: Engine, start: Opening, draft_of: Any, chunk: int = 3) -> list[int]:
    """Generates one sequence to its end; `draft_of(tokens)` drafts for each step: a chain, or tokens and parents."""
    tokens, at = start.token_ids.tolist(), start.sequence_id
    output = engine.step(step_of([start], {at: chunk}))
    while not output.num_tokens[0]:
        assert output.statuses.tolist() == [1], output.errors
        output = engine.step(step_of(prefill={at: chunk}))
    tokens += output.token_ids.tolist()
    while not output.finishes[0]:
        output = engine.step(_drafted(start, tokens, draft_of(tokens)))
        assert output.statuses.tolist() == [1], output.errors
        tokens += output.token_ids.tolist()
    engine.close([at])
    engine.allocator.check_integrity()
    assert engine.allocator.num_free == engine.allocator.num_pages
    return tokens[len(start.token_ids) :]


def _drafted(start: Opening, tokens: list[int], drafts: Any) -> StepInput:
    """A step with as much of a chain or tree as an answer has room for."""
    room = max(0, start.prompt_len + start.max_new_tokens - len(tokens) - 1)
    chain, parents = drafts if isinstance(drafts, tuple) else (drafts, list(range(len(drafts))))
    return verify_step({start.sequence_id: tokens}, {start.sequence_id: chain[:room]}, parents=parents[:room])


def plain(tokens: list[int]) -> list[int]:
    return []


def garbage(tokens: list[int]) -> list[int]:
    return [(t * 31 + 7) % VOCAB for t in tokens[-5:]]


def oracle(truth: list[int], prompt_len: int, wrong_at: int | None = None) -> Any:
    """Drafts of what comes, but for one place of each block."""

    def draft(tokens: list[int]) -> list[int]:
        at = len(tokens) - prompt_len
        return [t if i != wrong_at else (t + 1) % VOCAB for i, t in enumerate(truth[at : at + 5])]

    return draft
