"""The site of the docs: what `make site` does to pages and docstrings. CI builds all of it, with warnings as errors."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

import shira

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs/site"
PAGES = runpy.run_path(str(SITE / "pages.py"))


@pytest.mark.parametrize(
    ("page", "link", "there"),
    [
        ("peft.md", "[a](masks/README.md#b)", "[a](masks/README.md#b)"),
        ("peft.md", "[a](../README.md#use)", "[a](overview.md#use)"),
        ("masks/README.md", "[a](../../CHANGELOG.md)", "[a](../changes.md)"),
        ("masks/README.md", "![p](../pictures/p.png)", "![p](../pictures/p.png)"),
        ("overview.md", "[a](docs/masks/README.md)", "[a](masks/README.md)"),
        ("overview.md", "[a](CONTRIBUTING.md) [b](LICENSE)", "[a](contributing.md) b"),
        ("fusion.md", "[methods.py](../src/shira/fusion/methods.py)", "methods.py"),
        ("fusion.md", "[a](https://x.org) [b](#c)\n```\n[d](../e)\n```", "[a](https://x.org) [b](#c)\n```\n[d](../e)\n```"),
    ],
)
def test_links_that_leave_the_docs(page, link, there):
    assert PAGES["with_site_links"](link, page, None, "1.0") == there


def test_with_a_repository_links_lead_into_it():
    made = PAGES["with_site_links"]("[m](../../src/m.py)", "masks/README.md", "https://h/o/r", "1.0")
    assert made == "[m](https://h/o/r/blob/v1.0/src/m.py)"


def test_lists_as_a_code_host_reads_them():
    text = "**Word.**\n- one,\n  on\n  - inner\n- two\n\n1. three\n\n  - four\n\nend\n"
    made = "**Word.**\n\n- one,\n    on\n    - inner\n- two\n\n1. three\n\n    - four\n\nend\n"
    assert PAGES["as_on_a_code_host"](text) == made
    text = "- five\n\n      code\n```text f.txt\na\n- b\n```\n"
    assert PAGES["as_on_a_code_host"](text) == '- five\n\n        code\n```text title="f.txt"\na\n- b\n```\n'


def test_a_notebook_becomes_a_page():
    outputs = [{"output_type": "stream", "text": ["1\n", "2\n"]}, {"data": {"image/png": "AAAA\n", "text/plain": ["<Figure>"]}}]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": ["print(1)\n", "draw()"], "outputs": outputs},
        {"cell_type": "code", "source": [], "outputs": []},
    ]
    made = PAGES["from_notebook"](json.dumps({"cells": cells}))
    assert made.startswith("# Title\ntext\n\n```python\nprint(1)\ndraw()\n```\n\n```text\n1\n2\n```\n\n![what the code")
    assert made.rstrip().endswith("(data:image/png;base64,AAAA)")
    assert PAGES["with_site_links"]("[a](notebooks/a.ipynb)", "README.md", None, "1.0") == "[a](notebooks/a.md)"


def test_every_public_name_is_in_the_reference():
    """And every name that a page imports from a submodule."""
    text = "".join(page.read_text("utf-8") for page in (ROOT / "docs/api").glob("*.md"))
    documented = set()
    for name, options in re.findall(r"^::: (\S+)\n((?:    .*\n)*)", text, re.MULTILINE):
        members = re.search(r"members: \[(.*)\]", options)
        documented |= {f"{name}.{each}" for each in members[1].split(", ")} if members else {name}
    assert {f"shira.{name}" for name in set(shira.__all__) - {"masks"}} <= documented
    pages = "".join(page.read_text("utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    imported = re.findall(r"^ *from (shira[\w.]*) import ([\w, ]+)", pages, re.MULTILINE)
    assert len(imported) > 8
    for module, names in imported:
        for name in names.partition(" as ")[0].strip().split(", "):
            assert any(f"{each}.".startswith(f"{module}.{name}.") for each in documented), f"{module}.{name}"


def test_docstrings_become_lists_and_code():
    pytest.importorskip("griffe")
    made = runpy.run_path(str(SITE / "docstrings.py"))["as_markdown"]
    text = 'Do it.\n\nmodel: what it\n    takes. k, n: two; f(a, b): called.\nNote: no name\n\n    x = f"{1}"\n        y\n\nend'
    assert made(text, {"model", "k", "n", "f"}) == (
        "Do it.\n\n- `model`: what it\n    takes.\n- `k, n`: two;\n- `f(a, b)`: called.\n\nNote: no name\n\n"
        '```python\nx = f"{1}"\n    y\n```\n\nend'
    )


def test_the_check_finds_what_is_wrong(tmp_path):
    check = runpy.run_path(str(SITE / "check.py"))["problems"]
    good = '<h1 id="top">x</h1><a href="#top">a</a><a href="b.html">b</a><a href="https://x.org">c</a><img src="p.png">'
    (tmp_path / "a.html").write_text(good)
    (tmp_path / "b.html").write_text("<p>b</p>")
    (tmp_path / "p.png").write_bytes(b"")
    assert check(tmp_path) == []
    bad = '<a href="c.html">a</a><a href="b.html#no">b</a><script src="https://x.org/y.js"></script><img src="q.png">'
    (tmp_path / "a.html").write_text(bad)
    (tmp_path / "a.css").write_text("@font-face { src: url(https://x.org/z) }")
    assert [line.split(": ")[-1].rpartition(" ")[0] for line in check(tmp_path)] == [
        "a.html loads",
        "there is no such",
        "no heading has this",
        "there is no such",
        "a.css loads",
    ]
    assert check(tmp_path / "nowhere")


def with_links():
    """(page, text) of each section of faq.md and concepts.md, and of each row of a table of results.md and when.md."""
    for name in ("faq.md", "concepts.md"):
        text = (ROOT / "docs" / name).read_text("utf-8")
        yield from ((name, section) for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:])
    for name in ("results.md", "when.md"):
        yield from ((name, line) for line in (ROOT / "docs" / name).read_text("utf-8").splitlines() if line.startswith("| "))


def test_figures_stand_on_the_pages_that_are_linked_beside_them():
    """Those with a decimal point."""
    found = 0
    for name, part in with_links():
        links = re.findall(r"\]\((?!https?:|#)([\w/.-]+\.md)", part)
        linked = " ".join((ROOT / "docs" / page).read_text("utf-8") for page in links)
        said = re.sub(r"\]\([^)]*\)", "]", part) if part.startswith("| ") else re.sub(r"\([^)]*\)", "", part)
        for figure in re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", said):
            found += 1
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", linked), f"{name}, {part[:60]!r}: {figure}"
    assert found > 50


def test_the_pictures_of_concepts_show_what_is_said_of_them():
    pytest.importorskip("matplotlib")
    drawn = runpy.run_path(str(ROOT / "docs/concepts_pictures.py"))
    page = (ROOT / "docs/concepts.md").read_text("utf-8")
    a, b, lora = drawn["sparse"](1), drawn["sparse"](2), drawn["low_rank"](1)
    assert lora.all() and torch.linalg.matrix_rank(lora) == 1
    count, rank, both = int((a != 0).sum()), int(torch.linalg.matrix_rank(a)), int(((a != 0) & (b != 0)).sum())
    assert f"a mask changes {count} scattered entries; the rank of the change is {rank}]" in page
    assert f"have {count} numbers that train" in page and f"can be high: {rank} in the picture" in page
    assert f"change {count} entries each, and {both} of these are the same]" in page


@pytest.mark.slow
@pytest.mark.parametrize("script", ["concepts_pictures.py", "cost_picture.py", "fusion_pictures.py"])
def test_the_scripts_draw_their_pictures(script, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = runpy.run_path(str(ROOT / "docs" / script))
    names = [name for name in ("mask", "switch", "adding", "costs", "methods", "meetings") if name in drawn]
    for name in names:
        drawn[name](tmp_path / f"{name}.png")
    assert names and {path.stem for path in tmp_path.iterdir()} == set(names)
