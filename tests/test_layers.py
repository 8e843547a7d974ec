"""The floors of the house: who may import whom, read from the sources without running them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import ucray

ROOT = Path(ucray.__file__).parent

FLOORS = {
    "ucray.errors": (1, 0),
    "ucray.loading": (1, 0),
    "ucray.notebook": (1, 0),
    "ucray.quality": (1, 0),
    # Floor 2 has steps: the codec stands on its settings, the settings on whole-number geometry.
    "ucray.grid": (2, 0),
    "ucray.config": (2, 1),
    "ucray.settings": (2, 1),
    "ucray.synthetic": (2, 1),
    "ucray.resample": (2, 1),
    "ucray.selection": (2, 1),
    "ucray.codec": (2, 2),
    "ucray.zarr_codec": (3, 0),
    "ucray.zarr_level": (3, 0),
    "ucray.training": (3, 0),
    "ucray.bench": (3, 0),
    "ucray.storage": (4, 0),
    "ucray.reader": (4, 1),
    "ucray.report": (5, 0),
    "ucray.cluster": (5, 0),
    "ucray.serve": (5, 0),
    "ucray.arguments": (6, 0),
    "ucray.log": (6, 0),
    "ucray.console": (6, 1),
    "ucray.commands": (6, 2),
    "ucray.cli": (6, 3),
}
"""Floor, and step within it; a module imports only from below and from its own package."""

RAY_USERS = ("ucray.cluster", "ucray.serve")

CODEC_LIBRARIES = {
    "torch",
    "numpy",
    "pywt",
    "safetensors",
    "constriction",
    "numba",
    "zstandard",
    "google_crc32c",
    "msgspec",
    "pydantic",
    "threadpoolctl",
}
"""All that a bare GPU machine needs for the codec and its training."""

PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


@dataclass(frozen=True)
class Import:
    """One imported name, absolute; `deferred` where importing the module does not import it."""

    name: str
    deferred: bool


@dataclass(frozen=True)
class Module:
    """A module of the package: its name, whether it is a package's `__init__`, and its syntax tree."""

    name: str
    is_package: bool
    tree: ast.Module


def imports_of(module: Module) -> Iterator[Import]:
    """Everything a module imports, inside functions and under TYPE_CHECKING too."""
    yield from _imports(module, module.tree, deferred=False)


def _imports(module: Module, node: ast.AST, *, deferred: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, deferred)
        elif isinstance(child, ast.ImportFrom):
            for alias in child.names:
                yield Import(f"{_origin(module, child)}.{alias.name}", deferred)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from _imports(module, ast.Module(child.body, []), deferred=True)
            yield from _imports(module, ast.Module(child.orelse, []), deferred=deferred)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(module, child, deferred=deferred or inside)


def _origin(module: Module, statement: ast.ImportFrom) -> str:
    """The absolute name of what stands after `from`."""
    if not statement.level:
        return statement.module or ""
    parts = module.name.split(".")
    base = parts[: len(parts) - statement.level + (1 if module.is_package else 0)]
    return ".".join([*base, *([statement.module] if statement.module else [])])


def read_modules() -> dict[str, Module]:
    """All modules of the package by name."""
    modules = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ["ucray", *path.relative_to(ROOT).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules[name] = Module(name, is_package, ast.parse(path.read_text(encoding="utf-8")))
    return modules


MODULES = read_modules()


def unit_of(name: str) -> str:
    """The package or single module directly under `ucray` that `name` belongs to."""
    return ".".join(name.split(".")[:2])


def module_of(imported: str) -> str | None:
    """The module of `ucray` that an imported name is or stands in; None outside of `ucray`."""
    parts = imported.split(".")
    candidates = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((name for name in candidates if name in MODULES), None)


def reached_on_import(name: str) -> set[str]:
    """Top-level names of the libraries that importing a module of `ucray` imports."""
    seen: set[str] = set()
    libraries: set[str] = set()
    waiting = [name]
    while waiting:
        module = waiting.pop()
        # Importing a.b.c runs a and a.b first.
        parents = [module.rsplit(".", depth)[0] for depth in range(module.count(".") + 1)]
        for each in {module, *parents} - seen:
            seen.add(each)
            for found in imports_of(MODULES[each]):
                inner = module_of(found.name)
                if inner is not None and not found.deferred:
                    waiting.append(inner)
                elif not found.deferred:
                    libraries.add(found.name.split(".")[0])
    return libraries


def test_all_modules_are_read() -> None:
    assert {"ucray", "ucray.errors", "ucray.codec.chunk", "ucray.training.loss", "ucray.zarr_codec"} <= set(
        MODULES
    )


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"ucray"}))
def test_a_module_imports_only_from_lower_floors(name: str) -> None:
    unit = unit_of(name)
    assert unit in FLOORS, f"{unit} has no floor yet: see the architecture"
    for found in imports_of(MODULES[name]):
        other = module_of(found.name)
        # The package itself holds a version and documented names, no layer.
        if other in (None, "ucray") or unit_of(str(other)) == unit:
            continue
        assert FLOORS[unit_of(str(other))] < FLOORS[unit], f"{name} imports {found.name}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_the_cluster_and_what_stands_on_it_import_ray(name: str) -> None:
    used = {found.name.split(".")[0] for found in imports_of(MODULES[name])}
    assert unit_of(name) in RAY_USERS or "ray" not in used


@pytest.mark.parametrize(
    "name",
    ["ucray.codec.bitstream", "ucray.codec.entropy", "ucray.cluster.ingest", "ucray.cluster.lessons"],
)
def test_parsing_a_stream_and_reading_a_source_reach_no_torch(name: str) -> None:
    assert "torch" not in {found.name.split(".")[0] for found in imports_of(MODULES[name])}
    assert "torch" not in reached_on_import(name)


@pytest.mark.parametrize(
    "name", sorted(n for n in MODULES if unit_of(n) in ("ucray.codec", "ucray.training"))
)
def test_codec_and_training_need_few_libraries(name: str) -> None:
    used = {found.name.split(".")[0] for found in imports_of(MODULES[name])} | reached_on_import(name)
    assert used - sys.stdlib_module_names - {"ucray"} <= CODEC_LIBRARIES


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_that_is_read_can_be_executed(name: str) -> None:
    module = MODULES[name]
    names = {found.name for found in imports_of(module)}
    assert PICKLES.isdisjoint(found.split(".")[0] for found in names)
    assert "torch.load" not in names
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("torch.load", "torch.serialization.load")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("eval", "exec", "compile", "__import__")


def test_imports_are_read_wherever_they_stand() -> None:
    """The checks above are worth what this reader sees."""
    source = """
import torch.nn as nn
from ucray.codec import chunk
from ..grid import Box
from . import telemetry
if TYPE_CHECKING:
    import ray
else:
    import pickle
class Plan:
    import numpy
    def run(self):
        from ray import data
try:
    import dill
except ImportError:
    pass
"""
    module = Module("ucray.cluster.plan", False, ast.parse(source))
    assert set(imports_of(module)) == {
        Import("torch.nn", False),
        Import("ucray.codec.chunk", False),
        Import("ucray.grid.Box", False),
        Import("ucray.cluster.telemetry", False),
        Import("ray", True),
        Import("pickle", False),
        Import("numpy", False),
        Import("ray.data", True),
        Import("dill", False),
    }
    package = Module("ucray.cluster", True, ast.parse("from .plan import Plan\nfrom ..grid import Box"))
    assert set(imports_of(package)) == {
        Import("ucray.cluster.plan.Plan", False),
        Import("ucray.grid.Box", False),
    }
