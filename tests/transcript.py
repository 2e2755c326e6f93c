"""Make docs/ten-minutes.md anew: run its commands with an installed wheel in an empty folder, and write down what they print.

    python tests/transcript.py

A block of the page that has a file's name behind its language becomes that file. In a block of the language `console`, each
line that begins with `$` is run, with the lines that continue it after a backslash. What it prints takes the place of what
stood below it.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path

from hub import TOKEN, serving

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "ten-minutes.md"
BLOCK = re.compile(r"```(?P<language>\w+)(?: (?P<file>\S+))?\n(?P<text>.*?)```", re.DOTALL)
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)", re.MULTILINE)  # over several lines where they end with a backslash


def run_page(page: str, run: Callable[[str], str]) -> str:
    """The page with what `run` returns below each command. Files of the page are written into the working folder."""

    def done(block: re.Match[str]) -> str:
        if block["file"]:
            Path(block["file"]).write_text(block["text"], encoding="utf-8")
        if block["language"] != "console":
            return block[0]
        commands = COMMAND.findall(block["text"])
        return "```console\n" + "".join(f"$ {command}\n{run(command)}" for command in commands) + "```"

    return BLOCK.sub(done, page)


def main() -> None:
    with tempfile.TemporaryDirectory() as name, serving() as hub:
        place = Path(name)
        installed, work = place / "venv", place / "work"
        work.mkdir()
        subprocess.run([sys.executable, ROOT / "tests" / "dist.py", "--output", place / "dist"], check=True)
        (wheel,) = (place / "dist").glob("*.whl")
        venv.create(installed, with_pip=False)
        python = installed / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
        subprocess.run(pip, check=True)
        (site,) = installed.glob("lib/python*/site-packages")
        (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # its own .pth files do not count
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_", "HF_"))}
        environment = kept | {
            "PATH": f"{installed / 'bin'}:{os.environ['PATH']}",
            "COLUMNS": "100",
            "NO_COLOR": "1",
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(place / "hub"),
            "HF_HUB_DISABLE_XET": "1",  # the server has only LFS
        }

        def run(command: str) -> str:
            print(f"$ {command}", flush=True)
            both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            shell = subprocess.run(["bash", "-c", command], cwd=work, env=environment, **both)
            print(shell.stdout, flush=True)
            if shell.returncode:
                raise SystemExit(f"it ended with {shell.returncode}")
            return "".join(f"{line.rstrip()}\n" for line in shell.stdout.replace(str(place), "…").splitlines())

        os.chdir(work)
        made = run_page(PAGE.read_text(encoding="utf-8"), run)
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
