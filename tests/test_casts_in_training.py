"""Casts that change no weight, and writes of the same values, while a tuner is attached: the base comes back."""

import copy

import pytest
import torch
from torch import nn

import shira
from conftest import all_bits, mlp, mlp_batches, mlp_loss, same_bits


def trained(model, steps=3, **settings):
    tuner = shira.attach(model, **({"density": 0.2, "mask": "rand"} | settings))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for batch in mlp_batches(steps):
        optimizer.zero_grad()
        mlp_loss(model, batch).backward()
        optimizer.step()
    return tuner, optimizer


VARIANTS = [{}, {"lr_scale": 64}, {"lr_scale": 1 / 64}, {"decompose": True}, {"decompose": 2}, {"low_rank": 2}]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_cast_that_changes_no_weight(dtype, variant):
    model = mlp(dtype)
    base = all_bits(model)
    tuner, _ = trained(model, **variant)
    for _ in range(2):
        model.to(dtype)
        mlp_loss(model, mlp_batches()[0]).backward()
        tuner.adapter()
    model.to(dtype)
    tuner.detach()
    assert same_bits(base, all_bits(model))


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float64])
def test_the_masters_are_cast(to):
    model = mlp()
    base = all_bits(model)
    tuner, optimizer = trained(model)
    for parameter in tuner.parameters():
        parameter.data = parameter.data.to(to)
    before = tuner.adapter()
    assert all(parameter.dtype == torch.float32 for parameter in tuner.parameters())
    mlp_loss(model, mlp_batches()[0]).backward()
    optimizer.step()
    assert any(not torch.equal(t.values, tuner.adapter().tensors[n].values) for n, t in before.tensors.items())
    tuner.detach()
    assert same_bits(base, all_bits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_exact_cast_and_then_the_same_values_again(dtype):
    """As DistributedDataParallel writes them, which sends the first process's weights to all."""
    model, base = mlp(dtype), all_bits(mlp(dtype).float())
    tuner, _ = trained(model)
    model.float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.clone())
    tuner.adapter()
    tuner.detach()
    assert same_bits(base, all_bits(model))


def load_the_base(model, tuner):
    model.load_state_dict(mlp().state_dict())


def replace_inside_reference(model, tuner):
    with tuner.reference():
        for layer in (model[0], model[2]):
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def cast_inside_reference(model, tuner):
    with tuner.reference():
        model.double()


@pytest.mark.parametrize("act", [load_the_base, replace_inside_reference, cast_inside_reference])
def test_entries_that_trained_earlier_are_written_again(act):
    """A mask has moved, and entries that left it keep their values: the model and its adapter must stay the same."""
    model = mlp()
    tuner, optimizer = trained(model, mask="snip", calibration=mlp_batches(), loss_fn=mlp_loss)
    assert tuner.refresh(optimizer, calibration=mlp_batches(seed=5), cap=2) > 0
    inputs = mlp_batches()[0][0]
    expected = model(inputs.to(next(model.parameters())))
    before = tuner.adapter()
    act(model, tuner)
    found = model(inputs.to(next(model.parameters())))
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-6)
    for name, tensor in before.tensors.items():
        weight = model.get_parameter(name).detach().view(-1)
        assert torch.equal(weight[tensor.indices.long()].float(), tensor.values)
    tuner.detach()
    assert same_bits(all_bits(mlp().to(next(model.parameters()).dtype)), all_bits(model))


def test_a_copy_of_a_model_in_training_has_no_part_in_it():
    model = mlp()
    tuner, _ = trained(model)
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    tuner.detach()
    assert same_bits(all_bits(mlp()), all_bits(model))
