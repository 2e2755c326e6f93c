"""Positions in files: as gaps, by rule, and borrowed from another file of a set."""

import json
import os
import zlib

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import shira
from conftest import bits, mlp, random_adapter
from shira import Adapter, FormatError, SparseTensor
from shira.files import encoding
from test_format import write


def rule(**changes):
    """A file of version 2 whose positions come from a rule."""
    weight = torch.empty(30, 40)
    drawn = {"rand": shira.masks.rand(weight, 50, 7), "struct": shira.masks.struct(weight, 150)}[changes.pop("draw", "rand")]
    positions = {"mask": "rand", "seed": 7, "crc32": zlib.crc32(drawn.numpy().astype("<i8").data)} | changes
    entry = {"shape": [30, 40], "kind": "delta", "positions": {k: v for k, v in positions.items() if v is not None}}
    header = {"format_version": "2", "encoding": "gap", "tensors": json.dumps({"w": entry})}
    return {"w.indices": None, "w.values": torch.ones(drawn.numel())}, header


def gaps(array, positions="gap", count=2, shape=(30, 40)):
    entry = {"shape": list(shape), "kind": "delta", "positions": positions}
    header = {"format_version": "2", "encoding": "gap", "tensors": json.dumps({"w": entry})}
    return {"w.indices": array, "w.values": torch.ones(count)}, header


def byte(*units):
    return torch.tensor(units, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"mask": "rand", "seed": 0}, lambda weight: shira.masks.rand(weight, 50, 0)),
        ({"mask": "rand", "seed": 2**63 - 1}, lambda weight: shira.masks.rand(weight, 50, 2**63 - 1)),
        *(
            (
                {"mask": "struct", "direction": direction, "frequency": 10} | further,
                lambda weight, direction=direction, further=further: shira.masks.struct(
                    weight, 1200, direction, frequency=10, **further
                ),
            )
            for direction in ("rows", "columns")
            for further in ({}, {"offset": 3}, {"diagonal": False}, {"offset": 9, "diagonal": False})
        ),
        ({"mask": "struct", "direction": "rows", "frequency": 1}, lambda weight: torch.arange(1200)),
    ],
)
def test_every_rule_draws_the_positions_of_its_mask(tmp_path, rule, expected):
    positions = expected(torch.empty(30, 40))
    entry = {
        "shape": [30, 40],
        "kind": "delta",
        "positions": rule | {"crc32": zlib.crc32(positions.numpy().astype("<i8").data)},
    }
    header = {"format_version": "2", "encoding": "gap", "tensors": json.dumps({"w": entry})}
    path = write(tmp_path / "a", {"w.indices": None, "w.values": torch.ones(positions.numel())}, header)
    assert torch.equal(shira.load(path).tensors["w"].indices.long(), positions)


def test_positions_by_rule_and_by_gap_by_hand(tmp_path):
    assert shira.load(write(tmp_path / "a", *rule())).tensors["w"].nnz == 50
    by_struct = rule(draw="struct", mask="struct", seed=None, direction="rows", frequency=10)
    assert shira.load(write(tmp_path / "b", *by_struct)).tensors["w"].nnz == 3 * 40 + 30 - 3
    assert shira.load(write(tmp_path / "c", *gaps(byte(3, 0)))).tensors["w"].indices.tolist() == [3, 4]
    assert shira.load(write(tmp_path / "d", *gaps(byte(255, 255, 0, 255, 1)))).tensors["w"].indices.tolist() == [510, 767]
    wide = torch.tensor([300, 65], dtype=torch.uint16)
    assert shira.load(write(tmp_path / "e", *gaps(wide))).tensors["w"].indices.tolist() == [300, 366]
    assert shira.load(write(tmp_path / "f", *gaps(byte(), count=0))).tensors["w"].nnz == 0


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (gaps(byte(3, 0, 1)), r"'w'.*each of 2 values, found 3"),
        (gaps(byte(3)), r"'w'.*each of 2 values, found 1"),
        (gaps(byte(3, 0, 255)), r"'w'.*gaps must end"),
        (gaps(byte(), count=1), r"'w'.*found 0"),
        (gaps(byte(254, 254), shape=(3, 4)), r"'w'.*0 to 11, the gaps lead to 509"),
        (gaps(torch.full((40_000,), 65_535, dtype=torch.uint16), shape=(3, 4)), r"'w'.*gaps must end"),
        (gaps(torch.tensor([3, 4])), r"'w'.*uint8 or uint16"),
        (gaps(byte(3, 0).view(1, 2)), r"'w'.*1-D"),
        (gaps(torch.tensor([3.0, 4.0])), r"'w'.*uint8 or uint16"),
        (gaps(byte(3, 0), "zip"), r"'w'.*'plain', 'gap' or a rule, found 'zip'"),
        (gaps(byte(3, 0), "plain"), r"'w'.*must be int32, found uint8"),
        (gaps(byte(3, 0), 7), r"'w'.*a word or a rule, found 7"),
        (gaps(None, "gap"), r"missing: \['w.indices'\]"),
        (gaps(byte(3, 0), {"mask": "rand"}), r"not described: \['w.indices'\]"),
        (rule(seed=8), r"'w'.*other positions than were written"),
        (rule(seed=-1), r"'w'.*does not give"),
        (rule(seed="7"), r"'w'.*does not give"),
        (rule(crc32=None), r"'w'.*checksum"),
        (rule(mask="wm"), r"'w'.*does not give"),
        (rule(more=1), r"'w'.*does not give"),
        (rule(mask="struct", seed=None, direction="rows", frequency=0), r"'w'.*does not give"),
        (rule(mask="struct", seed=None, direction="rows", frequency=3), r"'w'.*does not give"),
        (rule(mask="struct", seed=None, direction="up", frequency=3), r"'w'.*does not give"),
    ],
)
def test_hostile_positions_are_refused(tmp_path, file, words):
    path = write(tmp_path / "evil.safetensors", *file)
    for use in (shira.load, lambda path: shira.fuse({path: 1.0})):
        with pytest.raises(FormatError, match=rf"(?s)evil\.safetensors.*{words}"):
            use(path)


def test_headers_that_are_no_safetensors_are_refused(tmp_path):
    content = write(tmp_path / "good.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    cases = [
        (header | {"__metadata__": header["__metadata__"] | {"format_version": 1}}, "metadata other than text"),
        (header | {"__metadata__": ["shira"]}, "malformed"),
        (header | {"w.values": header["w.values"] | {"dtype": "F8_E4M3", "shape": [8]}}, "dtype 'F8_E4M3' is unknown"),
        (header | {"w.values": header["w.values"] | {"shape": [3]}}, "8 bytes for F32"),
        (header | {"w.values": header["w.values"] | {"data_offsets": [16, 24]}}, "'w.indices' should begin at"),
        ([header], "malformed"),
    ]
    path = tmp_path / "evil.safetensors"
    for case, words in cases:
        text = json.dumps(case).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        with pytest.raises(FormatError, match=rf"evil.safetensors is not a whole safetensors file: .*{words}"):
            shira.load(path)


def test_a_file_that_is_cut_short_while_it_is_open_is_refused(tmp_path):
    """A file that is mapped would end the process."""
    path = tmp_path / "a.safetensors"
    Adapter({"w": SparseTensor((1000, 1000), torch.arange(100_000), torch.ones(100_000))}).save(path)
    with pytest.raises(FormatError, match="changed while it was read"), shira.adapter.opened(path) as adapter:
        os.truncate(path, 10_000)
        with pytest.raises(FormatError, match="a.safetensors became shorter while it was read"):
            adapter.tensors["w"]


def test_a_huge_shape_takes_no_memory(tmp_path):
    """A rule over a matrix of 2⁴⁰ entries: refused before anything of that size is made."""
    tensors, header = rule(draw="struct", mask="struct", seed=None, direction="rows", frequency=2**19)
    header["tensors"] = header["tensors"].replace("[30, 40]", "[1048576, 1048576]")
    with pytest.raises(FormatError, match="does not give"):
        shira.load(write(tmp_path / "evil.safetensors", tensors, header))
    header["tensors"] = header["tensors"].replace("1048576", "99999999999")
    with pytest.raises(FormatError, match="entries|does not give"):
        shira.load(write(tmp_path / "evil.safetensors", tensors, header))


@pytest.mark.parametrize(("density", "limit"), [(0.01, 3.15), (0.05, 3.01), (0.001, 4.05), (1e-5, 6.3), (1.0, 3.01)])
def test_bytes_an_entry(density, limit):
    """Positions and bfloat16 values of random positions; entropy: 8.08 bits a position at 1 %."""
    shape = (2000, 3000)
    chosen = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density).view(-1).nonzero().view(-1)
    stored = encoding.encode(chosen, shape, [])
    assert (stored.array.nbytes + 2 * chosen.numel()) / max(1, chosen.numel()) <= limit
    assert torch.equal(encoding.decode(stored, shape, chosen.numel()).long(), chosen)


@pytest.mark.parametrize("mask", ["rand", "struct"])
def test_a_mask_that_can_be_drawn_again_takes_no_bytes(tmp_path, mask):
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 300)).bfloat16()
    with shira.attach(model, mask=mask, density=0.1, seed=3) as tuner:
        adapter = tuner.adapter()
    adapter.save(tmp_path / "a.safetensors")
    loaded = shira.load(tmp_path / "a.safetensors")
    assert all(torch.equal(t.indices, loaded.tensors[name].indices) for name, t in adapter.tensors.items())
    assert "0.weight.indices" not in safetensors.torch.load_file(tmp_path / "a.safetensors")
    other = Adapter(adapter.tensors, adapter.metadata | {"mask": {"name": mask, "seed": 4}})  # says so, but is not
    other.save(tmp_path / "b.safetensors")
    loaded = shira.load(tmp_path / "b.safetensors")
    assert all(torch.equal(t.indices, loaded.tensors[name].indices) for name, t in adapter.tensors.items())


@given(st.sets(st.integers(0, 10**6), max_size=30), st.sampled_from([(1000, 1001), (2**20, 2**12)]))
def test_gaps_round_trip(positions, shape):
    indices = torch.tensor(sorted(positions), dtype=torch.int64)
    stored = encoding.encode(indices, shape, [])
    decoded = encoding.decode(stored, shape, len(positions))
    assert torch.equal(decoded.long(), indices)
    assert decoded.dtype == shira.sparse.positions.index_dtype(shape[0] * shape[1])


@pytest.fixture
def pair(tmp_path):
    """Two adapters of one mask; the second leaves its positions to the first."""
    model = mlp(torch.bfloat16)
    first = random_adapter(model, 1)
    second = Adapter({name: SparseTensor(t.shape, t.indices, t.values + 1) for name, t in first.tensors.items()}, {"name": "2"})
    first.save(tmp_path / "first.safetensors")
    second.save(tmp_path / "second.safetensors", like=tmp_path / "first.safetensors")
    return tmp_path, first, second


def test_a_set_of_adapters_of_one_mask_holds_its_positions_once(pair):
    folder, first, second = pair
    assert not [name for name in safetensors.torch.load_file(folder / "second.safetensors") if name.endswith(".indices")]
    loaded = shira.load(folder / "second.safetensors")
    for name, tensor in second.tensors.items():
        assert torch.equal(loaded.tensors[name].indices, tensor.indices)
        assert torch.equal(bits(loaded.tensors[name].values), bits(tensor.values))
    other = random_adapter(mlp(torch.bfloat16), 9)  # of another mask: written whole
    other.save(folder / "other.safetensors", like=folder / "first.safetensors")
    assert all(
        torch.equal(t.indices, other.tensors[n].indices) for n, t in shira.load(folder / "other.safetensors").tensors.items()
    )


def test_a_set_that_was_torn_apart_is_refused(pair):
    folder, first, second = pair
    with pytest.raises(shira.AdapterError, match="takes its positions from another file"):
        second.save(folder / "third.safetensors", like=folder / "second.safetensors")
    (folder / "sub").mkdir()
    with pytest.raises(shira.AdapterError, match="in the folder of"):
        second.save(folder / "sub" / "third.safetensors", like=folder / "first.safetensors")
    with pytest.raises(shira.AdapterError, match="another file"):
        second.save(folder / "first.safetensors", like=folder / "first.safetensors")
    random_adapter(mlp(torch.bfloat16), 9).save(folder / "first.safetensors")
    with pytest.raises(FormatError, match=r"'0.weight': 'first.safetensors' holds other positions"):
        shira.load(folder / "second.safetensors")
    (folder / "first.safetensors").unlink()
    with pytest.raises(FormatError, match=r"'0.weight': its positions should be in 'first.safetensors' beside it"):
        shira.load(folder / "second.safetensors")


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "", "..", "evil.safetensors", 7, None])
def test_positions_are_borrowed_from_the_same_folder_only(tmp_path, name):
    write(tmp_path / "a.safetensors")
    tensors, header = rule(mask=None, seed=None, file=name)
    if name is None:
        header["tensors"] = header["tensors"].replace('"positions": {', '"positions": {"file": null, ')
    with pytest.raises(FormatError, match=r"'w'.*another file of its folder"):
        shira.load(write(tmp_path / "evil.safetensors", tensors, header))


def test_files_that_borrow_from_each_other_are_refused(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        write(tmp_path / name, *rule(mask=None, seed=None, file=other))
    with pytest.raises(FormatError, match="takes its positions from another file"):
        shira.load(tmp_path / "a")
