"""No window of 200 steps may lose 1.7 %, and room is what is left for the next step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dflash_ray.router.speculation.ledger import MOST_LOSS, WINDOW, Ledger, Luck

LOSSES = st.lists(st.sampled_from([-3.0, -1.0, -0.3, 0.2, 0.7, 1.5]), min_size=1, max_size=500)


def worst(losses: list[float], plain: list[float]) -> float:
    lost, taken = np.cumsum([0.0, *losses]), np.cumsum([0.0, *plain])
    return float(((lost[WINDOW:] - lost[:-WINDOW]) / (taken[WINDOW:] - taken[:-WINDOW])).max())


@given(wanted=LOSSES)
def test_no_window_loses_more_than_it_may_when_every_step_keeps_within_the_room(wanted):
    ledger, losses, plain = Ledger(), [], []
    for loss in [*wanted * 2, *[0.0] * WINDOW]:
        loss = loss if loss <= ledger.room(1.0) else 0.0
        taken = 1.0 + max(0.0, -loss)
        ledger.add(taken + loss, taken)
        losses.append(loss)
        plain.append(taken)
    assert worst(losses, plain) <= MOST_LOSS + 1e-9


def test_an_empty_account_may_lose_its_part_of_a_window():
    assert Ledger().room(0.5) == pytest.approx(MOST_LOSS * WINDOW * 0.5)


def test_what_was_lost_is_forgiven_after_a_window():
    ledger = Ledger()
    ledger.add(1.0 + MOST_LOSS * WINDOW, 1.0)
    assert ledger.room(1.0) == pytest.approx(0.0)
    for _ in range(WINDOW - 1):
        ledger.add(1.0, 1.0)
    assert ledger.room(1.0) == pytest.approx(MOST_LOSS * WINDOW)


def test_gains_before_a_loss_do_not_pay_for_it():
    """A window may begin right after them."""
    ledger = Ledger()
    for _ in range(100):
        ledger.add(1.0, 3.0)
    assert ledger.room(1.0) == pytest.approx(MOST_LOSS * WINDOW)
    ledger.add(3.0, 1.0)
    assert ledger.room(1.0) == pytest.approx(MOST_LOSS * WINDOW - 2.0)
    assert (
        ledger.loss < 0 and ledger.seconds_saved == pytest.approx(200.0) and ledger.seconds_lost == pytest.approx(2.0)
    )


def test_a_run_of_bad_luck_counts_in_part_until_chance_does_not_explain_it():
    luck = Luck()
    counted = [luck.counted(1.2, 2.1, 0.0) for _ in range(12)]
    assert counted[:3] == pytest.approx([0.6] * 3) and counted[-3:] == pytest.approx([0.0] * 3)


def test_good_luck_pays_for_no_loss_that_follows():
    lucky, steady = Luck(), Luck()
    for _ in range(50):
        lucky.counted(1.2, 2.1, 4.0)
        steady.counted(1.2, 2.1, 1.2)
    wrong = [(lucky.counted(1.2, 2.1, 0.0), steady.counted(1.2, 2.1, 0.0)) for _ in range(20)]
    assert wrong[-1] == pytest.approx((0.0, 0.0))
