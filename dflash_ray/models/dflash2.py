"""What DFlash 2 adds to DFlash: convolutions along the block, and a selector of candidates that depend on each other.

Numerics follow the published z-lab reference (PyPI `dflash` 0.1.0). Shapes: N blocks of B slots, hidden size H in
G groups, K taps; S drafted slots, k candidates a slot, selector rank r.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_ray.kernels import draft_ops
from dflash_ray.sampling.noise import gumbel

# Seen of the drafter that comes along, greedy and at temperature 1: of all tokens that the target chose, so many are
# among the candidates.
_LOG_COVERAGE = float(np.log(0.8))


@dataclass(frozen=True)
class Dflash2Config:
    """Shape of the convolutions and the selector; names as in the published config.json.

    Attributes:
        is_factorised: the codebooks are projections of the target's embedding and head, an architecture of our own.
    """

    conv_kernel_size: int
    conv_group_size: int
    selector_rank: int
    selector_top_k: int
    is_factorised: bool = False


@dataclass(frozen=True, slots=True)
class Draw:
    """How a sequence's tokens are drawn.

    Attributes:
        temperature: 0 is greedy.
        seed: key of the noise above it.
        wants_distribution: all candidates of a draw come back, not only the likeliest.
    """

    temperature: float = 0.0
    seed: int = 0
    wants_distribution: bool = False


class GroupedDynamicCausalConv(nn.Module):
    """A convolution over a block's slots before a sublayer and one after it.

    A tap's coefficient is base_kernel, one a channel, plus a part that depends on the slot, one a group of channels.
    Both parts that depend on the slot come from the sublayer's own normed input. Starts as the identity.
    """

    def __init__(self, hidden_size: int, config: Dflash2Config) -> None:
        super().__init__()
        self.kernel_size, self.group_size = config.conv_kernel_size, config.conv_group_size
        num_coefficients = 2 * self.kernel_size * (hidden_size // self.group_size)
        self.base_kernel = nn.Parameter(torch.zeros(2, self.kernel_size, hidden_size))
        nn.init.ones_(self.base_kernel[:, 0])
        projection = nn.Linear(hidden_size, num_coefficients, bias=False)
        nn.init.zeros_(projection.weight)
        self.kernel_projection: nn.Module = projection

    def forward(self, normed: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """The sublayer's output for rows [N, B, H] of N independent blocks, convolved on both sides."""
        dynamic = self.kernel_projection(normed).unflatten(-1, (2, self.kernel_size, -1, 1))
        base = self.base_kernel.unflatten(-1, (-1, self.group_size))
        before, after = (base + dynamic).flatten(-2).unbind(2)  # [N, B, K, H]
        return _convolve(sublayer(_convolve(normed, before)), after)


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """Sum over taps o of kernel[:, :, o] * (x, o slots earlier); nothing comes from before the block."""
    out = kernel[:, :, 0] * x
    for tap in range(1, min(kernel.shape[2], x.shape[1])):
        out[:, tap:] += kernel[:, tap:, tap] * x[:, :-tap]
    return out


class CandidateSelector(nn.Module):
    """Scores of a slot's candidates given the token chosen for the slot before: a bilinear form of rank r.

    score(token | previous) = logit(token) + sum over r of predecessor[previous] * (W hidden) * successor[token].
    Starts with scores that are the logits.
    """

    def __init__(self, num_tokens: int, hidden_size: int, config: Dflash2Config) -> None:
        super().__init__()
        self.top_k = min(config.selector_top_k, num_tokens)
        self.hidden_projection = nn.Linear(hidden_size, config.selector_rank, bias=False)

    def codebooks(self) -> tuple[Tensor, Tensor]:
        """Of predecessors and of successors, [tokens, r] each."""
        raise NotImplementedError

    def forward(self, hidden: Tensor, logits: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates of all slots, and their scores after every candidate of the slot before.

        Args:
            hidden: [N, S, H], slots 1, 2, ... after the final norm; logits: float32 [N, S, vocabulary].
            anchors: int64 [N], the tokens of slot 0.

        Returns:
            ids int64 [N, S, k], ascending, and scores float32 [N, S, k, k]: the third index is the candidate of the
            slot before. All its rows are equal in the first slot, which follows the anchor.
        """
        ids = top_candidates(logits, self.top_k)
        first = anchors[:, None, None].expand(-1, 1, self.top_k)
        return ids, self.scores(hidden, logits, ids, torch.cat((first, ids[:, :-1]), dim=1))

    def scores(self, hidden: Tensor, logits: Tensor, ids: Tensor, previous: Tensor) -> Tensor:
        """Scores float32 [..., P, k] of candidates ids [..., k] after each of the tokens previous [..., P]."""
        predecessors, successors = self.codebooks()
        edges = F.embedding(previous, predecessors) * self.hidden_projection(hidden)[..., None, :]
        edges = edges @ F.embedding(ids, successors).transpose(-1, -2)
        return logits.gather(-1, ids)[..., None, :] + edges.float()


class CodebookSelector(CandidateSelector):
    """The published selector, with a row in each codebook for every token of the draft vocabulary."""

    def __init__(self, num_tokens: int, hidden_size: int, config: Dflash2Config) -> None:
        super().__init__(num_tokens, hidden_size, config)
        self.predecessor_codebook = nn.Parameter(torch.randn(num_tokens, config.selector_rank))
        self.successor_codebook = nn.Parameter(torch.zeros(num_tokens, config.selector_rank))

    def codebooks(self) -> tuple[Tensor, Tensor]:
        return self.predecessor_codebook, self.successor_codebook


class FactorisedSelector(CandidateSelector):
    """A selector whose codebooks are projections of the target's embedding and head: few weights, for little data.

    `bind` comes before the first use.
    """

    embedding: Tensor
    head: Tensor

    def __init__(self, num_tokens: int, hidden_size: int, config: Dflash2Config) -> None:
        super().__init__(num_tokens, hidden_size, config)
        self.predecessor_projection = nn.Linear(hidden_size, config.selector_rank, bias=False)
        self.successor_projection = nn.Linear(hidden_size, config.selector_rank, bias=False)
        nn.init.zeros_(self.successor_projection.weight)

    def bind(self, embedding: Tensor, head: Tensor) -> None:
        """Takes the target's embedding and head, [tokens, H] each, in the numbering of the draft vocabulary."""
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("head", head, persistent=False)

    def codebooks(self) -> tuple[Tensor, Tensor]:
        return self.predecessor_projection(self.embedding), self.successor_projection(self.head)

    def expanded(self, config: Dflash2Config) -> CodebookSelector:
        """The same selector with the codebooks worked out, for serving."""
        predecessors, successors = self.codebooks()
        selector = CodebookSelector(len(predecessors), self.hidden_projection.in_features, config)
        selector.predecessor_codebook = nn.Parameter(predecessors, requires_grad=False)
        selector.successor_codebook = nn.Parameter(successors, requires_grad=False)
        selector.hidden_projection = self.hidden_projection
        return selector


def build_selector(num_tokens: int, hidden_size: int, config: Dflash2Config) -> CandidateSelector:
    """The selector of the kind that the configuration names."""
    kind = FactorisedSelector if config.is_factorised else CodebookSelector
    return kind(num_tokens, hidden_size, config)


def top_candidates(logits: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest logits in each row [..., vocabulary], ascending; of equal logits the lower ids."""
    found = draft_ops.top_candidates(logits.flatten(0, -2).float(), min(count, logits.shape[-1]))
    return found.view(*logits.shape[:-1], -1)


def _tempered(scores: NDArray[np.float32], draws: Sequence[Draw]) -> NDArray[np.float64]:
    temperatures = np.array([draw.temperature or 1.0 for draw in draws])
    tempered: NDArray[np.float64] = scores / temperatures[:, None, None, None]
    return tempered


def _noise(ids: NDArray[np.int64], draws: Sequence[Draw], first_positions: Sequence[int]) -> NDArray[np.float64]:
    """[N, S, k] that the target will draw tokens ids [N, S, k] with; 0 where it doesn't draw."""
    noise = np.zeros(ids.shape)
    drawing = [block for block, draw in enumerate(draws) if draw.temperature]
    if drawing:
        slots, count = ids.shape[1:]
        seeds = [draws[block].seed for block in drawing for _ in range(slots)]
        positions = [first_positions[block] + slot for block in drawing for slot in range(slots)]
        drawn = gumbel(seeds, positions, torch.from_numpy(ids[drawing].reshape(-1, count))).numpy()
        noise[drawing] = drawn.reshape(-1, slots, count)
    return noise


def log_chances(
    scores: NDArray[np.float32], ids: NDArray[np.int64], draws: Sequence[Draw], first_positions: Sequence[int]
) -> NDArray[np.float64]:
    """Log-probabilities [N, S, k, k] that the target chooses a candidate, after each candidate of the slot before it.

    Above temperature 0 the noise that the target will draw with is known: chances are of score / temperature + noise,
    in which what is uncertain is how far the target's scores are from these.

    Args:
        scores: [N, S, k, k] as CandidateSelector returns them.
        ids: [N, S, k], ascending ids of the target's vocabulary.
        first_positions: [N] position of the first slot's token.
    """
    chances = _tempered(scores, draws) + _noise(ids, draws, first_positions)[:, :, None]
    chances -= chances.max(axis=-1, keepdims=True)
    log_sums: NDArray[np.float64] = np.log(np.exp(chances).sum(axis=-1, keepdims=True))
    return chances - log_sums + _LOG_COVERAGE
