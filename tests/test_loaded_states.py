"""`model.load_state_dict` while a tuner is attached: a state of other settings is refused before anything is written."""

import warnings

import pytest
import torch
from torch import nn

import shira
from conftest import all_bits, mlp, mlp_batches, mlp_loss, same_bits
from shira.errors import TuningError
from shira.training.loaded_states import UncheckedState

SETTINGS = [
    {"mask": "wm"},
    {"mask": "rand", "seed": 1},
    {"mask": "rand", "seed": 2},
    {"mask": "rand", "seed": 1, "density": 0.2},
    {"mask": "rand", "seed": 1, "lr_scale": 16},
    {"mask": "rand", "seed": 1, "decompose": True},
    {"mask": "rand", "seed": 1, "low_rank": 2},
]


def trained(model, settings, steps=2):
    tuner = shira.attach(model, **({"density": 0.1} | settings))
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for batch in mlp_batches(steps):
        optimizer.zero_grad()
        mlp_loss(model, batch).backward()
        optimizer.step()
    return tuner


def state_of(settings, dtype=torch.float32):
    model = mlp(dtype)
    tuner = trained(model, settings)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = tuner.adapter()
    tuner.detach()
    return state, adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [*SETTINGS, {"decompose": 2}], ids=str)
def test_a_state_of_the_same_settings_is_loaded(settings, dtype):
    state, adapter = state_of(settings, dtype)
    model = mlp(dtype)
    base = all_bits(model)
    with shira.attach(model, **({"density": 0.1} | settings)) as tuner:
        model.load_state_dict(state)
        found = tuner.adapter()
        assert all(torch.equal(tensor.values, found.tensors[name].values) for name, tensor in adapter.tensors.items())
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    assert same_bits(base, all_bits(model))


@pytest.mark.parametrize("saved", SETTINGS, ids=str)
@pytest.mark.parametrize("here", SETTINGS, ids=str)
def test_a_state_of_other_settings_is_refused_before_anything_is_loaded(saved, here):
    if saved == here:
        return
    state, _ = state_of(saved)
    model = mlp()
    base = all_bits(model)
    tuner = trained(model, here)
    before = all_bits(model)
    for load in (lambda: model.load_state_dict(state), lambda: nn.ModuleList([model]).load_state_dict(prefixed(state))):
        with pytest.raises(TuningError, match="is of a training with other settings"):
            load()
        assert same_bits(before, all_bits(model))
    tuner.detach()
    assert same_bits(base, all_bits(model))


def prefixed(state):
    return {f"0.{name}": tensor for name, tensor in state.items()}


def test_a_mask_apart_from_the_first_ones():
    """No position is in both, so nothing of the state lies under the positions that train."""
    state, adapter = state_of({"mask": "wm"})
    model = mlp()
    base = all_bits(model)
    tuner = shira.attach(model, density=0.1, mask="wm", avoid=adapter)
    with pytest.raises(TuningError, match="not in the weight there, at the positions that train here"):
        model.load_state_dict(state)
    tuner.detach()
    assert same_bits(base, all_bits(model))


def test_trained_values_alone():
    """As a filter on requires_grad saves them. Nothing says which positions they are of."""
    state, adapter = state_of({"mask": "wm"})
    model = mlp()
    with shira.attach(model, density=0.1, mask="wm") as tuner:
        own = {name: state[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert len(own) == 2
        with pytest.warns(UncheckedState, match="2 tensors, such as '0.shira_values', are loaded without") as warned:
            model.load_state_dict(own, strict=False)
        assert len(warned) == 1
        found = tuner.adapter()
        assert all(torch.equal(tensor.values, found.tensors[name].values) for name, tensor in adapter.tensors.items())
    tuner = shira.attach(mlp(), density=0.1, mask="wm", decompose=True)
    with pytest.raises(TuningError, match="'0.shira_values_magnitude' trains here, and is not in the state"):
        tuner.model.load_state_dict(own, strict=False)


def test_a_layers_own_state():
    """The base of one layer loads, as that of the model does."""
    model = mlp()
    base = {name: tensor.clone() for name, tensor in model[0].state_dict().items()}
    tuner = trained(model, {"mask": "wm"})
    before = tuner.adapter()
    model[0].load_state_dict(base)
    after = tuner.adapter()
    assert all(torch.equal(tensor.values, after.tensors[name].values) for name, tensor in before.tensors.items())
    state, _ = state_of({"mask": "rand"})
    with pytest.raises(TuningError, match="is of a training with other settings"):
        model[0].load_state_dict({name.removeprefix("0."): tensor for name, tensor in state.items() if name.startswith("0.")})
    tuner.detach()
    assert same_bits(all_bits(mlp()), all_bits(model))


def test_tied_weights_and_a_state_of_the_base():
    def tied():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        model[1].weight = model[0].weight
        return model

    model = tied()
    base = all_bits(model)
    with shira.attach(model, density=0.3, mask="rand") as tuner:
        with torch.no_grad():
            tuner.parameters()[0].add_(1)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        adapter = tuner.adapter()
    model = tied()
    with shira.attach(model, density=0.3, mask="rand") as tuner, warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(state)
        assert torch.equal(adapter.tensors["0.weight"].values, tuner.adapter().tensors["0.weight"].values)
        model.load_state_dict(tied().state_dict())  # without trained values: they stay
        assert torch.equal(adapter.tensors["0.weight"].values, tuner.adapter().tensors["0.weight"].values)
    assert same_bits(base, all_bits(model))


def test_a_weight_without_data_in_a_state_is_left_to_torch():
    state, _ = state_of({"mask": "wm"})
    model = mlp()
    with shira.attach(model, density=0.1, mask="wm"), pytest.raises(RuntimeError, match="meta"):
        model.load_state_dict(state | {"0.weight": state["0.weight"].to("meta")})
    assert same_bits(all_bits(mlp()), all_bits(model))
