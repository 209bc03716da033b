"""Random steps for the verification operators: plans, logits, and what an implementation makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from dflash_ray.kernels import reference_verify, verify_ops
from dflash_ray.kernels.columns import Mode
from dflash_ray.sampling.ranks import SingleRank
from tests.plans import SequenceOutcome, SequencePlan, verify
from tests.ranks import run_sharded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "seed": 3,
    "mode": Mode.COUPLED,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "num_logprobs": -1,
    "position": 10,
}


def plan_of(tokens: list[int], parents: list[int] | None = None, **values: Any) -> SequencePlan:
    """A chain of drafts, or a tree by `parents`, with defaults for what is not given."""
    parents = list(range(-1, len(tokens) - 1)) if parents is None else parents
    return SequencePlan(**(DEFAULTS | values), tokens=tokens, parents=parents)


def torch_operator(namespace: str) -> Callable[[str, Any], Callable[..., Any]]:
    """Looks up operators of a torch.ops namespace as `verify_ops` does."""
    return lambda name, like: verify_ops.with_flat_plans(getattr(getattr(torch.ops, namespace), name))


def reference_operator(name: str, like: Any) -> Callable[..., Any]:
    return getattr(reference_verify, name)


def run_step(
    operator: Callable[..., Any],
    logits: torch.Tensor,
    plan: Sequence[SequencePlan],
    num_shards: int = 1,
    device: str = "cpu",
) -> tuple[list[SequenceOutcome], torch.Tensor]:
    """Outcomes and compacted features of a step by one implementation, over a vocabulary split into shards."""
    features = torch.arange(len(logits) * 3, dtype=torch.float32).view(-1, 3).to(device)
    previous = verify_ops._operator
    verify_ops._operator = operator
    try:
        if num_shards == 1:
            return verify(logits.clone().to(device), 0, plan, SingleRank(), features), features.cpu()
        per_rank = -(-logits.shape[1] // num_shards)

        def run(rank: int, group: Any) -> list[SequenceOutcome]:
            start = min(rank * per_rank, logits.shape[1])
            mine = logits[:, start : start + per_rank].clone().to(device)
            return verify(mine, start, plan, group, features if rank == 0 else None)

        outcomes = run_sharded(num_shards, run)
        assert all(outcome == outcomes[0] for outcome in outcomes)
        return outcomes[0], features.cpu()
    finally:
        verify_ops._operator = previous


def assert_same(
    got: tuple[list[SequenceOutcome], torch.Tensor], want: tuple[list[SequenceOutcome], torch.Tensor]
) -> None:
    """Equal to the bit but for log-probabilities, which are sums of floats."""
    assert torch.equal(got[1], want[1])
    for mine, other in zip(got[0], want[0], strict=True):
        for name in ("accepted_rows", "tokens", "is_flagged", "finish", "kv_len"):
            assert getattr(mine, name) == getattr(other, name), name
        assert (mine.logprobs is None) == (other.logprobs is None)
        if mine.logprobs is None or other.logprobs is None:
            continue
        assert mine.logprobs[1] == other.logprobs[1]
        for one, two in zip(mine.logprobs[::2], other.logprobs[::2], strict=True):
            assert torch.allclose(torch.tensor(one), torch.tensor(two), atol=1e-4, equal_nan=True)


@st.composite
def plans(draw: Any, vocab: int, max_rows: int = 6) -> list[SequencePlan]:
    """One to three sequences whose drafts form chains or trees, with every parameter somewhere."""
    token = st.integers(0, vocab - 1)
    sequences = []
    first_feature = 0
    for _ in range(draw(st.integers(1, 3))):
        tokens = draw(st.lists(token, min_size=1, max_size=max_rows))
        is_tree = draw(st.booleans())
        parents = [-1, *(draw(st.integers(0, i)) if is_tree else i for i in range(len(tokens) - 1))]
        has_penalties = draw(st.booleans())
        ids = draw(st.lists(token, max_size=4, unique=True))
        limit = draw(st.integers(0, 12))
        sequences.append(
            plan_of(
                tokens,
                parents,
                temperature=draw(st.sampled_from([0.0, 1e-6, 1e-4, 0.7, 1.0, 5.0])),
                top_k=draw(st.sampled_from([0, 0, 1, 3, 10**6])),
                top_p=draw(st.sampled_from([1.0, 1.0, 0.9, 0.4, 1e-6])),
                min_p=draw(st.sampled_from([0.0, 0.0, 0.05, 1.0])),
                seed=draw(st.integers(0, 2**64 - 1)),
                mode=Mode.COUPLED if is_tree else draw(st.sampled_from(list(Mode))),
                presence_penalty=draw(st.sampled_from([0.0, 0.5])) if has_penalties else 0.0,
                frequency_penalty=draw(st.sampled_from([0.0, 0.25])) if has_penalties else 0.0,
                repetition_penalty=draw(st.sampled_from([1.0, 1.3])) if has_penalties else 1.0,
                num_logprobs=draw(st.sampled_from([-1, -1, 0, 3])),
                position=draw(st.sampled_from([0, 7, 2**33])),
                bias_ids=ids[:2],
                bias_values=[1.5, -2.0][: len(ids[:2])],
                banned_ids=ids[2:],
                ban_below=draw(st.sampled_from([0, 9])),
                history_ids=ids if has_penalties else [],
                history_counts=[i % 3 for i in range(len(ids))] if has_penalties else [],
                stop_ids=draw(st.lists(token, max_size=2)),
                min_len=limit,
                max_len=draw(st.sampled_from([1, limit + 2, 2**40])),
                feature_row=draw(st.sampled_from([-1, first_feature])),
            )
        )
        first_feature += len(tokens)
    return sequences


@st.composite
def logits_for(draw: Any, plan: Sequence[SequencePlan], vocab: int) -> torch.Tensor:
    """Rows of every kind: flat, peaked, all equal, masked to one token, not finite; not aligned in memory."""
    num_rows = sum(sequence.num_rows for sequence in plan)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 1.0, 4.0, 30.0]))
    logits = torch.randn(num_rows, vocab + 3, generator=generator) * scale
    row = draw(st.integers(0, num_rows - 1))
    kind = draw(st.sampled_from(["plain", "plain", "masked", "one", "none", "nan", "inf"]))
    if kind == "masked":
        logits[row, torch.rand(vocab + 3, generator=generator) < 0.5] = -torch.inf
    elif kind in ("one", "none"):
        logits[row] = -torch.inf
        logits[row, vocab // 2] = 0.5 if kind == "one" else -torch.inf
    elif kind in ("nan", "inf"):
        logits[row, vocab // 2] = float(kind)
    offset = draw(st.integers(0, 3))
    return logits.to(draw(st.sampled_from(DTYPES)))[:, offset : offset + vocab]
