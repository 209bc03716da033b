"""Context features are made for sequences that a drafter will draft for, wherever it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.toy import ToyTarget
from tests.unit.router.scenes import Scene


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"feature_fingerprint": "fc"}, [False, True]),
        ({"feature_fingerprint": "fc", "colocated_draft_tokens": 4}, [False, True]),
        ({"feature_fingerprint": "", "colocated_draft_tokens": 0}, [False, False]),
    ],
    ids=["remote", "colocated", "none"],
)
def test_sequences_that_are_drafted_for_are_opened_with_features(limits, expected):
    target = ToyTarget()
    target.limits = replace(target.limits, **limits)
    scene = Scene(target=target)
    scene.arrive([1, 2, 3], draft_tokens=0)
    scene.arrive([1, 2, 3], draft_tokens=4)
    scene.pump()
    assert [opened.wants_features for opened in scene.step.open] == expected
