"""Trains a DFlash drafter for a target on conversations that the target answered itself, step by step.

    prompts.py      gathers prompts (prompt_files.py, recorded_prompts.py)   -> prompts/*.jsonl
    regenerate.py   the target answers them (decoding.py)                    -> shards/*.parquet, with taps (shards.py)
    fit.py          trains: batches.py (tap_sources.py), objective.py (parallel.py, losses.py), trainer.py, curves.py
                                                                             -> fit/
    evaluate.py     decodes with the drafter, verified for real              -> evaluation/
    export.py       published layout and model card                          -> export.output_dir

Each step reads the files of the one before it and its section of config.py. Shards are whole or absent, so a step that
was cut off goes on when it is run again. `dflash-ray train --help`.
"""
