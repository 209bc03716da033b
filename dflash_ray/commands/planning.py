"""`plan` and `profile`."""

from __future__ import annotations

from pathlib import Path

from dflash_ray.commands.terminal import Steps, console, fail, new_table, notes
from dflash_ray.config import ConfigError
from dflash_ray.simulator.deployment import POLICIES
from dflash_ray.simulator.planning import Plan, Prices, load_prices, percentiles, plan
from dflash_ray.simulator.profile import Profile, load_profile
from dflash_ray.simulator.workload import Workload, load_workload


def run_plan(
    profile_name: str,
    workload_path: Path | None,
    loads: str,
    policies: str,
    groups: str,
    draft_tokens: int,
    link_ms: float,
    cohorts: int,
    prices_path: Path | None,
    plot: Path | None,
) -> None:
    """Simulates every load with every policy on one group, and says what so many groups give and need."""
    try:
        profile = load_profile(profile_name)
        prices = load_prices(prices_path)
        base = load_workload(workload_path) if workload_path is not None else Workload(clients=1)
        clients = _numbers("--clients", loads) or [base.clients or 0]
        group_counts = _numbers("--groups", groups)
        names = policies.split(",")
        for name in names:
            if name not in POLICIES:
                raise ConfigError(f"--policies: {name!r} is none of {', '.join(POLICIES)}")
        if not group_counts or min(group_counts) < 1:
            raise ConfigError("--groups: give numbers from 1 on")
    except ConfigError as error:
        fail(str(error))
    console.out(f"{profile.name}: {profile.model}; {profile.device}; {profile.date}", style="bold")
    notes.out(profile.source)
    notes.out("one group is simulated; groups share nothing but drafters, so more of them multiply it")
    curves: dict[int, list[Plan]] = {}
    with Steps() as steps:
        for count in clients:
            workload = _with_clients(base, count)
            steps.begin(f"simulating {_load_of(workload)}")
            curves[count] = plan(profile, workload, names, draft_tokens, link_ms / 1000, cohorts)
    for count, plans in curves.items():
        _print_load(_load_of(_with_clients(base, count)), plans)
        _print_groups(plans, prices, group_counts)
    if plot is not None:
        _plot(plot, profile, curves)
        console.out(f"wrote {plot}")


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",") if number]
    except ValueError:
        raise ConfigError(f"{option}: {text!r} is no list of whole numbers, e.g. 1,8,32") from None


def _with_clients(base: Workload, count: int) -> Workload:
    """The load of a closed loop with so many clients; 0 keeps the workload's own."""
    if not count:
        return base
    requests = max(base.requests, 3 * count)
    return base.model_copy(update={"clients": count, "rate": None, "requests": requests})


def _load_of(workload: Workload) -> str:
    if workload.rate is not None:
        return f"{workload.rate:g} requests a second"
    return f"{workload.clients} client{'s' if workload.clients != 1 else ''}"


def _print_load(load: str, plans: list[Plan]) -> None:
    table = new_table(
        "policy", "drafters", "tokens/s", "ratio", "τ", "TTFT ms", "p95", "p99", "ITL ms", "p95", "p99",
        "busy", "drafter",
        title=f"one group, {load}",
    )  # fmt: skip
    plain = next((one.outcome.token_rate for one in plans if one.policy == "off"), None)
    for one in plans:
        outcome = one.outcome
        table.add_row(
            one.policy,
            one.placement or "none",
            f"{outcome.token_rate:.1f}",
            f"{outcome.token_rate / plain:.2f}" if plain else "",
            f"{outcome.acceptance_length:.2f}",
            *(f"{1000 * value:.0f}" for value in percentiles(outcome.first_token)),
            *(f"{1000 * value:.1f}" for value in percentiles(outcome.token_gaps)),
            f"{outcome.target_busy:.0%}",
            f"{outcome.drafter_busy:.0%}",
        )
    console.print(table)
    for one in plans:
        if one.policy == "adaptive":
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(one.outcome.reasons.items()))
            console.out(f"adaptive {one.placement}: steps by reason: {reasons}")


def _print_groups(plans: list[Plan], prices: Prices, group_counts: list[int]) -> None:
    table = new_table(
        "groups", "policy", "drafters", "drafter devices", "tokens/s", "joules a token",
        f"{prices.currency} a million tokens",
    )  # fmt: skip
    for count in group_counts:
        for one in plans:
            table.add_row(
                str(count),
                one.policy,
                one.placement or "none",
                str(one.devices(count)),
                f"{count * one.outcome.token_rate:,.0f}",
                f"{one.joules_per_token(prices, count):.2f}",
                f"{one.cost_per_million(prices, count):.2f}",
            )
    console.print(table)


def _plot(path: Path, profile: Profile, curves: dict[int, list[Plan]]) -> None:
    """Throughput and inter-token latency over the number of clients."""
    try:
        import matplotlib
    except ImportError:
        fail("--plot needs matplotlib: pip install 'dflash-ray[plan]'")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    labels = [f"{one.policy} {one.placement}".strip() for one in next(iter(curves.values()))]
    for index, label in enumerate(labels):
        counts = list(curves)
        outcomes = [curves[count][index].outcome for count in counts]
        axes[0].plot(counts, [outcome.token_rate for outcome in outcomes], marker="o", label=label)
        axes[1].plot(counts, [1000 * percentiles(outcome.token_gaps)[2] for outcome in outcomes], marker="o")
    axes[0].set(xlabel="clients", ylabel="tokens/s of one group", xscale="log", yscale="log", title=profile.name)
    axes[1].set(xlabel="clients", ylabel="inter-token latency, p99, ms", xscale="log")
    axes[0].legend()
    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        fail(f"--plot {path}: {error}")


def run_profile(
    config_path: Path | None, overrides: list[str], out: Path | None, server: str | None, server_http: str
) -> None:
    """Measures this machine, and a server on it where one is named, and writes its profile."""
    from dflash_ray.config import load_config
    from dflash_ray.simulator.measuring import default_path, measure
    from dflash_ray.simulator.serving import with_serving

    try:
        config = load_config(config_path, overrides)
    except ConfigError as error:
        fail(str(error))
    try:
        with Steps() as steps:
            profile = measure(config, steps.begin)
            if server is not None:
                profile = with_serving(profile, server, server_http, steps.begin)
    except ConnectionError as error:
        fail(str(error))
    path = out or default_path(profile)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(profile.model_dump_json(indent=2) + "\n")
    except OSError as error:
        fail(f"--out {path}: {error.strerror}")
    console.out(f"wrote {path}; use it with: dflash-ray plan --profile {path}")
