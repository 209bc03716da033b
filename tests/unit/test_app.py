"""What processes are given, and what a Ray instance of the application's own leaves out."""

import os

from ray.serve._private.build_app import build_app as deployments_of

from dflash_ray.app import PROCESS_ENV, _build, build_app
from dflash_ray.config import load_config


def env_of(application) -> dict[str, dict[str, str]]:
    """Environment of each deployment's actors, beyond what they inherit."""
    built = deployments_of(application, name="test")
    options = {deployment.name: deployment.ray_actor_options for deployment in built.deployments}
    return {name: each.get("runtime_env", {}).get("env_vars", {}) for name, each in options.items()}


def test_every_process_of_a_cluster_is_given_its_environment():
    envs = env_of(build_app(load_config(None).model_dump()))
    assert set(envs) == {"Gateway", "Router", "Target", "Drafter"}
    for env in envs.values():
        assert PROCESS_ENV.items() <= env.items()


def test_processes_that_inherit_all_are_given_nothing_so_that_any_worker_will_do():
    inherited = {**PROCESS_ENV, "OMP_NUM_THREADS": str(os.cpu_count())}
    assert not any(env_of(_build(load_config(None), inherited)).values())


def test_a_drafter_with_threads_of_its_own_is_given_their_number_and_nothing_else():
    inherited = {**PROCESS_ENV, "OMP_NUM_THREADS": "64"}
    envs = env_of(_build(load_config(None, ["drafter.num_threads=3"]), inherited))
    assert envs == {"Gateway": {}, "Router": {}, "Target": {}, "Drafter": {"OMP_NUM_THREADS": "3"}}
