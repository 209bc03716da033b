"""Configuration, statistics and n-grams."""

import pytest

from dflash_ray.config import ConfigError, load_config
from dflash_ray.core.stats import AcceptanceStats, merge


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


def test_a_bare_off_is_a_policy_though_yaml_reads_it_as_false(tmp_path):
    (tmp_path / "c.yaml").write_text("router: {policy: off}")
    assert (
        load_config(tmp_path / "c.yaml").router.policy
        == load_config(None, ["router.policy=off"]).router.policy
        == "off"
    )


@pytest.mark.parametrize(
    ("overrides", "rows"),
    [
        ([], 32768),
        (["target.num_replicas=3"], 3 * 32768),
        (["target.num_replicas=3", "drafter.placement_mode=colocated"], 32768),
        (["target.kv_cache_tokens=1000", "target.page_size=16"], 1008),
        (["drafter.max_context_tokens=16384", "drafter.num_replicas=2"], 16384),
        (["drafter.max_context_tokens=100", "drafter.method=none"], 100),
    ],
)
def test_a_drafter_has_room_for_every_sequence_unless_it_is_told_how_much(overrides, rows):
    assert load_config(None, overrides).drafter_context_tokens == rows


@pytest.mark.parametrize(
    "overrides",
    [
        ["drafter.max_context_tokens=16383", "drafter.num_replicas=2"],
        ["drafter.max_context_tokens=16384", "drafter.num_replicas=2", "target.num_replicas=2"],
        ["drafter.max_context_tokens=32767", "drafter.placement_mode=colocated"],
        ["drafter.max_context_tokens=16384", "drafter.autoscaling={min_replicas: 1, max_replicas: 9}"],
        ["drafter.max_context_tokens=32767", "drafter.autoscaling={min_replicas: 0, max_replicas: 9}"],
    ],
)
def test_too_little_room_at_the_drafters_is_refused_with_both_keys(overrides):
    with pytest.raises(ConfigError, match=r"drafter\.max_context_tokens.*target\.kv_cache_tokens"):
        load_config(None, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["network.max_message_bytes=1000"],
        ["network.max_message_bytes=1048576", "model.max_model_len=131072"],
        ["network.max_message_bytes=1048576", "target.max_batch_tokens=8192", "gateway.max_logprobs=20"],
    ],
)
def test_a_message_limit_that_the_settings_can_pass_is_refused(overrides):
    with pytest.raises(ConfigError, match=r"network\.max_message_bytes"):
        load_config(None, overrides)
    assert load_config(None, ["network.max_message_bytes=1048576"]).network.max_message_bytes == 1 << 20
