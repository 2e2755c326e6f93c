"""What SECURITY.md says of the whole package: no unpickling, no code of a model or from a text, no other program but these."""

import ast
import re
from pathlib import Path

import pytest

import shira

ROOT = Path(__file__).parents[1]
SOURCE = Path(shira.__file__).parent
TREES = {
    path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))
}
FORBIDDEN = {"pickle.load", "pickle.loads", "torch.load", "eval", "exec", "os.system", "os.popen", "marshal.loads", "dill.load"}
FORBIDDEN |= {"yaml.full_load", "yaml.unsafe_load", "joblib.load", "numpy.load", "np.load", "shelve.open"}
PROGRAMS = {"data/packages.py", "integrations/ray.py", "serving/vllm/server.py"}  # pip and npm; `shira serve`; vLLM


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def forbidden(tree):
    """What a file does that the package promises not to do."""
    for name, call in calls(tree):
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name in FORBIDDEN or given.get("shell") == "True" or given.get("trust_remote_code", "False") != "False":
            yield ast.unparse(call)
        if name == "yaml.load" and "Loader" not in ast.unparse(call):
            yield ast.unparse(call)


def test_the_package_runs_no_code_from_files():
    assert len(TREES) > 100
    assert {path: found for path, tree in TREES.items() if (found := list(forbidden(tree)))} == {}


@pytest.mark.parametrize(
    "code",
    ["torch.load('x')", "pickle.load(f)", "eval('1')", "A.from_pretrained('x', trust_remote_code=True)", "yaml.load(text)"],
)
def test_such_a_call_would_be_found(code):
    assert list(forbidden(ast.parse(code)))


def test_few_files_run_programs():
    starts = ("subprocess.", "asyncio.create_subprocess", "os.exec", "os.spawn")
    assert {path for path, tree in TREES.items() if any(name.startswith(starts) for name, _ in calls(tree))} == PROGRAMS


def test_the_tests_that_the_page_names_exist():
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = {name.removeprefix("tests/") for name in re.findall(r"`(\S+\.py)`", page)}
    assert len(named) >= 5 and all((ROOT / "tests" / name).is_file() for name in named)
