"""Acceptance statistics of one request or of many.

Terms: a step is one target pass of the decode phase; the acceptance length counts the target's own token, so it lies
between 1 and num_spec_tokens + 1 and plain decoding has 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class DecodePass(NamedTuple):
    """How a pass of the decode phase took a sequence's drafts: its first `num_accepted_drafts` tokens are drafts."""

    num_drafts: int
    num_accepted_drafts: int
    num_spec_tokens: int  # the longest draft block asked for


@dataclass(slots=True)
class AcceptanceStats:
    """Counts of steps by the number of drafts they accepted.

    Attributes:
        num_spec_tokens: longest draft block asked for; 0 with speculation off.
        num_draft_tokens: drafts verified.
        histogram: histogram[j] is the number of steps that accepted j drafts.
    """

    num_spec_tokens: int = 0
    num_draft_tokens: int = 0
    histogram: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        missing = self.num_spec_tokens + 1 - len(self.histogram)
        self.histogram.extend([0] * max(0, missing))

    def record(self, num_drafted: int, num_accepted: int) -> None:
        """Counts one step that verified `num_drafted` drafts and kept `num_accepted` of them."""
        while len(self.histogram) <= num_accepted:
            self.histogram.append(0)
        self.num_draft_tokens += num_drafted
        self.histogram[num_accepted] += 1

    @property
    def num_steps(self) -> int:
        return sum(self.histogram)

    @property
    def num_accepted(self) -> int:
        return sum(accepted * steps for accepted, steps in enumerate(self.histogram))

    @property
    def acceptance_length(self) -> float:
        """Mean tokens a step, the target's own included; 1.0 before the first step."""
        return 1.0 + self.num_accepted / self.num_steps if self.num_steps else 1.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted share of the verified drafts; 0.0 without drafts."""
        return self.num_accepted / self.num_draft_tokens if self.num_draft_tokens else 0.0

    def accepted_per_position(self) -> list[int]:
        """Steps whose draft at slot k was accepted, for each slot k."""
        return [sum(self.histogram[k + 1 :]) for k in range(len(self.histogram) - 1)]


def merge(stats: Sequence[AcceptanceStats]) -> AcceptanceStats:
    """The counts of several requests together."""
    total = AcceptanceStats(num_spec_tokens=max((s.num_spec_tokens for s in stats), default=0))
    for one in stats:
        total.num_draft_tokens += one.num_draft_tokens
        total.histogram.extend([0] * (len(one.histogram) - len(total.histogram)))
        for accepted, steps in enumerate(one.histogram):
            total.histogram[accepted] += steps
    return total
