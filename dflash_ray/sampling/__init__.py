"""The target's law and the lossless verification of drafts, over a vocabulary that may be split over ranks.

plan.py says what is wanted of each row, columns.py turns it into what the operators read, verify.py decides which
drafts stay and which token follows, shards.py carries a few numbers between ranks, noise.py gives drafters the target's
noise.
"""
