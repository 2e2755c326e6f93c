"""One learning rate for all masks: entries that train in another unit than the weights'."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import shira
from conftest import all_bits, attach_is_refused, bits, mlp, mlp_batches, mlp_loss, same_bits
from shira import TuningError
from shira.training.lr_scale import LORA_OVER_FULL, scale_for


def trained(model, lr, steps=4, eps=0.0, **options):
    """The trained entries after some steps of Adam."""
    with shira.attach(model, density=0.2, calibration=mlp_batches(), loss_fn=mlp_loss, **options) as tuner:
        optimizer = torch.optim.Adam(tuner.parameters(), lr=lr, eps=eps)
        for batch in mlp_batches(steps, seed=1):
            mlp_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        return tuner.adapter(), tuner.lr_scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.25, 4.0])
def test_a_scale_is_a_learning_rate_as_many_times_as_high_to_the_bit(scale, dtype):
    """Adam divides gradients by their size, and powers of two lose no bit."""
    model = mlp(dtype)
    before = all_bits(model)
    ours, _ = trained(model, 2**-10, lr_scale=scale, mask="rand")
    plain, _ = trained(model, 2**-10 * scale, mask="rand")
    assert ours.metadata["mask"]["lr_scale"] == scale and "lr_scale" not in plain.metadata["mask"]
    for name, tensor in plain.tensors.items():
        assert torch.equal(ours.tensors[name].values, tensor.values), name
        assert not torch.equal(tensor.values, model.get_parameter(name).detach().view(-1)[tensor.indices.long()])
    assert same_bits(all_bits(model), before)


@given(share=st.floats(1e-6, 1.0))
def test_the_rule_gives_every_mask_the_same_decrease_within_the_rounding_to_a_power_of_two(share):
    scale = scale_for(share)
    assert math.frexp(scale)[0] == 0.5
    if 2.0**-6 < scale < 2.0**6:
        assert 2**-0.5 - 1e-9 <= scale * share * LORA_OVER_FULL <= 2**0.5 + 1e-9


def big():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 50), nn.ReLU(), nn.Linear(50, 5))


@pytest.mark.parametrize(("density", "expected"), [(0.01, 8), (0.03, 4), (0.1, 1), (1.0, 1 / 8)])
def test_masks_that_saw_no_data_are_scaled_by_their_density(density, expected):
    for mask in ("wm", "rand"):
        with shira.attach(big(), mask=mask, density=density, lr_scale="auto") as tuner:
            assert tuner.lr_scale == expected


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("mask", ["rand", "wm", "snip", "grad", "fisher", "wanda", "lift", "struct", "union:of=wm+snip"])
def test_the_first_step_of_every_mask_is_about_that_of_full_fine_tuning(mask, scope):
    """What the first step of Adam lowers the loss by, if it is small: learning rate · Σ |gradient| over the parameters."""
    if scope == "model" and mask in ("struct", "union:of=wm+snip"):
        pytest.skip("it ranks no entries")
    decreases = []
    for options in ({"density": 1.0}, {"density": 0.25, "mask": mask, "scope": scope}):
        model = big()
        with shira.attach(model, calibration=mlp_batches(1), loss_fn=mlp_loss, lr_scale="auto", **options) as tuner:
            mlp_loss(model, mlp_batches(1)[0]).backward()
            decreases.append(sum(float(parameter.grad.abs().sum()) for parameter in tuner.parameters()))
    most = 4 if mask == "wanda" else 2.5  # which knows the inputs alone
    assert 1 / most < decreases[1] / decreases[0] < most


def test_a_run_is_resumed_in_any_scale():
    """A checkpoint holds the entries' values, as those of earlier releases do."""
    model = mlp()
    with shira.attach(model, density=0.2, lr_scale=4.0) as tuner, torch.no_grad():
        for parameter in tuner.parameters():
            parameter.add_(0.37)
        state, before = tuner.state_dict(), tuner.adapter()
    with shira.attach(model, density=0.2) as tuner:
        tuner.load_state_dict(state)
        for name, tensor in tuner.adapter().tensors.items():
            assert torch.equal(tensor.values, before.tensors[name].values)


def test_variants_and_refresh():
    model = mlp()
    with shira.attach(model, density=0.2, lr_scale=4.0, low_rank=2) as tuner:
        assert tuner.adapter().nnz == tuner.nnz
        plain = tuner.parameters()[0]
        torch.testing.assert_close(4 * plain.detach(), model[0].weight.detach().view(-1)[tuner._tuned[0].indices.long()])
    with shira.attach(model, mask="wm", density=0.2, lr_scale=4.0) as tuner:
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.5)
        for batch in mlp_batches(3):
            mlp_loss(model, batch).backward()
            optimizer.step()
            before = [p.detach().clone() for p in tuner.parameters()]
            tuner.refresh(optimizer)
        held = {name: tensor.values for name, tensor in tuner.adapter().tensors.items()}
        for each in tuner._tuned:
            assert torch.equal(held[each.name], each.current().detach())
            torch.testing.assert_close(
                each.current().detach(), model.get_parameter(each.name).detach().view(-1)[each.indices.long()]
            )
        assert len(before) == 2


def test_the_pull_to_the_base_is_that_of_the_entries():
    def pulled(scale):
        model = mlp()
        with shira.attach(model, density=0.2, lr_scale=scale) as tuner:
            tuner.stay_near(mlp_batches(), reach=0.01, loss_fn=mlp_loss)
            with torch.no_grad():
                for parameter in tuner.parameters():
                    parameter.add_(0.125 / scale)
            mlp_loss(model, mlp_batches(1)[0]).backward()
            return [p.grad / scale for p in tuner.parameters()]

    for one, other in zip(pulled(1.0), pulled(8.0), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("wrong", [0, -1, 3.0, True, "Auto", None, float("nan"), 128.0, 10**400, torch.tensor(2.0)])
def test_wrong_scales_are_refused(wrong):
    attach_is_refused({"lr_scale": wrong}, TuningError, "lr_scale must be 'auto', or a power of two")


@pytest.mark.parametrize("options", [{"method": "hook"}, {"decompose": True}])
def test_ways_that_train_something_else_have_none(options):
    attach_is_refused({"lr_scale": 2, **options}, TuningError, "lr_scale=2 cannot scale; leave it out")
    with shira.attach(mlp(), lr_scale="auto", **options) as tuner:
        assert tuner.lr_scale == 1


def test_a_new_head_keeps_its_own_learning_rate():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    with shira.attach(BertForSequenceClassification(config), density=0.02, lr_scale="auto") as tuner:
        assert tuner.lr_scale == 1
    with shira.attach(BertForSequenceClassification(config), density=0.02, lr_scale=4) as tuner:
        scales = {each.name: each.scale for each in tuner._tuned}
    assert {scale for name, scale in scales.items() if "classifier" in name} == {1.0}
    assert {scale for name, scale in scales.items() if "classifier" not in name} == {4.0}


def test_a_cast_to_float16_loses_nothing_that_the_weight_keeps():
    """Values divided by 64 are below what float16 holds; the weight itself was cast as well, and has them."""
    model = mlp()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    expected = {name: bits(parameter.half()) for name, parameter in model.named_parameters()}
    with shira.attach(model, mask="rand", density=0.5, lr_scale=64) as tuner:
        model.half()
        assert tuner.adapter().nnz == tuner.nnz
        model(torch.zeros(1, 13, dtype=torch.float16))
        now = all_bits(model)
        assert same_bits({name: now[name] for name in expected}, expected)
    assert same_bits(all_bits(model), expected)


def test_values_out_of_range_are_refused():
    model = mlp()
    model[0].weight.data[0, 0] = torch.finfo(torch.float32).max
    before = all_bits(model)
    with pytest.raises(TuningError, match="lr_scale=0.5 takes out of float32's range"):
        shira.attach(model, density=0.1, lr_scale=0.5)
    assert same_bits(all_bits(model), before)


def scale_of(model, **options):
    with shira.attach(model, loss_fn=mlp_loss, lr_scale="auto", **options) as tuner:
        return tuner.lr_scale


def test_entries_that_must_not_train_do_not_count():
    model, batches = big(), mlp_batches(1)
    with shira.attach(model, mask="grad", density=0.8, calibration=batches, loss_fn=mlp_loss) as tuner:
        steep = tuner.adapter()
    options = {"mask": "grad", "density": 0.05, "calibration": batches, "avoid": steep}
    assert scale_of(model, **options) == scale_of(model, scope="model", **options) >= 4


def test_without_a_gradient_the_density_decides():
    model = big()
    for parameter in model[2].parameters():
        parameter.data.zero_()
    assert scale_of(model, mask="snip", density=0.05, calibration=mlp_batches(1), targets=["0"]) == 2
    assert scale_for(0.0) == 64


def test_sums_that_overflow_float32():
    def steep(model, batch):
        return 1e36 * mlp_loss(model, batch)

    for mask in ("grad", "snip"):
        with shira.attach(big(), mask=mask, density=0.1, calibration=mlp_batches(1), loss_fn=steep, lr_scale="auto") as tuner:
            assert tuner.lr_scale <= 1
