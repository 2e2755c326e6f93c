"""What chooses a way to a gradient, and the benchmarks for a GPU, run in small on whatever is here."""

import importlib
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import shira
from conftest import bits, random_adapter
from shira import kernels
from shira.kernels import Sum, Write, WritePlan
from shira.kernels.gpu import products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(Path(shira.__file__).parents[2])
    return importlib.import_module("benchmarks.gpu")


def test_the_switch_benchmark_runs_in_small(gpu, capsys, tmp_path):
    rows = gpu.switch(tmp_path / "plot.png", True, DEVICE) + gpu.switch(None, True, DEVICE, scale=True)
    assert len(rows) == 3
    for row in rows:
        assert row["floor_bytes"] > 0 and row["floor_ms"] > 0 and all(ms > 0 for ms in row["ms"].values())
        assert row["share_of_copy"] == pytest.approx(row["floor_ms"] / row["ms"]["shira base to a"])
    assert '"bench": "scale"' in capsys.readouterr().out


def test_sectors_and_the_bytes_of_a_switch(gpu):
    indices = torch.tensor([0, 15, 16, 40, 1000])
    assert gpu.sectors(indices, 2) == 4 and gpu.sectors(indices, 4) == 5 and gpu.sectors(indices[:0], 2) == 0
    tensor = shira.SparseTensor((2000,), indices, torch.zeros(5).bfloat16())
    assert gpu.floor(shira.Adapter({"w": tensor})) == 4 * 2 * 32 + 5 * (4 + 2 + 2)


@pytest.mark.filterwarnings("ignore")  # PEFT's
def test_the_training_benchmark_runs_in_small(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "METHODS", ["frozen", "shira wm", "PEFT LoRA"])
    rows = gpu.train(None, True, DEVICE)
    assert [row["setup"] for row in rows] == ["LLaMA2-7B 1 x 16", "LLaMA2-7B 1 x 16, checkpointed"]
    assert all(row["ms"].keys() == row["peak_gib"].keys() == set(gpu.METHODS) for row in rows)


def test_the_product_benchmark_runs_in_small(gpu, capsys):
    pytest.importorskip("triton", reason="Triton is not installed: `make test-gpu` installs it and runs these tests")
    rows = gpu.products_(None, True, DEVICE)
    assert {row["chosen"] for row in rows} <= {"dense", "blocks", "sampled"}
    out = capsys.readouterr().out
    assert "from this run: Speed(half=" in out and "nan" not in out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by", ["the library", "triton"])
def test_the_sparse_products_of_a_mixed_batch(gpu, by, dtype):
    """Each row gets what its own adapter changes; an adapter without entries in a row of the weight, and rows without any."""
    rows, weight = 3, torch.randn(70, 96, device=DEVICE).to(dtype)
    model = nn.ParameterDict({"w": weight})
    adapters = [random_adapter(model, seed, density) for seed, density in enumerate((0.3, 0.01))]
    switcher = shira.Switcher(model)
    for number, adapter in enumerate(adapters):
        switcher.add(str(number), adapter)
    deltas = [switcher.changes(str(number))["w"] for number in range(2)]
    changes = [kernels.row_change(delta.indices, delta.values, (70, 96)) for delta in deltas]
    assert (changes[1].starts.diff() == 0).any()
    inputs = torch.randn(2 * rows, 96, device=DEVICE).to(dtype)
    expected = []
    for adapter, given in zip(adapters, inputs.split(rows), strict=True):
        changed = weight.clone()
        changed.view(-1)[adapter.tensors["w"].indices.long().to(DEVICE)] = adapter.tensors["w"].values.to(DEVICE)
        expected.append(given.double() @ changed.double().T)
    output = inputs @ weight.T
    if by == "triton":
        pytest.importorskip("triton", reason="Triton is not installed: `make test-gpu` installs it and runs these tests")
        kernel = importlib.import_module("benchmarks.mixed_kernel")
        triples = [(change.starts, change.columns, change.changes) for change in changes]
        kernel.add(output, inputs, kernel.table_of(triples, rows, weight.device), rows)
    else:
        kernels.add_products_(output, inputs, [(0, rows, changes[0]), (rows, 2 * rows, changes[1])])
    wrong = (output - torch.cat(expected)).abs().max() / torch.cat(expected).abs().max()
    assert wrong < (1e-5 if dtype == torch.float32 else 1e-2)


def test_the_benchmark_of_mixed_batches_runs_in_small(gpu):
    if DEVICE == "cuda":
        pytest.importorskip("triton")
    (row,) = importlib.import_module("benchmarks.mixed").main(None, True, DEVICE)
    assert row["ms"].keys() == {"turns", "mixed", "the base, one batch", "switches"} and min(row["ms"].values()) > 0


def test_bench_says_what_it_cannot_measure(run):
    code, _, err = run("bench files --device cuda")
    assert code == 2 and "files cannot be measured" in err
    code, _, err = run("bench switch --device tpu")
    assert code == 2
    if DEVICE == "cpu":
        code, _, err = run("bench switch --device cuda --quick")
        assert code == 1 and "needs a GPU" in err


MEASURED = [  # on an H200: dtype, tokens, rows, columns, density; ms dense, in blocks, sampled
    (torch.bfloat16, 512, 4096, 4096, 0.01, 0.076, 0.166, 0.087),
    (torch.bfloat16, 512, 11_008, 4096, 0.01, 0.135, 0.290, 0.150),
    (torch.bfloat16, 2048, 4096, 11_008, 0.01, 0.318, 0.677, 0.573),
    (torch.bfloat16, 2048, 11_008, 4096, 0.05, 0.344, 0.869, 1.435),
    (torch.bfloat16, 8192, 4096, 4096, 0.001, 0.385, 0.595, 0.598),
    (torch.float32, 512, 4096, 4096, 0.05, 0.404, 0.582, 0.270),
    (torch.float32, 2048, 11_008, 4096, 0.01, 3.649, 4.092, 0.714),
    (torch.float32, 8192, 4096, 11_008, 0.05, 13.914, 16.420, 12.824),
]


@pytest.mark.parametrize("case", MEASURED)
def test_the_way_that_is_chosen_is_near_the_fastest_that_was_measured(case):
    dtype, tokens, rows, columns, density, *ms = case
    way = products.choose(dtype, tokens, rows, columns, round(density * rows * columns))
    assert dict(zip(("dense", "blocks", "sampled"), ms, strict=True))[way] <= 1.1 * min(ms)


def test_the_largest_gradients_are_never_whole():
    for dtype in (torch.bfloat16, torch.float32):
        for density in (1e-4, 0.01, 1.0):
            assert products.choose(dtype, 2048, 32_000, 4096, round(density * 32_000 * 4096)) != "dense"
    assert products.choose(torch.bfloat16, 2048, 32_000, 4096, 32_000 * 4096) == "blocks"
    assert products.choose(torch.float32, 2048, 576, 576, 576 * 576) == "dense"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_as_they_are_written_by_hand(dtype):
    """The reference of what the GPU does in one launch, against arithmetic on single numbers."""
    weight = torch.arange(1.0, 7.0, dtype=dtype, device=DEVICE)
    runs = [torch.tensor([0, 2, 4], device=DEVICE), torch.tensor([2, 3, 4], device=DEVICE)]
    values = [torch.tensor([10.0, -0.0, 30.0], device=DEVICE), torch.tensor([7.0, 8.0, 9.0], device=DEVICE)]
    overlap = kernels.unite(runs)
    total = Sum.of(overlap, [(values[0].to(dtype), 1.0), (values[1].to(dtype), 0.5)])
    assert [place.tolist() for place in total.places] == [[0, 1, -1, 2], [-1, 0, 1, 2]]
    plan = WritePlan.of([Write(weight, overlap.indices, torch.empty(4, dtype=dtype, device=DEVICE))], [total])
    before = bits(weight)
    with kernels.backend("reference"):
        assert kernels.write_sums_(plan) and not plan.sums
    assert weight.tolist() == [10, 2, 3 + (0 - 3) + 0.5 * (7 - 3), 4 + 0.5 * (8 - 4), 5 + 25 + 0.5 * (9 - 5), 6]
    kernels.restore_(plan)
    assert torch.equal(bits(weight), before)
    one = Sum.of(kernels.unite(runs[:1]), [(torch.full((3,), -0.0, dtype=dtype, device=DEVICE), 1.0)])
    plan = WritePlan.of([Write(weight, runs[0], torch.empty(3, dtype=dtype, device=DEVICE))], [one])
    assert kernels.write_sums_(plan)
    assert all(math.copysign(1, float(weight[n])) == -1 for n in (0, 2, 4))  # its bits, not base + (value - base)
    kernels.restore_(plan)
    huge = Sum.of(kernels.unite(runs[:1]), [(torch.full((3,), torch.finfo(dtype).max, dtype=dtype, device=DEVICE), 4.0)])
    plan = WritePlan.of([Write(weight, runs[0], torch.empty(3, dtype=dtype, device=DEVICE))], [huge])
    assert not kernels.write_sums_(plan)
    kernels.restore_(plan)
    assert torch.equal(bits(weight), before)
