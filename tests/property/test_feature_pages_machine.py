"""Features in shared pages that are handed on while drafters have yet to read what they were told of."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from dflash_ray.core.arrays import spans
from dflash_ray.drafter.rows import Rows, joined
from dflash_ray.models.context_features import bytes_of, decode_response
from dflash_ray.models.feature_pages import FeaturePages, encode_named, pages_of

NUM_PAGES, PAGE = 5, 3


def truth(opening: int, positions: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((1000 * opening + positions).astype(np.float32))[:, None].expand(-1, 2).contiguous()


class FeaturePagesMachine(RuleBasedStateMachine):
    """Sequences are known by the number of their opening, which is their session's as well."""

    @initialize()
    def start(self):
        pages = FeaturePages.create(NUM_PAGES, PAGE, 2, torch.float32)
        assert pages is not None
        self.target, self.drafter = pages, FeaturePages.open(pages.offer, 2)
        self.free = list(range(NUM_PAGES))
        self.pages: dict[int, list[int]] = {}
        self.num_rows: dict[int, int] = {}
        self.num_openings = 0
        self.told: list[Rows] = []

    @precondition(lambda self: self.free)
    @rule()
    def open(self):
        self.num_openings += 1
        self.pages[self.num_openings], self.num_rows[self.num_openings] = [], 0

    @precondition(lambda self: self.pages)
    @rule(data=st.data(), count=st.integers(1, 7))
    def compute(self, data, count):
        """Rows are written where they are kept; there may be pages for fewer of them."""
        opening = data.draw(st.sampled_from(sorted(self.pages)))
        pages, at = self.pages[opening], self.num_rows[opening]
        while len(pages) * PAGE < at + count and self.free:
            pages.append(self.free.pop(data.draw(st.integers(0, len(self.free) - 1))))
        positions = np.arange(at, min(at + count, len(pages) * PAGE))
        if len(positions):
            places = np.array(pages)[positions // PAGE] * PAGE + positions % PAGE
            self.target.begin(places)
            self.target.rows[places] = bytes_of(truth(opening, positions))
            self.num_rows[opening] += len(positions)

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def close(self, data):
        opening = data.draw(st.sampled_from(sorted(self.pages)))
        self.free += self.pages.pop(opening)
        del self.num_rows[opening]

    @precondition(lambda self: any(self.num_rows.values()))
    @rule(data=st.data())
    def tell(self, data):
        """A message names rows of some sequences."""
        known = sorted(opening for opening, count in self.num_rows.items() if count)
        openings = data.draw(st.lists(st.sampled_from(known), unique=True, min_size=1))
        starts = [data.draw(st.integers(0, self.num_rows[opening] - 1)) for opening in openings]
        counts = [
            data.draw(st.integers(1, self.num_rows[opening] - start))
            for opening, start in zip(openings, starts, strict=True)
        ]
        firsts, num_pages = pages_of(np.array(starts), np.array(counts), PAGE)
        owner = np.repeat(openings, num_pages).tolist()
        pages = np.array([self.pages[at][nth] for at, nth in zip(owner, spans(firsts, num_pages), strict=True)])
        message = encode_named(openings, starts, counts, pages, self.target.uses[pages])
        named = self.drafter.named(decode_response(message)[0].named)
        self.told.append(Rows.of(np.array(openings), np.array(starts), np.array(counts), named))

    @precondition(lambda self: self.told)
    @rule(data=st.data())
    def take(self, data):
        """What a drafter takes is true, however late; it loses rows only of sequences that are over."""
        count = data.draw(st.integers(1, len(self.told)))
        taken, self.told = self.told[:count], self.told[count:]
        found, gone = joined(taken)
        assert not gone & self.pages.keys()
        for rows in found:
            owners = np.repeat(rows.sessions, rows.counts)
            expected = truth(1, spans(rows.starts, rows.counts)) + torch.from_numpy(1000.0 * (owners - 1))[:, None]
            assert torch.equal(rows.features, expected.float())
            assert not gone & set(rows.sessions.tolist())
        taken_of = {int(session) for rows in found for session in rows.sessions}
        assert taken_of | gone == {int(session) for rows in taken for session in rows.sessions}


TestFeaturePages = FeaturePagesMachine.TestCase
TestFeaturePages.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
