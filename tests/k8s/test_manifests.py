"""The manifests are valid without a cluster: KubeRay's schema made strict, Kubernetes' own, Serve's, and ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from dflash_ray.config import load_config, parse_config

ROOT = Path(__file__).parents[2]
BASE = ROOT / "k8s/base"
CRD = ROOT.parent / "shared/kuberay/ray.io_rayservices.yaml"
KUBERNETES_VERSION = "1.34"


def documents(folder: Path = BASE) -> list[dict[str, Any]]:
    names = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return [document for name in names for document in yaml.safe_load_all((folder / name).read_text())]


def apply_patch(document: Any, operations: list[dict[str, Any]]) -> Any:
    """The `replace` of JSON patches, all that the overlays use; the path must exist."""
    for operation in operations:
        assert operation["op"] == "replace"
        *parents, leaf = operation["path"].strip("/").split("/")
        node = document
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node[key]
        assert leaf in node
        node[leaf] = operation["value"]
    return document


def ray_service(overlay: str | None = None) -> dict[str, Any]:
    service = next(document for document in documents() if document["kind"] == "RayService")
    if overlay is not None:
        folder = ROOT / "k8s/overlays" / overlay
        for patch in yaml.safe_load((folder / "kustomization.yaml").read_text())["patches"]:
            apply_patch(service, yaml.safe_load((folder / patch["path"]).read_text()))
    return service


def strict(schema: Any) -> Any:
    """Refuses unknown fields where the schema lists the known ones, as strict decoding in the API server does."""
    if isinstance(schema, dict):
        is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
        if "properties" in schema and not is_open:
            schema["additionalProperties"] = False
        for value in schema.values():
            strict(value)
    elif isinstance(schema, list):
        for value in schema:
            strict(value)
    return schema


@pytest.fixture(scope="module")
def crd_schema() -> dict[str, Any]:
    if not CRD.is_file():
        pytest.skip(f"KubeRay's custom resource definitions are not beside this checkout ({CRD.parent})")
    versions = yaml.safe_load(CRD.read_text())["spec"]["versions"]
    schema = next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return strict(schema)


@pytest.mark.parametrize("overlay", [None, "cpu"])
def test_the_ray_service_is_valid_under_kuberays_strict_schema(crd_schema, overlay):
    jsonschema.validate(ray_service(overlay), crd_schema)


def test_a_misspelt_field_would_be_caught(crd_schema):
    service = ray_service()
    service["spec"]["rayClusterConfig"]["enableInTreeAutoscalling"] = True
    with pytest.raises(jsonschema.ValidationError, match="enableInTreeAutoscalling"):
        jsonschema.validate(service, crd_schema)


@pytest.mark.parametrize(
    "document",
    [d for d in documents() if d["kind"] != "RayService"],
    ids=lambda d: f"{d['kind']}-{d['metadata']['name']}",
)
def test_core_resources_are_valid_under_kubernetes_schemas(document):
    kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


def serve_config() -> dict[str, Any]:
    return yaml.safe_load(ray_service()["spec"]["serveConfigV2"])


def test_the_serve_config_is_valid_for_serve_and_for_the_application():
    config = ServeDeploySchema.model_validate(serve_config())
    assert config.applications[0].import_path == "dflash_ray.app:build_app"
    parse_config(config.applications[0].args)


def test_every_custom_resource_that_is_asked_for_is_offered_by_a_worker_group():
    cluster = ray_service()["spec"]["rayClusterConfig"]
    offered: set[str] = set()
    for group in cluster["workerGroupSpecs"]:
        offered |= set(json.loads(json.loads(group["rayStartParams"]["resources"])))
    config = parse_config(serve_config()["applications"][0]["args"])
    for section in (config.gateway, config.router, config.target, config.drafter):
        assert section.placement.resources.keys() <= offered


def test_the_head_holds_no_replicas_and_drafters_scale_from_one_to_three():
    cluster = ray_service()["spec"]["rayClusterConfig"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["enableInTreeAutoscaling"] and ray_service()["spec"]["excludeHeadPodFromServeSvc"]
    drafters = next(group for group in cluster["workerGroupSpecs"] if group["groupName"] == "drafter")
    assert (drafters["minReplicas"], drafters["maxReplicas"]) == (1, 3)


def test_containers_run_without_privileges_from_pinned_images():
    cluster = ray_service()["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        for container in spec["containers"]:
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["image"].partition(":")[2] not in ("", "latest")
            assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.parametrize("file", sorted((ROOT / "deployments").glob("*.yaml")), ids=lambda file: file.name)
def test_every_deployment_file_is_a_valid_configuration(file):
    load_config(file)


@pytest.mark.parametrize("file", sorted((ROOT / "deployments/docker").iterdir()), ids=lambda file: file.name)
def test_images_are_pinned_offline_and_not_root(file):
    lines = file.read_text().splitlines()
    bases = [line for line in lines if line.startswith("FROM ")]
    assert bases and all(":" in base and "latest" not in base for base in bases)
    assert any("HF_HUB_OFFLINE=1" in line for line in lines)
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 1000:1000"
    assert "wget" in file.read_text() and "bash" in file.read_text()
