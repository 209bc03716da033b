"""The target's law and the lossless verification of drafts, over a vocabulary that may be split over ranks.

parameters.py says how a sequence is drawn, table.py keeps that in the sequence's slot as the operators read it,
columns.py gathers a step's part of it, verify.py decides which drafts stay and which token follows, ranks.py carries a
few numbers between ranks, noise.py gives drafters the target's noise.
"""
