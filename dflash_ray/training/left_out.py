"""Rows that a step cannot use: left out, and counted by reason with where they stand. No row ends a run."""

from __future__ import annotations

_SHOWN_REASONS = 8
_SHOWN_PLACES = 3  # of each reason


class BadRow(ValueError):
    """Why a row cannot be used, in words that follow a number of rows: `not JSON`."""


class LeftOut:
    """Counts rows by reason.

    Attributes:
        rows: place and reason of each, in the order that they were met.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, place: str, reason: object) -> None:
        """One row more; `reason` is a BadRow or its text."""
        self.rows.append((place, " ".join(str(reason).split())))

    @property
    def text(self) -> str:
        """One line: how many rows, why, and where the first of each reason are. Empty where none was left out."""
        if not self.rows:
            return ""
        places: dict[str, list[str]] = {}
        for place, reason in self.rows:
            places.setdefault(reason, []).append(place)
        most_frequent = sorted(places.items(), key=lambda item: -len(item[1]))
        parts = [
            f"{len(found)} {reason} ({'; '.join(found[:_SHOWN_PLACES])}{'; ...' if len(found) > _SHOWN_PLACES else ''})"
            for reason, found in most_frequent[:_SHOWN_REASONS]
        ]
        if len(most_frequent) > _SHOWN_REASONS:
            parts.append(f"{sum(len(found) for _, found in most_frequent[_SHOWN_REASONS:])} for other reasons")
        return f"left out {len(self.rows)} row{'s' if len(self.rows) > 1 else ''}: {', '.join(parts)}"
