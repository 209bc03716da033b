"""The verification operators in plain torch and numpy: short, slow and obviously right.

Stands in for the compiled operators where there is no compiler, and is their oracle in tests. Signatures and shapes are
those of `ops`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_ray.kernels import reference_floats
from dflash_ray.kernels.columns import (
    MASS_UNIT,
    NUM_BINS,
    NUM_TOP_K_ROUNDS,
    CommitColumn,
    FloatColumn,
    IntColumn,
    Mode,
    OutcomeColumn,
    Partial,
    PlanTensors,
    Purpose,
    StateColumn,
)

_MASK = np.uint64(0xFFFFFFFF)


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10 over counters [4, n] (32-bit words in uint64); returns [4, n]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & _MASK,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3))


def uniforms(seed: int, position: int, ids: NDArray[np.int64], purpose: int) -> NDArray[np.float64]:
    """Open uniforms of 24 bits, one for each token id."""
    tokens = ids.astype(np.uint64)
    counter = np.empty((4, len(tokens)), dtype=np.uint64)
    counter[0], counter[1] = position & 0xFFFFFFFF, position >> 32
    counter[2], counter[3] = tokens >> np.uint64(2), purpose
    seed &= (1 << 64) - 1
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    chosen = words[(tokens & np.uint64(3)).astype(np.int64), np.arange(len(tokens))]
    return ((chosen >> np.uint64(8)).astype(np.float64) + 0.5) * 2.0**-24


def gumbel_noise(seeds: Tensor, positions: Tensor, ids: Tensor, purpose: int) -> Tensor:
    rows = [
        reference_floats.gumbel(uniforms(seed, position, row, purpose)).astype(np.float64)
        for seed, position, row in zip(seeds.tolist(), positions.tolist(), ids.cpu().numpy(), strict=True)
    ]
    return torch.from_numpy(np.array(rows).reshape(ids.shape)).to(ids.device)


class _Row:
    """Everything that the plan says of one row."""

    def __init__(self, plan: PlanTensors, index: int) -> None:
        self.plan = plan
        self.sequence, self.position, self.token, self.parent = plan.rows[index].tolist()
        self.ints = plan.ints[self.sequence].tolist()
        self.floats = plan.floats[self.sequence].tolist()
        self.inv_temperature = plan.floats[self.sequence, FloatColumn.INV_TEMPERATURE]
        self.is_greedy = self.floats[FloatColumn.INV_TEMPERATURE] == 0

    def entries(self, at: IntColumn, length: IntColumn) -> list[tuple[int, float]]:
        """(id, value) pairs of one of the sequence's ranges."""
        begin, end = self.ints[at], self.ints[at] + self.ints[length]
        return list(zip(self.plan.ids[begin:end].tolist(), self.plan.values[begin:end].tolist(), strict=True))

    def path(self) -> list[int]:
        """Draft tokens from the row up to below the root."""
        return [] if self.parent < 0 else [self.token, *_Row(self.plan, self.parent).path()]

    def scaled(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        return logits if self.is_greedy else logits * self.inv_temperature


def _rows(plan: PlanTensors) -> list[_Row]:
    return [_Row(plan, i) for i in range(len(plan.rows))]


def _adjust(logits: Tensor, vocab_start: int, plan: PlanTensors) -> None:
    """Penalties, bias and bans, in place."""
    for row, line in zip(_rows(plan), logits, strict=True):
        presence, frequency, repetition = row.floats[FloatColumn.PRESENCE : FloatColumn.REPETITION + 1]
        if presence or frequency or repetition != 1:
            counts = dict(row.entries(IntColumn.HISTORY_AT, IntColumn.HISTORY_LEN))
            for token in row.path():
                counts[token] = counts.get(token, 0) + 1
            for token, times in counts.items():
                if 0 <= token - vocab_start < len(line):
                    value = line[token - vocab_start].double()
                    value = (value / repetition if value > 0 else value * repetition).float().double()
                    value = (value - frequency * times).float()
                    line[token - vocab_start] = value - presence if times > 0 else value
        for token, bias in row.entries(IntColumn.BIAS_AT, IntColumn.BIAS_LEN):
            if 0 <= token - vocab_start < len(line):
                line[token - vocab_start] = line[token - vocab_start].float() + bias
        if row.position < row.ints[IntColumn.BAN_BELOW]:
            for token, _ in row.entries(IntColumn.BANNED_AT, IntColumn.BANNED_LEN):
                if 0 <= token - vocab_start < len(line):
                    line[token - vocab_start] = -math.inf


def _maximum(scaled: Tensor) -> tuple[float, bool]:
    """Largest value, -inf without any; whether a value is NaN or +inf."""
    known = scaled[~scaled.isnan()]
    maximum = known.max().item() if len(known) else -math.inf
    return maximum, len(known) < len(scaled) or maximum == math.inf


def verify_prepare(logits: Tensor, vocab_start: int, plan: PlanTensors) -> Tensor:
    _adjust(logits, vocab_start, plan)
    stats = [_maximum(row.scaled(line)) for row, line in zip(_rows(plan), logits, strict=True)]
    return torch.tensor(stats, dtype=torch.float64, device=logits.device).view(-1, 2)


def _keys(values: Tensor) -> Tensor:
    """int64 keys in the order of the float32 values; both zeros are one."""
    bits = torch.where(values == 0, 0.0, values).view(torch.int32).long() & 0xFFFFFFFF
    return torch.where(bits >> 31 == 1, ~bits & 0xFFFFFFFF, bits | 0x80000000)


def _value_of_key(key: int) -> Tensor:
    bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
    return torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32)[0]


def _masses(row: _Row, logits: Tensor, maximum: float) -> Tensor:
    """int64 masses of logits, relative to a token of scaled logit `maximum`."""
    below = reference_floats.fma(logits.float().cpu().numpy(), row.inv_temperature.item(), -maximum)
    masses = np.floor(reference_floats.exp_of_nonpositive(below) * np.float32(MASS_UNIT))
    return torch.from_numpy(masses.astype(np.int64)).to(logits.device)


def _concerns(row: _Row, round_index: int) -> bool:
    if row.is_greedy:
        return False
    is_top_k = round_index < NUM_TOP_K_ROUNDS
    return row.ints[IntColumn.TOP_K] > 0 if is_top_k else row.floats[FloatColumn.TOP_P] < 1


def threshold_start(maxima: Tensor, plan: PlanTensors) -> Tensor:
    state = torch.zeros(len(plan.rows), len(StateColumn), dtype=torch.int64)
    for i, row in enumerate(_rows(plan)):
        floor = -math.inf if row.is_greedy else maxima[i].item() + row.floats[FloatColumn.LOG_MIN_P]
        floor = -math.inf if math.isnan(floor) else floor
        state[i, StateColumn.FLOOR_KEY] = _keys(torch.tensor([floor], dtype=torch.float32))[0]
    return state.to(plan.rows.device)


def threshold_histogram(
    logits: Tensor, vocab_start: int, plan: PlanTensors, maxima: Tensor, state: Tensor, round_index: int
) -> Tensor:
    histogram = torch.zeros(len(plan.rows), NUM_BINS, dtype=torch.int64)
    shift = 24 - 8 * (round_index % NUM_TOP_K_ROUNDS)
    for i, row in enumerate(_rows(plan)):
        if not _concerns(row, round_index):
            continue
        prefix, _, floor_key = state[i].tolist()
        scaled = row.scaled(logits[i])
        keys = _keys(scaled)
        weights = torch.ones_like(keys) if round_index < NUM_TOP_K_ROUNDS else _masses(row, logits[i], maxima[i].item())
        left = (keys >= floor_key) & (keys >> (shift + 8) == prefix >> (shift + 8))
        histogram[i].index_add_(0, (keys[left] >> shift) & (NUM_BINS - 1), weights[left])
    return histogram.to(logits.device)


def threshold_narrow(state: Tensor, histogram: Tensor, plan: PlanTensors, round_index: int) -> None:
    shift = 24 - 8 * (round_index % NUM_TOP_K_ROUNDS)
    for i, row in enumerate(_rows(plan)):
        if not _concerns(row, round_index):
            continue
        prefix, wanted, floor_key = state[i].tolist()
        if shift == 24:
            total = int(histogram[i].sum())
            share = max(1, math.ceil(row.floats[FloatColumn.TOP_P] * total))
            prefix, wanted = 0, min(total, row.ints[IntColumn.TOP_K] if round_index < NUM_TOP_K_ROUNDS else share)
        reached = histogram[i].flip(0).cumsum(0)
        step = min(int((reached < wanted).sum()), NUM_BINS - 1)
        wanted -= int(reached[step - 1]) if step else 0
        prefix |= (NUM_BINS - 1 - step) << shift
        state[i] = torch.tensor([prefix, wanted, max(floor_key, prefix) if shift == 0 else floor_key])


def verify_greedy(logits: Tensor, vocab_start: int, plan: PlanTensors, adjusts: bool) -> Tensor:
    return verify_coupled(logits, vocab_start, plan, None, adjusts)


def verify_coupled(logits: Tensor, vocab_start: int, plan: PlanTensors, state: Tensor | None, adjusts: bool) -> Tensor:
    if adjusts:
        _adjust(logits, vocab_start, plan)
    lines = [
        _draw(line, vocab_start, row, i, state) for i, (row, line) in enumerate(zip(_rows(plan), logits, strict=True))
    ]
    return torch.tensor(lines, dtype=torch.float64, device=logits.device).view(-1, Partial.MASS)


def _floor(state: Tensor | None, index: int) -> Tensor:
    return torch.tensor(-math.inf) if state is None else _value_of_key(int(state[index, StateColumn.FLOOR_KEY]))


def _draw(
    line: Tensor,
    vocab_start: int,
    row: _Row,
    index: int,
    state: Tensor | None,
    purpose: Purpose = Purpose.TARGET,
    without: list[int] | None = None,
) -> list[float]:
    """Score and token of the winner, the maximum, and whether the row is bad."""
    scaled = row.scaled(line)
    maximum, is_bad = _maximum(scaled)
    if is_bad or maximum == -math.inf:
        return [-math.inf, -1, maximum, is_bad]
    scores = scaled.double()
    if not row.is_greedy:
        ids = np.arange(vocab_start, vocab_start + len(line))
        noise = reference_floats.gumbel(uniforms(row.ints[IntColumn.SEED], row.position, ids, purpose))
        scores = scores + torch.from_numpy(noise).to(scores.device)
        scores[scaled < _floor(state, index)] = -math.inf
        for token in without or []:
            if 0 <= token - vocab_start < len(line):
                scores[token - vocab_start] = -math.inf
    best = int(scores.argmax())
    if scores[best] == -math.inf:
        return [-math.inf, -1, maximum, is_bad]
    return [scores[best].item(), best + vocab_start, maximum, is_bad]


def _is_judged(row: _Row, draft_ids: list[int]) -> bool:
    return row.ints[IntColumn.MODE] == Mode.REJECTION and not row.is_greedy and bool(draft_ids) and draft_ids[0] >= 0


def verify_rejection(
    logits: Tensor,
    vocab_start: int,
    plan: PlanTensors,
    maxima: Tensor,
    state: Tensor | None,
    draft_ids: Tensor,
    draft_probs: Tensor,
) -> Tensor:
    lines = []
    for i, (row, line) in enumerate(zip(_rows(plan), logits, strict=True)):
        ids = draft_ids[i].tolist()
        if not _is_judged(row, ids):
            lines.append([*_draw(line, vocab_start, row, i, state), 0.0, *(0.0 for _ in ids)])
            continue
        partial = _draw(line, vocab_start, row, i, state, Purpose.RESIDUAL, ids)
        if partial[Partial.IS_BAD]:
            lines.append([*partial, 0.0, *(0.0 for _ in ids)])
            continue
        scaled = row.scaled(line)
        masses = _masses(row, line, maxima[i].item())
        masses[scaled < _floor(state, i)] = 0
        inside = [0 <= token - vocab_start < len(line) for token in ids]
        of_drafts = [float(masses[t - vocab_start]) if has else 0.0 for t, has in zip(ids, inside, strict=True)]
        lines.append([*partial, float(masses.sum()), *of_drafts])
    return torch.tensor(lines, dtype=torch.float64, device=logits.device).view(len(plan.rows), -1)


def verify_unsharded(
    logits: Tensor,
    vocab_start: int,
    plan: PlanTensors,
    draft_ids: Tensor,
    draft_probs: Tensor,
    adjusts: bool,
    has_min_p: bool,
    has_top_k: bool,
    has_top_p: bool,
) -> Tensor:
    maxima = verify_prepare(logits, vocab_start, plan)[:, 0]
    state = threshold_start(maxima, plan)
    for index in range(2 * NUM_TOP_K_ROUNDS):
        threshold_narrow(state, threshold_histogram(logits, vocab_start, plan, maxima, state, index), plan, index)
    if not draft_ids.shape[1]:
        return verify_coupled(logits, vocab_start, plan, state, False)
    return verify_rejection(logits, vocab_start, plan, maxima, state, draft_ids, draft_probs)


def verify_combine(partials: Tensor, plan: PlanTensors, draft_ids: Tensor, draft_probs: Tensor, depth: int) -> Tensor:
    rows, shards = _rows(plan), partials.cpu()
    outcome = torch.full((len(plan.ints), OutcomeColumn.TOKENS + 2 * depth), -1, dtype=torch.int64)
    for sequence, ints in enumerate(plan.ints.tolist()):
        first, stop = ints[IntColumn.FIRST_ROW], ints[IntColumn.FIRST_ROW] + ints[IntColumn.NUM_ROWS]
        mine = shards[:, first:stop]
        finite = mine[:, :, Partial.MAXIMUM].amax(0).isfinite().all() and not mine[:, :, Partial.IS_BAD].any()
        tokens, accepted = _walk(rows, shards, first, stop, draft_ids, draft_probs) if finite else ([], [])
        outcome[sequence, OutcomeColumn.NUM_ACCEPTED] = len(accepted)
        outcome[sequence, OutcomeColumn.IS_FLAGGED] = not finite
        outcome[sequence, OutcomeColumn.TOKENS : OutcomeColumn.TOKENS + len(tokens)] = torch.tensor(tokens)
        at = OutcomeColumn.TOKENS + depth
        outcome[sequence, at : at + len(accepted)] = torch.tensor(accepted)
    return outcome.to(partials.device)


def _walk(
    rows: list[_Row], shards: Tensor, first: int, stop: int, draft_ids: Tensor, draft_probs: Tensor
) -> tuple[list[int], list[int]]:
    tokens: list[int] = []
    accepted: list[int] = []
    row = first
    while True:
        children = [i for i in range(row + 1, stop) if rows[i].parent == row]
        if _is_judged(rows[row], draft_ids[row].tolist() if len(draft_ids) else []):
            token, goes_on = _judge(
                rows[row], shards[:, row], rows[children[0]].token, draft_ids[row], draft_probs[row]
            )
        else:
            best = shards[:, row, Partial.SCORE].argmax()  # shards ascend, and argmax takes the first
            token, goes_on = int(shards[best, row, Partial.TOKEN]), True
        tokens.append(token)
        child = next((i for i in children if rows[i].token == token), None) if goes_on else None
        if child is None:
            return tokens, accepted
        accepted.append(child - first)
        row = child


def _judge(row: _Row, shards: Tensor, child: int, draft_ids: Tensor, draft_probs: Tensor) -> tuple[int, bool]:
    """Accepts the child with probability target / draft, else draws from what the target has beyond the draft."""
    total = shards[:, Partial.MASS].sum().item()
    seed, maximum = row.ints[IntColumn.SEED], shards[:, Partial.MAXIMUM].max().item()
    best = int(shards[:, Partial.SCORE].argmax())
    score, token = shards[best, : Partial.TOKEN + 1].tolist()
    for i, (drafted, prob) in enumerate(zip(draft_ids.tolist(), draft_probs.tolist(), strict=True)):
        mass = shards[:, Partial.MASS + 1 + i].sum().item()
        if (
            drafted == child
            and uniforms(seed, row.position, np.zeros(1, np.int64), Purpose.ACCEPT)[0] * prob * total < mass
        ):
            return child, True
        if drafted >= 0 and mass > prob * total:
            noise = reference_floats.gumbel(uniforms(seed, row.position, np.array([drafted]), Purpose.RESIDUAL))
            share = reference_floats.log(np.array([(mass - prob * total) / MASS_UNIT], dtype=np.float32))
            residual = float(share[0]) + maximum + float(noise[0])
            if residual > score:
                score, token = residual, drafted
    return (child, True) if token < 0 else (int(token), False)


def commit(outcome: Tensor, plan: PlanTensors, features: Tensor | None) -> Tensor:
    commits = torch.zeros(len(outcome), len(CommitColumn), dtype=torch.int64)
    depth = (outcome.shape[1] - OutcomeColumn.TOKENS) // 2
    for s, (ints, line) in enumerate(zip(plan.ints.tolist(), outcome.tolist(), strict=True)):
        commits[s, CommitColumn.KV_LEN] = ints[IntColumn.ROOT_POSITION]
        if line[OutcomeColumn.IS_FLAGGED]:
            continue
        count = 1 + line[OutcomeColumn.NUM_ACCEPTED]
        stops = plan.ids[ints[IntColumn.STOP_AT] :][: ints[IntColumn.STOP_LEN]].tolist()
        kept = finish = 0
        while kept < count and not finish:
            token = line[OutcomeColumn.TOKENS + kept]
            kept += 1
            length = ints[IntColumn.ROOT_POSITION] + 1 + kept
            if token in stops and length > ints[IntColumn.MIN_LEN]:
                finish = 1
            elif length >= ints[IntColumn.MAX_LEN]:
                finish = 2
        commits[s] = torch.tensor([kept, finish, count, ints[IntColumn.ROOT_POSITION] + count])
        first = ints[IntColumn.FEATURE_ROW]
        if features is not None and first >= 0:
            rows = [0, *line[OutcomeColumn.TOKENS + depth :][: count - 1]]
            features[first : first + count] = features[[first + row for row in rows]]
    return commits.to(outcome.device)


def count_history(ids: Tensor, values: Tensor, ints: Tensor, slots: Tensor, counts: Tensor, tokens: Tensor) -> None:
    flat_ids, flat_values = ids.view(-1), values.view(-1)
    for slot, token in zip(slots.repeat_interleave(counts).tolist(), tokens.tolist(), strict=True):
        begin, length = ints[slot, [IntColumn.HISTORY_AT, IntColumn.HISTORY_LEN]].tolist()
        place = begin + int(torch.searchsorted(flat_ids[begin : begin + length], token))
        end = begin + length
        if place < end and flat_ids[place] == token:
            flat_values[place] += 1
            continue
        for flat, value in ((flat_ids, token), (flat_values, 1)):
            flat[place + 1 : end + 1] = flat[place:end].clone()
            flat[place] = value
        ints[slot, IntColumn.HISTORY_LEN] += 1


def token_logprobs(logits: Tensor, vocab_start: int, chosen: Tensor, num_top: int) -> Tensor:
    out = torch.full((len(logits), 3 + 2 * num_top), -math.inf, dtype=torch.float64)
    out[:, 4::2] = -1
    for line, row, token in zip(out, logits.double().cpu(), chosen.tolist(), strict=True):
        if len(row):
            line[0] = row.max()
            line[1] = torch.exp(row - row.max()).sum() if line[0] > -math.inf else 0.0
        else:
            line[1] = 0.0
        if 0 <= token - vocab_start < len(row):
            line[2] = row[token - vocab_start]
        order = [i for i in row.argsort(descending=True, stable=True).tolist() if row[i] > -math.inf][:num_top]
        for n, i in enumerate(order):
            line[3 + 2 * n], line[4 + 2 * n] = row[i], i + vocab_start
    return out.to(logits.device)
