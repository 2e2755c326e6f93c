"""Folders of PEFT that are malformed, and what PEFT cannot hold: one clear error, and nothing is left."""

import pytest
import torch

import shira
from conftest import mlp, random_adapter
from shira import AdapterError, BaseMismatch, CheckpointError, FormatError, MaskError
from shira.integrations.peft import load, save
from shira.integrations.peft_merging import convert
from test_peft import INPUT, TARGETS, edited, gpt2, of_ours, of_peft, peft, pytestmark, tune  # noqa: F401

NAME = "base_model.model.model.layers.0.self_attn.q_proj.shira_"


@pytest.mark.parametrize(
    ("change", "config", "error", "words"),
    [
        (lambda t: t.pop(NAME + "indices"), {}, FormatError, r"expected shira_indices of shape \[2, 96\], found none"),
        (lambda t: t[NAME + "indices"].fill_(3), {}, FormatError, "sorted and unique, found twice the position"),
        (lambda t: t[NAME + "indices"][0].fill_(24), {}, FormatError, r"positions up to \[24, .*shape \[24, 24\]"),
        (lambda t: t[NAME + "indices"][1].fill_(24), {}, FormatError, r"positions up to \[.*, 24\] .*shape \[24, 24\]"),
        (lambda t: t[NAME + "indices"][0].fill_(-1), {}, FormatError, "positions up to"),
        (lambda t: t.update({NAME + "indices": t[NAME + "indices"].float()}), {}, FormatError, "positions as int32 or int64"),
        (lambda t: t.update({NAME + "weight": t[NAME + "weight"].int()}), {}, FormatError, "list of values for a matrix"),
        (lambda t: t.update({NAME.replace("shira_", "weight"): torch.ones(24, 24)}), {}, FormatError, "in part and whole"),
        (lambda t: t[NAME + "weight"].fill_(torch.nan), {}, FormatError, "values must be finite"),
        (lambda t: None, {"r": 3}, FormatError, r"96 values are not r · \(out \+ in\), with r 3"),
        (lambda t: None, {"r": "x" * 50}, FormatError, "with r 'x"),
        (lambda t: None, {"peft_type": "LORA"}, FormatError, "PEFT's method 'LORA', whose change is not sparse.*shira convert"),
        (lambda t: None, {"peft_type": 3}, FormatError, "is malformed.*peft_type is 3"),
    ],
)
def test_a_malformed_folder_is_refused(tiny_llama, tmp_path, change, config, error, words):
    tune(tiny_llama, peft.ShiraConfig(r=2, target_modules=["q_proj"]), tmp_path)
    with pytest.raises(error, match=words):
        load(edited(tmp_path, change, config), tiny_llama)


def test_what_is_missing_is_named(tiny_llama, tmp_path):
    tune(tiny_llama, peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "lora")
    tune(tiny_llama, peft.ShiraConfig(r=2, target_modules=["q_proj"]), tmp_path / "x")
    with pytest.raises(FormatError, match="does not say which model|LORA"):
        load(tmp_path / "lora")
    with pytest.raises(BaseMismatch, match="PEFT's files hold no shapes: give the base"):
        load(tmp_path / "x")
    with pytest.raises(MaskError, match="changes every entry.*density=0.01, or which share of ‖ΔW‖ to keep, by keep=0.9"):
        convert(tmp_path / "lora", tiny_llama)
    with pytest.raises(shira.errors.DataError, match="give the model that it was trained on, base="):
        convert(tmp_path / "lora", density=0.1)
    with pytest.raises(MaskError, match="give one of them"):
        convert(tmp_path / "lora", tiny_llama, density=0.1, keep=0.9)
    with pytest.raises(shira.errors.DataError, match="with which PEFT changes the base"):
        convert(edited(tmp_path / "lora", lambda t: None, {"init_lora_weights": "pissa_niter_4"}), tiny_llama, density=0.1)
    (tmp_path / "x" / "adapter_model.safetensors").unlink()
    (tmp_path / "x" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FormatError, match="is a pickle, which may run code"):
        load(tmp_path / "x", tiny_llama)
    (tmp_path / "x" / "adapter_config.json").unlink()
    with pytest.raises(FormatError, match="expected adapter_config.json"):
        load(tmp_path / "x", tiny_llama)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere", tiny_llama)


def test_what_peft_cannot_hold_is_refused_and_leaves_nothing(tiny_llama, tmp_path):
    adapter = random_adapter(tiny_llama, 0, 0.3)
    q = "model.layers.0.self_attn.q_proj.weight"

    def refused(words, tensors, base=None, error=AdapterError):
        with pytest.raises(error, match=words):
            save(shira.Adapter(tensors, adapter.metadata), tmp_path / "out", base)
        assert not list(tmp_path.iterdir())

    refused(
        "of a Embedding; PEFT's SHiRA adapts nn.Linear alone",
        {"model.embed_tokens.weight": adapter.tensors["model.embed_tokens.weight"]},
        tiny_llama,
    )
    refused("PEFT adds differences: give the model", {q: adapter.tensors[q]})
    bias = shira.SparseTensor((24,), torch.arange(3), torch.ones(3), "delta")
    refused("adapts the weights of linear layers alone", {"model.norm.weight": bias})
    few = shira.SparseTensor((2, 24), torch.arange(3), torch.ones(3), "delta")
    many = shira.SparseTensor((24, 24), torch.arange(300), torch.ones(300), "delta")
    refused("'b.weight' needs r 7, which is more than the 48 entries of 'a.weight'", {"a.weight": few, "b.weight": many})
    refused("does not belong to this model", {q: adapter.tensors[q]}, mlp(), BaseMismatch)
    refused("overwrites whole tensors alone", {})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(CheckpointError, match="out exists; name a folder that does not exist"):
        save(shira.Adapter({"a.weight": many}), tmp_path / "out")
