"""Who asks for what: arrivals, lengths, and how well drafts fit each kind of text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dflash_ray.config import ConfigError, validate

_Chance = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Category(_Section):
    """One kind of text.

    Attributes:
        share: of all requests.
        acceptance: chance that a draft is accepted once those before it were, by slot; the last one goes on.
        frankness: how much the drafter's own probabilities tell right drafts from wrong ones, 0 not at all, 1 well.
    """

    share: float = Field(1.0, gt=0)
    prompt_tokens: int = Field(256, ge=1)
    output_tokens: int = Field(128, ge=1)
    spread: float = Field(0.5, ge=0, le=2, description="of the logarithm of both lengths")
    acceptance: tuple[_Chance, ...] = Field((0.7, 0.65, 0.6), min_length=1)
    frankness: _Chance = 0.5

    def chances(self, count: int) -> np.ndarray:
        """Of the first `count` slots."""
        return np.array([self.acceptance[min(slot, len(self.acceptance) - 1)] for slot in range(count)])


class Workload(_Section):
    """Attributes:
    clients: closed loop: so many requests at all times, a new one when one ends.
    rate: open loop: requests a second, at random; instead of clients.
    """

    clients: int | None = Field(None, ge=1)
    rate: float | None = Field(None, gt=0)
    requests: int = Field(64, ge=1)
    categories: dict[str, Category] = Field(default_factory=lambda: {"chat": Category()}, min_length=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Workload:
        if (self.clients is None) == (self.rate is None):
            raise ValueError("give either clients or rate")
        return self


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a workload, the same for every policy.

    Attributes:
        category: its kind of text; the lengths are its own.
        arrives_at: in the open loop; None in the closed one.
        seed: of its drafts' fates.
    """

    number: int
    category: Category
    prompt_tokens: int
    output_tokens: int
    arrives_at: float | None
    seed: int

    def draws(self, position: int, count: int) -> np.ndarray:
        """Which of the drafts for positions from `position` on are right, and how sure the drafter is: [2, count]."""
        random = np.random.default_rng((self.seed, position))
        right = random.random(count) < self.category.chances(count)
        doubt = random.random(count)
        frank = self.category.frankness
        sure = np.where(right, 1 - 0.3 * doubt, 0.05 + 0.6 * doubt) * frank + (1 - frank) * self.category.chances(count)
        return np.stack([right, np.clip(sure, 1e-3, 1.0)])


def requests_of(workload: Workload) -> list[Request]:
    """All requests of a workload, in the order of their arrival."""
    random = np.random.default_rng(workload.seed)
    categories = list(workload.categories.values())
    shares = np.array([category.share for category in categories])
    chosen = random.choice(len(categories), workload.requests, p=shares / shares.sum())
    times: list[float | None] = [None] * workload.requests
    if workload.rate is not None:
        times = list(np.cumsum(random.exponential(1 / workload.rate, workload.requests)))
    return [_drawn(i, categories[k], times[i], random) for i, k in enumerate(chosen)]


def _drawn(number: int, category: Category, arrives_at: float | None, random: np.random.Generator) -> Request:
    lengths = np.array([category.prompt_tokens, category.output_tokens])
    lengths = np.maximum(1, lengths * np.exp(random.normal(0, category.spread, 2))).astype(int)
    return Request(number, category, int(lengths[0]), int(lengths[1]), arrives_at, int(random.integers(1 << 62)))


def load_workload(path: Path) -> Workload:
    """Reads a YAML file. Raises ConfigError that names what is wrong."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"workload {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"workload {path}: not YAML ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"workload {path}: the top level must be a mapping")
    return validate(Workload, values, f"workload {path}")
