"""Intervals and tables say what was counted."""

import pytest

from dflash_ray.core.stats import AcceptanceStats
from dflash_ray.training.evaluate import Result, confidence_interval, markdown_table


def stats(*accepted: int) -> AcceptanceStats:
    one = AcceptanceStats(4)
    for count in accepted:
        one.record(4, count)
    return one


def test_prompts_that_all_fare_alike_leave_no_doubt():
    low, high = confidence_interval([stats(1, 3)] * 5, 0.95, 200)
    assert low == high == pytest.approx(3.0)


def test_the_interval_narrows_with_more_prompts():
    few, many = (confidence_interval([stats(0), stats(4)] * count, 0.95, 500) for count in (4, 100))
    assert few[0] < many[0] < 3.0 < many[1] < few[1]


def test_one_prompt_has_no_interval():
    assert confidence_interval([stats(1, 2)], 0.95, 200) == (None, None)


def test_the_table_has_a_line_for_each_result():
    result = Result("sums", 0.0, 4, 3, 2, 10, 1.5, 1.25, 1.75, [0.4, 0.1, 0.0], {7: 1.75, 15: 2.0})
    assert markdown_table([result], 0.95).splitlines()[-1] == (
        "| sums (2) | 0 | 4 | 1.50 (1.25 to 1.75) | 10 | 7: 1.75, 15: 2.00 | 40% 10% 0% |"
    )
