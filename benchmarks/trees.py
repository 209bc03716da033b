"""Trees of drafts against chains at equal rows: acceptance lengths, and the processor's time for a token.

    python benchmarks/trees.py --limit 4 --tokens 96

Every answer is decoded with each kind of drafts over one engine with the drafter beside it; that all of them come to
the same tokens is checked. Times are those of all threads, drafter and prompts included.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dflash_ray.config import load_config
from dflash_ray.core.stats import merge
from dflash_ray.models.drafter_checkpoint import resolve_drafter
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.text.tokenizer import ChatTokenizer
from dflash_ray.training.config import EngineSection
from dflash_ray.training.decoding import BatchDecoder, Decoded, DecodeRequest, local_decoder
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
    head = ["T", "drafts", "all", "against the chain", *prompts, "ms a token"]
    typer.echo("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    settings = EngineSection(num_threads=threads)
    sources = [source for source, own in prompts.items() for _ in own]
    with local_decoder(config.model.path, settings, tokenizer.eos_ids, drafter=drafter) as decoder:
        for one in temperature or (0.0, 1.0):
            answers: dict[int, dict[int, list[int]]] = {}
            chain = 0.0
            for kind in kinds:
                requests = [
                    DecodeRequest(ids, tokens, one, draft_tokens=kind.num_drafts, seed=seed, tree_width=kind.tree_width)
                    for seed, ids in enumerate(ids for own in prompts.values() for ids in own)
                ]
                started = time.process_time()
                decoded = _decode(decoder, requests, together)
                seconds = time.process_time() - started
                found = {index: answer.token_ids for index, answer in decoded.items()}
                assert answers.setdefault(0, found) == found, "drafts changed an answer"
                stats = {
                    source: merge([decoded[index].stats for index, of in enumerate(sources) if of == source])
                    for source in prompts
                }
                length = merge(list(stats.values())).acceptance_length
                chain = chain or length
                cells = [f"{one:g}", str(kind), f"{length:.2f}", f"{length / chain - 1:+.1%}"]
                cells += [f"{stats[source].acceptance_length:.2f}" for source in prompts]
                cells.append(f"{1000 * seconds / sum(map(len, found.values())):.1f}")
                typer.echo("| " + " | ".join(cells) + " |")


def _decode(decoder: BatchDecoder, requests: list[DecodeRequest], together: bool) -> dict[int, Decoded]:
    """Results by place in `requests`."""
    if together:
        return dict(decoder.run(requests))
    return {index: decoded for index, one in enumerate(requests) for _, decoded in decoder.run([one])}


if __name__ == "__main__":
    typer.run(main)
