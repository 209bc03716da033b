"""The drafter process: keeps context rows of sequences and answers draft requests over gRPC.

service.py is the Serve replica, servicer.py the stream, dflash.py and ngram.py the ways of drafting, of which methods.py
takes the configured one, autoscaling.py the policy by which Serve chooses the number of replicas.
"""
