"""What keeps the application from starting is said at once and by name."""

import socket

import pytest

from dflash_ray.app import AppStartError, running_app
from dflash_ray.config import load_config
from tests.applications import free_port
from tests.terminal import run


@pytest.mark.parametrize("taken", ["http_port", "grpc_port"])
def test_a_port_that_is_taken_is_named_before_anything_starts(taken: str) -> None:
    ports = {"http_port": free_port(), "grpc_port": free_port()}
    config = load_config(None, [f"gateway.{name}={port}" for name, port in ports.items()])
    listening = socket.create_server(("127.0.0.1", ports[taken]))
    message = rf"gateway.{taken}: cannot listen on 127.0.0.1:{ports[taken]}"
    with listening, pytest.raises(AppStartError, match=message), running_app(config):
        pass


def test_the_command_names_the_port_that_is_taken_and_the_way_out() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        done = run("serve", "--set", f"gateway.http_port={port}")
    assert done.returncode == 1 and done.stdout == ""
    _, error, *log = done.stderr.splitlines()
    assert error.startswith(f"error: gateway.http_port: cannot listen on 127.0.0.1:{port}")
    assert error.endswith(f"--set gateway.http_port={port + 1}")
    assert len(log) == 1 and log[0].endswith("is empty")
