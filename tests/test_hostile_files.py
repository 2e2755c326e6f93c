"""Files that were made to do harm, or were damaged: each is read as what it says, or refused by us, at once."""

import json
import os
import random
import resource
import struct
import time

import pytest
import safetensors.torch
import torch
from torch import nn

import shira
from conftest import all_bits, bits, mlp, random_adapter, same_bits
from shira import Adapter, AdapterError, FormatError, ShiraError, SparseTensor, Switcher
from shira.adapter import opened
from shira.analysis.contents import describe
from shira.integrations.peft import save as save_for_peft

SECONDS, MEGABYTES = 5, 300  # that anything here may take: thousands of times what it needs
FORM = {"format": "shira", "format_version": "2", "encoding": "gap"}


def write(path, entries, arrays=(), metadata="{}", form=FORM):
    """A file of these descriptions and (name, dtype, shape, bytes) arrays, whatever they say."""
    header, content = {}, b""
    for name, dtype, shape, held in arrays:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(content), len(content) + len(held)]}
        content += held
    tensors = entries if isinstance(entries, str) else json.dumps(entries)
    header["__metadata__"] = form | {"tensors": tensors, "metadata": metadata}
    return put(path, json.dumps(header).encode(), content)


def put(path, header, content=b""):
    path.write_bytes(struct.pack("<Q", len(header)) + header + content)
    return path


def zeros(name, count, dtype="F32", size=4):
    return (name, dtype, [count], bytes(size * count))


def one(shape, positions="plain", count=1, index=("I32", 4), **more):
    """A tensor w of `count` zeros, with one index if its positions are plain."""
    entry = {"shape": shape, "kind": "delta", "positions": positions, **more}
    indices = [zeros("w.indices", 1, *index)] if isinstance(positions, str) else []
    return {"w": entry}, [*indices, zeros("w.values", count)]


def uses(path, model):
    """All that may be done with a file, one after the other."""
    return {
        "load": lambda: shira.load(path),
        "save": lambda: shira.load(path).save(path.with_name("again.safetensors")),
        "describe": lambda: json.dumps(describe(shira.load(path), path)),
        "fuse": lambda: shira.fuse({path: 0.5}),
        "fuse over": lambda: shira.fuse({path: 0.5}, model),
        "compare": lambda: shira.compare(path),
        "add": lambda: Switcher(model).add("x", path),
    }


def check(path, model=None):
    """Each use works or is refused by us, in bounded time and memory. Returns what was refused."""
    refused = {}
    for label, use in uses(path, model or mlp()).items():
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        try:
            use()
        except (ShiraError, OSError) as error:
            assert str(error).isprintable()
            refused[label] = error
        took = time.monotonic() - start
        grew = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert took < SECONDS and grew < MEGABYTES, f"{label}: {took:.1f} s, {grew:.0f} MB"
    return refused


def struct_rule(**options):
    return {"mask": "struct", "direction": "rows", "crc32": 0, **options}


def rand_rule(**options):
    return {"mask": "rand", "seed": 0, "crc32": 0, **options}


HUGE = "9" * 5000
DEEP = "[" * 500 + "]" * 500
RULES = [
    ([2**28, 0], struct_rule(frequency=1), 0),
    ([2**40, 0], struct_rule(frequency=1), 0),
    ([0, 2**40], struct_rule(frequency=1, direction="columns"), 0),
    ([2**40, 3], struct_rule(frequency=10, offset=5, direction="columns"), 3),
    ([2**40, 3], struct_rule(frequency=2**41, offset=2**40, direction="rows"), 3),
    ([2, 3], struct_rule(frequency=10, offset=5), 2),
    ([4, 4], struct_rule(frequency=2**63), 7),
    ([4, 4], struct_rule(frequency=2**100), 7),
    ([4, 4], struct_rule(frequency=True), 16),
    ([4, 4], struct_rule(frequency=2, offset=2**62), 7),
    ([2**31, 2**31], struct_rule(frequency=2**31), 4),
    ([2**31, 2**32], rand_rule(), 4),
    ([2**62], rand_rule(), 4),
    ([2**62], rand_rule(seed=True), 4),
    ([2**62], rand_rule(crc32=[0]), 4),
    ([], rand_rule(), 1),
    ([1] * 63, rand_rule(), 1),
]


@pytest.mark.parametrize(("shape", "rule", "count"), RULES)
def test_a_rule_takes_no_more_than_the_values_that_are_there(tmp_path, shape, rule, count):
    check(write(tmp_path / "x.safetensors", *one(shape, rule, count)))


SHAPES = [
    [2**63],
    [2**62, 2**62, 0],
    [2**62 + 1],
    [1] * 65,
    [0] * 100_000,
    [10**30, 10**30],
    "3",
    {"0": 3},
    None,
    [3, None],
    [[3]],
    [3.0],
    [True, 4],
    [-1],
]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_that_no_tensor_has_is_refused(tmp_path, shape):
    refused = check(write(tmp_path / "x.safetensors", *one(shape)))
    assert isinstance(refused["load"], FormatError) and "'w'" in str(refused["load"])
    header = {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    with pytest.raises(shira.CheckpointError):
        shira.merge(put(tmp_path / "base.safetensors", json.dumps(header).encode()), random_adapter(mlp(), 1), tmp_path / "out")


TEXTS = {
    "a number of thousands of digits": f'{{"w": {{"shape": [{HUGE}], "kind": "delta"}}}}',
    "such a float": f'{{"w": {{"shape": [1], "kind": "delta", "more": {HUGE}.5}}}}',
    "infinity": '{"w": {"shape": [1], "kind": "delta", "more": 1e999}}',
    "not a number": '{"w": {"shape": [1], "kind": "delta", "more": NaN}}',
    "deep": f'{{"w": {{"shape": [1], "kind": "delta", "more": {DEEP}}}}}',
    "deeper": "[" * 10**6,
    "a key twice": '{"w": {"shape": [1], "kind": "delta"}, "w": {"shape": [1], "kind": "delta"}}',
    "half a character": r'{"\ud800": {"shape": [1], "kind": "delta"}}',
    "a list": "[]",
    "nothing": "",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_json_that_means_harm_is_refused(tmp_path, text):
    _, arrays = one([1])
    for place in ("tensors", "metadata"):
        entries, metadata = (text, "{}") if place == "tensors" else (one([1])[0], text)
        refused = check(write(tmp_path / "x.safetensors", entries, arrays, metadata))
        assert isinstance(refused["load"], FormatError) and f"metadata '{place}'" in str(refused["load"])


HEADERS = {
    "a key twice": b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": 5}',
    "a long offset": b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [%s, %s]}}' % (b"9" * 4300, b"9" * 4300),
    "a large offset": b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [4611686018427387905, 4611686018427387905]}}',
    "no offsets": b'{"a": {"dtype": "F32", "shape": [0]}}',
    "offsets of another type": b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": "01"}}',
    "a dtype of another type": b'{"a": {"dtype": ["F32"], "shape": [0], "data_offsets": [0, 0]}}',
    "deep": b'{"a": %s}' % (b"[" * 10**5),
    "utf-16": '{"a": 5}'.encode("utf-16"),
    "a number": b"5",
    "metadata null": b'{"__metadata__": null}',
    "half a character": rb'{"\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
    "many sides": b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 0]}}' % b",".join([b"7" * 30] * 10**5),
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_that_means_harm_is_refused(tmp_path, header):
    refused = check(put(tmp_path / "x.safetensors", header))
    assert isinstance(refused["load"], FormatError) and "not a whole safetensors file" in str(refused["load"])
    with pytest.raises(shira.CheckpointError):
        shira.extract(tmp_path / "x.safetensors", tmp_path / "x.safetensors")


WRONG = [5, "x", [1], {"x": {"y": [1]}}, True, 1.5]
FIELDS = ["name", "license", "mask", "base", "training", "fused", "fingerprints", "extraction"]
INNER = ["mask.name", "mask.options", "base.id", "base.dtype", "fused.method", "fused.strengths", "fingerprints.w"]


@pytest.mark.parametrize("field", FIELDS + INNER)
def test_metadata_of_another_type_is_refused_or_read_by_everybody(tmp_path, field):
    entries, arrays = one([32, 16], kind="overwrite")
    outer, _, inner = field.partition(".")
    found = set()
    for wrong in WRONG:
        metadata = json.dumps({outer: {inner: wrong} if inner else wrong})
        refused = check(write(tmp_path / "x.safetensors", entries, arrays, metadata))
        found.add(isinstance(refused.get("load"), FormatError) and outer in str(refused["load"]))
    assert True in found  # some of them are of no type that fits


def test_an_adapter_in_memory_with_such_metadata_is_refused_where_they_are_asked_for(tmp_path):
    model = mlp()
    for metadata in ({"fingerprints": 5}, {"base": 5}, {"fingerprints": {"0.weight": 5}}, {"name": ["x"]}):
        adapter = Adapter(random_adapter(model, 1).tensors, metadata)
        for use in (
            lambda: Switcher(model).add("x", adapter),  # noqa: B023
            lambda: shira.fuse({"x": (adapter, 1.0)}, model),  # noqa: B023
            lambda: shira.compare(adapter, base=model),  # noqa: B023
        ):
            with pytest.raises(AdapterError, match="metadata"):
                use()
    Adapter(random_adapter(model, 1).tensors, {"mask": 3}).save(tmp_path / "a")  # what it says of a mask is of no use


def test_positions_far_apart_are_fused_without_walking_there(tmp_path):
    where = torch.tensor([3, 2**40, 2**50])
    far = Adapter({"w": SparseTensor((2**31, 2**31), where, torch.ones(3), "delta")})
    far.save(tmp_path / "far.safetensors")
    fused = shira.fuse({tmp_path / "far.safetensors": 0.5, "x": (far, 1.0)})
    assert fused.tensors["w"].indices.tolist() == where.tolist() and fused.tensors["w"].values.tolist() == [1.5] * 3
    with pytest.raises(AdapterError, match="pass base="):
        shira.compare(far)
    near = Adapter({"w": SparseTensor((2**31 - 1,), torch.tensor([0, 2**31 - 2]), torch.ones(2), "delta")})
    near.save(tmp_path / "near.safetensors")
    for method in ("sum", "mean", "max", "ties", "dare"):
        fused = shira.fuse({tmp_path / "near.safetensors": 0.5, "x": (near, 0.5)}, method=method)
        assert set(fused.tensors["w"].indices.tolist()) <= {0, 2**31 - 2}


def test_saving_a_shape_without_end_looks_for_no_rule_there(tmp_path):
    for options in ({}, {"offset": 2**39}, {"offset": -1}, {"offset": "x"}, 5):
        tensor = SparseTensor((2**40, 2), torch.tensor([5]), torch.ones(1), "delta")
        Adapter({"w": tensor}, {"mask": {"name": "struct", "options": options}}).save(tmp_path / "a")
        with safetensors.safe_open(tmp_path / "a", "pt") as file:
            entry = json.loads(file.metadata()["tensors"])["w"]
        assert entry["positions"] in ("plain", "gap")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "fifo", "folder", "loop", "self", "gone", "far", "é\udcff"])
def test_positions_are_not_borrowed_from_what_is_no_adapter_beside(tmp_path, name):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for link, target in (("loop", "loop"), ("self", "x.safetensors"), ("far", "/dev/zero")):
        (tmp_path / link).symlink_to(target)
    refused = check(write(tmp_path / "x.safetensors", *one([4, 4], {"file": name, "crc32": 0})))
    assert isinstance(refused["load"], FormatError)


def mutants(content, count):
    """A file damaged in many ways."""
    draw = random.Random(0)
    return (mutant(content, draw, number % 5) for number in range(count))


def swapped(value, draw):
    """The same JSON with one value, anywhere in it, another."""
    if isinstance(value, dict | list) and value and draw.random() < 0.85:
        place = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        copy = dict(value) if isinstance(value, dict) else list(value)
        copy[place] = swapped(copy[place], draw)
        return copy
    if isinstance(value, str) and value[:1] == "{" and draw.random() < 0.9:
        return json.dumps(swapped(json.loads(value), draw))
    return draw.choice(VALUES)


VALUES = [None, True, -1, 0, 1, 2**31, 2**63, 10**39, 1.5, "", "x", "gap", [], [1, 2], {}, {"mask": "rand"}, {"file": "x"}]


def mutant(content, draw, kind):
    """A damaged file. kind: of the damage, 0 to 4: bits, lengths, what its header says text by text, digits, value by value."""
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = content[8 : 8 + length], content[8 + length :]
    if kind == 0:
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        return bytes(damaged)
    if kind == 1:
        return content[: draw.randrange(len(content))] + bytes(draw.choice([0, 0, 1, 8]))
    if kind == 2:  # a header of another length, or with other signs
        text = bytearray(header)
        at = draw.randrange(len(text))
        text[at : at + draw.randint(0, 3)] = draw.choice([b"", b"9", b'"', b"\\", b"}", b"-", b"e9", b"\x00", b"\xff"])
        return struct.pack("<Q", draw.choice([len(text), len(text), length, 2**63])) + bytes(text) + rest
    if kind == 3:  # a number
        at = draw.choice([at for at, sign in enumerate(header) if chr(sign).isdigit()])
        text = header[:at] + draw.choice([b"0", b"7", b"99", b"-1", b"9" * 30, b"9" * 5000]) + header[at + 1 :]
        return struct.pack("<Q", len(text)) + text + rest
    text = json.dumps(swapped(json.loads(header), draw)).encode()
    return struct.pack("<Q", len(text)) + text + rest


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A model, and files of its adapters in all ways to say positions."""
    folder = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 40))
    for mask in ("rand", "struct", "wm"):
        with shira.attach(model, mask=mask, density=0.2, seed=3) as tuner:
            tuner.adapter(mask, license="MIT", training={"steps": 1}).save(folder / mask)
    adapter = shira.load(folder / "wm")
    adapter.save(folder / "beside", like=folder / "wm")
    delta = {name: SparseTensor(t.shape, t.indices, t.values, "delta") for name, t in adapter.tensors.items()}
    Adapter(delta, {"fused": {"method": "sum", "strengths": {"a": 1}}}).save(folder / "delta")
    return folder, model


@pytest.mark.parametrize("name", ["rand", "struct", "wm", "beside", "delta"])
def test_mutants_are_read_or_refused(originals, name):
    folder, model = originals
    base, refused = bits(model[0].weight), 0
    path = folder / "mutant"
    for content in mutants((folder / name).read_bytes(), 60):
        path.write_bytes(content)
        refused += bool(check(path, model))
    assert refused > 30  # most damage shows
    assert torch.equal(base, bits(model[0].weight))


def test_mutants_of_a_folder_of_peft_are_read_or_refused(tmp_path):
    """Its weights, and its configuration, which names the base on the disk."""
    model, folder = mlp(), tmp_path / "peft"
    base = all_bits(model)
    safetensors.torch.save_file(dict(model.state_dict()), tmp_path / "base.safetensors")
    metadata = {"base": {"id": str(tmp_path / "base.safetensors")}}
    save_for_peft(Adapter(random_adapter(model, 1, 0.1, "delta").tensors, metadata), folder)
    assert not check(folder, model) and shira.load(folder / "adapter_model.safetensors").nnz
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        whole, refused = (folder / name).read_bytes(), 0
        length = b"" if name.endswith(".safetensors") else struct.pack("<Q", len(whole))
        for content in mutants(length + whole, 25):
            (folder / name).write_bytes(content[len(length) :])
            refused += bool(check(folder, model))
        assert refused > 10
        (folder / name).write_bytes(whole)
    assert same_bits(base, all_bits(model))


def test_a_file_that_changes_while_it_is_open_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    adapter = random_adapter(mlp(), 1)
    adapter.save(path)
    status = path.stat()
    with pytest.raises(FormatError, match="changed while it was read"), opened(path) as held:
        assert len(held.tensors) == len(adapter.tensors)
        content = path.read_bytes()
        path.write_bytes(content)  # the same bytes, the same time: the inode still knows
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    random_adapter(mlp(), 1).save(path)
    random_adapter(mlp(), 2).save(other)
    wanted, read = shira.load(other), shira.files.reading.read_tensor

    def replacing(file, entry):
        if other.exists():
            os.replace(other, path)
        return read(file, entry)

    monkeypatch.setattr(shira.files.reading, "read_tensor", replacing)
    found = shira.load(path)
    assert all(torch.equal(bits(t.values), bits(found.tensors[name].values)) for name, t in wanted.tensors.items())
