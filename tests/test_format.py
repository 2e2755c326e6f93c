import errno
import hashlib
import json
import os
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import shira
from conftest import bits, mlp, random_adapter
from shira import Adapter, FormatError, SparseTensor
from shira.files.writing import saving


def write(path, tensors=None, header=None):
    """A file by hand: good but for what is given."""
    good = {"w.indices": torch.tensor([1, 5], dtype=torch.int32), "w.values": torch.ones(2)}
    plain = {
        "format": "shira",
        "format_version": "1",
        "encoding": "plain",
        "tensors": json.dumps({"w": {"shape": [3, 4], "kind": "overwrite"}}),
        "metadata": "{}",
    }
    chosen = {k: v for k, v in (good | (tensors or {})).items() if v is not None}
    safetensors.torch.save_file(chosen, path, {k: v for k, v in (plain | (header or {})).items() if v is not None})
    return path


def test_the_file_by_hand_is_good(tmp_path):
    adapter = shira.load(write(tmp_path / "a.safetensors"))
    assert adapter.tensors["w"].shape == (3, 4)
    assert adapter.tensors["w"].indices.tolist() == [1, 5]


@pytest.mark.parametrize(
    ("tensors", "header", "words"),
    [
        ({"w.indices": torch.tensor([5, 1], dtype=torch.int32)}, {}, r"'w'.*sorted"),
        ({"w.indices": torch.tensor([5, 5], dtype=torch.int32)}, {}, r"'w'.*unique"),
        ({"w.indices": torch.tensor([1, 12], dtype=torch.int32)}, {}, r"'w'.*0 to 11.*12"),
        ({"w.indices": torch.tensor([-1, 2], dtype=torch.int32)}, {}, r"'w'.*0 to 11"),
        ({"w.indices": torch.tensor([1, 5])}, {}, r"'w'.*must be int32, found int64"),
        ({"w.indices": torch.tensor([1.0, 5.0])}, {}, r"'w'.*must be int32, found float32"),
        ({"w.values": torch.tensor([1, 5])}, {}, r"'w'.*floating point"),
        ({"w.values": torch.tensor([1.0, float("nan")])}, {}, r"'w'.*finite, found nan"),
        ({"w.values": torch.ones(3)}, {}, r"'w'.*one length"),
        ({"w.values": None}, {}, r"missing: \['w.values'\]"),
        ({"v.values": torch.ones(1)}, {}, r"not described: \['v.values'\]"),
        ({}, {"format": None}, r"not a shira adapter"),
        ({}, {"format": "pt"}, r"not a shira adapter"),
        ({}, {"format_version": "4"}, r"format version '4'.*upgrade"),
        ({}, {"format_version": "3"}, r"format version '3' with encoding 'plain'.*upgrade"),
        ({}, {"metadata": json.dumps({"fingerprints": {"w": "md5:00"}})}, r"'md5:00' of 'w' is by an unknown hash; upgrade"),
        ({}, {"encoding": "zip"}, r"encoding 'zip'"),
        ({}, {"tensors": "{"}, r"'tensors' is not JSON"),
        ({}, {"tensors": "[" * 100_000}, r"'tensors' is not JSON"),
        ({}, {"tensors": "[]"}, r"must be a JSON object"),
        ({}, {"metadata": None}, r"'metadata' is not JSON"),
        ({}, {"tensors": json.dumps({"w": 3})}, r"'w'.*shape"),
        ({}, {"tensors": json.dumps({"w": {"shape": [3, "4"], "kind": "delta"}})}, r"'w'.*shape"),
        ({}, {"tensors": json.dumps({"w": {"shape": [3, True], "kind": "delta"}})}, r"'w'.*shape"),
        ({}, {"tensors": json.dumps({"w": {"shape": [3, -4], "kind": "delta"}})}, r"'w'.*shape"),
        ({}, {"tensors": json.dumps({"w": {"shape": [1, 4], "kind": "delta"}})}, r"'w'.*0 to 3"),
        ({}, {"tensors": json.dumps({"w": {"shape": [2**20, 2**20], "kind": "delta"}})}, r"'w'.*must be int64"),
        ({}, {"tensors": json.dumps({"w": {"shape": [3, 4]}})}, r"'w'.*kind"),
        ({}, {"tensors": json.dumps({"w": {"shape": [3, 4], "kind": ["delta"]}})}, r"'w'.*kind"),
    ],
)
def test_a_hostile_file_is_refused_with_its_name_and_reason(tmp_path, tensors, header, words):
    path = write(tmp_path / "evil.safetensors", tensors, header)
    with pytest.raises(FormatError, match=rf"(?s)evil\.safetensors.*{words}"):
        shira.load(path)


@settings(max_examples=60)
@given(data=st.data())
def test_a_truncated_or_flipped_file_is_refused_or_still_valid(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damage")
    content = bytearray(write(folder / "good.safetensors").read_bytes())
    if data.draw(st.booleans(), label="truncate"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "bad.safetensors").write_bytes(bytes(content))
    try:
        adapter = shira.load(folder / "bad.safetensors")
    except FormatError:
        return
    for tensor in adapter.tensors.values():  # a flipped value or position may leave a file that is valid: then all of it is
        SparseTensor(tensor.shape, tensor.indices, tensor.values, tensor.kind)


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    kind=st.sampled_from(["overwrite", "delta"]),
    data=st.data(),
)
def test_what_is_saved_comes_back_bit_for_bit(tmp_path_factory, shape, dtype, kind, data):
    numel = shape[0] * shape[1]
    positions = sorted(data.draw(st.sets(st.integers(0, numel - 1))))
    numbers = data.draw(
        st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=len(positions), max_size=len(positions))
    )
    values = torch.tensor(numbers, dtype=dtype)
    metadata = data.draw(st.dictionaries(st.text(), st.one_of(st.none(), st.integers(), st.text(), st.lists(st.booleans()))))
    saved = Adapter({"ä.weight": SparseTensor(shape, torch.tensor(positions, dtype=torch.int64), values, kind)}, metadata)
    path = tmp_path_factory.mktemp("round") / "a.safetensors"
    saved.save(path)
    loaded = shira.load(path)
    one, other = saved.tensors["ä.weight"], loaded.tensors["ä.weight"]
    assert loaded.metadata == saved.metadata
    assert (one.shape, one.kind, one.values.dtype) == (other.shape, other.kind, other.values.dtype)
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(bits(one.values), bits(other.values))


@pytest.mark.parametrize("kind", ["overwrite", "delta"])
def test_one_entry_whose_stride_is_not_one(tmp_path, kind):
    """torch calls such a tensor contiguous. Found by `make fuzz`."""
    one = SparseTensor((2, 2), torch.tensor(1).expand(1), torch.tensor(3.0).expand(1), kind)
    Adapter({"w": one}, {}).save(tmp_path / "a.safetensors")
    found = shira.load(tmp_path / "a.safetensors").tensors["w"]
    assert found.indices.tolist() == [1] and found.values.tolist() == [3.0]


def test_positions_beyond_two_to_the_31_round_trip(tmp_path):
    where = torch.tensor([0, 2**31, 2**33 - 1])
    Adapter({"big": SparseTensor((2**20, 2**13), where, torch.ones(3))}).save(tmp_path / "big.safetensors")
    tensor = shira.load(tmp_path / "big.safetensors").tensors["big"]
    assert tensor.indices.dtype == torch.int64
    assert torch.equal(tensor.indices, where)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        shira.load(tmp_path / "none.safetensors")


def test_metadata_that_is_no_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(shira.AdapterError, match="metadata"):
        Adapter({}, {"x": object()}).save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("said", [{"name": 7}, {"license": 3}, {"training": "3 epochs"}, {"training": ["a"]}], ids=str)
def test_a_tuner_makes_no_adapter_that_load_would_refuse(said):
    with shira.attach(mlp(), density=0.2) as tuner:
        with pytest.raises(shira.AdapterError, match=f"metadata '{next(iter(said))}' must be .*, found"):
            tuner.adapter(**said)
        assert tuner.adapter("poet", training={"epochs": 3}, license="MIT").name == "poet"


@pytest.mark.parametrize(
    ("part", "value", "words"), [("values", float("nan"), "finite, found nan"), ("indices", 10**6, r"unique|sorted|from 0 to")]
)
def test_a_tensor_that_was_made_invalid_in_memory_is_not_saved(tmp_path, part, value, words):
    adapter = random_adapter(mlp(), seed=1)
    getattr(adapter.tensors["2.weight"], part)[0] = value
    with pytest.raises(shira.AdapterError, match=rf"a\.safetensors: tensor '2\.weight' was changed in memory.*({words})"):
        adapter.save(tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []


def test_metadata_that_are_filled_while_tensors_are_written_are_checked_at_the_end(tmp_path):
    metadata = {}
    with (
        pytest.raises(shira.AdapterError, match="cannot be written as JSON: 'training': .*; give texts"),
        saving(tmp_path / "a", metadata) as add,
    ):
        add("0.weight", random_adapter(mlp(), seed=1).tensors["0.weight"])
        metadata["training"] = {"epochs": {3}}
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A limit on the file size makes the write fail half way, as a full disk does."""
    path = tmp_path / "a.safetensors"
    random_adapter(mlp(), seed=1).save(path)
    before = path.read_bytes()
    code = textwrap.dedent(
        f"""
        import resource, signal, torch, shira
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        big = shira.SparseTensor((1000, 1000), torch.arange(100_000), torch.ones(100_000))
        try:
            shira.Adapter({{"w": big}}).save({str(path)!r})
        except OSError as error:
            print(error.errno, error)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(errno.EFBIG))
    assert "any older file is intact" in done.stdout
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_saving_into_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing was written"):
        random_adapter(mlp(), seed=1).save(tmp_path / "none" / "a.safetensors")


def test_the_file_is_plain_safetensors(tmp_path):
    """Any safetensors reader gets positions and values without us."""
    adapter = random_adapter(mlp(torch.bfloat16), seed=1)
    adapter.save(tmp_path / "a.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert set(tensors) == {"0.weight.indices", "0.weight.values", "2.weight.indices", "2.weight.values"}
    stored = safetensors.torch.load_file(tmp_path / "a.safetensors")["0.weight.indices"]
    positions = torch.cumsum(stored.long() + 1, 0) - 1  # no gap here is as long as 255
    assert torch.equal(positions.int(), adapter.tensors["0.weight"].indices)


def as_version_2(path, base):
    """Rewrite a file as version 2 had it, with fingerprints by SHA-256."""
    adapter = shira.load(path)
    prints = {
        name: hashlib.sha256(base[name].view(-1)[tensor.indices.long()].float().numpy().tobytes()).hexdigest()[:32]
        for name, tensor in adapter.tensors.items()
    }
    with safetensors.safe_open(path, "pt") as file:
        header, content = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    assert header["format_version"] == "3"
    header |= {"format_version": "2", "metadata": json.dumps(adapter.metadata | {"fingerprints": prints})}
    safetensors.torch.save_file(content, path, header)


def test_files_with_sha_256_are_checked_beside_others_and_kept_when_saved_again(tmp_path):
    model, other = mlp(), mlp(seed=5)
    base = dict(model.named_parameters())
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    for seed, path in enumerate((old, new)):
        random_adapter(model, seed).save(path)
    as_version_2(old, {name: weight.detach() for name, weight in base.items()})
    loaded = shira.load(old)
    assert all(len(found) == 32 and ":" not in found for found in loaded.fingerprints.values())
    shira.Switcher(model).add("old", old)
    with pytest.raises(shira.BaseMismatch, match=r"have fingerprint [0-9a-f]{32}, the adapter says [0-9a-f]{32} "):
        shira.Switcher(other).add("old", old)
    fused = shira.fuse({old: 1.0, new: 0.5}, model)
    assert all(found.startswith("xxh3:") for found in fused.fingerprints.values())
    for method in ("sum", "ties"):  # in one pass in C, and through torch's operators
        with pytest.raises(shira.BaseMismatch, match=r"the adapter says [0-9a-f]{32} "):
            shira.fuse({old: 1.0}, other, method)
    loaded.save(tmp_path / "again.safetensors")
    again = shira.load(tmp_path / "again.safetensors")
    assert again.fingerprints == loaded.fingerprints
    shira.Switcher(mlp()).add("again", again)
