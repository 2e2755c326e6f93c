"""What the package promises about itself: its names, its layers, and what importing it costs."""

import ast
import graphlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

import shira
from shira import kernels

SOURCE = Path(shira.__file__).parent
ARCHITECTURE = Path(__file__).parents[1] / "docs/architecture.md"

# Every import in a file, also inside a function, goes from a place to one that stands above it. The diagram in
# docs/architecture.md shows the same list.
LAYERS = [
    {"texts", "version"},
    {"errors"},
    {"sparse"},
    {"files"},
    {"adapter", "kernels"},
    {"weights"},
    {"masks", "fusion"},
    {"training", "switching"},
    {"checkpoints"},
    {"analysis"},
    {"data"},
    {"integrations"},
    {"runs"},
    {"serving"},
    {"play"},
    {"cli"},
]
EXCEPTIONS: set[tuple[str, str]] = set()  # (module, imported module) that may go the other way; each with its reason
MOST_PLACES = 20


def module_of(path):
    """Its name below shira, "" for shira itself."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in SOURCE.rglob("*.py")}


def imported_names(module):
    """(imported module, name or "", line) of every import of ours in a file, wherever it stands."""
    path = FILES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.partition(".")[0] == "shira" for alias in node.names), f"{path}: import it relatively"
        if not isinstance(node, ast.ImportFrom):
            continue
        assert node.level or (node.module or "").partition(".")[0] != "shira", f"{path}: import it relatively"
        if node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                yield (inner, "", node.lineno) if inner in FILES else (".".join(base), alias.name, node.lineno)


def imports_of(module):
    return ((imported, line) for imported, _, line in imported_names(module))


def exported(module):
    """The names in a file's `__all__`, None without one, or if it is computed."""
    for node in ast.parse(FILES[module].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" and isinstance(node.value, ast.List):
            return {ast.literal_eval(name) for name in node.value.elts}
    return None


def place_of(module):
    return module.partition(".")[0]


def layer_of(place):
    return next(number for number, layer in enumerate(LAYERS) if place in layer)


def test_imports_only_go_up_the_layers():
    checked = 0
    for module in FILES.keys() - {""}:
        for imported, line in imports_of(module):
            assert imported in FILES and imported, f"{module}:{line} imports {imported or 'shira itself'!r}"
            here, there = place_of(module), place_of(imported)
            if here != there and (module, imported) not in EXCEPTIONS:
                assert layer_of(there) < layer_of(here), f"{module}:{line} imports {imported}"
                checked += 1
    assert checked > 300


def test_what_files_import_from_each_other_is_exported():
    public = {module: exported(module) for module in FILES}
    hidden = [
        f"{module}:{line} imports {name} from {imported}"
        for module in FILES
        for imported, name, line in imported_names(module)
        if name and public.get(imported) is not None and name not in public[imported]
    ]
    assert not hidden, "\n".join(hidden)
    assert sum(names is not None for names in public.values()) > 200


def test_no_circle_between_files():
    edges = {module: {imported for imported, _ in imports_of(module)} - {module} for module in FILES}
    list(graphlib.TopologicalSorter(edges).static_order())  # raises CycleError with the circle


def test_the_house_is_the_diagram():
    places = {place_of(module) for module in FILES} - {""}
    assert places == set().union(*LAYERS)
    assert len(places) <= MOST_PLACES
    block = re.search(r"```\n(.*?)```", ARCHITECTURE.read_text(encoding="utf-8"), re.DOTALL)[1]
    drawn = [set(re.findall(r"\w+", line.partition("  ")[0])) for line in block.splitlines() if not line.startswith(" ")]
    assert drawn == LAYERS


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
    assert dir(shira) == sorted([*shira.__all__, "__version__"])
    with pytest.raises(AttributeError, match="module 'shira' has no attribute 'atach'"):
        shira.atach  # noqa: B018
    tree = ast.walk(ast.parse(FILES[""].read_text(encoding="utf-8")))
    typed = {alias.name: node.module or alias.name for node in tree if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert shira.PLACES.items() <= typed.items()  # a type checker finds what is imported


def test_every_error_is_a_shira_error_and_in_the_tree():
    tree = shira.errors.__doc__
    for name in shira.errors.__all__:
        error = getattr(shira.errors, name)
        if isinstance(error, type):
            assert issubclass(error, shira.ShiraError)
            assert f"{name} " in tree or f"{name}\n" in tree


@pytest.mark.parametrize("names", ["shira", "shira.cli"])
def test_importing_is_lean(names):
    """Every public name is used, since a name is imported when it is used."""
    code = (
        f"import torch, sys; before = set(sys.modules); import {names}; [getattr(shira, name) for name in shira.__all__]; "
        "loaded = set(sys.modules) - before; "
        "print(*sorted({name.partition('.')[0] for name in loaded} | ({'torch._dynamo'} & loaded)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"transformers", "accelerate", "triton", "datasets", "pandas", "matplotlib", "yaml", "gguf", "diffusers", "peft"}
    heavy |= {"torch._dynamo", "sympy"}  # torch's compiler
    assert not heavy & set(loaded)
    if names == "shira":
        assert set(loaded) - sys.stdlib_module_names <= {"shira", "torch", "numpy", "safetensors"}


def test_deprecated_names_are_gone_in_their_release():
    """Each call of `deprecated` says when, and that release has not come: then the call and what it stands for must go."""

    def release(text):
        return tuple(int(number) for number in text.split("."))

    calls = [
        node
        for path in FILES.values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "deprecated"
    ]
    ends = [ast.literal_eval(word.value) for call in calls for word in call.keywords if word.arg == "gone_in"]
    assert calls and len(ends) == len(calls)
    assert all(release(end) > release(shira.__version__) for end in ends)
    text = ARCHITECTURE.parents[1].joinpath("CHANGELOG.md").read_text(encoding="utf-8")
    assert all(f"gone in {end}" in text for end in ends)


def test_the_lowest_releases_are_those_that_are_tested():
    """Each has a lower bound, which `make test-window` installs; without the extras that have targets of their own."""
    root = ARCHITECTURE.parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = (root / "constraints-lowest.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", lowest, re.MULTILINE))
    apart = {"quantized", "vllm", "ray", "deepspeed", "gpu", "notebooks", "play", "site", "dev"}
    texts = [text for extra, texts in project["optional-dependencies"].items() if extra not in apart for text in texts]
    requirements = [Requirement(text) for text in (*project["dependencies"], *texts)]
    tested = [each for each in requirements if each.name != "shira-adapters"]
    assert len(tested) > 20
    for each in tested:
        (bound,) = each.specifier
        assert bound.operator == ">=" and Version(bound.version) == Version(pinned[each.name]), f"{each}, {pinned[each.name]}"


def test_without_the_kernels_in_c_one_warning_says_so(monkeypatch):
    monkeypatch.setattr(kernels.native, "_native", None)
    monkeypatch.setattr(kernels.backends, "_warned", False)
    weight, indices = torch.arange(6.0), torch.tensor([1, 4])
    with kernels.backend("reference"):  # asked for by name
        kernels.gather(weight, indices)
    with pytest.warns(kernels.backends.NotCompiled, match="without its kernels in C.*install a C compiler") as given:
        for _ in range(2):
            assert kernels.gather(weight, indices).tolist() == [1.0, 4.0]
    assert len(given) == 1


def test_the_documented_calls_are_those_that_mypy_reads():
    """Those of README.md and docs/, and the public functions and methods of the classes, stand in documented_calls.py."""
    root = Path(__file__).parents[1]
    pages = [root / "README.md", *(root / "docs").rglob("*.md")]
    blocks = "".join(part for page in pages for part in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL))
    here = (root / "tests" / "documented_calls.py").read_text("utf-8")
    names = r"\b(shira|tuner|switcher|adapters)\.([A-Za-z_]+)\("
    documented = set(re.findall(names, blocks))
    documented |= {("shira", name) for name in shira.__all__ if inspect.isfunction(getattr(shira, name))}
    for variable, kind in {"tuner": shira.Tuner, "switcher": shira.Switcher}.items():
        documented |= {(variable, name) for name, method in vars(kind).items() if inspect.isfunction(method) and name[0] != "_"}
    inner = {("tuner", name) for name in ("begin", "masters", "undo")}  # for the package's own use
    assert len(documented) > 30
    assert documented - inner <= set(re.findall(names, here))


def test_files_stay_short():
    long = {path.name: n for path in SOURCE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 400}
    assert not long
