"""The application's own connections go straight to their servers, whatever the environment says of proxies."""

import ast
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dflash_ray.rpc.channel import new_server, open_channel, start_server
from tests.terminal import PROXIES

LIMIT = 1024 * 1024
ROOT = Path(__file__).parents[3]
CHANNELS = {"insecure_channel", "secure_channel"}
HTTP_CLIENTS = {"Client", "AsyncClient", "get", "post", "request", "stream"}


async def test_an_inner_channel_uses_no_proxy(monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    for name, url in PROXIES.items():
        monkeypatch.setenv(name, url)
    running = await start_server(new_server(LIMIT), [], "127.0.0.1", 0)
    try:
        async with open_channel(f"127.0.0.1:{running.port}", LIMIT) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    finally:
        await running.stop()


def clients_that_might_use_a_proxy(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if node.func.attr in CHANNELS:
            options = keywords.get("options", "")
            is_direct = "DIRECT" in options or "grpc.enable_http_proxy" in options
        elif node.func.attr in HTTP_CLIENTS and ast.unparse(node.func.value) == "httpx":
            is_direct = keywords.get("trust_env") == "False"
        else:
            continue
        if not is_direct:
            found.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("folder", ["dflash_ray", "benchmarks", "examples"])
def test_every_client_in_the_tree_says_that_it_uses_no_proxy(folder):
    files = [file for file in (ROOT / folder).rglob("*.py") if file.parent.name != "pb"]
    assert [client for file in files for client in clients_that_might_use_a_proxy(file)] == []
