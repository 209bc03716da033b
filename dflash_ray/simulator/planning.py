"""What a workload takes: throughput, latencies, drafters, energy and cost, for a number of target groups.

Groups share nothing but drafters, so one is simulated, and the rest is multiplication.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field

from dflash_ray.config import ConfigError, validate
from dflash_ray.simulator.deployment import Deployment
from dflash_ray.simulator.profile import Profile
from dflash_ray.simulator.simulation import Outcome, simulate
from dflash_ray.simulator.workload import Workload

_DRAFTER_LOAD = 0.6  # share of its time that a drafter may be busy before sequences wait for it
_MILLION = 1e6


class Prices(BaseModel):
    """What devices cost and use; the defaults are of a rented H100."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    currency: str = "USD"
    target_hour: float = Field(2.5, ge=0, description="of one target group")
    drafter_hour: float = Field(2.5, ge=0, description="of one drafter's device")
    kwh: float = Field(0.0, ge=0, description="of energy, where it is not in the above")
    target_busy_watts: float = Field(600.0, ge=0)
    target_idle_watts: float = Field(120.0, ge=0)
    drafter_busy_watts: float = Field(450.0, ge=0)
    drafter_idle_watts: float = Field(120.0, ge=0)


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to serve a workload, of one group.

    Attributes:
        drafters: devices of drafters that one group keeps at the load that they may have; 0 for a colocated one.
    """

    policy: str
    placement: str
    outcome: Outcome
    drafters: float

    def devices(self, num_groups: int) -> int:
        """Drafters for so many groups."""
        return math.ceil(num_groups * self.drafters - 1e-9)

    def cost_per_million(self, prices: Prices, num_groups: int) -> float:
        """Of generated tokens."""
        hourly = num_groups * prices.target_hour + self.devices(num_groups) * prices.drafter_hour
        hourly += self.watts(prices, num_groups) / 1000 * prices.kwh
        return hourly / 3600 / (num_groups * self.outcome.token_rate) * _MILLION

    def joules_per_token(self, prices: Prices, num_groups: int) -> float:
        return self.watts(prices, num_groups) / (num_groups * self.outcome.token_rate)

    def watts(self, prices: Prices, num_groups: int) -> float:
        """Mean power of all devices."""
        busy = self.outcome.target_busy
        target = busy * prices.target_busy_watts + (1 - busy) * prices.target_idle_watts
        drafting = num_groups * self.outcome.drafter_busy
        idle = max(0.0, self.devices(num_groups) - drafting)
        return num_groups * target + drafting * prices.drafter_busy_watts + idle * prices.drafter_idle_watts


def plan(
    profile: Profile, workload: Workload, policies: Sequence[str], draft_tokens: int, link: float, cohorts: int
) -> list[Plan]:
    """Every policy, with drafters remote and colocated where it drafts at all."""
    plans = []
    deployment = Deployment(profile, draft_tokens=draft_tokens, link=link)
    for policy in policies:
        for placement in ("remote", "colocated") if policy != "off" else ("",):
            is_remote = placement == "remote"
            outcome = simulate(
                replace(
                    deployment,
                    policy=policy,
                    num_drafters=int(is_remote),
                    cohorts=cohorts if is_remote else 1,
                ),
                workload,
            )
            plans.append(Plan(policy, placement, outcome, outcome.drafter_busy / _DRAFTER_LOAD if is_remote else 0.0))
    return plans


def percentiles(values: np.ndarray) -> tuple[float, float, float]:
    """50th, 95th and 99th."""
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return float(p50), float(p95), float(p99)


def load_prices(path: Path | None) -> Prices:
    """Reads a YAML file (None: the defaults). Raises ConfigError that names what is wrong."""
    if path is None:
        return Prices()
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"prices {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"prices {path}: not YAML ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"prices {path}: the top level must be a mapping")
    return validate(Prices, values, f"prices {path}")
