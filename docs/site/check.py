"""Check the built site: every link and picture leads to a file and a heading of it, and no page loads anything from elsewhere.

python docs/site/check.py build/site
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FOLLOWED = {"a": "href"}  # elsewhere only when it is clicked
LOADED = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}


class Page(HTMLParser):
    """Of one page: its ids, the addresses it follows and those it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.followed: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {values[key] or "" for key in ("id", "name") if key in values}
        if address := values.get(FOLLOWED.get(tag, "")):
            self.followed.append(address)
        if address := values.get(LOADED.get(tag, "")):
            self.loaded.append(address)


def problems(site: Path) -> list[str]:
    site = site.resolve()
    pages = {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    found = [f"{site} has no pages"] if not pages else []
    for path, page in pages.items():
        here = path.relative_to(site)
        for address in page.loaded:
            if urlsplit(address).netloc:
                found.append(f"{here} loads {address}")
        for address in page.followed + page.loaded:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc or address == "#":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{here}: {address}: there is no such file")
            elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in pages[target].ids:
                found.append(f"{here}: {address}: no heading has this name")
    elsewhere = re.compile(r"url\(['\"]?(https?:[^)'\"]+)")
    for path in site.rglob("*.css"):
        found += [f"{path.relative_to(site)} loads {url}" for url in elsewhere.findall(path.read_text("utf-8"))]
    return found


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]))
    print("\n".join(wrong) or f"{sys.argv[1]}: every link leads somewhere, and nothing is loaded from elsewhere")
    sys.exit(bool(wrong))
