"""Extracting and merging within three times the largest tensor, whatever the checkpoint's and the adapter's size."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import shira

SHAPE = (3072, 4096)
LARGEST = 2 * 3072 * 4096  # bytes, in bfloat16
SHARDS = 3
TENSORS = 6
DENSITY = 0.2  # an adapter of 90 MB, which is more than the limit

# Address space is the strictest measure: it counts files that are mapped, and memory that is only reserved.
LIMITED = """
import resource, sys, torch, shira
from pathlib import Path
from safetensors.torch import load_file, save_file
from shira.checkpoints import merging  # code that is compiled first, under the limit, takes memory, too
from shira.cli import app

def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def command(line):
    app(line.split(), standalone_mode=False)

folder, task, density, allowed = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
base, tuned, output = folder / "base", folder / "tuned", folder / f"{task}.safetensors"
torch.set_num_threads(1)
for part, fill in (("small.safetensors", torch.zeros), ("other.safetensors", torch.ones)):
    save_file({"w": fill(2**12)}, folder / part)
command(f"extract {folder}/small.safetensors {folder}/other.safetensors -o {output} --density 0.5")
before = memory("VmSize:")
resource.setrlimit(resource.RLIMIT_AS, (before + allowed, before + allowed))
match task:
    case "naive":
        tensors = [load_file(file) for file in sorted(base.iterdir())]
    case "merge":
        command(f"merge {base} {folder}/tensor.safetensors=0.5 -o {folder}/merged")
    case "held":
        shira.extract(base, tuned, density=density).save(output)
    case scope:
        command(f"extract {base} {tuned} -o {output} --force --density {density} --scope {scope}")
print(memory("VmPeak:") - before)
"""


def limited(folder, task):
    command = [sys.executable, "-c", LIMITED, str(folder), task, str(DENSITY), str(3 * LARGEST)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MALLOC_ARENA_MAX": "1"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six such matrices in three shards, and a fine-tune of all of them."""
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
    yield folder
    for file in folder.rglob("*.safetensors"):  # half a gigabyte
        file.unlink()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, and limits that hold")
def test_memory_stays_below_three_times_the_largest_tensor(folder):
    """Beside an adapter, in its file, of more than that."""
    for task in ("tensor", "model", "merge"):  # the last takes what the first has made
        done = limited(folder, task)
        assert done.returncode == 0, f"{task}: {done.stderr}"
        peak = int(done.stdout.split()[-1]) / LARGEST
        print(f"{task}: {peak:.2f} times the largest tensor")
        assert peak < 3
    by_tensor, by_model = (shira.load(folder / f"{task}.safetensors") for task in ("tensor", "model"))
    assert min(by_tensor.nbytes, by_model.nbytes) > 3 * LARGEST
    assert (by_tensor.nnz, by_model.nnz) == (TENSORS * round(DENSITY * LARGEST / 2), round(DENSITY * TENSORS * LARGEST / 2))
    for shard in range(SHARDS):
        base, merged = (load_file(folder / part / f"model-{shard}.safetensors") for part in ("base", "merged"))
        for name, tensor in base.items():
            flat, sparse = tensor.view(-1), by_tensor.tensors[name]
            under = flat[sparse.indices.long()].float()
            flat[sparse.indices.long()] = (under + 0.5 * (sparse.values.float() - under)).bfloat16()
            assert torch.equal(tensor, merged[name])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, and limits that hold")
@pytest.mark.parametrize("task", ["naive", "held"])
def test_holding_it_all_fails_under_the_same_limit(folder, task):
    done = limited(folder, task)
    assert done.returncode != 0
    assert "allocate memory" in done.stderr or "MemoryError" in done.stderr
