"""Tokens a second and waiting of a server with many adapters, beside its base alone and its peers, in one run.

Each server is a process of its own, and this process is its clients. The cells of a server are measured in turn, several times
over, so that the machine's moods meet all of them. The peers in this process answer the same requests without HTTP.
"""

import asyncio
import contextlib
import os
import re
import statistics
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from shira.data.models import SMOLLM2, model_path
from shira.integrations.transformers import load_model, load_tokenizer
from shira.serving.settings import Settings

from .common import print_row
from .serving_load import Answer, Asked, asked_of, load, make_adapters, serving

VLLM = "SHIRA_VLLM_PYTHON"  # environment variable: an interpreter with vLLM (`make serve-vllm` makes one)
DTYPE = os.environ.get("SHIRA_SERVE_DTYPE", "bfloat16")  # of the weights; by default the checkpoint's own
TOKENS, WORDS = 12, 12  # of an answer; of a prompt
ADAPTERS = (0, 1, 2, 8, 100)  # 0: the base alone
CLIENTS = (1, 8, 64)
SKEW = 1.2  # of the skewed load: the adapter of rank r is asked for in proportion to r to the power of -1.2
RANK = 4  # of LoRA: about as many parameters as 1 % of the linear weights
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class Cell(NamedTuple):
    """What is measured: so many clients over so many adapters, the first of those whose names begin with `of`."""

    clients: int
    adapters: int
    skew: float = 0.0
    of: str = ""

    def requests(self, names: list[str], seed: int) -> list[Asked]:
        count = {1: 4, 8: 16}.get(self.clients, self.clients)
        models = [name for name in names if name.startswith(self.of)][: self.adapters] or ["base"]
        return asked_of(models, count, TOKENS, seed, self.skew, WORDS)


def cells(quick: bool) -> list[Cell]:
    """Many adapters last: they drive the few out of memory, which read their files again in the next turn, with one client."""
    if quick:
        return [Cell(2, 0), Cell(2, 2)]
    few = [Cell(clients, adapters) for clients in CLIENTS for adapters in ADAPTERS[:-1]]
    many = [Cell(clients, ADAPTERS[-1]) for clients in CLIENTS]
    return [*few, *many, Cell(8, 100, SKEW), Cell(64, 100, SKEW)]


def main(plot: Path | None, quick: bool) -> list[dict[str, Any]]:
    """Transformers' engine; vLLM's engine and vLLM's LoRA if SHIRA_VLLM_PYTHON names an interpreter with vLLM; PEFT."""
    warnings.simplefilter("ignore")
    repeats = 1 if quick else 3
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = load_model(SMOLLM2, DTYPE)
        (folder / "shira").mkdir()
        names = make_adapters(model, folder / "shira", 4 if quick else 100)
        loras = save_loras(model, folder / "lora", names[: 2 if quick else 8])
        del model
        rows = measured("shira, Transformers", engine(folder, "transformers"), names, cells(quick), repeats)
        if python := os.environ.get(VLLM):
            rows += measured("shira, vLLM", engine(folder, "vllm", python), names, cells(quick), repeats)
            few = [cell for cell in cells(quick) if cell.adapters <= len(loras)]
            rows += measured("LoRA, vLLM", vllm_lora(folder, python, loras), names, few, repeats)
        rows += peft_rows(folder, loras, quick)
    table(rows)
    by_formula(rows)
    if plot is not None:
        draw(rows, plot)
    return rows


def by_mask(
    repeats: int = 3,
    masks: Sequence[str] = ("rand", "wm", "struct", "block"),
    name: str = "transformers",
    patience: float = Settings.patience,
) -> None:
    """Print what eight adapters cost whose entries lie at random, at the largest weights, on lines or in blocks; and the base.

    64 clients of eight adapters are groups of eight, as 8 clients of the base are.
    name: of the engine. patience: `shira serve --patience`, seconds.

    python -c "from benchmarks.serve import by_mask; by_mask()"
    """
    wanted = [cell for clients in (8, 64) for cell in (Cell(clients, 0), *(Cell(clients, 8, of=mask) for mask in masks))]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = load_model(SMOLLM2, DTYPE)
        (folder / "shira").mkdir()
        names = [name for mask in masks for name in make_adapters(model, folder / "shira", 8, mask=mask, named=mask)]
        del model
        python = os.environ[VLLM] if name == "vllm" else ""
        server = engine(folder, name, python, ready=32, patience=patience)
        table(measured(f"shira, {name}", server, names, wanted, repeats))


def by_mix(mix: int = 8, repeats: int = 3, adapters: int = 100, quick: bool = False) -> list[dict[str, Any]]:
    """Print what turns write, and steps that selections share, on two servers that are measured in turn; and the base.

    mix: of `shira serve --mix`. adapters: how many there are. With at most eight, vLLM's LoRA is a third server, if
    SHIRA_VLLM_PYTHON names an interpreter with vLLM.

    python -c "from benchmarks.serve import by_mix; by_mix()"
    """
    wanted = [Cell(clients, count) for clients in (8, 64) for count in (0, 2, 8, 100)] + [
        Cell(8, 100, SKEW),
        Cell(64, 100, SKEW),
    ]
    wanted = [Cell(2, 2)] if quick else [cell for cell in wanted if cell.adapters <= adapters]
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        model = load_model(SMOLLM2, DTYPE)
        (folder / "shira").mkdir()
        names = make_adapters(model, folder / "shira", 4 if quick else adapters)
        started = {
            "turns": engine(folder, "transformers", ready=64),
            f"--mix {mix}": engine(folder, "transformers", ready=64, mix=mix),
        }
        if (python := os.environ.get(VLLM)) and len(names) <= 8:
            started["LoRA, vLLM"] = vllm_lora(folder, python, save_loras(model, folder / "lora", names))
        del model
        servers = {setup: stack.enter_context(server) for setup, server in started.items()}
        rows = measured_in_turn(servers, names, wanted, repeats)
        table(rows)
        return rows


def engine(
    folder: Path, name: str, python: str = "", *, ready: int = 16, patience: float = Settings.patience, mix: int = 0
) -> Any:
    """A server of shira."""
    command = (
        [python, "-c", "from shira.cli import main; main()", "serve", SMOLLM2, "--adapters", str(folder / "shira")]
        if python
        else []
    )
    given = ["--engine", name, "--dtype", DTYPE, "--served-model-name", "base"]
    given += ["--ready", str(ready), "--patience", str(patience), "--mix", str(mix)]
    return serving(SMOLLM2, folder / "shira", folder / f"{name}-{mix}.log", *given, command=command, environment=ON_CPU)


def vllm_lora(folder: Path, python: str, loras: list[str]) -> Any:
    """vLLM's own server with LoRA adapters: all may be in one batch."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model_path(SMOLLM2), "--dtype", DTYPE]
    given = ["--served-model-name", "base", "--enable-lora", "--max-loras", str(len(loras)), "--max-lora-rank", "8"]
    modules = ["--lora-modules", *(f"{name}={folder / 'lora' / name}" for name in loras)]
    limits = ["--max-num-seqs", "64", "--max-num-batched-tokens", "512", "--max-model-len", "2048"]
    return serving("", None, folder / "lora.log", *given, *limits, *modules, command=command, environment=ON_CPU)


def measured(setup: str, started: Any, names: list[str], wanted: list[Cell], repeats: int) -> list[dict[str, Any]]:
    """Medians of each cell on one server."""
    with started as server:
        return measured_in_turn({setup: server}, names, wanted, repeats)


def measured_in_turn(servers: dict[str, Any], names: list[str], wanted: list[Cell], repeats: int) -> list[dict[str, Any]]:
    """Medians of each cell on each server, by setup. The first turn warms up, and is not counted."""
    found: dict[tuple[str, Cell], list[dict[str, float]]] = {(setup, cell): [] for setup in servers for cell in wanted}
    for turn in range(-1, repeats):
        for cell in wanted:
            requests = cell.requests(names, seed=turn)
            if turn < 0:
                requests = requests[: 2 * max(1, min(cell.clients, 8))]
            for setup, server in servers.items():
                before = counted(server.url)
                answers, seconds = asyncio.run(load(server.url, requests, cell.clients))
                if turn >= 0:
                    after = counted(server.url)
                    spent = {name: after[name] - before[name] for name in after}
                    found[setup, cell].append(figures(answers, seconds) | rates(spent, seconds))
    rows = []
    for (setup, cell), runs in found.items():
        medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        rows.append(
            {"setup": setup, **cell._asdict(), **medians, "tokens_a_second_runs": [run["tokens_a_second"] for run in runs]}
        )
        print_row("serve", **rows[-1])
    return rows


def figures(answers: list[Answer], seconds: float) -> dict[str, float]:
    bad = [answer for answer in answers if answer.status != 200 or answer.error]
    if bad:
        raise RuntimeError(f"{len(bad)} requests failed, the first with {bad[0]}")
    whole, first = sorted(answer.whole for answer in answers), [answer.first for answer in answers]
    p99 = whole[min(len(whole) - 1, int(0.99 * len(whole)))]
    return {
        "tokens_a_second": len(answers) * TOKENS / seconds,
        "first_token_p50": statistics.median(first),
        "answer_p50": statistics.median(whole),
        "answer_p99": p99,
    }


def counted(url: str) -> dict[str, float]:
    """What the server says of its switches so far; 0 if it says nothing."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    values = dict(re.findall(r"^(shira_switch(?:es|_seconds)_total) (\S+)$", text, re.MULTILINE))
    return {name: float(values.get(f"shira_{name}_total", 0)) for name in ("switches", "switch_seconds")}


def rates(spent: dict[str, float], seconds: float) -> dict[str, float]:
    return {"switches_a_second": spent["switches"] / seconds, "share_of_switching": spent["switch_seconds"] / seconds}


def save_loras(model: Any, folder: Path, names: list[str]) -> list[str]:
    """Random LoRA adapters on all linear weights, saved as PEFT saves them."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    for name in names:
        wrapped.save_pretrained(folder, selected_adapters=[name])
    wrapped.unload()
    return names


def peft_rows(folder: Path, loras: list[str], quick: bool) -> list[dict[str, Any]]:
    """PEFT in this process: `set_adapter` and merge/unmerge before each request, and one mixed batch of all clients."""
    import peft

    model, tokenizer = load_model(SMOLLM2, DTYPE), load_tokenizer(SMOLLM2)
    wrapped = peft.PeftModel.from_pretrained(model, folder / "lora" / loras[0], adapter_name=loras[0])
    for name in loras[1:]:
        wrapped.load_adapter(folder / "lora" / name, adapter_name=name)
    wrapped.eval()
    rows = []
    for cell in [Cell(2, 2)] if quick else [Cell(8, 1), Cell(8, 8), Cell(64, 8)]:
        requests = cell.requests(loras, seed=0)
        ways = {"LoRA, PEFT set_adapter": set_adapter, "LoRA, PEFT merged": merged, "LoRA, PEFT mixed batch": mixed}
        for setup, way in ways.items():
            some = requests if way is mixed else requests[:8]  # one at a time: a few tell the rate
            began = time.perf_counter()
            for _ in way(wrapped, tokenizer, some, cell.clients):
                pass
            seconds = time.perf_counter() - began
            row = {"setup": setup, **cell._asdict(), "tokens_a_second": len(some) * TOKENS / seconds}
            rows.append(row)
            print_row("serve", **row)
    return rows


def table(rows: list[dict[str, Any]]) -> None:
    """Print all rows: tokens a second, and their ratio to the base on the same server with as many clients."""
    columns = ("tokens/s", "of base", "first token s", "answer s", "p99 s", "switches/s", "switching %")
    made = Table("setup", "clients", "adapters", *columns, title=f"serve: {TOKENS} tokens an answer, medians")
    bases = {(row["setup"], row["clients"]): row["tokens_a_second"] for row in rows if row["adapters"] == 0}
    for row in rows:
        rate, base = row["tokens_a_second"], bases.get((row["setup"], row["clients"]))
        asked = [str(row["adapters"] or "base"), row["of"], "skewed" if row["skew"] else ""]
        adapters = " ".join(filter(None, asked))
        cells = [f"{rate:.1f}", f"{rate / base:.2f}" if base else ""]
        if "answer_p50" in row:
            cells += [f"{row[name]:.2f}" for name in ("first_token_p50", "answer_p50", "answer_p99", "switches_a_second")]
            cells.append(f"{100 * row['share_of_switching']:.1f}")
        made.add_row(row["setup"], str(row["clients"]), adapters, *cells)
    Console(width=120).print(made)


def step_seconds(rows: list[dict[str, Any]], setup: str) -> Callable[[float], float]:
    """T(b): the seconds of a token of b requests each, on a server's base. Straight lines between those that were measured."""
    base = sorted((row["clients"], row["tokens_a_second"]) for row in rows if row["setup"] == setup and row["adapters"] == 0)
    sizes = [clients for clients, _ in base]
    return lambda size: float(np.interp(size, sizes, [clients / rate for clients, rate in base]))


def turns_rate(seconds: Callable[[float], float], clients: int, adapters: float) -> float:
    """Tokens a second of turns without switching: so many clients in groups of one adapter each (docs/serving.md)."""
    groups = min(clients, adapters)
    return clients / (groups * seconds(clients / groups))


def break_even(seconds: Callable[[float], float], clients: int, rate: float) -> float:
    """The number of adapters up to which turns write as many tokens a second as this; 0 if they never do."""
    found = [adapters for adapters in np.arange(1, clients + 0.05, 0.1) if turns_rate(seconds, clients, adapters) >= rate]
    return float(max(found, default=0))


def by_formula(rows: list[dict[str, Any]]) -> None:
    """Print what the formula of docs/serving.md says of several adapters, beside what was measured; and where LoRA is ahead."""
    made = Table("setup", "clients", "adapters", "tokens/s", "by the formula", "of the formula", title="turns by the formula")
    lora = {row["clients"]: row["tokens_a_second"] for row in rows if row["setup"] == "LoRA, vLLM" and row["adapters"] == 1}
    for row in rows:
        if "share_of_switching" not in row or row["setup"].startswith("LoRA") or row["adapters"] < 2 or row["skew"]:
            continue
        rate = turns_rate(step_seconds(rows, row["setup"]), row["clients"], row["adapters"]) * (1 - row["share_of_switching"])
        found = [f"{row['tokens_a_second']:.1f}", f"{rate:.1f}", f"{row['tokens_a_second'] / rate:.2f}"]
        made.add_row(row["setup"], str(row["clients"]), str(row["adapters"]), *found)
    Console(width=120).print(made)
    for clients, rate in lora.items():
        if clients == 1:  # one request in each group, whatever it asks for
            continue
        most = break_even(step_seconds(rows, "shira, vLLM"), clients, rate)
        print(f"{clients} clients: by the formula turns write more tokens than vLLM's LoRA up to {most:.1f} adapters")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A plot: tokens a second over the number of adapters, with the largest number of clients."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    most = max(row["clients"] for row in rows)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for setup in dict.fromkeys(row["setup"] for row in rows):
        line = [row for row in rows if row["setup"] == setup and row["clients"] == most and not row["skew"] and row["adapters"]]
        if line:
            places = [ADAPTERS.index(row["adapters"]) for row in line]
            axes.plot(places, [row["tokens_a_second"] for row in line], "o-", label=setup)
    axes.set_xticks(range(1, len(ADAPTERS)), [str(count) for count in ADAPTERS[1:]])
    axes.set(xlabel="adapters, asked for alike", ylabel="tokens a second", title=f"{most} clients", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    print(f"plot: {path}")


Way = Callable[[Any, Any, list[Asked], int], Iterator[None]]


def set_adapter(model: Any, tokenizer: Any, requests: list[Asked], clients: int) -> Iterator[None]:
    for asked in requests:
        model.set_adapter(asked.model)
        yield generated(model, tokenizer, [asked])


def merged(model: Any, tokenizer: Any, requests: list[Asked], clients: int) -> Iterator[None]:
    for asked in requests:
        model.set_adapter(asked.model)
        model.merge_adapter([asked.model])
        yield generated(model, tokenizer, [asked])
        model.unmerge_adapter()


def mixed(model: Any, tokenizer: Any, requests: list[Asked], clients: int) -> Iterator[None]:
    for first in range(0, len(requests), clients):
        batch = requests[first : first + clients]
        yield generated(model, tokenizer, batch, adapter_names=[asked.model for asked in batch])


def generated(model: Any, tokenizer: Any, batch: list[Asked], **options: Any) -> None:
    inputs = tokenizer([asked.prompt for asked in batch], return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0, **options)
