"""Calls that were meant otherwise: each is refused by us, and says what it takes."""

from functools import partial

import pytest
import torch

import shira
from conftest import mlp, random_adapter
from shira import ShiraError, SparseTensor, Switcher


def test_every_refusal_is_ours(tmp_path):
    """What was meant otherwise: each call says what it takes."""
    adapter = random_adapter(mlp(), 1)
    tensor = adapter.tensors["0.weight"]
    adapter.save(tmp_path / "a")
    calls = {
        r"shira.load\('poet.safetensors'\)": [
            lambda: shira.load(5),
            lambda: shira.load(None),
            lambda: shira.load(adapter),
            lambda: shira.load(["a"]),
            lambda: shira.load(b"a"),
            lambda: shira.load("a\0b"),
            lambda: shira.load(""),
        ],
        r"shira.fuse takes \{'poet.safetensors': 1.0\}": [
            lambda: shira.fuse([adapter, adapter]),
            lambda: shira.fuse(adapter),
            lambda: shira.fuse("a"),
            lambda: shira.fuse({"a": adapter}),
            lambda: shira.fuse({"a": (adapter,)}),
            lambda: shira.fuse({"a": ("a", 1.0)}),
            lambda: shira.fuse({3: (adapter, 1.0)}),
        ],
        "poet.safetensors": [
            lambda: shira.fuse({3: 1.0}),
            lambda: adapter.save(5),
            lambda: adapter.save(tmp_path / "b", like=5),
            lambda: shira.compare([adapter, adapter]),
            lambda: shira.compare(5),
            lambda: shira.merge(tmp_path / "a", 5, tmp_path / "out"),
            lambda: shira.merge(tmp_path / "a", [adapter], tmp_path / "out"),
            lambda: shira.merge(tmp_path / "a", adapter, 5),
            lambda: Switcher(mlp()).add("x", 5),
            lambda: Switcher(mlp()).add("x", [adapter]),
        ],
        "finite number": [partial(shira.fuse, {str(tmp_path / "a"): value}) for value in ("1", None, [1], 10**5000, True, 1j)],
        "base must be a model": [partial(shira.fuse, {"x": (adapter, 1.0)}, base) for base in ("org/model", 5, [1])],
        "must be a tensor of the base": [lambda: shira.fuse({"x": (adapter, 1.0)}, dict.fromkeys(adapter.tensors, [1.0]))],
        "unknown fusion method": [partial(shira.fuse, {"x": (adapter, 1.0)}, method=name) for name in (5, ["sum"], None)],
        "Checkpoint|checkpoint": [
            lambda: shira.merge(5, adapter, tmp_path / "out"),
            lambda: shira.extract(5, 5),
            lambda: shira.extract([1], {}),
            lambda: shira.compare(adapter, base=5),
        ],
        r"shira.merge\('SmolLM2-135M'.*found an? Sequential, a model in memory.*switcher.use": [
            lambda: shira.merge(mlp(), adapter, tmp_path / "out"),
        ],
        "tensors by name": [lambda: shira.extract({"a": [1]}, {"a": [1]}), lambda: shira.extract({5: torch.ones(1)}, {})],
        "density|must be a text|targets are names": [
            lambda: shira.extract(mlp(), mlp(), density="0.01"),
            lambda: shira.extract(mlp(), mlp(), density=[0.01]),
            lambda: shira.extract(mlp(), mlp(), density=0.1, name=5),
            lambda: shira.extract(mlp(), mlp(), density=0.1, license=["MIT"]),
            lambda: shira.extract(mlp(), mlp(), density=0.1, targets=5),
            lambda: shira.extract(mlp(), mlp(), density=0.1, targets=[5]),
        ],
        "scope|kind": [
            lambda: shira.extract(mlp(), mlp(), scope=["model"]),
            lambda: shira.extract(mlp(), mlp(), kind=5),
            lambda: shira.SparseTensor((2, 2), tensor.indices, tensor.values, ["delta"]),
        ],
        "must be a (plain )?tensor": [
            lambda: shira.SparseTensor((2, 2), [0, 1], torch.ones(2)),
            lambda: shira.SparseTensor((2, 2), torch.tensor([0, 1]), [1.0, 2.0]),
            lambda: shira.SparseTensor((2, 2), torch.tensor([0, 1]), torch.ones(2, device="meta")),
            lambda: shira.SparseTensor((2, 2), torch.tensor([0, 1]), torch.ones(2).to_sparse()),
        ],
        r"SparseTensor\(\(rows, columns\)": [
            lambda: shira.SparseTensor(4, torch.tensor([0]), torch.ones(1)),
            lambda: shira.SparseTensor((2.0, 2), torch.tensor([0]), torch.ones(1)),
            lambda: shira.SparseTensor("22", torch.tensor([0]), torch.ones(1)),
            lambda: shira.SparseTensor((2**62, 2), torch.tensor([0]), torch.ones(1)),
        ],
        "valid Unicode": [lambda: shira.Adapter({"\ud800": tensor}).save(tmp_path / "b")],
        "SparseTensor}": [
            lambda: shira.Adapter([tensor]),
            lambda: shira.Adapter(5),
            lambda: shira.Adapter({"a": tensor}, "x"),
            lambda: shira.Adapter({"a": tensor.values}),
            lambda: shira.Adapter({5: tensor}),
            lambda: shira.Adapter({"a": None}),
        ],
    }
    for words, each in calls.items():
        for call in each:
            with pytest.raises(ShiraError, match=words) as caught:
                call()
            assert len(str(caught.value)) < 1000


def test_inputs_are_not_replaced_even_by_force(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 1), ("b", 2)):
        shira.Adapter(
            {n: SparseTensor(t.shape, t.indices, t.values, "delta") for n, t in random_adapter(mlp(), seed).tensors.items()}
        ).save(f"{name}.safetensors")
    (tmp_path / "weights.safetensors").write_bytes(b"something else")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for output, words in {
        "b.safetensors": "--output: b.safetensors is read by this command; give another name",
        "../" + tmp_path.name + "/a.safetensors": "is read by this command",
        "weights.safetensors": "is there already and is no adapter's file, and --force replaces no others",
    }.items():
        code, _, err = run(f"fuse a.safetensors b.safetensors -o {output} --force")
        assert code == 1 and words in " ".join(err.split()), err
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for _ in range(2):
        assert run("fuse a.safetensors b.safetensors -o both.safetensors --force")[0] == 0
