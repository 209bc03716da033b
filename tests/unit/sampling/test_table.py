"""Columns gathered from slots are those made from nothing, whatever opened, closed and was committed before."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from dflash_ray.kernels.columns import IntColumn
from dflash_ray.sampling.columns import DrawRows, PlanColumns, columns_of, without_gaps
from dflash_ray.sampling.parameters import COUPLED, NO_LOGPROBS, REJECTION, SamplingParams
from dflash_ray.sampling.table import RANGES, SamplingTable
from tests.plans import SequencePlan, to_columns

VOCAB = 50
CPU = torch.device("cpu")
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=12)


@dataclass
class Known:
    """A sequence, as whoever opened it knows it."""

    params: SamplingParams
    stop_ids: list[int]
    prompt_len: int
    min_new: int
    max_len: int
    tokens: list[int] = field(default_factory=list)

    def history(self) -> dict[int, int]:
        if not self.params.has_penalties:
            return {}
        counts = Counter(self.tokens[self.prompt_len :])
        prompt = self.tokens[: self.prompt_len] if self.params.repetition_penalty != 1 else []
        return dict.fromkeys(prompt, 0) | dict(counts)

    def plan(self, drafts: list[int], feature_row: int, **drawn) -> SequencePlan:
        params, history = self.params, self.history()
        names = (
            "temperature", "top_k", "top_p", "min_p", "seed", "mode", "presence_penalty", "frequency_penalty",
            "repetition_penalty", "num_logprobs",
        )  # fmt: skip
        return SequencePlan(
            **{name: getattr(params, name) for name in names},
            position=len(self.tokens) - 1,
            tokens=[self.tokens[-1], *drafts],
            parents=list(range(-1, len(drafts))),
            bias_ids=params.bias_ids.tolist(),
            bias_values=params.bias_values.tolist(),
            banned_ids=self.stop_ids if self.min_new else [],
            ban_below=self.prompt_len + self.min_new if self.min_new else 0,
            history_ids=list(history),
            history_counts=list(history.values()),
            stop_ids=self.stop_ids,
            min_len=self.prompt_len + self.min_new,
            max_len=self.max_len,
            feature_row=feature_row,
            **drawn,
        )


@st.composite
def sequences(draw) -> Known:
    bias = draw(st.lists(st.integers(0, VOCAB - 1), max_size=40, unique=True))
    has_penalties = draw(st.booleans())
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1e-6, 0.7, 1.0])),
        top_k=draw(st.sampled_from([0, 5])),
        top_p=draw(st.sampled_from([1.0, 0.9])),
        min_p=draw(st.sampled_from([0.0, 0.05])),
        seed=draw(st.integers(0, 2**64 - 1)),
        mode=draw(st.sampled_from([COUPLED, REJECTION])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5])) if has_penalties else 0.0,
        frequency_penalty=draw(st.sampled_from([0.0, 0.25])) if has_penalties else 0.0,
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])) if has_penalties else 1.0,
        num_logprobs=draw(st.sampled_from([NO_LOGPROBS, 0, 3])),
        bias_ids=np.array(bias, dtype=np.int64),
        bias_values=np.arange(len(bias), dtype=np.float32),
    )
    tokens = [draw(st.integers(0, VOCAB - 1)), *draw(TOKENS)]
    prompt_len = draw(st.integers(1, len(tokens)))
    stop_ids = draw(st.lists(st.integers(0, VOCAB - 1), max_size=3, unique=True))
    return Known(params, stop_ids, prompt_len, draw(st.sampled_from([0, 4])), draw(st.integers(20, 90)), tokens)


def ranges_of(columns: PlanColumns) -> list[list[list[tuple[int, float]]]]:
    """The (id, value) pairs of every range of every sequence; of stop and banned tokens the ids alone count."""
    ids, values = columns.tensors.ids.tolist(), columns.tensors.values.tolist()
    found = []
    for line in columns.tensors.ints.tolist():
        of_line = []
        for at in RANGES:
            places = range(line[at], line[at] + line[at + 1])
            has_values = at in (IntColumn.HISTORY_AT, IntColumn.BIAS_AT)
            pairs = [(ids[i], values[i] if has_values else 0.0) for i in places]
            of_line.append(pairs if has_values else sorted(pairs))
        found.append(of_line)
    return found


def assert_same_columns(got: PlanColumns, want: PlanColumns) -> None:
    assert ranges_of(got) == ranges_of(want)
    others = [column for column in IntColumn if column not in RANGES]
    assert torch.equal(got.tensors.ints[:, others], want.tensors.ints[:, others])
    assert torch.equal(got.tensors.floats, want.tensors.floats)
    assert torch.equal(got.tensors.rows, want.tensors.rows)
    assert torch.equal(got.draft_ids, want.draft_ids) and torch.equal(got.draft_probs, want.draft_probs)
    assert (got.depth, got.needs) == (want.depth, want.needs)
    assert np.array_equal(got.first_rows, want.first_rows)
    assert np.array_equal(got.num_logprobs, want.num_logprobs)


class Slots(RuleBasedStateMachine):
    """Sequences open, commit and close; a step over any of them has the columns that were made from nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SamplingTable(2)
        self.known: dict[int, Known] = {}

    @rule(sequence=sequences(), slot=st.integers(0, 5))
    def open(self, sequence: Known, slot: int) -> None:
        if slot in self.known:
            return
        if slot >= len(self.table.needs):
            self.table.grow(2 * slot)
        self.known[slot] = sequence
        self.table.open(
            slot,
            sequence.params,
            np.array(sequence.stop_ids, dtype=np.int64),
            sequence.prompt_len,
            sequence.min_new,
            sequence.max_len,
            np.array(sequence.tokens),
        )

    @rule(data=st.data())
    def close(self, data) -> None:
        if self.known:
            slot = data.draw(st.sampled_from(sorted(self.known)))
            del self.known[slot]
            self.table.close(slot)

    @rule(data=st.data())
    def commit(self, data) -> None:
        slots = data.draw(st.lists(st.sampled_from(sorted(self.known)), unique=True)) if self.known else []
        parts = [data.draw(TOKENS) for _ in slots]
        for slot, tokens in zip(slots, parts, strict=True):
            self.known[slot].tokens += tokens
        flat = np.array([token for tokens in parts for token in tokens], dtype=np.int64)
        self.table.commit(np.array(slots, dtype=np.int64), np.array([len(p) for p in parts], dtype=np.int64), flat)

    @rule(data=st.data())
    def step(self, data) -> None:
        slots = data.draw(st.lists(st.sampled_from(sorted(self.known)), unique=True, min_size=1)) if self.known else []
        if not slots:
            return
        plan, drafts = [], []
        for slot in slots:
            chain = data.draw(st.lists(st.integers(0, VOCAB - 1), max_size=4))
            count = data.draw(st.sampled_from([0, 1, 3])) if chain else 0
            others = [(token + i) % VOCAB for token in chain for i in range(count)]
            probs = data.draw(st.lists(st.floats(0, 1, width=32), min_size=len(others), max_size=len(others)))
            drawn = {"num_candidates": count, "candidate_ids": others, "candidate_probs": probs}
            plan.append(self.known[slot].plan(chain, data.draw(st.integers(-1, 9)), **drawn))
            drafts.append(drawn)
        rows = DrawRows(
            slots=np.array(slots),
            num_rows=np.array([one.num_rows for one in plan]),
            positions=np.array([one.position for one in plan]),
            token_ids=np.array([token for one in plan for token in one.tokens]),
            feature_rows=np.array([one.feature_row for one in plan]),
            num_candidates=np.array([one.num_candidates for one in plan]),
            candidate_ids=np.array([i for one in plan for i in one.candidate_ids], dtype=np.int64),
            candidate_probs=np.array([p for one in plan for p in one.candidate_probs], dtype=np.float32),
        )
        assert_same_columns(columns_of(rows, self.table, CPU), to_columns(plan, CPU))

    @rule()
    def counts_are_those_of_counting_again(self) -> None:
        self.table.settle()
        for slot, sequence in self.known.items():
            at, length = self.table.ints[slot, [IntColumn.HISTORY_AT, IntColumn.HISTORY_LEN]].tolist()
            ids = self.table.ids.reshape(-1)[at : at + length].tolist()
            values = self.table.values.reshape(-1)[at : at + length].tolist()
            assert ids == sorted(ids) and dict(zip(ids, values, strict=True)) == sequence.history()


TestSlots = Slots.TestCase
TestSlots.settings = settings(deadline=None, max_examples=60, stateful_step_count=25)


def test_trees_have_the_depths_and_first_children_of_columns_made_from_nothing():
    known = Known(SamplingParams(temperature=1.0, mode=REJECTION), [], 1, 0, 40, [3])
    table = SamplingTable(1)
    table.open(0, known.params, np.zeros(0, dtype=np.int64), 1, 0, 40, np.array([3]))
    plan = known.plan([5, 6, 7, 8, 9], -1)
    plan.parents = [-1, 0, 0, 2, 3, 1]
    rows = DrawRows(
        slots=np.zeros(1, dtype=np.int64),
        num_rows=np.array([6]),
        positions=np.zeros(1, dtype=np.int64),
        token_ids=np.array(plan.tokens),
        feature_rows=np.array([-1]),
        parents=np.array(plan.parents),
    )
    got = columns_of(rows, table, CPU)
    assert_same_columns(got, to_columns([plan], CPU))
    assert got.depth == 4 and got.draft_ids[:, 0].tolist() == [5, 9, 7, 8, -1, -1]


def test_other_devices_get_the_ranges_without_what_lies_between_them():
    table = SamplingTable(4)
    for slot in (1, 3):
        params = SamplingParams(repetition_penalty=1.5, bias_ids=np.array([slot]), bias_values=np.ones(1, np.float32))
        table.open(slot, params, np.array([7, 8]), 2, 5, 40, np.arange(slot, 9))
    rows = DrawRows(np.array([3, 1]), np.array([1, 1]), np.array([5, 5]), np.array([8, 8]), np.array([-1, -1]))
    here, there = columns_of(rows, table, CPU), columns_of(rows, table, torch.device("meta"))
    assert here.tensors.ids.shape == (4 * 32,)
    # One bias, two stop tokens that are banned as well, and the tokens from the slot's number on.
    assert there.tensors.ids.shape == there.tensors.values.shape == (2 * (1 + 2 + 2) + 6 + 8,)
    ints = here.tensors.ints.numpy().copy()
    ids, values = without_gaps(ints, here.tensors.ids.numpy(), here.tensors.values.numpy())
    tensors = here.tensors._replace(ints=torch.tensor(ints), ids=torch.tensor(ids), values=torch.tensor(values))
    assert ranges_of(replace(here, tensors=tensors)) == ranges_of(here)
