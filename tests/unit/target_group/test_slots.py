"""Passes that are gathered from slots are those that lists of tokens and pages give, whatever came and went before."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dflash_ray.kernels.columns import IntColumn, RowColumn
from dflash_ray.sampling.logprobs import Logprobs
from dflash_ray.sampling.verify import Verdict
from dflash_ray.target_group.engine import Engine
from dflash_ray.target_group.model import StepHidden
from dflash_ray.target_group.step import EntryStatus
from tests.loops import InNumpy
from tests.steps import opening, step_of

PAGE, PAGES, CONTEXT = 4, 40, 60
TOKENS = st.lists(st.integers(0, 95), min_size=1, max_size=20)


@dataclass
class Known:
    """A sequence as lists."""

    tokens: list[int]
    prompt_len: int
    wants_features: bool
    num_prompt_logprobs: int
    kv_len: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def decodes(self) -> bool:
        return self.kv_len == len(self.tokens) - 1


class CannedRunner:
    """Keeps what it is given, and decides what the test says."""

    device = torch.device("cpu")

    def forward(self, batch, columns) -> StepHidden:
        self.batch, self.columns = batch, None
        return StepHidden(torch.empty(0), None)

    def verify(self, hidden, columns) -> Verdict:
        self.columns = columns
        return self.verdict

    def score(self, hidden, batch) -> Logprobs:
        count = len(batch.scored_rows)
        return Logprobs(np.zeros(count), np.zeros((count, 3), dtype=np.int64), np.zeros((count, 3)))


def verdict_of(kept: list[tuple[list[int], bool]], starts: list[int]) -> Verdict:
    """Tokens of each sequence that draws, and whether its logits are bad."""
    depth = max((len(tokens) for tokens, _ in kept), default=1)
    count = np.array([len(tokens) for tokens, _ in kept])
    return Verdict(
        tokens=np.array([tokens + [-1] * (depth - len(tokens)) for tokens, _ in kept]).reshape(len(kept), depth),
        accepted_rows=np.full((len(kept), depth), -1),
        num_tokens=count,
        num_accepted=count - 1,
        finishes=np.zeros(len(kept), dtype=np.int64),
        kv_lens=np.array(starts) + count,
        is_flagged=np.array([is_flagged for _, is_flagged in kept], dtype=bool),
    )


class Steps(RuleBasedStateMachine):
    """Sequences open, prefill, decode and close over too few pages."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = CannedRunner()
        self.engine = Engine(self.runner, PAGES, PAGE, CONTEXT)
        self.known: dict[int, Known] = {}
        self.next_id = 1

    @rule(data=st.data())
    def close(self, data) -> None:
        if self.known:
            sequence_id = data.draw(st.sampled_from(sorted(self.known)))
            del self.known[sequence_id]
            self.engine.close([sequence_id])

    @rule(data=st.data(), opened=st.lists(TOKENS, max_size=3))
    def step(self, data, opened) -> None:
        new = []
        for tokens in opened:
            known = Known(tokens, data.draw(st.integers(1, len(tokens))), data.draw(st.booleans()), -1)
            known.num_prompt_logprobs = data.draw(st.sampled_from([-1, 0, 2]))
            self.known[self.next_id] = known
            options = {"wants_features": known.wants_features, "num_prompt_logprobs": known.num_prompt_logprobs}
            new.append(opening(self.next_id, tokens, known.prompt_len, max_new=100, **options))
            self.next_id += 1
        chosen = [at for at in self.known if data.draw(st.booleans())]
        prefill = {at: data.draw(st.integers(1, 9)) for at in chosen if not self.known[at].decodes}
        verify = {
            at: (len(self.known[at].tokens), data.draw(st.lists(st.integers(0, 95), max_size=5)))
            for at in chosen
            if self.known[at].decodes and len(self.known[at].tokens) + 5 <= CONTEXT
        }
        rows = {at: min(count, len(self.known[at].tokens) - self.known[at].kv_len) for at, count in prefill.items()}
        rows |= {at: 1 + len(drafts) for at, (_, drafts) in verify.items()}
        running = self._reserve(rows)
        draws = {at: self.known[at].kv_len + rows[at] == len(self.known[at].tokens) or at in verify for at in running}
        kept = {}
        for at in (at for at in running if draws[at]):
            drafts = verify[at][1] if at in verify else []
            num_accepted = data.draw(st.integers(0, len(drafts)))
            kept[at] = ([*drafts[:num_accepted], data.draw(st.integers(0, 95))], data.draw(st.integers(0, 9)) == 0)
        self.runner.verdict = verdict_of(list(kept.values()), [len(self.known[at].tokens) - 1 for at in kept])
        output = self.engine.step(step_of(new, prefill, verify))
        failed = {at for at, (_, is_flagged) in kept.items() if is_flagged}
        self._check_output(output, list(rows), running, kept, failed)
        if running:
            self._check_batch(running, rows, draws, {at: drafts for at, (_, drafts) in verify.items()})
        for at in running:
            if at in failed:
                continue
            known = self.known[at]
            known.kv_len += rows[at] if at not in verify else len(kept[at][0])
            known.tokens += kept[at][0] if at in kept else []

    def _reserve(self, rows: dict[int, int]) -> list[int]:
        """Those whose rows find pages."""
        free = PAGES - sum(len(known.pages) for known in self.known.values())
        running = []
        for at, count in rows.items():
            known = self.known[at]
            needed = max(0, -(-(known.kv_len + count) // PAGE) - len(known.pages))
            if needed <= free:
                free -= needed
                known.pages += [-1] * needed  # which ones, the engine says
                running.append(at)
        return running

    def _check_output(self, output, entries, running, kept, failed) -> None:
        assert output.sequence_ids.tolist() == entries
        statuses = [
            EntryStatus.FAILED if at in failed else EntryStatus.OK if at in running else EntryStatus.NO_PAGES
            for at in entries
        ]
        assert output.statuses.tolist() == statuses
        tokens = [[] if at in failed or at not in kept else kept[at][0] for at in entries]
        assert output.num_tokens.tolist() == [len(one) for one in tokens]
        assert output.token_ids.tolist() == [token for one in tokens for token in one]
        lens = [len(self.known[at].tokens) + len(one) for at, one in zip(entries, tokens, strict=True)]
        assert output.committed_lens.tolist() == lens
        assert len(output.errors) == len(failed)

    def _check_batch(self, running, rows, draws, drafts) -> None:
        """Every column as from the lists; kept tokens are not in them yet, but pages are."""
        table = self.engine._table
        for at in running:
            slot = table.slot_of[at]
            self.known[at].pages = table.pages[slot, : table.page_counts[slot]].tolist()
        columns = {name: [] for name in type(self.runner.batch).__slots__}
        roots, positions, features = [], [], []
        for at in running:
            known, first = self.known[at], len(columns["token_ids"])
            span = range(known.kv_len, known.kv_len + rows[at])
            columns["token_ids"] += [known.tokens[-1], *drafts[at]] if at in drafts else [known.tokens[i] for i in span]
            columns["positions"] += span
            columns["slots"] += [known.pages[i // PAGE] * PAGE + i % PAGE for i in span]
            columns["entry_lens"].append(rows[at])
            columns["context_lens"].append(known.kv_len)
            columns["page_counts"].append(len(known.pages))
            columns["pages"] += known.pages
            root = first if at in drafts else first + rows[at] - 1
            if draws[at]:
                roots.append(len(columns["sample_rows"]))
                positions.append(len(known.tokens) - 1)
                features.append(len(columns["feature_rows"]) + root - first if known.wants_features else -1)
                columns["sample_rows"] += range(root, first + rows[at])
            if known.wants_features:
                columns["feature_rows"] += range(first, first + rows[at])
            if at not in drafts and known.num_prompt_logprobs >= 0 and len(known.tokens) <= known.prompt_len:
                scored = known.tokens[known.kv_len + 1 : known.kv_len + 1 + rows[at]]
                columns["scored_rows"] += range(first, first + len(scored))
                columns["scored_tokens"] += scored
        if columns["scored_rows"]:
            columns["num_top"] = [max(0, *(self.known[at].num_prompt_logprobs for at in running))]
        for name, values in columns.items():
            assert getattr(self.runner.batch, name).tolist() == values, name
        if roots:
            tensors = self.runner.columns.tensors
            assert tensors.ints[:, IntColumn.FIRST_ROW].tolist() == roots
            assert tensors.ints[:, IntColumn.ROOT_POSITION].tolist() == positions
            assert tensors.ints[:, IntColumn.FEATURE_ROW].tolist() == features
            sampled = [columns["token_ids"][row] for row in columns["sample_rows"]]
            assert tensors.rows[:, RowColumn.TOKEN].tolist() == sampled

    @invariant()
    def slots_hold_what_the_lists_hold(self) -> None:
        table = self.engine._table
        assert set(table.slot_of) == set(self.known) and len(set(table.slot_of.values())) == len(self.known)
        held = []
        for at, known in self.known.items():
            slot = table.slot_of[at]
            assert (table.kv_lens[slot], table.committed_lens[slot]) == (known.kv_len, len(known.tokens))
            assert table.tokens[slot, : len(known.tokens)].tolist() == known.tokens
            held += table.pages[slot, : table.page_counts[slot]].tolist()
        assert len(set(held)) == len(held) == PAGES - self.engine.allocator.num_free
        self.engine.allocator.check_integrity()


class StepsInNumpy(InNumpy, Steps):
    """The same without the loops in C."""


TestSteps = Steps.TestCase
TestSteps.settings = settings(deadline=None, max_examples=80, stateful_step_count=25)
TestStepsInNumpy = StepsInNumpy.TestCase
TestStepsInNumpy.settings = settings(deadline=None, max_examples=30, stateful_step_count=25)
