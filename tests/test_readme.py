"""Every command and snippet of README.md, run as it stands, on the first three of the 30 layers of the real model."""

import importlib.util
import re
import runpy
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"].keys()
PAGES_OF_THE_SITE = runpy.run_path(str(ROOT / "docs/site/pages.py"))


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]
INLINE = re.findall(r"`((?:make |pip |shira \w+ -)[^`]+)`", README)


def test_nothing_in_the_readme_escapes_this_file():
    assert len(blocks("python")) == 1
    assert all(line.split()[0] in ("make", "pip", "shira") for line in COMMANDS + INLINE)
    assert "make test" in INLINE


@pytest.mark.parametrize("line", [line for line in COMMANDS + INLINE if line.startswith("pip ")])
def test_pip_gets_this_checkout_with_extras_that_exist(line):
    """Not run: they would install into whatever environment runs the tests."""
    _, verb, *arguments = shlex.split(line)
    assert verb in ("install", "wheel")
    checkout, *options = sorted(arguments, key=lambda argument: argument.startswith("-"))
    path, extras = re.fullmatch(r"([^\[]+)(?:\[([\w,]+)\])?", checkout).groups()
    assert path in (".", "dist/shira_adapters-*.whl") and set(extras.split(",") if extras else ()) <= EXTRAS
    assert set(options) <= {"--no-deps"}


def test_the_readme_explains_every_extra_and_no_page_names_another():
    (extras_list,) = re.findall(r"```bash\npip .*?```\n\n(.*?)\n\n", README, re.DOTALL)
    assert set(re.findall(r"`(\w+)`:", extras_list)) == EXTRAS
    for page in PAGES:
        for extras in re.findall(r"(?:shira-adapters|\.)\[([\w,]+)\]", page.read_text(encoding="utf-8")):
            assert set(extras.split(",")) <= EXTRAS, f"{page.name}: {extras}"


@pytest.mark.parametrize("line", [line for line in COMMANDS + INLINE if line.startswith("make ")])
def test_make_targets_exist(line):
    """What they do is run by CI (`make check`) and by test_real.py (`make demo`).

    test_styles.py runs the demo with pictures, on a smaller model.
    """
    shown = subprocess.run([*line.split(), "-n"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    runs = {"make demo": ".venv/bin/shira demo", "make demo-image": "experiments.image.demo", "make site": "mkdocs build"}
    assert (
        runs | {"make test": "pytest", "make test-slow": "-m slow", "make dist": "tests/dist.py", "make check": "tests/dist.py"}
    )[line] in shown


@pytest.mark.real
@pytest.mark.slow
def test_the_commands_run_in_their_order(run, tmp_path, short_built_in, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in [line for line in COMMANDS + INLINE if line.startswith("shira ")]:
        code, out, err = run(line.removeprefix("shira "))
        assert code == 0, f"{line}\n{err}"
        assert out.strip()


@pytest.mark.real
@pytest.mark.slow
def test_the_snippet_runs(tmp_path, short_built_in, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (snippet,) = blocks("python")
    exec(compile(snippet, "README.md", "exec"), {})
    assert [path.name for path in tmp_path.iterdir()] == ["snip.safetensors"]


def test_links_work_on_the_page_of_an_index_too():
    """`make dist` checks what stands in the wheel."""
    spec = importlib.util.spec_from_file_location("setup_of_shira", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    text = "[a](docs/a.md#b) ![p](docs/p.png) [c](https://x.org) [d](#d)\n```\n[e](f)\n```\n[g](LICENSE)"
    plain = "a  [c](https://x.org) [d](#d)\n```\n[e](f)\n```\ng"
    assert setup.for_an_index(text, None, "1.0") == plain
    there = "[a](https://h/o/r/blob/v1.0/docs/a.md#b) ![p](https://h/o/r/raw/v1.0/docs/p.png) [c](https://x.org) [d](#d)"
    linked = setup.for_an_index(text, "https://h/o/r", "1.0")
    assert linked == f"{there}\n```\n[e](f)\n```\n[g](https://h/o/r/blob/v1.0/LICENSE)"
    assert "](docs/" in README and "](docs/" not in setup.for_an_index(README, None, "1.0")


def anchors(page):
    """The anchors that GitHub gives a page's headings, and the site."""
    slugs, found = [], []
    for heading in re.findall(r"^#{1,6} +(.*?)(?: +#+)?$", without_blocks(page), re.MULTILINE):
        slug = PAGES_OF_THE_SITE["anchor"](heading)
        found.append(f"{slug}-{slugs.count(slug)}" if slug in slugs else slug)
        slugs.append(slug)
    return found


def without_blocks(page):
    """The text of a page without its fenced code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_links_in_the_docs_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", without_blocks(page))):
            path, _, anchor = link.partition("#")
            if link.startswith("http"):
                continue
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}, found {anchors(target)}"


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Fusion: `shira bench fusion`\n## A [link](x.md), 4096²\n```\n# no heading\n```\n" + "## Same\n" * 3)
    assert anchors(page) == ["fusion-shira-bench-fusion", "a-link-4096", "same", "same-1", "same-2"]
