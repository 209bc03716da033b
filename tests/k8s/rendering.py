"""What `kubectl kustomize` makes of k8s/, for as much of it as the folder uses; no kubectl is needed."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "k8s"
OVERLAYS = tuple(sorted(path.name for path in (FOLDER / "overlays").iterdir()))
GCS_FAULT_TOLERANCE = FOLDER / "components/gcs-fault-tolerance"
_KEYS = {"apiVersion", "kind", "namespace", "resources", "components", "images", "patches"}


@cache
def _parse(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def _documents(path: Path) -> list[Any]:
    return copy.deepcopy(_parse(path))


def render(folder: Path, *components: Path) -> list[dict[str, Any]]:
    """The documents of a kustomization, with further components as if it named them."""
    (kustomization,) = _documents(folder / "kustomization.yaml")
    assert kustomization.keys() <= _KEYS, f"{folder}: teach rendering.py {kustomization.keys() - _KEYS}"
    documents: list[dict[str, Any]] = []
    for name in kustomization.get("resources", ()):
        path = folder / name
        documents += render(path) if path.is_dir() else _documents(path)
    for component in (*(folder / name for name in kustomization.get("components", ())), *components):
        (part,) = _documents(component / "kustomization.yaml")
        assert part["kind"] == "Component" and part.keys() <= _KEYS
        for name in part.get("resources", ()):
            documents += _documents(component / name)
        _patch(documents, part, component)
    _patch(documents, kustomization, folder)
    for image in kustomization.get("images", ()):
        _set_image(documents, image)
    if "namespace" in kustomization:
        for document in documents:
            if document["kind"] != "Namespace":
                document["metadata"]["namespace"] = kustomization["namespace"]
    return documents


def ray_service(overlay: str | None = None, *components: Path) -> dict[str, Any]:
    """The RayService of the base or of an overlay."""
    documents = render(FOLDER / "base" if overlay is None else FOLDER / "overlays" / overlay, *components)
    return next(document for document in documents if document["kind"] == "RayService")


def _patch(documents: list[dict[str, Any]], kustomization: dict[str, Any], folder: Path) -> None:
    for patch in kustomization.get("patches", ()):
        kind, name = patch["target"]["kind"], patch["target"]["name"]
        (document,) = [d for d in documents if (d["kind"], d["metadata"]["name"]) == (kind, name)]
        (operations,) = _documents(folder / patch["path"])
        for operation in operations:
            _apply(document, operation)


def _apply(document: Any, operation: dict[str, Any]) -> None:
    """One `add` or `replace` of a JSON patch; what is replaced must exist, and what is added to."""
    *parents, leaf = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"][1:].split("/")]
    node = document
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    if operation["op"] == "add" and isinstance(node, list):
        assert leaf == "-"
        node.append(operation["value"])
    elif isinstance(node, list):
        node[int(leaf)] = operation["value"]
    else:
        assert operation["op"] == "add" or (operation["op"] == "replace" and leaf in node), operation
        node[leaf] = operation["value"]


def _set_image(node: Any, image: dict[str, str]) -> None:
    if isinstance(node, dict):
        name, _, tag = str(node.get("image", "")).rpartition(":")
        if name == image["name"]:
            node["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
        for value in node.values():
            _set_image(value, image)
    elif isinstance(node, list):
        for value in node:
            _set_image(value, image)
