"""The operators that choose a drafter's candidates in plain torch and numpy; shapes are those of `draft_ops`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dflash_ray.kernels import reference_verify
from dflash_ray.kernels.columns import Purpose


def top_candidates(logits: Tensor, count: int) -> Tensor:
    order = logits.nan_to_num(-torch.inf, torch.inf, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return order[:, :count].sort(dim=-1).values


def walk_candidates(
    scores: Tensor, ids: Tensor, inverse_temperatures: Tensor, seeds: Tensor, firsts: Tensor
) -> tuple[Tensor, Tensor]:
    factors = inverse_temperatures.cpu().numpy()
    tempered = scores.double().cpu().numpy() * np.where(factors > 0, factors, 1.0)[:, None, None, None]
    tempered[np.isnan(tempered)] = -np.inf
    num_blocks, num_slots, count = ids.shape
    positions = (firsts[:, None] + torch.arange(num_slots, device=firsts.device)).flatten()
    noise = reference_verify.gumbel_noise(
        seeds.repeat_interleave(num_slots), positions, ids.reshape(-1, count), Purpose.TARGET
    )
    noises = noise.view(ids.shape).cpu().numpy() * (factors > 0)[:, None, None]
    blocks = np.arange(num_blocks)
    after = np.empty(ids.shape)  # what the candidates of a slot scored after the choice before it
    choices = np.empty(ids.shape[:2], dtype=np.int64)
    chosen = np.zeros(num_blocks, dtype=np.int64)
    for slot in range(num_slots):
        after[:, slot] = tempered[blocks, slot, chosen]
        choices[:, slot] = chosen = (after[:, slot] + noises[:, slot]).argmax(axis=-1)
    ranked = np.argsort(-after, axis=-1, kind="stable")
    order = np.take_along_axis(ranked, np.argsort(ranked != choices[:, :, None], axis=-1, kind="stable"), axis=-1)
    shifted = np.take_along_axis(after - after.max(axis=-1, keepdims=True), order, axis=-1)
    log_probs = (shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))).astype(np.float32)
    return ids.gather(-1, torch.from_numpy(order).to(ids.device)), torch.from_numpy(log_probs).to(ids.device)
