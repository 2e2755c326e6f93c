"""tools/release.py says what is missing and what it would do, and does nothing without --do."""

import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from tools import release

import shira

ROOT = Path(__file__).parents[1]
READ = ("src/shira/version.py", "CITATION.cff", "CHANGELOG.md", "pyproject.toml", "Makefile")
VERSION = shira.__version__


def git(folder, *arguments):
    who = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    """What the checks read, of a version that is ready, committed."""
    for name in READ:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    changes = tmp_path / "CHANGELOG.md"
    changes.write_text(changes.read_text().replace("## [Unreleased]\n", f"## [Unreleased]\n\n## [{VERSION}] - 2026-01-01\n"))
    project = tmp_path / "pyproject.toml"
    project.write_text(project.read_text().replace("\nPaper = ", '\nRepository = "https://h/o/r"\nPaper = '))
    git(tmp_path, "init")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-m", "ready")
    return tmp_path


def state(folder):
    names = {path.relative_to(folder) for path in folder.rglob("*") if ".git/" not in f"{path.relative_to(folder)}/"}
    return names, release.git(folder, "for-each-ref"), release.git(folder, "status", "--porcelain")


def test_without_do_it_says_what_it_would_do_and_does_nothing(checkout, capsys):
    before = state(checkout)
    release.main([VERSION], checkout)
    out = capsys.readouterr().out
    assert state(checkout) == before and "MISSING" not in out
    commands = [line.partition("   #")[0][3:] for line in out.partition("would run")[2].splitlines()[1:]]
    assert commands[0] == "make check" and f"git tag -a v{VERSION} -m 'shira {VERSION}'" in commands
    assert commands[-1].startswith("twine upload dist/") and "seen by others" in out.splitlines()[-1]
    targets = set(re.findall(r"^([a-z-]+):", (checkout / "Makefile").read_text(), re.MULTILINE))
    assert {command.split()[1] for command in commands if command.startswith("make ")} <= targets


def test_what_is_missing_is_named_and_stops_do_before_the_first_step(checkout, capsys):
    git(checkout, "tag", "v9.0.0")
    (checkout / "CITATION.cff").write_text("version: 0.0.9\n")
    before = state(checkout)
    for arguments in (["9.0.0"], ["9.0.0", "--do"], ["8.0", "--do"]):
        with pytest.raises(SystemExit) as stop:
            release.main(arguments, checkout)
        assert stop.value.code not in (0, None)
    out = capsys.readouterr().out
    for words in (
        "the tree is clean: commit or remove 1 files, such as CITATION.cff",
        f"src/shira/version.py has the version: found {VERSION}, expected 9.0.0",
        "CITATION.cff has the version: found 0.0.9, expected 9.0.0",
        "CHANGELOG.md has its section: add '## [9.0.0] - YYYY-MM-DD'",
        "the tag is new: v9.0.0 exists",
        "the version is three numbers: found '8.0'",
        "no tag is newer: found v9.0.0",
    ):
        assert f"MISSING {words}" in out
    assert state(checkout) == before


def test_what_others_see_needs_a_person(checkout, monkeypatch):
    step = release.Step("a file", ["touch", "made"], outside=True)
    with open("/dev/null") as nobody:
        monkeypatch.setattr("sys.stdin", nobody)
        with pytest.raises(SystemExit, match="needs a person at a terminal"):
            release.run(checkout, step, VERSION)
    assert not (checkout / "made").exists()
    release.run(checkout, step._replace(outside=False), VERSION)
    assert (checkout / "made").exists()
    with pytest.raises(SystemExit, match="stopped: false failed"):
        release.run(checkout, release.Step("fails", ["false"]), VERSION)
    assert [step.command[:2] for step in release.steps(VERSION) if step.outside] == [
        ["git", "push"],
        ["twine", "upload"],
    ]


def test_files_with_what_does_not_belong_there_are_refused(tmp_path):
    (tmp_path / "dist").mkdir()
    with pytest.raises(SystemExit, match="expected a wheel"):
        release.contents(tmp_path, "1.0.0")
    (tmp_path / "dist/shira_adapters-1.0.0.tar.gz").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "dist/shira_adapters-1.0.0-cp311-abi3-linux_x86_64.whl", "w") as wheel:
        wheel.writestr("tests/test_x.py", "")
    with pytest.raises(SystemExit, match="holds what it must not: tests/test_x.py"):
        release.contents(tmp_path, "1.0.0")


def test_the_citation_has_this_version_and_the_paper():
    yaml = pytest.importorskip("yaml")
    known = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert known["version"] == VERSION and known["authors"] == [{"name": "The shira authors"}]
    assert known["license"] == "Apache-2.0" and "arXiv:2406.13175" in str(known["preferred-citation"])
