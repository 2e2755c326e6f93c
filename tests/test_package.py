"""What the package promises about itself: its names, its layers, and what importing it costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import shira

SOURCE = Path(shira.__file__).parent

# Imports, as modules are loaded, only go up this list: a layer may import those above it. docs/architecture.md shows it.
LAYERS = [
    {"texts"},
    {"errors"},
    {"undoing", "files", "adapter", "optimizers"},
    {"distributed", "tensorfiles"},
    {"kernels"},
    {"quantized"},
    {"model_tensors"},
    {"owners", "statistics"},
    {"masks", "targets"},
    {"calibration"},
    {"encoding", "checkpoints", "linalg", "foreign"},
    {"format", "differences", "renaming"},
    {"sources", "strengths", "methods"},
    {"fusion", "selection", "following", "factors"},
    {"masters"},
    {"refresh", "layers", "resuming", "entries", "decomposed", "hybrid", "deltas", "consolidation"},
    {"variants", "sides", "untrained", "trainable"},
    {"steps", "ready", "putting_back", "model_now"},
    {"tuner"},
    {"tuning", "switching", "extraction", "merging", "analysis"},
    {"report"},
    {"data"},
    {"integrations"},
    {"evaluation", "recipes", "estimate"},
    {"cli"},
]


def layer_of(part):
    return next(number for number, layer in enumerate(LAYERS) if part in layer)


def imports_of(path):
    """(part of shira, line) for every import at the top level of a module."""
    package = path.relative_to(SOURCE).parts[:-1]
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(package[: len(package) - (node.level - 1)])
            names = [base + node.module.split(".")] if node.module else [base + [alias.name] for alias in node.names]
            yield from ((parts[0], node.lineno) for parts in names)


def test_imports_only_go_up_the_layers():
    checked = 0
    for path in SOURCE.rglob("*.py"):
        part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for imported, line in imports_of(path):
            if imported != part:
                assert layer_of(imported) < layer_of(part), f"{path.name}:{line}: {part} imports {imported}"
                checked += 1
    assert checked > 30


def test_the_exported_names():
    assert [name for name in shira.__all__ if not name.endswith("Error")] == [
        "Adapter",
        "BaseMismatch",
        "MissingExtra",
        "SparseTensor",
        "Switcher",
        "Tuner",
        "attach",
        "compare",
        "extract",
        "fuse",
        "load",
        "masks",
        "merge",
    ]
    assert all(hasattr(shira, name) for name in shira.__all__)


def test_every_error_is_a_shira_error_and_in_the_tree():
    tree = shira.errors.__doc__
    for name in shira.errors.__all__:
        error = getattr(shira.errors, name)
        if isinstance(error, type):
            assert issubclass(error, shira.ShiraError)
            assert f"{name} " in tree or f"{name}\n" in tree


@pytest.mark.parametrize("module", ["shira", "shira.cli"])
def test_importing_is_lean(module):
    code = (
        f"import torch, sys; before = set(sys.modules); import {module}; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"transformers", "accelerate", "triton", "datasets", "pandas", "matplotlib", "yaml", "gguf", "diffusers", "peft"}
    assert not heavy & set(loaded)
    if module == "shira":
        assert not {"typer", "rich"} & set(loaded)


def test_files_stay_short():
    long = {path.name: n for path in SOURCE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 400}
    assert not long
