"""How the rows of one target pass are shared out, and the message that says so. Sans-IO, a part of the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, takewhile

from dflash_ray.config import RouterConfig
from dflash_ray.pb import target_pb2
from dflash_ray.router.limits import TargetLimits
from dflash_ray.router.sequence import RouterSequence

_PREFILL_SHARE = 4  # one row in so many is prompts' where prompts wait


def build_step(
    step_id: int,
    limits: TargetLimits,
    config: RouterConfig,
    decoding: Sequence[RouterSequence],
    prefilling: Sequence[RouterSequence],
) -> tuple[target_pb2.Step, list[RouterSequence]]:
    """A step of chains and prompts' chunks, and the sequences in it; who was left out of the last ones comes first."""
    step = target_pb2.Step(step_id=step_id, epoch=limits.epoch, num_candidates=config.num_candidates)
    decoding = sorted(decoding, key=lambda sequence: sequence.last_step)
    prefilling = sorted(prefilling, key=lambda sequence: sequence.last_step)
    reserved = min(config.prefill_chunk_tokens, limits.max_batch_tokens // _PREFILL_SHARE) if prefilling else 0
    wanted = [min(s.num_drafts(limits.max_model_len), len(s.draft or ())) for s in decoding]
    counts = draft_rows(wanted, limits.max_batch_tokens - reserved)
    entries = list(decoding[: len(counts)])
    for sequence, count in zip(entries, counts, strict=True):
        _add_chain(step, sequence, count, limits.vocab_size)
    room = limits.max_batch_tokens - len(step.verify_ids) - len(step.draft_token_ids)
    for sequence in prefilling:
        count = min(sequence.committed_len - sequence.num_prefilled, config.prefill_chunk_tokens, room)
        if count:
            _add_chunk(step, sequence, count)
            entries.append(sequence)
            room -= count
    for sequence in entries if limits.colocated_draft_tokens else ():
        if sequence.draft_tokens:
            step.colocated_draft_ids.append(sequence.sequence_id)
            step.colocated_num_drafts.append(min(sequence.draft_tokens, limits.colocated_draft_tokens))
    return step, entries


def draft_rows(wanted: Sequence[int], room: int) -> list[int]:
    """Drafts of each chain: all get an anchor's row before any gets a draft's. A chain without a row has no count."""
    chains = wanted[:room]
    room -= len(chains)
    counts = []
    for want in chains:
        counts.append(min(want, room))
        room -= counts[-1]
    return counts


def _add_chain(step: target_pb2.Step, sequence: RouterSequence, count: int, vocab_size: int) -> None:
    """Adds a verify entry with at most `count` of the sequence's drafts."""
    # A draft that the target does not have ends the chain before it.
    in_vocabulary = takewhile(lambda token: token < vocab_size, sequence.draft or [])
    sequence.draft = list(islice(in_vocabulary, count))
    step.verify_ids.append(sequence.sequence_id)
    step.base_lens.append(sequence.committed_len)
    step.num_drafts.append(len(sequence.draft))
    step.draft_token_ids.extend(sequence.draft)
    step.draft_parents.extend(range(len(sequence.draft)))
    step.num_draft_candidates.append(sequence.drawn.candidate_ids.shape[1] if sequence.drawn is not None else 0)
    if sequence.drawn is not None:
        step.draft_candidate_ids.extend(sequence.drawn.candidate_ids[: len(sequence.draft)].ravel().tolist())
        step.draft_log_probs.extend(sequence.drawn.log_probs[: len(sequence.draft)].ravel().tolist())


def _add_chunk(step: target_pb2.Step, sequence: RouterSequence, count: int) -> None:
    """Adds the next `count` rows of a prompt; the first chunk brings the whole sequence."""
    if not sequence.is_open:
        step.open.append(sequence.open_message())
        sequence.is_open = True
    step.prefill_ids.append(sequence.sequence_id)
    step.prefill_lens.append(count)
    sequence.rows_in_step = count
