"""Draw the pictures of fusion.md: `python docs/fusion_pictures.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import shira

BASE = {"w": torch.zeros(1, 12)}
CHANGES = {  # three adapters: entry -> change
    "a": {0: 1.0, 1: 0.3, 4: 0.9, 5: 0.8, 6: 1.0, 7: 0.4, 9: 0.6, 10: -0.5},
    "b": {2: -0.8, 4: 0.5, 5: -0.5, 6: 0.8, 7: -0.9, 8: 0.2, 9: 0.6, 10: -0.7},
    "c": {3: 0.7, 6: 0.6, 7: -0.3, 9: -0.6, 10: 0.9, 11: -0.25},
}
COLOURS = {"a": "tab:blue", "b": "tab:orange", "c": "tab:green"}
METHODS = [
    ("sum", {}),
    ("mean", {}),
    ("max", {}),
    ("ties", {"density": 1.0}),
    ("ties", {"density": 0.6}),
    ("dare", {"drop": 0.5, "seed": 1}),
]


def parts() -> dict[str, tuple[shira.Adapter, float]]:
    """The three adapters, at strength 1."""
    made = {}
    for name, changes in CHANGES.items():
        tensor = shira.SparseTensor((1, 12), torch.tensor(list(changes)), torch.tensor(list(changes.values())))
        made[name] = (shira.Adapter({"w": tensor}), 1.0)
    return made


def methods(path: Path) -> None:
    """The changes of three adapters, and what each method makes of them."""
    figure, axes = plt.subplots(len(METHODS) + 1, 1, figsize=(8, 9), sharex=True, sharey=True, layout="constrained")
    for number, (name, changes) in enumerate(CHANGES.items()):
        where = [i + 0.25 * (number - 1) for i in changes]
        axes[0].bar(where, list(changes.values()), 0.23, color=COLOURS[name], label=f"adapter {name}")
    axes[0].set_title("the changes of three adapters; shaded: entries where some meet", fontsize=10, loc="left")
    axes[0].legend(ncols=3, fontsize=8, loc="upper right", frameon=False)
    for axis, (method, options) in zip(axes[1:], METHODS, strict=True):
        tensor = shira.fuse(parts(), base=BASE, method=method, **options).tensors["w"]
        axis.bar(tensor.indices.tolist(), tensor.values.tolist(), 0.6, color="0.35")
        left_out = sorted(set(range(12)) - set(tensor.indices.tolist()))
        axis.plot(left_out, [0] * len(left_out), "x", color="tab:red", markersize=7)
        said = ", ".join(f"{key}={value}" for key, value in options.items())
        axis.set_title(f"{method} {said}", fontsize=10, loc="left")
    for axis in axes:
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set(ylim=(-2.3, 5.2), yticks=(-2, 0, 2, 4), xticks=range(12))
        for shared in (4, 5, 6, 7, 9, 10):
            axis.axvspan(shared - 0.45, shared + 0.45, color="0.94", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("entry of the weight; a red cross: left as it is in the base")
    figure.supylabel("change", fontsize=10)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def meetings(path: Path) -> None:
    """How many entries of random adapters meet, and what a sum makes of their size."""
    counts = list(range(1, 11))
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for density, colour in ((0.01, "tab:blue"), (0.02, "tab:orange"), (0.05, "tab:green")):
        shared = []
        for k in counts:
            runs = [shira.masks.draw(1_000_000, round(1e6 * density), seed) for seed in range(k)]
            overlap = shira.kernels.unite([run.int() for run in runs])
            shared.append(100 * float((overlap.counts > 1).float().mean()))
        axis.plot(counts, shared, "o-", color=colour, markersize=4, label=f"{density:.0%} each")
    axis.set(xlabel="adapters of random positions, fused", ylabel="% of fused entries that meet", xticks=counts, ylim=(0, None))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    folder = Path(__file__).parent / "pictures"
    methods(folder / "fusion-methods.png")
    meetings(folder / "fusion-meetings.png")
