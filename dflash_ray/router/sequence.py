"""One request in the scheduler: what was asked, and what outlives a slot. All else is in its slot's columns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dflash_ray.core.arrays import Tokens
from dflash_ray.pb import common_pb2, router_pb2, target_pb2
from dflash_ray.router.context import DrafterContext
from dflash_ray.router.slot_table import SlotTable
from dflash_ray.router.speculation.records import Policy


@dataclass(slots=True, eq=False, repr=False)
class RouterSequence:
    """One request.

    Attributes:
        policy: how its drafts are counted.
        draft_tokens: drafts wanted a step, or at most; 0 is plain decoding.
        stream, call_id: where it came from and its tokens go; nothing here looks at them.
        num_losses: target groups that were lost with a step in flight that had this sequence in it.
        last_step: the last step with it, as of the time it left its slot.
        context: who drafts for it.
        slot: its row of `table`, or None while it waits.
    """

    sequence_id: int
    request: router_pb2.GenerateTokensRequest
    waiting_tokens: Tokens
    policy: Policy
    draft_tokens: int
    stream: int = 0
    call_id: int = 0
    num_losses: int = 0
    last_step: int = 0
    context: DrafterContext = field(default_factory=DrafterContext)
    table: SlotTable | None = None
    slot: int | None = None

    @property
    def tokens(self) -> Tokens:
        """Prompt and emitted tokens; a view while it has a slot."""
        if self.table is None or self.slot is None:
            return self.waiting_tokens
        return self.table.tokens[self.slot, : self.table.committed_lens[self.slot]]

    @property
    def committed_len(self) -> int:
        return len(self.tokens)

    @property
    def wants_distribution(self) -> bool:
        return self.request.sampling.mode == common_pb2.VERIFY_MODE_REJECTION

    def enter(self, table: SlotTable, slot: int) -> None:
        """It has a slot, which has a copy of its tokens."""
        self.table, self.slot = table, slot
        self.waiting_tokens = np.zeros(0, np.uint32)

    def leave(self) -> None:
        """Its slot is given to others; the target no longer has it."""
        assert self.table is not None
        self.waiting_tokens = self.tokens.copy()
        self.last_step = int(self.table.last_steps[self.slot])
        self.table = self.slot = None

    def open_message(self, wants_features: bool) -> target_pb2.OpenSequence:
        """What the target must know of it."""
        return target_pb2.OpenSequence(
            sequence_id=self.sequence_id,
            token_ids=self.tokens.tolist(),
            prompt_len=self.request.prompt_len,
            sampling=self.request.sampling,
            stopping=self.request.stopping,
            wants_features=wants_features,
            cache_salt=self.request.cache_salt,
        )
