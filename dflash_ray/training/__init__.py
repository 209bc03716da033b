"""Trains a DFlash drafter for a target on conversations that the target answered itself.

dataset.py reads conversations, capture.py stores the target's taps, parallel.py runs many draft blocks in one pass,
trainer.py fits, evaluate.py measures the acceptance length by decoding. `python -m dflash_ray.training --help`.
"""
