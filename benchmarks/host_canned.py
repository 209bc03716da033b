"""What costs nothing: a model's verdicts, a drafter's drafts, and a feature store without rows of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from host_cases import DRAFTS, FINGERPRINT, KEPT_DRAFTS, PAGE, Case, Clock, Texts
from numpy.typing import NDArray

from dflash_ray.kernels.columns import IntColumn
from dflash_ray.models.context_features import PackedRows, pack
from dflash_ray.models.dflash2 import Draw
from dflash_ray.models.draft_contexts import ContextRows
from dflash_ray.models.draft_proposals import DraftProposals
from dflash_ray.models.feature_pages import FeaturePages
from dflash_ray.sampling.columns import PlanColumns
from dflash_ray.sampling.logprobs import Logprobs
from dflash_ray.sampling.verify import Verdict
from dflash_ray.target_group.batch import StepBatch
from dflash_ray.target_group.feature_store import FeatureStore
from dflash_ray.target_group.model import StepHidden
from dflash_ray.target_group.step import StepFeatures

COLD_BYTES = 64 << 20
PAGES_AHEAD = 6  # of each sequence, whose memory is there before anything is counted


class DecodedStore(FeatureStore):
    """Rows of prompts are not kept."""

    def __init__(self, case: Case) -> None:
        num_pages, dtype = case.config().target.num_pages, getattr(torch, case.dtype)
        shared = FeaturePages.create(num_pages, PAGE, case.width, dtype)
        super().__init__(num_pages * PAGE, case.width, dtype, "cpu", shared)
        self._narrow = torch.zeros(1, case.prompt_width, dtype=dtype)
        self._is_starting = case.prompt_width != case.width

    def put(self, features: StepFeatures) -> None:
        if features.rows.shape[1] == self._rows.shape[1]:
            super().put(features)

    def read(self, places: NDArray[np.int64]) -> PackedRows:
        return pack(self._narrow.expand(len(places), -1)) if self._is_starting else super().read(places)

    def start(self, warm: NDArray[np.int64]) -> None:
        """Prompts are over; memory of the rows `warm` is there from now on."""
        self._is_starting = False
        self._rows[torch.from_numpy(warm)] = 0


class CannedRunner:
    """A rank without a model: the verdict is canned. `clock` goes on with what the engine does after each call."""

    device = torch.device("cpu")

    def __init__(self, case: Case, clock: Clock, texts: Texts) -> None:
        self._clock = clock
        self._texts = texts.tokens
        self._prompt_width = case.prompt_width
        self.is_starting = case.prompt_width != case.width
        self._features = torch.zeros(case.sequences * (DRAFTS + 1), case.width, dtype=getattr(torch, case.dtype))
        self._weights = np.ones(COLD_BYTES // 8 if case.is_cold else 0)

    def forward(self, batch: StepBatch, columns: PlanColumns | None) -> StepHidden:
        self._clock.to(None)
        np.negative(self._weights, out=self._weights)
        num_rows = len(batch.feature_rows)
        if num_rows > len(self._features) or self.is_starting:
            features = self._features[:1, : self._prompt_width].expand(num_rows, -1)
        else:
            features = self._features[:num_rows]
        self._clock.to("target columns")
        return StepHidden(torch.empty(0), features)

    def verify(self, hidden: StepHidden, columns: PlanColumns) -> Verdict:
        self._clock.to(None)
        ints = columns.tensors.ints.numpy()
        seeds, starts = ints[:, IntColumn.SEED], ints[:, IntColumn.ROOT_POSITION] + 1
        num_tokens = np.minimum(KEPT_DRAFTS, ints[:, IntColumn.NUM_ROWS] - 1) + 1
        depth = np.arange(columns.depth)
        last = self._texts.shape[1] - 1
        verdict = Verdict(
            tokens=self._texts[seeds[:, None], np.minimum(starts[:, None] + depth, last)].astype(np.int64),
            accepted_rows=np.where(depth < num_tokens[:, None] - 1, depth + 1, -1),
            num_tokens=num_tokens,
            num_accepted=num_tokens - 1,
            finishes=np.zeros_like(num_tokens),
            kv_lens=starts - 1 + num_tokens,
            is_flagged=np.zeros(len(ints), dtype=np.bool_),
        )
        self._clock.to("target commit")
        return verdict

    def score(self, hidden: StepHidden, batch: StepBatch) -> Logprobs:
        return Logprobs()


class CannedDrafts:
    """A draft method whose sessions are as long as they should be, and whose drafts are the texts."""

    name, fingerprint, max_draft_tokens = "canned", FINGERPRINT, DRAFTS

    def __init__(self, case: Case, clock: Clock, texts: Texts) -> None:
        self.feature_width = case.prompt_width
        self._clock = clock
        self._texts = texts.tokens
        self._lens: dict[int, int] = {}

    def open(self, session: int) -> None:
        self._lens[session] = 0

    def close(self, session: int) -> None:
        del self._lens[session]

    def extend(self, rows: ContextRows) -> None:
        for session, end in zip(rows.sessions.tolist(), (rows.starts + rows.counts).tolist(), strict=True):
            self._lens[session] = end

    def propose(
        self,
        sessions: list[int],
        anchor_ids: list[int],
        num_draft_tokens: list[int],
        num_candidates: int,
        draws: Sequence[Draw],
        tree_width: int = 1,
    ) -> DraftProposals:
        self._clock.to(None)
        seeds = np.array([draw.seed for draw in draws])
        starts = np.array([self._lens[session] for session in sessions]) + 1
        drafts = self._texts[seeds[:, None], starts[:, None] + np.arange(max(num_draft_tokens))][..., None]
        ones, counts = np.ones(len(sessions), dtype=np.int64), np.array(num_draft_tokens)
        self._clock.to("drafter")
        return DraftProposals(drafts, np.zeros(drafts.shape, dtype=np.float32), counts, ones, ones < 1)
