"""Draw the picture of costs in results.md from the tables of performance.md: `python docs/cost_picture.py`."""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent


def table(page: str, *columns: str) -> dict[str, dict[str, str]]:
    """First cell of a row -> column -> cell, of all tables whose head has these columns."""
    found: dict[str, dict[str, str]] = {}
    head: list[str] = []
    for line in page.splitlines():
        if not line.startswith("|"):
            head = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not head:
            head = cells
        elif set(columns) <= set(head) and not set(line) <= set("|- "):
            found[cells[0]] = dict(zip(head, cells, strict=True))
    return found


def number(cell: str) -> float:
    return float(re.match(r"[0-9.e+]+", cell)[0])


def costs(path: Path) -> None:
    """Step time and peak memory of training over the frozen model's, and time of a switch over index_copy_'s."""
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    trained = table(page, "frozen", "shira wm", "PEFT LoRA, no dropout", "PEFT LoRA, dropout 0.05")
    methods = ["shira wm", "PEFT LoRA, no dropout", "PEFT LoRA, dropout 0.05"]
    switched = table(page, "index_copy_", "shira base to a", "shira a to b", "LoRA in place", "LoRA W + AB")["7B"]
    ways = ["shira base to a", "shira a to b", "LoRA in place", "LoRA W + AB"]
    parts = [
        ("time of a training step,\nover the frozen model's", trained["4 x 256, two threads, elapsed"], "frozen", methods),
        ("peak memory of training,\nover the frozen model's", trained["peak GiB, 4 x 256"], "frozen", methods),
        ("time of a switch, over index_copy_'s\n(LLaMA2-7B's shape, logarithmic)", switched, "index_copy_", ways),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(12, 2.7), layout="constrained")
    for axis, (title, cells, unit, names) in zip(axes, parts, strict=True):
        ratios = [number(cells[name]) / number(cells[unit]) for name in names]
        labels = [name.replace("PEFT ", "") for name in names]
        bars = axis.barh(labels, ratios, color=["tab:orange" if "shira" in name else "0.6" for name in names])
        axis.axvline(1, color="black", linewidth=0.8, zorder=0)
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        axis.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3, fontsize=9, bbox=behind)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        if unit == "index_copy_":
            axis.set_xscale("log")
            axis.set(xlim=(0.1, 50), xticks=[0.1, 1, 10], xticklabels=["0.1", "1", "10"])
        else:
            axis.set_xlim(right=1.18 * max(ratios))
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    costs(DOCS / "pictures" / "cost.png")
