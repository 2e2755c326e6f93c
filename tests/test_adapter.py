import hashlib
import re

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

import shira
from conftest import bits, mlp, random_adapter
from shira import Adapter, AdapterError, BaseMismatch, SparseTensor
from shira.adapter import opened, prefixed
from shira.files.metadata import base_facts
from shira.sparse.positions import index_dtype
from shira.sparse.tensor import SHA256, all_finite, fingerprint


def test_small_tensors_have_int32_positions_and_large_ones_int64():
    small = SparseTensor((3, 4), torch.tensor([0, 11]), torch.ones(2))
    large = SparseTensor((2**16, 2**15), torch.tensor([2**31 - 1], dtype=torch.int64), torch.ones(1))
    assert small.indices.dtype == torch.int32
    assert large.indices.dtype == torch.int64
    assert index_dtype(2**31 - 1) == torch.int32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"indices": torch.tensor([3, 1])}, r"sorted.*position 1 after 3"),
        ({"indices": torch.tensor([3, 3])}, r"unique.*twice the position 3"),
        ({"indices": torch.tensor([-1, 1])}, r"from 0 to 11.*-1"),
        ({"indices": torch.tensor([1, 12])}, r"from 0 to 11.*12"),
        ({"indices": torch.tensor([1.0, 2.0])}, r"int32 or int64, found float32"),
        ({"indices": torch.tensor([1])}, r"one length"),
        ({"indices": torch.tensor([[1, 2]])}, r"1-D"),
        ({"values": torch.tensor([1, 2])}, r"floating point, found int64"),
        ({"values": torch.tensor([1.0, float("nan")])}, r"finite, found nan as value 1"),
        ({"values": torch.tensor([float("-inf"), 1.0])}, r"finite, found -inf as value 0"),
        ({"shape": (3, -4)}, r"shape"),
        ({"shape": (3, 4.0)}, r"shape"),
        ({"kind": "add"}, r"'overwrite' or 'delta', found 'add'"),
    ],
)
def test_what_cannot_be_an_adapter_is_refused(changes, words):
    good = {"shape": (3, 4), "indices": torch.tensor([1, 2]), "values": torch.ones(2), "kind": "overwrite"}
    SparseTensor(**good)
    with pytest.raises(AdapterError, match=words):
        SparseTensor(**good | changes)


def test_empty_tensors_are_fine():
    empty = SparseTensor((0, 4), torch.empty(0, dtype=torch.int64), torch.empty(0))
    adapter = Adapter({"w": empty})
    assert (adapter.nnz, adapter.density, adapter.nbytes, adapter.fingerprint) == (0, 0.0, 0, None)


def test_totals():
    one = SparseTensor((4, 5), torch.tensor([1, 2]), torch.ones(2, dtype=torch.bfloat16))
    two = SparseTensor((5,), torch.tensor([4]), torch.ones(1))
    adapter = Adapter({"a": one, "b": two}, {"name": "x"})
    assert (adapter.nnz, adapter.density, adapter.nbytes, adapter.name) == (3, 3 / 25, 2 * (4 + 2) + 8, "x")


@given(st.lists(st.floats(width=16, allow_nan=False), max_size=20))
def test_a_fingerprint_is_of_the_values_and_not_of_their_dtype(numbers):
    half = torch.tensor(numbers, dtype=torch.bfloat16)
    assert fingerprint(half) == fingerprint(half.float())
    assert fingerprint(half) == fingerprint(torch.stack([half, half], 1)[:, 0])  # memory layout does not matter


def test_a_fingerprint_tells_bits_apart():
    zero = torch.zeros(3)
    assert fingerprint(zero) != fingerprint(-zero)
    assert not torch.equal(bits(zero), bits(-zero))


def test_fingerprints_are_what_the_format_says():
    """Of all lengths around those at which values are hashed in pieces; the constants are what files hold."""
    assert fingerprint(torch.empty(0)) == "xxh3:99aa06d3014798d86001c324468d497f"
    assert fingerprint(torch.empty(0), SHA256) == "e3b0c44298fc1c149afbf4c8996fb924"
    for count in (1, 1000, 2**18 - 1, 2**18, 2**18 + 1, 3 * 2**18 + 7):
        values = torch.randn(count).bfloat16()
        content = values.float().numpy().astype("<f4").tobytes()
        assert fingerprint(values) == fingerprint(values, like="xxh3:of others") == f"xxh3:{xxhash.xxh3_128_hexdigest(content)}"
        assert fingerprint(values, SHA256) == fingerprint(values, like="0" * 32) == hashlib.sha256(content).hexdigest()[:32]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_all_finite_is_isfinite_of_each(dtype):
    values = torch.randn(70_000).to(dtype)
    values[7], values[8] = torch.finfo(dtype).max, torch.finfo(dtype).min
    assert all_finite(values) and all_finite(values[:0])
    for odd in (float("nan"), float("inf"), float("-inf")):
        for where in (0, 57, 33_333, 69_999):
            broken = values.clone()
            broken[where] = odd
            assert not all_finite(broken) and not torch.isfinite(broken).all()


def test_what_an_adapter_a_tuner_and_a_switcher_say_of_themselves(tmp_path):
    """Three lines at most; nothing that a file says controls the terminal; nothing is read or changed."""
    adapter = shira.Adapter(
        {"w": SparseTensor((2, 4), torch.tensor([1, 5]), torch.tensor([1.0, 2.0]))},
        {"name": "po\x1bet", "mask": {"name": "wm"}, "base": {"id": "some/model"}},
    )
    assert repr(adapter) == (
        "<shira.Adapter 'po\\x1bet': 2 entries in 1 tensors, 25.00% of them, overwrite\n  mask 'wm', base 'some/model'>"
    )
    assert repr(adapter.tensors) == "{'w': <shira.SparseTensor 2 × 4: 2 entries, overwrite, float32>}"
    assert repr(shira.Adapter({})) == (
        "<shira.Adapter without a name: 0 entries in 0 tensors, 0.00% of them, empty\n  mask and base are not recorded>"
    )
    assert "mask and base are not recorded" in repr(shira.Adapter({}, {"mask": "wm", "base": ["x"]}))
    adapter.save(tmp_path / "a.safetensors")
    with opened(tmp_path / "a.safetensors") as stored:
        assert repr(stored) == "<shira.Adapter 'po\\x1bet', 1 tensors in an open file>"

    model = mlp()
    with shira.attach(model, mask="rand", density=0.1) as tuner:
        assert re.fullmatch(
            r"<shira.Tuner attached: \d+ of \d+ entries \(1\d\.\d\d%\) in \d tensors\n"
            r"  mask 'rand', model Sequential, base 'Sequential'>",
            repr(tuner),
        )
        trained = tuner.adapter("trained")
    assert repr(tuner).startswith(f"<shira.Tuner detached: {tuner.nnz} of ")

    switcher = shira.Switcher(model)
    assert repr(switcher) == "<shira.Switcher of Sequential: the base is active\n  registered: none>"
    for number in range(9):
        switcher.add(f"a{number}", trained)
    switcher.use({"a0": 1.0, "a1": 0.5, "a2": {"*": 0.25}})
    assert repr(switcher) == (
        "<shira.Switcher of Sequential: 'a0' + 'a1' × 0.5 + 'a2' × {'*': 0.25} active\n"
        "  registered: 'a0', 'a1', 'a2', 'a3', 'a4', 'a5', 'a6', 'a7', … (9)>"
    )
    switcher._state = switcher._state._replace(selection=None)
    assert "a switch was interrupted" in repr(switcher)


def test_an_adapter_of_a_part_keeps_its_fingerprints():
    """With the part's prefix before its names, it is still refused on another base."""
    adapter = random_adapter(mlp(), 1)
    whole = prefixed(adapter, "unet.")
    assert whole.fingerprints == {f"unet.{name}": value for name, value in adapter.fingerprints.items()} != {}
    shira.Switcher(torch.nn.ModuleDict({"unet": mlp()})).add("a", whole)
    with pytest.raises(BaseMismatch, match="unet"):
        shira.Switcher(torch.nn.ModuleDict({"unet": mlp(seed=5)})).add("a", whole)


def test_of_a_base_in_a_folder_only_the_name_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "base").mkdir(parents=True)
    assert base_facts("mine/base", ["float32"])["id"] == "base"
    assert base_facts("mine/other", ["float32"])["id"] == "mine/other"  # a repository of the hub


def test_values_that_require_a_gradient_are_taken_without_it():
    model = mlp()
    values = model[0].weight.flatten()[:3]
    switcher = shira.Switcher(model)
    switcher.add("a", Adapter({"0.weight": SparseTensor((11, 13), torch.arange(3), values * 2)}))
    switcher.use({"a": 0.5})
    switcher.use(None)
    assert not switcher.changes("a")["0.weight"].values.requires_grad
