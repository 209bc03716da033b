"""What is simulated: a target group, its drafters, and the policy of its router."""

from __future__ import annotations

from dataclasses import dataclass

from dflash_ray.config import DflashRayConfig, parse_config
from dflash_ray.pb import router_pb2
from dflash_ray.simulator.profile import Profile

POLICIES = {
    "adaptive": router_pb2.SPECULATION_POLICY_ADAPTIVE,
    "fixed": router_pb2.SPECULATION_POLICY_FIXED,
    "off": router_pb2.SPECULATION_POLICY_OFF,
}


@dataclass(frozen=True, slots=True)
class Deployment:
    """One target group and what drafts for it.

    Attributes:
        num_drafters: remote replicas; 0: the drafter is colocated.
        link: seconds that a message takes between two processes.
        noise: spread of the logarithm of every pass's time.
    """

    profile: Profile
    policy: str = "adaptive"
    num_drafters: int = 1
    draft_tokens: int = 5
    cohorts: int = 1
    link: float = 0.0
    noise: float = 0.0

    def config(self) -> DflashRayConfig:
        """As the router would be configured."""
        profile = self.profile
        router = {
            "policy": self.policy,
            "draft_tokens": self.draft_tokens,
            "cohorts": self.cohorts,
            "max_running": max(1, min(256, profile.max_batch_tokens // (1 + self.draft_tokens))),
            "max_waiting": 1_000_000,
            "prefill_chunk_tokens": min(256, profile.max_batch_tokens),
        }
        return parse_config(
            {
                "router": router,
                "model": {"max_model_len": profile.max_model_len},
                "drafter": {"placement_mode": "remote" if self.num_drafters else "colocated"},
                "target": {"max_batch_tokens": profile.max_batch_tokens, "kv_cache_tokens": profile.kv_cache_tokens},
                "network": {"max_message_bytes": 1 << 30},
            },
            "simulation",
        )
