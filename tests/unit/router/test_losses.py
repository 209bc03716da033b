"""A request over which groups die ends by itself, and takes nobody with it."""

from dflash_ray.router.actions import DropTarget
from tests.unit.router.scenes import Scene


def test_a_request_over_which_groups_die_runs_alone_and_then_fails_and_the_others_finish():
    scene = Scene()
    killer = scene.arrive([1, 2, 3], max_new=6)
    others = [scene.arrive([4 + k, 5, 6], max_new=6) for k in range(3)]
    for _ in range(60):
        scene.pump()
        if scene.step is None:
            break
        ids = {*scene.step.prefill_ids, *scene.step.verify_ids}
        if killer.sequence_id in ids:
            scene.lose_target()
        else:
            scene.finish_step()
    assert set(scene.failed) == {killer.sequence_id}
    assert "ended three times while it ran this request" in scene.failed[killer.sequence_id]
    assert scene.finished == {other.sequence_id for other in others}
    assert scene.scheduler.num_running == scene.scheduler.num_waiting == 0


def test_a_loss_without_a_step_in_flight_counts_against_nobody():
    scene = Scene()
    sequence = scene.arrive([1, 2, 3], max_new=20)
    for _ in range(5):
        scene.pump()
        result = scene.target.step(scene.step)
        scene.scheduler.step_done(result, scene.now)  # and no step went out before the group was lost
        scene.lose_target()
    assert sequence.num_losses == 0 and not scene.failed


def test_a_step_without_an_answer_ends_the_stream():
    scene = Scene("target.step_timeout_s=10")
    scene.arrive([1, 2, 3])
    scene.pump()
    scene.now += 14.0
    scene.pump()
    assert DropTarget() not in scene.others and scene.scheduler.next_deadline() == 15.0
    scene.now += 1.0
    actions = scene.scheduler.poll(scene.now)
    assert DropTarget() in actions
