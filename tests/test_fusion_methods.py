"""Each method of fusion against a slow, dense one in float64; and what holds for all of them."""

import functools
import hashlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shira
from conftest import all_bits, bits, mlp, random_adapter, same_bits
from shira import AdapterError, SparseTensor, Switcher, kernels
from shira.fusion import methods
from shira.sparse.positions import coin

METHODS = [
    ("sum", {}),
    ("mean", {}),
    ("max", {}),
    ("ties", {"density": 0.4}),
    ("ties", {"density": 1.0}),
    ("dare", {"drop": 0.3, "seed": 5}),
]
each_method = pytest.mark.parametrize(("method", "options"), METHODS, ids=lambda value: str(value))
STRENGTHS = st.sampled_from([1.0, 0.5, -0.25, 2.0, -1.0])


def splitmix(seed, number):
    """The number-th word of SplitMix64, in Python's integers."""
    word = (seed + number * 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def slow_thin(method, name, tensor, change, density=0.2, drop=0.5, seed=0):
    """Position -> change, as a method leaves it of one adapter."""
    where = tensor.indices.tolist()
    if method == "ties":
        order = sorted(range(len(where)), key=lambda i: (-abs(change[where[i]]), where[i]))
        return {where[i]: change[where[i]] for i in order[: math.ceil(density * len(where))]}
    if method == "dare":
        key = hashlib.sha256(tensor.values.float().numpy().tobytes()).hexdigest()[:32]
        begin = int.from_bytes(hashlib.sha256(f"{seed}\n{name}\n{key}".encode()).digest()[:8], "big") >> 1
        return {i: change[i] / (1 - drop) for i in where if splitmix(begin, i) >> 1 < (1 - drop) * 2**63}
    return {i: change[i] for i in where}


def slow_combine(method, changes):
    """One entry's changes, in order, into one."""
    if method == "mean":
        return sum(changes) / len(changes)
    if method == "max":
        return max(changes, key=abs)  # the first of equal ones
    if method == "ties":
        sign = math.copysign(1, sum(changes)) if sum(changes) else 0
        agreeing = [change for change in changes if change * sign > 0]
        return sum(agreeing) / len(agreeing) if agreeing else 0.0
    return sum(changes)


def slow_fusion(base, parts, method, options):
    """Tensor name -> {position: new value}, entry by entry in Python's floats."""
    result = {}
    for name, weight in base.items():
        old = weight.double().view(-1).tolist()
        thinned = []
        for _, (adapter, strength) in sorted(parts.items()):
            tensor = adapter.tensors[name]
            given = dict(zip(tensor.indices.tolist(), tensor.values.double().tolist(), strict=True))
            change = {i: strength * (v if tensor.kind == "delta" else v - old[i]) for i, v in given.items()}
            thinned.append(slow_thin(method, name, tensor, change, **options))
        touched = sorted({i for part in thinned for i in part})
        result[name] = {i: old[i] + slow_combine(method, [part[i] for part in thinned if i in part]) for i in touched}
    return result


def eighths(*shape, generator):
    """Few, coarse values: many ties and cancellations, and no rounding in float32."""
    return torch.randint(-6, 7, shape, generator=generator) / 8


def coarse_parts(base, seed, strengths, kinds):
    """Named adapters whose positions overlap much, and not wholly."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for label, strength, kind in zip("abc", strengths, kinds, strict=True):
        tensors = {}
        for name, weight in base.items():
            chosen = (torch.rand(weight.numel(), generator=generator) < 0.5).nonzero().view(-1)
            tensors[name] = SparseTensor(weight.shape, chosen, eighths(chosen.numel(), generator=generator), kind)
        parts[label] = (shira.Adapter(tensors), strength)
    return parts


@given(
    chosen=st.sampled_from(METHODS),
    seed=st.integers(0, 9999),
    strengths=st.tuples(STRENGTHS, STRENGTHS, STRENGTHS),
    kinds=st.tuples(*[st.sampled_from(["overwrite", "delta"])] * 3),
    backend=st.sampled_from(sorted(kernels.BACKENDS)),
)
def test_a_method_is_its_slow_self(chosen, seed, strengths, kinds, backend):
    method, options = chosen
    generator = torch.Generator().manual_seed(seed)
    base = {"one": eighths(5, 7, generator=generator), "two": eighths(13, generator=generator)}
    parts = coarse_parts(base, seed + 1, strengths, kinds)
    with kernels.backend(backend):
        fused = shira.fuse(parts, base=base, method=method, **options)
    for name, expected in slow_fusion(base, parts, method, options).items():
        assert fused.tensors[name].indices.tolist() == list(expected)
        found, wanted = fused.tensors[name].values.double(), torch.tensor(list(expected.values()), dtype=torch.float64)
        if method in ("sum", "max"):
            assert torch.equal(found, wanted)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def model_parts(dtype, strengths=(1.0, 1.0, 0.5)):
    model = mlp(dtype)
    return model, {name: (random_adapter(model, seed), s) for seed, (name, s) in enumerate(zip("abc", strengths, strict=True))}


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(strengths=st.tuples(STRENGTHS, STRENGTHS, STRENGTHS))
def test_fusing_then_using_is_using_all(method, options, dtype, strengths):
    model, parts = model_parts(dtype, strengths)
    before = all_bits(model)
    fused = shira.fuse(parts, base=model, method=method, **options)
    switcher = Switcher(model)
    for name, (adapter, _) in parts.items():
        switcher.add(name, adapter)
    switcher.add("fused", fused)
    switcher.use({name: strength for name, (_, strength) in parts.items()}, method=method, **options)
    together = all_bits(model)
    switcher.use("fused")
    assert same_bits(together, all_bits(model))
    switcher.use(None)
    assert same_bits(before, all_bits(model))
    again = shira.fuse({"fused": (fused, 1.0)}, base=model)
    assert all(torch.equal(bits(t.values), bits(again.tensors[n].values)) for n, t in fused.tensors.items())


@each_method
def test_the_order_in_which_adapters_are_given_means_nothing(method, options):
    model, parts = model_parts(torch.float32)
    one = shira.fuse(parts, base=model, method=method, **options)
    other = shira.fuse(dict(reversed(parts.items())), base=model, method=method, **options)
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor.indices, other.tensors[name].indices)
        assert torch.equal(bits(tensor.values), bits(other.tensors[name].values))
    assert one.metadata == other.metadata


@each_method
def test_a_change_that_meets_no_other_keeps_its_bits(method, options):
    """0.1 + (0.3 - 0.1) is not 0.3 in float32; but what DARE scales, and TIES trims, changes."""
    base = {"w": torch.full((40,), 0.1)}
    parts = {
        name: (shira.Adapter({"w": SparseTensor((40,), torch.arange(begin, 40, 2), torch.full((20,), value))}), 1.0)
        for name, begin, value in (("a", 0, 0.3), ("b", 1, 0.7))
    }
    fused = shira.fuse(parts, base=base, method=method, **options).tensors["w"]
    kept = {("ties", 0.4): 16}.get((method, options.get("density")), 40)
    assert fused.nnz == kept or method == "dare" and 0 < fused.nnz < 40
    if method != "dare":
        assert torch.equal(bits(fused.values), bits(torch.where(fused.indices % 2 == 0, 0.3, 0.7)))
    assert shira.fuse(parts, base=base, method="dare", drop=0.0).tensors["w"].values[0] == torch.tensor(0.3)


def test_negation_is_a_negative_strength():
    """Task arithmetic (arXiv 2212.04089): base − (value − base); and an analogy, a + (b − c), where b and c agree, is a."""
    base = {"w": torch.tensor([1.0, 2.0, 3.0])}
    change = shira.Adapter({"w": SparseTensor((3,), torch.tensor([0, 2]), torch.tensor([1.5, 1.0]))})
    assert shira.fuse({"a": (change, -1.0)}, base=base).tensors["w"].values.tolist() == [0.5, 5.0]
    parts = {"a": (change, 1.0), "b": (change, 1.0), "c": (change, -1.0)}
    assert shira.fuse(parts, base=base).tensors["w"].values.tolist() == [1.5, 1.0]
    with pytest.raises(AdapterError, match="give it a negative strength"):
        shira.fuse({"a": (change, 1.0)}, base=base, method="negation")


def test_dares_coin():
    """Words of SplitMix64 as published; the share of heads; and other heads for another seed or adapter."""
    assert splitmix(0, 1) == 0xE220A8397B1DCDAF
    where = torch.arange(20_000)
    for p in (0.0, 0.1, 0.9, 1.0):
        assert abs(float(coin(where, p, 3).float().mean()) - p) < 0.01
    assert coin(where[:50], 0.5, 7).tolist() == [splitmix(7, i) >> 1 < 2**62 for i in range(50)]
    model, parts = model_parts(torch.float32)
    dare = functools.partial(shira.fuse, parts, base=model, method="dare")
    assert dare(seed=1).nnz != dare(seed=2).nnz
    a, b = (shira.fuse({n: parts[n]}, base=model, method="dare").tensors["0.weight"].indices.tolist() for n in "ab")
    assert a != b


def test_what_dare_drops_does_not_depend_on_file_names(tmp_path):
    model, parts = model_parts(torch.bfloat16)
    fused = []
    for names in ("x1 x2 x3", "y1 y2 y3"):
        for name, (adapter, _) in zip(names.split(), parts.values(), strict=True):
            adapter.save(tmp_path / name)
        fused.append(shira.fuse({tmp_path / name: 1.0 for name in names.split()}, base=model, method="dare"))
    for name, tensor in fused[0].tensors.items():
        assert torch.equal(bits(tensor.values), bits(fused[1].tensors[name].values))


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("tise", {}, "unknown fusion method 'tise'; did you mean 'ties'"),
        ("sum", {"density": 0.5}, "fusion method 'sum' has no option 'density'"),
        ("ties", {"drop": 0.5}, "no option 'drop'; known: 'density'"),
        ("ties", {"density": 0}, "density must be a number above 0 and at most 1, found 0"),
        ("ties", {"density": float("nan")}, "density must be .*, found nan"),
        ("dare", {"drop": 1.0}, "drop must be a number from 0 to below 1, found 1.0"),
        ("dare", {"drop": True}, "drop must be"),
        ("dare", {"seed": 0.5}, "seed must be a whole number, found 0.5"),
    ],
)
def test_methods_and_options_that_cannot_be(method, options, words):
    model, parts = model_parts(torch.float32)
    before = all_bits(model)
    with pytest.raises(AdapterError, match=words):
        shira.fuse(parts, base=model, method=method, **options)
    switcher = Switcher(model)
    switcher.add("a", parts["a"][0])
    switcher.use("a")
    active = all_bits(model)
    with pytest.raises(AdapterError, match=words):
        switcher.use({"a": 0.5}, method=method, **options)
    assert same_bits(active, all_bits(model)) and switcher.active == {"a": 1.0}
    switcher.use(None)
    assert same_bits(before, all_bits(model))


def test_the_switcher_keeps_methods_apart():
    """Which one is active is known, and one that is ready is not taken for another."""
    model, parts = model_parts(torch.float32)
    switcher = Switcher(model)
    for name, (adapter, _) in parts.items():
        switcher.add(name, adapter)
    both = {"a": 1.0, "b": 0.5}
    seen = {}
    for _ in range(2):
        for method, options in [*METHODS, ("dare", {"drop": 0.3, "seed": 6})]:
            switcher.use(both, method=method, **options)
            assert switcher.active == both
            assert switcher.method == methods.resolve(method, options).described()
            state = all_bits(model)
            assert same_bits(state, seen.setdefault((method, str(options)), state))
    for one in seen:
        assert not any(same_bits(seen[one], seen[other]) for other in seen if other != one)
    with switcher.using("c", method="ties", density=0.5):
        assert switcher.method == {"method": "ties", "density": 0.5}
    assert same_bits(all_bits(model), state)
    assert switcher.method == {"method": "dare", "drop": 0.3, "seed": 6}
    switcher.use(both, method="ties")
    count = len(switcher._ready.here)
    switcher.use(both, method="ties", density=0.2)  # the default, said
    assert len(switcher._ready.here) == count
    switcher.use(None, method="ties")
    assert (switcher.active, switcher.method) == ({}, {"method": "sum"})


def test_nothing_survives():
    """All of an adapter may be dropped; what is left is the base."""
    base = {"w": torch.tensor([-0.0, 2.0])}
    one = shira.Adapter({"w": SparseTensor((2,), torch.tensor([0]), torch.ones(1))})
    dropped = [shira.fuse({"a": (one, 1.0)}, base=base, method="dare", drop=0.9, seed=seed).nnz for seed in range(20)]
    assert set(dropped) == {0, 1}
    assert methods.METHODS.keys() == {name for name, _ in METHODS}
