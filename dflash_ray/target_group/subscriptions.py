"""Who wants which rows of which sequences, and how far each of them has got, as columns. No I/O here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from dflash_ray.core.arrays import Ids, Ints

_NOBODY = 0  # the place of no sequence, which has no rows
_FIRST_PLACES = 64
_SEQUENCE_COLUMNS = ("ids", "opened_in", "num_rows")
_STREAM_COLUMNS = ("_numbers", "_sequences", "_ats", "_turns")


class Sequences:
    """Sequences that are open with features, from the moment that the message which opens them is read.

    Attributes, [N] by place:
        ids: of the sequences.
        opened_in: the step that opens it.
        num_rows: that are in the store.
    """

    def __init__(self) -> None:
        self.ids: Ids = np.zeros(_FIRST_PLACES, dtype=np.uint64)
        self.opened_in = np.zeros(_FIRST_PLACES, dtype=np.int64)
        self.num_rows = np.zeros(_FIRST_PLACES, dtype=np.int64)
        self._place_of: dict[int, int] = {}
        self._free = list(range(1, _FIRST_PLACES))

    def open(self, sequence_id: int, step_id: int) -> None:
        """A sequence without rows; one that is open starts anew."""
        if sequence_id not in self._place_of:
            if not self._free:
                self._free = _double(self, _SEQUENCE_COLUMNS)
            self._place_of[sequence_id] = self._free.pop()
        place = self._place_of[sequence_id]
        self.ids[place], self.opened_in[place], self.num_rows[place] = sequence_id, step_id, 0

    def close(self, sequence_ids: Iterable[int]) -> list[int]:
        """Forgets sequences, unknown ones aside. Returns their places, which are others' from the next `open` on."""
        places = [place for one in sequence_ids if (place := self._place_of.pop(one, _NOBODY))]
        self.num_rows[places] = 0
        self._free += places
        return places

    def close_all(self) -> list[int]:
        """The places of all."""
        return self.close(list(self._place_of))

    def place(self, sequence_id: int) -> int | None:
        """The sequence's; None for one that is not open."""
        return self._place_of.get(sequence_id)

    def publish(self, step_id: int, sequence_ids: Iterable[int], num_rows: Ints) -> None:
        """A step is done, after which sequences have so many rows."""
        get = self._place_of.get
        places = np.array([get(sequence_id, _NOBODY) for sequence_id in sequence_ids], dtype=np.int64)
        # Others were closed, and perhaps opened anew, since the step was read.
        is_same = (places != _NOBODY) & (self.opened_in[places] <= step_id)
        self.num_rows[places[is_same]] = num_rows[is_same]


class Picked(NamedTuple):
    """Rows for a message: `counts` of them from `starts` on, for subscriptions to sequences."""

    numbers: list[int]
    sequence_ids: Ids
    starts: Ints
    counts: Ints


class Subscriptions:
    """One drafter's, each a place in a sequence: the next row that it is to be sent."""

    def __init__(self, sequences: Sequences) -> None:
        self._of = sequences
        self._numbers = np.zeros(_FIRST_PLACES, dtype=np.uint64)
        self._sequences = np.zeros(_FIRST_PLACES, dtype=np.int64)
        self._ats = np.zeros(_FIRST_PLACES, dtype=np.int64)
        self._turns = np.zeros(_FIRST_PLACES, dtype=np.int64)  # when each was sent something last
        self._turn = 0
        self._place_of: dict[int, int] = {}
        self._free = list(range(1, _FIRST_PLACES))

    def __len__(self) -> int:
        return len(self._place_of)

    def __contains__(self, number: int) -> bool:
        return number in self._place_of

    def __iter__(self) -> Iterator[int]:
        return iter(self._place_of)

    def add(self, number: int, sequence: int, start: int) -> None:
        """The rows from `start` on of the sequence at a place."""
        if not self._free:
            self._free = _double(self, _STREAM_COLUMNS)
        place = self._place_of[number] = self._free.pop()
        self._numbers[place], self._sequences[place], self._ats[place] = number, sequence, start
        self._turns[place] = self._turn

    def remove(self, number: int) -> None:
        """Nothing more for a subscription; an unknown one is ignored."""
        place = self._place_of.pop(number, None)
        if place is not None:
            self._sequences[place] = _NOBODY
            self._free.append(place)

    def remove_of(self, sequences: list[int]) -> list[int]:
        """Nothing more of the sequences at these places; returns the numbers of who had subscribed to them."""
        numbers: list[int] = self._numbers[np.isin(self._sequences, sequences)].tolist()
        for number in numbers:
            self.remove(number)
        return numbers

    @property
    def is_behind(self) -> bool:
        """Whether there are rows to send."""
        return bool(np.count_nonzero(self._of.num_rows[self._sequences] > self._ats))

    def pick(self, room: int) -> Picked | None:
        """At most `room` rows for a message, which count as sent; None when there are none.

        Where not all find room, those come first that were sent nothing for longest.
        """
        lacking = self._of.num_rows[self._sequences] - self._ats
        places = (lacking > 0).nonzero()[0]
        if not len(places):
            return None
        counts = lacking[places]
        if counts.sum() > room:
            first = self._turns[places].argsort(kind="stable")
            places, counts = places[first], counts[first]
            counts = np.clip(room - (counts.cumsum() - counts), 0, counts)
            places, counts = places[counts > 0], counts[counts > 0]
        self._turn += 1
        starts, self._turns[places] = self._ats[places], self._turn
        self._ats[places] += counts
        return Picked(self._numbers[places].tolist(), self._of.ids[self._sequences[places]], starts, counts)


def _double(columns: Sequences | Subscriptions, names: Iterable[str]) -> list[int]:
    """Twice as many places; returns the new ones."""
    count = 0
    for name in names:
        column = getattr(columns, name)
        count = len(column)
        setattr(columns, name, np.pad(column, (0, count)))
    return list(range(count, 2 * count))
