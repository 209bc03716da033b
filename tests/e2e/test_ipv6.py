"""The whole application on IPv6 addresses alone: public servers, inner servers, and the metrics that join them."""

import httpx
import pytest

from dflash_ray.rpc.channel import format_address
from tests.applications import Client, application, request

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
HOSTS = ("gateway.http_host='::1'", "gateway.grpc_host='::1'", "network.bind_host='::1'")


async def test_every_server_listens_and_is_reached_on_ipv6():
    with application(*HOSTS) as app:
        gateway = app.config.gateway
        async with Client(format_address("::1", gateway.grpc_port)) as client:
            over_grpc = await client.generate(request("Say hello.", max_new_tokens=12))
        async with httpx.AsyncClient(base_url=f"http://[::1]:{gateway.http_port}", timeout=120) as http:
            body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 12, "temperature": 0}
            over_http = (await http.post("/v1/chat/completions", json=body)).json()
            metrics = (await http.get("/metrics")).text
    assert over_http["choices"][0]["message"]["content"] == over_grpc.text != ""
    assert all(f'process="{kind}-' in metrics for kind in ("router", "target", "drafter"))
