"""What the target's own library says: greedy text by `transformers`, and how near two tokens were at a position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dflash_ray.models.target_checkpoint import resolve_target

NEAR_TIE = 1e-3  # fp32 sums differ by their shape; measured gaps of real flips are below 1e-4


class Reference:
    """The builtin model in fp32, run by transformers."""

    def __init__(self) -> None:
        checkpoint = resolve_target("builtin:smollm2")
        self.model = checkpoint.load_model(torch.float32).eval()
        self.tokenizer = checkpoint.load_tokenizer()

    def chat_ids(self, content: str) -> list[int]:
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(rendered["input_ids"])

    @torch.inference_mode()
    def greedy(self, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        ids = torch.tensor([list(prompt_ids)])
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
        )
        return output[0, len(prompt_ids) :].tolist()

    @torch.inference_mode()
    def gap(self, prefix_ids: Sequence[int], one: int, other: int) -> float:
        """Distance of two tokens' logits after a prefix."""
        logits = self.model(torch.tensor([list(prefix_ids)]), logits_to_keep=1).logits[0, -1].double()
        return abs(float(logits[one] - logits[other]))


@dataclass
class Comparison:
    """Counts of sequences; a near-tie ends the comparison of its sequence."""

    equal: int = 0
    near_ties: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    def add(
        self,
        reference: Reference,
        name: str,
        prompt_ids: Sequence[int],
        expected: Sequence[int],
        got: Sequence[int],
    ) -> None:
        if list(expected) == list(got):
            self.equal += 1
            return
        at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), None)
        if at is None:
            self.different.append(f"{name}: lengths {len(expected)} and {len(got)}")
            return
        gap = reference.gap([*prompt_ids, *expected[:at]], expected[at], got[at])
        line = f"{name}: token {at}: {expected[at]} or {got[at]}, gap {gap:.2e}"
        (self.near_ties if gap < NEAR_TIE else self.different).append(line)

    def __str__(self) -> str:
        lines = [f"equal {self.equal}, near-ties {len(self.near_ties)}, different {len(self.different)}"]
        return "\n".join([*lines, *self.near_ties, *self.different])
