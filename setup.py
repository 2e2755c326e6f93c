"""What pyproject.toml cannot say: the parts in C, and README.md for the page of an index.

Where no compiler is at hand, the wheel has none of them and suits any machine. torch's operators serve instead.
"""

import platform
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent

# no -ffast-math: linked into a shared library, it changes how the whole process rounds
FLAGS = ["-O3", "-fopenmp-simd", "-pthread", "-fvisibility=hidden"]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mprefer-vector-width=512")  # where the processor has it: native.h has it chosen when it is loaded

SOURCES = {
    "shira.kernels.cpu._native": [f"kernels/cpu/{name}.c" for name in ("native", "sampled", "unite", "combine", "rows")],
    "shira.sparse._drawing": ["sparse/draw.c"],
}


def in_c(name: str, sources: list[str]) -> Extension:
    return Extension(
        name,
        [f"src/shira/{source}" for source in sources],
        depends=["src/shira/kernels/cpu/native.h"],
        extra_compile_args=[] if sys.platform == "win32" else FLAGS,
        extra_link_args=[] if sys.platform == "win32" else ["-pthread"],
        py_limited_api=True,
        optional=True,
    )


class Wheel(bdist_wheel):
    """A wheel that is pure, for any platform, if the kernels could not be compiled."""

    def run(self) -> None:
        self.run_command("build_ext")
        if not any(Path(path).exists() for path in self.get_finalized_command("build_ext").get_outputs()):
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()


def with_links(text: str, changed: Callable[[str, str, str], str | None]) -> str:
    """Markdown with `changed(picture, words, target)` in place of each link and picture. Code keeps its brackets.

    picture: "!" for a picture, "" for a link. Where `changed` returns None, nothing changes.
    """

    def linked(found: re.Match[str]) -> str:
        replaced = None if re.match(r"[a-z]+:|#", found[3]) else changed(*found.groups())
        return found[0] if replaced is None else replaced

    parts = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", linked, part) for part in parts)


def into_repository(picture: str, words: str, target: str, repository: str | None, version: str) -> str:
    """A link to a file of the checkout, for a page that is read elsewhere.

    repository: its address, as on GitHub. Without one, a link becomes its words, and a picture is left out.
    """
    if repository is None:
        return "" if picture else words
    return f"{picture}[{words}]({repository}/{'raw' if picture else 'blob'}/v{version}/{target})"


def for_an_index(readme: str, repository: str | None, version: str) -> str:
    """README.md with links that lead somewhere from any page: those into the checkout lead into the repository."""
    return with_links(readme, lambda *link: into_repository(*link, repository, version))


def repository_and_version() -> tuple[str | None, str]:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"].get("urls", {})
    known = re.search(r'__version__ = "(.+)"', (ROOT / "src/shira/version.py").read_text("utf-8"))
    return urls.get("Repository"), known[1] if known else ""


if __name__ == "__main__":  # the backend runs this file under that name
    setup(
        ext_modules=[in_c(*each) for each in SOURCES.items()],
        cmdclass={"bdist_wheel": Wheel},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
        long_description=for_an_index((ROOT / "README.md").read_text("utf-8"), *repository_and_version()),
        long_description_content_type="text/markdown",
    )
