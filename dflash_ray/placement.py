"""What the application's processes ask Ray for, and which of it a cluster does not have."""

from __future__ import annotations

from collections.abc import Mapping

from dflash_ray.config import DflashRayConfig
from dflash_ray.target_group.replica import target_placement

_SLACK = 1e-6  # fractions add up to whole devices


def demands(config: DflashRayConfig) -> dict[str, list[dict[str, float]]]:
    """Resources of every process that a start needs, by the section of the configuration that says so."""
    bundles, _, _ = target_placement(config)
    found = {"target": bundles * config.target.num_replicas}
    sizes = {"router": config.router.num_replicas, "gateway": config.gateway.num_replicas}
    if config.drafts_remotely:
        scaling = config.drafter.autoscaling
        sizes["drafter"] = config.drafter.num_replicas if scaling is None else scaling.min_replicas
    gpus = {"drafter": config.drafter.num_gpus}
    for section, count in sizes.items():
        placement = getattr(config, section).placement
        need = {"CPU": placement.num_cpus, "GPU": gpus.get(section, 0.0), **placement.resources}
        found[section] = [need] * count
    return found


def what_is_missing(config: DflashRayConfig, resources: Mapping[str, float]) -> str:
    """Which resources the whole cluster has too little of, and the keys that ask for them; empty if none.

    Args:
        resources: of all nodes together, as `ray.cluster_resources()` counts them.
    """
    wanted: dict[str, dict[str, float]] = {}
    for section, processes in demands(config).items():
        for need in processes:
            for name, amount in need.items():
                by_section = wanted.setdefault(name, {})
                by_section[section] = by_section.get(section, 0.0) + amount
    lines = []
    for name, by_section in wanted.items():
        total, has = sum(by_section.values()), resources.get(name, 0.0)
        if total > has + _SLACK:
            keys = ", ".join(f"{_key(section, name)} {amount:g}" for section, amount in by_section.items() if amount)
            lines.append(f"{total:g} {name} are asked for and the cluster has {has:g} ({keys} over all processes)")
    return "; ".join(lines)


def _key(section: str, resource: str) -> str:
    key = {"CPU": "num_cpus", "GPU": "num_gpus"}.get(resource, f"resources.{resource}")
    return f"{section}.placement.{key}"
