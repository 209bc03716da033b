"""`python -m dflash_ray.training CONFIG`: capture the taps that are missing, fit, export."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dflash_ray.models.target_checkpoint import resolve_target
from dflash_ray.training.capture import TapStore, capture
from dflash_ray.training.config import load_training_config
from dflash_ray.training.dataset import draft_vocabulary, read_conversations, split_held_out
from dflash_ray.training.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a DFlash drafter; a run that was cut off goes on.")
    parser.add_argument("config", type=Path)
    config = load_training_config(parser.parse_args().config)
    torch.set_num_threads(config.num_threads)
    target = resolve_target(config.target)
    conversations = read_conversations(config.conversations, target.load_tokenizer(), config.max_length)
    train, held_out = split_held_out(conversations, config.held_out_fraction)
    print(f"{len(train)} conversations to train on, {len(held_out)} held out", flush=True)
    config.work_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, target, draft_vocabulary(train, config.draft_vocab_size, target.config.vocab_size))
    width = len(config.tap_layer_ids) * target.config.hidden_size
    store = TapStore(config.work_dir / "taps.bf16", [len(c.token_ids) for c in train], width)
    model = target.load_model(torch.bfloat16 if config.bf16 else torch.float32).model
    indices = list(range(len(train)))
    capture(model, config.tap_layer_ids, train, indices, store, lambda done, of: print(f"taps {done}/{of}", flush=True))
    del model
    trainer.fit(train, indices, store)
    trainer.export(config.output_dir)


if __name__ == "__main__":
    main()
