"""The state of one request in the scheduler: its copy of the committed tokens, its place, its draft."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from dflash_ray.core.draft_blocks import DraftBlock
from dflash_ray.core.ngram import IndexingRoom, NgramDraft, NgramIndex
from dflash_ray.pb import router_pb2, target_pb2
from dflash_ray.router.context import DrafterContext


class Phase(Enum):
    """Where a sequence is."""

    WAITING = "waiting"  # not on the target
    PREFILL = "prefill"  # on the target, rows still to compute before it can decode
    DECODE = "decode"


@dataclass(slots=True, eq=False)
class RouterSequence:
    """One request.

    Attributes:
        tokens: prompt and emitted tokens, the router's copy of the committed truth.
        draft_tokens: drafts wanted a step; 0 is plain decoding.
        is_open: the target was sent the sequence.
        rows_in_step: rows of a prompt's chunk in the step in flight, while in PREFILL.
        num_prefilled: rows that the target says it has computed, while in PREFILL.
        num_losses: target groups that were lost with a step in flight that had this sequence in it.
        last_step: number of the last step with this sequence in it; who waited longest comes first.
        context: who drafts for it.
        draft: drafts for the next step, None while there are none.
        is_draft_missed: the next step goes on without a drafter's draft.
        drawn: the block they come from, when its drafts were drawn from its probabilities.
        draft_deadline: when the next step goes on without a remote draft; None when nothing is waited for.
    """

    sequence_id: int
    request: router_pb2.GenerateTokensRequest
    tokens: list[int]
    draft_tokens: int
    wants_features: bool
    arrived_at: float
    phase: Phase = Phase.WAITING
    in_step: bool = False
    cohort: int = 0
    is_open: bool = False
    rows_in_step: int = 0
    num_prefilled: int = 0
    num_losses: int = 0
    last_step: int = 0
    context: DrafterContext = field(default_factory=DrafterContext)
    is_draft_missed: bool = False
    draft: list[int] | None = None
    drawn: DraftBlock | None = None
    draft_source: str = "plain"
    draft_deadline: float | None = None
    ngram: NgramIndex | None = None
    ngram_draft: NgramDraft | None = None  # for the tokens of this moment, once it was looked up
    admitted_at: float = 0.0
    decoding_since: float = 0.0
    num_preemptions: int = 0

    @property
    def committed_len(self) -> int:
        return len(self.tokens)

    @property
    def num_computed(self) -> int:
        """Rows that the target has computed, as far as its results say."""
        return self.committed_len - 1 if self.phase is Phase.DECODE else self.num_prefilled

    def max_len(self, max_model_len: int) -> int:
        """Tokens at which it ends."""
        return min(max_model_len, self.request.prompt_len + self.request.stopping.max_new_tokens)

    def num_drafts(self, max_model_len: int) -> int:
        """Drafts worth verifying now: a step with k drafts can emit k + 1 tokens."""
        return max(0, min(self.draft_tokens, self.max_len(max_model_len) - self.committed_len - 1))

    def wants_draft(self, max_model_len: int) -> bool:
        """Whether a drafter should draft for the next step."""
        is_idle = self.phase is Phase.DECODE and not self.in_step
        return is_idle and self.draft is None and not self.is_draft_missed and self.num_drafts(max_model_len) > 0

    def look_up(self, count: int, room: IndexingRoom) -> NgramDraft:
        """Prompt lookup, at most `count` drafts; of a long text no more is indexed now than there is room for."""
        if self.ngram_draft is None:
            if self.ngram is None:
                self.ngram = NgramIndex()
            self.ngram.extend(self.tokens[len(self.ngram) :])
            self.ngram.catch_up(room)
            self.ngram_draft = self.ngram.propose(count)
        return self.ngram_draft

    def take_ngram(self, count: int, room: IndexingRoom) -> None:
        """The n-gram's draft for the next step, or none."""
        self.draft = self.look_up(count, room).tokens[:count]
        self.drawn = None
        self.draft_source = "ngram" if self.draft else "plain"

    def append(self, tokens: list[int]) -> None:
        """Committed tokens; drafts were for those before them."""
        self.forget_draft()
        self.ngram_draft = None
        self.tokens.extend(tokens)

    def leave_target(self) -> None:
        """Back to waiting: the target no longer has it, the tokens stay."""
        self.phase = Phase.WAITING
        self.in_step = False
        self.is_open = False
        self.rows_in_step = 0
        self.num_prefilled = 0
        self.forget_draft()
        self.context.is_open = False

    def take_draft(self, block: DraftBlock, source: str) -> None:
        """A draft for the next step."""
        self.draft = block.draft_ids
        self.drawn = block if block.is_drawn else None
        self.draft_source = source

    def forget_draft(self) -> None:
        self.draft, self.drawn, self.draft_deadline, self.draft_source = None, None, None, "plain"
        self.is_draft_missed = False

    def miss_draft(self) -> None:
        """The next step goes on without the draft that was waited for."""
        self.draft_deadline = None
        self.is_draft_missed = True

    def leave_drafter(self) -> None:
        """The drafter's context is of no use any more."""
        self.context.leave()
        self.draft_deadline = None

    def open_message(self) -> target_pb2.OpenSequence:
        return target_pb2.OpenSequence(
            sequence_id=self.sequence_id,
            token_ids=self.tokens,
            prompt_len=self.request.prompt_len,
            sampling=self.request.sampling,
            stopping=self.request.stopping,
            wants_features=self.wants_features,
        )
