"""The layers: imports point down, and light modules import no heavy packages."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Top to bottom; a module may import its own package and those of lower layers.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("doccls.__main__",),
    (
        "doccls.demo.command", "doccls.report.command", "doccls.runs.command", "doccls.train", "doccls.predict",
        "doccls.preview", "doccls.blend", "doccls.store_command", "launcher",
    ),
    ("doccls.prediction",),
    ("doccls.training",),
    ("doccls.experiment",),
    ("doccls.model",),
    ("doccls.report",),
    ("doccls.data",),
    ("doccls.runs",),
    ("doccls.oof", "doccls.demo"),
    ("doccls.run",),
    ("doccls.reporting",),
    ("doccls.system",),
    ("doccls.config",),
    ("doccls.randomness", "doccls.errors"),
)  # fmt: skip
# Allowed imports within a layer.
SIDEWAYS = {("doccls.demo.command", "doccls.train"), ("doccls.demo.command", "doccls.predict")}


def list_modules() -> dict[str, Path]:
    modules = {}
    for path in sorted([*(ROOT / "doccls").rglob("*.py"), *(ROOT / "launcher").rglob("*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = list_modules()


def find_layer(module: str) -> tuple[int, str] | None:
    """Return (layer, package) of a module; None for other packages and for the bare package `doccls`."""
    for layer, packages in enumerate(LAYERS):
        for package in packages:
            if module == package or module.startswith(f"{package}."):
                return layer, package
    return None


def list_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return all imported modules, also those in functions; `from a import b` gives a.b if that is a module."""
    imports = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            imports += [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]
    return imports


def find_violations(module: str, source: str, is_package: bool = False) -> list[str]:
    own = find_layer(module)
    if own is None:
        return []
    violations = []
    for imported in list_imports(source, module, is_package):
        other = find_layer(imported)
        if other is None or other[1] == own[1] or other[0] > own[0] or (own[1], other[1]) in SIDEWAYS:
            continue
        violations.append(f"{module} imports {imported}")
    return violations


def test_each_module_has_a_layer() -> None:
    assert len(MODULES) > 30
    assert [name for name in MODULES if name != "doccls" and find_layer(name) is None] == []


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    path = MODULES[module]
    assert find_violations(module, path.read_text(encoding="utf-8"), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("doccls.run.paths", "from doccls.oof import merge"),
        ("doccls.config.load", "def f():\n    import doccls.run.paths"),
        ("doccls.data.folds", "from doccls import training"),
        ("doccls.oof.predictions", "from ..data import images"),
        ("doccls.train", "from doccls.demo import command"),
        ("doccls.demo.pages", "from doccls.demo import command"),
        ("doccls.demo.canvas", "import doccls.data.images"),
        ("doccls.errors", "from doccls.config import Config"),
        ("launcher.cli", "from doccls.train import main"),
        ("doccls.model.names", "from doccls.experiment import Experiment"),
        ("doccls.experiment", "from doccls.training.trainer import train_fold"),
    ],
)
def test_import_that_points_up_is_found(module: str, source: str) -> None:
    assert find_violations(module, source)


def test_doccls_package_imports_nothing() -> None:
    assert list_imports(MODULES["doccls"].read_text(encoding="utf-8"), "doccls", True) == []


def test_no_module_is_a_catch_all() -> None:
    catch_alls = {"utils", "util", "helpers", "helper", "common", "misc"}
    files = [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]
    assert [path for path in files if catch_alls & {*path.relative_to(ROOT).with_suffix("").parts}] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        "launcher.cli", "launcher.launch", "doccls.experiment", "doccls.oof.merge", "doccls.oof.summary",
        "doccls.config", "doccls.reporting.command", "doccls.reporting.log", "doccls.system.signals", "doccls.train",
        "doccls.__main__", "doccls.runs.command", "launcher.live_files", "launcher.recent",
    ],
)  # fmt: skip
def test_light_modules_do_not_import_heavy_packages(module: str) -> None:
    heavy = ("torch", "timm", "accelerate", "albumentations", "wandb", "jinja2", "matplotlib")
    assert list_imported(module, heavy) == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["launcher.cli", "launcher.live_files", "launcher.recent"])
def test_commands_that_only_show_do_not_import_scikit_learn(module: str) -> None:
    assert list_imported(module, ("sklearn",)) == "[]"


def list_imported(module: str, packages: tuple[str, ...]) -> str:
    """Return those of the packages that a process has imported after it has imported the module."""
    code = f"import sys, {module}; print([name for name in {packages} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment, cwd=ROOT, check=True
    )
    return done.stdout.strip()
