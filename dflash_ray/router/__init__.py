"""The router: admits requests, batches them into target steps, and gets drafts for them in time. CPU only, no torch.

servicer.py takes requests from gateways, fleet.py knows drafters and leased target groups, pipeline.py is the I/O
around one group, scheduler.py the policy without any I/O, sequence.py the state of one request.
"""
