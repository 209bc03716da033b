"""The Serve application: the only module that knows all four processes.

`build_app` is the import path of every Serve config; `running_app` starts it on this machine or on the cluster that
RAY_ADDRESS names.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, HTTPOptions
from ray.serve.schema import ApplicationStatus

from dflash_ray.config import DflashRayConfig, PlacementConfig, parse_config
from dflash_ray.drafter.replica import DrafterReplica
from dflash_ray.gateway.replica import GatewayReplica
from dflash_ray.placement import what_is_missing
from dflash_ray.ray_instance import start_instance
from dflash_ray.router.replica import RouterReplica
from dflash_ray.rpc.channel import format_address
from dflash_ray.rpc.directory import NAMESPACE, start_directory, stop_directory
from dflash_ray.target_group.replica import TargetReplica, target_placement

APPLICATION_NAME = "dflash_ray"


class AppStartError(RuntimeError):
    """The application cannot start; the text says what to change."""


PROCESS_ENV = {
    # One event loop a process: grpc.aio shares one poller among all loops.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",  # progress bars make a hundred lines of a log
    "RAY_USAGE_STATS_ENABLED": "0",
    # Threads of torch's own operators that have nothing to do leave their cores to the operators' team.
    "OMP_WAIT_POLICY": "PASSIVE",
}

# Of Serve itself and of every replica: no line for each health check. The package's own logs have their own level.
_SERVE_LOGGING = {"log_level": "WARNING", "enable_access_log": False}

# Requests do not pass through Serve's queues except at the gateway, so its limits must not bind.
_MAX_ONGOING_REQUESTS = 10_000

_UNPLACED = "to be scheduled"  # in Serve's message about replicas that Ray has no node for
_STATUS_PERIOD_S = 0.1


def build_app(args: dict[str, Any]) -> serve.Application:
    """The application for a configuration tree of plain values. Raises ConfigError that names the key at fault."""
    return _build(parse_config(args), inherited={})


def _build(config: DflashRayConfig, inherited: Mapping[str, str]) -> serve.Application:
    """
    Args:
        inherited: what every process has in its environment anyway. One that needs nothing else can be any worker that
            Ray has started already.
    """
    peers = [_router(config, inherited), _target(config, inherited)]
    if config.num_drafter_replicas:
        peers.append(_drafter(config, inherited))
    gateway = serve.deployment(
        GatewayReplica,
        name="Gateway",
        num_replicas=config.gateway.num_replicas,
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        logging_config=_SERVE_LOGGING,
        ray_actor_options=_actor_options(config.gateway.placement, inherited),
        # Serve's limit is for HTTP and gRPC together, and ends the process.
        graceful_shutdown_timeout_s=config.gateway.drain_timeout_s + 5,
    )
    # The peers are bound so that Serve deploys them; requests reach them over gRPC, found through the directory.
    return gateway.bind(config, *peers)


def _router(config: DflashRayConfig, inherited: Mapping[str, str]) -> serve.Application:
    deployment = serve.deployment(
        RouterReplica,
        name="Router",
        num_replicas=config.router.num_replicas,
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        logging_config=_SERVE_LOGGING,
        ray_actor_options=_actor_options(config.router.placement, inherited),
        graceful_shutdown_timeout_s=30,
    )
    return deployment.bind(config)


def _target(config: DflashRayConfig, inherited: Mapping[str, str]) -> serve.Application:
    bundles, strategy, actor_options = target_placement(config)
    actor_options = {**actor_options, **_runtime_env(PROCESS_ENV, inherited)}
    deployment = serve.deployment(
        TargetReplica,
        name="Target",
        num_replicas=config.target.num_replicas,
        placement_group_bundles=bundles,
        placement_group_strategy=strategy,
        ray_actor_options=actor_options,
        logging_config=_SERVE_LOGGING,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=30,
    )
    return deployment.bind(config)


def _drafter(config: DflashRayConfig, inherited: Mapping[str, str]) -> serve.Application:
    scaling = config.drafter.autoscaling
    size: dict[str, Any] = {"num_replicas": config.num_drafter_replicas}
    if scaling is not None:
        policy = AutoscalingPolicy(
            policy_function="dflash_ray.drafter.autoscaling:BusyFractionPolicy",
            policy_kwargs={"target_busy_fraction": scaling.target_busy_fraction},
        )
        size = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=scaling.min_replicas,
                max_replicas=scaling.max_replicas,
                look_back_period_s=scaling.look_back_period_s,
                upscale_delay_s=scaling.upscale_delay_s,
                downscale_delay_s=scaling.downscale_delay_s,
                policy=policy,
            )
        }
    threads = config.drafter.num_threads or os.cpu_count() or 1
    deployment = serve.deployment(
        DrafterReplica,
        name="Drafter",
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        logging_config=_SERVE_LOGGING,
        ray_actor_options=_actor_options(
            config.drafter.placement, inherited, config.drafter.num_gpus, OMP_NUM_THREADS=str(threads)
        ),
        health_check_period_s=2,
        graceful_shutdown_timeout_s=5,
        **size,
    )
    return deployment.bind(config)


def _actor_options(
    placement: PlacementConfig, inherited: Mapping[str, str], num_gpus: float = 0.0, **env: str
) -> dict[str, Any]:
    return {
        "num_cpus": placement.num_cpus,
        "num_gpus": num_gpus,
        "resources": placement.resources,
        **_runtime_env({**PROCESS_ENV, **env}, inherited),
    }


def _runtime_env(env: Mapping[str, str], inherited: Mapping[str, str]) -> dict[str, Any]:
    """The option of an actor that gives it what it does not inherit; none where it inherits everything."""
    missing = {name: value for name, value in env.items() if inherited.get(name) != value}
    return {"runtime_env": {"env_vars": missing}} if missing else {}


@contextmanager
def running_app(config: DflashRayConfig, on_step: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Starts the application, waits until Serve calls it running, and stops everything at the end.

    Without RAY_ADDRESS a Ray instance of its own is started on this machine and stopped at the end; with it,
    only the application is removed.

    Args:
        on_step: told what begins.

    Raises:
        AppStartError: a port of the gateway is taken, or a deployment does not come up.
    """
    os.environ.update(PROCESS_ENV)
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    # Ray runs workers at niceness 15; these are the service itself.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Logs are for files as well, and a target may load for as long as its deadline says.
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    os.environ.setdefault("RAY_SERVE_SLOW_STARTUP_WARNING_S", str(int(config.target.init_timeout_s)))
    joins_cluster = "RAY_ADDRESS" in os.environ
    if not joins_cluster:
        require_free_ports(config)
    with ExitStack() as stopping:
        on_step("connecting to Ray" if joins_cluster else "starting Ray")
        stopping.callback(ray.shutdown)  # also what an interrupted start leaves
        _connect(joins_cluster)
        missing = what_is_missing(config, ray.cluster_resources())
        if missing and not joins_cluster:  # a cluster may grow
            raise AppStartError(missing)
        if not joins_cluster:
            stopping.callback(serve.shutdown)
        http = HTTPOptions(host=config.gateway.http_host, port=config.gateway.http_port)
        serve.start(http_options=http, logging_config=_SERVE_LOGGING)
        stopping.callback(stop_directory)
        start_directory()
        on_step("loading the model and its drafters")
        stopping.callback(serve.delete, APPLICATION_NAME)
        application = _build(config, inherited={} if joins_cluster else os.environ)
        target = serve.RunTarget(application, name=APPLICATION_NAME, route_prefix="/")
        serve.run_many([target], wait_for_applications_running=False)
        _wait_until_running(config.target.init_timeout_s)
        stopping.callback(on_step, "stopping")
        yield


def _connect(joins_cluster: bool) -> None:
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if joins_cluster:
        ray.init(namespace=NAMESPACE, logging_level=logging.WARNING)
    else:
        start_instance(NAMESPACE, num_cpus=max(4, os.cpu_count() or 1))
    # Ray puts its own handler in place of the command's.
    if callable(on_sigterm):
        signal.signal(signal.SIGTERM, on_sigterm)


def require_free_ports(config: DflashRayConfig) -> None:
    """Says now what would otherwise show after the weights are loaded, as a deployment that fails three times.

    Raises:
        AppStartError: a port of the gateway is taken on this machine.
    """
    _require_free("gateway.http_port", config.gateway.http_host, config.gateway.http_port)
    _require_free("gateway.grpc_port", config.gateway.grpc_host, config.gateway.grpc_port)


def _require_free(field: str, host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            address = format_address(host, port)
            text = f"{field}: cannot listen on {address} ({error.strerror}); free the port or choose another"
            raise AppStartError(f"{text}: --set {field}={port + 1}") from None


def _wait_until_running(placing_timeout_s: float) -> None:
    """Raises AppStartError when a deployment fails, or finds no place in the cluster for so long."""
    deadline = time.monotonic() + placing_timeout_s
    while True:
        application = serve.status().applications.get(APPLICATION_NAME)
        if application is not None and application.status == ApplicationStatus.RUNNING:
            return
        messages = _messages_of_deployments()
        if application is not None and application.status == ApplicationStatus.DEPLOY_FAILED:
            raise AppStartError("\n".join([application.message, *messages]))
        unplaced = [message for message in messages if _UNPLACED in message]
        if unplaced and time.monotonic() > deadline:
            text = f"no place in the cluster within target.init_timeout_s ({placing_timeout_s:g} s); lower what "
            raise AppStartError("\n".join([f"{text}placement.* asks for, or add nodes", *unplaced]))
        time.sleep(_STATUS_PERIOD_S)


def _messages_of_deployments() -> list[str]:
    """The last line of what each deployment reports."""
    application = serve.status().applications.get(APPLICATION_NAME)
    deployments = application.deployments if application else {}
    return [
        f"{name}: {state.message.strip().splitlines()[-1]}"
        for name, state in deployments.items()
        if state.message.strip()
    ]
