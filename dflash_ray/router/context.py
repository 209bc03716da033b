"""What the router knows of a sequence's drafter. The rows themselves go from the target to the drafter."""

from __future__ import annotations

from dataclasses import dataclass

_MAX_LOSSES = 2
_MAX_REFUSALS = 4


@dataclass(slots=True)
class DrafterContext:
    """Whose drafts a sequence gets.

    Attributes:
        drafter_id: the drafter that serves it, or None.
        is_open: its drafter was told to fetch the rows, of the sequence as the target has it open now.
        was_open: its drafter was told so at any time.
        is_moved: rows that a drafter had already must be given once more.
        num_losses: drafters that died over a request with this sequence in it.
        num_refusals: times that a drafter had no room for it.
    """

    drafter_id: str | None = None
    is_open: bool = False
    was_open: bool = False
    is_moved: bool = False
    num_losses: int = 0
    num_refusals: int = 0

    @property
    def may_be_drafted_for(self) -> bool:
        """Whether another drafter is worth a try: each costs a replay of the whole context."""
        return self.num_losses < _MAX_LOSSES and self.num_refusals < _MAX_REFUSALS

    def leave(self) -> None:
        """No drafter serves it."""
        self.is_moved = self.is_moved or self.was_open
        self.drafter_id, self.is_open, self.was_open = None, False, False
