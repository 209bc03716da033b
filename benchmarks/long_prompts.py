"""Acceptance lengths after short and long prompts of one kind of text, decoded with the drafter inside the engine.

The text is this repository's own guides and code, cut into prompts that end at the same places, so that lengths differ
in what the drafter sees and not in what follows. Served with remote drafters the figures are the same unless drafts are
late.

    python benchmarks/long_prompts.py --lengths 200 1000 4000
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dflash_ray.config import BUILTIN_DRAFTER, BUILTIN_MODEL, ModelConfig
from dflash_ray.core.stats import merge
from dflash_ray.models.drafter_checkpoint import resolve_drafter
from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.text.tokenizer import ChatTokenizer
from dflash_ray.training.config import EngineSection
from dflash_ray.training.decoding import DecodeRequest, local_decoder

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("dflash_ray/gateway/*.py"), *ROOT.glob("dflash_ray/training/*.py")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default=BUILTIN_MODEL)
    parser.add_argument("--drafter", default=BUILTIN_DRAFTER)
    parser.add_argument("--lengths", type=int, nargs="+", default=[200, 1000, 4000])
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--draft-tokens", type=int, default=5)
    options = parser.parse_args()
    ids = ChatTokenizer(ModelConfig(path=options.target)).encode("\n\n".join(file.read_text() for file in FILES))
    longest = max(options.lengths)
    ends = [longest + k * (len(ids) - longest) // options.prompts for k in range(options.prompts)]
    room = longest + options.new_tokens + 64
    settings = EngineSection(max_model_len=room, kv_cache_tokens=4 * room, num_threads=torch.get_num_threads())
    drafter = resolve_drafter(options.drafter, resolve_target(options.target))
    with local_decoder(options.target, settings, drafter=drafter) as decoder:
        for length in options.lengths:
            requests = [
                DecodeRequest(ids[end - length : end], options.new_tokens, draft_tokens=options.draft_tokens)
                for end in ends
            ]
            stats = merge([decoded.stats for _, decoded in decoder.run(requests)])
            print(f"{length:6} tokens: acceptance length {stats.acceptance_length:.2f} ({stats.num_steps} passes)")


if __name__ == "__main__":
    main()
