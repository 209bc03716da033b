"""The target group: a tensor-parallel model, its paged KV cache and the committed tokens, behind the Target service.

In the order of a step: servicer.py takes it from the stream, engine.py turns it into one ragged pass (batch.py) over
the sequences' pages (sequences.py, page_allocator.py), runner.py has every rank run it, model.py through
lean_decoder.py (or transformers' layers with attention.py) over paged_cache.py, and sampling/ decides. worker.py is a
rank's actor, group.py holds the ranks together, replica.py is the Serve replica that keeps a group alive.
"""
