"""Convolutions train as they would densely: to the bit if the whole gradient is computed, closely if it is sampled."""

import contextlib

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import shira
from conftest import bits
from shira import kernels
from shira.training import masters

KINDS = {
    "plain": lambda: nn.Conv2d(5, 7, 3, padding=1),
    "uneven": lambda: nn.Conv2d(5, 7, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(2, 1), bias=False),
    "a product": lambda: nn.Conv2d(5, 7, 1),
}
INPUTS = {
    "images": lambda: torch.randn(3, 5, 9, 11),
    "one image": lambda: torch.randn(5, 9, 11),
    "channels last": lambda: torch.randn(3, 5, 9, 11).to(memory_format=torch.channels_last),
}


def passes(layer: nn.Conv2d, input: torch.Tensor, autocast: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the input's gradient."""
    input = input.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        output = layer(input)
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype))
    return output.detach(), input.grad


def trained(layer: nn.Conv2d, input: torch.Tensor, autocast: bool = False, mask: str = "rand"):
    """What torch alone computes: output, input's gradient, the weight's at the positions. Then the same of a tuner."""
    layer.requires_grad_(True)
    plain = (*passes(layer, input, autocast), layer.weight.grad.clone())
    layer.zero_grad()
    with shira.attach(nn.Sequential(layer), mask=mask, density=0.4, targets=["0"]) as tuner:
        (values,) = tuner.parameters()
        found = (*passes(layer, input, autocast), values.grad)
        where = tuner.adapter("a").tensors["0.weight"].indices
    return (*plain[:2], kernels.gather(plain[2].contiguous(), where)), found


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("images", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_gradient_has_the_bits_of_torchs_own(kind, images, autocast, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(kernels.images, "sampling_wins", lambda *_: False)
    plain, found = trained(KINDS[kind](), INPUTS[images](), autocast)
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(plain, found, strict=True))


@pytest.mark.skipif(not kernels.native.available(), reason="sampling needs the kernels in C")
@pytest.mark.parametrize(("mask", "autocast"), [("rand", False), ("rand", True), ("struct", False)])
@pytest.mark.parametrize("images", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sampled_gradient_is_the_dense_one_at_the_positions(kind, images, mask, autocast, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(kernels.images, "sampling_wins", lambda *_: True)
    monkeypatch.setattr(masters.Masters, "sample", None)  # of a whole gradient: not to be called
    plain, found = trained(KINDS[kind](), INPUTS[images](), autocast, mask)
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(plain[:2], found[:2], strict=True))
    torch.testing.assert_close(found[2], plain[2], **({"rtol": 2e-2, "atol": 0.2} if autocast else {}))


PAIRS = st.tuples(st.integers(1, 4), st.integers(1, 4))


@given(
    sizes=st.tuples(st.integers(0, 6), *[st.integers(1, 6)] * 2, *[st.integers(1, 14)] * 2),
    sliding=st.builds(kernels.Sliding, PAIRS, PAIRS, st.tuples(st.integers(0, 3), st.integers(0, 3)), PAIRS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    index=st.sampled_from([torch.int32, torch.int64]),
    density=st.sampled_from([0.0, 0.03, 0.4, 1.0]),
    length=st.sampled_from([1, 30, 200, 2**11]),  # floats of a row: a line, some lines, some images, all images at a time
    columns=st.sampled_from([1, 500, 2**17]),  # floats of all rows of the input: a channel, some, all at a time
    seed=st.integers(0, 99),
)
def test_gradients_from_images_are_those_of_float64(sizes, sliding, dtype, index, density, length, columns, seed):
    images, outs, ins, *sides = sizes
    places = sliding.places(sides)
    assume(min(places) > 0)
    torch.manual_seed(seed)
    input, grad_output = torch.randn(images, ins, *sides).to(dtype), torch.randn(images, outs, *places).to(dtype)
    (_, *steps), shape = sliding, (outs, ins, *sliding.kernel)
    exact = torch.nn.grad.conv2d_weight(input.double(), shape, grad_output.double(), *steps).reshape(-1)
    indices = (torch.rand(exact.numel()) < density).nonzero().view(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.images, "LENGTH", length)
        patch.setattr(kernels.images, "COLUMNS", columns)
        for name in kernels.BACKENDS:
            with kernels.backend(name):
                found = kernels.sampled_images(grad_output, input, indices.to(index), sliding)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), exact[indices], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not kernels.native.available(), reason="sampling needs the kernels in C")
def test_a_gradient_is_infinite_where_the_dense_one_is():
    input, grad_output = torch.ones(17, 3), torch.ones(17, 4)
    input[12, 1] = float("inf")
    with kernels.backend("native"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.native, "sampling_wins", lambda *_: True)
        assert torch.equal(kernels.sampled_gradient(grad_output, input, torch.arange(12)), (grad_output.T @ input).view(-1))


@pytest.mark.skipif(not kernels.native.available(), reason="sampling needs the kernels in C")
def test_tensors_without_memory_do_not_reach_c():
    with FakeTensorMode():
        grad_output, input, positions = torch.ones(17, 400), torch.ones(17, 300), torch.arange(12)
        assert kernels.native.sampling_wins(input.dtype, 400, 300, 12)
        with kernels.backend("native"):
            assert kernels.sampled_gradient(grad_output, input, positions).shape == (12,)


@pytest.mark.skipif(not kernels.native.available(), reason="sampling needs the kernels in C")
def test_one_number_for_both_sides_is_taken_as_torch_takes_it():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, stride=2)
    layer.stride = (2,)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.images, "sampling_wins", lambda *_: True)
        plain, found = trained(layer, torch.randn(2, 3, 9, 9))
    torch.testing.assert_close(found[2], plain[2])


@pytest.mark.skipif(not kernels.native.available(), reason="sampling needs the kernels in C")
def test_images_and_positions_that_do_not_fit_are_refused():
    sliding = kernels.Sliding((3, 3), (1, 1), (1, 1), (1, 1))
    input, grad_output = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5)
    for other in (grad_output[:1], torch.randn(2, 4, 5, 4)):
        with pytest.raises(ValueError, match="is not that of images"):
            kernels.sampled_images(other, input, torch.tensor([0]), sliding)
    with pytest.raises(IndexError, match="int32 or int64"):
        kernels.sampled_images(grad_output, input, torch.tensor([1]).short(), sliding)
    for wrong in ([-1, 3], [0, 4 * 3 * 9]):
        with pytest.raises(IndexError, match=r"in a weight \[4, 3, 3, 3\]"):
            kernels.sampled_images(grad_output, input, torch.tensor(wrong), sliding)


@pytest.mark.skipif(not kernels.native.available(), reason="sampling needs the kernels in C")
@pytest.mark.parametrize(("density", "mask", "dtype", "sampled"), [
    (0.02, "rand", torch.float32, True),
    (0.02, "rand", torch.bfloat16, True),
    (0.04, "struct", torch.float32, True),
    (0.02, "rand", torch.float64, False),
    (0.7, "rand", torch.float32, False),
])  # fmt: skip
def test_sampling_is_for_few_trained_entries(density, mask, dtype, sampled, monkeypatch):
    calls = []
    real = kernels.images.sampled_images
    monkeypatch.setattr(kernels.images, "sampled_images", lambda *given: calls.append(1) or real(*given))
    layer = nn.Conv2d(32, 32, 3, padding=1, dtype=dtype)
    with shira.attach(nn.Sequential(layer), mask=mask, density=density, targets=["0"]) as tuner:
        layer(torch.randn(2, 32, 8, 8, dtype=dtype)).sum().backward()
        assert tuner.parameters()[0].grad.abs().sum() > 0
    assert bool(calls) == sampled


def test_other_convolutions_keep_their_own_forward():
    torch.manual_seed(0)
    for layer in (
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 8, 3, padding="same"),
    ):
        plain, found = trained(layer, torch.randn(2, 4, 6, 6))
        assert all(torch.equal(bits(one), bits(other)) for one, other in zip(plain, found, strict=True))


@pytest.mark.filterwarnings("ignore")  # torch's tracer warns of what it does itself
def test_a_compiled_convolution_is_one_graph_with_the_same_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3))
    input = torch.randn(2, 3, 8, 8)
    with shira.attach(model, mask="rand", density=0.3, targets=["0", "2"]) as tuner:
        model(input).square().sum().backward()
        eager = [values.grad.clone() for values in tuner.parameters()]
        for values in tuner.parameters():
            values.grad = None
        torch.compile(model, backend="aot_eager", fullgraph=True)(input).square().sum().backward()
        for values, gradient in zip(tuner.parameters(), eager, strict=True):
            torch.testing.assert_close(values.grad, gradient)
