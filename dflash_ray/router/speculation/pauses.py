"""When plain steps are measured, when speculation rests, and when it is tried again.

Drafts have an allowance, in plain steps' time: what they save is added to it, with a small part of all time, and what
they lose is taken from it. So all in all they lose next to nothing; where they find nothing they are tried rarely,
whatever sequences come, and where one sequence in a few gains much the others are tried as well.
"""

from __future__ import annotations

from dflash_ray.router.speculation.records import Reason

_COLD_SHARE = 0.004  # of all steps may be plain because such a batch is new,
_MOST_COLD = 6.0  # and so many at the start
_PROBE_SHARE = 0.006  # of all time may be lost by plain steps where drafts promise more
_LEAST_PROBE = 0.1  # of a step; where a plain step loses next to nothing, one in ten is one
_PLAIN_TIMES = 3  # of a batch that are needed before anything is speculated in it
_TRIAL_SHARE = 0.004  # of all time is allowed for drafts in vain,
_FIRST_ALLOWANCE = 3.0  # and so many plain steps' time at the start
_MOST_ALLOWANCE = 16.0  # of what was saved long ago nothing more may be lost
_FEATURE_RENT = 0.06  # of a step, paid from the allowance by a plain one that makes features for which nobody asks,
_LEFT_BY_RENT = 0.5  # down to so much of it
_NEW_PRICE = 1.0  # allowance for a trial where a sequence is new, of whose text nothing is known;
_OLD_PRICE = 2.0  # and where all have been tried
_NO_HOPE_PRICE = 1.0  # so that a load at which nothing can pay is not looked at over and over
_NO_HOPE_FOR = 1024  # steps, in which sequences that come to such a load, or a higher one, get no context features
_TRIAL_STEPS = 3  # a step whose drafts are all wrong counts twice
_PAUSE = 24  # steps after a trial of the same sequences, or once the account forbids drafts that are wanted
_SETTLED = 8
_LOOK_AGAIN = 4  # steps after which the choice is made anew while nothing pays,
_LOOK_SELDOM = 8  # and where nothing has paid for long
_LONG = 64
_EXPECTED_FOR = 16  # steps without drafts, after which drafters need not have the rows of the sequences
_NOTICE = 3  # steps that drafters are given to get them again
_LIFE = 256  # tokens that an answer is thought to have at most, where its limit is higher
ANY_LOAD = 1 << 30  # sequences: more than there ever are


class Pauses:
    """Counts steps and what they save; knows nothing of what they do."""

    def __init__(self) -> None:
        self._cold = _MOST_COLD
        self._probes = 0.0
        self._num_steps = 0
        self._quiet = 0  # steps without drafts that no rest forbade
        self._allowance = _FIRST_ALLOWANCE
        self._trial_left = 0
        self._has_new = False  # a sequence came since drafts were last tried
        self._rests_until = 0
        self._drafted_at = 0
        self._ready_at = 0
        self._hopeless_from = ANY_LOAD  # sequences in a batch
        self._hopeless_until = 0
        self.is_gaining = False

    def opened(self) -> None:
        """A sequence came, whose drafts may be better than those of the others."""
        self._has_new = True

    @property
    def is_resting(self) -> bool:
        return self._num_steps < self._rests_until or self._allowance <= 0

    @property
    def expects_drafts(self) -> bool:
        """Whether drafts were asked for lately, or are about to be."""
        return self._num_steps < self._drafted_at + _EXPECTED_FOR

    def may_want(self, num_tokens: int, num_sequences: int) -> bool:
        """Whether drafts may be wanted for a sequence that comes now, before it has so many more tokens.

        `num_sequences` are in the batch then.
        """
        if num_sequences >= self._hopeless_from and self._num_steps < self._hopeless_until:
            return False
        steps = max(self._rests_until - self._num_steps, (_NEW_PRICE - self._allowance) / _TRIAL_SHARE)
        return self.expects_drafts or steps < min(num_tokens, _LIFE)

    def may_draft(self) -> bool:
        """Whether drafters have the rows of the sequences; if they don't, they are to get them from now on."""
        if not self.expects_drafts:
            self._drafted_at = self._num_steps
            self._ready_at = self._num_steps + _NOTICE
        return self._num_steps >= self._ready_at

    @property
    def is_trial_due(self) -> bool:
        if self._trial_left:
            return True
        if self._has_new:
            return self._allowance >= _NEW_PRICE
        return self._quiet >= _PAUSE and self._allowance >= _OLD_PRICE

    def no_hope(self, num_sequences: int) -> None:
        """Not even what a trial hopes for would pay, with so many sequences in the batch, or more."""
        if self._num_steps >= self._hopeless_until:
            self._hopeless_from = ANY_LOAD
        self._hopeless_from = min(self._hopeless_from, num_sequences)
        self._hopeless_until = self._num_steps + _NO_HOPE_FOR
        self._trial_left, self._has_new = 0, False
        self._quiet = min(self._quiet, _SETTLED + 1)
        self._allowance -= _NO_HOPE_PRICE

    def has_hope(self, num_sequences: int) -> None:
        """Drafts may pay, or do, with so many sequences in the batch."""
        self._hopeless_from = max(self._hopeless_from, num_sequences + 1)

    @property
    def is_settled(self) -> bool:
        """Whether nothing has paid for a while: the choice is then made anew now and then only."""
        every = _LOOK_AGAIN if self._quiet <= _LONG else _LOOK_SELDOM
        return self._quiet > _SETTLED and self._quiet % every != 0 and not self.is_trial_due

    def is_dull(self, reason: Reason) -> bool:
        """Whether a plain step of that reason is one of many."""
        return reason == Reason.REST or (reason == Reason.NO_GAIN and self._quiet > _SETTLED)

    def is_cold(self, num_plain: int) -> bool:
        """Whether the step must be plain because too few like it were timed; then it counts as one."""
        if num_plain >= _PLAIN_TIMES or self._cold < 1.0:
            return False
        self._cold -= 1.0
        return True

    def probes(self, gain: float) -> bool:
        """Whether the step is to be plain to be timed, where drafts promise `gain` times as much."""
        cost = max(_LEAST_PROBE, 1.0 - 1.0 / gain)
        if self._probes < cost:
            return False
        self._probes -= cost
        return True

    def rest(self) -> None:
        """The allowed loss is spent."""
        self._rests_until = self._num_steps + _PAUSE

    def step_done(
        self, reason: Reason, is_drafted: bool, has_hit: bool, saved: float, makes_features: bool = False
    ) -> None:
        """A step went as it was planned.

        Args:
            is_drafted: a drafter was asked.
            has_hit: a draft was accepted.
            saved: time against plain decoding, in plain steps.
            makes_features: of sequences that may be drafted for.
        """
        self._num_steps += 1
        self._cold = min(_MOST_COLD, self._cold + _COLD_SHARE)
        self._probes = min(1.0, self._probes + _PROBE_SHARE)
        self._allowance = min(_MOST_ALLOWANCE, self._allowance + _TRIAL_SHARE + saved)
        if makes_features and not is_drafted and reason in (Reason.NO_GAIN, Reason.REST):
            self._allowance = max(min(self._allowance, _LEFT_BY_RENT), self._allowance - _FEATURE_RENT)
        if is_drafted:
            self._drafted_at = self._num_steps
            self._quiet, self._has_new = 0, False
        elif reason == Reason.NO_GAIN:
            self._quiet += 1
        self.is_gaining = reason in (Reason.GAIN, Reason.PROBE) and (self.is_gaining or is_drafted)
        if reason == Reason.TRIAL:
            self._trial_left = max(0, (self._trial_left or _TRIAL_STEPS) - (1 if has_hit else 2))
        elif reason == Reason.GAIN:
            self._trial_left = 0
