"""Whatever comes and goes, an entry's context is what its own tokens would have given, under its own salt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dflash_ray.sampling.logprobs import Logprobs
from dflash_ray.sampling.verify import Verdict
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.model import StepHidden
from dflash_ray.target_group.step import EntryStatus, Opening
from tests.steps import opening, step_of
from tests.unit.target_group.test_slots import verdict_of

PAGE, PAGES, CONTEXT = 4, 24, 60
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=25)  # two words, so that beginnings are often equal


@dataclass
class Known:
    """A sequence as the machine knows it."""

    opening: Opening
    tokens: list[int]
    kv_len: int = 0

    @property
    def decodes(self) -> bool:
        return self.kv_len == len(self.tokens) - 1


class RememberingRunner:
    """Keeps for each row of the cache of what it is: a salt and all tokens up to it, and whether it has a feature."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.rows: list[tuple] = [()] * (PAGE * PAGES)
        self.entries: list[tuple[bytes, list[int], bool]] = []  # of the next pass: salt, tokens, wants features

    def forward(self, batch, columns) -> StepHidden:
        at = page_at = 0
        for (salt, tokens, wants_features), count, context, num_pages in zip(
            self.entries, batch.entry_lens, batch.context_lens, batch.page_counts, strict=True
        ):
            pages = batch.pages[page_at : page_at + num_pages]
            for position in range(context):
                row = self.rows[pages[position // PAGE] * PAGE + position % PAGE]
                assert row[:2] == (salt, tokens[: position + 1])
                assert row[2] or not wants_features
            tokens = [*tokens[:context], *batch.token_ids[at : at + count].tolist()]
            for position, slot in enumerate(batch.slots[at : at + count].tolist(), start=context):
                self.rows[slot] = (salt, tokens[: position + 1], wants_features)
            at, page_at = at + count, page_at + num_pages
        return StepHidden(torch.empty(0), None)

    def verify(self, hidden, columns) -> Verdict:
        return self.verdict

    def score(self, hidden, batch) -> Logprobs:
        count = len(batch.scored_rows)
        return Logprobs(np.zeros(count), np.zeros((count, 3), dtype=np.int64), np.zeros((count, 3)))


class PrefixCacheMachine(RuleBasedStateMachine):
    """Sequences of few words open, prefill, decode with drafts, fail and close over too few pages."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = RememberingRunner()
        self.engine = Engine(self.runner, PAGES, PAGE, CONTEXT, caches_prefixes=True)
        self.known: dict[int, Known] = {}
        self.next_id = 1

    @rule(data=st.data())
    def close(self, data) -> None:
        if self.known:
            sequence_id = data.draw(st.sampled_from(sorted(self.known)))
            del self.known[sequence_id]
            self.engine.close([sequence_id])

    @rule(data=st.data())
    def open_anew(self, data) -> None:
        """As after a preemption: another sequence with all the tokens of one that is closed."""
        if self.known:
            old = self.known.pop(data.draw(st.sampled_from(sorted(self.known))))
            self.step(data, [(old.tokens[: CONTEXT - 6], old.opening.cache_salt, old.opening.wants_features, -1)])

    @rule(
        data=st.data(),
        opened=st.lists(
            st.tuples(TOKENS, st.sampled_from([b"", b"a"]), st.booleans(), st.sampled_from([-1, -1, 0])), max_size=3
        ),
    )
    def opens(self, data, opened) -> None:
        self.step(data, opened)

    def step(self, data, opened) -> None:
        new = []
        for tokens, salt, wants_features, num_prompt_logprobs in opened:
            options = {"wants_features": wants_features, "num_prompt_logprobs": num_prompt_logprobs, "max_new": 100}
            new.append(opening(self.next_id, tokens, cache_salt=salt, **options))
            self.known[self.next_id] = Known(new[-1], list(tokens))
            self.next_id += 1
        chosen = [at for at in self.known if data.draw(st.booleans())]
        prefill = {at: data.draw(st.sampled_from([3, 4, 8, 30])) for at in chosen if not self.known[at].decodes}
        verify = {
            at: (len(self.known[at].tokens), data.draw(st.lists(st.integers(0, 1), max_size=5)))
            for at in chosen
            if self.known[at].decodes and len(self.known[at].tokens) + 5 <= CONTEXT
        }
        kept: dict[int, tuple[list[int], bool]] = {}

        def forward(batch, columns) -> StepHidden:
            """What is known of the entries, and the verdict on those that draw, once the engine says which run."""
            running = self._running(batch)
            self.runner.entries = [
                (known.opening.cache_salt, known.tokens, known.opening.wants_features)
                for known in (self.known[at] for at in running)
            ]
            starts = []
            for at, start, count in zip(running, batch.context_lens, batch.entry_lens, strict=True):
                if at in verify or start + count == len(self.known[at].tokens):
                    drafts = verify[at][1] if at in verify else []
                    num_accepted = data.draw(st.integers(0, len(drafts)))
                    is_flagged = data.draw(st.integers(0, 9)) == 0
                    kept[at] = ([*drafts[:num_accepted], data.draw(st.integers(0, 1))], is_flagged)
                    starts.append(len(self.known[at].tokens) - 1)
            self.runner.verdict = verdict_of(list(kept.values()), starts)
            return RememberingRunner.forward(self.runner, batch, columns)

        self.runner.forward = forward
        output = self.engine.step(step_of(new, prefill, verify))
        for at, status in zip(output.sequence_ids.tolist(), output.statuses.tolist(), strict=True):
            known, tokens = self.known[at], kept.get(at, ([], False))
            assert status != EntryStatus.FAILED or tokens[1]
            if status == EntryStatus.OK:
                known.tokens += tokens[0]
        lens = dict(zip(output.sequence_ids.tolist(), output.kv_lens.tolist(), strict=False))
        cached = dict(zip(output.sequence_ids.tolist(), output.cached_lens.tolist(), strict=False))
        for at, known in self.known.items():
            if at in lens:
                assert known.kv_len <= lens[at] <= len(known.tokens)
                assert cached[at] % PAGE == 0 and (not cached[at] or known.opening.sampling.num_prompt_logprobs < 0)
            known.kv_len = int(self.engine._table.kv_lens[self.engine._table.slot_of[at]])

    def _running(self, batch) -> list[int]:
        """Sequences of a pass, by where their first rows go."""
        table = self.engine._table
        owners = {
            (int(table.pages[slot, start // PAGE]), start): at
            for at, slot in table.slot_of.items()
            for start in [int(table.kv_lens[slot])]
            if start // PAGE < table.page_counts[slot]
        }
        firsts = np.cumsum(batch.entry_lens) - batch.entry_lens
        return [
            owners[row // PAGE, start]
            for row, start in zip(batch.slots[firsts].tolist(), batch.context_lens.tolist(), strict=True)
        ]

    @invariant()
    def pages_are_held_by_those_that_have_them_and_named_by_what_they_are_of(self) -> None:
        table, allocator, prefixes = self.engine._table, self.engine.allocator, self.engine.prefixes
        allocator.check_integrity()
        holders = np.zeros(PAGES, dtype=int)
        for slot in table.slot_of.values():
            holders[table.pages[slot, : table.page_counts[slot]]] += 1
        assert holders.tolist() == allocator._holders.tolist()
        assert {page: name for name, page in prefixes._page_of.items()} == prefixes._name_of
        assert set(np.flatnonzero(allocator._is_kept).tolist()) == set(prefixes._name_of)
        assert len(prefixes._chains) == len(table)
        assert prefixes.num_found <= prefixes.num_queried


TestPrefixCache = PrefixCacheMachine.TestCase
TestPrefixCache.settings = settings(deadline=None, max_examples=120, stateful_step_count=25)
