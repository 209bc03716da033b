"""The chance that drafts are accepted: by sequence and slot, by what the drafter says of them, and of n-grams.

A chance is always that of draft k given that the drafts before it were accepted; `survival` multiplies them up. Only
drafts on which a pass gave judgement count: the accepted ones and the first that was not. The first that was left out
for what its drafter said, behind accepted ones only, counts for its slot with the chance that it had: else a slot would
be known by its best drafts alone.
"""

from __future__ import annotations

import numpy as np

from dflash_ray.core.arrays import Flags, Ints
from dflash_ray.core.ngram import MAX_NGRAM, MIN_NGRAM
from dflash_ray.router.speculation.records import Floats
from dflash_ray.router.speculation.trees import by_depth, depths_of, judged_nodes, survival_from

_FADE = 0.85  # of a sequence's older observations, with each newer one of that slot
_SHARED_FADE = 0.99  # of all sequences together
_SHARED_WEIGHT = 3.0  # observations that the shared rate stands for in a sequence of its own
_SHARED_WEIGHT_FADE = 0.93  # of them, with each of its own: one that fails at length is not taken for the others,
_LEAST_SHARED_WEIGHT = 1.5  # down to so many
_SHARED_START = 8.0  # observations that the start stands for
_START = 0.6
_FORGET = 0.97  # of a sequence's observations with each step in which nothing was drafted for it
# A draft's log-probability, in bins of probability; where nothing was observed yet a bin is right a little less often
# than its middle says.
_BIN_EDGES = np.log([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
_BIN_START = 0.9 * np.array([0.03, 0.08, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.93, 0.97, 0.99])
_DEPTHS = 3  # slots with bins of their own: the first, the second, all others
_BIAS_FADE = 0.95
_BIAS_WEIGHT = 4.0
# An n-gram by the length of its match, measured on SmolLM2's greedy answers; for each next token that is longer by one.
_NGRAM_START = np.array([0.0, 0.3, 0.5, 0.69, 0.74, 0.88])
_NGRAM_WEIGHT = 16.0
_SURELY_NOT = 0.003
_RELIABILITY_BINS = 10
_INDEX = np.arange(64)  # of drafts, as many as one ever has


class Acceptance:
    """Rates of all slots of a target group, and what they share.

    Args:
        num_slots: sequences at a time.
        max_drafts: drafts of a block at most.
    """

    def __init__(self, num_slots: int, max_drafts: int) -> None:
        self.max_drafts = max_drafts
        self._right = np.zeros((num_slots, max_drafts))
        self._seen = np.zeros((num_slots, max_drafts))
        self._prior = np.full((num_slots, max_drafts), _SHARED_WEIGHT)
        start = np.full(max_drafts, _START)
        self._shared_right, self._shared_seen = start * _SHARED_START, np.full(max_drafts, _SHARED_START)
        self._bin_seen = np.full((_DEPTHS, len(_BIN_START)), _SHARED_START)
        self._bin_right = self._bin_seen * _BIN_START
        self._said = np.zeros(num_slots)  # what the bins expected of a sequence's drafts,
        self._held = np.zeros(num_slots)  # and what came of them
        self._judged = np.zeros(num_slots)
        matches = np.minimum(np.arange(MAX_NGRAM + 1)[:, None] + np.arange(max_drafts)[None], MAX_NGRAM)
        self._ngram_seen = np.full((MAX_NGRAM + 1, max_drafts), _NGRAM_WEIGHT)
        self._ngram_right = self._ngram_seen * _NGRAM_START[matches]
        self._reliability = np.zeros((3, _RELIABILITY_BINS))  # judged, expected, accepted
        # What was asked since the last change, by the slots; a step asks the same several times.
        self._known_rates: dict[bytes, Floats] = {}
        self._known_survival: dict[bytes, Floats] = {}
        self._said_by_bins = self._certain_bins()

    def open(self, slot: int) -> None:
        """Another sequence has the slot."""
        self._forget_known()
        for rates in (self._right, self._seen, self._said, self._held, self._judged):
            rates[slot] = 0.0
        self._prior[slot] = _SHARED_WEIGHT

    def survival(self, slots: Ints) -> Floats:
        """[n, max_drafts]: the chance that a drafter's drafts up to each are accepted, before they are drafted."""
        key = slots.tobytes()
        survival = self._known_survival.get(key)
        if survival is None:
            survival = self._known_survival[key] = np.multiply.accumulate(self._rates(slots), axis=1)
        return survival

    def _rates(self, slots: Ints) -> Floats:
        key = slots.tobytes()
        rates = self._known_rates.get(key)
        if rates is None:
            shared, prior = self._shared_right / self._shared_seen, self._prior[slots]
            rates = (self._right[slots] + prior * shared) / (self._seen[slots] + prior)
            self._known_rates[key] = rates
        return rates

    def _forget_known(self) -> None:
        self._known_rates.clear()
        self._known_survival.clear()

    def survival_of(self, slots: Ints, log_probs: Floats, parents: Ints | None = None) -> Floats:
        """[n, k]: the same for drafts whose log-probabilities [n, k] the drafter gave; nan where it gave none.

        With `parents` [n, k] they are trees.
        """
        return survival_from(self.rates_of(slots, log_probs, parents), parents)

    def rates_of(self, slots: Ints, log_probs: Floats, parents: Ints | None = None) -> Floats:
        """[n, k]: the same chances, given that the drafts before each were accepted."""
        count = log_probs.shape[1]
        usual, is_unknown = self._rates(slots)[:, :count], np.isnan(log_probs)
        num_unknown = np.count_nonzero(is_unknown)
        if num_unknown == log_probs.size:
            return usual
        bins = _BIN_EDGES.searchsorted(log_probs)  # nan lies behind all of them
        depths = np.minimum(_INDEX[:count] if parents is None else depths_of(parents), _DEPTHS - 1)
        said = self._said_by_bins[depths, np.minimum(bins, len(_BIN_START) - 1)]
        odds = said / (1.0 - said) * self._bias(slots)[:, None]
        rates: Floats = odds / (1.0 + odds)
        return np.where(is_unknown, usual, rates) if num_unknown else rates

    def _certain_bins(self) -> Floats:
        said: Floats = np.clip(self._bin_right / self._bin_seen, _SURELY_NOT, 1 - _SURELY_NOT)
        return said

    def _bias(self, slots: Ints) -> Floats:
        """By how much the odds of a sequence's drafts are better than the bins say."""
        said, held, judged = self._said[slots], self._held[slots], self._judged[slots]
        weight = _BIAS_WEIGHT
        bias: Floats = (held + weight) / (said + weight) * (judged - said + weight) / (judged - held + weight)
        return bias

    def ngram_survival(self, match_lens: Ints, counts: Ints) -> Floats:
        """[n, max_drafts]: the chance of `counts` drafts after matches of such lengths; 0 behind them."""
        rates: Floats = (self._ngram_right / self._ngram_seen)[match_lens]
        chances = np.where(_INDEX[: self.max_drafts] < counts[:, None], rates, 0.0)
        survival: Floats = np.multiply.accumulate(chances, axis=1)
        return survival

    def saw_trees(
        self,
        slots: Ints,
        counts: Ints,
        is_accepted: Flags,
        log_probs: Floats,
        parents: Ints,
        rates: Floats | None = None,
    ) -> None:
        """Takes verdicts on trees: the first `counts` drafts were verified, those of `is_accepted` [n, k] kept.

        `rates` are those that were expected, of `rates_of`, where they are known already.
        """
        depths = depths_of(parents)
        judged = judged_nodes(parents, counts, is_accepted)
        rates = self.rates_of(slots, log_probs, parents) if rates is None else rates
        self._judge_forecast(judged, is_accepted, rates)
        # What a sequence is known for is how deep its drafts are right.
        self._saw_slots(slots, by_depth(judged, depths), by_depth(is_accepted, depths))
        self._saw_bins(slots, judged & ~np.isnan(log_probs), is_accepted, log_probs, depths)

    def saw_drafts(
        self, slots: Ints, counts: Ints, accepted: Ints, log_probs: Floats, rates: Floats | None = None
    ) -> None:
        """Takes verdicts on drafters' drafts: `counts` verified and the first `accepted` kept; log_probs [n, k].

        Of drafts that were not verified the log-probabilities may be there too. `rates` are those that were
        expected, of `rates_of`, where they are known already.
        """
        width = log_probs.shape[1]
        judged, right = _verdicts(counts, accepted, width)
        rates = self.rates_of(slots, log_probs) if rates is None else rates
        self._judge_forecast(judged, right, rates)
        left_out = (_INDEX[:width] == counts[:, None]) & (accepted == counts)[:, None] & ~np.isnan(log_probs)
        self._saw_slots(slots, judged | left_out, np.where(left_out, rates, right))
        self._saw_bins(slots, judged & ~np.isnan(log_probs), right, log_probs, _INDEX[None, :width])

    def _saw_slots(self, slots: Ints, judged: Flags, right: Flags | Floats) -> None:
        self._forget_known()
        width = judged.shape[1]
        fade = np.where(judged, _FADE, 1.0)
        self._right[slots, :width] = self._right[slots, :width] * fade + right
        self._seen[slots, :width] = self._seen[slots, :width] * fade + judged
        fade = np.where(judged, _SHARED_WEIGHT_FADE, 1.0)
        self._prior[slots, :width] = np.maximum(_LEAST_SHARED_WEIGHT, self._prior[slots, :width] * fade)
        num_judged = np.add.reduce(judged, axis=0)
        fade = _SHARED_FADE**num_judged
        self._shared_right[:width] = self._shared_right[:width] * fade + np.add.reduce(right, axis=0)
        self._shared_seen[:width] = self._shared_seen[:width] * fade + num_judged

    def _saw_bins(self, slots: Ints, judged: Flags, right: Flags, log_probs: Floats, depths: Ints) -> None:
        rows, columns = np.nonzero(judged)
        if not len(rows):
            return
        of_rows = 0 if len(depths) == 1 else rows  # one line stands for all where they are chains
        depths = np.minimum(depths[of_rows, columns], _DEPTHS - 1)
        bins = _BIN_EDGES.searchsorted(log_probs[rows, columns])
        said = self._said_by_bins[depths, bins]
        held = right[rows, columns]
        observe(self._bin_seen, self._bin_right, depths * len(_BIN_START) + bins, held, _SHARED_FADE)
        self._said_by_bins = self._certain_bins()
        for totals, values in ((self._said, said), (self._held, held), (self._judged, np.ones(len(rows)))):
            totals[slots] = totals[slots] * _BIAS_FADE + np.bincount(rows, values, minlength=len(slots))

    def saw_ngrams(self, match_lens: Ints, counts: Ints, accepted: Ints) -> None:
        """Takes verdicts on n-grams, sent or looked up only: `counts` tokens, the first `accepted` as they came."""
        judged, right = _verdicts(counts, accepted, self.max_drafts)
        self._judge_forecast(judged, right, (self._ngram_right / self._ngram_seen)[match_lens])
        for match_len in range(MIN_NGRAM, MAX_NGRAM + 1):
            members = match_lens == match_len
            if not members.any():
                continue
            num_judged = judged[members].sum(axis=0)
            fade = _SHARED_FADE**num_judged
            self._ngram_seen[match_len] = self._ngram_seen[match_len] * fade + num_judged
            self._ngram_right[match_len] = self._ngram_right[match_len] * fade + right[members].sum(axis=0)

    def rested(self, slots: Ints, num_steps: int = 1) -> None:
        """Nothing was drafted for these: what is known of them fades into what is known of all."""
        self._forget_known()
        left = _FORGET**num_steps
        self._right[slots] *= left
        self._seen[slots] *= left
        self._prior[slots] += (1.0 - left) * (_SHARED_WEIGHT - self._prior[slots])

    def _judge_forecast(self, judged: Flags, right: Flags, expected: Floats) -> None:
        """Keeps the account of how often drafts with such a chance were accepted."""
        chances = expected[judged]
        bins = np.minimum((chances * _RELIABILITY_BINS).astype(int), _RELIABILITY_BINS - 1)
        self._reliability *= 0.999 ** len(chances)
        self._reliability[0] += np.bincount(bins, minlength=_RELIABILITY_BINS)
        self._reliability[1] += np.bincount(bins, chances, minlength=_RELIABILITY_BINS)
        self._reliability[2] += np.bincount(bins, right[judged], minlength=_RELIABILITY_BINS)

    @property
    def calibration_error(self) -> float:
        """Mean distance between the chance that drafts were given and the share that was accepted, lately."""
        judged, expected, accepted = self._reliability
        return float(np.abs(expected - accepted).sum() / max(1.0, judged.sum()))


def observe(seen: Floats, right: Floats, cells: Ints, held: Flags, fade: float) -> None:
    """Takes observations into tables of what was seen and what of it was right, whose older ones fade with each.

    Args:
        cells: [n], the place in the tables of each observation, counted through all their dimensions.
        held: [n] whether it was right.
    """
    count = np.bincount(cells, minlength=seen.size).reshape(seen.shape)
    kept = np.bincount(cells, held, minlength=seen.size).reshape(seen.shape)
    left = fade**count
    seen[:] = seen * left + count
    right[:] = right * left + kept


def _verdicts(counts: Ints, accepted: Ints, width: int) -> tuple[Flags, Flags]:
    """Which drafts [n, width] were judged, and which of them were right."""
    index = _INDEX[:width]
    right = index < np.minimum(accepted, counts)[:, None]
    judged = (index <= accepted[:, None]) & (index < counts[:, None])
    return judged, right
