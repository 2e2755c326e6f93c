"""Compare the accuracy of masks, alone and when two adapters are added: three tasks, three pairs, three seeds.

Every rule gets the same number of entries (2 % of the targets; "lora7" about as many parameters) and the same data. It
tries three learning rates on the first seed, more while the highest is the best, and keeps the one with the best accuracy on
validation examples. The results file has one JSON line for each run. A run that is in it is not made again. Runs of
different rules may share the file. docs/masks/README.md discusses the results.

    python -m experiments.fusion_masks run --results experiments/fusion_masks.jsonl --rules wm snip lora
    python -m experiments.fusion_masks report --results experiments/fusion_masks.jsonl --plot fusion-masks.png
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import shira
from shira import masks
from shira.cli.options import avoid_cudnn_attention
from shira.data.models import SMOLLM2
from shira.data.tasks import TASKS, Example
from shira.integrations import transformers as hf
from shira.integrations.transformers_training import train as hf_train
from shira.masks import calibration
from shira.runs.evaluation import accuracy
from shira.runs.recipes import GENERAL_BATCH
from shira.weights import targets

from .language.plots import figure
from .palette import look
from .store import Key, Store, on_accelerator

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
DENSITY = 0.02
LORAS = {"lora": 10, "lora7": 7}  # their ranks: 2.07 M and 1.45 M parameters on these targets, where 2 % are 1.39 M
RATES = (1e-3, 2e-3, 4e-3)  # learning rates; while the highest is the best, twice that is tried, too
LORA_RATES = (5e-4, 1e-3, 2e-3)  # the same number
HIGHEST_RATE = 16e-3
SEEDS = (0, 1, 2)
VALIDATION = 150  # examples of a task's training part that are kept from training
CALIBRATION = 64
STEPS, BATCH, EXAMPLES = 30, 16, 480
PAIRS = list(itertools.combinations(TASKS, 2))


@dataclasses.dataclass
class Setting:
    """The information that a rule may use."""

    model: nn.Module
    tokenizer: Any
    task: str
    seed: int
    general: dict[str, Tensor]  # tensor name -> mean squared gradient on text that the model writes itself


def sensitivity(weight: Tensor, gradient: Tensor) -> Tensor:
    return (weight.float() * gradient.float()).abs()


def in_each_line(scores: Tensor, k: int, dim: int) -> Tensor:
    """A mask, bool: the best k / lines entries of every row (dim 1) or column (dim 0), then the best of the rest up to k."""
    each = k // scores.shape[1 - dim]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(dim, scores.topk(each, dim).indices, True)
    rest = masks.top_k(scores.masked_fill(chosen, -1.0), k - int(chosen.sum()))
    chosen.view(-1)[rest] = True
    return chosen


def snip_rows(weight: Tensor, gradient: Tensor, k: int) -> Tensor:
    """SNIP within each row: every output has the same number of trained inputs (and a few more if k does not divide evenly)."""
    return in_each_line(sensitivity(weight, gradient), k, 1)


def snip_columns(weight: Tensor, gradient: Tensor, k: int) -> Tensor:
    """SNIP within each column: every input has the same number of trained outputs (and a few more, as in `snip_rows`)."""
    return in_each_line(sensitivity(weight, gradient), k, 0)


def wm_snip(weight: Tensor, gradient: Tensor, k: int) -> Tensor:
    """SNIP among the 5 · k largest weights."""
    largest = masks.wm(weight, min(5 * k, weight.numel()))
    return largest[masks.top_k(sensitivity(weight, gradient).view(-1)[largest], k)]


def of_class(number: int, classes: int = 4) -> masks.Mask:
    """SNIP among one of several disjoint random classes of positions. Adapters of different classes have no common position."""

    def snip_class(weight: Tensor, gradient: Tensor, k: int) -> Tensor:
        generator = torch.Generator().manual_seed(weight.numel())
        kind = torch.randint(classes, weight.shape, generator=generator).to(weight.device)
        return masks.top_k(sensitivity(weight, gradient).masked_fill(kind != number, -1.0), k)

    return snip_class


def task_over_general(setting: Setting) -> masks.Mask:
    """SNIP divided by the sensitivity of general text: |W · g| / √(mean squared gradient on general text, plus its mean)."""

    def snip_general(weight: Tensor, gradient: Tensor, k: int, name: str) -> Tensor:
        general = setting.general[name].float()
        return masks.top_k(sensitivity(weight, gradient) / (general + general.mean()).sqrt(), k)

    return snip_general


RULES: dict[str, Callable[[Setting], str | masks.Mask]] = {
    "wm": lambda _: "wm",
    "snip": lambda _: "snip",
    "grad": lambda _: "grad",
    "rand": lambda _: "rand",
    "snip-rows": lambda _: snip_rows,
    "snip-columns": lambda _: snip_columns,
    "wm-snip": lambda _: wm_snip,
    "snip-general": task_over_general,
    "snip-class": lambda setting: of_class(list(TASKS).index(setting.task)),
    "snip-near": lambda _: "snip",
    "wm-near": lambda _: "wm",
}
NEAR = {"snip-near": "snip-penalty", "wm-near": "wm-penalty"}  # held near the base (`Tuner.stay_near`); names in results files


def own_text(model: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
    """Batches of text that the model writes itself."""
    return hf.batches(hf.own_text(model, tokenizer), model, GENERAL_BATCH, tokenizer.pad_token_id or 0)


def squared_gradients(model: nn.Module, tokenizer: Any) -> dict[str, Tensor]:
    """Mean squared gradient of every target on the model's own text, in batches of four rows."""
    found: dict[str, Tensor] = {}

    def receive(name: str, statistics: Mapping[str, Tensor]) -> None:
        found[name] = statistics["squared_gradient"].to(torch.bfloat16)

    calibration.calibrate(model, target_weights(model), own_text(model, tokenizer), receive, statistics=["squared_gradient"])
    return found


def split(task: str, seed: int) -> tuple[list[Example], list[Example], list[Example]]:
    """Examples to train on, to choose the learning rate with, and to measure with.

    The labels of a task's examples alternate, as long as each label has examples left. Each seed draws training examples anew;
    their labels alternate, too.
    """
    rest = TASKS[task].train()
    training = rest[VALIDATION:]
    if seed:
        by_label: dict[int, list[Example]] = {}
        for example in random.Random(seed).sample(training, len(training)):
            by_label.setdefault(example.label, []).append(example)
        turns = itertools.zip_longest(*(by_label[label] for label in sorted(by_label)))
        training = [example for turn in turns for example in turn if example is not None]
    return training[:EXAMPLES], rest[:VALIDATION], TASKS[task].test()


def train(setting: Setting, rule: str, rate: float) -> Path:
    """Train one adapter and save it, unless its file exists; returns the file."""
    path = Path(tempfile.gettempdir()) / "shira-fusion-masks" / f"{rule}-{setting.task}-{setting.seed}-{rate}.safetensors"
    if path.exists():
        return path
    path.parent.mkdir(exist_ok=True)
    model, tokenizer = setting.model, setting.tokenizer
    pad = tokenizer.pad_token_id or 0
    rows = hf.encode(tokenizer, split(setting.task, setting.seed)[0])
    options: dict[str, Any] = {"steps": STEPS, "batch_size": BATCH, "learning_rate": rate, "seed": setting.seed, "pad": pad}
    if rule in LORAS:
        lora(model, LORAS[rule], rows, options, path)
        return path
    batches = hf.batches(rows[:CALIBRATION], model, BATCH, pad)
    seed = 100 * setting.seed + list(TASKS).index(setting.task)
    mask = RULES[rule](setting)
    with shira.attach(model, mask=mask, density=DENSITY, targets=TARGETS, calibration=batches, seed=seed) as tuner:
        if rule in NEAR:
            tuner.stay_near(own_text(model, tokenizer))
        hf_train(tuner, model, rows, **options)
        tuner.adapter().save(path)
    return path


def target_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {target.name: target.weight for target in targets.resolve(model, TARGETS)}


def lora(model: nn.Module, rank: int, rows: list[hf.Row], options: dict[str, Any], path: Path) -> None:
    """Train PEFT's LoRA of this rank and save its factors."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(options["seed"])
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules=TARGETS)
    tuned: Any = get_peft_model(model, config)
    trained: Any = SimpleNamespace(nnz=sum(p.numel() for p in tuned.parameters() if p.requires_grad))
    hf_train(trained, tuned, rows, **options)
    factors = {}
    for name, module in tuned.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            factors[f"{name}.weight.left"] = module.scaling["default"] * module.lora_B["default"].weight.detach()
            factors[f"{name}.weight.right"] = module.lora_A["default"].weight.detach()
    tuned.unload()
    save_file(factors, path)


@contextlib.contextmanager
def added(model: nn.Module, files: dict[str, Path]) -> Iterator[None]:
    """Inside, the model has these adapters added: base + Σ changes, in float32, rounded once, for LoRA as for shira."""
    if not any(path.name.startswith("lora") for path in files.values()):
        switcher = shira.Switcher(model)
        for name, path in files.items():
            switcher.add(name, path)
        with switcher.using(dict.fromkeys(files, 1.0)):
            yield
        return
    weights = dict(model.named_parameters())
    factors = [load_file(path, str(next(iter(weights.values())).device)) for path in files.values()]
    base = {name.removesuffix(".left"): weights[name.removesuffix(".left")] for name in factors[0] if name.endswith(".left")}
    before = {name: weight.detach().clone() for name, weight in base.items()}
    try:
        for name, weight in base.items():
            change = sum(f[f"{name}.left"] @ f[f"{name}.right"] for f in factors)
            weight.data.copy_(weight.float() + change)
        yield
    finally:
        for name, weight in base.items():
            weight.data.copy_(before[name])


def measure(setting: Setting, files: dict[str, Path], task: str, part: str) -> float:
    """Accuracy with these adapters added."""
    _, validation, test = split(task, 0)
    with added(setting.model, files):
        return accuracy(setting.model, setting.tokenizer, validation if part == "validation" else test)


def run(results: Path, rules: list[str], seeds: tuple[int, ...] = SEEDS, every_rate: bool = False) -> None:
    """Make all runs that are not in the results file yet. every_rate: on the first seed, use all learning rates."""
    model, tokenizer = on_accelerator(hf.load_model(SMOLLM2)), hf.load_tokenizer(SMOLLM2)
    general = squared_gradients(model, tokenizer) if "snip-general" in rules else {}
    store = Store(results)

    def once(key: Key, make: Callable[[], float]) -> float:
        found = store.get(key)
        if found is None:
            start = time.monotonic()
            found = {"accuracy": make()}
            store.add(key, found, time.monotonic() - start)
            print(json.dumps(key | found), flush=True)
        return float(found["accuracy"])

    def settle(rule: str, task: str, seed: int) -> Setting:
        return Setting(model, tokenizer, task, seed, general)

    for task in TASKS:
        once({"rule": "base", "task": task}, lambda: measure(settle("base", task, 0), {}, task, "test"))  # noqa: B023
    for rule in rules:

        def files(names: tuple[str, ...], seed: int, rate: float) -> dict[str, Path]:
            return {name: train(settle(rule, name, seed), rule, rate) for name in names}  # noqa: B023

        def result(names: tuple[str, ...], on: str, seed: int, rate: float, part: str = "test") -> float:
            key = {"rule": NEAR.get(rule, rule), "adapters": names, "on": on, "seed": seed, "rate": rate, "part": part}  # noqa: B023
            return once(key, lambda: measure(settle(rule, on, seed), files(names, seed, rate), on, part))  # noqa: B023

        rates = LORA_RATES if rule in LORAS else RATES
        tried: dict[float, float] = {}
        while not tried or max(tried, key=tried.__getitem__) == max(tried) < HIGHEST_RATE:
            for rate in [2 * max(tried)] if tried else rates:
                tried[rate] = statistics.mean(result((task,), task, 0, rate, "validation") for task in TASKS)
        best = max(tried, key=tried.__getitem__)
        wanted = [(seed, best) for seed in seeds]
        if every_rate:
            wanted += [(0, rate) for rate in tried if rate != best]
        for seed, rate in wanted:
            for task in TASKS:
                result((task,), task, seed, rate)
            for pair in PAIRS:
                for task in pair:
                    result(pair, task, seed, rate)


def summary(results: Path) -> list[dict[str, Any]]:
    """For each rule and learning rate: mean accuracy alone and fused, in per cent, over tasks, pairs and complete seeds."""
    names = {stored: rule for rule, stored in NEAR.items()}
    lines = ((line["key"], line["result"]["accuracy"]) for line in Store(results).lines())
    done = [(key | {"rule": names.get(key["rule"], key["rule"])}, share) for key, share in lines]
    base = {key["task"]: share for key, share in done if key["rule"] == "base"}
    found: dict[tuple[str, float], dict[str, dict[int, list[float]]]] = {}
    for key, share in done:
        if key["rule"] != "base":
            kind = "validation" if key["part"] == "validation" else "alone" if len(key["adapters"]) == 1 else "fused"
            seeds = found.setdefault((key["rule"], key["rate"]), {}).setdefault(kind, {})
            seeds.setdefault(key["seed"], []).append(100 * share)
    rows = []
    for (rule, rate), kinds in found.items():
        whole = [seed for seed, values in kinds.get("fused", {}).items() if len(values) == 2 * len(PAIRS)]
        if not whole:
            continue
        alone = [statistics.mean(kinds["alone"][seed]) for seed in whole]
        fused = [statistics.mean(kinds["fused"][seed]) for seed in whole]
        drops = [a - f for a, f in zip(alone, fused, strict=True)]
        best = max((statistics.mean(found[rule, r]["validation"][0]), -r) for n, r in found if n == rule)[1] == -rate
        rows.append(
            {
                "rule": rule,
                "rate": rate,
                "chosen": best,
                "seeds": len(whole),
                "alone": statistics.mean(alone),
                "fused": statistics.mean(fused),
                "drop": statistics.mean(drops),
                "spread": statistics.stdev(drops) if len(drops) > 1 else None,
                "base": 100 * statistics.mean(base.values()),
            }
        )
    return sorted(rows, key=lambda row: (row["rule"], row["rate"]))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The summary as a table. Rules are bold at the learning rate that validation chose."""
    lines = ["| rule | rate | seeds | alone | fused | drop (± over seeds) |", "|---|---|---|---|---|---|"]
    for row in rows:
        spread = f" ± {row['spread']:.1f}" if row["spread"] is not None else ""
        mark = "**" if row["chosen"] else ""
        lines.append(
            f"| {mark}{row['rule']}{mark} | {row['rate']:g} | {row['seeds']} | {row['alone']:.1f} | {row['fused']:.1f} "
            f"| {row['drop']:.1f}{spread} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot accuracy fused against accuracy alone: one point for each rule and learning rate."""
    with figure(path, figsize=(7.5, 5.5)) as axes:
        low = min(min(row["fused"], row["alone"]) for row in rows) - 1
        high = max(row["alone"] for row in rows) + 1
        axes.plot([low, high], [low, high], color="0.8", linewidth=1)
        axes.annotate("nothing lost", (high, high), (-14, -3), textcoords="offset points", ha="right", color="0.4")
        chosen = [row for row in rows if row["chosen"]]
        for rule in dict.fromkeys(row["rule"] for row in rows):
            mine, style = [row for row in rows if row["rule"] == rule], look(rule)
            axes.plot([r["alone"] for r in mine], [r["fused"] for r in mine], color=style["color"], linewidth=0.7, alpha=0.6)
            for row in mine:
                face = {} if row["chosen"] else {"markerfacecolor": "white"}
                axes.plot(row["alone"], row["fused"], **style | {"linestyle": "none", "markersize": 8} | face)
        for row in chosen:
            beside = [r["fused"] for r in chosen if r is not row and abs(r["alone"] - row["alone"]) < 1]
            near = [fused for fused in beside if abs(fused - row["fused"]) < 0.6]
            away = (7, -4) if not near else (7, 2) if row["fused"] > near[0] else (0, -16)
            axes.annotate(look(row["rule"])["label"], (row["alone"], row["fused"]), away, textcoords="offset points")
        axes.set(xlabel="accuracy alone, % (mean of three tasks)", ylabel="accuracy when two are added, % (mean of pairs)")
        axes.set_title("filled: the rate that validation chose, up to three seeds; hollow: others, one seed", fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--rules", nargs="+", default=[*LORAS, *RULES], choices=[*LORAS, *RULES])
    parser.add_argument("--every-rate", action="store_true", help="measure fusion at the rates that lost on validation, too")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "run":
        avoid_cudnn_attention()
        run(arguments.results, arguments.rules, every_rate=arguments.every_rate)
    rows = [row for row in summary(arguments.results) if row["rule"] in arguments.rules]
    print(markdown(rows))
    if arguments.plot and rows:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
