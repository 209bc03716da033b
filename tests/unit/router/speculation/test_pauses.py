"""Drafts may lose what they have saved and next to nothing more."""

import pytest

from dflash_ray.router.speculation.pauses import ANY_LOAD, Pauses
from dflash_ray.router.speculation.records import Reason


def rested(num_steps: int, pauses: Pauses | None = None) -> Pauses:
    pauses = pauses or Pauses()
    for _ in range(num_steps):
        pauses.step_done(Reason.NO_GAIN, is_drafted=False, has_hit=False, saved=0.0)
    return pauses


def tried(pauses: Pauses, saved: float) -> Pauses:
    pauses.step_done(Reason.TRIAL, is_drafted=True, has_hit=saved > 0, saved=saved)
    pauses.step_done(Reason.TRIAL, is_drafted=True, has_hit=saved > 0, saved=saved)
    return pauses


def test_a_group_that_has_just_started_may_try():
    assert rested(24).is_trial_due and Pauses().may_want(1, 1)


def test_after_trials_in_vain_neither_time_nor_new_sequences_bring_one_soon():
    pauses = tried(Pauses(), -1.4)
    pauses.opened()
    assert not rested(100, pauses).is_trial_due and not pauses.may_want(64, 1)
    assert rested(200, pauses).is_trial_due and pauses.may_want(64, 1)


def test_a_new_sequence_is_tried_sooner_than_those_that_were_tried():
    pauses = rested(24, tried(Pauses(), -0.7))
    assert not pauses.is_trial_due
    pauses.opened()
    assert pauses.is_trial_due


def test_what_was_saved_may_be_lost_again_up_to_a_few_steps():
    pauses = Pauses()
    for _ in range(100):
        pauses.step_done(Reason.GAIN, is_drafted=True, has_hit=True, saved=1.0)
    for _ in range(15):
        pauses.step_done(Reason.GAIN, is_drafted=True, has_hit=False, saved=-1.0)
    assert not pauses.is_resting
    for _ in range(2):
        pauses.step_done(Reason.GAIN, is_drafted=True, has_hit=False, saved=-1.0)
    assert pauses.is_resting


@pytest.mark.parametrize(("num_tokens", "may_want"), [(64, False), (200, True)])
def test_a_sequence_may_be_drafted_for_if_it_lasts_until_the_next_trial(num_tokens, may_want):
    assert rested(50, tried(Pauses(), -1.4)).may_want(num_tokens, 1) == may_want


def test_a_load_at_which_not_even_a_trial_would_pay_is_left_alone_at_once():
    pauses = rested(20)
    pauses.opened()
    assert not pauses.is_settled, "a sequence came, of whose text nothing is known"
    pauses.no_hope(1)
    assert rested(1, pauses).is_settled


def test_sequences_that_come_to_a_load_without_hope_need_no_features_for_a_while():
    pauses = rested(20)
    pauses.no_hope(4)
    assert pauses.may_want(64, 3) and not pauses.may_want(64, 4) and not pauses.may_want(64, 16)
    pauses.no_hope(ANY_LOAD)
    assert not pauses.may_want(64, 4), "a batch that shows nothing changes nothing"
    pauses.has_hope(4)
    assert pauses.may_want(64, 4) and not pauses.may_want(64, 5)
    assert rested(1100, pauses).may_want(64, 16), "the machine, or the texts, may be others by then"


def test_features_for_which_nobody_asks_are_made_for_new_sequences_no_longer():
    pauses = Pauses()
    for _ in range(60):
        pauses.step_done(Reason.NO_GAIN, is_drafted=False, has_hit=False, saved=0.0, makes_features=True)
    assert not pauses.may_want(64, 1) and not pauses.is_resting
    assert rested(200, pauses).may_want(64, 1)
