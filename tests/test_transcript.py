"""docs/ten-minutes.md, on a tiny model: its commands run in their order, and print what stands there but for the figures."""

import io
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest

from conftest import letter_tokenizer
from test_hub import online  # noqa: F401
from transcript import COMMAND, PAGE, run_page

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # how huggingface_hub calls httpx2
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),  # how PEFT makes sparse tensors
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT asks for it
]


@pytest.mark.filterwarnings("ignore::shira.runs.live.InSoftware")
def test_the_commands_run_and_print_what_stands_there(online, run, tiny_llama, monkeypatch, capsys):  # noqa: F811
    tiny_llama.bfloat16().save_pretrained("SmolLM2")
    letter_tokenizer().save_pretrained("SmolLM2")
    capsys.readouterr()

    def execute(command):
        if command.startswith("python "):
            runpy.run_path(command.rpartition(" ")[2])
            return "".join(capsys.readouterr())
        if command.startswith("ls "):
            return "".join(f"{path.name}\n" for path in sorted(Path(command.removeprefix("ls ")).iterdir()))
        line, _, typed = command.replace("\\\n", "").partition(" < ")
        monkeypatch.setattr("sys.stdin", io.StringIO(Path(typed).read_text() if typed else ""))
        code, out, err = run(line.removeprefix("shira "))
        assert code == 0, f"{command}\n{err}"
        return out + err

    page = PAGE.read_text(encoding="utf-8").replace("SmolLM2-135M-Instruct-Q4_1", "SmolLM2")
    expected, found = printed(page), printed(run_page(page, execute))
    assert expected.keys() == found.keys() and len(found) >= 12
    written = re.compile("shira (generate|chat)")  # by the model
    different = [(command, found[command] - lines, lines - found[command]) for command, lines in expected.items()]
    assert not [each for each in different if (each[1] or each[2]) and not written.search(each[0])]


def printed(page):
    """Command -> the lines below it, without their figures, units and widths, in any order: two streams are mixed there."""
    blocks = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    parts = [COMMAND.split(f"$ {part}", 1) for block in blocks for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return {command: Counter(map(masked, filter(None, text.splitlines()))) for _, command, text in parts}


def masked(line):
    line = re.sub(r"(fingerprint) .*", r"\1", line.replace("│", " "))
    line = re.sub(r"[-+]?\d[\d.,]*", "#", line)
    line = re.sub(r"@\S+", "@#", re.sub(r"\b[kM]?B\b", "B", line))
    return re.sub(r"\s+", " ", re.sub(r"[─━]+", "─", line)).strip()
