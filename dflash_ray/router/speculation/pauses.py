"""When plain steps are measured, when speculation rests, and when it is tried again."""

from __future__ import annotations

from dflash_ray.router.speculation.records import Reason

_COLD_SHARE = 0.004  # of all steps may be plain because such a batch is new,
_MOST_COLD = 6.0  # and so many at the start
_PROBE_SHARE = 0.006  # of all time may be lost by plain steps where drafts promise more
_LEAST_PROBE = 0.1  # of a step; where a plain step loses next to nothing, one in ten is one
_PLAIN_TIMES = 3  # of a batch that are needed before anything is speculated in it
_TRIAL_STEPS = 3  # a step whose drafts are all wrong counts twice
_FIRST_PAUSE = 24  # steps without drafts before a trial, doubled with each trial in vain
_LONGEST_PAUSE = 4096
_FRESH = 16  # times sooner a trial is due where a sequence is new, of whose text nothing is known
_SETTLED = 8
_LOOK_AGAIN = 4  # steps after which the choice is made anew while nothing pays
_EXPECTED_FOR = 16  # steps without drafts, after which drafters need not have the rows of the sequences
_NOTICE = 3  # steps that drafters are given to get them again
_CONFIRMED = 4.0  # plain steps' time saved, after which the next pause is short again


class Pauses:
    """Counts steps; knows nothing of what they do."""

    def __init__(self) -> None:
        self._cold = _MOST_COLD
        self._probes = 0.0
        self._num_steps = 0
        self._quiet = 0  # steps without drafters' drafts that no rest forbade
        self._pause = _FIRST_PAUSE
        self._trial_left = 0
        self._has_new = False  # a sequence came since drafts were last tried
        self._rest_began = -_LONGEST_PAUSE
        self._has_drafted = False  # since the last pause
        self._saved = 0.0
        self._drafted_at = 0
        self._ready_at = 0
        self.is_gaining = False

    def opened(self) -> None:
        """A sequence came, whose drafts may be better than those of the others."""
        self._has_new = True

    def _is_over(self, num_steps: int) -> bool:
        """Whether a pause is, after so many steps."""
        return num_steps * (_FRESH if self._has_new else 1) >= self._pause

    @property
    def is_resting(self) -> bool:
        return not self._is_over(self._num_steps - self._rest_began)

    @property
    def expects_drafts(self) -> bool:
        """Whether drafts were asked for lately, or are about to be."""
        return self._num_steps < self._drafted_at + _EXPECTED_FOR

    def may_draft(self) -> bool:
        """Whether drafters have the rows of the sequences; if they don't, they are to get them from now on."""
        if not self.expects_drafts:
            self._drafted_at = self._num_steps
            self._ready_at = self._num_steps + _NOTICE
        return self._num_steps >= self._ready_at

    @property
    def is_trial_due(self) -> bool:
        return self._trial_left > 0 or self._is_over(self._quiet)

    def no_hope(self) -> None:
        """Not even what a trial hopes for would pay: the next one is due a pause later."""
        self._quiet, self._trial_left, self._has_new = 0, 0, False

    @property
    def is_settled(self) -> bool:
        """Whether nothing has paid for a while: the choice is then made anew now and then only."""
        return self._quiet > _SETTLED and self._quiet % _LOOK_AGAIN != 0 and not self.is_trial_due

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
        self._rest_began, self._has_new = self._num_steps, False
        if self._has_drafted:
            self._lengthen()

    def _lengthen(self) -> None:
        self._pause = min(_LONGEST_PAUSE, 2 * self._pause)
        self._has_drafted, self._saved = False, 0.0

    def step_done(self, reason: Reason, is_drafted: bool, has_hit: bool, saved: float) -> None:
        """A step went as it was planned.

        Args:
            is_drafted: a drafter was asked.
            has_hit: a draft was accepted.
            saved: time against plain decoding, in plain steps.
        """
        self._num_steps += 1
        if is_drafted:
            self._drafted_at = self._num_steps
        self._cold = min(_MOST_COLD, self._cold + _COLD_SHARE)
        self._probes = min(1.0, self._probes + _PROBE_SHARE)
        self.is_gaining = reason in (Reason.GAIN, Reason.PROBE) and (self.is_gaining or is_drafted)
        if reason == Reason.TRIAL:
            self._has_new = False
            self._trial_left = max(0, (self._trial_left or _TRIAL_STEPS) - (1 if has_hit else 2))
            if self._trial_left == 0:
                self._quiet = 0
                self._lengthen()
        elif reason == Reason.GAIN and is_drafted:
            self._quiet, self._trial_left = 0, 0
            self._has_drafted, self._has_new = True, False
            self._saved += saved
            if self._saved >= _CONFIRMED:
                self._pause, self._saved = _FIRST_PAUSE, 0.0
        elif reason in (Reason.GAIN, Reason.NO_GAIN):
            self._quiet += 1
