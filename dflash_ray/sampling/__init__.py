"""The target's law and the lossless verification of drafts, over a vocabulary that may be split over ranks.

noise.py draws position-keyed noise, plan.py says what is wanted of each row, processors.py applies the sampling
parameters, verify.py decides which drafts stay and which token follows, shards.py carries a few numbers between ranks.
"""
