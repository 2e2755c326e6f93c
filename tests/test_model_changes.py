"""What users do to a model between two calls of its switcher: it works, or it is one clear error while nothing is written."""

import copy

import pytest
import torch
from torch import nn

import shira
from conftest import all_bits, mlp, random_adapter, same_bits
from shira import BaseMismatch, ShiraError, SparseTensor, Switcher, SwitchError

CASTS = {
    "bfloat16": lambda model: model.bfloat16(),
    "float16": lambda model: model.half(),
    "float64": lambda model: model.double(),
    "to": lambda model: model.to(torch.bfloat16),
    "half, then bfloat16": lambda model: model.half().bfloat16(),
    "bfloat16, then half": lambda model: model.bfloat16().half(),
    "half and back": lambda model: model.half().float(),
    "bfloat16 and back": lambda model: model.bfloat16().float(),
    "one layer": lambda model: model[2].half(),
    "data": lambda model: _set_data(model, lambda weight: weight.bfloat16()),
    "a copy": lambda model: _set_data(model, torch.clone),
    "assign": lambda model: model.load_state_dict(model.state_dict(), assign=True),
    "new parameters": lambda model: [_replace(layer) for layer in (model[0], model[2])],
    "swapped tensors": lambda model: torch.utils.swap_tensors(model[0].weight, nn.Parameter(model[0].weight.detach().clone())),
    "deep copies of layers": lambda model: [model.__setitem__(at, copy.deepcopy(model[at])) for at in (0, 2)],
}
if torch.cuda.is_available():
    CASTS |= {
        "to a GPU": lambda model: model.cuda(),
        "to a GPU in float16": lambda model: model.to("cuda", torch.float16),
        "to a GPU and back": lambda model: model.cuda().cpu(),
        "one layer to a GPU": lambda model: model[2].cuda(),
    }


def _set_data(model, cast):
    for parameter in model.parameters():
        parameter.data = cast(parameter.data)


def _replace(layer):
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def adapters(model):
    """One without fingerprints, which fits the model in any dtype, and two with."""
    plain = random_adapter(model, 1)
    return {"plain": shira.Adapter(plain.tensors), "a": random_adapter(model, 2), "b": random_adapter(model, 3)}


def switcher_of(model):
    switcher = Switcher(model)
    for name, adapter in adapters(model).items():
        switcher.add(name, adapter)
    return switcher


@pytest.mark.parametrize("act", CASTS)
def test_another_sum_after_a_change_starts_from_the_changed_base(act):
    """The sum is new, so it is computed from the base under what is active: from the values that are in the stash."""
    model, other = mlp(), mlp()
    CASTS[act](other)
    for each in (model, other):
        switcher = Switcher(each)
        for name in ("a", "b"):
            switcher.add(name, shira.Adapter(adapters(mlp())[name].tensors))  # without fingerprints it fits in any dtype
        if each is model:
            switcher.use({"a": 0.5, "b": 2.0})
            CASTS[act](model)
        switcher.use({"a": 1.0, "b": 0.5})
    assert same_bits(all_bits(model), all_bits(other))


@pytest.mark.parametrize("act", CASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("active", ["plain", {"a": 0.5, "b": 2.0}])
def test_what_is_done_to_a_model_is_done_to_its_base(act, dtype, active):
    model, other = mlp(dtype), mlp(dtype)
    CASTS[act](other)
    base = all_bits(other)
    switcher = switcher_of(model)
    switcher.use(active)
    CASTS[act](model)
    assert switcher.active  # as long as it is in the weights
    switcher.use(None)
    assert switcher.active == {}
    assert same_bits(base, all_bits(model))
    switcher.use("plain")
    assert not same_bits(base, all_bits(model))
    switcher.use(None)
    assert same_bits(base, all_bits(model))


@pytest.mark.parametrize("act", CASTS)
def test_what_was_made_ready_is_not_written_into_another_model(act):
    model = mlp()
    switcher = switcher_of(model)
    for name in ("plain", "a", "plain", None):
        switcher.use(name)
    CASTS[act](model)
    base = all_bits(model)
    for selection in ("plain", "a", {"a": 0.5, "plain": 1.0}):
        try:
            switcher.use(selection)
        except BaseMismatch:  # the fingerprint is of the values before a cast that changed them
            assert act not in ("float64", "a copy", "assign", "new parameters") and selection != "plain"
        switcher.use(None)
        assert same_bits(base, all_bits(model))


def test_a_cast_is_followed_whatever_is_called_first():
    for call in (lambda s: s.add("c", random_adapter(mlp(), 4)), lambda s: s.prefetch("plain")):
        model, base = mlp(), mlp().double()
        switcher = switcher_of(model)
        switcher.use("plain")
        model.double()
        call(switcher)
        assert switcher.active == {"plain": 1.0}
        assert not same_bits(all_bits(base), all_bits(model))
        switcher.use(None)
        assert same_bits(all_bits(base), all_bits(model))


@pytest.mark.parametrize("assign", [False, True])
def test_a_base_that_is_loaded_over_an_adapter_is_found(assign):
    """The same base again: nothing is left of the adapter, and that is seen."""
    model = mlp()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = all_bits(model)
    switcher = switcher_of(model)
    switcher.use("a")
    model.load_state_dict(state, assign=assign, strict=False)
    switcher.use("b")
    assert switcher.active == {"b": 1.0}
    switcher.use(None)
    assert same_bits(base, all_bits(model))


OTHERS = {
    "load_state_dict": lambda model: model.load_state_dict(mlp(seed=9).state_dict()),
    "assign": lambda model: model.load_state_dict(mlp(seed=9).state_dict(), assign=True),
    "in place": lambda model: [parameter.detach().mul_(1.5) for parameter in model.parameters()],
    "in place, through data": lambda model: [parameter.data.mul_(1.5) for parameter in model.parameters()],
    "in place, under no_grad": lambda model: nn.init.normal_(model[2].weight),
    "data": lambda model: _set_data(model, lambda weight: weight * 1.5),
    "meta": lambda model: model.to("meta"),
    "smaller": lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(11, 7))),
    "cast thrice": lambda model: model.half().bfloat16().half().float(),
}


@pytest.mark.parametrize("act", OTHERS)
def test_a_base_that_is_not_known_any_more_is_an_error_each_time(act):
    model = mlp()
    switcher = switcher_of(model)
    switcher.use("a")
    OTHERS[act](model)
    now = None if act == "meta" else all_bits(model)
    for selection in (None, "b", "a" if act == "meta" else "plain", None):
        with pytest.raises(SwitchError, match=r"^'[02].weight' was .* while 'a' was active in it: found .*release\(\)"):
            switcher.use(selection)
        assert switcher.active == {"a": 1.0}
        assert now is None or same_bits(now, all_bits(model))
    switcher.release()
    assert switcher.active == {}
    if act not in ("meta", "smaller"):
        switcher.use("plain")
        switcher.use(None)
        assert same_bits(now, all_bits(model))


def test_another_base_under_what_is_ready_is_noticed():
    model = mlp()
    switcher = switcher_of(model)
    switcher.use("a")
    switcher.use(None)
    model.load_state_dict(mlp(seed=9).state_dict())
    base = all_bits(model)
    with pytest.raises(BaseMismatch, match="fingerprint"):
        switcher.use("a")
    assert same_bits(base, all_bits(model))
    switcher.use("plain")
    switcher.use(None)
    assert same_bits(base, all_bits(model))


def test_what_is_active_stays_so_if_the_next_does_not_fit_the_changed_model():
    model = mlp()
    switcher = switcher_of(model)
    switcher.add("entry", shira.Adapter({"0.weight": SparseTensor((11, 13), torch.tensor([5]), torch.ones(1))}))
    switcher.use("entry")
    with torch.no_grad():
        model[2].weight.copy_(mlp(seed=9)[2].weight)  # another base under "a"
    active = all_bits(model)
    with pytest.raises(BaseMismatch, match="fingerprint"):
        switcher.use("a")
    assert switcher.active == {"entry": 1.0} and same_bits(active, all_bits(model))
    switcher.use(None)
    assert not same_bits(active, all_bits(model)) and torch.equal(model[0].weight, mlp()[0].weight)


def test_what_others_write_beside_the_adapter_stays():
    model = mlp()
    switcher = Switcher(model)
    switcher.add("x", shira.Adapter({"0.weight": SparseTensor((11, 13), torch.tensor([4, 9]), torch.ones(2))}))
    switcher.use("x")
    with torch.no_grad():
        model[0].weight[0, 0] = 5.0
        model[2].weight.zero_()
    model[0].bias.data.fill_(3.0)
    switcher.use(None)
    expected = mlp()
    with torch.no_grad():
        expected[0].weight[0, 0] = 5.0
        expected[2].weight.zero_()
        expected[0].bias.fill_(3.0)
    assert same_bits(all_bits(expected), all_bits(model))


def test_channels_last_and_a_larger_embedding_give_the_base_back():
    torch.manual_seed(0)
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3), "table": nn.Embedding(10, 8)})
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    switcher = Switcher(model)
    positions = torch.arange(0, 80, 3)
    tensors = {
        name: SparseTensor(tuple(base[name].shape), positions, torch.randn(27)) for name in ("conv.weight", "table.weight")
    }
    switcher.add("x", shira.Adapter(tensors))
    switcher.use("x")
    model.to(memory_format=torch.channels_last)
    larger = nn.Embedding(14, 8)
    larger.weight.data[:10] = model["table"].weight.data
    model["table"] = larger
    switcher.use(None)
    assert torch.equal(model["conv"].weight, base["conv.weight"]) and torch.equal(larger.weight[:10], base["table.weight"])
    with pytest.raises(BaseMismatch, match="'conv.weight' must be contiguous|'table.weight' has shape"):
        switcher.use("x")


def test_a_buffer_that_becomes_a_view_of_a_weight_stays_one():
    model = mlp()
    model.register_buffer("view", torch.zeros(11, 13))
    switcher = Switcher(model)
    switcher.add("x", shira.Adapter({"view": SparseTensor((11, 13), torch.tensor([3]), torch.ones(1))}))
    model.view = model[0].weight.detach()
    base = all_bits(model)
    switcher = Switcher(model)
    switcher.add("x", shira.Adapter({"view": SparseTensor((11, 13), torch.tensor([3]), torch.ones(1))}))
    model.view = model[0].weight.detach()
    switcher.use("x")
    assert model[0].weight[0, 3] == 1 and model.view.data_ptr() == model[0].weight.data_ptr()
    switcher.use(None)
    assert same_bits(base, all_bits(model))


def test_a_replaced_weight_that_comes_back_is_the_base():
    model = mlp()
    base = all_bits(model)
    switcher = switcher_of(model)
    switcher.use("a")
    old = model[0].weight
    model[0].weight = nn.Parameter(old.detach().clone())
    switcher.use(None)
    assert same_bits(base, all_bits(model))
    model[0].weight = old
    assert same_bits(base, all_bits(model))


def test_an_adapter_that_is_changed_after_it_was_added():
    model = mlp()
    base = all_bits(model)
    adapter = shira.Adapter(random_adapter(model, 1).tensors)
    switcher = Switcher(model)
    switcher.add("x", adapter)
    switcher.use("x")
    for tensor in adapter.tensors.values():
        tensor.values.mul_(2)
        tensor.indices.zero_()
    switcher.use(None)
    assert same_bits(base, all_bits(model))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: s.use("a", 0.5), r"use\(\{'a': 0.5\}\)"),
        (lambda s: s.use(["a"]), r'use\("poet"\)'),
        (lambda s: s.use(5), r"use\(None\)"),
        (lambda s: s.use({("a",): 1.0}), "no adapter"),
        (lambda s: s.use({"a": 1.0}, method=None), "method"),
        (lambda s: s.use("a", method="sum", strength=2), "strength"),
        (lambda s: s.prefetch(["a"]), r'use\("poet"\)'),
        (lambda s: s.add("x", 5), r"switcher.add\('poet', 'poet.safetensors'\)"),
        (lambda s: s.add(["x"], random_adapter(mlp(), 1)), 'add\\("poet", adapter\\)'),
        (lambda s: s.remove(["a"]), "no adapter"),
        (lambda s: s.using(["a"]).__enter__(), r'use\("poet"\)'),
        (lambda s: Switcher("org/model"), r"shira.Switcher\(model\)"),
        (lambda s: Switcher(mlp(), ready="8"), "ready must be a whole number"),
        (lambda s: Switcher(mlp(), ready=True), "ready must be a whole number"),
    ],
)
def test_a_wrong_call_shows_the_one_that_was_meant(call, words):
    model = mlp()
    base = all_bits(model)
    switcher = switcher_of(model)
    with pytest.raises(ShiraError, match=words):
        call(switcher)
    assert switcher.active == {} and same_bits(base, all_bits(model))


@pytest.mark.parametrize("act", ["weight_norm", "parametrized", "removed"])
def test_a_weight_that_is_taken_away_is_an_error_each_time(act):
    model = mlp()
    if act == "removed":
        nn.utils.parametrizations.weight_norm(model[0])
    switcher = Switcher(model)
    switcher.add("a", shira.Adapter(random_adapter(model, 1).tensors))
    switcher.use("a")
    match act:
        case "weight_norm":
            nn.utils.parametrizations.weight_norm(model[0])
        case "parametrized":  # the very same Parameter, under another name
            nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
            switcher.use(None)
            assert torch.equal(model[0].weight, mlp()[0].weight)
            return
        case "removed":
            nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    for _ in range(2):
        with pytest.raises(SwitchError, match=r"while 'a' was active in it: found nothing of that name.*release\(\)"):
            switcher.use(None)
        assert switcher.active == {"a": 1.0}
    switcher.release()


def _add_head(model):
    model.add_module("head", model[2])
    del model[2]


REARRANGED = {
    "taken out": lambda model: model.__delitem__(2),
    "all taken out": lambda model: [model.__delitem__(at) for at in (2, 0)],
    "swapped": lambda model: [model.append(model.pop(0)) for _ in range(2)],
    "inserted before": lambda model: model.insert(0, nn.Linear(13, 13, bias=False).requires_grad_(False)),
    "renamed": _add_head,
    "tied to another": lambda model: setattr(model[3], "weight", model[0].weight),
}


@pytest.mark.parametrize("act", REARRANGED)
def test_layers_that_are_rearranged_are_given_their_base_wherever_they_are(act):
    def made():
        return mlp().append(copy.deepcopy(mlp()[0]))

    model = made()
    with torch.no_grad():
        model[3].weight.add_(1)
    base = {id(weight): weight.detach().clone() for weight in model.parameters()}
    held = list(model.parameters())
    switcher = Switcher(model)
    switcher.add("a", random_adapter(model, 1))
    switcher.use("a")
    REARRANGED[act](model)
    switcher.use(None)
    assert all(torch.equal(weight, base[id(weight)]) for weight in held)
    assert switcher.active == {}


@pytest.mark.parametrize("act", ["swapped", "inserted", "taken out", "swapped and cast"])
def test_statistics_of_rearranged_layers_are_those_of_their_own_layer(act):
    model = nn.Sequential(nn.BatchNorm1d(5), nn.ReLU(), nn.BatchNorm1d(5), nn.BatchNorm1d(5))
    for number in (0, 2, 3):
        model[number].running_mean.fill_(number)
    layers = [model[0], model[2], model[3]]
    base = [all_bits(layer) for layer in layers]
    switcher = Switcher(model)
    every = torch.arange(5)
    held = [f"{number}.{part}" for number in (0, 2, 3) for part in ("weight", "running_mean", "running_var")]
    switcher.add("a", shira.Adapter({name: SparseTensor((5,), every, torch.rand(5)) for name in held}))
    switcher.use("a")
    new = nn.BatchNorm1d(5)
    match act:
        case "inserted":
            model.insert(0, new)
        case "taken out":
            del model[0]
        case _:
            model[0], model[2] = model[2], model[0]
    if act == "swapped and cast":  # buffers are others after a cast: nothing says whose they are
        model.half()
        with pytest.raises(SwitchError, match="running_mean' was changed by somebody else"):
            switcher.use(None)
        return
    switcher.use(None)
    assert all(same_bits(all_bits(layer), bits) for layer, bits in zip(layers, base, strict=True))
    assert same_bits(all_bits(new), all_bits(nn.BatchNorm1d(5)))


@pytest.mark.parametrize("act", ["freed", "expanded"])
def test_a_weight_without_memory_of_its_own_is_not_written_to(act):
    """Its storage was freed, as FSDP does, or all rows are one: an error each time, and the base once its values are back."""
    model = mlp()
    switcher = switcher_of(model)
    switcher.use("plain")
    model.to(torch.bfloat16)
    weight, written = model[0].weight, model[0].weight.data.clone()
    if act == "freed":
        size = weight.untyped_storage().nbytes()
        weight.untyped_storage().resize_(0)
    else:
        weight.data = written[:1].expand(written.shape)
    for _ in range(2):
        with pytest.raises(SwitchError, match="'0.weight' was changed by somebody else"):
            switcher.use(None)
    if act == "freed":
        weight.untyped_storage().resize_(size)
        weight.data.copy_(written)
    else:
        weight.data = written
    switcher.use(None)
    assert same_bits(all_bits(model), all_bits(mlp().to(torch.bfloat16)))


def test_blocks_that_overlap_end_on_what_was_before_the_first():
    model = mlp()
    base = all_bits(model)
    switcher = switcher_of(model)
    for order in ((0, 1), (1, 0)):
        blocks = [switcher.using("a"), switcher.using("b")]
        for block in blocks:
            block.__enter__()
        for number in order:
            blocks[number].__exit__(None, None, None)
        assert switcher.active == {} and same_bits(base, all_bits(model))
    with switcher.using("a"), switcher.using("b"):
        assert switcher.active == {"b": 1.0}
    assert same_bits(base, all_bits(model))
