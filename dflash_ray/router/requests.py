"""The requests of one target group: who waits, who has a slot, and how a request ends. A part of the scheduler."""

from __future__ import annotations

from collections import deque

import numpy as np

from dflash_ray.config import RouterConfig
from dflash_ray.core.arrays import column
from dflash_ray.core.errors import DeadlineExceededError, HandedOverError, OverloadedError, RequestError
from dflash_ray.pb import router_pb2
from dflash_ray.router.actions import Action, Fail
from dflash_ray.router.drafting import Drafting
from dflash_ray.router.in_flight import Cohorts, StepsInFlight
from dflash_ray.router.limits import TargetLimits
from dflash_ray.router.sequence import RouterSequence
from dflash_ray.router.slot_table import DECODE, NEVER, PREFILL, SlotTable
from dflash_ray.router.speculating import Speculating

_MAX_LOSSES = 2  # groups that may die over a sequence before it runs alone, where one more ends it


class Requests:
    """A request is in the queue or has a slot, until it is removed.

    Args:
        actions: the scheduler's, to which errors are added.

    Attributes:
        table: the slots of the sequences on the target; the scheduler's.
        by_id: all of them.
        to_close: sequences that the target is to forget, with the next message.
        closed_after: the last step that was sent when a sequence was closed.
        lost_at: since when there is no target; None while there is one.
    """

    def __init__(
        self,
        config: RouterConfig,
        table: SlotTable,
        steps: StepsInFlight,
        drafting: Drafting,
        speculating: Speculating,
        actions: list[Action],
    ) -> None:
        self._config = config
        self.table = table
        self._steps = steps
        self._drafting = drafting
        self._speculating = speculating
        self._actions = actions
        self.by_id: dict[int, RouterSequence] = {}
        self.waiting: deque[RouterSequence] = deque()
        self.to_close: list[int] = []
        self.closed_after = 0
        self.lost_at: float | None = 0.0
        self._next_id = 1

    def arrive(
        self, request: router_pb2.GenerateTokensRequest, limits: TargetLimits | None, stream: int, call_id: int
    ) -> RouterSequence:
        """Takes a request into the queue. Raises as `Scheduler.arrive`."""
        free = max(0, self._config.max_running - self.table.num_running)
        if len(self.waiting) >= self._config.max_waiting + free:
            raise OverloadedError(f"{len(self.waiting)} requests are waiting; try again later")
        tokens = column(request.token_ids).astype(np.uint32)
        if limits is not None:
            limits.check_fits(tokens)
        policy, draft_tokens = self._speculating.policy_of(request.speculation)
        sequence = RouterSequence(
            self._next_id, request, tokens, policy, draft_tokens, stream, call_id, request.num_losses
        )
        self._next_id += 1
        self.by_id[sequence.sequence_id] = sequence
        self.waiting.append(sequence)
        return sequence

    def target_ready(self, limits: TargetLimits) -> None:
        """A target group is there: requests that can never run on it end."""
        self.lost_at = None
        for sequence in list(self.waiting):
            try:
                limits.check_fits(sequence.tokens)
            except RequestError as error:
                self.fail(sequence, error)

    def target_lost(self, at_work: list[RouterSequence], now: float) -> None:
        """The group is gone: what ran waits, with its tokens, for it to come back.

        A sequence whose steps end group after group is a suspect: it then runs alone, and ends with the next one.
        """
        self.lost_at = now
        for sequence in at_work:
            sequence.num_losses += 1
            if sequence.num_losses > _MAX_LOSSES:
                self.fail(sequence, RequestError("the target group ended three times while it ran this request"))
        for sequence in reversed(self.table.running()):
            self._put_back(sequence)
        self.to_close.clear()

    def admit(self, limits: TargetLimits, free_pages: int, cohorts: Cohorts) -> None:
        """Gives slots to waiting sequences while their tokens and a block for each running one fit."""
        table = self.table
        if not self.waiting or table.num_running == table.num_slots:
            return
        promised = self._promised_pages(limits) + table.num_in_phase[DECODE]
        while self.waiting and table.num_running < table.num_slots:
            sequence = self.waiting[0]
            needed = limits.pages(sequence.committed_len + 1 + sequence.draft_tokens)
            if table.num_running and needed + promised > free_pages:
                return
            self.waiting.popleft()
            promised += limits.pages(sequence.committed_len + 1)
            request = sequence.request
            max_len = min(limits.max_model_len, request.prompt_len + request.stopping.max_new_tokens)
            slot = table.enter(sequence, max_len, cohorts.smaller(table), sequence.num_losses >= _MAX_LOSSES)
            self._speculating.enter(slot)

    def _promised_pages(self, limits: TargetLimits) -> int:
        """Pages that prompts on the target will still take."""
        if not self.table.num_in_phase[PREFILL]:
            return 0
        slots = (self.table.phases == PREFILL).nonzero()[0]
        pages = -(-(self.table.committed_lens[slots] + 1) // limits.page_size)
        return int((pages - -(-self.table.num_prefilled[slots] // limits.page_size)).sum())

    def give_up(self, now: float) -> None:
        """Ends what has waited for a target long enough."""
        if now >= self.deadline:
            text = f"no target group came back within {self._config.target_wait_s:g} s"
            for sequence in list(self.waiting):
                self.fail(sequence, DeadlineExceededError(text))

    @property
    def deadline(self) -> float:
        """When `give_up` has something to do."""
        return NEVER if self.lost_at is None or not self.waiting else self.lost_at + self._config.target_wait_s

    def hand_over(self, reason: str) -> None:
        """Ends every request with a HandedOverError: who sent them takes them elsewhere."""
        for sequence in list(self.by_id.values()):
            self.fail(sequence, HandedOverError(reason, sequence.num_losses))

    def requeue(self, sequence: RouterSequence) -> None:
        """Takes the slot from a sequence, which waits first in the queue, with its tokens."""
        self._close(sequence)
        self._put_back(sequence)

    def _put_back(self, sequence: RouterSequence) -> None:
        assert sequence.slot is not None
        self._drafting.suspend(sequence)
        self.table.leave(sequence.slot)
        self.waiting.appendleft(sequence)

    def fail(self, sequence: RouterSequence, error: RequestError) -> None:
        """Ends a request with an error."""
        self._actions.append(Fail(sequence, error))
        self.remove(sequence)

    def remove(self, sequence: RouterSequence) -> None:
        """Ends a request, of which nothing more is said."""
        del self.by_id[sequence.sequence_id]
        self._drafting.close(sequence)
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._close(sequence)
            self.table.leave(sequence.slot)

    def _close(self, sequence: RouterSequence) -> None:
        if self.table.is_open[sequence.slot]:
            self.to_close.append(sequence.sequence_id)
            self.closed_after = self._steps.last_id

    def take_closes(self) -> list[int]:
        """The sequences to close; they count as told."""
        closes, self.to_close = self.to_close, []
        return closes
