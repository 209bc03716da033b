"""`regenerate` and `capture`: shards of conversations that the target answered, with its taps from the same passes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dflash_ray.config import ConfigError, ModelConfig
from dflash_ray.core.files import write_text
from dflash_ray.models.target_checkpoint import TargetCheckpoint, resolve_target
from dflash_ray.text.tokenizer import ChatTokenizer
from dflash_ray.training.config import TrainingConfig
from dflash_ray.training.decoding import BatchDecoder, DecodeRequest, local_decoder
from dflash_ray.training.left_out import BadRow, LeftOut
from dflash_ray.training.prompt_files import Prompt, default_source, prompt_of, read_jsonl, read_prompts, tokens_of
from dflash_ray.training.shards import Answered, TapLayout, count_shard, write_shard

_PLAN = "plan.json"
_SHORTEST_ANSWER = 3  # two tokens train something, and one more may be drawn behind a known answer


@dataclass(frozen=True)
class Task:
    """A prompt to answer, or a conversation whose answer is known and which only lacks its taps."""

    prompt: Prompt
    temperature: float
    answer: list[int] | None = None


def regenerate(config: TrainingConfig, left_out: LeftOut) -> int:
    """Answers the prompts of `prompts`, held-out ones too (for curves). Returns the number of shards.

    Sources are mixed, so that the first shards are already a sample of them all.
    """
    temperatures = config.regenerate.temperatures
    prompts = [
        prompt
        for name in ("train.jsonl", "held_out.jsonl")
        if (path := config.prompts_dir / name).is_file() and path.stat().st_size
        for prompt in read_prompts(path, left_out)
    ]
    if not prompts:
        raise ValueError(f"{config.prompts_dir}: there are no prompts; run `dflash-ray train prompts` first")
    prompts.sort(key=lambda prompt: prompt.order)
    tasks = [Task(p, temperatures[p.digest % len(temperatures)]) for p in prompts]
    return fill_shards(config, tasks, left_out)


def capture(config: TrainingConfig, left_out: LeftOut) -> int:
    """Makes shards of conversations that were answered elsewhere; the target runs for their taps alone.

    Returns the number of shards.
    """
    if not config.capture.conversations:
        raise ConfigError("capture.conversations: give JSONL files with prompt, response_ids, source, temperature")
    vocab_size = resolve_target(config.target).config.vocab_size
    tasks = []
    for path in config.capture.conversations:
        for place, record in read_jsonl(path, left_out):
            try:
                tasks.append(_answered_task(record, place, default_source(path), vocab_size))
            except BadRow as bad:
                left_out.add(place, bad)
    if not tasks:
        raise ValueError(f"capture.conversations: nothing is left; {left_out.text}")
    return fill_shards(config, tasks, left_out)


def _answered_task(record: dict[str, Any], place: str, source: str, vocab_size: int) -> Task:
    answer, temperature = record.get("response_ids"), record.get("temperature", 0.0)
    is_answer = isinstance(answer, list) and all(type(t) is int and 0 <= t < vocab_size for t in answer)
    if not is_answer or not answer:
        raise BadRow(f"without response_ids, the answer's token ids, each below {vocab_size}")
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not is_number or not 0 <= temperature < math.inf:
        raise BadRow("whose temperature is no number from 0 on")
    return Task(prompt_of(record, place, source), float(temperature), answer)


def fill_shards(config: TrainingConfig, tasks: Sequence[Task], left_out: LeftOut) -> int:
    """Writes the shards that are missing; returns how many there are then.

    Raises ValueError when the directory holds shards of other tasks or settings, or when nothing is left of the tasks,
    DiskFullError when there is no room.
    """
    _claim(config, tasks)
    size = config.regenerate.shard_conversations
    pieces = {
        config.shards_dir / f"{number:05d}.parquet": tasks[start : start + size]
        for number, start in enumerate(range(0, len(tasks), size))
    }
    missing = {path: piece for path, piece in pieces.items() if not path.exists()}
    with tqdm(total=len(tasks), desc="conversations", unit="conversation") as bar:
        bar.update(len(tasks) - sum(map(len, missing.values())))
        run = _over_cluster if config.regenerate.num_workers > 1 else _in_process
        for count in run(config, missing):
            bar.update(count)
    if not sum([count_shard(path, left_out) for path in pieces]):
        for path in (*pieces, config.shards_dir / _PLAN):
            path.unlink()
        raise ValueError(f"{config.shards_dir}: nothing is left; {left_out.text}")
    return len(pieces)


def _claim(config: TrainingConfig, tasks: Sequence[Task]) -> None:
    """Records what the shards are made of.

    Raises ValueError for layers or a mask token that the target lacks, and for a directory begun with something else.
    """
    settings = config.regenerate.model_dump_json(exclude={"num_workers", "cpus_per_worker", "gpus_per_worker"})
    digest = hashlib.sha256(settings.encode())
    for task in tasks:
        digest.update(f"{task.prompt.digest} {task.prompt.source} {task.temperature} {task.answer}".encode())
    target = resolve_target(config.target)
    config.drafter.check_target(target.config.num_hidden_layers, target.config.vocab_size)
    plan = {
        "target": target.fingerprint,
        "tap_layer_ids": list(config.drafter.tap_layer_ids),
        "seed": config.seed,
        "dtype": config.engine.dtype,
        "prompts_and_settings": digest.hexdigest(),
    }
    file = config.shards_dir / _PLAN
    if not file.exists():
        write_text(file, json.dumps(plan, indent=2) + "\n")
    elif (old := json.loads(file.read_text())) != plan:
        changed = [key for key in plan if old.get(key) != plan[key]]
        raise ValueError(f"{config.shards_dir}: was begun with other {', '.join(changed)}; use another work_dir")


class ShardWorker:
    """The target in one process, answering whole shards."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self._tokenizer = ChatTokenizer(ModelConfig(path=config.target))
        target = resolve_target(config.target)
        longest = config.regenerate.max_length
        self._max_length = min(longest, self._tokenizer.context_length or longest)
        self._layout = TapLayout(target.fingerprint, _layers_to_store(config, target), target.config.hidden_size)
        self._resources = ExitStack()

    @cached_property
    def _decoder(self) -> BatchDecoder:
        """The engine, once something is to be answered or tapped."""
        config = self._config
        decoder = local_decoder(config.target, config.engine, self._tokenizer.eos_ids, self._layout.layer_ids)
        return self._resources.enter_context(decoder)

    def close(self) -> None:
        self._resources.close()

    def write(self, path: Path, tasks: Sequence[Task]) -> None:
        """Answers the tasks and writes them as one shard, in their order; says in it what was left out and why."""
        left_out = LeftOut()
        fitting: list[tuple[Task, list[int]]] = []
        for task in tasks:
            try:
                fitting.append((task, self._encode(task.prompt)))
            except BadRow as bad:
                left_out.add(task.prompt.place, bad)
        answered: dict[int, Answered] = {}
        for index, answer, taps in self._answers(fitting, left_out):
            task, prompt = fitting[index]
            if taps is not None and not torch.isfinite(taps).all():
                left_out.add(task.prompt.place, f"on which the target overflows in {self._config.engine.dtype}")
                continue
            answered[index] = Answered(task.prompt, task.temperature, len(prompt), [*prompt, *answer], taps)
        write_shard(path, self._layout, [answered[index] for index in sorted(answered)], left_out.rows)

    def _encode(self, prompt: Prompt) -> list[int]:
        """Tokens up to the assistant's turn. Raises BadRow when there are too many."""
        token_ids = tokens_of(prompt, self._tokenizer)
        if len(token_ids) > self._max_length - _SHORTEST_ANSWER:
            raise BadRow(f"too long for answers within {self._max_length} tokens (regenerate.max_length)")
        return token_ids

    def _answers(
        self, fitting: Sequence[tuple[Task, list[int]]], left_out: LeftOut
    ) -> Iterator[tuple[int, list[int], Tensor | None]]:
        """Index, answer and taps of tasks with their prompts' tokens, as they are done."""
        running: list[int] = []
        for index, (task, prompt) in enumerate(fitting):
            if task.answer is None or self._layout.layer_ids:
                running.append(index)
            else:
                yield index, self._cut(task.answer, prompt), None
        if not running:
            return
        for number, decoded in self._decoder.run([self._request(*fitting[index]) for index in running]):
            task, prompt = fitting[running[number]]
            if decoded.error:
                left_out.add(task.prompt.place, f"given up by the target: {decoded.error}")
                continue
            # A known answer is all prefill: the token drawn after it is not part of the conversation.
            answer = decoded.token_ids if task.answer is None else self._cut(task.answer, prompt)
            taps = None if decoded.taps is None else decoded.taps[: len(prompt) + len(answer) - 1]
            yield running[number], answer, taps

    def _cut(self, answer: list[int], prompt: list[int]) -> list[int]:
        """The part of a known answer that is kept; a place is left for the token that the engine draws after it."""
        return answer[: self._max_length - len(prompt) - 1]

    def _request(self, task: Task, prompt: list[int]) -> DecodeRequest:
        wants_taps = bool(self._layout.layer_ids)
        if task.answer is not None:
            return DecodeRequest([*prompt, *self._cut(task.answer, prompt)], 1, wants_taps=wants_taps)
        count = min(self._config.regenerate.max_new_tokens, self._max_length - len(prompt))
        seed = task.prompt.digest ^ self._config.seed
        return DecodeRequest(prompt, count, task.temperature, seed=seed, wants_taps=wants_taps)


def _layers_to_store(config: TrainingConfig, target: TargetCheckpoint) -> tuple[int, ...]:
    layer_ids, last = config.drafter.tap_layer_ids, target.config.num_hidden_layers - 1
    if not config.regenerate.with_taps:
        return ()
    return (*layer_ids, last) if config.regenerate.with_last_layer and last not in layer_ids else layer_ids


def _in_process(config: TrainingConfig, missing: dict[Path, Sequence[Task]]) -> Iterator[int]:
    """Writes shard by shard; yields the number of tasks of each."""
    if not missing:
        return
    worker = ShardWorker(config)
    try:
        for path, tasks in missing.items():
            worker.write(path, tasks)
            yield len(tasks)
    finally:
        worker.close()


class _ShardMap:
    """A Ray Data actor: one row in, one shard written to the shared work_dir, its number of tasks out.

    What the user has to put right comes back as the row's `error`: Ray would bury it in a trace of its own.
    """

    def __init__(self, config: TrainingConfig, missing: dict[str, Sequence[Task]]) -> None:
        self._worker = ShardWorker(config)
        self._missing = missing

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        tasks = self._missing[row["path"]]
        try:
            self._worker.write(Path(row["path"]), tasks)
        except ValueError as error:
            return {"count": 0, "error": str(error)}
        return {"count": len(tasks), "error": ""}


def _over_cluster(config: TrainingConfig, missing: dict[Path, Sequence[Task]]) -> Iterator[int]:
    """Spreads the missing shards over a pool of Ray actors. All nodes must see the work_dir."""
    import ray

    from dflash_ray.training.cluster import cluster

    if not missing:
        return
    section = config.regenerate
    absolute = {str(path.resolve()): tasks for path, tasks in missing.items()}
    with cluster():
        rows = ray.data.from_items([{"path": path} for path in absolute], override_num_blocks=len(absolute))
        done = rows.map(
            _ShardMap,  # type: ignore[arg-type] # a class is one actor's function
            fn_constructor_args=(config.with_absolute_paths(), absolute),
            num_cpus=section.cpus_per_worker,
            num_gpus=section.gpus_per_worker or None,
            compute=ray.data.ActorPoolStrategy(size=section.num_workers),
        )
        for row in done.iter_rows():
            if row["error"]:
                raise ValueError(row["error"])
            yield row["count"]
