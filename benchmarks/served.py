"""A running server on a file of prompts: speculation off and on in turns, by category of prompts.

    dflash-ray serve --config deployments/local_cpu.yaml
    python benchmarks/served.py --prompts benchmarks/drafter_prompts.jsonl

Answers are greedy and must be equal, token for token. Prints figures; asserts nothing.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dflash_ray.commands.client import Answer, stream_answer
from dflash_ray.training.left_out import LeftOut
from dflash_ray.training.prompt_files import Prompt, read_prompts


@dataclass
class Total:
    """Of one category: decoded tokens, passes and seconds, with speculation and without, and answers that differ."""

    tokens: int = 0
    passes: int = 0
    seconds_on: float = 0.0
    seconds_off: float = 0.0
    different: int = 0

    def add(self, off: Answer, on: Answer) -> None:
        self.tokens += len(on.token_ids) - 1
        self.passes += on.metrics.num_spec_steps
        self.seconds_on += on.seconds
        self.seconds_off += off.seconds
        self.different += on.token_ids != off.token_ids


def main(
    prompts: Annotated[Path, typer.Option(help="JSONL with prompt or messages, and source")],
    address: Annotated[str, typer.Option(help="gRPC address")] = "127.0.0.1:9000",
    max_tokens: int = 64,
    per_category: int = 20,
) -> None:
    chosen: dict[str, list[Prompt]] = defaultdict(list)
    left_out = LeftOut()
    for prompt in read_prompts(prompts, left_out):
        if len(chosen[prompt.source]) < per_category:
            chosen[prompt.source].append(prompt)
    typer.echo(left_out.text, err=True)
    totals: dict[str, Total] = defaultdict(Total)
    for number in range(per_category):  # categories in turn: a slow minute is nobody's alone
        for source, members in chosen.items():
            for prompt in members[number : number + 1]:
                messages = [(message["role"], message["content"]) for message in prompt.messages]
                off, on = (
                    stream_answer(address, messages, policy, max_tokens, 0.0, None, show=False)
                    for policy in ("off", "fixed")
                )
                for key in (source, "all"):
                    totals[key].add(off, on)
    typer.echo("| prompts | acceptance length | tokens/s, off | on | ratio | answers that differ |")
    typer.echo("|---|---|---|---|---|---|")
    for source, total in sorted(totals.items()):
        off, on = (total.tokens / max(seconds, 1e-9) for seconds in (total.seconds_off, total.seconds_on))
        length = total.tokens / max(total.passes, 1)
        typer.echo(f"| {source} | {length:.2f} | {off:.1f} | {on:.1f} | {on / off:.2f} | {total.different} |")


if __name__ == "__main__":
    typer.run(main)
