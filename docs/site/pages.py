"""What the site (mkdocs.yml) does to the pages, which are written for a code host and stay as they are.

Links out of docs/ lead to pages of the site, into the repository, or become their words. README.md, CONTRIBUTING.md and
CHANGELOG.md become pages, and so do notebooks, as they were saved. Lists and anchors are read as GitHub reads them. MkDocs
calls the functions that begin with `on_`.
"""

import importlib.util
import json
import posixpath
import re
import unicodedata
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
FROM_THE_ROOT = {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changes.md"}
ITEM = r"(?:[-*]|\d+\.) "  # the beginning of an item of a list


def anchor(heading: str, separator: str = "-") -> str:
    """What GitHub calls a heading in an address: lower-case letters, digits, "-" and "_"; a space becomes "-"."""
    shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    kept = (c for c in shown if c in "-_ " or unicodedata.category(c)[0] in "LM" or unicodedata.category(c) == "Nd")
    return "".join(kept).strip().replace(" ", separator)


def as_on_a_code_host(markdown: str) -> str:
    """Lists need a blank line before them here, and what is inside an item stands four spaces in, not two."""
    parts = re.split(r"(^ *```.*?^ *```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(_titled(part) if part.lstrip().startswith("```") else _lists(part) for part in parts)


def _titled(block: str) -> str:
    """A block of code whose first line names a file, after the language."""
    return re.sub(r"^( *```\w+) ([\w.-]+)$", r'\1 title="\2"', block, count=1, flags=re.MULTILINE)


def _lists(text: str) -> str:
    lines: list[str] = []
    in_a_list = False
    for line in text.split("\n"):
        begins = re.match(ITEM, line)
        if begins and lines and lines[-1].strip() and not in_a_list:
            lines.append("")
        in_a_list = bool(begins) or in_a_list and (not line.strip() or line.startswith("  "))
        if in_a_list and re.match(r"  (?! {2}\S)", line):  # the text of an item or an item inside it; and code, six spaces in
            line = "  " + line
        lines.append(line)
    return "\n".join(lines)


def with_site_links(markdown: str, page: str, repository: str | None, version: str) -> str:
    """The links of a page for the site. page: where it stands in the site, such as "masks/README.md"."""
    of_the_root = {there: here for here, there in FROM_THE_ROOT.items()}
    folder = posixpath.dirname(of_the_root.get(page, f"docs/{page}"))

    def changed(picture: str, words: str, target: str) -> str | None:
        path, sign, rest = target.partition("#")
        place = posixpath.normpath(posixpath.join(folder, path))
        inside = FROM_THE_ROOT.get(place) or (place.removeprefix("docs/") if place.startswith("docs/") else None)
        if inside and inside.endswith(".ipynb"):
            inside = f"{inside.removesuffix('.ipynb')}.md"
        if inside is None:
            return _setup().into_repository(picture, words, place, repository, version)
        return f"{picture}[{words}]({posixpath.relpath(inside, posixpath.dirname(page) or '.')}{sign}{rest})"

    return _setup().with_links(markdown, changed)


def from_notebook(notebook: str) -> str:
    """A notebook as Markdown: its texts, its code, and what it printed and drew when it was saved. Nothing is run."""
    parts = []
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            parts.append(source)
            continue
        parts.append(_fenced("python", source))
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![what the code above draws](data:image/png;base64,{''.join(data['image/png']).strip()})")
            elif text := "".join(output.get("text") or data.get("text/plain") or output.get("traceback") or ()):
                parts.append(_fenced("text", re.sub(r"\x1b\[[\d;]*m", "", text)))
    return "\n\n".join(parts) + "\n"


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```" if text.strip() else ""


def _setup() -> ModuleType:
    """setup.py, which does the same for README.md on the page of an index."""
    spec = importlib.util.spec_from_file_location("setup_of_shira", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_config(config: Any) -> Any:
    config.mdx_configs["toc"]["slugify"] = anchor
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for here, there in FROM_THE_ROOT.items():
        files.append(File.generated(config, there, content=(ROOT / here).read_text("utf-8")))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page = f"{notebook.src_uri.removesuffix('.ipynb')}.md"
        files.append(File.generated(config, page, content=from_notebook(notebook.content_string)))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """A docstring names pages as the checkout does, docs/fusion.md: a link."""

    def linked(found: re.Match[str]) -> str:
        file = files.get_file_from_path(found[1])
        if file is None:
            raise ValueError(f"{page.file.src_uri}: there is no page docs/{found[1]}")
        words = found[1].removesuffix(".md").removesuffix("/README")
        return f'<a href="{file.url_relative_to(page.file)}{found[2] or ""}">{words}</a>'

    named = r"(?<![\w/\">])docs/([\w/-]+\.md)(#[\w-]+)?"
    return re.sub(named, linked, html) if page.file.src_uri.startswith("api/") else html


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return as_on_a_code_host(with_site_links(markdown, page.file.src_uri, *_setup().repository_and_version()))
