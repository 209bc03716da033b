"""The operators as torch sees them: schemas, fakes, clear refusals."""

import pytest
import torch

from dflash_ray.kernels import build
from tests.plans import to_columns
from tests.unit.kernels.plans import plan_of

pytestmark = pytest.mark.skipif(
    not build.is_loaded_for("cpu"), reason="no C++ compiler: operators run in plain torch here"
)
PLAN = [plan_of([1, 2, 3], top_k=3, top_p=0.9, seed=5, stop_ids=[4], bias_ids=[2], bias_values=[1.0])]


def calls():
    """Arguments for every operator, in the order of a step."""
    ops = torch.ops.dflash_ray
    columns = to_columns(PLAN, torch.device("cpu"))
    plan = tuple(columns.tensors)
    logits = torch.randn(3, 40)
    maxima = logits.double().amax(1)
    state = ops.threshold_start(maxima, *plan)
    histogram = ops.threshold_histogram(logits, 0, *plan, maxima, state, 0)
    no_drafts = (columns.draft_ids, columns.draft_probs)
    drafts = (torch.tensor([[2], [3], [-1]]), torch.ones(3, 1))
    partials = ops.verify_coupled(logits, 0, *plan, state, True)[None].contiguous()
    outcome = ops.verify_combine(partials, *plan, *no_drafts, 3)
    return {
        "verify_prepare": (logits, 0, *plan),
        "threshold_start": (maxima, *plan),
        "threshold_histogram": (logits, 0, *plan, maxima, state, 0),
        "threshold_narrow": (state, histogram, *plan, 0),
        "verify_greedy": (logits, 0, *plan, True),
        "verify_coupled": (logits, 0, *plan, state, True),
        "verify_rejection": (logits, 0, *plan, maxima, state, *drafts),
        "verify_unsharded": (logits, 0, *plan, *drafts, True, True, True, True),
        "verify_combine": (partials, *plan, *no_drafts, 3),
        "commit": (outcome, *plan, torch.randn(3, 4)),
        "count_history": (*plan[3:], plan[1], *(torch.zeros(0, dtype=torch.int64) for _ in range(3))),
        "token_logprobs": (logits, 0, torch.tensor([1, 2, 3]), 2),
        "gumbel_noise": (torch.tensor([1]), torch.tensor([2]), torch.tensor([[3, 4]]), 0),
    }


NAMES = sorted(calls()) if build.is_loaded_for("cpu") else []


@pytest.mark.parametrize("name", NAMES)
def test_an_operator_passes_torchs_checks(name):
    operator = getattr(torch.ops.dflash_ray, name).default
    torch.library.opcheck(operator, calls()[name])


def test_logits_of_another_type_or_number_of_rows_are_refused():
    plan = tuple(to_columns(PLAN, torch.device("cpu")).tensors)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        torch.ops.dflash_ray.verify_greedy(torch.randn(3, 40).double(), 0, *plan, False)
    with pytest.raises(RuntimeError, match="logits have 2 rows, the plan 3"):
        torch.ops.dflash_ray.verify_greedy(torch.randn(2, 40), 0, *plan, False)
