"""Two processes train one model: the bytes that each sends in a step. Also computed: 70 billion parameters on 8 GPUs.

shira bench distributed
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .common import TARGETS, print_row

METHODS = ["shira wm", "PEFT LoRA", "all weights"]
STEPS = 4

# LLaMA2-70B (arXiv 2307.09288): number of layers; sizes of the hidden state, of keys and values, of the MLP, of the vocabulary
LAYERS, WIDTH, KEYS, INNER, VOCABULARY = 80, 8192, 1024, 28672, 32000


def main(plot: Path | None = None, quick: bool = False) -> None:
    """Bytes and milliseconds of a step with DDP on two processes, one line for each method; then the table of `arithmetic`."""
    for method in METHODS:
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        line += ["-m", "benchmarks.distributed", method, str(2 if quick else STEPS)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        done.check_returncode()
        figures = json.loads(next(row for row in done.stdout.splitlines() if row.startswith("{")))
        print_row("distributed", method=method, processes=2, **figures)
    print(arithmetic())


def process(method: str, steps: int) -> None:
    """One of the processes: it trains SmolLM2 in float32 with AdamW, on 2 rows of 64 tokens."""
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from shira.data.models import SMOLLM2
    from shira.integrations.transformers import load_model

    from .train import prepare

    dist.init_process_group("gloo")
    model: nn.Module = load_model(SMOLLM2, "float32")
    if method == "all weights":
        trained = list(model.parameters())
    else:
        model, trained = prepare(method, model, TARGETS)
    wrapped = nn.parallel.DistributedDataParallel(model.train())
    sent: list[int] = []

    def count(_state: Any, bucket):  # type: ignore[no-untyped-def]  # DDP rejects annotations that it does not expect
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]

    wrapped.register_comm_hook(None, count)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, 40_000, (2, 64), generator=torch.Generator().manual_seed(dist.get_rank()))
    seconds = []
    for _ in range(1 + steps):
        start = time.perf_counter()
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        parameters = sum(p.numel() for p in trained)
        figures = {
            "parameters": parameters,
            "bytes_a_step": sum(sent) // (1 + steps),
            "ms": round(1000 * median(seconds[1:]), 1),
        }
        print(json.dumps(figures), flush=True)
    dist.destroy_process_group()


def arithmetic(processes: int = 8, density: float = 0.01, rank: int = 32, tokens: int = 4096) -> str:
    """A computed table of what each GPU holds and sends when LLaMA2-70B trains in bfloat16.

    fully_shard shards the weights, every layer is checkpointed, and each GPU has one row of `tokens` tokens.
    """
    shapes = {"q": (WIDTH, WIDTH), "k": (KEYS, WIDTH), "v": (KEYS, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
    adapted = LAYERS * sum(out * into for out, into in shapes.values())
    layer = 2 * (WIDTH * WIDTH + KEYS * WIDTH) + 3 * INNER * WIDTH + 2 * WIDTH
    weights = LAYERS * layer + 2 * VOCABULARY * WIDTH + WIDTH
    lora = LAYERS * rank * sum(out + into for out, into in shapes.values())
    trained = {"shira, 1 %": round(density * adapted), f"LoRA, rank {rank}": lora, "all weights": weights}
    gigabytes = 1e-9
    lines = ["| on each GPU, GB | " + " | ".join(trained) + " |", "|---|" + "---|" * len(trained)]
    base = {name: 2 * weights / processes for name in trained}
    state = {name: 16 * count / (1 if name.startswith("shira") else processes) for name, count in trained.items()}
    places = {name: 6 * count if name.startswith("shira") else 0 for name, count in trained.items()}
    message = {name: 4 * count if name.startswith("shira") else 0 for name, count in trained.items()}
    gathered = dict.fromkeys(trained, 2 * 2 * layer)
    gradients = {name: 2 * layer if name == "all weights" else 0 for name in trained}
    activations = dict.fromkeys(
        trained, 2 * LAYERS * tokens * WIDTH + 2 * tokens * (4 * WIDTH + 4 * INNER) + 6 * tokens * VOCABULARY
    )
    rows = {
        "base weights in bfloat16, sharded": base,
        "float32 values, gradients, two moments": state,
        "positions (int32) and base values": places,
        "message of the gradients": message,
        "two layers gathered": gathered,
        "gradients of one layer": gradients,
        f"activations, {tokens} tokens, checkpointed": activations,
    }
    total = {name: sum(row[name] for row in rows.values()) for name in trained}
    # in a ring, a process sends 2 (n - 1) / n of averaged bytes (shira, float32), (n - 1) / n of gathered or scattered bytes
    ring = (processes - 1) / processes
    sent = {name: ring * count * (8 if name.startswith("shira") else 2) for name, count in trained.items()}
    gathers = dict.fromkeys(trained, 2 * ring * 2 * weights)
    for name, row in (
        rows | {"**together**": total, "sent a step: gradients": sent, "sent a step: weights, twice": gathers}
    ).items():
        lines.append(f"| {name} | " + " | ".join(f"{value * gigabytes:,.1f}" for value in row.values()) + " |")
    lines.append(
        "| parameters in training, millions | " + " | ".join(f"{count / 1e6:,.0f}" for count in trained.values()) + " |"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    process(sys.argv[1], int(sys.argv[2]))
