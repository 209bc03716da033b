"""A late draft costs its step; only a drafter that is late all the time, or dead, loses its sequences."""

from dflash_ray.router.actions import DropDrafter
from dflash_ray.router.limits import TargetLimits
from tests.toy import ToyTarget
from tests.unit.router.scenes import Scene

PROMPT = list(range(20))
TIMEOUT_S = 0.1


def decoding(*overrides: str, drafters=("a", "b")):
    """A scene whose one sequence waits for its first draft; returns it, the sequence and its drafter's name."""
    scene = Scene("router.prefer_ngram=false", *overrides, drafters=drafters)
    sequence = scene.arrive(PROMPT, max_new=60, draft_tokens=3)
    scene.pump()
    scene.answer(sequence.context.drafter_id)  # that it knows of the sequence
    scene.finish_step()
    return scene, sequence, sequence.context.drafter_id


def miss(scene) -> None:
    """Lets the draft's time pass and the step run without it."""
    scene.now += TIMEOUT_S + 0.001
    scene.pump()
    scene.finish_step()


def test_a_late_draft_is_skipped_and_its_drafter_keeps_the_sequence():
    scene, sequence, drafter = decoding()
    assert scene.step is None, "the step waits for the draft"
    table = scene.scheduler.drafting.table
    held = table.held_rows[sequence.slot]
    miss(scene)
    assert scene.steps[-1].num_drafts[0] == 0
    scene.answer(drafter)  # too late
    assert scene.scheduler.drafting.num_dropped == {"timeout": 1}
    scene.finish_step()  # the one that was not to wait
    scene.answer(drafter)  # the next request
    scene.finish_step()
    assert sequence.context.drafter_id == drafter and table.held_rows[sequence.slot] > held
    assert scene.drafters[drafter].starts == [(sequence.sequence_id, 0)] and scene.scheduler.drafting.num_replays == 0
    assert scene.scheduler.num_drafts_by_source["remote"] == 1


def test_nobody_waits_for_a_drafter_that_is_already_late():
    scene, _, _ = decoding()
    miss(scene)
    for _ in range(3):  # its answer is still out, and time stands still
        scene.finish_step()


def test_a_drafter_that_was_late_three_times_in_a_row_is_left_and_told_to_forget():
    scene, sequence, first = decoding()
    for _ in range(3):
        scene.now += 10 * TIMEOUT_S
        scene.pump()
        if scene.step is not None:
            scene.finish_step()
    second = sequence.context.drafter_id
    assert second != first
    scene.answer(second)
    assert scene.drafters[second].starts == [(sequence.sequence_id, 0)] and scene.scheduler.drafting.num_replays == 1
    scene.answer(first)
    assert sequence.sequence_id in scene.drafters[first].request.close


def test_a_drafter_that_answers_in_time_starts_over():
    scene, sequence, drafter = decoding()
    for _ in range(6):
        miss(scene)
        scene.answer(drafter)
        scene.finish_step()
        scene.answer(drafter)
        scene.finish_step()
    assert sequence.context.drafter_id == drafter


def test_a_drafter_that_does_not_answer_at_all_is_dropped():
    scene, _, drafter = decoding("drafter.step_timeout_s=2")
    for _ in range(40):
        scene.now += TIMEOUT_S
        scene.pump()
        if scene.step is not None:
            scene.finish_step()
    assert DropDrafter(drafter) in scene.others


def test_a_sequence_over_which_two_drafters_died_goes_without():
    scene, sequence, _ = decoding(drafters=("a", "b", "c"))
    for _ in range(2):
        name = sequence.context.drafter_id
        del scene.drafters[name]
        scene.scheduler.drafter_lost(name)
        scene.pump()
        if scene.step is not None:
            scene.finish_step()
    assert sequence.context.drafter_id is None and len(scene.drafters) == 1


def test_a_drafter_without_room_is_not_asked_again_for_a_while():
    scene = Scene("router.prefer_ngram=false", drafters=("a",))
    scene.drafters["a"].num_rows = 10
    sequence = scene.arrive(PROMPT, max_new=60, draft_tokens=3)
    scene.pump()
    scene.answer("a")
    scene.finish_step()
    scene.answer("a")
    assert sequence.context.drafter_id is None
    scene.finish_step()
    assert scene.scheduler.drafting.num_dropped["refused"] == 1 and scene.drafters["a"].request is None
    while sequence.sequence_id not in scene.finished:  # and in the end not at all
        scene.now += 5.0
        scene.pump()
        if scene.drafters["a"].request is not None:
            scene.answer("a")
        if scene.step is not None:
            scene.finish_step()
    assert scene.scheduler.drafting.num_dropped["refused"] == 4


def test_a_drafter_is_told_of_a_long_prompt_when_its_first_rows_are_computed():
    target = ToyTarget()
    target.limits = TargetLimits(1, 4096, 50, 16, 300, 512, address="t:1", feature_fingerprint="toy")
    scene = Scene("router.prefill_chunk_tokens=64", target=target, drafters=("a",))
    sequence = scene.arrive([k % 50 for k in range(1000)], max_new=60, draft_tokens=3)
    scene.pump()
    request = scene.drafters["a"].request
    assert list(request.open) == [sequence.sequence_id] and not request.sequence_ids
    assert (request.source.address, request.source.step_id) == ("t:1", scene.step.step_id)
    scene.finish_step()
    scene.answer("a")
    while scene.scheduler.drafting.table.num_prefilled[sequence.slot] < 900:
        scene.finish_step()
        assert scene.drafters["a"].request is None
    assert scene.scheduler.drafting.num_replays == 0


def test_a_sequence_whose_rows_are_lost_is_opened_again_and_then_drafted_for_elsewhere():
    scene, sequence, first = decoding()
    scene.answer(first)
    scene.drafters[first].forget()
    scene.drafters[first].is_cut_off = True
    scene.finish_step()
    scene.answer(first)
    assert scene.step is not None, "the step goes on at once without the draft"
    scene.answer(first)  # it was told to open it again
    scene.finish_step()
    scene.answer(first)
    second = sequence.context.drafter_id
    assert second not in (None, first)
    scene.answer(second)
    scene.finish_step()
    scene.answer(second)
    assert scene.scheduler.drafting.num_replays == 2 and scene.scheduler.drafting.num_dropped["cut_off"] == 1
    assert scene.drafters[second].starts == [(sequence.sequence_id, 0)]
    assert scene.scheduler.num_drafts_by_source["remote"] == 2


def test_a_drafter_whose_rows_are_still_coming_keeps_the_sequence_and_is_asked_every_step():
    scene, sequence, drafter = decoding()
    scene.drafters[drafter].lag = 2
    for _ in range(5):
        scene.answer(drafter)
        scene.finish_step()
        assert list(scene.drafters[drafter].request.sequence_ids) == [sequence.sequence_id]
    assert sequence.context.drafter_id == drafter and scene.scheduler.drafting.num_replays == 0
    scene.drafters[drafter].lag = 0
    scene.answer(drafter)
    assert scene.scheduler.num_drafts_by_source["remote"] == 1


def test_a_sequence_that_was_preempted_is_opened_again_from_the_rows_that_its_drafter_holds():
    scene, sequence, drafter = decoding()
    scene.answer(drafter)
    scene.finish_step()
    scene.answer(drafter)
    held = scene.drafters[drafter].sessions[sequence.sequence_id]
    scene.lose_target()
    scene.finish_step()
    scene.answer(drafter)
    assert held > len(PROMPT)
    assert scene.drafters[drafter].starts == [(sequence.sequence_id, 0), (sequence.sequence_id, held)]
    assert scene.scheduler.drafting.num_replays == 0


def test_nobody_is_told_of_a_sequence_for_which_nothing_is_drafted():
    scene = Scene(drafters=("a",))
    scene.arrive(PROMPT, max_new=5, draft_tokens=0)
    for _ in range(5):
        scene.finish_step()
    assert scene.drafters["a"].request is None and not scene.drafters["a"].starts
