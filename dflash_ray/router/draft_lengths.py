"""How many drafts a step is worth. The one place that decides it, for drafters as for verification."""

from __future__ import annotations

from collections.abc import Callable

from dflash_ray.core.arrays import Ints
from dflash_ray.router.slot_table import SlotTable

# Drafts for each of these slots in its next step, at most `SlotTable.most_drafts`; 0 is plain decoding. Asked when the
# tokens before them have come, and again when the step is built: then the drafts that are there are cut to it.
DraftLengths = Callable[[SlotTable, Ints], Ints]


def as_requested(table: SlotTable, slots: Ints) -> Ints:
    """What the requests ask for, as far as it can be of use."""
    return table.most_drafts(slots)
