"""Extracting and merging within three times the largest tensor, whatever the checkpoint's size."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import shira

SHAPE = (4096, 4096)
LARGEST = 2 * 4096 * 4096  # bytes, in bfloat16
SHARDS = 3
TENSORS = 6

# Address space is the strictest measure: it counts files that are mapped, and memory that is only reserved.
LIMITED = """
import resource, sys, torch, shira
from pathlib import Path

def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

folder, task, allowed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
warm = {"w": torch.zeros(2**12)}, {"w": torch.ones(2**12)}
shira.extract(*warm, density=0.5).save(folder / f"{task}.safetensors")
before = memory("VmSize:")
resource.setrlimit(resource.RLIMIT_AS, (before + allowed, before + allowed))
if task == "naive":
    from safetensors.torch import load_file
    tensors = [load_file(file) for file in sorted((folder / "base").iterdir())]
elif task == "merge":
    shira.merge(folder / "base", {str(folder / "by_hand.safetensors"): 0.5}, folder / "merged")
else:
    shira.extract(folder / "base", folder / "tuned", density=0.01, scope=task).save(folder / f"{task}.safetensors")
print(memory("VmPeak:") - before, memory("VmHWM:"))
"""


def limited(folder, task):
    command = [sys.executable, "-c", LIMITED, str(folder), task, str(3 * LARGEST)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MALLOC_ARENA_MAX": "1"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six such matrices in three shards, a fine-tune of all of them, and an adapter."""
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    noise, tensors = torch.randn(SHAPE, generator=generator), {}
    for part in ("base", "tuned"):
        (folder / part).mkdir()
        places = {}
        for shard in range(SHARDS):
            names = [f"layers.{shard}.{number}.weight" for number in range(TENSORS // SHARDS)]
            for name in names:
                tensors[name] = noise.roll(len(name) * len(places) + shard * 999, 1).bfloat16()
                if part == "tuned":
                    tensors[name] = (tensors[name] + 0.01 * noise).bfloat16()
            file = f"model-{shard}.safetensors"
            save_file({name: tensors[name] for name in names}, folder / part / file)
            places |= dict.fromkeys(names, file)
        (folder / part / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    hand = {}
    for name in ("layers.0.1.weight", "layers.2.0.weight"):
        indices = torch.randperm(SHAPE[0] * SHAPE[1], generator=generator)[:160_000].sort().values
        hand[name] = shira.SparseTensor(SHAPE, indices, torch.ones(160_000).bfloat16())
    shira.Adapter(hand).save(folder / "by_hand.safetensors")
    yield folder
    for file in folder.rglob("*.safetensors"):  # half a gigabyte
        file.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, and limits that hold")
@pytest.mark.parametrize("task", ["tensor", "model", "merge"])
def test_memory_stays_below_three_times_the_largest_tensor(folder, task):
    done = limited(folder, task)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) < 3 * LARGEST
    if task == "merge":
        adapter = shira.load(folder / "by_hand.safetensors")
        for shard in range(SHARDS):
            base, merged = (load_file(folder / part / f"model-{shard}.safetensors") for part in ("base", "merged"))
            for name, tensor in base.items():
                if name in adapter.tensors:
                    flat, where = tensor.view(-1), adapter.tensors[name].indices.long()
                    flat[where] = (flat[where].float() + 0.5 * (1 - flat[where].float())).bfloat16()
                assert torch.equal(tensor, merged[name])
    else:
        adapter = shira.load(folder / f"{task}.safetensors")
        assert adapter.nnz == (round(0.01 * TENSORS * LARGEST / 2) if task == "model" else TENSORS * round(0.01 * LARGEST / 2))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, and limits that hold")
def test_loading_it_all_fails_under_the_same_limit(folder):
    done = limited(folder, "naive")
    assert done.returncode != 0
    assert "Cannot allocate memory" in done.stderr or "MemoryError" in done.stderr
