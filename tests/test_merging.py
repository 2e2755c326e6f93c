import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import shira
from conftest import all_bits, bits, llama_batches, mlp, random_adapter, same_bits
from shira import AdapterError, BaseMismatch, CheckpointError, FormatError, SparseTensor, Switcher
from shira.checkpoints import merging
from shira.integrations.transformers import load_model

STRENGTHS = st.sampled_from([1.0, 0.5, -0.25, 0.0, 2.0])


@given(
    alpha=STRENGTHS,
    beta=STRENGTHS,
    kind=st.sampled_from(["overwrite", "delta"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    chunk=st.sampled_from([7, 64, 2**20]),
)
@settings(max_examples=40)
def test_a_merged_checkpoint_has_the_bits_of_the_switcher(alpha, beta, kind, dtype, chunk):
    model = mlp(dtype)
    adapters = {"a": (random_adapter(model, 1), alpha), "b": (random_adapter(model, 2, kind=kind), beta)}
    switcher = Switcher(model)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        save_file(model.state_dict(), Path(folder, "base.safetensors"))
        patch.setattr(merging, "CHUNK", chunk)
        shira.merge(Path(folder, "base.safetensors"), adapters, Path(folder, "out"))
        merged = load_file(Path(folder, "out", "base.safetensors"))
    for name, (adapter, _) in adapters.items():
        switcher.add(name, adapter)
    switcher.use({name: strength for name, (_, strength) in adapters.items()})
    assert same_bits(all_bits(model), {name: bits(tensor) for name, tensor in merged.items()})


@pytest.fixture
def folder(tmp_path, tiny_llama):
    """A sharded checkpoint with what lies beside one, and an adapter of it."""
    base = tmp_path / "base"
    tiny_llama.to(torch.bfloat16).save_pretrained(base, max_shard_size="5KB")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A tiny model\n")
    (base / "tokenizer.json").write_text("{}")
    (base / "pytorch_model.bin").write_bytes(b"old weights")
    (base / "pytorch_model.bin.index.json").write_text("{}")
    (base / "onnx").mkdir()
    adapter = random_adapter(tiny_llama, 1, density=0.05)
    for untouched in [name for name in adapter.tensors if "layers.1" in name]:
        del adapter.tensors[untouched], adapter.metadata["fingerprints"][untouched]
    adapter.metadata["license"] = "MIT"
    adapter.save(tmp_path / "poet.safetensors")
    return tmp_path


def test_changes_that_rounding_takes_away_are_counted(folder, run):
    base = load_model(str(folder / "base"))
    name = "model.layers.0.mlp.up_proj.weight"
    weight = base.get_parameter(name).detach().view(-1)
    large = weight.abs().topk(8).indices.sort().values  # in bfloat16 a step is at least 1/512 of the value
    changes = weight[large].float() * torch.tensor([1e-4, 1e-4, 0.1, 0.1, 1e-3, 1e-3, 1.0, -2.0])
    delta = shira.SparseTensor(tuple(base.get_parameter(name).shape), large, changes, "delta")
    stayed = shira.merge(folder / "base", shira.Adapter({name: delta}), folder / "rounded")
    assert stayed == 4
    assert "4 entries have the value of the base" in (folder / "rounded" / "README.md").read_text()
    shira.Adapter({name: delta}).save(folder / "delta.safetensors")
    code, out, _ = run(f"merge {folder}/base {folder}/delta.safetensors -o {folder}/merged")
    assert code == 0 and "4 entries have the value of the base" in out


def test_a_merged_folder_loads_and_computes_what_the_switcher_does(folder):
    seen = []
    shira.merge(folder / "base", folder / "poet.safetensors", folder / "out", on_progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 1.0
    merged, model = load_model(str(folder / "out")), load_model(str(folder / "base"))
    switcher = Switcher(model)
    switcher.add("poet", folder / "poet.safetensors")
    switcher.use("poet")
    assert same_bits(all_bits(merged), all_bits(model))
    (batch,) = llama_batches(1)
    with torch.no_grad():
        assert torch.equal(bits(merged(**batch).logits), bits(model(**batch).logits))
    kept = {path.name for path in (folder / "base").iterdir()} - {"pytorch_model.bin", "pytorch_model.bin.index.json", "onnx"}
    assert {path.name for path in (folder / "out").iterdir()} == kept
    adapter, unlike = shira.load(folder / "poet.safetensors"), set()
    for name in kept - {"README.md"}:
        if (folder / "out" / name).read_bytes() != (folder / "base" / name).read_bytes():
            unlike.add(name)
    shards = {name: load_file(folder / "base" / name).keys() for name in kept if name.endswith(".safetensors")}
    assert unlike == {name for name, tensors in shards.items() if tensors & adapter.tensors.keys()} != shards.keys()
    card = (folder / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n---\n# A tiny model\n")
    assert f"| poet.safetensors | 1 | {adapter.nnz} | {adapter.fingerprint} | MIT |" in card


def test_strengths_by_pattern_are_those_of_the_switcher(folder):
    strengths = {str(folder / "poet.safetensors"): {"*": 0.5, "*.mlp.*": -1.0}}
    shira.merge(folder / "base", strengths, folder / "out")
    merged, model = load_model(str(folder / "out")), load_model(str(folder / "base"))
    switcher = Switcher(model)
    switcher.add(str(folder / "poet.safetensors"), folder / "poet.safetensors")
    switcher.use(strengths)
    assert same_bits(all_bits(merged), all_bits(model))
    assert '{"*": 0.5, "*.mlp.*": -1.0}' in (folder / "out/README.md").read_text()


def test_extracting_from_a_merged_folder_gives_the_adapter_again(folder):
    shira.merge(folder / "base", folder / "poet.safetensors", folder / "out")
    again, adapter = shira.extract(folder / "base", folder / "out"), shira.load(folder / "poet.safetensors")
    assert again.fingerprint == adapter.fingerprint
    for name, tensor in adapter.tensors.items():
        assert torch.equal(tensor.indices, again.tensors[name].indices)
        assert torch.equal(bits(tensor.values), bits(again.tensors[name].values))
    weaker = {"poet": (adapter, 0.0)}
    shira.merge(folder / "base", weaker, folder / "same")
    with pytest.raises(CheckpointError, match="differs nowhere"):
        shira.extract(folder / "base", folder / "same", density=0.1)


def break_file(path, how):
    """Make one thing wrong with a safetensors file or an index."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if path.suffix == ".json":
        index = json.loads(content)
        how(index)
        path.write_text(json.dumps(index))
    elif how == "cut":
        path.write_bytes(content[: len(content) - 3])
    elif how == "longer":
        path.write_bytes(content + b"\0")
    elif isinstance(how, bytes):
        path.write_bytes(how)
    else:
        header = json.loads(content[8 : 8 + length])
        how(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


NORM = "model.norm.weight"
BAD_INDEX = [
    (lambda index: index["weight_map"].update(more="gone.safetensors"), "names files that are not there: gone.safetensors"),
    (lambda index: index["weight_map"].update({NORM: "../poet.safetensors"}), "must lie in a file of the same folder"),
    (lambda index: index["weight_map"].update(more=index["weight_map"][NORM]), "'more' should be in .*, it is in no file"),
    (lambda index: index.pop("weight_map"), "is malformed .*weight_map"),
    (lambda index: index.update(weight_map=[1]), "is malformed"),
]
BAD_FILE = [
    ("cut", "should have .* bytes, it has"),
    ("longer", "should have .* bytes, it has"),
    (b"", "is malformed"),
    (b"\xff" * 9, "is malformed .*a header of 18446744073709551615 bytes in a file of 9"),
    ((2000).to_bytes(8, "little") + b"{", "is malformed .*a header of 2000 bytes in a file of 9"),
    ((2).to_bytes(8, "little") + b"[]", "is malformed"),
    ((9).to_bytes(8, "little") + b'{"a": [1}', "is malformed"),
    (lambda header: header[NORM].update(shape=[25]), f"tensor '{NORM}': 48 bytes for BF16"),
    (lambda header: header[NORM].update(shape=[-24]), f"tensor '{NORM}': shape"),
    (lambda header: header[NORM].update(shape="many"), "is malformed"),
    (lambda header: header[NORM].update(data_offsets=[8, 56]), f"'{NORM}' should begin at"),
    (lambda header: header[NORM].update(data_offsets=[10**12, 10**12 + 48]), "should begin at"),
    (lambda header: header[NORM].pop("dtype"), "is malformed .KeyError: 'dtype'"),
]


@pytest.mark.parametrize(("how", "message"), BAD_INDEX + BAD_FILE)
def test_malformed_checkpoints_are_refused(folder, how, message):
    index = folder / "base" / "model.safetensors.index.json"
    shard = folder / "base" / json.loads(index.read_text())["weight_map"][NORM]
    break_file(index if (how, message) in BAD_INDEX else shard, how)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(CheckpointError, match=message):
        shira.merge(folder / "base", folder / "poet.safetensors", folder / "out")
    with pytest.raises(CheckpointError, match=message):
        shira.extract(folder / "base", folder / "base", density=0.1)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_what_is_no_checkpoint(folder):
    def refuse(base, message, error=CheckpointError):
        with pytest.raises(error, match=message):
            shira.merge(base, folder / "poet.safetensors", folder / "out")
        assert not (folder / "out").exists()

    refuse(folder / "nowhere", "nowhere", OSError)
    refuse(folder / "base" / "config.json", "expected a folder or a .safetensors file")
    (folder / "empty").mkdir()
    refuse(folder / "empty", "found none")
    (folder / "empty" / "pytorch_model.bin").write_bytes(b"")
    refuse(folder / "empty", "pytorch_model.bin is a pickle, which may run code: load that model and save it as safetensors")
    shards = sorted((folder / "base").glob("*.safetensors"))
    for shard in shards[:2]:
        shutil.copy(shard, folder / "empty")
    refuse(folder / "empty", "holds 2 safetensors files and no index")
    shutil.copy(folder / "base" / "model.safetensors.index.json", folder / "base" / "other.safetensors.index.json")
    refuse(folder / "base", "holds several indices")


def test_a_tensor_in_two_shards(folder):
    index = folder / "base" / "model.safetensors.index.json"
    shard = json.loads(index.read_text())["weight_map"][NORM]
    shutil.copy(folder / "base" / shard, folder / "base" / "more.safetensors")
    break_file(index, lambda content: content["weight_map"].update(more="more.safetensors"))
    with pytest.raises(CheckpointError, match="is in two files, .* and more.safetensors|should be in more.safetensors"):
        shira.merge(folder / "base", folder / "poet.safetensors", folder / "out")


def test_adapters_that_cannot_be_merged(folder):
    adapter = shira.load(folder / "poet.safetensors")
    other = shira.Adapter({NORM: SparseTensor((24,), torch.tensor([0]), torch.ones(1))}, {"fingerprints": {NORM: "0" * 32}})
    huge = shira.Adapter({NORM: SparseTensor((24,), torch.tensor([0]), torch.tensor([3e38]), "delta")})
    cases = [
        (other, BaseMismatch, f"the base values under '{NORM}' have fingerprint"),
        (shira.Adapter({"w": adapter.tensors[min(adapter.tensors)]}), BaseMismatch, "no tensor 'w'"),
        (shira.Adapter({NORM: SparseTensor((25,), torch.tensor([0]), torch.ones(1))}), BaseMismatch, r"has shape \[24\]"),
        ({"huge": (huge, 2.0)}, AdapterError, f"'{NORM}' would overflow"),
        ({"poet": (adapter, float("nan"))}, AdapterError, "strength of 'poet' must be a finite number"),
        ({}, AdapterError, "nothing to merge"),
        (folder / "base" / "config.json", FormatError, "not a whole safetensors file"),
        (folder / "none.safetensors", OSError, "none.safetensors"),
    ]
    before = sorted(path.name for path in folder.iterdir())
    for given_, error, message in cases:
        with pytest.raises(error, match=message):
            shira.merge(folder / "base", given_, folder / "out")
        assert sorted(path.name for path in folder.iterdir()) == before


def test_nothing_is_overwritten_and_nothing_left_behind(folder, monkeypatch):
    poet = folder / "poet.safetensors"
    for taken in (folder / "base", poet):
        with pytest.raises(CheckpointError, match="exists; name a folder that does not"):
            shira.merge(folder / "base", poet, taken)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(OSError, match="cannot write .*no/where.*No such file"):
        shira.merge(folder / "base", poet, folder / "no" / "where")

    def full(_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):  # while files are written, and at the very end
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full if name == "fsync" else lambda *_: full(0))
            with pytest.raises(OSError, match="cannot write .*out .No space left on device.; nothing was left there"):
                shira.merge(folder / "base", poet, folder / "out")
        assert sorted(path.name for path in folder.iterdir()) == before
    (folder / "out").mkdir()  # empty: nothing to lose
    shira.merge(folder / "base", poet, folder / "out")
    assert load_model(str(folder / "out"))
