"""A folder of PEFT's sparse methods wherever an adapter's file is taken."""

import json
import re
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import shira
from conftest import all_bits, bits, mlp, random_adapter, same_bits
from shira import BaseMismatch, FormatError, Switcher
from shira.integrations.hub import parcel
from shira.integrations.peft import load
from shira.switching.sources import AdapterSource
from test_peft import TARGETS, edited, logits, of_ours, of_peft, peft, pytestmark, tune  # noqa: F401
from test_peft_refused import NAME


@pytest.fixture
def beside_its_base(tiny_llama, tmp_path):
    """A SHiRA of PEFT whose configuration names a base on the disk: its folder, and the base's."""
    tiny_llama.save_pretrained(tmp_path / "base")
    model = type(tiny_llama).from_pretrained(tmp_path / "base")
    tune(model, peft.ShiraConfig(r=2, target_modules=TARGETS, modules_to_save=["norm"]), tmp_path / "poet")
    return tmp_path / "poet", tmp_path / "base"


def same(one, other):
    assert one.metadata == other.metadata and list(one.tensors) == list(other.tensors)
    for name, tensor in one.tensors.items():
        there = other.tensors[name]
        assert (tensor.shape, tensor.kind, tensor.values.dtype) == (there.shape, there.kind, there.values.dtype)
        assert torch.equal(tensor.indices, there.indices) and torch.equal(bits(tensor.values), bits(there.values))
    return True


def test_a_folder_of_peft_is_taken_wherever_an_adapter_is(tiny_llama, beside_its_base, tmp_path, run):
    folder, base = beside_its_base
    ours = load(folder)
    assert ours.fingerprints and {each.kind for each in ours.tensors.values()} == {"delta", "overwrite"}
    for path in (folder, folder / "adapter_model.safetensors"):
        assert same(shira.load(path), ours)
        assert torch.equal(of_ours(tiny_llama, path), of_peft(tiny_llama, folder))
    assert same(shira.fuse({folder: 0.5}, tiny_llama), shira.fuse({str(folder): (ours, 0.5)}, tiny_llama))
    one, other = (shira.compare(adapter, base=tiny_llama).as_dict() for adapter in (folder, ours))
    assert one == other and one["adapters"] == ["poet"]
    for label, adapter in (("folder", folder), ("ours", ours)):
        shira.merge(base, adapter, tmp_path / label)
    one, other = (load_file(tmp_path / label / "model.safetensors") for label in ("folder", "ours"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    (tmp_path / "README.md").write_text("not of this adapter")
    files = parcel(folder, "me/poet").files
    assert files.keys() == {"adapter.safetensors", "README.md"} and b"not of this adapter" not in files["README.md"]
    code, out, err = run(f"inspect {folder} --json")
    assert code == 0 and json.loads(out)["nnz"] == ours.nnz, err


def test_a_folder_without_a_base_in_reach_is_refused_by_the_command_to_type(beside_its_base):
    folder, base = beside_its_base
    for name in (None, 3, "", "nobody/nothing", str(base) + "x", "a\0b", "x" * 5000):
        edited(folder, lambda tensors: None, {"base_model_name_or_path": name})
        words = f"adapter of PEFT, which has to be converted: `shira convert {re.escape(shlex.quote(str(folder)))} --base MODEL"
        with pytest.raises(FormatError, match=words):
            shira.load(folder)
    other = folder.parent / "mlp.safetensors"
    save_file(dict(mlp().state_dict()), other)
    for name, words in ((other, "has no tensor"), ("/dev/zero", "is no checkpoint"), (folder, "has no tensor")):
        edited(folder, lambda tensors: None, {"base_model_name_or_path": str(name)})
        with pytest.raises(FormatError, match=f"that its base, .*with another one: `shira convert .*{words}"):
            shira.load(folder)


def test_of_a_base_in_the_cache_of_the_hub_the_configuration_is_enough(tiny_llama, beside_its_base, tmp_path, monkeypatch):
    folder, base = beside_its_base
    kept = tmp_path / "cache" / "models--me--tiny"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("abc")
    (kept / "snapshots" / "abc").mkdir(parents=True)
    config = json.loads((base / "config.json").read_text())
    (kept / "snapshots" / "abc" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    before = load(folder)
    edited(folder, lambda tensors: None, {"base_model_name_or_path": "me/tiny"})
    found = shira.load(folder)
    assert same(found, load(folder)) and found.metadata["base"]["id"] == "me/tiny" and not found.fingerprints
    assert same(shira.Adapter(found.tensors), shira.Adapter(before.tensors))
    for architectures in (["Trainer"], [3], 3, None):  # no model
        (kept / "snapshots" / "abc" / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
        with pytest.raises(FormatError, match="adapter of PEFT, which has to be converted"):
            shira.load(folder)


@pytest.mark.filterwarnings("ignore:save_precomputed_indices")
def test_a_switcher_gives_the_shapes_of_its_model(tiny_llama, tmp_path):
    folder = tmp_path / "x"
    tune(tiny_llama, peft.ShiraConfig(r=2, target_modules=TARGETS), folder)
    expected, before = of_peft(tiny_llama, folder), all_bits(tiny_llama)
    switcher = Switcher(tiny_llama, ready=1)
    switcher.add("other", random_adapter(tiny_llama, 1))
    switcher.use("other")
    switcher.add("x", folder)
    switcher.use("x")
    assert torch.equal(logits(tiny_llama), expected)
    edited(folder, lambda tensors: tensors[NAME + "weight"].zero_())  # it has changed, and is read again
    switcher.use("other")
    switcher.use("x")
    changed = logits(tiny_llama)
    switcher.use(None)
    assert not torch.equal(changed, expected) and torch.equal(changed, of_peft(tiny_llama, folder))
    assert same_bits(all_bits(tiny_llama), before)
    inner = Switcher(nn.ModuleDict({"unet": tiny_llama}))
    inner.add("x", AdapterSource(folder, "unet."))
    with pytest.raises(BaseMismatch, match="does not belong to this model: it has no tensor"):
        Switcher(mlp()).add("x", folder)
    positions = {"sparsity": 0.9, "save_precomputed_indices": False}
    tune(tiny_llama, peft.SupertuningConfig(target_modules=TARGETS, **positions), tmp_path / "y")
    with pytest.raises(FormatError, match=r"switcher.add\('x', shira.integrations.peft.load\(folder, model\)\)"):
        switcher.add("y", tmp_path / "y")
    switcher.add("y", load(tmp_path / "y", tiny_llama))


def test_a_served_folder_takes_the_shapes_of_the_served_model(beside_its_base, tmp_path, settled):
    """Also where the configuration names a base that is on no disk here."""
    from transformers import AutoModelForCausalLM

    from shira.serving.catalogue import Catalogue, shapes_of
    from shira.serving.resident import Resident

    folder, base = beside_its_base
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "somewhere/else"}))
    alone = Catalogue(tmp_path, ["model"])
    alone.scan()
    assert "poet" not in alone.versions
    served = Catalogue(tmp_path, ["model"], shapes_of(str(base)))
    served.scan()
    assert served.versions.keys() >= {"poet"} and served.inspect("poet")["nnz"] > 0
    model = AutoModelForCausalLM.from_pretrained(base)
    before = all_bits(model)
    resident = Resident(model, tmp_path)
    resident.use(served.resolve("poet").key)
    assert not same_bits(all_bits(model), before)
    resident.use("")
    assert same_bits(all_bits(model), before)
