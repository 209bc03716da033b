"""The drafter process: keeps context rows of sequences and answers draft requests over gRPC.

service.py is the Serve replica, servicer.py the stream, methods.py the ways of drafting, autoscaling.py the policy by
which Serve chooses the number of replicas.
"""
