"""`prompts`: gathers prompts from files, traffic and the target itself, and splits them.

Near-duplicates are left out, so that none is on both sides of the split.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator

from datasketch import MinHash, MinHashLSH
from tqdm import tqdm

from dflash_ray.config import ConfigError, ModelConfig
from dflash_ray.core.files import write_text
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.text.tokenizer import ChatTokenizer
from dflash_ray.training.config import SelfGeneratedSection, TrainingConfig
from dflash_ray.training.decoding import BatchDecoder, DecodeRequest, local_decoder
from dflash_ray.training.left_out import LeftOut
from dflash_ray.training.prompt_files import Prompt, read_prompts, write_prompts
from dflash_ray.training.recorded_prompts import recorded_prompts

_PIECE_PROMPTS = 128  # a run that was cut off loses at most these
_SEED_STRIDE = 1_000_003
_SHINGLE_CHARACTERS = 5
_PERMUTATIONS = 64  # the estimate of a similarity is off by about 1 / sqrt(64)


def gather_prompts(config: TrainingConfig, left_out: LeftOut) -> tuple[int, int]:
    """Writes train.jsonl and held_out.jsonl. Returns the numbers of prompts to train on and held out.

    Raises ConfigError when no source is configured, ValueError when none of them holds a prompt.
    """
    section = config.prompts
    if not section.files and section.traffic is None and section.self_generated is None:
        raise ConfigError("prompts: give at least one of files, traffic and self_generated")
    prompts = [
        prompt for path in section.files for prompt in _some(read_prompts(path, left_out), section.prompts_per_file)
    ]
    if section.traffic is not None:
        prompts += recorded_prompts(section.traffic, left_out)
    if section.self_generated is not None:
        prompts += self_generated_prompts(config, section.self_generated, left_out)
    if not prompts:
        raise ValueError(f"prompts: nothing is left; {left_out.text or 'the sources hold no prompt'}")
    similarity = section.near_duplicate_similarity
    kept = prompts if similarity is None else list(without_near_duplicates(prompts, similarity))
    held_out = [prompt for prompt in kept if prompt.is_held_out(section.held_out_fraction)]
    train = [prompt for prompt in kept if not prompt.is_held_out(section.held_out_fraction)]
    # In this order a kill in between leaves nothing held out that `fit`, which splits by itself, would train on.
    write_prompts(config.prompts_dir / "held_out.jsonl", held_out)
    write_prompts(config.prompts_dir / "train.jsonl", train)
    counts = Counter(prompt.source for prompt in kept)
    lines = [f"{source}\t{count}\n" for source, count in sorted(counts.items())]
    write_text(config.prompts_dir / "sources.tsv", "".join(lines))
    return len(train), len(held_out)


def _some(prompts: list[Prompt], count: int | None) -> list[Prompt]:
    """A sample that does not change from run to run."""
    return prompts if count is None else sorted(prompts, key=lambda prompt: prompt.order)[:count]


def without_near_duplicates(prompts: Iterable[Prompt], similarity: float) -> Iterator[Prompt]:
    """The first of each group of prompts whose estimated Jaccard similarity reaches `similarity`."""
    index = MinHashLSH(threshold=similarity, num_perm=_PERMUTATIONS)
    for number, prompt in enumerate(prompts):
        signature = MinHash(num_perm=_PERMUTATIONS)
        signature.update_batch(_shingles(" ".join(message["content"] for message in prompt.messages)))
        if not index.query(signature):
            index.insert(str(number), signature)
            yield prompt


def _shingles(text: str) -> list[bytes]:
    """Runs of characters, case and spacing ignored."""
    plain = " ".join(text.lower().split())
    last = max(1, len(plain) - _SHINGLE_CHARACTERS + 1)
    return [plain[i : i + _SHINGLE_CHARACTERS].encode() for i in range(last)]


def self_generated_prompts(config: TrainingConfig, section: SelfGeneratedSection, left_out: LeftOut) -> list[Prompt]:
    """User turns that the target writes after its own chat prefix (Magpie, arXiv 2406.08464), some after a stem.

    They are kept piece by piece, so a run that was cut off goes on with the pieces that are missing.
    """
    settings = f"{section.model_dump_json()} {config.seed} {resolve_target(config.target).fingerprint}"
    directory = config.prompts_dir / f"self_generated-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    starts = range(0, section.num_prompts, _PIECE_PROMPTS)
    pieces = {start: directory / f"{start:07d}.jsonl" for start in starts}
    missing = [start for start, path in pieces.items() if not path.exists()]
    if missing:
        tokenizer = ChatTokenizer(ModelConfig(path=config.target))
        with local_decoder(config.target, config.engine, tokenizer.eos_ids) as decoder:
            for start in tqdm(missing, desc="self-generated prompts", unit="piece"):
                numbers = range(start, min(start + _PIECE_PROMPTS, section.num_prompts))
                write_prompts(pieces[start], _write_piece(config.seed, section, tokenizer, decoder, numbers))
    return [prompt for path in pieces.values() if path.stat().st_size for prompt in read_prompts(path, left_out)]


def _write_piece(
    seed: int, section: SelfGeneratedSection, tokenizer: ChatTokenizer, decoder: BatchDecoder, numbers: range
) -> list[Prompt]:
    """Prompts with the given numbers, without those that did not end by themselves."""
    prefix, end_of_turn = user_turn(tokenizer)
    stems = ["", *section.stems]
    beginnings = [stems[number % len(stems)] for number in numbers]
    requests = [
        DecodeRequest(
            [*prefix, *tokenizer.encode(stem)],
            section.max_new_tokens,
            section.temperature,
            section.top_p,
            seed=seed * _SEED_STRIDE + number,
        )
        for stem, number in zip(beginnings, numbers, strict=True)
    ]
    written: dict[int, Prompt] = {}
    for index, decoded in decoder.run(requests, stop_ids=[end_of_turn]):
        stem = beginnings[index]
        text = (stem + tokenizer.decode(decoded.token_ids)).strip()
        if decoded.is_stopped and len(text) > len(stem):
            source = f"self: {' '.join(stem.split())}" if stem else "self"
            written[index] = Prompt([{"role": "user", "content": text}], source)
    return [written[index] for index in sorted(written)]


def user_turn(tokenizer: ChatTokenizer) -> tuple[list[int], int]:
    """Tokens before a user's first words, and the token that ends the turn, whatever the chat template is.

    Found by comparing chats that differ in their content alone.
    """
    one, other = (tokenizer.encode_chat([{"role": "user", "content": content}]) for content in ("0", "A"))
    if one == other:
        raise ValueError("target: its chat template leaves out what a user says")
    start = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    shared = next(i for i, (a, b) in enumerate(zip(one[::-1], other[::-1], strict=False)) if a != b)
    if not shared:
        raise ValueError("target: its chat template does not end a user's turn with a token of its own")
    return one[:start], one[len(one) - shared]
