"""An adapter for its base in another dtype."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import shira
from conftest import all_bits, mlp, random_adapter, same_bits
from shira import AdapterError, BaseMismatch, SparseTensor, Switcher
from shira.checkpoints.casting import cast
from shira.cli import app

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@given(first=st.sampled_from(DTYPES), then=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_a_cast_adapter_makes_of_the_cast_base_what_a_cast_makes_of_both(first, then, seed):
    model = mlp(first)
    adapter = random_adapter(model, seed)
    adapter.metadata["base"] = {"id": "mlp", "dtype": "float32"}
    made = cast(adapter, mlp(first), then)
    assert adapter.metadata["base"]["dtype"] == "float32"
    switcher = Switcher(model)
    switcher.add("a", adapter)
    switcher.use("a")
    expected = all_bits(model.to(then))
    other = mlp(first).to(then)
    base = all_bits(other)
    switcher = Switcher(other)
    switcher.add("a", made)
    switcher.use("a")
    assert same_bits(expected, all_bits(other))
    switcher.use(None)
    assert same_bits(base, all_bits(other))


def test_deltas_stay():
    adapter = random_adapter(mlp(), 1, kind="delta")
    made = cast(adapter, mlp(), torch.float16)
    assert all(torch.equal(tensor.values, made.tensors[name].values) for name, tensor in adapter.tensors.items())


def test_refusals():
    adapter = random_adapter(mlp(), 1)
    with pytest.raises(BaseMismatch, match="the adapter does not belong to this model"):
        cast(adapter, mlp(seed=1), torch.bfloat16)
    for dtype in (torch.int32, "bfloat16"):
        with pytest.raises(AdapterError, match="dtype must be one of float32, bfloat16, float16, float64; found"):
            cast(adapter, mlp(), dtype)
    large = shira.Adapter({"0.weight": SparseTensor((11, 13), torch.tensor([3]), torch.tensor([1e30]))})
    with pytest.raises(AdapterError, match="'0.weight' holds values that float16 does not"):
        cast(large, mlp(), torch.float16)


def test_the_command(tiny_llama, tmp_path):
    tiny_llama.float().save_pretrained(tmp_path / "base")
    with shira.attach(tiny_llama, mask="rand", density=0.05) as tuner:
        with torch.no_grad():
            for parameter in tuner.parameters():
                parameter.add_(0.01)
        tuner.adapter("poet").save(tmp_path / "poet.safetensors")

    def run(*more):
        return CliRunner().invoke(app, ["convert", f"{tmp_path}/poet.safetensors", "-o", f"{tmp_path}/half.safetensors", *more])

    assert "give the model that the adapter was trained on" in str(run("--dtype", "bfloat16").exception)
    assert "unknown --dtype 'bf16'" in str(run("--dtype", "bf16", "--base", f"{tmp_path}/base").exception)
    assert "leave out --density" in str(run("--dtype", "bfloat16", "--density", "0.1").exception)
    done = run("--dtype", "bfloat16", "--base", f"{tmp_path}/base")
    assert done.exit_code == 0, done.output
    half = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    switcher = Switcher(half)
    with pytest.raises(BaseMismatch, match="shira convert ADAPTER --base BASE --dtype bfloat16"):
        switcher.add("poet", tmp_path / "poet.safetensors")
    switcher.add("poet", tmp_path / "half.safetensors")
    switcher.use("poet")
    assert switcher.active == {"poet": 1.0}
