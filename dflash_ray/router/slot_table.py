"""The sequences that are on the target, as columns by slot.

A sequence has a slot from its admission until it ends or goes back to the queue. Whoever keeps slot numbers longer than
one call must be able to tell whether a slot is still the same sequence's: by `ids`, and an entry of a step by
`step_ids`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dflash_ray.core.arrays import Flags, Ints, Tokens, are_ones, spans
from dflash_ray.core.draft_blocks import BlockColumns, DraftBlock

if TYPE_CHECKING:
    from dflash_ray.router.sequence import RouterSequence

MAX_DRAFTS = 31  # of one sequence in a step
CHAIN = np.arange(MAX_DRAFTS)  # parents of drafts that follow each other
NO_DRAFT = -1  # draft_lens: none has come; 0 is one without tokens
NO_DRAFTER = -1
NEVER = np.inf
_NO_SLOTS: Ints = np.zeros(0, np.int64)


# Where a sequence is.
WAITING = 0  # not on the target; it has no slot
PREFILL = 1  # on the target, rows still to compute before it can decode
DECODE = 2

# Where the drafts of a step come from.
DRAFT_SOURCES = ("plain", "ngram", "remote", "colocated")
PLAIN, NGRAM, REMOTE, COLOCATED = range(len(DRAFT_SOURCES))


class SlotTable:
    """Columns [num_slots] unless said.

    Attributes:
        sequences: who has the slot.
        ids: their sequence ids; 0 in a free slot.
        streams, call_ids: where they came from.
        phases: WAITING (a free slot), PREFILL or DECODE.
        step_ids: the step in flight with this sequence in it, 0 when none is.
        ahead_ids: the step in flight behind that one with it, which counts on its tokens; 0 when none is.
        last_steps: the last step with it, in flight or done; who waited longest comes first.
        turns: order of admission, among sequences with the same last step.
        tokens: [num_slots, max_len] prompt and emitted tokens, the router's copy of the committed truth.
        committed_lens: how many of them there are.
        max_lens: at how many the sequence ends.
        num_prefilled: rows that the target says it has, while in PREFILL.
        num_cached: rows among them that it found computed.
        is_open: the target was sent the sequence.
        cohorts: 0 or 1; those of one cohort decode in the same steps.
        is_suspect: so many groups died over it that it runs alone.
        draft_tokens: drafts wanted a step; 0 is plain decoding.
        may_be_drafted: drafters may draft for it: the target makes context features of its rows.
        draft_lens: drafts for the next step, NO_DRAFT while none have come.
        drafts: [num_slots, MAX_DRAFTS] their tokens.
        draft_log_probs: [num_slots, MAX_DRAFTS] their drafter's own log-probabilities; nan where there are none.
        draft_parents: [num_slots, MAX_DRAFTS] which draft each follows: 0 is the anchor, k the k-th draft.
        has_trees: not all drafts that came were chains.
        draft_sources: place in DRAFT_SOURCES.
        num_asked: drafts that its drafter is asked for in this step; 0 when it is not asked.
        num_own: drafts that the group's own drafter was asked for behind the last step that had it.
        draft_deadlines: when the next step goes on without a drafter's draft; NEVER when none is waited for.
        is_draft_missed: the next step goes on without a drafter's draft.
        drawn: the block a draft comes from, by slot, when it was drawn from its probabilities.
        drafters: number of the drafter that serves it, or NO_DRAFTER.
        is_asking: its drafter is to draft for it and was not asked yet.
        held_rows: context rows that its drafter is known to hold, or was sent as tokens.
        num_cut_offs: times in a row that such rows were lost, with no draft since.
        temperatures, seeds, wants_distributions: of its draws, as drafters are told.
        asks_logprobs: log-probabilities come with its tokens.
        num_left: times that sequences have left a slot, or a step that was sent ahead.
    """

    def __init__(self, num_slots: int, max_len: int) -> None:
        self.num_slots, self.max_len = num_slots, max_len
        self.sequences: list[RouterSequence | None] = [None] * num_slots
        self.drawn: dict[int, DraftBlock] = {}
        self.ids = np.zeros(num_slots, np.int64)
        self.streams = np.zeros(num_slots, np.int64)
        self.call_ids = np.zeros(num_slots, np.uint64)
        self.phases = np.zeros(num_slots, np.int8)
        self.step_ids = np.zeros(num_slots, np.int64)
        self.ahead_ids = np.zeros(num_slots, np.int64)
        self.last_steps = np.zeros(num_slots, np.int64)
        self.turns = np.zeros(num_slots, np.int64)
        self.tokens = np.zeros((num_slots, max_len), np.uint32)
        self.committed_lens = np.zeros(num_slots, np.int64)
        self.max_lens = np.zeros(num_slots, np.int64)
        self.num_prefilled = np.zeros(num_slots, np.int64)
        self.num_cached = np.zeros(num_slots, np.int64)
        self.is_open = np.zeros(num_slots, np.bool_)
        self.cohorts = np.zeros(num_slots, np.int8)
        self.is_suspect = np.zeros(num_slots, np.bool_)
        self.draft_tokens = np.zeros(num_slots, np.int64)
        self.may_be_drafted = np.zeros(num_slots, np.bool_)
        self.draft_lens = np.full(num_slots, NO_DRAFT, np.int64)
        self.drafts = np.zeros((num_slots, MAX_DRAFTS), np.uint32)
        self.draft_log_probs = np.full((num_slots, MAX_DRAFTS), np.nan, np.float32)
        self.draft_parents = np.tile(CHAIN, (num_slots, 1))
        self.has_trees = False
        self.draft_sources = np.zeros(num_slots, np.int64)
        self.num_asked = np.zeros(num_slots, np.int64)
        self.num_own = np.zeros(num_slots, np.int64)
        self.draft_deadlines = np.full(num_slots, NEVER)
        self.is_draft_missed = np.zeros(num_slots, np.bool_)
        self.drafters = np.full(num_slots, NO_DRAFTER, np.int64)
        self.is_asking = np.zeros(num_slots, np.bool_)
        self.held_rows = np.zeros(num_slots, np.int64)
        self.num_cut_offs = np.zeros(num_slots, np.int64)
        self.temperatures = np.zeros(num_slots, np.float32)
        self.seeds = np.zeros(num_slots, np.uint64)
        self.wants_distributions = np.zeros(num_slots, np.bool_)
        self.asks_logprobs = np.zeros(num_slots, np.bool_)
        self.num_in_phase = [num_slots, 0, 0]
        self.num_in_cohort = [0, 0]
        self.num_left = 0
        self._free = list(range(num_slots))[::-1]
        self._next_turn = 1

    @property
    def num_running(self) -> int:
        """Slots in use."""
        return self.num_slots - len(self._free)

    def enter(self, sequence: RouterSequence, max_len: int, cohort: int, is_suspect: bool) -> int:
        """Gives a sequence a slot, in PREFILL; there must be a free one, and `max_len` is at most the table's."""
        slot = self._free.pop()
        tokens = sequence.tokens
        sampling = sequence.request.sampling
        self.sequences[slot] = sequence
        self.ids[slot] = sequence.sequence_id
        self.streams[slot] = sequence.stream
        self.call_ids[slot] = sequence.call_id
        self._move(slot, PREFILL)
        self.last_steps[slot] = sequence.last_step
        self.turns[slot] = self._next_turn
        self.tokens[slot, : len(tokens)] = tokens
        self.committed_lens[slot] = len(tokens)
        self.max_lens[slot] = max_len
        self.num_prefilled[slot] = self.num_cached[slot] = 0
        self.is_open[slot] = False
        self.num_own[slot] = 0
        self.cohorts[slot] = cohort
        self.is_suspect[slot] = is_suspect
        self.draft_tokens[slot] = sequence.draft_tokens
        self.may_be_drafted[slot] = sequence.draft_tokens > 0
        self.temperatures[slot] = sampling.temperature
        self.seeds[slot] = sampling.seed
        self.wants_distributions[slot] = sequence.wants_distribution
        self.asks_logprobs[slot] = sampling.HasField("num_logprobs")
        self.num_in_cohort[cohort] += 1
        self._next_turn += 1
        sequence.enter(self, slot)
        return slot

    def leave(self, slot: int) -> None:
        """Takes the slot from its sequence, whose tokens go with it."""
        sequence = self.sequence(slot)
        sequence.leave()
        self.forget_drafts(np.array([slot]))
        self.num_in_cohort[self.cohorts[slot]] -= 1
        self._move(slot, WAITING)
        self.num_left += 1
        self.sequences[slot] = None
        self.ids[slot] = self.step_ids[slot] = self.ahead_ids[slot] = 0
        self.leave_drafter(slot)
        self._free.append(slot)

    def _move(self, slot: int, phase: int) -> None:
        self.num_in_phase[self.phases[slot]] -= 1
        self.num_in_phase[phase] += 1
        self.phases[slot] = phase

    def sequence(self, slot: int) -> RouterSequence:
        """Who has a slot that is in use."""
        sequence = self.sequences[slot]
        assert sequence is not None
        return sequence

    def running(self) -> list[RouterSequence]:
        """All that have slots, in the order of their admission."""
        slots = self.ids.nonzero()[0]
        return [self.sequence(slot) for slot in slots[np.argsort(self.turns[slots])].tolist()]

    def decoding(self, cohort: int) -> Ints:
        """Slots of a cohort in DECODE."""
        is_its = self.phases == DECODE
        if self.num_in_cohort[1 - cohort]:
            is_its &= self.cohorts == cohort
        slots: Ints = is_its.nonzero()[0]
        return slots

    def prefilling(self) -> Ints:
        """Slots in PREFILL that are in no step."""
        if not self.num_in_phase[PREFILL]:
            return _NO_SLOTS
        slots: Ints = ((self.phases == PREFILL) & (self.step_ids == 0)).nonzero()[0]
        return slots

    def start_decoding(self, slots: Ints) -> None:
        """Prompts whose first token came."""
        self.phases[slots] = DECODE
        self.num_in_phase[PREFILL] -= len(slots)
        self.num_in_phase[DECODE] += len(slots)

    def end_step(self, slots: Ints, is_ok: Flags) -> None:
        """The step with these is answered: the one behind it is theirs now, unless it counts on what did not come."""
        ahead = self.ahead_ids[slots]
        if np.count_nonzero(is_ok) < len(slots):
            ahead = np.where(is_ok, ahead, 0)
            self.num_left += 1
        self.step_ids[slots] = ahead
        self.ahead_ids[slots] = 0

    def commit(self, slots: Ints, counts: Ints, token_ids: Tokens) -> None:
        """Appends counts[i] tokens to slots[i]; drafts were for those before them."""
        lens = self.committed_lens[slots]
        if are_ones(counts, len(token_ids)):
            self.tokens[slots, lens] = token_ids
        else:
            self.tokens.reshape(-1)[spans(slots * self.max_len + lens, counts)] = token_ids
        self.committed_lens[slots] = lens + counts
        self.forget_drafts(slots)

    def anchors(self, slots: Ints) -> Tokens:
        """The last token of each."""
        return self.tokens[slots, self.committed_lens[slots] - 1]

    def most_drafts(self, slots: Ints, num_coming: int = 0) -> Ints:
        """Drafts that can be of use in a step: one with k drafts can emit k + 1 tokens.

        `num_coming` tokens at least are committed before it.
        """
        left = self.max_lens[slots] - self.committed_lens[slots] - num_coming - 1
        most: Ints = np.maximum(0, np.minimum(self.draft_tokens[slots], left))
        return most

    def lacks_draft(self, slots: Ints) -> Flags:
        """Which of them decode, in no step, without a draft and not resigned to have none."""
        lacks: Flags = (self.phases[slots] == DECODE) & (self.step_ids[slots] == 0)
        lacks &= (self.draft_lens[slots] == NO_DRAFT) & ~self.is_draft_missed[slots]
        return lacks

    def take_blocks(self, slots: Ints, blocks: BlockColumns, is_taken: Flags, source: int, vocab_size: int) -> None:
        """The drafts of the blocks that are taken; slots[i] is block i's.

        A draft that the target does not have ends its chain or tree before it, as does one before its parent.
        What is beyond MAX_DRAFTS is left out.
        """
        taken = is_taken.nonzero()[0]
        slots = slots[taken]
        lens = np.minimum(blocks.num_slots[taken], MAX_DRAFTS)
        width = int(lens.max(initial=0))
        if width:
            places, is_there = blocks.draft_places(taken, width)
            token_ids = blocks.candidate_ids[places]
            is_wrong = is_there & (token_ids >= vocab_size)
            self.has_trees |= len(blocks.parents) > 0
            if self.has_trees:
                parents = blocks.parents_of(taken, width)
                is_wrong |= is_there & (parents > CHAIN[:width])
                self.draft_parents[slots, :width] = parents
            if np.count_nonzero(is_wrong):
                lens = np.where(is_wrong.any(axis=1), is_wrong.argmax(axis=1), lens)
            self.drafts[slots, :width] = token_ids
            log_probs = blocks.log_probs[places]
            log_probs[~is_there] = np.nan
            self.draft_log_probs[slots, :width] = log_probs
        self.draft_lens[slots] = lens
        self.draft_sources[slots] = source
        self.draft_deadlines[slots] = NEVER
        self.is_asking[slots] = False
        for place in blocks.is_drawn[taken].nonzero()[0].tolist():
            self.drawn[int(slots[place])] = blocks.block(int(taken[place]))

    def leave_drafter(self, slot: int) -> None:
        """No drafter holds anything of it."""
        self.drafters[slot] = NO_DRAFTER
        self.draft_deadlines[slot] = NEVER
        self.is_asking[slot] = False
        self.held_rows[slot] = self.num_cut_offs[slot] = 0

    def miss_drafts(self, slots: Ints) -> None:
        """The next step goes on without the drafts that were waited for."""
        self.draft_deadlines[slots] = NEVER
        self.is_draft_missed[slots] = True
        self.is_asking[slots] = False

    def forget_drafts(self, slots: Ints) -> None:
        """Nothing is known of a draft for the tokens that there are now."""
        self.draft_lens[slots] = NO_DRAFT
        self.draft_log_probs[slots] = np.nan
        self.draft_sources[slots] = PLAIN
        self.num_asked[slots] = 0
        self.draft_deadlines[slots] = NEVER
        self.is_draft_missed[slots] = False
        self.is_asking[slots] = False
        if self.drawn:
            for slot in slots.tolist():
                self.drawn.pop(slot, None)
