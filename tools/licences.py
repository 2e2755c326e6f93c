"""The licences of the packages that each extra installs, from their metadata, as the last table of docs/licences.md.

    python tools/licences.py                             # print the table
    python tools/licences.py --write                     # write it into the page
    python tools/licences.py --also FOLDER --write       # packages that are not in this environment: a site-packages folder

Packages of extras with a make target of their own (vLLM and others) are listed as far as they are found.
"""

import argparse
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/licences.md"
BEGIN, END = "<!-- tools/licences.py -->\n\n", "\n<!-- end -->"
HEAD = "| package | version | licence | installed by |\n|---|---|---|---|"
UNCLEAR = {"", "UNKNOWN", "Other/Proprietary License"}
TOOLS = ("dev",)  # extras for work on the project itself

Found = Mapping[str, importlib.metadata.Distribution]  # by canonical name


def installed(also: list[str] | None = None) -> dict[str, importlib.metadata.Distribution]:
    """The distributions of this environment, and of further folders, by canonical name."""
    places = [*sys.path, *(also or [])]
    found = list(importlib.metadata.distributions(path=places))
    return {canonicalize_name(each.metadata["Name"]): each for each in reversed(found)}


def needed(requirements: list[str], found: Found, extras: Mapping[str, list[str]]) -> set[str]:
    """The canonical names of what requirements install here, directly and indirectly, as far as it is found."""
    names, todo = set(), [(Requirement(text), "") for text in requirements]
    seen = set()
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            if name == "shira-adapters":
                todo += [(Requirement(text), "") for text in extras.get(wanted, [])]
            elif name in found:
                names.add(name)
                todo += [(Requirement(text), wanted) for text in found[name].requires or []]
    return names


def licence_of(distribution: importlib.metadata.Distribution) -> str:
    """What the metadata says: the SPDX expression, otherwise the short text, otherwise the classifiers."""
    known = distribution.metadata
    for text in (known.get("License-Expression"), known.get("License")):
        if text and text.strip() not in UNCLEAR and len(text) < 120 and "\n" not in text.strip():
            return text.strip()
    classifiers = [each.rpartition(" :: ")[2] for each in known.get_all("Classifier") or [] if each.startswith("License ::")]
    stated = [each for each in classifiers if each not in UNCLEAR | {"OSI Approved"}]
    files = ", ".join(known.get_all("License-File") or [])
    return ", ".join(stated) or "not stated in its metadata" + (f"; see its file {files}" if files else "")


def rows(found: Found) -> Iterator[tuple[str, str, str, str]]:
    """(package, version, licence, what installs it) of every runtime dependency, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = {name: texts for name, texts in project["optional-dependencies"].items() if name not in TOOLS}
    plain = needed(project["dependencies"], found, extras)
    by: dict[str, list[str]] = {name: ["always"] for name in plain}
    for extra, texts in extras.items():
        for name in needed(texts, found, extras) - plain:
            by.setdefault(name, []).append(f"`{extra}`")
    for name in sorted(by):
        each = found[name]
        first = [extra for extra in by[name] if not any(f"`{part}`" in by[name] for part in parts_of(extra.strip("`"), extras))]
        yield each.metadata["Name"], each.version, licence_of(each).replace("|", "/"), ", ".join(first)


def parts_of(extra: str, extras: Mapping[str, list[str]]) -> set[str]:
    """The extras that an extra names."""
    requirements = map(Requirement, extras.get(extra, []))
    return {part for each in requirements if canonicalize_name(each.name) == "shira-adapters" for part in each.extras}


def table(found: Found) -> str:
    return "\n".join([HEAD, *(f"| {' | '.join(row)} |" for row in rows(found))]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--also", action="append", metavar="FOLDER", help="a further site-packages folder; may be repeated")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    made = table(installed(options.also))
    if not options.write:
        print(made, end="")
        return
    page = PAGE.read_text("utf-8")
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    assert len(re.findall(pattern, page, re.DOTALL)) == 1, f"{PAGE} must have {BEGIN.strip()} and {END.strip()} once"
    PAGE.write_text(re.sub(pattern, lambda _: BEGIN + made + END, page, flags=re.DOTALL), "utf-8")


if __name__ == "__main__":
    main()
