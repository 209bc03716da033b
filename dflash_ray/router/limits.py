"""What a target group can take, and whether a request fits it."""

from __future__ import annotations

from dataclasses import dataclass

from dflash_ray.core.arrays import Tokens
from dflash_ray.core.errors import InvalidRequestError, prompt_too_long


@dataclass(frozen=True, slots=True)
class TargetLimits:
    """What the target group said in its hello, the lease's epoch, and where drafters find the group."""

    epoch: int
    max_model_len: int
    vocab_size: int
    page_size: int
    num_pages: int
    max_batch_tokens: int
    colocated_draft_tokens: int = 0
    address: str = ""
    feature_fingerprint: str = ""

    @property
    def has_drafter(self) -> bool:
        """Whether a drafter beside n-grams may draft, in the group or out of it."""
        return bool(self.feature_fingerprint or self.colocated_draft_tokens)

    def pages(self, tokens: int) -> int:
        """KV pages of so many rows."""
        return -(-tokens // self.page_size)

    def check_fits(self, token_ids: Tokens) -> None:
        """Raises InvalidRequestError when a request with these tokens can never run here."""
        if len(token_ids) >= self.max_model_len:
            raise prompt_too_long(len(token_ids), self.max_model_len, "prompt")
        if self.pages(len(token_ids) + 1) > self.num_pages:
            raise InvalidRequestError(
                f"has {len(token_ids)} tokens, more than the KV cache holds; shorten it", "prompt"
            )
        if int(token_ids.max()) >= self.vocab_size:
            raise InvalidRequestError(f"token ids must be below {self.vocab_size}", "prompt")
