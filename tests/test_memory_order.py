"""Weights in `channels_last`, or in any other order of their dimensions: they are written as contiguous ones are."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import shira
from conftest import all_bits, same_bits
from shira import SparseTensor, Switcher, kernels
from shira.errors import BaseMismatch
from shira.sparse.memory_order import memory_order


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 1), nn.ConvTranspose2d(6, 5, 2), nn.BatchNorm2d(5), nn.Linear(5, 4)
    )


def part_of(model, seed, kind="overwrite"):
    chance = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in model.named_parameters():
        indices = torch.randperm(weight.numel(), generator=chance)[: weight.numel() // 3 + 1].sort().values
        tensors[name] = SparseTensor(tuple(weight.shape), indices, torch.randn(indices.numel(), generator=chance), kind)
    return shira.Adapter(tensors)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data())
def test_positions_and_places(shape, data):
    dims = data.draw(st.permutations(range(len(shape))))
    tensor = torch.arange(torch.Size(shape).numel()).view([shape[dim] for dim in dims])
    tensor = tensor.permute(sorted(range(len(dims)), key=dims.__getitem__))
    assert list(tensor.shape) == shape
    order = memory_order(tensor.shape, tensor.stride())
    assert (order is None) == tensor.is_contiguous()
    if order is not None:
        every = torch.arange(tensor.numel(), dtype=torch.int32)
        assert order.view(tensor).is_contiguous() and order.view(tensor).data_ptr() == tensor.data_ptr()
        assert torch.equal(order.view(tensor).reshape(-1)[order.places(every).long()], tensor.reshape(-1))
        assert torch.equal(order.positions(order.places(every)), every)


@pytest.mark.parametrize("tensor", [torch.ones(3, 1).expand(3, 4), torch.ones(4, 8)[:, ::2], torch.ones(6, 4)[::2].t()])
def test_entries_that_share_memory_or_have_gaps(tensor):
    assert not tensor.is_contiguous() and memory_order(tensor.shape, tensor.stride()) is None
    layer = nn.Linear(*reversed(tensor.shape), bias=False)
    layer.weight = nn.Parameter(tensor)
    switcher = Switcher(layer)
    adapter = shira.Adapter({"weight": SparseTensor(tuple(tensor.shape), torch.tensor([1]), torch.ones(1))})
    with pytest.raises(BaseMismatch, match="'weight' must be contiguous, or .* replace it by its contiguous"):
        switcher.add("x", adapter)


@pytest.mark.parametrize("name", ["native", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_selection_writes_what_it_writes_into_contiguous_weights(name, dtype):
    with kernels.backend(name):
        compare_all_selections(dtype)


def compare_all_selections(dtype):
    plain = convolutions().to(dtype)
    turned = convolutions().to(dtype, memory_format=torch.channels_last)
    turned[4].weight.data = turned[4].weight.data.t().contiguous().t()
    assert not (turned[0].weight.is_contiguous() or turned[4].weight.is_contiguous())
    switchers = [Switcher(plain), Switcher(turned)]
    for switcher in switchers:
        for name, seed, kind in (("a", 1, "overwrite"), ("b", 2, "overwrite"), ("c", 3, "delta")):
            switcher.add(name, part_of(plain, seed, kind))
        same = part_of(plain, 1)
        switcher.add("a2", shira.Adapter({n: SparseTensor(t.shape, t.indices, 2 * t.values) for n, t in same.tensors.items()}))
    selections = ["a", "a2", "b", {"a": 0.5, "b": 0.3}, {"a": 1.0, "c": 2.0}, None, "c", {"a": -1.0, "a2": 1.0}]
    for one, other in itertools.permutations(selections, 2):
        for selection in (one, other):
            for switcher in switchers:
                switcher.use(selection)
            assert same_bits(all_bits(plain), all_bits(turned))
    first, second = ({name: (t.indices, t.values) for name, t in s.changes({"a": 0.5, "b": 1}).items()} for s in switchers)
    assert all(torch.equal(*pair) for name in first for pair in zip(first[name], second[name], strict=True))


@pytest.mark.parametrize("active", [None, "a", {"a": 0.5, "b": 0.3}], ids=str)
@pytest.mark.parametrize("later", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_layout_changes_between_two_calls(active, later):
    model = convolutions()
    if later is torch.contiguous_format:
        model.to(memory_format=torch.channels_last)
    base = all_bits(model)
    switcher = Switcher(model)
    for name, seed in (("a", 1), ("b", 2)):
        switcher.add(name, part_of(model, seed))
        switcher.use(name)
    switcher.use("b")
    expected = all_bits(model)
    switcher.use(active)
    model.to(memory_format=later)
    switcher.use("b")
    assert same_bits(expected, all_bits(model))
    switcher.use(active)
    model.to(memory_format=later)
    switcher.use(None)
    assert same_bits(base, all_bits(model))


@pytest.mark.parametrize(
    "act",
    [
        lambda model: model.half().float(),
        lambda model: setattr(model[0].weight, "data", model[0].weight.data.clone()),
        lambda model: setattr(model[0], "weight", nn.Parameter(model[0].weight.detach().clone())),
        lambda model: model.to(memory_format=torch.contiguous_format).double(),
    ],
    ids=["cast twice", "other data", "another parameter", "contiguous and double"],
)
def test_acts_while_an_adapter_is_active(act):
    model = convolutions().to(memory_format=torch.channels_last)
    expected = convolutions().to(memory_format=torch.channels_last)
    switcher = Switcher(model)
    switcher.add("a", part_of(model, 1))
    switcher.use("a")
    act(model)
    act(expected)
    switcher.use(None)
    assert same_bits(all_bits(expected), all_bits(model))


@pytest.mark.parametrize("layout", [None, torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("before", [None, "a"])
def test_an_interrupt_while_such_weights_are_written_and_another_layout_after_it(monkeypatch, before, layout):
    model = convolutions().to(memory_format=torch.channels_last)
    base = all_bits(model)
    switcher = Switcher(model)
    for name, seed in (("a", 1), ("b", 2)):
        switcher.add(name, part_of(model, seed))
    switcher.use(before)

    change = kernels.change_

    def interrupted(leaving, coming):
        change(leaving, coming)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(kernels, "change_", interrupted)
        patched.setattr(Switcher, "_undo_interrupted", lambda self: None)  # as if a second interrupt came
        switcher.use("b")
    assert not same_bits(base, all_bits(model))
    if layout is not None:
        model.to(memory_format=layout)
    switcher.use(None)
    assert same_bits(base, all_bits(model))


def test_a_switcher_that_is_gone_and_a_base_that_changed():
    model = convolutions().to(memory_format=torch.channels_last)
    base = all_bits(model)
    adapter = part_of(model, 1)
    switcher = Switcher(model)
    switcher.add("a", adapter)
    switcher.use("a")
    del switcher
    assert not same_bits(base, all_bits(model))
    switcher = Switcher(model)
    assert same_bits(base, all_bits(model))
    switcher.add("a", adapter)
    switcher.use("a")
    model.load_state_dict(convolutions().state_dict())
    switcher.use(None)
    assert same_bits(base, all_bits(model))


def test_a_base_in_another_order_is_read_as_a_contiguous_one():
    plain, turned = convolutions(), convolutions().to(memory_format=torch.channels_last)
    parts = {"a": (part_of(plain, 1), 1.0), "b": (part_of(plain, 2), 0.5)}
    for method in ("sum", "ties"):
        one, other = (shira.fuse(parts, base=model, method=method) for model in (plain, turned))
        for name, tensor in one.tensors.items():
            assert torch.equal(tensor.indices, other.tensors[name].indices)
            assert torch.equal(tensor.values, other.tensors[name].values)
