"""The production scheduler under a virtual clock does what a server would: every token comes, and little is lost."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from dflash_ray.simulator.deployment import Deployment
from dflash_ray.simulator.profile import Profile, Times, built_in_profiles, load_profile
from dflash_ray.simulator.simulation import Simulation, simulate
from dflash_ray.simulator.workload import Category, Workload

CPU = Profile(
    name="cpu",
    model="toy",
    device="toy",
    date="2026-11-27",
    source="made up",
    passes=Times(at=(1, 4, 8, 16, 32), seconds=(0.030, 0.034, 0.040, 0.056, 0.09)),
    per_sequence=0.0004,
    per_context_token=1e-6,
    prefill=Times(at=(1, 256), seconds=(0.03, 0.3)),
    drafts=Times(at=(1, 4, 16), seconds=(0.008, 0.014, 0.04)),
    draft_len=7,
    host=Times(at=(1,), seconds=(0.0005,)),
)
CHAT = Category(prompt_tokens=40, output_tokens=80)


def workload(clients: int = 1, requests: int = 6, **category) -> Workload:
    return Workload(clients=clients, requests=requests, categories={"chat": CHAT.model_copy(update=category)})


@pytest.mark.parametrize("num_drafters", [0, 1, 3])
@pytest.mark.parametrize("policy", ["off", "fixed", "adaptive"])
def test_every_request_gets_all_its_tokens_at_the_right_time(policy, num_drafters):
    outcome = simulate(Deployment(CPU, policy, num_drafters), workload(clients=3, requests=9))
    assert len(outcome.first_token) == 9 and (outcome.first_token > 0.03).all()
    assert outcome.num_tokens == len(outcome.token_gaps) + 9
    assert outcome.seconds > outcome.steps[:, 0].sum() * 0.5 > 0
    assert (outcome.acceptance_length > 1) == (policy != "off")
    assert (outcome.drafter_busy > 0) == (policy != "off" and num_drafters > 0)
    assert 0 < outcome.target_busy <= 1


def test_plain_decoding_takes_what_the_profile_says():
    outcome = simulate(Deployment(CPU, "off"), workload(requests=3))
    steps = outcome.steps[:, 0]
    assert np.median(steps) == pytest.approx(0.0306, rel=0.02)


def test_speculation_that_pays_is_as_quick_as_the_best_fixed_number():
    fixed = [simulate(Deployment(CPU, "fixed", draft_tokens=count), workload()).token_rate for count in (2, 5, 7)]
    adaptive = simulate(Deployment(CPU, "adaptive"), workload()).token_rate
    assert adaptive > 0.97 * max(fixed)


def test_an_open_loop_waits_for_its_arrivals():
    slow = simulate(Deployment(CPU, "off"), Workload(rate=0.1, requests=5, categories={"chat": CHAT}))
    assert slow.seconds > 20 and slow.target_busy < 0.6


def test_what_a_workload_asks_does_not_depend_on_the_policy():
    one, other = (simulate(Deployment(CPU, policy), workload(requests=5)) for policy in ("off", "adaptive"))
    assert one.num_tokens == other.num_tokens


def test_sequences_that_rest_long_are_closed_at_their_drafter_and_opened_anew():
    poor = Simulation(Deployment(CPU, "adaptive"), workload(requests=8, acceptance=(0.0,)))
    outcome = poor.run()
    drafter = next(iter(poor._drafters.values()))
    assert outcome.reasons["no_gain"] > 200 and len(drafter._held) <= 1
    assert outcome.drafter_busy < 0.05


@pytest.mark.parametrize("name", built_in_profiles())
def test_profiles_that_come_along_say_where_they_come_from_and_never_get_quicker_with_more_work(name):
    profile = load_profile(name)
    assert len(profile.source) > 100
    passes = [profile.pass_seconds(1, rows, 512, 0) for rows in range(1, 3000, 7)]
    drafts = [profile.draft_seconds(count, count * profile.draft_len, 0) for count in range(1, 300)]
    assert (np.diff(passes) >= 0).all() and (np.diff(drafts) >= 0).all()


@pytest.fixture
def random_workloads(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    return importlib.import_module("random_workloads")


@pytest.mark.parametrize("seed", range(4))
def test_random_workloads_lose_at_most_2_percent_against_plain_decoding(random_workloads, seed):
    """First trials included; benchmarks/random_workloads.py runs more of them.

    Not the time until the last request ends: with nearly as many clients as requests that is the longest answer's,
    which gains nothing when the others end sooner and leave it alone.
    """
    assert random_workloads.run(seed)["stepwise"] <= random_workloads.MOST_LOSS


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_random_workloads_lose_at_most_2_percent_against_plain_decoding(random_workloads):
    most = random_workloads.MOST_LOSS
    assert [seed for seed in range(4, 64) if random_workloads.run(seed)["stepwise"] > most] == []


def test_what_plain_decoding_would_take_is_what_it_takes():
    outcome = simulate(Deployment(CPU, "off"), workload(clients=3, requests=6))
    assert outcome.seconds == pytest.approx(outcome.plain_seconds, rel=0.005)


def test_clients_and_drafters_on_the_same_cores_slow_the_passes():
    """Two cores that a pass keeps busy: what others compute in a step comes on top, half of it each."""
    beside = Times(at=(1,), seconds=(0.004,))
    shared = CPU.model_copy(update={"cores": 2.0, "pass_cores": 2.0, "draft_cores": 2.0, "beside": beside})
    load = workload(requests=3, spread=0)
    plain, slowed = (simulate(Deployment(profile, "off"), load) for profile in (CPU, shared))
    assert np.median(slowed.steps[:, 0]) == pytest.approx(np.median(plain.steps[:, 0]) + 0.002, rel=0.02)
    apart = shared.model_copy(update={"beside": Times(at=(1,), seconds=(0.0,))})
    drafted = [simulate(Deployment(profile, "fixed", 1), load).seconds for profile in (shared, apart, CPU)]
    assert drafted[0] > drafted[1] >= drafted[2]


@pytest.mark.parametrize("num_drafters", [0, 1])
def test_what_asking_takes_delays_the_steps_that_ask(num_drafters):
    slow = CPU.model_copy(update={"ask": Times(at=(1,), seconds=(0.02,))})
    one, other = (simulate(Deployment(profile, "fixed", num_drafters), workload()) for profile in (CPU, slow))
    assert (other.seconds > 1.2 * one.seconds) == (num_drafters > 0)


@pytest.mark.parametrize("num_drafters", [0, 1])
def test_a_group_at_rest_decodes_as_quickly_as_one_without_speculation(num_drafters):
    """Its plain steps run ahead as well, wherever the drafter is, and few sequences are opened with features."""
    load = workload(clients=4, requests=48, acceptance=(0.0,), spread=0.2)
    profile = CPU.model_copy(update={"host": Times(at=(1,), seconds=(0.006,))})
    plain = simulate(Deployment(profile, "off", num_drafters), load)
    simulation = Simulation(Deployment(profile, "adaptive", num_drafters), load)
    run, have_features = simulation._target.run, []

    def run_and_count(step):
        have_features.extend(opened.wants_features for opened in step.open)
        return run(step)

    simulation._target.run = run_and_count
    assert simulation.run().seconds < 1.02 * plain.seconds
    assert sum(have_features) < 0.5 * len(have_features) == 24
