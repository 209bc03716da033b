"""The CPU image's command under a user that nobody knows, as OpenShift starts it; without a container around it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import pytest

from dflash_ray.kernels.build import CACHE_ENV, FLAGS_ENV, cache_dir
from tests.applications import Client, free_port, request
from tests.k8s.dockerfiles import read
from tests.k8s.rendering import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root can start a process as another user"
    ),
]
UID = 1_000_680_000


def own_address() -> str:
    """This machine's address on its network: a published port's traffic does not come over the loopback interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # nothing is sent
        return probe.getsockname()[0]


@pytest.fixture
def home():
    """As /home/ray in the image: group 0 may write. Short, for Ray's sockets lie under it."""
    folder = Path(tempfile.mkdtemp(prefix="h", dir="/tmp"))
    os.chown(folder, 1000, 0)
    folder.chmod(0o770)
    yield folder
    shutil.rmtree(folder)


async def test_the_image_command_serves_all_interfaces_under_an_arbitrary_user(home):
    image = read("Dockerfile.cpu")
    http_port, grpc_port = free_port(), free_port()
    ports = ["--set", f"gateway.http_port={http_port}", "--set", f"gateway.grpc_port={grpc_port}"]
    config = ROOT / Path(image.command[3]).relative_to("/opt/dflash_ray")
    env = {
        **image.env,
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(home),
        "RAY_TMPDIR": str(home),  # /tmp/ray of this machine may be another user's
        # Compiled by whoever runs the tests: the image has its own.
        CACHE_ENV: str(cache_dir()),
        FLAGS_ENV: os.environ.get(FLAGS_ENV, "-march=native"),
    }  # fmt: skip
    # The interpreter may lie where only root reads. Reading is all that this grants.
    user = ["--reuid", str(UID), "--regid", "0", "--clear-groups", "--bounding-set", "-all,+dac_read_search"]
    user += ["--inh-caps", "-all,+dac_read_search", "--ambient-caps", "-all,+dac_read_search"]
    log = home / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["setpriv", *user, image.command[0], "serve", "--config", str(config), *ports],
            env=env, cwd=home, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    address = own_address()
    try:
        deadline = time.monotonic() + 240
        async with httpx.AsyncClient(base_url=f"http://{address}:{http_port}", timeout=60, trust_env=False) as http:
            while time.monotonic() < deadline:
                assert process.poll() is None, log.read_text()
                try:
                    if (await http.get("/health")).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.5)
            check = [part.replace(":8000/", f":{http_port}/") for part in image.health_command]
            assert subprocess.run(check).returncode == 0, log.read_text()
            body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 12, "temperature": 0}
            over_http = (await http.post("/v1/chat/completions", json=body)).json()
        async with Client(f"{address}:{grpc_port}") as client:
            over_grpc = await client.generate(request("Say hello.", max_new_tokens=12))
        assert over_grpc.text == over_http["choices"][0]["message"]["content"] != ""
    finally:
        process.send_signal(signal.SIGTERM)  # what `docker stop` sends
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    text = log.read_text()
    assert code == 0, text
    assert "Traceback" not in text and "Permission denied" not in text, text
