"""What the drafter of a sequence holds of its context, and the features that are on their way there.

Features come from the target in order, some of them while the prompt is still prefilled. Rows that find no room here,
or come while nobody drafts, are not kept: the target has them, and they are asked for again when their turn comes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dflash_ray.pb import common_pb2

MAX_WAITING_BYTES = 8 * 1024 * 1024  # of one sequence; what is over it is fetched when the drafter has taken the rest

_MAX_LOSSES = 2
_MAX_REFUSALS = 4


@dataclass(slots=True)
class DrafterContext:
    """Context rows of one sequence between target and drafter.

    Attributes:
        drafter_id: the drafter that holds the context, or None.
        sent_rows: rows [0, sent_rows) that the drafter was sent.
        parts: features from `sent_rows` on, without gaps.
        is_replaying: the target was asked for the rows after `end`.
        lacked_at: computed rows of the sequence when the target could give none; it is asked when there are more.
        num_losses: drafters that died over a request with this sequence in it.
        num_refusals: times that a drafter had no room for it.
    """

    drafter_id: str | None = None
    sent_rows: int = 0
    parts: list[common_pb2.ContextFeatures] = field(default_factory=list)
    num_bytes: int = 0
    is_replaying: bool = False
    lacked_at: int = 0
    num_losses: int = 0
    num_refusals: int = 0

    @property
    def may_be_drafted_for(self) -> bool:
        """Whether another drafter is worth a try: each costs a replay of the whole context."""
        return self.num_losses < _MAX_LOSSES and self.num_refusals < _MAX_REFUSALS

    @property
    def end(self) -> int:
        """Rows that the drafter has or will have once it was sent everything that waits here."""
        return self.parts[-1].start + self.parts[-1].num_rows if self.parts else self.sent_rows

    def take(self, part: common_pb2.ContextFeatures) -> None:
        """Features from the target: kept when they follow what is here and there is room."""
        follows = part.start <= self.end < part.start + part.num_rows
        if self.drafter_id is not None and follows and self.num_bytes < MAX_WAITING_BYTES:
            self.parts.append(part)
            self.num_bytes += len(part.data)

    def give(self, max_bytes: int) -> list[common_pb2.ContextFeatures]:
        """The next parts for the drafter, at most `max_bytes` of features; they count as sent."""
        count = size = 0
        for part in self.parts:
            if size + len(part.data) > max_bytes:
                break
            count += 1
            size += len(part.data)
        given, self.parts = self.parts[:count], self.parts[count:]
        self.num_bytes -= size
        if given:
            self.sent_rows = given[-1].start + given[-1].num_rows
        return given

    def restart(self, have_len: int) -> None:
        """The drafter holds `have_len` rows and nothing after them."""
        self.sent_rows = have_len
        self.clear()

    def clear(self) -> None:
        """Forgets what waits here."""
        self.parts = []
        self.num_bytes = 0
        self.is_replaying = False
        self.lacked_at = 0

    def leave(self) -> None:
        """No drafter holds anything."""
        self.drafter_id = None
        self.restart(0)
