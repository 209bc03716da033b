"""The Serve config of the Kubernetes manifest, deployed as it is on a Ray cluster of this machine, and asked."""

import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve

from tests.applications import Client, request
from tests.k8s.rendering import ray_service

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
RESOURCES = {"frontend": 2, "target": 1, "drafter": 3}  # what the worker groups offer together


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_worker_niceness", "0")
    context = ray.init(num_cpus=12, resources=RESOURCES, object_store_memory=200 * 1024 * 1024)
    yield context
    serve.shutdown()
    ray.shutdown()


async def test_the_manifests_serve_config_answers_over_http_and_grpc(cluster, tmp_path):
    file = Path(tmp_path / "serve.yaml")
    file.write_text(ray_service("cpu")["spec"]["serveConfigV2"])
    command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(file), "-a", f"http://{cluster.dashboard_url}"]
    subprocess.run(command, check=True, timeout=120)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        application = serve.status().applications.get("dflash_ray")
        assert application is None or application.status != "DEPLOY_FAILED", application.message
        if application is not None and application.status == "RUNNING":
            break
        time.sleep(1)
    async with httpx.AsyncClient(base_url="http://127.0.0.1:8000", timeout=60) as http:
        while (await http.get("/health")).status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.5)
        body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 12, "temperature": 0}
        over_http = (await http.post("/v1/chat/completions", json=body)).json()
    async with Client(f"{ray.util.get_node_ip_address()}:9000") as client:
        over_grpc = await client.generate(request("Say hello.", max_new_tokens=12))
    assert over_grpc.text == over_http["choices"][0]["message"]["content"] != ""
