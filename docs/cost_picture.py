"""Draw the picture of costs in results.md from the tables of performance.md: `python -m docs.cost_picture`."""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from experiments.palette import look

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
    methods = {
        "shira wm": "shira, wm",
        "PEFT LoRA, no dropout": "LoRA,\nno dropout",
        "PEFT LoRA, dropout 0.05": "LoRA,\ndropout 0.05",
    }
    switched = table(page, "index_copy_", "shira base to a", "shira a to b", "LoRA in place", "LoRA W + AB")["7B"]
    ways = {
        "shira base to a": "shira,\nbase to a",
        "shira a to b": "shira,\na to b",
        "LoRA in place": "LoRA,\nin place",
        "LoRA W + AB": "LoRA,\nW + AB",
    }
    model, torchs = "relative to the frozen model (= 1)", "relative to torch's index_copy_ (= 1)"
    parts = [
        (f"time of a training step,\n{model}", trained["4 x 256, two threads, elapsed"], "frozen", methods),
        (f"peak memory of training,\n{model}", trained["peak GiB, 4 x 256"], "frozen", methods),
        (f"time of a switch (LLaMA2-7B's shape),\n{torchs}", switched, "index_copy_", ways),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(10.8, 3), width_ratios=(1, 1, 1.15), layout="constrained")
    for axis, (title, cells, unit, names) in zip(axes, parts, strict=True):
        ratios = [number(cells[name]) / number(cells[unit]) for name in names]
        axis.axvline(1, color="0.6", linewidth=0.8, zorder=0)
        for place, (name, ratio) in enumerate(zip(names.values(), ratios, strict=True)):
            style = look("lora" if "LoRA" in name else "wm")
            axis.hlines(place, 1, ratio, color=style["color"], linewidth=2)
            axis.plot(ratio, place, color=style["color"], marker=style["marker"], markersize=8)
            away, side = (-8, "right") if ratio < 1 else (8, "left")
            axis.annotate(f"{ratio:.2f}", (ratio, place), (away, -4), textcoords="offset points", ha=side)
        axis.set_yticks(range(len(names)), names.values())
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        if unit == "index_copy_":
            axis.set_xscale("log", base=2)
            axis.set(xlim=(0.09, 60), xticks=[0.25, 0.5, 1, 2, 4, 8, 16], xticklabels=["¼", "½", "1", "2", "4", "8", "16"])
        else:
            axis.set(xlim=(0.95, 1.7), xticks=[1, 1.25, 1.5])
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    costs(DOCS / "pictures" / "cost.png")
