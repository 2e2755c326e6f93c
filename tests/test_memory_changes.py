"""What is done to the memory of weights, and to what holds them, between two calls of a switcher or a tuner."""

import copy
import pickle

import pytest
import torch

import shira
from conftest import all_bits, mlp, random_adapter, same_bits
from shira import BaseMismatch, ShiraError, SwitchError, TargetError


def added(model, seed=1, **options):
    switcher = shira.Switcher(model, **options)
    switcher.add("a", random_adapter(model, seed))
    return switcher


def test_another_base_by_data_before_the_first_use():
    model = mlp()
    switcher = added(model)
    for weight in model.parameters():
        weight.data = weight.data + 1
    base = all_bits(model)
    for call in (lambda: switcher.use("a"), lambda: switcher.prefetch("a"), lambda: switcher.changes("a")):
        with pytest.raises(BaseMismatch, match="fingerprint"):
            call()
    assert same_bits(all_bits(model), base) and switcher.active == {}


def test_another_base_by_data_after_an_adapter_made_room_for_others():
    model = mlp()
    switcher = added(model, ready=1)
    switcher.add("b", random_adapter(model, 2))
    switcher.use("a")
    switcher.use("b")
    switcher.use(None)
    model[0].weight.data = model[0].weight.data * 2
    base = all_bits(model)
    with pytest.raises(BaseMismatch, match="fingerprint"):
        switcher.use("a")
    assert same_bits(all_bits(model), base)


def test_weights_are_tied_by_data_before_the_first_use():
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight)
    switcher = added(model)
    model[1].weight.data = model[0].weight.data
    base = all_bits(model)
    with pytest.raises(BaseMismatch, match="one tied tensor here, two in the adapter"):
        switcher.use("a")
    assert same_bits(all_bits(model), base)


@pytest.mark.parametrize("shape", [(5, 13), (40, 40)])
def test_a_weight_of_another_shape_by_data(shape):
    model = mlp()
    switcher = added(model)
    model[0].weight.data = torch.randn(shape)
    base = all_bits(model)
    with pytest.raises(BaseMismatch, match="has shape"):
        switcher.use("a")
    assert same_bits(all_bits(model), base)


def test_the_memory_of_a_weight_is_freed():
    """Torch's own operators raise an error there; C would end the process."""
    model = mlp()
    adapter, switcher = random_adapter(model, 1), added(model)
    model[0].weight.untyped_storage().resize_(0)
    with pytest.raises(BaseMismatch, match="the memory of '0.weight' was freed"):
        switcher.use("a")
    with pytest.raises(BaseMismatch, match="the memory of '0.weight' was freed"):
        shira.Switcher(model).add("a", adapter)
    for mask in ("wm", "rand"):
        with pytest.raises(TargetError, match="the memory of '0.weight' was freed"):
            shira.attach(model, targets=["0"], mask=mask, density=0.2)


def replaced(model):
    model.__setstate__(pickle.loads(pickle.dumps(model)).__dict__)


def updated(model):
    model.__dict__.update(copy.deepcopy(model).__dict__)


def renewed(model):
    model._modules = copy.deepcopy(model)._modules


def parameters_renewed(model):
    model[0].__dict__["_parameters"] = {k: torch.nn.Parameter(v.detach().clone()) for k, v in model[0]._parameters.items()}


@pytest.mark.parametrize("change", [replaced, updated, renewed, parameters_renewed])
def test_the_dictionaries_of_modules_are_replaced(change):
    model = mlp()
    base, switcher = all_bits(model), added(model)
    switcher.use("a")
    change(model)
    switcher.use(None)
    assert same_bits(all_bits(model), base)
    switcher.use("a")
    assert not same_bits(all_bits(model), base)
    switcher.use(None)
    assert same_bits(all_bits(model), base)


def test_an_adapter_of_a_tuner_shares_no_memory_with_it():
    model = mlp()
    base = all_bits(model)
    tuner = shira.attach(model, targets=["0"], density=0.2)
    for tensor in tuner.adapter().tensors.values():
        tensor.indices.zero_()
        tensor.values.fill_(7)
    with torch.no_grad():
        for values in tuner.parameters():
            values += 1
    model(torch.ones(1, 13))
    tuner.detach()
    assert same_bits(all_bits(model), base)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors["0.weight"].indices.fill_(3), "indices must be sorted and unique"),
        (lambda tensors: tensors["0.weight"].indices.add_(10**6), "indices"),
        (lambda tensors: tensors["0.weight"].values.fill_(float("nan")), "values must be finite"),
        (lambda tensors: tensors.update({"0.weight": tensors["2.weight"]}), "'0.weight' has shape"),
        (lambda tensors: tensors.update({"x": tensors["2.weight"]}), "no tensor 'x'"),
    ],
)
def test_an_adapter_in_memory_is_changed_after_it_was_added(change, words):
    model = mlp()
    base, adapter, switcher = all_bits(model), random_adapter(model, 1), shira.Switcher(model)
    switcher.add("a", adapter)
    change(adapter.tensors)
    with pytest.raises(ShiraError, match=words):
        switcher.use("a")
    assert same_bits(all_bits(model), base) and switcher.active == {}


def test_new_values_of_an_adapter_in_memory_are_used():
    model = mlp()
    base, adapter, switcher = all_bits(model), random_adapter(model, 1), shira.Switcher(model)
    switcher.add("a", adapter)
    for tensor in adapter.tensors.values():
        tensor.values.mul_(2)
    switcher.use("a")
    tensor = adapter.tensors["0.weight"]
    assert torch.equal(model[0].weight.detach().view(-1)[tensor.indices], tensor.values)
    switcher.use(None)
    assert same_bits(all_bits(model), base)


def test_a_refusal_leaves_what_was_active():
    model = mlp()
    switcher, other = added(model), shira.Switcher(model[0])
    other.add("b", random_adapter(model[0], 2))
    other.use("b")
    with pytest.raises(SwitchError, match="already in use"):
        switcher.use("a")
    assert switcher.active == {} and other.active == {"b": 1.0}
