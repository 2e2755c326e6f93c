"""Whatever is done to a model while a tuner is attached: the base is what it makes of the base, or one error says so."""

import copy

import pytest
import torch
from torch import nn

import shira
from conftest import all_bits, mlp, mlp_batches, mlp_loss, same_bits
from shira import TargetError, TuningError
from shira.integrations.transformers import checkpointing_of


def train(model, tuner, steps=2):
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    for batch in mlp_batches(steps):
        optimizer.zero_grad()
        mlp_loss(model, batch).backward()
        optimizer.step()


def own_names(model):
    state = [*model.state_dict(), *(name for name, _ in model.named_buffers())]
    return [name for name in [*state, *vars(model)] if "shira" in name]


CASTS = {
    "wider": lambda model: model.double(),
    "rounded twice": lambda model: model.half().bfloat16(),
    "there and back": lambda model: model.bfloat16().float(),
}
if torch.cuda.is_available():
    CASTS |= {
        "to a GPU": lambda model: model.cuda(),
        "to a GPU in bfloat16": lambda model: model.to("cuda", torch.bfloat16),
        "to a GPU and back": lambda model: model.cuda().cpu(),
    }
VARIANTS = [{}, {"method": "hook"}, {"decompose": 2}, {"decompose": True}, {"low_rank": 2}, {"mask": "struct"}]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_cast_makes_of_the_base_what_it_makes_of_a_base(cast, options):
    model = mlp()
    expected = all_bits(cast(mlp()))
    tuner = shira.attach(model, density=0.3, **options)
    train(model, tuner)
    cast(model)
    train(model, tuner, 1)
    if "method" not in options:
        assert {parameter.dtype for parameter in tuner.parameters()} == {torch.float32}
    assert {tensor.values.dtype for tensor in tuner.adapter().tensors.values()} == {model[0].weight.dtype}
    tuner.detach()
    assert same_bits(all_bits(model), expected)
    assert not own_names(model)


@pytest.mark.parametrize("options", [{}, {"method": "hook"}, {"low_rank": 2}], ids=str)
def test_torch_can_swap_the_weights_of_a_model_in_training(options):
    """A weak reference to a tensor would keep torch from swapping it."""
    model = mlp()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuner = shira.attach(model, density=0.3, **options)
    train(model, tuner)
    try:
        torch.__future__.set_swap_module_params_on_conversion(True)
        model.load_state_dict(state, strict=False)
        model.bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    tuner.detach()
    assert same_bits(all_bits(model), all_bits(mlp().bfloat16()))


def test_entries_that_have_left_a_mask_are_cast_too():
    model, moved = mlp(), iter([10, 20, 30, 40])

    def mask(weight, k):
        start = next(moved)
        return torch.arange(start % 30, start % 30 + k)

    tuner = shira.attach(model, mask=mask, density=0.1)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=1.0)
    mlp_loss(model, mlp_batches(1)[0]).backward()
    optimizer.step()
    assert tuner.refresh(optimizer, cap=2.0)
    model.half().bfloat16()
    train(model, tuner, 1)
    tuner.detach()
    assert same_bits(all_bits(model), all_bits(mlp().half().bfloat16()))
    assert not own_names(model)


def test_a_cast_inside_a_reference():
    model = mlp()
    with shira.attach(model, density=0.3) as tuner:
        train(model, tuner)
        before = tuner.adapter()
        with tuner.reference():
            model.bfloat16()
            assert torch.equal(model[0].weight, mlp()[0].weight.bfloat16())
        model(torch.ones(1, 13, dtype=torch.bfloat16))
        for name, tensor in before.tensors.items():
            live = model.get_parameter(name).detach().view(-1)[tensor.indices.long()]
            assert torch.equal(live, tensor.values.bfloat16())
    assert same_bits(all_bits(model), all_bits(mlp().bfloat16()))


def other_weights(model):
    model.load_state_dict(mlp(seed=5).state_dict(), strict=False)


def other_parameter(model):
    model[0].weight = nn.Parameter(torch.randn(11, 13))


def other_shape(model):
    model[0].weight = nn.Parameter(torch.randn(20, 13))


def no_data(model):
    model.to("meta")


def cast_alone(model):
    model[0].weight.data = model[0].weight.data.half()


def other_layout(model):
    model[0].weight.data = model[0].weight.data.repeat_interleave(2, 1)[:, ::2]


def taken_away(model):
    model[0].weight = None


def emptied(model):
    model.to_empty(device="cpu")
    for name, buffer in model.named_buffers():
        assert "shira" in name
        buffer.fill_(7)  # what is in new memory is random


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (emptied, "has lost the base's values .*to_empty"),
        (other_weights, "written to or replaced by others"),
        (other_parameter, "written to or replaced by others"),
        (other_shape, r"of shape \[20, 13\]"),
        (no_data, "no data any more"),
        (cast_alone, "cast from float32 to float16 by itself"),
        (other_layout, "not contiguous"),
        (taken_away, "not there any more"),
    ],
)
def test_what_cannot_be_followed_is_refused_each_time_until_released(act, words):
    model = mlp()
    flags = [p.requires_grad for p in model.parameters()]
    tuner = shira.attach(model, density=0.3)
    train(model, tuner)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    act(model)
    calls = [lambda: model(torch.ones(1, 13)), optimizer.step, tuner.adapter, tuner.state_dict, tuner.detach, tuner.detach]
    now = {name: (p.data_ptr(), p._version) for name, p in model.named_parameters() if "shira" not in name}
    for call in calls:
        with pytest.raises(TuningError, match=rf"'0.weight' .*{words}.*release\(\)"):
            call()
    assert {name: (p.data_ptr(), p._version) for name, p in model.named_parameters() if "shira" not in name} == now
    tuner.release()
    assert not tuner.attached and not own_names(model)
    assert [p.requires_grad for p in model.parameters()][-3:] == flags[-3:]
    if act not in (emptied, no_data, taken_away, other_shape, cast_alone, other_layout):
        shira.attach(model).detach()


def test_an_emptied_copy_of_the_base_is_not_written_back():
    model = mlp()
    tuner = shira.attach(model, density=0.3, method="hook")
    emptied(model)
    for call in (lambda: model(torch.ones(1, 13)), tuner.adapter, tuner.detach):
        with pytest.raises(TuningError, match=r"'0.weight' has lost its base, .*to_empty.*release\(\)"):
            call()
    tuner.release()
    model.load_state_dict(mlp().state_dict())
    assert same_bits(all_bits(model), all_bits(mlp()))


def test_other_masters_are_refused_and_the_base_comes_back():
    model = mlp()
    before = all_bits(model)
    tuner = shira.attach(model, density=0.3)
    train(model, tuner)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    model[0].shira_values = nn.Parameter(model[0].shira_values.detach() + 1)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    for call in (lambda: model(torch.ones(1, 13)), optimizer.step, tuner.adapter, tuner.state_dict):
        with pytest.raises(TuningError, match=r"'0.weight' .*load_state_dict\(assign=True\).*release\(\)"):
            call()
    tuner.detach()
    assert same_bits(before, all_bits(model))


@pytest.mark.parametrize(
    "act",
    [
        lambda model: model.load_state_dict(mlp().state_dict(), strict=False),
        lambda model: model.load_state_dict(mlp().state_dict(), strict=False, assign=True),
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
        lambda model: model.load_state_dict(model.state_dict(), assign=True),
        lambda model: setattr(model[0].weight, "data", model[0].weight.data.clone()),
        lambda model: setattr(model[0], "weight", nn.Parameter(model[0].weight.detach().clone())),
    ],
    ids=["base loaded", "base assigned", "own state loaded", "own state assigned", "data moved", "equal, another parameter"],
)
def test_weights_that_hold_what_they_should_are_followed(act):
    model = mlp()
    tuner = shira.attach(model, density=0.3)
    train(model, tuner)
    before = tuner.adapter()
    act(model)
    model(torch.ones(1, 13))
    for name, tensor in before.tensors.items():
        assert torch.equal(model.get_parameter(name).detach().view(-1)[tensor.indices.long()], tensor.values)
    train(model, tuner, 1)
    tuner.detach()
    assert same_bits(all_bits(model), all_bits(mlp()))


def test_what_was_put_right_goes_on():
    model = mlp()
    tuner = shira.attach(model, density=0.3)
    train(model, tuner)
    kept = copy.deepcopy(model.state_dict())
    other_weights(model)
    with pytest.raises(TuningError):
        tuner.detach()
    model.load_state_dict(kept)
    train(model, tuner, 1)
    tuner.detach()
    assert same_bits(all_bits(model), all_bits(mlp()))


class Tied(nn.Module):
    def __init__(self, overlap=36):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        flat = torch.randn(72, generator=torch.Generator().manual_seed(0))
        self.a.weight.data = flat[:36].view(6, 6)
        self.b.weight.data = flat[36 - overlap : 72 - overlap].view(6, 6)

    def forward(self, x):
        return self.b(self.a(x).tanh())


def test_parameters_over_one_memory_are_one_target_and_parted_ones_are_refused():
    model, twin = Tied(), Tied()
    twin.b.weight = twin.a.weight
    adapters = []
    for each in (model, twin):
        with shira.attach(each, density=0.5) as tuner:
            assert tuner.nnz == 18
            optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
            each(torch.ones(2, 6)).square().sum().backward()
            optimizer.step()
            adapters.append(tuner.adapter())
    assert list(adapters[0].tensors) == ["a.weight"]
    assert torch.equal(adapters[0].tensors["a.weight"].values, adapters[1].tensors["a.weight"].values)
    assert torch.equal(model.a.weight, Tied().a.weight) and model.a.weight.data_ptr() == model.b.weight.data_ptr()
    tuner = shira.attach(model, density=0.5)
    model.bfloat16()
    for call in (lambda: model(torch.ones(2, 6)), tuner.detach, tuner.detach):
        with pytest.raises(TuningError, match=r"'a.weight' was several parameters.*separated"):
            call()
    tuner.release()


def test_memory_that_is_shared_in_part_is_refused_by_both_names():
    with pytest.raises(TargetError, match=r"'a.weight' shares a part of its memory with 'b.weight'"):
        shira.attach(Tied(18))
    with pytest.raises(TargetError, match=r"shares a part of its memory"):
        shira.attach(Tied(18), targets=["b"])


@pytest.mark.parametrize("mask", ["wm", "rand", "struct", "nm", "lift", "block:size=2", "snip"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_decides_nothing(mask, dtype):
    found, batches = [], mlp_batches(2)
    options = {"calibration": batches, "loss_fn": mlp_loss} if mask == "snip" else {}
    for default in (torch.float32, dtype):
        model = mlp()
        torch.set_default_dtype(default)
        try:
            with shira.attach(model, mask=mask, density=0.4, seed=1, low_rank=2, **options) as tuner:
                assert {p.dtype for p in tuner.parameters()} == {torch.float32}
                optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
                for batch in batches:
                    mlp_loss(model, batch).backward()
                    optimizer.step()
                found.append(tuner.adapter())
        finally:
            torch.set_default_dtype(torch.float32)
    for name, tensor in found[0].tensors.items():
        assert torch.equal(tensor.indices, found[1].tensors[name].indices)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": 5}, r'targets=\["q_proj"'),
        ({"targets": [nn.Linear(1, 1)]}, r'targets=\["q_proj"'),
        ({"targets": [""]}, r'targets=\["q_proj"'),
        ({"exclude": 5}, r'exclude=\["q_proj"'),
        ({"layers": "3"}, r"layers=range"),
        ({"mask": 5}, 'mask="wm"'),
        ({"seed": "x"}, "seed=0"),
        ({"overrides": 3}, "overrides="),
        ({"overrides": {3: 0.1}}, "overrides="),
        ({"calibration": nn.Linear(1, 1)}, r"calibration=\[batch"),
        ({"avoid": 5}, "avoid="),
        ({"loss_fn": 5}, "loss_fn must be a function"),
        ({"density": "0.01"}, "above 0 and at most 1, found '0.01'"),
        ({"density": True}, "above 0 and at most 1"),
        ({"rank": "8"}, "found '8'"),
    ],
)
def test_arguments_of_another_kind(options, words):
    model = mlp()
    with pytest.raises(shira.ShiraError, match=words):
        shira.attach(model, **options)
    assert not own_names(model)


@pytest.mark.parametrize("given", ["org/model", None, [mlp()]])
def test_a_model_must_be_one(given):
    with pytest.raises(TuningError, match=r"load it first, then call shira.attach\(model\)"):
        shira.attach(given)


def test_a_tuner_is_no_model_and_says_where_it_is():
    with shira.attach(mlp()) as tuner:
        for name in ("to", "train", "forward", "named_parameters"):
            with pytest.raises(AttributeError, match=f"a Tuner has no '{name}', .*pass tuner.model"):
                getattr(tuner, name)


def test_the_second_tuner_is_told_of_the_first_and_a_dropped_one_is_found_in_the_model():
    model = mlp()
    shira.attach(model, density=0.3)
    for part in (model, model[0]):
        with pytest.raises(TuningError, match=r"a tuner is attached already, to '0.weight'; call its detach\(\)"):
            shira.attach(part)
    model.shira_tuner.detach()
    shira.attach(model[0]).detach()


def test_reentrant_checkpoints_behind_frozen_convolutions():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sides = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    sides |= {"encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "num_mel_bins": 4, "vocab_size": 30, "max_source_positions": 8}
    sides |= {"max_target_positions": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration(WhisperConfig(**sides)).train()
        if checkpointing:
            checkpointing_of(model)[0]({"use_reentrant": True})
        with shira.attach(model, density=0.1) as tuner:
            features = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(1))
            model(input_features=features, labels=torch.ones(2, 4, dtype=torch.long)).loss.backward()
            found.append([p.grad for p in tuner.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
