"""Weight patches of RL trainers: files laid out as TRL, slime and verl lay them out, read, applied and written."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import shira
from conftest import all_bits, bits, mlp, random_adapter, same_bits
from families import SMALL, llama, mixtral
from shira import Adapter, AdapterError, BaseMismatch, FormatError, SparseTensor, Switcher
from shira.files import patches
from shira.integrations import rl_patches

CUDA = torch.cuda.is_available()
WIDE = (3, 200_000)  # where gaps above 65,535 are possible
TENSORS = {  # name -> shape, positions, values
    "a.weight": ((4, 5), [0, 7, 8, 19], [1.0, -0.0, 3.5, 1e-8]),
    "b.weight": (WIDE, [5, 65_541, 65_542, 400_000], [0.5, -2.0, 4.0, 1.0]),  # gaps 5, 65,535, 0, 334,457
    "b.bias": ((6,), [5], [7.0]),
}


def gaps(positions):
    """Gaps as all of them define them: from the position before, 0 for the next one; at first from -1."""
    found = [position - before - 1 for before, position in zip([-1, *positions], positions, strict=False)]
    return torch.tensor(found, dtype=torch.int64).to(torch.uint16 if max(found, default=0) <= 65535 else torch.uint32)


def as_trl(path, tensors=TENSORS, encoding="gap_delta", **metadata):
    """As `encode_patch` and `PatchMetadata` of TRL's trl/experimental/async_grpo/delta_engine.py lay it out."""
    held = {}
    for name, (_, positions, values) in tensors.items():
        held[f"{name}.val"] = torch.tensor(values, dtype=torch.bfloat16)
        held[f"{name}.idx"] = torch.tensor(positions, dtype=torch.int32) if encoding == "raw" else gaps(positions)
    facts = {"format": "sparse_weight_patch", "version": "1", "sparse": "True", "model_version": "3", "num_changed_params": "3"}
    facts |= {"total_changed_elements": "9", "total_elements": "600026", "sparsity": "0.99", "encoding": encoding}
    save_file(held, path, facts | metadata)
    return path


def manifest(tensors, encoding):
    """Positions, values and params as slime's DeltaBucket and verl's DeltaFlush lay them out."""
    blobs, values, params = [], [], []
    at = value_at = 0
    for name, (shape, positions, held) in tensors.items():
        where = torch.tensor(positions, dtype=torch.int32) if encoding == "indices" else gaps(positions)
        blobs.append(where.view(torch.uint8))
        values.append(torch.tensor(held, dtype=torch.bfloat16))
        end, value_end = at + where.nbytes, value_at + len(held)
        places = {
            "pos_start": at,
            "pos_end": end,
            "pos_width": where.element_size(),
            "val_start": value_at,
            "val_end": value_end,
        }
        params.append({"name": name, "dtype": "bfloat16", "shape": list(shape)} | places)
        at, value_at = end, value_end
    return torch.cat(blobs), torch.cat(values), params


def summed(positions, values):
    sums = [int(torch.hash_tensor(each).item()) for each in (positions, values)]
    return sums[0] ^ (sums[1] << 1)


def as_slime(path, tensors=TENSORS, encoding="deltas", **metadata):
    """As `_flush_bucket` of slime's update_weight_from_distributed_delta.py writes it for the transport "disk"."""
    positions, values, params = manifest(tensors, encoding)
    facts = {"encoding": encoding, "params": json.dumps(params), "current_version": "7"}
    save_file(
        {"__positions__": positions, "__values__": values},
        path,
        facts | {"checksum": str(summed(positions, values))} | metadata,
    )
    return path


def as_verl(path, tensors=TENSORS, **changes):
    """What `receive_weights` of verl's delta_checkpoint_engine.py yields for a flush, saved as a file."""
    positions, values, params = manifest(tensors, "indices")
    spec = {"encoding": "indices", "params": params, "checksum": summed(positions, values)} | changes
    held = {"__delta_spec__": torch.frombuffer(bytearray(json.dumps(spec).encode()), dtype=torch.uint8)}
    save_file(held | {"__positions__": positions, "__values__": values}, path)
    return path


def expected(tensors=TENSORS):
    return {
        name: SparseTensor(shape, torch.tensor(positions), torch.tensor(values, dtype=torch.bfloat16))
        for name, (shape, positions, values) in tensors.items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(
        (each.shape, each.kind, each.values.dtype) == (other[name].shape, other[name].kind, other[name].values.dtype)
        and torch.equal(each.indices, other[name].indices)
        and torch.equal(bits(each.values), bits(other[name].values))
        for name, each in one.items()
    )


@pytest.mark.parametrize("encoding", ["raw", "gap_delta"])
def test_trl(encoding, tmp_path):
    path = as_trl(tmp_path / "patch.safetensors", encoding=encoding)
    with pytest.raises(FormatError, match=r"of TRL \(9 entries in 3 tensors, .*version '3'\), which holds no shapes.*--base"):
        shira.load(path)
    base = {name: torch.randn(shape).bfloat16() for name, (shape, _, _) in TENSORS.items()}
    save_file(base, tmp_path / "base.safetensors")
    adapter = rl_patches.load(path, tmp_path / "base.safetensors")
    assert same(adapter.tensors, expected())
    assert adapter.metadata["training"] == {"patch": "trl", "version": "3"} and len(adapter.fingerprints) == 3
    shira.merge(tmp_path / "base.safetensors", adapter, tmp_path / "out")
    merged = load_file(tmp_path / "out/base.safetensors")
    for name, tensor in expected().items():
        base[name].view(-1)[tensor.indices.long()] = tensor.values
        assert torch.equal(bits(merged[name]), bits(base[name]))
    base["a.weight"][0, 0] += 1
    save_file(base, tmp_path / "other.safetensors")
    with pytest.raises(BaseMismatch, match="the base values under 'a.weight'"):
        shira.merge(tmp_path / "other.safetensors", adapter, tmp_path / "again")


@pytest.mark.parametrize("encoding", ["indices", "deltas", "deltas_zstd"])
def test_slime(encoding, tmp_path):
    adapter = shira.load(as_slime(tmp_path / "patch.safetensors", encoding=encoding))
    assert same(adapter.tensors, expected())
    assert adapter.metadata == {"name": "patch", "training": {"patch": "slime", "version": "7"}}


def test_a_folder_of_slime(tmp_path):
    """Each rank and flush of a sync is a file of its own."""
    folder = tmp_path / "weight_v000007"
    folder.mkdir()
    names = list(TENSORS)
    as_slime(folder / "rank0000_flush000000.safetensors", {name: TENSORS[name] for name in names[:2]})
    as_slime(folder / "rank0001_flush000000.safetensors", {name: TENSORS[name] for name in names[2:]}, "indices")
    assert same(shira.load(folder).tensors, expected())
    as_slime(folder / "rank0001_flush000001.safetensors", {names[0]: TENSORS[names[0]]}, current_version="8")
    with pytest.raises(FormatError, match="several versions .7, 8., which follow one another"):
        shira.load(folder)


def test_verl(tmp_path):
    adapter = shira.load(as_verl(tmp_path / "patch.safetensors"))
    assert same(adapter.tensors, expected()) and adapter.metadata["training"] == {"patch": "verl"}
    positions, values, params = manifest({"b.weight": TENSORS["b.weight"]}, "indices")
    halves = [params[0] | {"pos_end": 8, "val_end": 2}, params[0] | {"pos_start": 8, "val_start": 2}]  # a long one is sent so
    spec = {"encoding": "indices", "params": halves}
    held = {"__positions__": positions, "__values__": values}
    save_file(held | {"__delta_spec__": torch.tensor(list(json.dumps(spec).encode()), dtype=torch.uint8)}, tmp_path / "halves")
    assert same(shira.load(tmp_path / "halves").tensors, {"b.weight": expected()["b.weight"]})
    dense = {"encoding": "dense", "params": [{**params[0], "shape": [2, 2], "pos_end": 0, "pos_width": 0}]}
    spec = torch.tensor(list(json.dumps(dense).encode()), dtype=torch.uint8)
    save_file({"__values__": values, "__delta_spec__": spec}, tmp_path / "dense")
    assert shira.load(tmp_path / "dense").tensors["b.weight"].indices.tolist() == [0, 1, 2, 3]


def test_a_tensor_that_trl_sends_whole(tmp_path):
    path = tmp_path / "patch.safetensors"
    as_trl(path, {"a.weight": TENSORS["a.weight"]}, shapes='{"a.weight": [4, 5]}')
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    save_file(load_file(path) | {"norm": torch.ones(2, 3)}, path, facts)
    whole = shira.load(path).tensors["norm"]
    assert (whole.shape, whole.nnz) == ((2, 3), 6)
    save_file({"norm": torch.ones(3)}, path, facts | {"sparse": "False"})
    with pytest.raises(FormatError, match="anchor of TRL"):
        shira.load(path)


def test_a_patch_is_an_adapter_everywhere(tmp_path, run):
    model = mlp()
    adapter = Adapter(random_adapter(model, 1).tensors)
    patch = tmp_path / "patch.safetensors"
    rl_patches.save(adapter, patch, "slime")
    switcher, other = Switcher(model), Switcher(again := mlp())
    switcher.add("x", patch)
    other.add("x", adapter)
    for strength in (1.0, 0.5):
        switcher.use({"x": strength})
        other.use({"x": strength})
        assert same_bits(all_bits(model), all_bits(again))
    switcher.use(None)
    fused = shira.fuse({patch: 0.5}, model)
    assert same(fused.tensors, shira.fuse({"x": (adapter, 0.5)}, model).tensors)
    code, out, err = run(f"inspect {patch} --tensors")
    assert code == 0 and "patch slime" in " ".join(out.split()), err
    assert shira.compare(patch, base=model).tensors.keys() == adapter.tensors.keys()


@pytest.mark.parametrize("layout", rl_patches.LAYOUTS)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_round_trips_are_exact(layout, tmp_path, data):
    tensors = {}
    for number in range(data.draw(st.integers(0, 3))):
        shape = data.draw(st.sampled_from([(7, 5), WIDE, (40,), (2, 3, 4)]))
        numel = torch.Size(shape).numel()
        where = sorted(data.draw(st.sets(st.integers(0, numel - 1), max_size=9)))
        dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
        values = torch.randn(len(where)).to(dtype)
        tensors[f"{number}.weight"] = SparseTensor(shape, torch.tensor(where, dtype=torch.int64), values)
    positions = data.draw(st.sampled_from(["raw"] if layout == "verl" else ["raw", "gap"]))
    rl_patches.save(Adapter(tensors), tmp_path / "patch", layout, positions=positions)
    assert same(shira.load(tmp_path / "patch").tensors, tensors)


def test_what_is_written_is_what_they_write(tmp_path):
    """Tensor by tensor the content of files in their layout; TRL's has the shapes beside it, in metadata that TRL ignores."""
    adapter = Adapter(expected())
    for layout, positions, theirs in [
        ("trl", "raw", lambda path: as_trl(path, encoding="raw")),
        ("trl", "gap", as_trl),
        ("slime", "raw", lambda path: as_slime(path, encoding="indices")),
        ("slime", "gap", as_slime),
        ("verl", "raw", as_verl),
    ]:
        rl_patches.save(adapter, tmp_path / "ours", layout, positions=positions, version=7 if layout == "slime" else 3)
        theirs(tmp_path / "theirs")
        ours, given_ = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
        assert ours.keys() == given_.keys()
        for name, tensor in ours.items():
            if name == "__delta_spec__":
                assert json.loads(tensor.numpy().tobytes()) == json.loads(given_[name].numpy().tobytes())
            else:
                assert tensor.dtype == given_[name].dtype and torch.equal(bits(tensor), bits(given_[name]))
        with safe_open(tmp_path / "ours", "pt") as one, safe_open(tmp_path / "theirs", "pt") as other:
            known = one.metadata() or {}
            assert (other.metadata() or {}).keys() == known.keys() - {"shapes"}
            for key in known.keys() & {"format", "version", "sparse", "encoding", "checksum", "current_version", "params"}:
                assert known[key] == other.metadata()[key], key


def test_names_in_memory_and_in_the_checkpoint(tmp_path):
    """slime sends the checkpoint's names, TRL those in memory; the base gives the others."""
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    transformers.GPT2Model(transformers.GPT2Config(vocab_size=31, **sizes)).save_pretrained(tmp_path / "base")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "base/config.json").write_text(json.dumps(config))  # as on the hub
    adapter = random_adapter(model, 1, density=0.05)
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if not name.startswith("lm_head")}
    adapter = Adapter(tensors, {"fingerprints": {name: adapter.fingerprints[name] for name in tensors}})
    for layout in ("slime", "trl"):
        rl_patches.save(adapter, tmp_path / "patch", layout, base=tmp_path / "base")
        assert any(name.startswith("h.0") for name in shira.load(tmp_path / "patch").tensors) == (layout == "slime")
        for base in (tmp_path / "base", model):
            back = rl_patches.load(tmp_path / "patch", base)
            assert same(back.tensors, tensors) and back.fingerprints == adapter.fingerprints
    shira.merge(tmp_path / "base", adapter, tmp_path / "one")
    rl_patches.save(adapter, tmp_path / "patch", "slime", base=tmp_path / "base")
    shira.merge(tmp_path / "base", tmp_path / "patch", tmp_path / "two")  # without conversion
    merged = [load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two")]
    assert same_bits({name: bits(tensor) for name, tensor in merged[0].items()}, {n: bits(t) for n, t in merged[1].items()})


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="needs a GPU"))])
@pytest.mark.parametrize("kind", ["overwrite", "delta"])
def test_a_base_on_another_device_than_the_adapter(kind, device, tmp_path):
    model = mlp()
    adapter = random_adapter(model, 1, density=0.1, kind=kind)
    rl_patches.save(adapter, tmp_path / "expected", "trl", base=model)
    rl_patches.save(adapter, tmp_path / "patch", "trl", base=model.to(device))
    assert same(shira.load(tmp_path / "patch").tensors, shira.load(tmp_path / "expected").tensors)
    assert rl_patches.load(tmp_path / "patch", model).fingerprints
    with pytest.raises(
        BaseMismatch, match="must be a floating-point tensor with data, found one without data, on the meta device"
    ):
        rl_patches.save(adapter, tmp_path / "none", "trl", base=model.to("meta"))
    assert not (tmp_path / "none").exists()


def test_experts_that_are_joined_in_memory(tmp_path):
    pytest.importorskip("transformers")
    mixtral(1).save_pretrained(tmp_path / "base")
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    shape = (SMALL["intermediate_size"], SMALL["hidden_size"])
    path = as_slime(tmp_path / "patch", {name: (shape, [3, 9], [1.0, 2.0])})
    with pytest.raises(BaseMismatch, match=r"it is a part of 'model.layers.0.mlp.experts.gate_up_proj'. Merge the patch"):
        rl_patches.load(path, tmp_path / "base")
    shira.merge(tmp_path / "base", path, tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors")[name].view(-1)[[3, 9]].tolist() == [1.0, 2.0]


def test_the_command(tmp_path, run):
    pytest.importorskip("transformers")
    model = llama(1)
    model.save_pretrained(tmp_path / "base")
    adapter = random_adapter(model, 1, density=0.05)
    adapter.save(tmp_path / "mine.safetensors")
    for to, options in {"trl": "--positions raw", "slime": "", "verl": ""}.items():
        patch = tmp_path / f"{to}.safetensors"
        code, out, err = run(f"convert {tmp_path}/mine.safetensors --to {to} {options} -o {patch}")
        assert code == 0 and f"{adapter.nnz:,} entries" in out, err
        code, _, err = run(f"convert {patch} -o {patch}")
        assert code == 1 and "is there already, and would be lost; give another name, or replace it with --force" in " ".join(
            err.split()
        )
        code, out, err = run(f"convert {patch} --base {tmp_path}/base -o {tmp_path}/back-{to}.safetensors")
        assert code == 0 and "exactly as in the patch" in " ".join(out.split()), err
        back = shira.load(tmp_path / f"back-{to}.safetensors")
        assert same(back.tensors, adapter.tensors) and back.fingerprints == adapter.fingerprints
    code, out, err = run(f"convert {patch} -o {tmp_path}/unchecked.safetensors --name seven")
    assert code == 0 and "without fingerprints" in " ".join(out.split()), err
    assert shira.load(tmp_path / "unchecked.safetensors").name == "seven"
    code, _, err = run(f"convert {patch} --density 0.1 -o {tmp_path}/x.safetensors")
    assert code == 1 and "a weight patch is taken whole: leave it out" in " ".join(err.split())


def test_what_cannot_be_written(tmp_path):
    delta = Adapter({"w": SparseTensor((4,), torch.tensor([1]), torch.ones(1), "delta")})
    with pytest.raises(AdapterError, match=r"'w' holds differences, and a patch holds new values: give the model"):
        rl_patches.save(delta, tmp_path / "x", "trl")
    save_file({"w": torch.ones(4)}, tmp_path / "base.safetensors")
    rl_patches.save(delta, tmp_path / "x", "trl", base=tmp_path / "base.safetensors")
    assert shira.load(tmp_path / "x").tensors["w"].values.tolist() == [2.0]
    with pytest.raises(AdapterError, match="verl takes raw positions alone"):
        rl_patches.save(delta, tmp_path / "y", "verl", positions="gap")
    with pytest.raises(AdapterError, match="did you mean 'slime'"):
        rl_patches.save(delta, tmp_path / "y", "slim")
    far = Adapter({"w": SparseTensor((2**31, 2**10), torch.tensor([2**40]), torch.ones(1))})
    for positions, words in {"raw": "more than int32 positions can tell apart", "gap": "a gap of 2.32 or more"}.items():
        with pytest.raises(AdapterError, match=words):
            rl_patches.save(far, tmp_path / "y", "slime", positions=positions)
    assert not (tmp_path / "y").exists()


def test_what_has_to_be_done_first(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(patches.ZSTD + bytes(100))
    with pytest.raises(FormatError, match="compressed with zstd.*zstd -d <"):
        shira.load(tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="expected version '1' with 'raw' or 'gap_delta'"):
        shira.load(as_trl(tmp_path / "y", encoding="nvcomp_cascaded"))
    index = {"metadata": {"version": "000001", "delta_encoding": "xor", "compression_format": "zstd"}, "weight_map": {}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"w": torch.zeros(9, dtype=torch.uint8)}, tmp_path / "model-00000-of-00001.safetensors")
    (tmp_path / "x.safetensors").unlink()
    for path in (tmp_path, tmp_path / "model-00000-of-00001.safetensors"):
        with pytest.raises(FormatError, match="it is a delta of slime.*let slime apply it.*shira extract BASE APPLIED"):
            shira.load(path)


def test_the_page(tmp_path, monkeypatch, run):
    """docs/rl-patches.md: its commands and its snippet run, with patches in the layouts that it describes."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs/rl-patches.md").read_text(encoding="utf-8")
    model = llama(1)
    model.save_pretrained("my-model")
    tensors = {name: (each.shape, each.indices.tolist(), each.values.tolist()) for name, each in _small(model).items()}
    as_trl(Path("patch.safetensors"), tensors)
    Path("weight_v000007").mkdir()
    as_slime(Path("weight_v000007/rank0000_flush000000.safetensors"), tensors)
    commands = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(commands) >= 5
    for command in commands:
        program, _, line = command.partition(" ")
        code, _, err = run(line)
        assert (program, code) == ("shira", 0), f"{command}: {err}"
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(snippet, {"model": model})


def _small(model):
    return random_adapter(model, 1, density=0.02).tensors
