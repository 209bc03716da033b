"""Configuration, statistics and n-grams."""

import pytest

from dflash_ray.config import ConfigError, load_config
from dflash_ray.core.ngram import NgramDraft, NgramIndex
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


def test_ngrams_propose_what_followed_the_latest_occurrence():
    index = NgramIndex()
    index.extend([1, 2, 3, 9, 1, 2, 3, 8, 5, 1, 2])
    assert index.propose(3) == NgramDraft([3, 8, 5], match_len=2)
    assert index.propose_after(3, 2) == NgramDraft([8, 5], match_len=3)
    index.extend([77])
    assert index.propose(3) == NgramDraft([], match_len=0)
