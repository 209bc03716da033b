"""Trees of drafts against chains at equal rows: acceptance lengths, and the processor's time for a token.

    python benchmarks/trees.py --limit 4 --tokens 96

Every answer is decoded with each kind of drafts over one engine with the drafter beside it; that all of them come to
the same tokens is checked. Times are the processor's in all threads, drafter and prompts included. With `--no-together`
there is one client, and its answers are decoded by all kinds in turns.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dflash_ray.config import load_config
from dflash_ray.core.stats import AcceptanceStats, merge
from dflash_ray.models.drafter_checkpoint import resolve_drafter
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.text.tokenizer import ChatTokenizer
from dflash_ray.training.config import EngineSection
from dflash_ray.training.decoding import DecodeRequest, local_decoder
from dflash_ray.training.left_out import LeftOut
from dflash_ray.training.prompt_files import read_prompts, tokens_of

_PROMPTS = Path(__file__).parent / "drafter_prompts.jsonl"


@dataclass(frozen=True, slots=True)
class Kind:
    """Drafts of a step."""

    num_drafts: int
    tree_width: int

    def __str__(self) -> str:
        return f"{'chain' if self.tree_width == 1 else 'tree'} of {self.num_drafts}"


def main(
    limit: Annotated[int, typer.Option(help="prompts of each category")] = 4,
    tokens: Annotated[int, typer.Option(help="tokens of an answer")] = 96,
    width: Annotated[int, typer.Option(help="drafts that follow the same one in a tree")] = 8,
    nodes: Annotated[list[int] | None, typer.Option(help="rows of drafts of the trees")] = None,
    temperature: Annotated[list[float] | None, typer.Option()] = None,
    together: Annotated[bool, typer.Option(help="decode all prompts in the same passes")] = True,
    threads: Annotated[int, typer.Option(help="of torch; 0 leaves its choice")] = 0,
) -> None:
    """Prints a line for each kind of drafts and temperature."""
    config = load_config(None)
    tokenizer = ChatTokenizer(config.model)
    drafter = resolve_drafter(config.drafter.path, resolve_target(config.model.path))
    prompts: dict[str, list[list[int]]] = defaultdict(list)
    for prompt in read_prompts(_PROMPTS, LeftOut()):
        if len(prompts[prompt.source]) < limit:
            prompts[prompt.source].append(tokens_of(prompt, tokenizer))
    longest = drafter.config.block_size - 1
    kinds = [Kind(longest, 1), *(Kind(count, width) for count in nodes or (longest, 15, 31))]
    head = ["T", "drafts", "all", "against the chain", *prompts, "ms a token", "tokens/s against the chain"]
    typer.echo("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    settings = EngineSection(num_threads=threads)
    sources = [source for source, own in prompts.items() for _ in own]
    requests = [(seed, ids) for seed, ids in enumerate(ids for own in prompts.values() for ids in own)]
    groups = [requests] if together else [[one] for one in requests]
    with local_decoder(config.model.path, settings, tokenizer.eos_ids, drafter=drafter) as decoder:
        for one in temperature or (0.0, 1.0):
            answers: dict[int, list[int]] = {}
            stats: dict[Kind, list[tuple[str, AcceptanceStats]]] = defaultdict(list)
            seconds: dict[Kind, float] = defaultdict(float)
            for group in groups:
                for kind in kinds:  # in turns, so that all of them meet the same machine
                    wanted = [
                        DecodeRequest(
                            ids, tokens, one, draft_tokens=kind.num_drafts, seed=seed, tree_width=kind.tree_width
                        )
                        for seed, ids in group
                    ]
                    started = time.process_time()
                    decoded = list(decoder.run(wanted))
                    seconds[kind] += time.process_time() - started
                    for place, answer in decoded:
                        seed = group[place][0]
                        assert answers.setdefault(seed, answer.token_ids) == answer.token_ids, (
                            "drafts changed an answer"
                        )
                        stats[kind].append((sources[seed], answer.stats))
            for kind in kinds:
                _show(one, kind, kinds[0], stats, seconds, list(prompts), sum(map(len, answers.values())))


def _show(
    temperature: float,
    kind: Kind,
    chain: Kind,
    stats: dict[Kind, list[tuple[str, AcceptanceStats]]],
    seconds: dict[Kind, float],
    sources: list[str],
    num_tokens: int,
) -> None:
    def length(kind: Kind, sources: list[str]) -> float:
        return merge([own for source, own in stats[kind] if source in sources]).acceptance_length

    own = length(kind, sources)
    cells = [f"{temperature:g}", str(kind), f"{own:.2f}", f"{own / length(chain, sources) - 1:+.1%}"]
    cells += [f"{length(kind, [source]):.2f}" for source in sources]
    cells += [f"{1000 * seconds[kind] / num_tokens:.1f}", f"{seconds[chain] / seconds[kind]:.2f}"]
    typer.echo("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    typer.run(main)
