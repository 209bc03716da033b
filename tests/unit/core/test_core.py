"""Configuration, statistics, n-grams and the directory."""

import pytest

from dflash_ray.config import ConfigError, load_config
from dflash_ray.core.stats import AcceptanceStats, merge
from dflash_ray.rpc.directory import Directory, Entry
from dflash_ray.rpc.metrics import merge_expositions


def test_config_errors_name_the_key(tmp_path):
    for override, key in (
        ("router.draft_token=3", "router.draft_token"),
        ("target.tp_size=zero", "target.tp_size"),
        ("drafter.method=eagle", "drafter.method"),
        ("router=5", "router"),
    ):
        with pytest.raises(ConfigError, match=key):
            load_config(None, [override])
    (tmp_path / "c.yaml").write_text("target: {tp_sizes: 2}")
    with pytest.raises(ConfigError, match="tp_sizes"):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=r"key\.sub=value"):
        load_config(None, ["router.draft_tokens"])


def test_overrides_win_over_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("router: {draft_tokens: 2, cohorts: 2}")
    config = load_config(tmp_path / "c.yaml", ["router.draft_tokens=5"])
    assert (config.router.draft_tokens, config.router.cohorts) == (5, 2)


def test_acceptance_counts_the_targets_own_token():
    stats = AcceptanceStats(4)
    for accepted in (0, 4, 2):
        stats.record(4, accepted)
    assert stats.acceptance_length == 3.0 and stats.acceptance_rate == 0.5
    assert stats.histogram == [1, 0, 1, 0, 1] and stats.accepted_per_position() == [2, 2, 1, 1]
    assert merge([stats, stats]).num_steps == 6


def test_entries_leave_the_directory_when_they_are_silent():
    directory = Directory()
    directory.register(Entry("drafter", "a", "host:1"), ttl_s=5, now=0)
    directory.register(Entry("drafter", "b", "host:2"), ttl_s=5, now=3)
    assert [entry.id for entry in directory.entries("drafter", now=4)] == ["a", "b"]
    assert [entry.id for entry in directory.entries("drafter", now=6)] == ["b"]


def test_a_lease_has_one_holder_and_a_new_holder_a_higher_epoch():
    directory = Directory()
    first = directory.lease("t", "r1", ttl_s=5, now=0)
    assert directory.lease("t", "r1", ttl_s=5, now=3) == first
    assert directory.lease("t", "r2", ttl_s=5, now=4) is None
    second = directory.lease("t", "r2", ttl_s=5, now=9)
    assert second > first
    directory.release("t", "r1")
    assert directory.lease("t", "r1", ttl_s=5, now=10) is None
    directory.release("t", "r2")
    assert directory.lease("t", "r1", ttl_s=5, now=10) > second


def test_merged_metrics_say_whose_they_are():
    text = '# HELP x_total Things\n# TYPE x_total counter\nx_total{model="m"} 1.0\n'
    merged = merge_expositions({"a": text, "b": text})
    assert merged.count("# TYPE x_total") == 1
    assert 'x_total{process="a",model="m"} 1.0' in merged and 'process="b"' in merged
