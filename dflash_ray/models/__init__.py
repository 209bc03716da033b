"""Weights and networks that more than one process needs: the target's checkpoint, the drafters and theirs.

drafter_config.py and drafter_checkpoint.py read every published layout into one shape. dflash.py and dflash2.py are the
networks as they are trained; block_drafter.py runs them for many sequences, with the fused weights of packed_layer.py.
No Ray and no gRPC here: the drafter process and, colocated, the target's rank 0 run the same BlockDrafter.
"""
