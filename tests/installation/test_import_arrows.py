"""Imports point one way: the layers of docs/layout.md, parsed from the source."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import ueo_fast

PACKAGE = Path(ueo_fast.__file__).parent

# From the top down; a module may import from its own layer's package and from layers below.
LAYERS = [
    {"cli"},
    {"info", "finetune"},
    {"patch"},
    {"modules", "gradient_cache"},
    {"functional", "normalization"},
    {"arguments", "ops"},
    {"backends"},
    {"_extension", "triton", "reference", "ranges"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
CORE = [
    path
    for path in PACKAGE.rglob("*.py")
    if not {"finetune", "cli"} & set(path.relative_to(PACKAGE).parts)
]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> list[str]:
    """Absolute names of everything that a file imports, wherever in the file."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrow"
            assert node.module is not None
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def layer_of(name: str) -> str | None:
    """The first part of a name below ueo_fast that is a module or package of ours."""
    parts = name.split(".")
    if parts[0] != "ueo_fast" or len(parts) == 1:
        return None
    path = PACKAGE / parts[1]
    return parts[1] if path.is_dir() or path.with_suffix(".py").exists() else "public API"


def all_files():
    return sorted(PACKAGE.rglob("*.py"))


def test_every_module_has_a_layer():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in all_files()}
    assert rooms - {"__init__"} <= set(RANK)


@pytest.mark.parametrize("path", all_files(), ids=module_name)
def test_arrows_point_down(path):
    own = layer_of(module_name(path))
    if own is None:  # ueo_fast/__init__.py gathers the public API
        return
    for name in imported(path):
        target = layer_of(name)
        if target is None or target == own:
            continue
        # `from ueo_fast import ueo_loss` reaches functional and modules.
        rank = RANK["modules"] if target == "public API" else RANK[target]
        assert rank > RANK[own], f"{module_name(path)} ({own}) must not import {name} ({target})"


def test_no_cycle():
    files = {module_name(path): path for path in all_files()}
    edges = {}
    for name, path in files.items():
        # `from ueo_fast.patch import sites` is an arrow to the module, not to what gathers all.
        wanted = {one if one in files else one.rpartition(".")[0] for one in imported(path)}
        edges[name] = (wanted & set(files)) - {name, "ueo_fast"}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for target in edges[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in files:
        visit(name, ())


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_the_core_imports_only_torch_and_numpy(path):
    allowed = {"torch", "numpy", "ueo_fast", *sys.stdlib_module_names}
    if path.parent == PACKAGE / "triton":  # imported when one of its ops runs, not before
        allowed.add("triton")
    found = {name.split(".")[0] for name in imported(path)} - allowed
    assert not found, f"{module_name(path)} imports {found}"
