"""`dflash-ray`: serve the application, use a running one as a client, or train a drafter.

Errors are one line that names the fix.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file of deployments/; defaults without")
]
RecipeOption = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of a training run")]
SetOption = Annotated[list[str], typer.Option("--set", help="key.sub=value, may be repeated")]
LogOption = Annotated[
    str | None, typer.Option("--log", help="file of all processes' logs, - for stderr; without, a new temporary file")
]
GrpcOption = Annotated[str, typer.Option("--grpc", help="address of the gRPC API")]
HttpOption = Annotated[str, typer.Option("--http", help="URL of the HTTP API")]


@app.command()
def serve(config: ConfigOption = None, overrides: SetOption = [], log: LogOption = None) -> None:  # noqa: B006 - typer's way to a list
    """Start the application and keep it running until Ctrl-C."""
    from dflash_ray.commands.serving import run_serve

    run_serve(config, overrides, log)


@app.command()
def demo(config: ConfigOption = None, overrides: SetOption = [], log: LogOption = None) -> None:  # noqa: B006
    """Start locally, answer real prompts with speculation off and on, compare tokens and speed, stop."""
    from dflash_ray.commands.serving import run_demo

    run_demo(config, overrides, log)


@app.command()
def generate(
    prompt: str,
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    speculation: Annotated[str, typer.Option(help="adaptive, fixed or off")] = "adaptive",
    grpc: GrpcOption = "127.0.0.1:9000",
) -> None:
    """Answer one prompt on a running server, and print how speculation went."""
    from dflash_ray.commands.client import run_generate

    run_generate(grpc, prompt, max_tokens, temperature, seed, speculation)


@app.command()
def chat(
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.7,
    speculation: Annotated[str, typer.Option(help="adaptive, fixed or off")] = "adaptive",
    grpc: GrpcOption = "127.0.0.1:9000",
) -> None:
    """Talk to a running server; an empty line ends the conversation."""
    from dflash_ray.commands.client import run_chat

    run_chat(grpc, temperature, speculation)


@app.command()
def status(http: HttpOption = "http://127.0.0.1:8000") -> None:
    """Show what a running server says of itself."""
    from dflash_ray.commands.client import run_status

    run_status(http)


@app.command()
def drain(
    timeout: Annotated[float, typer.Option(min=1.0, help="seconds after which the node is left as it is")] = 300.0,
    node: Annotated[str | None, typer.Option(help="Ray's id of the node; this one without")] = None,
) -> None:
    """Let the answers of a Ray node end, before it is stopped: for a pod's preStop hook."""
    from dflash_ray.commands.drain import run_drain

    run_drain(timeout, node)


@app.command()
def plan(
    profile: Annotated[str, typer.Option(help="times of a machine: a JSON file of `dflash-ray profile`, or a name")] = (
        "qwen3-8b-h100"
    ),
    workload: Annotated[Path | None, typer.Option(help="YAML of arrivals, lengths and acceptance by category")] = None,
    clients: Annotated[str, typer.Option(help="closed loops of so many clients, in the workload's place")] = "",
    policies: Annotated[str, typer.Option(help="of off, fixed, adaptive")] = "off,fixed,adaptive",
    groups: Annotated[str, typer.Option(help="numbers of target groups")] = "1,10,100,1000",
    draft_tokens: Annotated[int, typer.Option(min=0, max=31, help="of the fixed policy")] = 5,
    link_ms: Annotated[float, typer.Option(min=0.0, help="a message's time between two processes")] = 0.2,
    cohorts: Annotated[int, typer.Option(min=1, max=2, help="2: one is verified while the other is drafted")] = 1,
    prices: Annotated[Path | None, typer.Option(help="YAML of what devices cost and use")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG or SVG of the curves over the clients")] = None,
) -> None:
    """Simulate a deployment: throughput, latencies, drafters, energy and cost, before anything is bought."""
    from dflash_ray.commands.planning import run_plan

    run_plan(profile, workload, clients, policies, groups, draft_tokens, link_ms, cohorts, prices, plot)


@app.command()
def profile(
    config: ConfigOption = None,
    overrides: SetOption = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(help="JSON file; without, one in the cache for this machine and model")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="gRPC address of a server on this machine, to measure what serving adds")
    ] = None,
    server_http: Annotated[str, typer.Option(help="URL of that server")] = "http://127.0.0.1:8000",
) -> None:
    """Measure what the target's and the drafter's passes take on this machine, for `plan`."""
    from dflash_ray.commands.planning import run_profile

    run_profile(config, overrides, out, server, server_http)


kernels = typer.Typer(no_args_is_help=True, help="Compile the operators ahead of time, and look at the CUDA kernels.")
app.add_typer(kernels, name="kernels")


@kernels.command("build")
def kernels_build() -> None:
    """Compile the operators for this machine, or for that of $DFLASH_RAY_KERNEL_FLAGS, into the cache."""
    from dflash_ray.commands.kernels import run_build

    run_build()


@kernels.command("report")
def kernels_report(
    write: Annotated[bool, typer.Option(help="commit the figures to csrc/cuda/report.json")] = False,
) -> None:
    """Compile the CUDA kernels for every architecture and show registers, spills and shared memory."""
    from dflash_ray.commands.kernels import run_report

    run_report(write)


class TrainingStep(StrEnum):
    PROMPTS = "prompts"
    REGENERATE = "regenerate"
    CAPTURE = "capture"
    FIT = "fit"
    EVALUATE = "evaluate"
    EXPORT = "export"


@app.command()
def train(step: TrainingStep, config: RecipeOption = None, overrides: SetOption = []) -> None:  # noqa: B006
    """Run one step of training a drafter; a long step that was cut off goes on when it is run again.

    prompts: gather prompts from files, recorded traffic and the target itself.

    regenerate: let the target answer them, and keep its hidden states.

    capture: instead, keep its hidden states of conversations that it answered elsewhere.

    fit: train. evaluate: decode held-out prompts with the drafter. export: write it with its model card.
    """
    from dflash_ray.commands.training import run_step

    run_step(step, config, overrides)


if __name__ == "__main__":
    app()
