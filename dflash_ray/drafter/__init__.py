"""The drafter process: keeps context rows of sequences and answers draft requests over gRPC.

replica.py is the Serve replica, servicer.py the stream; feature_sources.py, arrivals.py and sessions.py take context
features in, drafts.py answers. dflash.py and ngram.py are the ways of drafting, methods.py takes the configured one;
autoscaling.py is the policy by which Serve chooses the number of replicas.
"""
