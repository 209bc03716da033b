"""What keeps the application from starting is said at once and by name."""

import socket

import pytest

from dflash_ray.app import AppStartError, running_app
from dflash_ray.config import load_config
from tests.applications import free_port


@pytest.mark.parametrize("taken", ["http_port", "grpc_port"])
def test_a_port_that_is_taken_is_named_before_anything_starts(taken: str) -> None:
    ports = {"http_port": free_port(), "grpc_port": free_port()}
    config = load_config(None, [f"gateway.{name}={port}" for name, port in ports.items()])
    listening = socket.create_server(("127.0.0.1", ports[taken]))
    message = rf"gateway.{taken}: cannot listen on 127.0.0.1:{ports[taken]}"
    with listening, pytest.raises(AppStartError, match=message), running_app(config):
        pass
