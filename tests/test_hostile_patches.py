"""Weight patches of RL trainers that are malformed, damaged or made to harm."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conftest import mlp, random_adapter
from shira import FormatError
from shira.files import patches
from shira.integrations import rl_patches
from test_hostile_files import check
from test_hostile_files import put as put_file
from test_rl_patches import TENSORS, as_slime, as_trl, as_verl


def put(path, params, positions=8, values=2, encoding="indices", **metadata):
    """A file in slime's layout that says what `params` say, with that many bytes of positions and values."""
    text = params if isinstance(params, str) else json.dumps(params)
    header = {
        "__metadata__": {"encoding": encoding, "params": text} | metadata,
        "__positions__": {"dtype": "U8", "shape": [positions], "data_offsets": [0, positions]},
        "__values__": {"dtype": "F32", "shape": [values], "data_offsets": [positions, positions + 4 * values]},
    }
    return put_file(path, json.dumps(header).encode(), bytes(positions) + bytes(4 * values))


ENTRY = {"name": "0.weight", "dtype": "float32", "shape": [32, 16], "pos_start": 0, "pos_end": 8, "pos_width": 4}
ENTRY |= {"val_start": 0, "val_end": 2}
HOSTILE = {
    "a huge shape": [ENTRY | {"shape": [2**63]}],
    "no shape": [{key: value for key, value in ENTRY.items() if key != "shape"}],
    "ends beyond the file": [ENTRY | {"pos_end": 2**60, "val_end": 2**58, "shape": [2**60]}],
    "begins before the file": [ENTRY | {"pos_start": -8, "val_start": -2}],
    "a width that none is": [ENTRY | {"pos_width": 3}],
    "a width of nothing": [ENTRY | {"pos_width": 0, "pos_end": 0}],
    "true": [ENTRY | {"pos_width": True}],
    "the same bytes many times": [ENTRY | {"name": f"{number}.weight"} for number in range(5000)],
    "more entries than the tensor": [ENTRY | {"shape": [1]}],
    "a dtype that is none": [ENTRY | {"dtype": "float8_e4m3fn"}],
    "a dtype that is a list": [ENTRY | {"dtype": ["float32"]}],
    "wider than its values": [ENTRY | {"dtype": "float64"}],
    "not all of the file": [],
    "a number": 5,
    "numbers": [5, 6],
    "deep": "[" * 10**5,
    "twice the position": [ENTRY],  # both are 0
}


@pytest.mark.parametrize("params", HOSTILE.values(), ids=HOSTILE)
def test_hostile_patches_are_refused_at_once(params, tmp_path):
    refused = check(put(tmp_path / "x.safetensors", params))
    assert isinstance(refused["load"], FormatError) and isinstance(refused["add"], FormatError)


def test_further_hostile_patches(tmp_path):
    for encoding in ("zip", "dense", "deltas"):
        refused = check(put(tmp_path / "x.safetensors", [ENTRY | {"shape": [1, 1]}], encoding=encoding))
        assert isinstance(refused["load"], FormatError)
    for more in ({"positions": 16}, {"values": 3}):
        refused = check(put(tmp_path / "x.safetensors", [ENTRY], **more))
        assert "the params end at byte 8 of " in str(refused["load"])
    short = ENTRY | {"pos_width": 2, "pos_end": 4}
    refused = check(put(tmp_path / "x.safetensors", [short, short | {"name": "2.weight"}], positions=4, encoding="deltas"))
    assert "tensor '2.weight': expected deltas from byte 4 and values from 2 on" in str(refused["load"])
    refused = check(put(tmp_path / "x.safetensors", [ENTRY | {"pos_end": 0, "shape": [3, 1]}], positions=0, encoding="dense"))
    assert "expected dense from byte 0 and values from 0 on, one for each position" in str(refused["load"])
    refused = check(as_verl(tmp_path / "x.safetensors", encoding=["indices"]))
    assert "an encoding of 'indices'" in str(refused["load"])
    parts = {"__positions__": torch.zeros(2, dtype=torch.int32), "__values__": torch.zeros(2)}
    save_file(parts, tmp_path / "x.safetensors", {"encoding": "indices", "params": json.dumps([ENTRY])})
    assert "expected __positions__ to be bytes" in str(check(tmp_path / "x.safetensors")["load"])
    save_file(parts | {"__delta_spec__": torch.tensor([ord("5")], dtype=torch.uint8)}, tmp_path / "x.safetensors")
    assert "the manifest of the patch cannot be read" in str(check(tmp_path / "x.safetensors")["load"])
    refused = check(put(tmp_path / "x.safetensors", [ENTRY], checksum="5"))
    assert "another checksum" in str(refused["load"])
    refused = check(put(tmp_path / "x.safetensors", [ENTRY], checksum="5" * 5000))
    assert isinstance(refused["load"], FormatError)
    beyond = {"a.weight": ((4, 5), [3, 70_000], [1.0, 1.0])}
    for path in (as_slime(tmp_path / "x.safetensors", beyond), as_slime(tmp_path / "x.safetensors", beyond, "indices")):
        assert "indices must be from 0 to 19" in str(check(path)["load"])
    for shapes in ('{"a.weight": 5}', "[]", "{", '{"a.weight": [4611686018427387905]}', '{"a.weight": [1]}'):
        refused = check(as_trl(tmp_path / "x.safetensors", {"a.weight": TENSORS["a.weight"]}, shapes=shapes))
        assert isinstance(refused["load"], FormatError)
    (tmp_path / "several").mkdir()
    as_slime(tmp_path / "several" / "a.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "several" / "b.safetensors")
    assert "is no weight patch of TRL, slime or verl, as the others" in str(check(tmp_path / "several")["load"])
    assert not patches.is_patch(Path(tmp_path / "missing")) and not patches.is_patch(tmp_path / "empty")


@pytest.mark.parametrize("layout", rl_patches.LAYOUTS)
def test_damaged_patches_are_read_or_refused(layout, tmp_path):
    """Bytes of the header and of the content are changed at random."""
    path = tmp_path / "x.safetensors"
    rl_patches.save(random_adapter(mlp(), 1, density=0.02), path, layout)
    whole, random_ = path.read_bytes(), random.Random(layout)
    length = 8 + int.from_bytes(whole[:8], "little")
    outcomes = set()
    for turn in range(25):
        damaged = bytearray(whole)
        for _ in range(random_.choice([1, 3])):
            damaged[random_.randrange(*((8, length) if turn % 2 else (length, len(whole))))] = random_.randrange(256)
        path.write_bytes(damaged)
        refused = check(path)
        outcomes.add(type(refused.get("load")))
    assert FormatError in outcomes
