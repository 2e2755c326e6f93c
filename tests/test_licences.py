"""docs/licences.md lists what the code fetches and what is shipped, with the licence that the code and the metadata state."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from tools import licences

from shira.data.commonsense import BENCHMARKS
from shira.data.packages import Package
from shira.data.tasks import TASKS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/licences.md").read_text(encoding="utf-8")
SOURCES = [path for folder in ("src", "experiments", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
FETCHING = {"src/shira/data/packages.py", "experiments/image/labelled.py"}  # the files that run pip, npm or apt-get


def rows(heading):
    """The cells of the first table below a heading, without its head."""
    section = re.split(r"^#", PAGE.split(f"{heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def packages():
    """(name, version, licence, index) of every call of Package in the code."""
    names = ("name", "version", "sha256", "members", "license", "index")
    for tree in TREES.values():
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == Package.__name__:
                given = dict(zip(names, call.args, strict=False)) | {word.arg: word.value for word in call.keywords}
                index = ast.literal_eval(given["index"]) if "index" in given else "pypi"
                yield *(ast.literal_eval(given[name]) for name in ("name", "version", "license")), index


def test_every_fetched_package_is_listed_with_its_licence():
    from experiments.image import labelled

    found = {(f"`{name}` {version}", {"pypi": "PyPI"}.get(index, index), said) for name, version, said, index in packages()}
    assert len(found) >= 10
    name, version = re.fullmatch(r"([\w-]+)=1:(.+)", labelled.CLIP_ART).groups()
    found |= {(f"`{name}` {version}", "Debian", "public domain (openclipart.org, as Debian packages it)")}
    listed = {tuple(row[:3]) for row in rows("## Fetched") if "scikit-learn" not in row[0]}
    assert listed == found
    assert "CC BY 4.0 (the digits: UCI)" in PAGE and "load_digits" in (ROOT / "experiments/image/labelled.py").read_text()


def test_nothing_is_fetched_in_another_way():
    """Text of the code that names a program or a call which fetches."""
    words = {"apt-get", "npm", "curl", "wget", "git"}
    calls = {"urlretrieve", "snapshot_download", "hf_hub_download"}
    found = set()
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.List) and any(isinstance(e, ast.Constant) and e.value in words for e in node.elts):
                found.add(path.relative_to(ROOT).as_posix())
            name = getattr(node, "attr", None) or getattr(node, "id", None)
            if isinstance(node, ast.Attribute | ast.Name) and name in calls:
                found.add(path.relative_to(ROOT).as_posix())
    assert found - {"src/shira/integrations/hub.py", "src/shira/files/hub.py"} == FETCHING  # the hub: what the user names


def test_every_benchmark_and_task_is_listed_as_its_source_says():
    listed = {name: said for names, said in rows("### Data in these packages") for name in re.findall(r"`([^`]+)`", names)}
    wanted = {each.name: each.source for each in (*BENCHMARKS, *TASKS.values()) if each.name != "commonsense"}
    assert listed == {name: wanted[name] for name in wanted}


def test_every_picture_is_listed():
    tracked = subprocess.run(["git", "ls-files", "*.png", "*.jpg", "*.svg", "*.gif"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not in a git checkout")
    listed = {f"docs/{name}" for row in rows("## Shipped") for name in re.findall(r"`([^`]+\.png)`", row[0])}
    assert listed == set(tracked.stdout.split())


def test_dependencies_are_listed_as_their_metadata_says():
    """Those of this environment that have the listed version: `python tools/licences.py --write` makes the table."""
    listed = {row[0]: row[1:] for row in rows("## Dependencies")}
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    made = {name: [version, said, by] for name, version, said, by in licences.rows(licences.installed())}
    same = [name for name, (version, *_) in made.items() if name in listed and listed[name][0] == version]
    assert len(same) > 40
    assert {name: listed[name][1] for name in same} == {name: made[name][1] for name in same}
    assert not [name for name in made.keys() - listed.keys() if made[name][0] == pinned.get(name)]


def test_a_licence_is_read_from_the_expression_the_text_or_the_classifiers():
    class Metadata(dict):
        def get_all(self, name):
            return self.get(name)

    class Distribution:
        def __init__(self, **known):
            self.metadata = Metadata({name.replace("_", "-"): value for name, value in known.items()})

    classifiers = ["License :: OSI Approved :: MIT License", "Programming Language :: Python"]
    assert licences.licence_of(Distribution(License_Expression="MIT", License="other")) == "MIT"
    assert licences.licence_of(Distribution(License="a whole\nlicence", Classifier=classifiers)) == "MIT License"
    assert licences.licence_of(Distribution(License="UNKNOWN", License_File=["LICENSE"])).endswith("see its file LICENSE")
