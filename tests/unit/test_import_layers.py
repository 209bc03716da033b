"""Imports point one way, and the processes without a GPU import without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dflash_ray"
PROCESSES = {"gateway", "router", "target_group", "drafter"}
LEVELS = {
    "core": 0, "pb": 0, "config": 1, "observability": 1, "kernels": 1, "rpc": 2, "sampling": 2, "models": 2, "text": 2,
    "gateway": 3, "router": 3, "target_group": 3, "drafter": 3, "training": 4, "ray_agent": 4, "ray_instance": 4,
    "placement": 4,     "app": 5, "simulator": 6, "commands": 7, "cli": 8,
}  # fmt: skip


def imported_parts(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dflash_ray."):
            names.add(node.module.split(".")[1])
    return names


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_only_what_lies_below_it(file):
    part = part_of(file)
    if part in ("__init__", "pb"):
        return
    for other in imported_parts(file) - {part}:
        assert LEVELS[other] <= LEVELS[part]
        assert not {part, other} <= PROCESSES, "processes meet in protos and the directory only"
        assert part != "training" or other not in {"gateway", "router"}, "what both need of text lies in text/"


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_serve(file: Path) -> bool:
    tree = ast.parse(file.read_text())
    typing_imports = {child for node in ast.walk(tree) if is_for_types_only(node) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in typing_imports:
            module = node.module or ""
            if module.startswith("ray.serve") or (module == "ray" and any(a.name == "serve" for a in node.names)):
                return True
    return False


def test_serve_is_imported_in_services_and_the_application_only():
    users = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if imports_serve(file)}
    assert users <= {"app.py", "rpc/serve_port.py", *(f"{process}/replica.py" for process in PROCESSES)}


@pytest.mark.parametrize(
    "module", ["dflash_ray.gateway.replica", "dflash_ray.router.replica", "dflash_ray.rpc.metrics", "dflash_ray.cli"]
)
def test_processes_without_a_gpu_import_without_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
