"""Changes to several tensors, combined in one call of C: as one at a time, and as torch combines them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shira
from conftest import all_bits, bits, mlp, plain_c, random_adapter, same_bits
from shira import kernels
from shira.files import encoding
from shira.kernels import Combination, Contribution
from shira.switching import preparing, sources

pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.skipif("native" not in kernels.BACKENDS, reason="no kernels in C"),
]


def change(numel, density, dtype, is_delta, generator):
    where = (torch.rand(numel, generator=generator) < density).nonzero().view(-1).int()
    return Contribution(where, torch.randn(where.numel(), generator=generator).to(dtype), 0.5, is_delta, False)


TENSORS = st.tuples(
    st.sampled_from([1, 63, 4096, 10_000]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["sum", "mean", "max", "ties"]),
    st.lists(st.sampled_from([0.0, 0.02, 0.6, 1.0]), min_size=1, max_size=4),
    st.booleans(),
)


@given(tensors=st.lists(TENSORS, max_size=6), with_base=st.booleans(), plainly=st.booleans(), seed=st.integers(0, 9999))
def test_many_at_once_are_what_each_is_alone(tensors, with_base, plainly, seed):
    generator = torch.Generator().manual_seed(seed)
    wanted = []
    for numel, dtype, method, densities, has_base in tensors:
        weight = torch.randn(numel, generator=generator).to(dtype) if has_base else None
        changes = [change(numel, density, dtype, not has_base, generator) for density in densities]
        wanted.append(Combination(weight, changes, dtype, method, numel))
    found = kernels.combine_all(wanted, with_base=with_base)
    if plainly:
        with plain_c():
            found = kernels.combine_all(wanted, with_base=with_base)
    for each, result in zip(wanted, found, strict=True):
        alone = kernels.native.combine(*each[:5], with_base=with_base)
        known = each.dtype != torch.float16 and each.method != "ties"
        assert (result is not None) == (alone is not None) == known
        if result is not None:
            assert torch.equal(result.indices, alone.indices) and torch.equal(bits(result.values), bits(alone.values))
            assert torch.equal(bits(result.base), bits(alone.base)) and result.is_finite and alone.is_finite
            assert all(torch.equal(bits(one), bits(other)) for one, other in zip(result.under, alone.under, strict=True))


@pytest.mark.parametrize("positions", [[5, 3], [3, 3], [-1, 3], [3, 10_000], [9000, 2], [9000, -7], [5] * 70_000])
@pytest.mark.parametrize("has_base", [False, True])
def test_positions_that_do_not_rise_are_refused_and_nothing_else_is_written(positions, has_base):
    """A user may have changed them past torch, so that no check of the adapter has seen it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10_000, generator=generator) if has_base else None
    wrong = Contribution(torch.tensor(positions).int(), torch.ones(len(positions)), 1.0, not has_base, False)
    right = change(10_000, 0.3, torch.float32, not has_base, generator)
    for changes in ([wrong], [right, wrong], [wrong, right]):
        with pytest.raises(IndexError, match=r"positions that do not rise from 0 to 9999"):
            kernels.native.combine(weight, changes, torch.float32, "sum", 10_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), torch.finfo(torch.float32).max])
def test_it_says_whether_all_values_are_finite(dtype, value):
    where = torch.arange(5000, dtype=torch.int32)
    for place in (0, 4095, 4999):
        values = torch.ones(5000)
        values[place] = value
        twice = [Contribution(where, values, 1.0, True, False)] * 2
        assert not kernels.native.combine(None, twice, dtype, "sum", 5000).is_finite
        assert kernels.native.combine(None, [twice[0]._replace(values=torch.ones(5000))] * 2, dtype, "sum", 5000).is_finite


@pytest.mark.parametrize("at_once", [1, 2**26])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_selection_of_a_whole_model_is_what_other_backends_make_of_it(monkeypatch, dtype, at_once):
    """In one call or in several; from the base, and while another is active. An overflow in one tensor changes nothing."""
    monkeypatch.setattr(preparing, "AT_ONCE", at_once)
    live = {}
    for backend in kernels.BACKENDS:
        model = mlp(dtype)
        switcher = shira.Switcher(model)
        for name, seed in (("a", 1), ("b", 2), ("c", 3)):
            switcher.add(name, random_adapter(model, seed))
        with kernels.backend(backend):
            for selection in ({"a": 0.5, "b": 1.0}, {"a": -0.3, "b": 0.4, "c": 1.0}):
                switcher.use(selection)
                live.setdefault(str(selection), []).append(all_bits(model))
            before = all_bits(model)
            with pytest.raises(shira.AdapterError, match="would overflow"):
                switcher.use({"a": 3e38, "b": 3e38})
            assert same_bits(all_bits(model), before)
    for found in live.values():
        assert all(same_bits(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kind", ["delta", "overwrite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_is_not_finite_is_named_in_place_of_the_strengths(kind, dtype):
    for backend in kernels.BACKENDS:
        model = mlp(dtype)
        with torch.no_grad():
            model[0].weight[3, 4:6] = float("nan")
        before = all_bits(model)
        place = torch.tensor([3 * 13 + 4, 3 * 13 + 5, 3 * 13 + 6])
        sparse = shira.SparseTensor((11, 13), place, torch.ones(3, dtype=dtype), kind)
        switcher = shira.Switcher(model)
        switcher.add("a", shira.Adapter({"0.weight": sparse}))
        with kernels.backend(backend):
            for call in (switcher.use, switcher.changes):
                with pytest.raises(shira.AdapterError, match="2 of the entries of '0.weight' .* NaN in the base; mend it"):
                    call({"a": 0.5})
        assert same_bits(all_bits(model), before)


def test_a_selection_from_files_has_the_bits_of_one_from_memory(tmp_path, monkeypatch):
    """A file that was checked before is read again for each new selection. Its gaps then reach the kernel as they are."""
    monkeypatch.setattr(sources, "SETTLED", -(10**12))  # the files need not be old
    model = mlp()
    adapters = {name: random_adapter(model, seed) for name, seed in (("a", 1), ("b", 2))}
    files = {name: tmp_path / f"{name}.safetensors" for name in adapters}
    decoded, decode = [], encoding.decode
    monkeypatch.setattr(encoding, "decode", lambda *stored: decoded.append(stored) or decode(*stored))
    live = []
    for held in (adapters, files):
        switcher = shira.Switcher(model)
        for name, source in held.items():
            if held is files:
                adapters[name].save(source)
            switcher.add(name, source)
        decoded.clear()
        switcher.use({"a": 0.5, "b": -0.3})
        live.append(all_bits(model))
        switcher.use(None)
    assert same_bits(*live) and not decoded
