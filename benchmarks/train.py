"""Training: ours beside PEFT's LoRA, DoRA and SHiRA, and the frozen model, which is the floor."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import shira
from shira.data.models import SMOLLM2
from shira.integrations.transformers import load_model

from .common import TARGETS, alternate, report, show

RANK = 16
OURS = {"shira wm": "wm", "shira struct": "struct"}
METHODS = ["frozen", *OURS, "PEFT LoRA", "PEFT DoRA", "PEFT SHiRA"]


def prepare(method: str, model: nn.Module, targets: list[str]) -> tuple[nn.Module, list[nn.Parameter]]:
    """A model in training by a method, with as many parameters as a LoRA of rank 16; and these parameters."""
    model.requires_grad_(False)
    if method == "frozen":  # forward and input gradients, nothing but a scalar trained
        scale = nn.Parameter(torch.ones(1))
        first = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model
        first.register_forward_hook(lambda _module, _inputs, output: output * scale)
        return model, [scale]
    if method in OURS:
        tuner = shira.attach(model, mask=OURS[method], rank=RANK, targets=targets)
        return model, tuner.parameters()
    from peft import LoraConfig, ShiraConfig, get_peft_model

    if method == "PEFT SHiRA":
        config: Any = ShiraConfig(r=RANK, target_modules=targets, random_seed=0)
    else:
        dora = method == "PEFT DoRA"
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.05, target_modules=targets, use_dora=dora)
    tuned = get_peft_model(model, config)
    return tuned, [p for p in tuned.parameters() if p.requires_grad]


def model_step(method: str, batch: int, tokens: int, dtype: str, checkpoint: bool) -> tuple[Callable[[], None], int]:
    """One optimizer step of SmolLM2-135M, and how many parameters it trains."""
    base = load_model(SMOLLM2, dtype)
    if checkpoint:
        base.activation_checkpointing_enable()
    model, trained = prepare(method, base, TARGETS)
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, 40_000, (batch, tokens), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(p.numel() for p in trained)


def layer_step(method: str, side: int, tokens: int, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """One optimizer step of one square linear layer that is asked for its input's gradient, too."""
    torch.manual_seed(0)
    model, trained = prepare(method, nn.Sequential(nn.Linear(side, side, bias=False)).to(dtype), ["0"])
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    input = torch.randn(1, tokens, side, dtype=dtype, requires_grad=True)
    grad_output = torch.randn(1, tokens, side, dtype=dtype)

    def step() -> None:
        model(input).backward(grad_output)
        optimizer.step()
        optimizer.zero_grad()
        input.grad = None

    return step, sum(p.numel() for p in trained)


def peak_memory(method: str, batch: int, tokens: int, dtype: str, checkpoint: bool, steps: int = 3) -> float:
    """Peak resident GiB of a fresh process that takes a few steps by this method."""
    arguments = [method, batch, tokens, dtype, checkpoint, steps]
    code = f"from benchmarks.train import take_steps; take_steps(*{arguments!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def take_steps(method: str, batch: int, tokens: int, dtype: str, checkpoint: bool, steps: int) -> None:
    """Print the peak resident GiB of a few steps, sampled every few milliseconds."""
    import psutil

    step, _ = model_step(method, batch, tokens, dtype, checkpoint)
    process, peak, done = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(steps):
        step()
    done.set()
    watcher.join()
    print(json.dumps(peak[0] / 2**30))


def main(plot: Path | None, quick: bool) -> list[dict[str, Any]]:
    """SmolLM2-135M in float32, 4 sequences of 128 and 256 tokens; one 4096² layer, float32 and bfloat16."""
    rows = []
    for tokens in (16,) if quick else (128, 256):
        steps, counts = {}, {}
        for method in METHODS:
            steps[method], counts[method] = model_step(method, 1 if quick else 4, tokens, "float32", False)
        seconds = alternate(steps, 1 if quick else 7)
        del steps
        memory = {
            f"{method}{', checkpointed' if checkpoint else ''}": peak_memory(
                method, 1 if quick else 4, tokens, "float32", checkpoint
            )
            for method in (["shira wm"] if quick else METHODS)
            for checkpoint in (False, True)
        }
        ms = {method: 1e3 * value for method, value in seconds.items()}
        rows.append(report("train", setup=f"SmolLM2 4 x {tokens}", dtype="float32", ms=ms, peak_gib=memory, parameters=counts))
    side = 256 if quick else 4096
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (32,) if quick else (512, 2048):
            steps = {method: layer_step(method, side, tokens, dtype)[0] for method in METHODS}
            seconds = alternate(steps, 1 if quick else 9)
            ms = {method: 1e3 * value for method, value in seconds.items()}
            rows.append(report("train", setup=f"{side}² x {tokens}", dtype=str(dtype)[6:], ms=ms))
    show("a training step", rows, lambda row: f"{row['setup']} {row['dtype']}", plot)
    return rows
