"""Training: shira, PEFT's LoRA, DoRA and SHiRA, and the frozen model as the lower bound."""

import contextlib
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import shira
from shira.data.models import SMOLLM2
from shira.integrations.transformers import checkpointing_of, load_model

from .common import TARGETS, alternate, print_row, show

RANK = 16
Targets = Sequence[str] | str
StepOf = Callable[..., tuple[Callable[[], None], int]]
OURS = {"shira wm": "wm", "shira struct": "struct", "shira columns": "struct:direction=columns,diagonal=false"}
NO_DROPOUT = "PEFT LoRA, no dropout"  # which is PEFT's default; "PEFT LoRA" has dropout 0.05
METHODS = ["frozen", *OURS, "PEFT LoRA", NO_DROPOUT, "PEFT DoRA", "PEFT SHiRA"]


def prepare(
    method: str, model: nn.Module, targets: Targets, *, rank: int = RANK, density: float | None = None
) -> tuple[nn.Module, list[nn.Parameter]]:
    """Prepare a model for training by a method; returns it and the parameters that train.

    PEFT's methods have this rank. shira trains as many entries as a LoRA of this rank has parameters, or this density.
    """
    model.requires_grad_(False)
    if method == "frozen":  # forward pass and input gradients; only one scalar trains
        scale = nn.Parameter(next(model.parameters()).new_ones(1))
        embeddings = getattr(model, "get_input_embeddings", None)
        first = embeddings() if embeddings is not None else getattr(model, "conv_in", model)
        first.register_forward_hook(lambda _module, _inputs, output: output * scale)
        return model, [scale]
    if method in OURS:
        tuner = shira.attach(model, mask=OURS[method], rank=None if density else rank, density=density, targets=targets)
        return model, tuner.parameters()
    from peft import LoraConfig, ShiraConfig, get_peft_model

    if method == "PEFT SHiRA":
        config: Any = ShiraConfig(r=rank, target_modules=targets, random_seed=0)
        if next(model.parameters()).is_cuda:
            config.mask_fn = random_mask  # PEFT's own draws on the CPU, which takes seconds for a layer of a large model
    else:
        dora = method == "PEFT DoRA"
        dropout = 0.0 if method == NO_DROPOUT else 0.05
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=targets, use_dora=dora)
    tuned = get_peft_model(model, config)
    return tuned, [p for p in tuned.parameters() if p.requires_grad]


def random_mask(layer: nn.Module, r: int, **_: Any) -> Tensor:
    """PEFT's random mask, bool, of the weight's shape, drawn on the weight's device."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[torch.randperm(weight.numel(), device=weight.device)[: r * sum(weight.shape)]] = True
    return mask.view(weight.shape)


def model_step(
    method: str, tokens: int, *, batch: int = 4, targets: Targets = TARGETS, checkpoint: bool = False
) -> tuple[Callable[[], None], int]:
    """A function that takes one optimizer step of SmolLM2-135M, and the number of parameters that train."""
    base = load_model(SMOLLM2, "float32")
    if checkpoint:
        checkpointing_of(base)[0]()
    model, trained = prepare(method, base, targets)
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, 40_000, (batch, tokens), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(p.numel() for p in trained)


def layer_step(method: str, side: int, tokens: int, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """The same as `model_step` for one square linear layer, whose input also gets a gradient."""
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


@contextlib.contextmanager
def worker(step_of: StepOf, method: str, *arguments: Any, **settings: Any) -> Iterator[Callable[[], dict[str, float]]]:
    """A new process that trains by a method. Yields a function that takes one step there.

    step_of: what makes the step from the method and the rest, such as `model_step`; it must be a module's own function.

    The function returns the step's milliseconds, by the clock ("ms") and of the processor ("cpu_ms"), the peak resident GiB so
    far, and the number of parameters that train.
    In a shared process the methods would reuse each other's freed memory. Then the method that pays for new pages would change
    from run to run.
    """
    module, name = step_of.__module__, step_of.__qualname__
    code = f"from benchmarks.train import answer; from {module} import {name}; "
    code += f"answer({name}, *{(method, *arguments)!r}, **{settings!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    assert process.stdin is not None and process.stdout is not None
    with process:

        def step() -> dict[str, float]:
            process.stdin.write("\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            return json.loads(process.stdout.readline())  # type: ignore[union-attr, no-any-return]

        yield step
        process.stdin.close()


def answer(step_of: StepOf, *arguments: Any, **settings: Any) -> None:
    """Run by a worker: one step for each line that it reads."""
    import psutil

    step, parameters = step_of(*arguments, **settings)
    process, peak, done = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in sys.stdin:
        start, busy = time.perf_counter(), time.process_time()
        step()
        ms, cpu_ms = 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - busy)
        print(json.dumps({"ms": ms, "cpu_ms": cpu_ms, "peak_gib": peak[0] / 2**30, "parameters": parameters}), flush=True)
    done.set()
    watcher.join()


def model_rows(
    tokens: int,
    batch: int,
    rounds: int,
    targets: Targets = TARGETS,
    *,
    checkpoint: bool = False,
    methods: Sequence[str] = METHODS,
) -> dict[str, Any]:
    """Steps of SmolLM2 by every method in turn."""
    figures = steps_in_turn(model_step, methods, rounds, tokens, batch=batch, targets=targets, checkpoint=checkpoint)
    notes = [targets] * isinstance(targets, str) + ["checkpointed"] * checkpoint
    return print_row("train", setup=", ".join([f"SmolLM2 {batch} x {tokens}", *notes]), dtype="float32", **figures)


def steps_in_turn(
    step_of: StepOf, methods: Sequence[str], rounds: int, *arguments: Any, **settings: Any
) -> dict[str, dict[str, float]]:
    """Steps by every method in turn, each method in its own process: medians of `rounds` steps, peak memory, parameters."""
    answers: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    with contextlib.ExitStack() as stack:
        workers = {m: stack.enter_context(worker(step_of, m, *arguments, **settings)) for m in methods}
        for _ in range(2 + rounds):
            for method, step in workers.items():
                answers[method].append(step())
    return {
        **{
            key: {m: statistics.median(row[key] for row in rows[2:]) for m, rows in answers.items()} for key in ("ms", "cpu_ms")
        },
        "peak_gib": {method: rows[-1]["peak_gib"] for method, rows in answers.items()},
        "parameters": {method: rows[-1]["parameters"] for method, rows in answers.items()},
    }


def main(plot: Path | None, quick: bool) -> list[dict[str, Any]]:
    """SmolLM2-135M in float32, with 4 sequences of 128 or 256 tokens; and one 4096² layer, in float32 and bfloat16."""
    if quick:
        rows = [model_rows(16, 1, 1, methods=["shira wm", "PEFT LoRA"])]
    else:
        rows = [model_rows(tokens, 4, 9) for tokens in (128, 256)]
        rows += [model_rows(tokens, 4, 2, checkpoint=True) for tokens in (128, 256)]
        rows.append(model_rows(128, 4, 2, "all-linear"))
    side = 256 if quick else 4096
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (32,) if quick else (512, 2048):
            steps = {method: layer_step(method, side, tokens, dtype)[0] for method in METHODS}
            seconds = alternate(steps, 1 if quick else 9)
            ms = {method: 1e3 * value for method, value in seconds.items()}
            rows.append(print_row("train", setup=f"{side}² x {tokens}", dtype=str(dtype)[6:], ms=ms))
    show("a training step", rows, lambda row: f"{row['setup']} {row['dtype']}", plot)
    return rows
