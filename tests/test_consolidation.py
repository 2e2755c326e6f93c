"""Entries that are held near the base: the pull against a slow version, and a model that does not notice."""

import pytest
import torch
from torch import nn

import shira
from conftest import all_bits, mlp, mlp_batches, mlp_loss, same_bits, tiny_llama  # noqa: F401
from shira import MaskError, TuningError
from shira.integrations import transformers as hf

GENERAL = mlp_batches(5, seed=3)


def attach(model, **options):
    return shira.attach(model, mask="wm", density=0.3, loss_fn=mlp_loss, **options)


def gradients(model, tuner, batch, share=1.0):
    for parameter in tuner.parameters():
        parameter.grad = None
    (share * mlp_loss(model, batch)).backward()
    return [parameter.grad.clone() for parameter in tuner.parameters()]


def shift(tuner):
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(0.1)


def slow_pulls(base, positions, reach):
    """F one batch at a time on a copy of the base."""
    squared = [torch.zeros_like(p) for p in base.parameters() if p.ndim == 2]
    for batch in GENERAL:
        base.zero_grad()
        mlp_loss(base, batch).backward()
        for total, weight in zip(squared, (p for p in base.parameters() if p.ndim == 2), strict=True):
            total += weight.grad**2 / len(GENERAL)
    at = [total.view(-1)[where] for total, where in zip(squared, positions, strict=True)]
    return [f / (reach * f.mean().sqrt()) for f in at]


@pytest.mark.parametrize("trained", [False, True])
def test_the_pull_is_the_sensitivity_of_the_base_times_the_change(trained):
    """Also if weights have moved before: it is the base's sensitivity that counts."""
    model, (batch, other) = mlp(), mlp_batches(2, seed=1)
    with attach(model) as tuner:
        if trained:
            gradients(model, tuner, other)
            torch.optim.SGD(tuner.parameters(), lr=0.5).step()
        before, numbers = all_bits(model), torch.random.get_rng_state()
        unmoved = gradients(model, tuner, batch)
        tuner.stay_near(GENERAL, reach=0.02)
        assert same_bits(before, all_bits(model)) and torch.equal(numbers, torch.random.get_rng_state())
        if not trained:  # nothing has changed, nothing pulls
            assert all(torch.equal(*pair) for pair in zip(gradients(model, tuner, batch), unmoved, strict=True))
        shift(tuner)
        pulled, adapter = gradients(model, tuner, batch), tuner.adapter()
        values = [parameter.detach().clone() for parameter in tuner.parameters()]
    assert all(not parameter._backward_hooks for parameter in tuner.parameters())
    with attach(model) as tuner:  # the same values without a pull
        base = [parameter.detach().clone() for parameter in tuner.parameters()]
        with torch.no_grad():
            for parameter, value in zip(tuner.parameters(), values, strict=True):
                parameter.copy_(value)
        plain = gradients(model, tuner, batch)
    expected = slow_pulls(mlp(), [tensor.indices for tensor in adapter.tensors.values()], 0.02)
    for one, without, value, start, pull in zip(pulled, plain, values, base, expected, strict=True):
        torch.testing.assert_close(one, without + pull * (value - start), rtol=1e-4, atol=1e-6)


def test_accumulated_passes_pull_once():
    model, batch = mlp(), mlp_batches(1)[0]
    with attach(model) as tuner:
        tuner.stay_near(GENERAL, passes=2)
        shift(tuner)
        first = gradients(model, tuner, batch, 0.5)
        (0.5 * mlp_loss(model, batch)).backward()
        both = [parameter.grad for parameter in tuner.parameters()]
    model = mlp()
    with attach(model) as tuner:
        tuner.stay_near(GENERAL)
        shift(tuner)
        for whole, twice, once in zip(gradients(model, tuner, batch), both, first, strict=True):
            torch.testing.assert_close(twice, whole)
            torch.testing.assert_close(once, whole / 2)


def test_an_entry_that_nothing_is_sensitive_to_is_free():
    model = nn.Sequential(nn.Linear(13, 11), nn.Linear(11, 5))
    with torch.no_grad():
        model[1].weight.zero_()  # then nothing is felt of the layer before
    with attach(model) as tuner:
        tuner.stay_near(GENERAL)
        shift(tuner)
        assert all(torch.isfinite(gradient).all() for gradient in gradients(model, tuner, mlp_batches(1)[0]))


def test_what_cannot_be_asked():
    model = mlp()
    before = all_bits(model)
    for options, message in (
        ({"reach": 0}, "reach must be a number above 0"),
        ({"passes": 0}, "passes must be a whole number"),
        ({"loss_fn": 5}, "loss_fn must be a function"),
    ):
        with attach(model) as tuner, pytest.raises(TuningError, match=message):
            tuner.stay_near(GENERAL, **options)
    for batches in (None, 5, "text", {"input_ids": 1}, model):
        with attach(model) as tuner, pytest.raises(TuningError, match="batches"):
            tuner.stay_near(batches)
    with attach(model) as tuner, pytest.raises(MaskError, match="holds no batch"):
        tuner.stay_near([])
    with attach(model) as tuner:
        tuner.stay_near(GENERAL)
        with pytest.raises(TuningError, match="is called once"):
            tuner.stay_near(GENERAL)
        with pytest.raises(TuningError, match="cannot move after stay_near"):
            tuner.refresh(torch.optim.SGD(tuner.parameters(), lr=0.1))
    with attach(model, decompose=True) as tuner, pytest.raises(TuningError, match="plain entries"):
        tuner.stay_near(GENERAL)
    with pytest.raises(TuningError, match="only an attached tuner"):
        tuner.stay_near(GENERAL)
    assert same_bits(before, all_bits(model))


def test_a_model_writes_text_of_its_own(tiny_llama):  # noqa: F811
    from conftest import letter_tokenizer

    numbers, seen = torch.random.get_rng_state(), []
    rows = hf.own_text(tiny_llama, letter_tokenizer(), lambda done, total: seen.append((done, total)), rows=3, length=200)
    assert torch.equal(numbers, torch.random.get_rng_state())
    assert [len(row["input_ids"]) for row in rows] == [64] * 3 and seen[-1] == (63, 63)
    assert rows == hf.own_text(tiny_llama, letter_tokenizer(), rows=3, length=200)
    assert len({tuple(row["input_ids"]) for row in rows}) == 3
