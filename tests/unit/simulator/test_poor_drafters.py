"""A drafter that knows nothing, dies, hangs or becomes slow costs next to nothing, under the production scheduler."""

import numpy as np
import pytest

from dflash_ray.simulator.deployment import Deployment
from dflash_ray.simulator.simulation import Simulation, simulate
from dflash_ray.simulator.workload import Workload
from tests.unit.simulator.test_simulation import CHAT, CPU

FAULT_AT = 120  # steps
SETTLED = 200  # steps after it


def load_of(clients: int, requests: int, **category) -> Workload:
    return Workload(clients=clients, requests=requests, categories={"chat": CHAT.model_copy(update=category)})


@pytest.mark.parametrize("num_drafters", [0, 1])
@pytest.mark.parametrize("clients", [1, 4, 16])
def test_a_drafter_of_random_weights_costs_at_most_3_percent(clients, num_drafters):
    load = load_of(clients, 2 * clients + 2, acceptance=(0.0,), output_tokens=120, spread=0.2)
    plain = simulate(Deployment(CPU, "off", num_drafters, noise=0.05), load)
    adaptive = simulate(Deployment(CPU, "adaptive", num_drafters, noise=0.05), load)
    assert adaptive.token_rate > 0.97 * plain.token_rate


class _Faulty(Simulation):
    """A simulation whose only drafter changes for the worse."""

    def __init__(self, fault: str, load: Workload) -> None:
        super().__init__(Deployment(CPU, "adaptive", 1), load)
        self._fault = fault

    def _draft(self, drafter_id, request):
        if len(self._steps) < FAULT_AT:
            super()._draft(drafter_id, request)
        elif self._fault == "dies":
            self._at(self._now, lambda: self.scheduler.drafter_lost(drafter_id))
        elif self._fault == "slows":
            drafts = CPU.drafts.model_copy(update={"seconds": tuple(10 * seconds for seconds in CPU.drafts.seconds)})
            self._drafters[drafter_id].profile = CPU.model_copy(update={"drafts": drafts})
            super()._draft(drafter_id, request)


def rate(steps: np.ndarray) -> float:
    return float(steps[:, 1].sum() / steps[:, 0].sum())


@pytest.mark.parametrize("clients", [1, 4])
@pytest.mark.parametrize("fault", ["dies", "hangs", "slows"])
def test_200_steps_after_a_drafters_fault_decoding_is_as_quick_as_without_one(fault, clients):
    load = load_of(clients, clients, acceptance=(0.8, 0.7, 0.6), output_tokens=900, spread=0)
    steps = _Faulty(fault, load).run().steps
    plain = simulate(Deployment(CPU, "off"), load).steps
    assert rate(steps[:FAULT_AT]) > 1.2 * rate(plain[:FAULT_AT]), "it drafts until then"
    after = steps[FAULT_AT + SETTLED :][:100]
    assert len(after) == 100 and (after[:, 2] == clients).all()
    num_tokens = steps[:, 1].cumsum()[FAULT_AT + SETTLED - 1]
    same = plain[plain[:, 1].cumsum() > num_tokens][: len(after)]  # texts as long
    assert rate(after) > 0.95 * rate(same)
