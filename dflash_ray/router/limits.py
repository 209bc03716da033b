"""What a target group can take, and whether a request fits it."""

from __future__ import annotations

from dataclasses import dataclass

from dflash_ray.core.errors import InvalidRequestError
from dflash_ray.pb import router_pb2


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

    def pages(self, tokens: int) -> int:
        """KV pages of so many rows."""
        return -(-tokens // self.page_size)

    def check_fits(self, request: router_pb2.GenerateTokensRequest) -> None:
        """Raises InvalidRequestError when the request can never run here."""
        length = len(request.token_ids)
        if length >= self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {length} tokens, but prompt and answer must fit the context of "
                f"{self.max_model_len}; shorten the prompt",
                "prompt",
            )
        if self.pages(length + 1) > self.num_pages:
            raise InvalidRequestError(
                f"the prompt has {length} tokens, more than the KV cache holds; shorten the prompt", "prompt"
            )
        if max(request.token_ids) >= self.vocab_size:
            raise InvalidRequestError(f"token ids must be below {self.vocab_size}", "prompt")
