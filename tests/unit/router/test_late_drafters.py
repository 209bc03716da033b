"""A late draft costs its step; only a drafter that is late all the time, or dead, loses its sequences."""

from dflash_ray.router.actions import DropDrafter
from tests.unit.router.scenes import Scene

PROMPT = list(range(20))
TIMEOUT_S = 0.1


def decoding(*overrides: str, drafters=("a", "b")):
    """A scene whose one sequence waits for its first draft; returns it, the sequence and its drafter's name."""
    scene = Scene("router.prefer_ngram=false", *overrides, drafters=drafters)
    sequence = scene.arrive(PROMPT, max_new=60, draft_tokens=3)
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
    held = sequence.context.sent_rows
    miss(scene)
    assert scene.steps[-1].num_drafts[0] == 0
    scene.answer(drafter)  # too late
    assert scene.scheduler.drafting.num_dropped == {"timeout": 1, "stale": 1}
    scene.finish_step()  # the one that was not to wait
    scene.answer(drafter)  # the next request, with the rows in between
    scene.finish_step()
    assert sequence.context.drafter_id == drafter and sequence.context.sent_rows > held
    assert not scene.replays and scene.scheduler.drafting.num_replays == 0
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
    while sequence.context.end < sequence.num_computed:
        scene.replay()
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
        while scene.replays:
            scene.replay()
        if scene.step is not None:
            scene.finish_step()
            while scene.replays:
                scene.replay()
    assert sequence.context.drafter_id is None and len(scene.drafters) == 1


def test_a_drafter_without_room_is_not_asked_again_for_a_while():
    scene = Scene("router.prefer_ngram=false", drafters=("a",))
    scene.drafters["a"].num_rows = 10
    sequence = scene.arrive(PROMPT, max_new=60, draft_tokens=3)
    scene.finish_step()
    scene.answer("a")
    assert sequence.context.drafter_id is None
    scene.finish_step()
    assert scene.scheduler.drafting.num_dropped["refused"] == 1 and scene.drafters["a"].request is None
    while sequence.sequence_id not in scene.finished:  # and in the end not at all
        scene.now += 5.0
        scene.pump()
        while scene.replays:
            scene.replay()
        if scene.drafters["a"].request is not None:
            scene.answer("a")
        if scene.step is not None:
            scene.finish_step()
    assert scene.scheduler.drafting.num_dropped["refused"] == 4


def test_features_of_a_long_prompt_reach_the_drafter_while_it_is_prefilled():
    scene = Scene("router.prefill_chunk_tokens=64", "model.max_model_len=4096", drafters=("a",))
    scene.target.limits = scene.scheduler.limits = type(scene.target.limits)(1, 4096, 50, 16, 300, 512)
    sequence = scene.arrive([k % 50 for k in range(1000)], max_new=60, draft_tokens=3)
    while sequence.num_prefilled < 900:
        scene.finish_step()
        if scene.drafters["a"].request is not None:
            assert not scene.drafters["a"].request.sequence_ids
            scene.answer("a")
    assert sequence.context.sent_rows > 700
    assert scene.scheduler.drafting.num_replays == 0
