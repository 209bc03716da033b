"""`dflash-ray plan`: what it prints, what it writes, and what it says of bad input."""

import pytest
from typer.testing import CliRunner

from dflash_ray.cli import app
from dflash_ray.simulator.deployment import Deployment
from dflash_ray.simulator.planning import Plan, Prices, load_prices
from dflash_ray.simulator.profile import load_profile
from dflash_ray.simulator.simulation import simulate
from dflash_ray.simulator.workload import Category, Workload, load_workload

WORKLOAD = """
clients: 2
requests: 4
categories:
  chat: {prompt_tokens: 30, output_tokens: 20, acceptance: [0.7, 0.5]}
"""


def run(*options: str):
    return CliRunner().invoke(app, ["plan", *options])


@pytest.fixture
def workload(tmp_path):
    path = tmp_path / "workload.yaml"
    path.write_text(WORKLOAD)
    return path


def test_a_plan_says_what_one_group_does_and_what_many_need(workload, tmp_path):
    plot = tmp_path / "plan.png"
    done = run("--workload", str(workload), "--clients", "1,2", "--groups", "1,1000", "--plot", str(plot))
    assert done.exit_code == 0, done.output
    for text in ("one group, 1 client", "one group, 2 clients", "1000", "adaptive", "joules", "USD"):
        assert text in done.output
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--profile", "none-such"], "profile none-such"),
        (["--clients", "a"], "--clients"),
        (["--groups", "0"], "--groups"),
        (["--policies", "always"], "--policies"),
        (["--prices", "/none/such"], "prices /none/such"),
        (["--workload", "/none/such"], "workload /none/such"),
    ],
)
def test_bad_input_is_named(options, named):
    done = run(*options)
    assert done.exit_code == 1 and named in done.output and "Traceback" not in done.output


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("clients: 2\nrate: 3", "either clients or rate"),
        ("clients: 0", "clients"),
        ("rate: 1\ncategories: {}", "categories"),
        ("clients: 1\ncategories: {a: {acceptance: [2]}}", "acceptance"),
        ("[1]", "mapping"),
        (": :", "YAML"),
    ],
)
def test_a_bad_workload_names_its_key(tmp_path, text, named):
    from dflash_ray.config import ConfigError

    (tmp_path / "w.yaml").write_text(text)
    with pytest.raises(ConfigError, match=named):
        load_workload(tmp_path / "w.yaml")


def test_prices_make_energy_and_cost(tmp_path):
    path = tmp_path / "prices.yaml"
    path.write_text("{target_hour: 3.6, drafter_hour: 3.6, target_busy_watts: 100, target_idle_watts: 100}")
    prices = load_prices(path)
    load = Workload(clients=1, requests=2, categories={"chat": Category(prompt_tokens=20, output_tokens=20)})
    outcome = simulate(Deployment(load_profile("qwen3-8b-h100"), "off"), load)
    plain = Plan("off", "", outcome, 0.0)
    assert plain.joules_per_token(prices, 5) == pytest.approx(100 / outcome.token_rate)
    assert plain.cost_per_million(prices, 5) == pytest.approx(1000 / outcome.token_rate)
    shared = Plan("fixed", "remote", outcome, 0.25)
    assert [shared.devices(count) for count in (1, 4, 5, 1000)] == [1, 1, 2, 250]
    assert shared.cost_per_million(prices, 4) == pytest.approx(1250 / outcome.token_rate)
    assert Prices().target_hour > 0
