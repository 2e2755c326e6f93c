"""Compare the prediction of `shira estimate` with the memory that training takes (Linux only).

    python -m benchmarks.estimate

Each setup runs in its own process. "Measured" is the peak of the resident memory minus the resident memory before the model is
created. glibc keeps freed blocks below a threshold that grows to 32 MB, so resident memory depends on the order in which blocks
are freed. Each setup is measured with a fixed threshold (MALLOC_MMAP_THRESHOLD_), and again with glibc's default, to show the
effect.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import shira
from shira.data.models import SMOLLM2
from shira.integrations.transformers import checkpointing_of, load_config, untrained
from shira.runs.estimate import WAYS, estimate

from .common import TARGETS, print_row

RANK, DROPOUT = 16, 0.05
FIXED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "65536"}
STEPS = ((128, "float32", False), (256, "float32", False), (256, "float32", True), (256, "bfloat16", False))
Setup = dict[str, Any]  # model, dtype, method, tokens, checkpointing


def config_of(model: str) -> Any:
    """The config of SmolLM2, or of a wider and shallower Llama."""
    if model != "wide":
        return load_config(model)
    from transformers import LlamaConfig

    sizes = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 3, "num_attention_heads": 12}
    return LlamaConfig(vocab_size=8000, **sizes)


def setups() -> list[Setup]:
    chosen = []
    for model, (tokens, dtype, checkpointing) in itertools.product((SMOLLM2, "wide"), STEPS):
        for method in WAYS:
            chosen.append({"model": model, "dtype": dtype, "method": method, "tokens": tokens, "checkpointing": checkpointing})
    return chosen


def predicted(setup: Setup) -> int:
    config, dtype = config_of(setup["model"]), getattr(torch, setup["dtype"])
    return estimate(
        lambda: untrained(config, dtype),
        method=setup["method"],
        rank=RANK,
        targets=TARGETS,
        batch_size=4,
        length=setup["tokens"],
        checkpointing=setup["checkpointing"],
        dropout=DROPOUT,
    ).total


def measured(setup: Setup, environment: dict[str, str]) -> int:
    """Peak resident bytes minus the resident bytes before the model is created, in a process of its own."""
    code = f"from benchmarks.estimate import train; train({setup!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(json.loads(done.stdout.splitlines()[-1]))


def train(setup: Setup) -> None:
    """Run by the process: two steps of a tiny model, so that the libraries load what they need; then two steps of the model."""
    from transformers import LlamaConfig

    tiny = LlamaConfig(vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2)
    steps(untrained(tiny, getattr(torch, setup["dtype"])), setup | {"tokens": 8}, 97)
    before = resident("VmRSS")
    config = config_of(setup["model"])
    steps(untrained(config, getattr(torch, setup["dtype"])), setup, config.vocab_size)
    print(resident("VmHWM") - before)


def steps(model: nn.Module, setup: Setup, vocabulary: int) -> None:
    trained = prepared(model, setup["method"])
    model.train()
    if setup["checkpointing"]:
        checkpointing_of(model)[0]()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(0, vocabulary, (4, setup["tokens"]))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    for _ in range(2):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def prepared(model: nn.Module, method: str) -> list[nn.Parameter]:
    if method == "full":
        return list(model.parameters())
    if method == "shira":
        return shira.attach(model, mask="wm", rank=min(RANK, model.config.hidden_size // 8), targets=TARGETS).parameters()
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=DROPOUT, target_modules=TARGETS))
    return [p for p in tuned.parameters() if p.requires_grad]


def resident(what: str) -> int:
    """Resident memory (VmRSS) or its peak (VmHWM), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def main(quick: bool) -> list[dict[str, Any]]:
    """Both models in float32 and bfloat16, with 4 rows of 128 or 256 tokens. quick: only one setup, for a test."""
    rows = []
    for setup in setups()[12:13] if quick else setups():
        mib = {"predicted": predicted(setup), "measured": measured(setup, FIXED)}
        mib |= {} if quick else {"usual malloc": measured(setup, {})}
        name = f"{setup['model'].partition('-')[0]} {setup['method']}, 4 x {setup['tokens']}"
        name += ", checkpointing" * setup["checkpointing"]
        error = mib["predicted"] / mib["measured"] - 1
        mib = {key: value / 2**20 for key, value in mib.items()}
        rows.append(print_row("estimate", setup=name, dtype=setup["dtype"], mib=mib, error=round(error, 4)))
    return rows


if __name__ == "__main__":
    rows = main("--quick" in sys.argv)
    print("\n| | predicted, MiB | measured | error | with glibc's usual malloc |\n|---|---|---|---|---|")
    for row in rows:
        name, mib = f"{row['setup']}, {row['dtype']}", row["mib"]
        figures = (
            f"{mib['predicted']:.0f} | {mib['measured']:.0f} | {row['error']:+.1%} | {mib.get('usual malloc', math.nan):.0f}"
        )
        print(f"| {name} | {figures} |")
