"""Random workloads in the simulator: `adaptive` against plain decoding, step by step and until the last answer ends.

    nice python benchmarks/random_workloads.py --seeds 0:1000 --out seeds.jsonl

Results go to a file as they come, and seeds that are in it are not run again. "Step by step" is the time of all steps
over that of plain ones for the same tokens in the same batches. Prints figures; asserts nothing.
"""

from __future__ import annotations

import json
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from dflash_ray.simulator.deployment import Deployment
from dflash_ray.simulator.profile import Profile, Times
from dflash_ray.simulator.simulation import simulate
from dflash_ray.simulator.workload import Category, Workload

MOST_LOSS = 1.02
SMALL = Profile(
    name="small",
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


def random_workload(seed: int) -> tuple[Workload, int]:
    """A workload and a number of drafters."""
    draw = random.Random(seed)

    def category() -> Category:
        return Category(
            prompt_tokens=draw.randint(4, 400),
            output_tokens=draw.randint(4, 200),
            spread=draw.random(),
            acceptance=tuple(draw.random() for _ in range(draw.randint(1, 6))),
            frankness=draw.random(),
            share=draw.uniform(0.1, 1),
        )

    categories = {name: category() for name in draw.sample("abc", draw.randint(1, 3))}
    load = Workload(clients=draw.randint(1, 24), requests=24, categories=categories, seed=seed)
    return load, draw.choice([0, 1, 2])


def run(seed: int) -> dict[str, float]:
    """Both policies at one workload."""
    load, num_drafters = random_workload(seed)
    adaptive = simulate(Deployment(SMALL, "adaptive", num_drafters), load)
    plain = simulate(Deployment(SMALL, "off", num_drafters), load)
    return {
        "seed": seed,
        "stepwise": adaptive.seconds / adaptive.plain_seconds,
        "makespan": adaptive.seconds / plain.seconds,
        "answers": float(adaptive.last_token.sum() / plain.last_token.sum()),
    }


def main(
    seeds: Annotated[str, typer.Option(help="FIRST:LAST, the latter left out")] = "0:1000",
    out: Annotated[Path, typer.Option(help="JSON lines")] = Path("seeds.jsonl"),
    processes: int = 1,
) -> None:
    first, last = map(int, seeds.split(":"))
    known = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    wanted = sorted(set(range(first, last)) - {one["seed"] for one in known})
    with ProcessPoolExecutor(processes) as pool, out.open("a", buffering=1) as file:
        for result in pool.map(run, wanted):
            known.append(result)
            file.write(json.dumps(result) + "\n")
    typer.echo("| | mean | worst (seed) | over 1.02 |\n|---|---|---|---|")
    for name in ("stepwise", "makespan", "answers"):
        values = np.array([one[name] for one in known])
        worst = known[int(np.argmax(values))]["seed"]
        over = int(np.count_nonzero(values > MOST_LOSS))
        typer.echo(f"| {name} | {values.mean():.3f} | {values.max():.3f} ({worst}) | {over} of {len(values)} |")
    typer.echo(f"over {MOST_LOSS} step by step: {sorted(o['seed'] for o in known if o['stepwise'] > MOST_LOSS)}")


if __name__ == "__main__":
    typer.run(main)
