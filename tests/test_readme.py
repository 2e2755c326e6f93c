"""Every command and snippet of README.md, run as it stands, on the real model."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]
INLINE = re.findall(r"`((?:make|\.venv/bin/shira) [^`]+)`", README)


def test_nothing_in_the_readme_escapes_this_file():
    assert len(blocks("python")) == 1
    assert all(line.split()[0] in ("make", ".venv/bin/shira") for line in COMMANDS + INLINE)
    assert "make test" in INLINE


@pytest.mark.parametrize("line", [line for line in COMMANDS + INLINE if line.startswith("make ")])
def test_make_targets_exist(line):
    """What they do is run by CI (`make test test-slow`) and by test_real.py (`make demo`)."""
    shown = subprocess.run([*line.split(), "-n"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"make demo": ".venv/bin/shira demo", "make test": "pytest", "make test-slow": "pytest -m slow"}[line] in shown


@pytest.mark.real
def test_the_commands_run_in_their_order(tmp_path):
    for line in [line for line in COMMANDS + INLINE if not line.startswith("make ")]:
        _, *arguments = shlex.split(line)
        done = subprocess.run([sys.executable, "-m", "shira.cli", *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert done.stdout.strip()


@pytest.mark.real
def test_the_snippet_runs(tmp_path):
    (snippet,) = blocks("python")
    done = subprocess.run([sys.executable, "-W", "error", "-c", snippet], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["spam.safetensors"]


def test_links_in_the_docs_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
