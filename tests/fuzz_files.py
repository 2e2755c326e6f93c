"""Mutants of adapters' files and of what is read as one: they are refused by us, or read as docs/format.md says, to the bit.

A case is a folder: file name -> bytes. In a folder of PEFT's, BASE stands for the path of the base's file.
"""

import functools
import io
import json
import re
import shutil
import struct
import tempfile
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import plain_reader
import shira
from conftest import all_bits, same_bits
from shira import Adapter, ShiraError, SparseTensor, Switcher
from shira.integrations import peft, rl_patches
from test_format import write
from test_format_positions import gaps
from test_hostile_files import check, mutant

ENDING = ".zip"
ADAPTER, CONFIG, WEIGHTS = "x.safetensors", "adapter_config.json", "adapter_model.safetensors"
BASE = "BASE"
UNITS = (0, 1, 7, 127, 128, 254, 255)


@functools.cache
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 12))


@functools.cache
def folder():
    return tempfile.TemporaryDirectory(prefix="shira-fuzz-")


@functools.cache
def base():
    """The file of that model's weights, until `close`."""
    path = Path(folder().name) / "base.safetensors"
    safetensors.torch.save_file(dict(model().state_dict()), path)
    return path


def close():
    """Remove what `base` has made."""
    if base.cache_info().currsize:
        folder().cleanup()
        folder.cache_clear()
        base.cache_clear()


@functools.cache
def seeds():
    """name -> case: valid files with every way to say positions, every dtype and version, patches, and PEFT's folders."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)

        def keep(label, *files):
            found[label] = {file.name: file.read_bytes() for file in files}

        path = place / ADAPTER
        for mask in ("rand", "struct", "wm"):
            with shira.attach(model(), mask=mask, density=0.2, seed=3) as tuner:
                tuner.adapter(mask, license="MIT", training={"steps": 1}).save(path)
            keep(mask, path)
        adapter = shira.load(path)
        path.replace(place / "lender")
        adapter.save(path, like=place / "lender")
        keep("lent", path, place / "lender")
        for kind, dtype in (("delta", torch.float32), ("delta", torch.bfloat16), ("overwrite", torch.float64)):
            tensors = {n: SparseTensor(t.shape, t.indices, t.values.to(dtype), kind) for n, t in adapter.tensors.items()}
            fused = {"fused": {"method": "sum", "strengths": {"a": 1}}, "base": {"id": "b", "dtype": ["float32"]}}
            Adapter(tensors, fused).save(path)
            keep(f"{kind} {dtype}", path)
        where = torch.tensor([3, 2**40, 2**50])
        empty = torch.tensor([], dtype=torch.int64)
        far = {"far": SparseTensor((2**31, 2**31), where, torch.ones(3), "delta")}
        Adapter(far | {"none": SparseTensor((0, 4), empty, torch.ones(0))}).save(path)
        keep("far", path)
        keep("version 1", write(path))
        keep("wide gaps", write(path, *gaps(torch.tensor([300, 65], dtype=torch.uint16))))
        keep("long gaps", write(path, *gaps(torch.tensor([255, 255, 0, 255, 1], dtype=torch.uint8))))
        delta = Adapter({n: SparseTensor(t.shape, t.indices, t.values.float(), "delta") for n, t in adapter.tensors.items()})
        for layout in rl_patches.LAYOUTS:
            rl_patches.save(adapter, path, layout)
            keep(layout, path)
        peft.save(delta, place / "peft")
        shira_config = json.loads((place / "peft" / CONFIG).read_text()) | {"base_model_name_or_path": BASE}
        found["peft"] = {CONFIG: dumped(shira_config), WEIGHTS: (place / "peft" / WEIGHTS).read_bytes()}
        few = {
            f"base_model.model.{n}": torch.arange(k) for n, k in (("0.supertuning_indices", 5), ("1.supertuning_indices", 3))
        }
        few |= {name.replace("indices", "values"): where.float() for name, where in few.items()}
        tuning = {"peft_type": "SUPERTUNING", "r": None, "sparsity": 0.99, "base_model_name_or_path": BASE}
        found["super-tuning"] = {CONFIG: dumped(tuning), WEIGHTS: safetensors.torch.save(few)}
    return found


def dumped(value):
    return json.dumps(value, separators=(",", ":")).encode()


def case(draw, pool):
    """A mutant of a seed, or of a case of the pool."""
    found = dict(draw.choice([*seeds().values(), *pool]))
    for _ in range(draw.choice([1, 1, 2, 3])):
        name = draw.choice(sorted(found))
        content = found[name]
        try:
            if name == CONFIG:
                framed = struct.pack("<Q", len(content)) + content
                found[name] = mutant(framed, draw, draw.randrange(5))[8:]
            else:
                found[name] = draw.choice([mutant, reshaped, redescribed, refilled])(content, draw, draw.randrange(5))
        except (ValueError, LookupError, TypeError, AttributeError, struct.error, RecursionError):
            continue  # too damaged for this way; the case is used as it is
    return found


def opened(content):
    """Header and arrays of a safetensors file: name -> [dtype, shape, bytes]."""
    (length,) = struct.unpack("<Q", content[:8])
    header, start = json.loads(content[8 : 8 + length]), 8 + length
    arrays = {
        name: [entry["dtype"], entry["shape"], content[slice(*(start + at for at in entry["data_offsets"]))]]
        for name, entry in header.items()
        if name != "__metadata__"
    }
    return header.get("__metadata__", {}), arrays


def closed(metadata, arrays):
    """The same, as a file whose offsets agree with the arrays."""
    header, content = {"__metadata__": metadata}, b""
    for name, (dtype, shape, held) in arrays.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(content), len(content) + len(held)]}
        content += held
    text = dumped(header)
    return struct.pack("<Q", len(text)) + text + content


def reshaped(content, draw, kind):
    """Whole arrays: other dtypes, sizes, names and places in a file that stays consistent."""
    metadata, arrays = opened(content)
    name = draw.choice(sorted(arrays))
    dtype, shape, held = arrays[name]
    width = plain_reader.WIDTHS[dtype]
    if kind == 0:
        other = draw.choice(sorted(plain_reader.WIDTHS))
        held = held[: len(held) // 8 * 8]
        arrays[name] = [other, [len(held) // plain_reader.WIDTHS[other]], held]
    elif kind == 1:
        count = draw.choice([0, 1, 2, len(held) // width - 1, len(held) // width + 1])
        arrays[name] = [dtype, [max(0, count)], (held + bytes(width))[: max(0, count) * width]]
    elif kind == 2:
        arrays[name] = [dtype, draw.choice([[1, *shape], [*shape, 1], [], [0, *shape]]), held]
    elif kind == 3:
        other = draw.choice(sorted(arrays))
        arrays[name], arrays[other] = arrays[other], arrays[name]
    else:
        order = sorted(arrays, key=lambda each: draw.random())
        arrays = {other: arrays[other] for other in order[: draw.choice([len(order), len(order), len(order) - 1])]}
    return closed(metadata, arrays)


def redescribed(content, draw, kind):
    """What the header says of one tensor; the checksum of a rule or a lender may be made to fit again."""
    metadata, arrays = opened(content)
    described = json.loads(metadata["tensors"])
    name = draw.choice(sorted(described))
    entry = described[name]
    if kind == 0:
        place = draw.randrange(len(entry["shape"]))
        entry["shape"][place] = draw.choice([0, 1, 9, 13, 2**16, 2**31, 2**40])
    elif kind == 1:
        entry["kind"] = draw.choice(["overwrite", "delta"])
    elif kind == 2:
        entry["positions"] = draw.choice(["plain", "gap", {"mask": "rand"}, {"mask": "struct", "direction": "columns"}])
    if isinstance(entry.get("positions"), dict):
        rule = entry["positions"]
        key = draw.choice(["seed", "frequency", "offset", "diagonal", "direction", "crc32"])
        if kind >= 2:
            rule[key] = draw.choice([0, 1, 2, 3, 5, 10, 2**62, True, False, "rows", "columns"])
        arrays.pop(f"{name}.indices", None)
        values = arrays[f"{name}.values"]
        if draw.random() < 0.8:
            count = len(values[2]) // plain_reader.WIDTHS[values[0]]
            try:
                drawn = (
                    plain_reader.drawn(min(2**62, torch.Size(entry["shape"]).numel()), count, rule["seed"])
                    if rule.get("mask") == "rand"
                    else plain_reader.lines(rule, entry["shape"], 10_000)
                )
            except (plain_reader.Invalid, KeyError, TypeError, ZeroDivisionError):
                drawn = []
            if drawn:
                width = plain_reader.WIDTHS[values[0]]
                arrays[f"{name}.values"] = [
                    values[0],
                    [len(drawn)],
                    (values[2] + bytes(len(drawn) * width))[: len(drawn) * width],
                ]
                rule["crc32"] = plain_reader.crc32(drawn)
    metadata["tensors"] = json.dumps(described)
    return closed(metadata, arrays)


def refilled(content, draw, kind):
    """The numbers in one array."""
    metadata, arrays = opened(content)
    name = draw.choice(sorted(arrays))
    dtype, shape, held = arrays[name]
    width, held = plain_reader.WIDTHS[dtype], bytearray(held)
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(len(held) // width) * width
        if kind < 3:
            number = draw.choice([*UNITS, 65535, 2**31 - 1, 2**31, 2**40, 2**63, 2**64 - 1])
            held[at : at + width] = (number % 256**width).to_bytes(width, "little")
        elif kind == 3:
            held[at : at + width] = held[:width]
        else:
            held[at + width - 1] = draw.choice([0, 0x7F, 0x80, 0xFF, 0x3F])
            held[at] = draw.choice([0, 0xFF, 0x80, 1])
    arrays[name] = [dtype, shape, bytes(held)]
    return closed(metadata, arrays)


def dump(case):
    """The bytes of a case in the corpus: equal cases give equal bytes."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for name in sorted(case):
            file.writestr(zipfile.ZipInfo(name), case[name], zipfile.ZIP_DEFLATED)
    return held.getvalue()


def load(content):
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return {name: file.read(name) for name in file.namelist()}


def run(case):
    """Use a case in all ways, and compare what is read with the plain reader. Returns the kind of outcome."""
    before = all_bits(model())
    place = Path(tempfile.mkdtemp(prefix="shira-fuzz-"))
    try:
        for name, content in case.items():
            (place / name).write_bytes(content.replace(BASE.encode(), str(base()).encode()) if name == CONFIG else content)
        path = place if CONFIG in case else place / ADAPTER
        refused = check(path, model())
        foreign = {label: error for label, error in refused.items() if not isinstance(error, ShiraError)}
        assert not foreign, f"not an error of ours: {foreign}"
        assert same_bits(before, all_bits(model())), "a file that was only looked at has changed the model"
        said = as_is(path, refused)
        text = "; ".join(f"{label}: {type(error).__name__} {error}" for label, error in refused.items())
        return f"{said} {re.sub(r'[0-9a-f]{8,}|[0-9]+', '0', text.replace(str(place), ''))[:400]}"
    finally:
        shutil.rmtree(place)


def as_is(path, refused):
    """Compare what was read with the plain reader, with safetensors, and with itself after saving. Returns a word."""
    try:
        expected = plain_reader.read(path) if path.is_file() else None
    except plain_reader.Invalid:
        expected = None
    if "load" in refused:
        assert expected is None, f"valid by docs/format.md, and refused: {refused['load']}"
        return "refused"
    adapter = shira.load(path)
    if expected is not None:
        tensors, metadata = expected
        assert dict(adapter.metadata) == metadata and tensors.keys() == adapter.tensors.keys()
        for name, tensor in adapter.tensors.items():
            found = plain_reader.Read(
                list(tensor.shape), tensor.kind, tensor.indices.tolist(), tensors[name].dtype, raw(tensor.values)
            )
            assert found == tensors[name], f"{name}: other than docs/format.md says"
        safetensors.deserialize(path.read_bytes())  # raises for what other readers do not take
    else:
        assert not is_ours(path), "docs/format.md forbids it, and it was read"
    if "save" not in refused:
        again = shira.load(path.with_name("again.safetensors"))
        for name, tensor in adapter.tensors.items():
            there = again.tensors[name]
            assert (there.shape, there.kind, raw(there.values)) == (tensor.shape, tensor.kind, raw(tensor.values))
            assert torch.equal(there.indices, tensor.indices)
    if "add" not in refused:
        switch(adapter, path)
    return "read"


def is_ours(path):
    try:
        return path.is_file() and plain_reader.parts(path.read_bytes())[1].get("format") == "shira"
    except plain_reader.Invalid:
        return True


def switch(adapter, path):
    """What was added is written to the model as it says, and the base comes back to the bit."""
    before, switcher = all_bits(model()), Switcher(model())
    switcher.add("x", path)
    switcher.use("x")
    weights = dict(model().named_parameters())
    try:
        for name, tensor in adapter.tensors.items():
            if tensor.kind == "overwrite":
                written = weights[name].detach().view(-1)[tensor.indices.long()]
                assert raw(written) == raw(tensor.values.to(written.dtype)), f"{name}: another value is in the model"
    finally:
        switcher.use(None)
    assert same_bits(before, all_bits(model())), "the base is not back"


def raw(values):
    return values.detach().contiguous().view(torch.uint8).numpy().tobytes()
