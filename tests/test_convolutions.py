"""Convolutions train as they would densely: to the bit if the whole gradient is computed, closely if it is sampled."""

import contextlib

import pytest
import torch
from torch import nn

import shira
from conftest import bits
from shira import kernels
from shira.training import convolutions

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
    with shira.attach(nn.Sequential(layer), mask=mask, density=0.3, targets=["0"]) as tuner:
        (values,) = tuner.parameters()
        found = (*passes(layer, input, autocast), values.grad)
        where = tuner.adapter("a").tensors["0.weight"].indices
    return (*plain[:2], kernels.gather(plain[2].contiguous(), where)), found


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("images", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_gradient_has_the_bits_of_torchs_own(kind, images, autocast):
    torch.manual_seed(0)
    plain, found = trained(KINDS[kind](), INPUTS[images](), autocast)
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(plain, found, strict=True))


@pytest.mark.parametrize("part_bytes", [1, 9_000, 2**24])  # a line, a few images, all images at a time
@pytest.mark.parametrize("images", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sampled_gradient_is_the_dense_one_at_the_positions(kind, images, part_bytes, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(convolutions, "_sampling_wins", lambda *_: True)
    monkeypatch.setattr(convolutions, "PART_BYTES", part_bytes)
    monkeypatch.setattr(convolutions.Masters, "sample", None)  # of a whole gradient: not to be called
    plain, found = trained(KINDS[kind](), INPUTS[images]())
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(plain[:2], found[:2], strict=True))
    torch.testing.assert_close(found[2], plain[2])


@pytest.mark.skipif(not kernels.native.available(), reason="sampling needs the kernels in C")
@pytest.mark.parametrize(("side", "mask", "dtype", "sampled"), [
    (320, "rand", torch.float32, True),
    (32, "rand", torch.float32, False),
    (320, "struct", torch.float32, False),
    (320, "rand", torch.bfloat16, False),
])  # fmt: skip
def test_sampling_is_for_large_weights_with_few_trained_entries(side, mask, dtype, sampled, monkeypatch):
    calls = []
    parts = convolutions._parts
    monkeypatch.setattr(convolutions, "_parts", lambda *given: calls.append(1) or parts(*given))
    layer = nn.Conv2d(side, side, 3, padding=1, dtype=dtype)
    with shira.attach(nn.Sequential(layer), mask=mask, density=0.01, targets=["0"]) as tuner:
        layer(torch.randn(1, side, 4, 4, dtype=dtype)).sum().backward()
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
