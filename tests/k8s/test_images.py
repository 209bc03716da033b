"""The images' recipes, read: no container was built where these tests are written."""

import subprocess
import sys
from pathlib import Path

import pytest

from dflash_ray.config import load_config
from tests.k8s.dockerfiles import FOLDER, read
from tests.k8s.rendering import ROOT

EVERY_IMAGE = pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("Dockerfile.*")))


@EVERY_IMAGE
def test_hadolint_has_no_complaint(name):
    command = [str(Path(sys.executable).parent / "hadolint"), "--config", str(ROOT / ".hadolint.yaml")]
    result = subprocess.run([*command, str(FOLDER / name)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@EVERY_IMAGE
def test_bases_are_pinned_and_nothing_is_fetched_or_sent_when_the_image_runs(name):
    image = read(name)
    bases = [arguments for instruction, arguments in image.instructions if instruction == "FROM"]
    assert bases and all(":" in base and "latest" not in base for base in bases)
    assert image.env["HF_HUB_OFFLINE"] == image.env["TRANSFORMERS_OFFLINE"] == "1"
    assert image.env["RAY_USAGE_STATS_ENABLED"] == "0"
    text = (FOLDER / name).read_text()
    assert "wget" in text and "bash" in text, "KubeRay's probes use both"


@EVERY_IMAGE
def test_any_user_of_group_0_can_run_it(name):
    image = read(name)
    # A number, so that runAsNonRoot can be checked; group 0, which is every arbitrary user's.
    assert image.one("USER") == "1000:0"
    assert image.env["HOME"] == "/home/ray" and image.env["USER"] and image.env["LOGNAME"]
    users = next(arguments for instruction, arguments in image.last_stage if instruction == "RUN")
    assert "useradd --create-home --uid 1000 --gid 0 ray" in users and "chmod -R g=u /home/ray" in users
    # The operators are compiled while root may write.
    text = (FOLDER / name).read_text()
    assert text.index("dflash-ray kernels build") < text.rindex("USER ")
    assert image.env["DFLASH_RAY_KERNEL_CACHE"].startswith("/opt/dflash_ray/")


@EVERY_IMAGE
def test_published_ports_answer_and_docker_knows_whether_they_do(name):
    image = read(name)
    assert image.command[:3] == ["dflash-ray", "serve", "--config"]
    inside = Path(image.command[3])
    assert ("COPY", "deployments /opt/dflash_ray/deployments") in image.last_stage or (
        "COPY",
        "deployments ./deployments",
    ) in image.last_stage
    config = load_config(ROOT / inside.relative_to("/opt/dflash_ray"))
    assert (config.gateway.http_host, config.gateway.grpc_host) == ("0.0.0.0", "0.0.0.0")
    # What needs no client outside stays inside.
    assert config.network.bind_host == "127.0.0.1"
    assert image.one("EXPOSE").split() == [str(config.gateway.http_port), str(config.gateway.grpc_port)]
    assert image.health_command[-1] == f"http://127.0.0.1:{config.gateway.http_port}/health"
    assert config.target.device == config.drafter.device == ("cuda" if name.endswith("cuda") else "cpu")


def test_the_build_sees_what_the_recipes_copy_and_nothing_else():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for path in FOLDER.glob("Dockerfile.*")
        for name, arguments in read(path.name).instructions
        if name == "COPY" and not arguments.startswith("--from")
        for source in arguments.split()[:-1]
    }
    assert {entry.partition("/")[0] for entry in allowed} == copied
    assert (ROOT / ".dockerignore").read_text().startswith("*\n")
