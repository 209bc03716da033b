"""The manifests are valid without a cluster: KubeRay's schema made strict, Kubernetes' own, Serve's, and ours."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from dflash_ray.config import DflashRayConfig, load_config, parse_config
from dflash_ray.placement import demands
from tests.k8s.rendering import FOLDER, GCS_FAULT_TOLERANCE, OVERLAYS, ROOT, ray_service, render

CRD = "shared/kuberay/ray.io_rayservices.yaml"
KUBERNETES_VERSION = "1.34"
EVERY_OVERLAY = pytest.mark.parametrize("overlay", [None, *OVERLAYS])


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
def kuberay() -> jsonschema.protocols.Validator:
    file = next((folder / CRD for folder in ROOT.parents if (folder / CRD).is_file()), None)
    if file is None:
        pytest.skip(f"KubeRay's custom resource definitions are not beside this checkout ({ROOT.parent / CRD})")
    versions = yaml.safe_load(file.read_text())["spec"]["versions"]
    schema = next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return jsonschema.Draft202012Validator(strict(schema))


@EVERY_OVERLAY
@pytest.mark.parametrize("components", [(), (GCS_FAULT_TOLERANCE,)], ids=["as-it-is", "gcs-fault-tolerance"])
def test_the_ray_service_is_valid_under_kuberays_strict_schema(kuberay, overlay, components):
    kuberay.validate(ray_service(overlay, *components))


def test_a_misspelt_field_would_be_caught(kuberay):
    service = ray_service()
    service["spec"]["rayClusterConfig"]["enableInTreeAutoscalling"] = True
    with pytest.raises(jsonschema.ValidationError, match="enableInTreeAutoscalling"):
        kuberay.validate(service)


@pytest.mark.parametrize(
    "document",
    [d for d in render(FOLDER / "base", GCS_FAULT_TOLERANCE) if d["kind"] != "RayService"],
    ids=lambda d: f"{d['kind']}-{d['metadata']['name']}",
)
def test_core_resources_are_valid_under_kubernetes_schemas(document):
    kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("components", [(), ("../../components/gcs-fault-tolerance",)], ids=["as-it-is", "gcs-ft"])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_renders_what_these_tests_check(overlay, components, tmp_path):
    copy = Path(shutil.copytree(FOLDER, tmp_path / "k8s")) / "overlays" / overlay
    file = copy / "kustomization.yaml"
    file.write_text(file.read_text() + (f"components: {json.dumps(components)}\n" if components else ""))
    rendered = subprocess.run(["kubectl", "kustomize", str(copy)], check=True, capture_output=True, text=True).stdout

    def by_name(documents):
        return {(d["kind"], d["metadata"]["name"]): d for d in documents}

    assert by_name(yaml.safe_load_all(rendered)) == by_name(render(copy))


def serve_config(overlay: str | None) -> dict[str, Any]:
    return yaml.safe_load(ray_service(overlay)["spec"]["serveConfigV2"])


def application_config(overlay: str | None) -> DflashRayConfig:
    return parse_config(serve_config(overlay)["applications"][0]["args"])


def worker_groups(overlay: str | None) -> dict[str, dict[str, Any]]:
    groups = ray_service(overlay)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return {group["groupName"]: group for group in groups}


@EVERY_OVERLAY
def test_the_serve_config_is_valid_for_serve_and_for_the_application(overlay):
    config = ServeDeploySchema.model_validate(serve_config(overlay))
    assert config.applications[0].import_path == "dflash_ray.app:build_app"
    parsed = application_config(overlay)
    assert parsed.gateway.grpc_port == 9000
    # Whatever is bound, other pods reach it.
    assert (parsed.gateway.grpc_host, parsed.network.bind_host) == ("node", "node")


def offered(group: dict[str, Any]) -> dict[str, float]:
    """What Ray sees of one pod: its limits, and the custom resources of its start parameters."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    custom = json.loads(json.loads(group["rayStartParams"]["resources"]))
    return {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0)), **custom}


def places(pods: list[dict[str, float]], demands: list[dict[str, float]]) -> bool:
    """Whether every demand finds a pod, first fit."""
    for demand in demands:
        for pod in pods:
            if all(pod.get(name, 0) >= amount - 1e-9 for name, amount in demand.items()):
                for name, amount in demand.items():
                    pod[name] -= amount
                break
        else:
            return False
    return True


@EVERY_OVERLAY
def test_every_process_fits_on_the_pods_of_its_group(overlay):
    config, groups = application_config(overlay), worker_groups(overlay)
    pods = {
        name: [offered(group) for _ in range(group["replicas"] * group.get("numOfHosts", 1))]
        for name, group in groups.items()
    }
    needs = demands(config)
    assert places(pods["frontend"], needs["gateway"] + needs["router"])
    assert places(pods["target"], needs["target"])
    assert places(pods["drafter"], needs["drafter"])
    most = [offered(groups["drafter"]) for _ in range(groups["drafter"]["maxReplicas"])]
    assert places(most, needs["drafter"][:1] * config.drafter.autoscaling.max_replicas)


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name.startswith("gpu")])
def test_gpu_overlays_run_targets_and_drafters_on_gpus_that_their_pods_ask_for(overlay):
    config, groups = application_config(overlay), worker_groups(overlay)
    assert (config.target.device, config.drafter.device) == ("cuda", "cuda")
    assert (config.model.dtype, config.drafter.dtype) == ("bfloat16", "bfloat16")
    target = groups["target"]
    gpus = offered(target)["GPU"] * target.get("numOfHosts", 1)
    assert gpus == config.target.tp_size * target["replicas"], "every GPU asked for has a rank"
    assert "GPU" not in {name for name, amount in offered(groups["frontend"]).items() if amount and name == "GPU"}
    for name in ("target", "drafter", "frontend"):
        pod = groups[name]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == "dflash-ray:0.1.0-cuda"
        models = next(mount for mount in container["volumeMounts"] if mount["name"] == "models")
        assert Path(config.model.path).is_relative_to(models["mountPath"]) and models["readOnly"]
    assert Path(config.drafter.path).is_relative_to(models["mountPath"])


def test_a_multi_host_target_has_ranks_on_every_pod_of_its_group():
    config, target = application_config("gpu-multihost"), worker_groups("gpu-multihost")["target"]
    assert target["numOfHosts"] == 2 and config.target.tp_size == 8
    pod = offered(target)
    share = config.target.placement.resources["target"]
    assert pod["target"] / share == pod["GPU"] == config.target.tp_size / target["numOfHosts"]


def test_the_head_holds_no_replicas_and_drafters_scale_from_one_to_three():
    cluster = ray_service()["spec"]["rayClusterConfig"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["enableInTreeAutoscaling"] and ray_service()["spec"]["excludeHeadPodFromServeSvc"]
    drafters = worker_groups(None)["drafter"]
    assert (drafters["minReplicas"], drafters["maxReplicas"]) == (1, 3)


def pod_specs(overlay: str | None) -> dict[str, dict[str, Any]]:
    cluster = ray_service(overlay)["spec"]["rayClusterConfig"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **workers}


@EVERY_OVERLAY
def test_containers_run_without_privileges_from_pinned_images_under_any_user(overlay):
    for template in pod_specs(overlay).values():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert not spec["securityContext"].keys() & {"runAsUser", "runAsGroup", "fsGroup"}
        for container in spec["containers"]:
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["image"].partition(":")[2] not in ("", "latest")
            assert container["resources"]["requests"] == container["resources"]["limits"]


@EVERY_OVERLAY
def test_a_pod_that_ends_drains_first_and_has_the_time_for_it(overlay):
    config = application_config(overlay)
    for template in pod_specs(overlay).values():
        spec = template["spec"]
        *command, timeout_s = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["dflash-ray", "drain", "--timeout"]
        assert config.gateway.drain_timeout_s < float(timeout_s) < spec["terminationGracePeriodSeconds"]


def test_clients_reach_the_active_cluster_and_no_other_by_one_service():
    service = ray_service()["spec"]["serveService"]
    ports = {port["name"]: port for port in service["spec"]["ports"]}
    head = pod_specs(None)["head"]["spec"]["containers"][0]["ports"]
    # KubeRay makes the Service of the ports named serve and serve-* of the head, and sets its selector itself.
    assert {port["name"] for port in head if port["name"].startswith("serve")} == ports.keys()
    assert "selector" not in service["spec"]
    named = {
        group: {port["name"] for port in template["spec"]["containers"][0].get("ports", ())}
        for group, template in pod_specs(None).items()
        if group != "head"
    }
    # A pod without a port of the target's name is no endpoint: gRPC is only served where a gateway is.
    assert {port["targetPort"] for port in ports.values()} == named.pop("frontend")
    assert not any(names & ports.keys() for names in named.values())
    assert not [d for d in render(FOLDER / "base") if d["kind"] == "Service"], "it would select both clusters"


def test_kuberay_finds_the_head_by_its_own_labels():
    for template in pod_specs(None).values():
        assert template["metadata"]["labels"] == {"app.kubernetes.io/part-of": "dflash-ray"}


def ingress_of(node_type: str) -> list[dict[str, Any]]:
    """The rules of all policies that select a pod of this type."""
    labels = {"app.kubernetes.io/part-of": "dflash-ray", "ray.io/node-type": node_type}
    policies = [d["spec"] for d in render(FOLDER / "base") if d["kind"] == "NetworkPolicy"]
    return [
        rule
        for policy in policies
        if policy["podSelector"]["matchLabels"].items() <= labels.items()
        for rule in policy.get("ingress", ())
    ]


def may_reach(node_type: str, port: int, **labels: str) -> bool:
    """Whether a pod of another namespace with these labels reaches the port."""
    for rule in ingress_of(node_type):
        has_port = "ports" not in rule or any(p["port"] == port and p["protocol"] == "TCP" for p in rule["ports"])
        is_from = "from" not in rule or any(
            "namespaceSelector" in peer and peer["podSelector"]["matchLabels"].items() <= labels.items()
            for peer in rule["from"]
        )
        if has_port and is_from:
            return True
    return False


OPERATOR = {"app.kubernetes.io/component": "kuberay-operator", "app.kubernetes.io/name": "kuberay-operator"}
PROMETHEUS = {"app.kubernetes.io/name": "prometheus"}


def test_the_operator_reaches_the_dashboard_and_prometheus_every_metric():
    assert may_reach("head", 8265, **OPERATOR)
    for node_type in ("head", "worker"):
        assert may_reach(node_type, 8080, **PROMETHEUS)
    assert may_reach("head", 44217, **PROMETHEUS) and may_reach("head", 44227, **PROMETHEUS)
    assert may_reach("worker", 8000, **PROMETHEUS)


def test_strangers_reach_the_public_ports_and_nothing_else():
    for node_type in ("head", "worker"):
        assert [port for port in (6379, 8265, 10001, 52365, 8080, 8000, 9000) if may_reach(node_type, port)] == [
            8000,
            9000,
        ]
    assert not may_reach("head", 8265, **PROMETHEUS) and not may_reach("worker", 8265, **OPERATOR)


@EVERY_OVERLAY
def test_disruption_budgets_let_a_drain_go_on(overlay):
    groups = worker_groups(overlay)
    documents = render(FOLDER / "base" if overlay is None else FOLDER / "overlays" / overlay)
    budgets = [d["spec"] for d in documents if d["kind"] == "PodDisruptionBudget"]
    assert budgets
    for budget in budgets:
        # RayCluster has no scale subresource: anything but a number of pods that stay would block every eviction.
        assert "maxUnavailable" not in budget and isinstance(budget["minAvailable"], int)
        group = groups[budget["selector"]["matchLabels"]["ray.io/group"]]
        assert budget["minAvailable"] < group["minReplicas"] * group.get("numOfHosts", 1)


def test_the_heads_state_can_live_in_redis_whose_password_is_a_secret():
    documents = render(FOLDER / "overlays/cpu", GCS_FAULT_TOLERANCE)
    service = next(d for d in documents if d["kind"] == "RayService")
    options = service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert options["redisPassword"].keys() == {"valueFrom"}
    port = int(options["redisAddress"].rpartition(":")[2])
    policies = [d["spec"] for d in documents if d["kind"] == "NetworkPolicy"]
    assert any(
        rule.get("ports") == [{"port": port, "protocol": "TCP"}] for p in policies for rule in p.get("egress", ())
    )


@pytest.mark.parametrize("file", sorted((ROOT / "deployments").glob("*.yaml")), ids=lambda file: file.name)
def test_every_deployment_file_is_a_valid_configuration(file):
    load_config(file)
