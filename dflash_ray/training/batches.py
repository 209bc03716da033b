"""Batches of draft blocks, each a function of its seed alone: a resumed run draws the same ones.

Anchors are drawn for each conversation by itself, so they do not depend on the number of workers either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dflash_ray.training.losses import IGNORE
from dflash_ray.training.shards import Conversation, ShardStore
from dflash_ray.training.tap_sources import TapSource

_SEED_STRIDE = 1 << 20  # more than there are conversations, so that no two draws share a seed
_POOL_BATCHES = 8  # batches that are drawn at once to find conversations of similar length


@dataclass(frozen=True)
class BlockBatch:
    """A anchors in each of C conversations.

    Attributes:
        taps: bfloat16 [C, T - 1, F * H], any values behind a conversation's end.
        anchors: int64 [C, A], their positions.
        anchor_ids: int64 [C, A], their tokens.
        labels: int64 [C, A, B-1], indices into the draft vocabulary; IGNORE where no draft can be right.
        last_hidden: bfloat16 [C, A, B-1, H], the target's last layer at the rows that predict the slots, or None.
    """

    taps: Tensor
    anchors: Tensor
    anchor_ids: Tensor
    labels: Tensor
    last_hidden: Tensor | None = None

    def to(self, device: torch.device) -> BlockBatch:
        return BlockBatch(
            self.taps.to(device),
            self.anchors.to(device),
            self.anchor_ids.to(device),
            self.labels.to(device),
            None if self.last_hidden is None else self.last_hidden.to(device),
        )


class BatchSource:
    """Draws conversations and anchors from shards.

    Args:
        indices: conversations to draw from.
        t2d: int64 [V], the draft index of each target token, IGNORE where it has none.
        taps: of the drafter's layers and, where the target's logits are needed, of the last layer behind them.
        num_layers: the drafter's tapped layers.
    """

    def __init__(
        self,
        store: ShardStore,
        indices: Sequence[int],
        t2d: Tensor,
        num_anchors: int,
        block_size: int,
        taps: TapSource,
        num_layers: int,
    ) -> None:
        self._store = store
        self._indices = indices
        self._t2d = t2d
        self._num_anchors = num_anchors
        self._num_slots = block_size - 1
        self._taps = taps
        self._width = num_layers * store.layout.hidden_size

    def draw(self, size: int, seed: int, rank: int = 0, world_size: int = 1) -> BlockBatch:
        """This rank's part of a batch of `size` conversations of similar length."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self._indices), generator=generator)[: size * _POOL_BATCHES].tolist()
        pool = sorted((self._indices[i] for i in chosen), key=lambda i: len(self._store.conversations[i].token_ids))
        start = int(torch.randint(max(1, len(pool) - size + 1), (1,), generator=generator))
        batch = pool[start : start + size]
        return self.at(batch[rank::world_size] or batch[:1], seed)

    def at(self, indices: Sequence[int], seed: int) -> BlockBatch:
        """Random anchors in the given conversations."""
        taps = self._taps(indices)
        drawn = [self._draw_anchors(self._store.conversations[i], seed * _SEED_STRIDE + i) for i in indices]
        anchors, anchor_ids, labels = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        batch = BlockBatch(taps[..., : self._width], anchors, anchor_ids, labels)
        last = taps[..., self._width :]
        if not last.shape[-1]:
            return batch
        # Slot k stands at s + k; the row before it, s + k - 1, is the one that predicts it.
        rows = (anchors[:, :, None] + torch.arange(self._num_slots)).clamp(max=last.shape[1] - 1).to(last.device)
        return replace(batch, last_hidden=last[torch.arange(len(indices), device=last.device)[:, None, None], rows])

    def _draw_anchors(self, conversation: Conversation, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Anchors [A] among answer tokens that have a successor, their tokens, and the slots' labels [A, B-1]."""
        generator = torch.Generator().manual_seed(seed)
        tokens, last = conversation.token_ids, len(conversation.token_ids) - 1
        anchors = torch.randint(conversation.prompt_len, last, (self._num_anchors,), generator=generator)
        at = anchors[:, None] + torch.arange(1, self._num_slots + 1)
        labels = torch.where(at <= last, self._t2d[tokens[at.clamp(max=last)]], IGNORE)
        return anchors, tokens[anchors], labels


def draft_vocabulary(conversations: Iterable[Conversation], size: int | None, vocab_size: int) -> Tensor:
    """The `size` most frequent answer tokens, ascending; filled with the lowest ids when there are fewer."""
    if size is None or size >= vocab_size:
        return torch.arange(vocab_size)
    counts: Counter[int] = Counter()
    for conversation in conversations:
        counts.update(conversation.token_ids[conversation.prompt_len :].tolist())
    chosen = {token for token, _ in counts.most_common(size)}
    for token in range(vocab_size):
        if len(chosen) >= size:
            break
        chosen.add(token)
    return torch.tensor(sorted(chosen))
