"""Pages of a drafter's contexts: every session reads what it wrote, whoever came, grew and went in between."""

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dflash_ray.models.context_pages import PAGE_SIZE, ContextPages

SESSIONS = st.sampled_from([0, 1, 2, 3, 90])


class Contexts(RuleBasedStateMachine):
    """Rows are numbered as they are written; a session's are those that it has been given, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = ContextPages(2, 1, 1, torch.float32, "cpu")
        self.held: dict[int, list[float]] = {}
        self.written = 0

    @rule(growth=st.dictionaries(SESSIONS, st.integers(1, 5 * PAGE_SIZE), min_size=1))
    def grow(self, growth):
        sessions, counts = np.array(list(growth)), np.array(list(growth.values()))
        starts = np.array([len(self.held.setdefault(session, [])) for session in growth])
        self.pages.reserve(sessions, starts + counts)
        rows = self.pages.rows_of(sessions, starts, counts)
        values = torch.arange(self.written, self.written + len(rows), dtype=torch.float32)
        self.written += len(rows)
        self.pages.store(rows, torch.stack((values, -values))[:, :, None, None], values[None, :, None, None])
        at = 0
        for session, count in growth.items():
            self.held[session] += values[at : at + count].tolist()
            at += count

    @rule(session=SESSIONS)
    def release(self, session):
        self.pages.release(session)
        self.held.pop(session, None)

    @rule(sessions=st.lists(SESSIONS, min_size=1, unique=True), size=st.integers(1, 8))
    def place_blocks(self, sessions, size):
        lens = np.array([len(self.held.setdefault(session, [])) for session in sessions])
        places = self.pages.place_blocks(np.array(sessions), lens, size)
        assert places.context_lens.tolist() == lens.tolist() and places.entry_lens.tolist() == [size] * len(sessions)
        at = page = 0
        for length, count in zip(lens.tolist(), places.page_counts.tolist(), strict=True):
            own = places.pages[page : page + count]
            positions = torch.arange(length, length + size)
            assert torch.equal(
                places.slots[at : at + size], own[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
            )
            self.pages.store(places.slots[at : at + size].numpy(), *[torch.full((2, size, 1, 1), torch.nan)] * 2)
            at, page = at + size, page + count

    @invariant()
    def everyone_reads_what_it_wrote(self):
        for session, values in self.held.items():
            rows = self.pages.rows_of(np.array([session]), np.array([0]), np.array([len(values)]))
            assert self.pages.keys[0, rows, 0, 0].tolist() == values
            assert self.pages.keys[1, rows, 0, 0].tolist() == [-value for value in values]


TestContexts = Contexts.TestCase
