"""The product that engines take on CPUs is that of torch's linear layers."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shira.serving.cpu_linear import linear, take_onednn


@given(
    batch=st.lists(st.integers(0, 5), max_size=3),
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    layout=st.sampled_from(["plain", "transposed", "every other"]),
)
def test_it_is_that_of_torch(batch, rows, columns, bias, dtype, layout):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(*batch, columns, generator=generator).to(dtype)
    weight = torch.randn(columns, rows, generator=generator).to(dtype).t()
    if layout != "transposed":
        weight = weight.contiguous()
    if layout == "every other":
        input = input.repeat_interleave(2, -1)[..., ::2]
    added = torch.randn(rows, generator=generator).to(dtype) if bias else None
    expected = nn.functional.linear(input.double(), weight.double(), None if added is None else added.double())
    with torch.inference_mode():
        torch.testing.assert_close(
            linear(input, weight, added), expected.to(dtype), atol=2e-2 if dtype.itemsize < 4 else 1e-4, rtol=1e-2
        )


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_a_layer_reads_its_weight_at_each_call_and_a_copy_its_own():
    model = nn.Sequential(nn.Linear(3, 4), Doubled(4, 2))
    own = model[1].forward
    take_onednn(model)
    assert model[1].forward == own
    other = copy.deepcopy(model)
    x = torch.randn(5, 3)
    with torch.inference_mode():
        before = other[0](x)
        model[0].weight.data.zero_()
        torch.testing.assert_close(model[0](x), model[0].bias.expand(5, 4))
        assert torch.equal(other[0](x), before)
        model[0].weight = nn.Parameter(torch.ones(4, 3))
        torch.testing.assert_close(model[0](x), x.sum(1, keepdim=True) + model[0].bias)
    with pytest.raises(RuntimeError):
        model[0](torch.randn(5, 4))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's tracer warns of what it does itself
def test_a_compiled_model_computes_the_same_and_reads_its_weights_at_each_call():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    take_onednn(model)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(5, 3)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x))
        model[0].weight.data.mul_(2)
        torch.testing.assert_close(compiled(x), model(x))
        assert compiled(x[:0]).shape == (0, 2)


def test_a_bias_of_another_layout_or_shape():
    weight, x = torch.randn(6, 8), torch.randn(3, 8)
    for bias in (torch.randn(6, 2)[:, 0], torch.randn(1).expand(6), torch.randn(1), torch.randn(3, 6)):
        torch.testing.assert_close(linear(x, weight, bias), nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(linear(x, weight[0]), nn.functional.linear(x, weight[0]))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype is torch.bfloat16
