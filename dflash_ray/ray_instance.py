"""A Ray instance on this machine with the processes that the application needs, and none that only a cluster does.

Left out: the dashboard and its modules, the metrics exporter, the autoscaler's monitor and the log monitor. Processes
write their logs straight to the standard error of the one that starts them. Ray has no public option for all of that,
so this rests on `ray._private.node`; the version is pinned, and a test counts the processes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
from ray._private import node as ray_node
from ray._private import ray_constants, services

# What of Ray's own work has no reader here, or no reason to be done so often: each wakes every process.
_QUIET = {
    # Processes write to the standard error that they inherit, and Ray's own say what is wrong and nothing else.
    "RAY_LOG_TO_STDERR": "1",
    "RAY_BACKEND_LOG_LEVEL": "error",
    "RAY_LOGGER_LEVEL": "warning",
    # Nobody reads Ray's metrics, task events and event statistics where there is no dashboard.
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
    "RAY_io_context_monitor_probe_interval_ms": "10000",
    # One node, whose resources change when the application starts and stops.
    "RAY_raylet_report_resources_period_milliseconds": "500",
    "RAY_gcs_pull_resource_loads_period_milliseconds": "5000",
    "RAY_object_manager_timer_freq_ms": "1000",
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    "RAY_memory_monitor_refresh_ms": "2000",
    # Serve's controller looks at its replicas this often; a dead one is seen by its callers at once.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1",
    # Serve's own metrics, and how late its event loops are, have no reader either.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "60000",
    "RAY_SERVE_EVENT_LOOP_MONITORING_INTERVAL_S": "60",
}

# Ray's switch for machines whose clusters never have a second node: it then takes the loopback address for its own, and
# every port of it listens there.
_ALONE = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}

_AGENT = Path(__file__).with_name("ray_agent.py")
_start_ray_process = services.start_ray_process


class _Node(ray_node.Node):
    """The head without what serves people who look after a cluster."""

    def start_api_server(self, **_: Any) -> None:
        self._webui_url = ""

    def start_log_monitor(self) -> None:
        pass

    def start_monitor(self) -> None:
        pass

    def start_raylet(self, *args: Any, **options: Any) -> None:
        with _replaced(services, "start_ray_process", _start_with_lean_agent):
            super().start_raylet(*args, **options)


def _start_with_lean_agent(command: list[str], *args: Any, **options: Any) -> Any:
    agent, flag = str(Path(ray.__file__).parent / "dashboard/agent.py"), "--dashboard_agent_command="
    lean = [
        word.replace(agent, f"{_AGENT} --minimal") if word.startswith(flag) and agent in word else word
        for word in command
    ]
    return _start_ray_process(lean, *args, **options)


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextmanager
def _inherited(variables: Mapping[str, str]) -> Iterator[None]:
    """Processes that are started inside have these variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def start_instance(namespace: str, num_cpus: int) -> None:
    """Starts Ray and connects to it; `ray.shutdown` ends both. Its ports listen on the loopback interface alone.

    Every process inherits this one's environment, which is completed here with what keeps Ray quiet.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with (
        _replaced(ray_node, "Node", _Node),
        _replaced(ray_constants, "ENABLE_RAY_CLUSTER", False),  # read when Ray was imported
        _inherited(_ALONE),
    ):
        ray.init(
            "local",  # whoever else runs a cluster on this machine
            namespace=namespace,
            num_cpus=num_cpus,
            object_store_memory=80 * 1024 * 1024,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
