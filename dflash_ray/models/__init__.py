"""Weights and networks that more than one process needs: the target's checkpoint, the DFlash network, its checkpoint.

No Ray and no gRPC here: the drafter process and, colocated, the target's rank 0 run the same BlockDrafter.
"""
