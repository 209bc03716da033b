"""How many drafter replicas there should be, from the share of time that they draft.

Serve builds the policy from its keyword arguments in its controller, and applies bounds and delays to what it returns.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

METRIC = "busy_fraction"
_TOLERANCE = 0.1  # a mean this near to the target changes nothing


class BusyFractionPolicy:
    """Keeps the mean busy fraction of the replicas near a target.

    Args:
        target_busy_fraction: between 0 and 1.
    """

    def __init__(self, target_busy_fraction: float) -> None:
        if not 0 < target_busy_fraction <= 1:
            raise ValueError(f"target_busy_fraction is {target_busy_fraction}; it must lie above 0 and not above 1")
        self._target = target_busy_fraction

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas wanted; the current one while there are no figures."""
        current = context.target_num_replicas
        values = list((context.aggregated_metrics or {}).get(METRIC, {}).values())
        if not values:
            return max(current, 1), {}
        mean = sum(values) / len(values)
        if abs(mean - self._target) <= _TOLERANCE * self._target:
            return current, {}
        wanted = math.ceil(mean * len(values) / self._target - _TOLERANCE)
        return max(1, wanted), {}
