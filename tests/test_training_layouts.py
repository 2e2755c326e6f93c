"""Training weights in `channels_last`, or in any other order of their dimensions, beside training contiguous ones."""

import pytest
import torch
from torch import nn

import shira
from conftest import all_bits, same_bits
from shira import kernels
from shira.errors import TargetError, TuningError

CONTIGUOUS, TURNED = torch.contiguous_format, torch.channels_last


def network(layout, dtype=torch.float32):
    """Every kind of layer that has a backward pass of its own, and others; the linear weight is transposed in memory."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 1),
        nn.ConvTranspose2d(8, 6, 2, stride=2),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 3, groups=2),
        nn.Flatten(),
        nn.Linear(216, 24),
    ).to(dtype, memory_format=layout)
    if layout is TURNED:
        model[8].weight.data = model[8].weight.data.t().contiguous().t()
        assert not any(model[number].weight.is_contiguous() for number in (0, 4, 6, 8))
    return model


def batch(dtype=torch.float32):
    chance = torch.Generator().manual_seed(1)
    return torch.randn(5, 4, 4, 4, generator=chance).to(dtype), torch.randint(0, 24, (5,), generator=chance)


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


def attached(model, **options):
    usual = {"targets": ".*", "density": 0.3, "calibration": [batch()], "loss_fn": loss_of}
    return shira.attach(model, **(usual | options))


def trained(tuner, steps=3, dtype=torch.float32):
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(tuner.model, batch(dtype)).backward()
        optimizer.step()
    return optimizer


def assert_alike(one, other, tolerance=1e-5):
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor.indices, other.tensors[name].indices)
        torch.testing.assert_close(tensor.values, other.tensors[name].values, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("method", ["values", "hook"])
@pytest.mark.parametrize("mask", ["wm", "rand", "snip", "grad", "lift"])
def test_the_same_entries_train_to_the_same_values(mask, method):
    adapters = []
    for layout in (CONTIGUOUS, TURNED):
        model = network(layout)
        base = all_bits(model)
        with attached(model, mask=mask, method=method) as tuner:
            trained(tuner)
            adapters.append(tuner.adapter())
        assert same_bits(base, all_bits(model))
    assert_alike(*adapters)


@pytest.mark.parametrize("options", [{"low_rank": 2, "targets": ["8"]}, {"decompose": True}, {"scope": "model"}], ids=str)
def test_variants(options):
    adapters = []
    for layout in (CONTIGUOUS, TURNED):
        model = network(layout)
        base = all_bits(model)
        with attached(model, **({"mask": "snip", "targets": ["0", "3", "8"]} | options)) as tuner:
            torch.manual_seed(0)
            trained(tuner)
            adapters.append(tuner.adapter())
        assert same_bits(base, all_bits(model))
    assert_alike(*adapters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["native", "torch", "reference"])
def test_the_layout_changes_while_a_tuner_is_attached(name, dtype):
    with kernels.backend(name):
        model, base = network(CONTIGUOUS, dtype), all_bits(network(CONTIGUOUS, dtype))
        tuner = attached(model, mask="rand")
        trained(tuner, dtype=dtype)
        before = tuner.adapter()
        for layout in (TURNED, CONTIGUOUS, TURNED):
            model.to(memory_format=layout)
            now = tuner.adapter()
            assert all(torch.equal(tensor.values, now.tensors[name].values) for name, tensor in before.tensors.items())
            with tuner.reference():
                assert same_bits(base, {name: value for name, value in all_bits(model).items() if name in base})
        optimizer = trained(tuner, dtype=dtype)
        moved = tuner.refresh(optimizer)
        assert moved == 0  # rand chooses the same entries
        after = tuner.adapter()
        assert any(not torch.equal(tensor.values, after.tensors[name].values) for name, tensor in before.tensors.items())
        tuner.detach()
        assert same_bits(base, all_bits(model))
        switcher = shira.Switcher(model)
        switcher.add("trained", after)
        switcher.use("trained")
        for entry, tensor in after.tensors.items():
            weight = model.state_dict()[entry]
            assert torch.equal(weight[torch.unravel_index(tensor.indices.long(), weight.shape)], tensor.values)


def test_a_mask_moves_and_stays_near():
    adapters = []
    for layout in (CONTIGUOUS, TURNED):
        model = network(layout)
        base = all_bits(model)
        tuner = attached(model, mask="snip")
        optimizer = trained(tuner)
        assert tuner.refresh(optimizer, calibration=[batch()], cap=1.2) > 0
        trained(tuner)
        adapters.append(tuner.adapter())
        tuner.detach()
        assert same_bits(base, all_bits(model))
    assert_alike(*adapters, tolerance=1e-4)
    with attached(network(TURNED), mask="rand") as tuner:
        tuner.stay_near([batch()])
        trained(tuner)


@pytest.mark.parametrize("saved", [CONTIGUOUS, TURNED], ids=str)
def test_training_goes_on_in_another_layout(saved):
    loaded = TURNED if saved is CONTIGUOUS else CONTIGUOUS
    with attached(network(saved), mask="wm") as tuner:
        trained(tuner)
        state, adapter = tuner.state_dict(), tuner.adapter()
    with attached(network(loaded), mask="wm") as tuner:
        tuner.load_state_dict(state)
        assert_alike(adapter, tuner.adapter(), tolerance=0)
    model = network(loaded)
    with shira.attach(model, start=adapter) as tuner:
        assert_alike(adapter, tuner.adapter(), tolerance=0)
        trained(tuner)


def test_other_code_writes_to_such_a_weight():
    model = network(TURNED)
    tuner = attached(model, mask="rand")
    trained(tuner)
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(TuningError, match="'0.weight' was written to or replaced by others"):
        tuner.detach()
    model.load_state_dict(network(TURNED).state_dict(), strict=False)
    tuner.detach()
    assert same_bits(all_bits(network(TURNED)), all_bits(model))


def test_a_backward_pass_through_a_weight_that_was_written_since():
    model = network(TURNED)
    tuner = attached(model, mask="rand")
    optimizer = trained(tuner)
    loss = loss_of(model, batch())
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_with_gaps_are_refused():
    model = nn.Sequential(nn.Linear(3, 4))
    model[0].weight = nn.Parameter(torch.randn(4, 6)[:, ::2])
    with pytest.raises(TargetError, match=r"'0.weight' must be .*not contiguous: strides \[6, 2\]"):
        shira.attach(model, mask="rand", density=0.5)
    model[0].weight = nn.Parameter(torch.randn(4, 3))
    base = all_bits(model)
    with shira.attach(model, mask="rand", density=0.5) as tuner:
        (kept, model[0].weight.data) = (model[0].weight.data, torch.randn(4, 6)[:, ::2])
        with pytest.raises(TuningError, match="'0.weight' is not contiguous: it has gaps"):
            tuner.adapter()
        model[0].weight.data = kept
    assert same_bits(base, all_bits(model))
