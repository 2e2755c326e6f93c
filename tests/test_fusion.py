import contextlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shira
from conftest import all_bits, bits, mlp, plain_c, random_adapter, same_bits
from shira import AdapterError, BaseMismatch, SparseTensor, Switcher, kernels

pytestmark = pytest.mark.usefixtures("two_threads")

STRENGTHS = st.sampled_from([1.0, 0.5, -0.25, 2.0])


@given(alpha=STRENGTHS, beta=STRENGTHS, gamma=STRENGTHS, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_fused_adapter_is_what_the_switcher_makes(alpha, beta, gamma, dtype):
    model = mlp(dtype)
    parts = {
        name: (random_adapter(model, seed), strength)
        for name, seed, strength in (("a", 1, alpha), ("b", 2, beta), ("c", 3, gamma))
    }
    fused = shira.fuse(parts, base=model)
    switcher = Switcher(model)
    for name, (adapter, _) in parts.items():
        switcher.add(name, adapter)
    switcher.add("fused", fused)
    switcher.use({name: strength for name, (_, strength) in parts.items()})
    live = all_bits(model)
    switcher.use("fused")
    assert same_bits(live, all_bits(model))


FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def jagged(count, dtype, generator):
    """Values of very different sizes, and zeros of both signs."""
    values = torch.randn(count, generator=generator) * 2.0 ** torch.randint(-20, 6, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.1, values.sign() * 0.0, values).to(dtype)


@given(
    method=st.sampled_from(["sum", "mean", "max", "ties"]),
    numel=st.sampled_from([1, 63, 4096, 4097, 10_000]),
    base_dtype=st.one_of(st.none(), FLOATS),
    parts=st.lists(
        st.tuples(st.sampled_from([1.0, 0.1, -1.7, 2.0]), FLOATS, st.booleans(), st.sampled_from([0.0, 0.02, 0.6, 1.0])),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 9999),
)
def test_one_pass_gives_the_bits_of_the_reference(method, numel, base_dtype, parts, seed):
    """All dtypes, kinds and methods, with a base and without; windows full, empty, and not quite."""
    generator = torch.Generator().manual_seed(seed)
    base = None if base_dtype is None else {"w": jagged(numel, base_dtype, generator)}
    adapters = {}
    for number, (strength, dtype, is_delta, density) in enumerate(parts):
        where = (torch.rand(numel, generator=generator) < density).nonzero().view(-1)
        kind = "delta" if is_delta or base is None else "overwrite"
        tensor = SparseTensor((numel,), where, jagged(where.numel(), dtype, generator), kind)
        prints = {} if base is None else {"w": shira.sparse.tensor.fingerprint(base["w"][where])}
        adapters[f"{number}"] = (shira.Adapter({"w": tensor}, {"fingerprints": prints}), strength)
    found = {}
    backends = {name: kernels.backend(name) for name in kernels.BACKENDS} | {"plain C": plain_c()}
    for name, forced in backends.items():
        with forced:
            found[name] = shira.fuse(adapters, base=base, method=method)
    expected = found.pop("reference")
    for fused in found.values():
        SparseTensor(**vars(fused.tensors["w"]))  # checks it
        assert torch.equal(fused.tensors["w"].indices, expected.tensors["w"].indices)
        assert fused.tensors["w"].values.dtype == expected.tensors["w"].values.dtype
        assert torch.equal(bits(fused.tensors["w"].values), bits(expected.tensors["w"].values))
        assert fused.metadata == expected.metadata


@given(
    numel=st.sampled_from([1, 63, 4096, 4097, 10_000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    densities=st.tuples(*[st.sampled_from([0.0, 0.001, 0.05, 1.0])] * 3),
    is_delta=st.booleans(),
    with_base=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_a_base_that_the_weight_does_not_hold_everywhere(numel, dtype, densities, is_delta, with_base, seed):
    """As while an adapter is active: the result is the one over the whole base."""
    generator = torch.Generator().manual_seed(seed)
    base = jagged(numel, dtype, generator)
    where = [(torch.rand(numel, generator=generator) < density).nonzero().view(-1).int() for density in densities]
    changes = [
        kernels.Contribution(where[0], jagged(where[0].numel(), dtype, generator), 1.0, False, True),
        kernels.Contribution(where[1], jagged(where[1].numel(), dtype, generator), 0.3, is_delta, False),
    ]
    weight = base.index_fill(0, where[2].long(), float("nan"))
    hidden = where[2], base[where[2].long()]
    for plainly in (False, True):
        with plain_c() if plainly else contextlib.nullcontext():
            expected = kernels.native.combine(base, changes, dtype, "sum", numel)
            found = kernels.native.combine(weight, changes, dtype, "sum", numel, hidden=hidden, with_base=with_base)
        assert torch.equal(found.indices, expected.indices) and torch.equal(bits(found.values), bits(expected.values))
        if with_base:
            assert torch.equal(bits(found.base), bits(expected.base))
            assert torch.equal(bits(found.under[0]), bits(expected.under[0]))
        else:
            assert not found.base.numel() and not any(under.numel() for under in found.under)
    for odd in ((where[2], hidden[1].double()), (where[2] + numel, hidden[1]), (where[2], base.new_empty(numel + 1))):
        if where[2].numel():
            with pytest.raises(IndexError):
                kernels.native.combine(weight, changes, dtype, "sum", numel, hidden=odd)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize(("density", "units"), [(0.05, torch.uint8), (1e-4, torch.uint16)])
@pytest.mark.parametrize("kind", ["overwrite", "delta"])
def test_files_are_fused_as_their_adapters_are(tmp_path, kind, density, units, backend):
    """Positions are gaps in a file, of one byte or two, some of several: they need not be decoded first."""
    generator = torch.Generator().manual_seed(0)
    shape, adapters = (1200, 1000), {}
    base = {"w": torch.randn(shape, generator=generator).bfloat16()}
    for number in range(3):
        where = (torch.rand(1_200_000, generator=generator) < density).nonzero().view(-1)
        where = where[(where < 300_000) | (where >= 500_000)]  # and a gap that is longer than any unit
        tensor = SparseTensor(shape, where, torch.randn(where.numel(), generator=generator).bfloat16(), kind)
        prints = {"w": shira.sparse.tensor.fingerprint(base["w"].view(-1)[where])}
        adapters[f"{tmp_path}/{number}.safetensors"] = (
            shira.Adapter({"w": tensor}, {"fingerprints": prints}),
            0.5 + number / 2,
        )
    for path, (adapter, _) in adapters.items():
        adapter.save(path)
        with shira.adapter.opened(path) as stored:
            assert shira.adapter.as_stored(stored, "w").units.dtype == units
            assert torch.equal(shira.adapter.as_stored(stored, "w").indices, adapter.tensors["w"].indices)
    over = base if kind == "overwrite" else None
    expected = shira.fuse(adapters, base=over).tensors["w"]
    with kernels.backend(backend):
        found = shira.fuse({path: strength for path, (_, strength) in adapters.items()}, base=over).tensors["w"]
    assert torch.equal(found.indices, expected.indices) and torch.equal(bits(found.values), bits(expected.values))


@pytest.mark.parametrize("method", ["sum", "max"])
def test_a_base_that_is_not_finite_is_no_obstacle_where_it_is_overwritten(method):
    """And where a delta would be added to it, an error in every backend; likewise a sum that overflows."""
    base = {"w": torch.tensor([float("nan"), float("inf"), 3e38, 1.0]).to(torch.bfloat16)}

    def adapter(indices, values, kind):
        return shira.Adapter({"w": SparseTensor((4,), torch.tensor(indices), torch.tensor(values), kind)})

    over, delta, more = adapter([0, 1], [1.0, -0.0], "overwrite"), adapter([0], [1.0], "delta"), adapter([2], [3e38], "delta")
    for name in kernels.BACKENDS:
        with kernels.backend(name):
            fused = shira.fuse({"over": (over, 1.0)}, base=base, method=method)
            expected = bits(torch.tensor([1.0, -0.0], dtype=torch.bfloat16))
            assert torch.equal(bits(fused.tensors["w"].values), expected)
            assert fused.fingerprints["w"] == shira.sparse.tensor.fingerprint(base["w"][:2])
            for wrong in (delta, more):
                with pytest.raises(AdapterError, match="must be finite"):
                    shira.fuse({"wrong": (wrong, 1.0)}, base=base, method=method)


def test_fusing_files_gives_a_file_that_switches_and_fuses_again(tmp_path):
    model = mlp()
    for name, seed in (("a", 1), ("b", 2)):
        random_adapter(model, seed).save(tmp_path / f"{name}.safetensors")
    both = shira.fuse({tmp_path / "a.safetensors": 1.0, tmp_path / "b.safetensors": 0.7}, base=model)
    both.save(tmp_path / "both.safetensors")
    again = shira.fuse({tmp_path / "both.safetensors": 1.0}, base=model)
    for name, tensor in shira.load(tmp_path / "both.safetensors").tensors.items():
        assert torch.equal(bits(tensor.values), bits(again.tensors[name].values))
    assert both.name == "random1+random2"
    assert both.metadata["fused"] == {"method": "sum", "strengths": {"a.safetensors": 1.0, "b.safetensors": 0.7}}
    assert both.nnz < sum(shira.load(tmp_path / f"{n}.safetensors").nnz for n in "ab")


def test_fusing_leaves_the_number_of_torchs_threads_alone(monkeypatch):
    """It belongs to the whole process, in which other calls may run."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: pytest.fail("it was set"))
    model = mlp()
    assert shira.fuse({"a": (random_adapter(model, 1), 0.5), "b": (random_adapter(model, 2), 1.0)}, base=model).nnz
    monkeypatch.undo()


def test_an_entry_that_one_adapter_touches_at_strength_one_keeps_its_bits():
    """0.1 + (0.3 - 0.1) is not 0.3 in float32."""
    base = {"w": torch.full((2, 2), 0.1)}
    one = shira.Adapter({"w": SparseTensor((2, 2), torch.tensor([0]), torch.tensor([0.3]))})
    other = shira.Adapter({"w": SparseTensor((2, 2), torch.tensor([3]), torch.tensor([0.7]))})
    fused = shira.fuse({"one": (one, 1.0), "other": (other, 1.0)}, base=base)
    assert torch.equal(bits(fused.tensors["w"].values), bits(torch.tensor([0.3, 0.7])))


def test_deltas_fuse_without_a_base():
    parts = {
        "x": (shira.Adapter({"w": SparseTensor((4,), torch.tensor([0, 2]), torch.tensor([1.0, 2.0]), "delta")}), 2.0),
        "y": (shira.Adapter({"w": SparseTensor((4,), torch.tensor([2, 3]), torch.tensor([5.0, 7.0]), "delta")}), -1.0),
    }
    fused = shira.fuse(parts)
    assert fused.tensors["w"].kind == "delta"
    assert fused.tensors["w"].indices.tolist() == [0, 2, 3]
    assert fused.tensors["w"].values.tolist() == [2.0, -1.0, -7.0]
    base = {"w": torch.tensor([1.0, 1.0, 1.0, 1.0])}
    assert shira.fuse(parts, base=base).tensors["w"].values.tolist() == [3.0, 0.0, -6.0]


def test_what_cannot_be_fused():
    model, other = mlp(seed=0), mlp(seed=1)
    adapter = random_adapter(model, 1)
    with pytest.raises(AdapterError, match="nothing to fuse"):
        shira.fuse({}, base=model)
    with pytest.raises(AdapterError, match="unknown fusion method 'sun'; did you mean 'sum'"):
        shira.fuse({"a": (adapter, 1.0)}, base=model, method="sun")
    with pytest.raises(AdapterError, match="pass base="):
        shira.fuse({"a": (adapter, 1.0)})
    with pytest.raises(AdapterError, match="finite number"):
        shira.fuse({"a": (adapter, float("nan"))}, base=model)
    with pytest.raises(BaseMismatch, match="a does not belong to this model"):
        shira.fuse({"a": (adapter, 1.0)}, base=other)
    with pytest.raises(BaseMismatch, match="no tensor '0.weight'"):
        shira.fuse({"a": (adapter, 1.0)}, base={"v": torch.ones(2)})
    narrow = shira.Adapter({"w": SparseTensor((4,), torch.tensor([0]), torch.ones(1), "delta")})
    wide = shira.Adapter({"w": SparseTensor((5,), torch.tensor([0]), torch.ones(1), "delta")})
    with pytest.raises(AdapterError, match="'w' has different shapes"):
        shira.fuse({"n": (narrow, 1.0), "w": (wide, 1.0)})


def test_strengths_by_pattern():
    """The last pattern that fits counts; where it gives 0 the adapter is not there, bit for bit."""
    model = mlp()
    before = all_bits(model)
    parts = {"a": random_adapter(model, 1), "b": random_adapter(model, 2)}
    patterns = {"*": 1.0, "0.*": 0.25, "*.weight": 0.5, "2.weigh[st]": 0.0}
    by_tensor = {"0.weight": 0.5, "2.weight": 0.0}
    fused = shira.fuse({"a": (parts["a"], patterns), "b": (parts["b"], 1.0)}, base=model)
    for name, strength in by_tensor.items():
        one, other = (shira.Adapter({name: parts[key].tensors[name]}) for key in "ab")
        alone = shira.fuse({"a": (one, strength), "b": (other, 1.0)}, base=model).tensors[name]
        assert torch.equal(fused.tensors[name].indices, alone.indices)
        assert torch.equal(bits(fused.tensors[name].values), bits(alone.values))
    assert torch.equal(fused.tensors["2.weight"].indices, parts["b"].tensors["2.weight"].indices)
    assert fused.metadata["fused"] == {"method": "sum", "strengths": {"a": patterns, "b": 1.0}}
    switcher = Switcher(model)
    for name, adapter in [*parts.items(), ("fused", fused)]:
        switcher.add(name, adapter)
    switcher.use({"a": patterns, "b": 1.0})
    together = all_bits(model)
    assert switcher.active == {"a": patterns, "b": 1.0}
    with switcher.using({"a": dict(reversed(patterns.items())), "b": 1.0}):  # the same patterns, another last one
        assert not same_bits(together, all_bits(model))
    assert same_bits(together, all_bits(model))
    switcher.use("fused")
    assert same_bits(together, all_bits(model))
    switcher.use({"a": {"*": 0.0}})
    assert switcher.active == {} and same_bits(before, all_bits(model))


@pytest.mark.parametrize(
    ("strength", "words"),
    [
        ({"*": 1.0, "0.wight": 0.5}, "'?a'?: pattern '0.wight' matches none of"),
        ({"0.*": 1.0}, "'?a'?: no pattern fits '2.weight'; begin with \"\\*\""),
        ({"*": float("nan")}, r"the strength of 'a' for '\*' must be a finite number, found nan"),
        ({"*": float("inf")}, "finite number, found inf"),
        ({"*": "1"}, "finite number, found '1'"),
        ({}, "must map patterns"),
        ({3: 1.0}, "must map patterns"),
        ([1.0], "finite number"),
        (np.float32("nan"), r"finite number, found np.float32\(nan\)"),
        (np.float64(1e300), "float32 does not hold"),
        *((value, "finite number") for value in (np.True_, torch.tensor(True), np.ones(2), torch.ones(2), torch.tensor(1j))),
        ({"*": torch.ones((), device="meta")}, "finite number"),
    ],
)
def test_strengths_that_cannot_be(strength, words):
    model = mlp()
    before, adapter = all_bits(model), random_adapter(model, 1)
    switcher = Switcher(model)
    switcher.add("a", adapter)
    for ask in (lambda: shira.fuse({"a": (adapter, strength)}, base=model), lambda: switcher.use({"a": strength})):
        with pytest.raises(AdapterError, match=words):
            ask()
    assert switcher.active == {} and same_bits(before, all_bits(model))


@pytest.mark.parametrize("half", [np.float16(0.5), np.float32(0.5), np.array([0.5]), torch.tensor(0.5, dtype=torch.bfloat16)])
def test_numbers_of_numpy_and_torch_are_strengths(half):
    model = mlp()
    switcher = Switcher(model)
    switcher.add("a", random_adapter(model, 1))
    switcher.use({"a": 0.5})
    expected = all_bits(model)
    for strength in (half, {"*": half}):
        switcher.use(None)
        switcher.use({"a": strength})
        assert same_bits(expected, all_bits(model))
    assert switcher.active == {"a": {"*": 0.5}} and type(switcher.active["a"]["*"]) is float
    switcher.use({"a": np.int64(2)})
    assert switcher.active == {"a": 2.0}


@pytest.mark.parametrize("method", ["sum", "ties"])
@pytest.mark.parametrize("kind", ["overwrite", "delta"])
def test_sums_that_overflow_are_refused_with_the_tensors_name(method, kind):
    """In one pass as step by step; and so that no strength is infinite once it is float32."""
    model = mlp(torch.bfloat16)
    adapter = random_adapter(model, 1, kind=kind)
    base = model if kind == "overwrite" else None
    adapter.tensors["0.weight"].values.mul_(1000)
    with pytest.raises(AdapterError, match=r"'0.weight' as torch.\w+: values must be finite, .*; use smaller strengths"):
        shira.fuse({"a": (adapter, 1e38)}, base=base, method=method)
    for strength in (1e39, -1e39, 10**400):
        with pytest.raises(AdapterError, match="strength of 'a' must be a finite number, found .* float32 does not hold"):
            shira.fuse({"a": (adapter, strength)}, base=base, method=method)


def test_a_head_that_is_overwritten_whole_may_lie_over_any_values(tmp_path):
    """The head of a classifier is random whenever it is made: fused, compared and merged as the switcher uses it."""
    model = mlp()
    adapter = random_adapter(model, 1)
    shape = tuple(model[2].weight.shape)
    where = torch.arange(model[2].weight.numel())
    adapter.tensors["2.weight"] = SparseTensor(shape, where, torch.randn(where.numel()))
    adapter.metadata["fingerprints"]["2.weight"] = "0" * 32  # of another random head
    adapter.save(tmp_path / "a.safetensors")
    fused = shira.fuse({tmp_path / "a.safetensors": 1.0}, base=model)
    assert torch.equal(bits(fused.tensors["2.weight"].values), bits(adapter.tensors["2.weight"].values))
    assert shira.compare(adapter, adapter, base=model).total.pairs[0].overlap == 1.0
    switcher = Switcher(model)
    switcher.add("a", adapter)
    head = shira.Adapter({"2.weight": adapter.tensors["2.weight"]}, adapter.metadata)  # now nothing else tells the base
    for ask in (lambda: shira.fuse({"a": (head, 1.0)}, base=model), lambda: shira.compare(head, base=model)):
        with pytest.raises(BaseMismatch, match="base values under '2.weight' have fingerprint"):
            ask()


def test_deltas_of_different_bases_are_not_fused_by_mistake():
    def delta(base):
        tensor = SparseTensor((4,), torch.tensor([0]), torch.ones(1), "delta")
        return shira.Adapter({"w": tensor}, {"base": {"id": base}} if base else {}), 1.0

    same = {"a": delta("org/small"), "b": delta("models/small/"), "c": delta(None)}
    assert shira.fuse(same).tensors["w"].values.tolist() == [3.0]
    with pytest.raises(BaseMismatch, match=r"different bases \(a: org/small, b: org/large\); pass the one"):
        shira.fuse({"a": delta("org/small"), "b": delta("org/large")})
    chosen = shira.fuse({"a": delta("org/small"), "b": delta("org/large")}, base={"w": torch.ones(4)})
    assert chosen.tensors["w"].values.tolist() == [3.0]


def test_files_of_one_name_and_files_that_share_positions(tmp_path):
    """One mask, positions held once; two folders, one file name: nothing is confused."""
    model = mlp()
    first = random_adapter(model, 1)
    tensors = {n: SparseTensor(t.shape, t.indices, t.values + 1) for n, t in first.tensors.items()}
    other = shira.Adapter(tensors, first.metadata)
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        first.save(tmp_path / folder / "first")
    other.save(tmp_path / "y" / "a", like=tmp_path / "y" / "first")
    first.save(tmp_path / "x" / "a")
    paths = {tmp_path / "x" / "a": 1.0, tmp_path / "y" / "a": -0.5}
    fused = shira.fuse(paths, base=model)
    assert fused.metadata["fused"]["strengths"] == {str(path): strength for path, strength in paths.items()}
    expected = shira.fuse({"1": (first, 1.0), "2": (other, -0.5)}, base=model)
    for name, tensor in expected.tensors.items():
        assert torch.equal(bits(tensor.values), bits(fused.tensors[name].values))
    (tmp_path / "y" / "first").unlink()
    with pytest.raises(shira.FormatError, match=r"'first' beside it"):
        shira.fuse(paths, base=model)
    with pytest.raises(AdapterError, match="given twice"):
        shira.fuse({tmp_path / "x" / "a": 1.0, str(tmp_path / "x" / "a"): 1.0}, base=model)
    with pytest.raises(AdapterError, match="given twice, as .*x/a' and .*y/../x/a'; add up its strengths"):
        shira.fuse({tmp_path / "x" / "a": 1.0, f"{tmp_path}/y/../x/a": 1.0}, base=model)


def test_the_snippets_of_the_fusion_page(tmp_path, monkeypatch, tiny_llama):
    page = (Path(__file__).parents[1] / "docs" / "fusion.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 3
    monkeypatch.chdir(tmp_path)
    before = all_bits(tiny_llama)
    switcher = Switcher(tiny_llama)
    for seed, name in enumerate(["poet", "coder", "toxic", "french", "formal", "casual"]):
        random_adapter(tiny_llama, seed, density=0.05).save(f"{name}.safetensors")
        switcher.add(name, f"{name}.safetensors")
    for snippet in snippets:
        exec(snippet, {"shira": shira, "switcher": switcher, "model": tiny_llama})
    assert shira.load("both.safetensors").metadata["fused"]["method"] == "mean"
    switcher.use(None)
    assert same_bits(before, all_bits(tiny_llama))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_wider_values_are_rounded_first_and_minus_zero_stays(backend):
    """An adapter in float32 over a base in bfloat16 is fused as if its values were bfloat16. A delta alone keeps its bits."""
    model, wide, other = mlp(torch.bfloat16), random_adapter(mlp(), 1), random_adapter(mlp(torch.bfloat16), 2)
    narrow = {n: SparseTensor(t.shape, t.indices, t.values.bfloat16(), t.kind) for n, t in wide.tensors.items()}
    with kernels.backend(backend):
        one, same = (
            shira.fuse({"a": (shira.Adapter(tensors), 1.0), "b": (shira.Adapter(other.tensors), 0.5)}, base=model)
            for tensors in (wide.tensors, narrow)
        )
        deltas = [
            shira.Adapter({"w": SparseTensor((9,), torch.tensor(positions), torch.tensor(values), "delta")})
            for positions, values in (([3, 5], [-0.0, 1.0]), ([5, 7], [2.0, 4.0]))
        ]
        both = shira.fuse({"a": (deltas[0], 1.0), "b": (deltas[1], 1.0)})
    assert all(torch.equal(bits(one.tensors[name].values), bits(same.tensors[name].values)) for name in narrow)
    assert torch.equal(bits(both.tensors["w"].values), bits(torch.tensor([-0.0, 3.0, 4.0])))
