"""Trees of drafts against chains at equal rows: acceptance lengths and milliseconds a pass, over one engine.

    python benchmarks/trees.py --limit 4 --tokens 96

Every answer is decoded with each kind of drafts, one sequence at a time; that all of them come to the same tokens is
checked. Times are medians of a step's parts: pass and verdict, and the drafter.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from dflash_ray.config import load_config
from dflash_ray.core.draft_blocks import DraftBlock
from dflash_ray.models.drafter_checkpoint import resolve_drafter
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.sampling.parameters import SamplingParams
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.step import Drafts, EntryStatus, Opening, StepInput, StepOutput, chain_parents
from dflash_ray.text.tokenizer import ChatTokenizer
from dflash_ray.training.config import EngineSection
from dflash_ray.training.decoding import local_engine
from dflash_ray.training.left_out import LeftOut
from dflash_ray.training.prompt_files import read_prompts, tokens_of

_PROMPTS = Path(__file__).parent / "drafter_prompts.jsonl"
_SEQUENCE = np.array([1], dtype=np.uint64)


@dataclass(slots=True)
class Measured:
    """Of one category: steps, tokens they committed, and milliseconds of their passes and drafts."""

    num_steps: int = 0
    num_tokens: int = 0
    pass_ms: list[float] = field(default_factory=list)
    draft_ms: list[float] = field(default_factory=list)

    @property
    def length(self) -> float:
        return self.num_tokens / max(1, self.num_steps)


@dataclass(frozen=True, slots=True)
class Kind:
    """Drafts of a step."""

    num_drafts: int
    tree_width: int

    def __str__(self) -> str:
        return f"chain of {self.num_drafts}" if self.tree_width == 1 else f"tree of {self.num_drafts}"


def main(
    limit: Annotated[int, typer.Option(help="prompts of each category")] = 4,
    tokens: Annotated[int, typer.Option(help="tokens of an answer")] = 96,
    width: Annotated[int, typer.Option(help="drafts that follow the same one in a tree")] = 8,
    nodes: Annotated[list[int] | None, typer.Option(help="rows of drafts")] = None,
    temperature: Annotated[list[float] | None, typer.Option()] = None,
    threads: Annotated[int, typer.Option(help="of torch; 0 leaves its choice")] = 0,
) -> None:
    """Prints a line for each kind of drafts and temperature."""
    config = load_config(None)
    settings = EngineSection(num_threads=threads)
    drafter = resolve_drafter(config.drafter.path, resolve_target(config.model.path))
    tokenizer = ChatTokenizer(config.model)
    prompts: dict[str, list[list[int]]] = defaultdict(list)
    for prompt in read_prompts(_PROMPTS, LeftOut()):
        if len(prompts[prompt.source]) < limit:
            prompts[prompt.source].append(tokens_of(prompt, tokenizer))
    longest = drafter.config.block_size - 1
    kinds = [Kind(longest, 1), *(Kind(count, width) for count in nodes or (longest, 15, 31))]
    head = ["T", "drafts", "all", "against the chain", *prompts, "pass, ms", "draft, ms"]
    typer.echo("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    with local_engine(config.model.path, settings, drafter=drafter) as (engine, _):
        for one in temperature or (0.0, 1.0):
            answers: dict[tuple[str, int], list[int]] = {}
            chain = 0.0
            for kind in kinds:
                found = {source: Measured() for source in prompts}
                for source, own in prompts.items():
                    for index, prompt in enumerate(own):
                        answer = _decode(engine, prompt, tokens, one, index, kind, tokenizer.eos_ids, found[source])
                        assert answers.setdefault((source, index), answer) == answer, "drafts changed an answer"
                total = _total(found.values())
                chain = chain or total.length
                cells = [f"{one:g}", str(kind), f"{total.length:.2f}", f"{total.length / chain - 1:+.1%}"]
                cells += [f"{measured.length:.2f}" for measured in found.values()]
                cells += [f"{statistics.median(times):.1f}" for times in (total.pass_ms, total.draft_ms)]
                typer.echo("| " + " | ".join(cells) + " |")


def _total(parts) -> Measured:
    total = Measured()
    for part in parts:
        total.num_steps += part.num_steps
        total.num_tokens += part.num_tokens
        total.pass_ms += part.pass_ms
        total.draft_ms += part.draft_ms
    return total


def _decode(
    engine: Engine,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    kind: Kind,
    stop_ids: frozenset[int],
    measured: Measured,
) -> list[int]:
    """Decodes an answer and adds what its steps showed; the prompt's own pass is not among them."""
    tokens = list(prompt)
    for output in _steps(engine, prompt, max_new_tokens, temperature, seed, kind, stop_ids):
        assert output.statuses.tolist() == [EntryStatus.OK], output.errors
        if len(tokens) > len(prompt):
            measured.num_steps += 1
            measured.num_tokens += int(output.num_tokens[0])
            measured.pass_ms.append((output.forward_ns + output.verify_ns) / 1e6)
            measured.draft_ms.append(output.draft_ns / 1e6)
        tokens += output.token_ids.tolist()
    engine.close([1])
    return tokens[len(prompt) :]


def _steps(
    engine: Engine,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    kind: Kind,
    stop_ids: frozenset[int],
) -> Iterator[StepOutput]:
    opening = Opening(
        sequence_id=1,
        token_ids=np.array(prompt),
        prompt_len=len(prompt),
        max_new_tokens=max_new_tokens,
        stop_ids=np.array(sorted(stop_ids)),
        sampling=SamplingParams(temperature=temperature, seed=seed),
        wants_features=True,
    )
    drafting = {
        "draft_ids": _SEQUENCE,
        "draft_counts": np.array([kind.num_drafts]),
        "tree_width": kind.tree_width,
    }
    output = engine.step(
        StepInput(open=[opening], prefill_ids=_SEQUENCE, prefill_lens=np.array([len(prompt)]), **drafting)
    )
    length = len(prompt)
    yield output
    while not output.finishes[0]:
        length += int(output.num_tokens[0])
        drafts = _drafts(output.colocated_drafts, len(prompt) + max_new_tokens - length - 1)
        step = StepInput(verify_ids=_SEQUENCE, base_lens=np.array([length]), drafts=drafts, **drafting)
        output = engine.step(step)
        yield output


def _drafts(blocks: list[DraftBlock], most: int) -> Drafts:
    """The drafts of a step's only sequence."""
    ids = np.array(blocks[0].draft_ids[:most] if blocks else [], dtype=np.int64)
    counts = np.array([len(ids)])
    parents = blocks[0].parents if blocks else None
    return Drafts(counts, ids, chain_parents(counts) if parents is None else np.asarray(parents)[: len(ids)])


if __name__ == "__main__":
    typer.run(main)
