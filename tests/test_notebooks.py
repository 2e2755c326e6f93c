"""The notebooks of docs/notebooks: what is stored in them, and that their code runs.

What is stored is of the real model, by `make notebooks`. The tests run the code on the first three of its 30 layers.
"""

import ast
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import shira
from test_readme import EXTRAS, anchors

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs/notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

FORBIDDEN = re.compile(
    r"(?i)/(home|root|tmp|users|work|var)/|[a-z]:\\|site-packages|warning|traceback|it/s|\d%\||\r(?!\n)|\x1b\[|0x[0-9a-f]{6}"
)
RUNNER = """
import json, sys
cells = [cell for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
names = {"__name__": "__main__", "FOLDER": sys.argv[3]}
otherwise = json.loads(sys.argv[2])
for number, cell in enumerate(cells, start=1):
    code = "".join(cell["source"])
    for line in [line for line in otherwise if line in code]:
        code = code.replace(line, otherwise.pop(line))
    exec(compile(code, f"{sys.argv[1]}, code cell {number}", "exec"), names)
assert not otherwise, f"not in the notebook: {otherwise}"
"""
SHORT = {"(MODEL)": "(FOLDER)", "range(20, 30)": "range(1, 3)"}  # FOLDER: of `short_model`
OTHERWISE = {  # what each notebook's code has in the tests in place of what a reader sees
    "1": SHORT,
    "2": SHORT | {"in (20, 21)": "in (1, 2)", "layers.20.": "layers.1."},
    "3": {"PASSES = 200": "PASSES = 20", "STYLE_STEPS = 50": "STYLE_STEPS = 4"},
    "4": SHORT | {'"serve", MODEL': '"serve", FOLDER'},
}


def stored(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path):
    """(its code, its outputs) of each code cell."""
    cells = stored(path)["cells"]
    return [("".join(cell["source"]), cell["outputs"]) for cell in cells if cell["cell_type"] == "code"]


def shown(outputs):
    """The texts of outputs: what a reader sees, and without pictures."""
    for output in outputs:
        yield "".join(output.get("text", []))
        yield from ("".join(text) for kind, text in output.get("data", {}).items() if kind.startswith("text/"))


def shows_something(code):
    """Whether a cell ends with an expression, or prints."""
    last = ast.parse(code).body[-1]
    return "print(" in code.splitlines()[-1] or isinstance(last, ast.Expr)


def test_there_are_four_and_the_pages_name_them():
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3", "4"]
    overview = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert all(f"(notebooks/{path.name})" in overview for path in NOTEBOOKS)
    assert "(docs/notebooks/" in (ROOT / "README.md").read_text(encoding="utf-8")


@each
def test_stored_is_what_a_fresh_run_shows_and_nothing_of_the_machine(path):
    notebook = stored(path)
    assert path.stat().st_size < 300_000
    assert (notebook["nbformat"], notebook["metadata"]["language_info"]) == (4, {"name": "python"})
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1)), "not run from top to bottom: make notebooks"
    for code, outputs in code_cells(path):
        assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}, code
        assert all(output.get("name", "stdout") == "stdout" for output in outputs), code
        assert outputs or not shows_something(code), f"shows nothing: make notebooks\n{code}"
        for text in shown(outputs):
            assert not FORBIDDEN.search(text) and socket.gethostname() not in text, text


def defined(module):
    """The names that a module's file defines or imports, read without running it: some modules load libraries for seconds."""
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)


@each
def test_names_that_are_used_exist(path):
    tree = ast.parse("\n".join(code for code, _ in code_cells(path)))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = {node.module: {alias.name for alias in node.names} for node in imported}
    ours = {module: names for module, names in ours.items() if module.partition(".")[0] in ("shira", "experiments", "tests")}
    assert ours and not any(module.startswith("tests") for module in ours)
    for module, names in ours.items():
        assert names <= set(defined(module)) and not any(name.startswith("_") for name in names), module
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    assert {node.attr for node in used if node.value.id == "shira"} <= set(shira.__all__)


@each
def test_links_lead_somewhere(path):
    text = "\n".join("".join(cell["source"]) for cell in stored(path)["cells"] if cell["cell_type"] == "markdown")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = link.partition("#")
        if not link.startswith("http"):
            assert (FOLDER / place).exists(), link
            assert not anchor or anchor in anchors(FOLDER / place), link
    for extras in re.findall(r"'\.\[([\w,]+)\]'", text):
        assert set(extras.split(",")) <= EXTRAS


@pytest.mark.slow
@pytest.mark.real
@each
def test_the_code_runs_and_is_silent(path, tmp_path, short_model):
    """In a process of its own, in the notebook's folder, as Jupyter does."""
    environment = os.environ | {"MPLBACKEND": "Agg", "TMPDIR": str(tmp_path)}
    quiet = "ignore:FigureCanvasAgg is non-interactive"  # of plt.show() outside of a notebook
    done = subprocess.run(
        [sys.executable, "-W", quiet, "-c", RUNNER, path.name, json.dumps(OTHERWISE[path.name[0]]), str(short_model)],
        cwd=FOLDER,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr and done.stdout
