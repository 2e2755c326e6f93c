"""Every kind of masters can stand in for every other: each has what the others have, and says what cannot be done with it."""

import pytest
import torch
from torch import nn

import shira
from conftest import all_bits, mlp, mlp_batches, mlp_loss, same_bits
from shira import TuningError
from shira.training.masters import Masters
from shira.training.variants.choosing import choose
from shira.weights.quantized import is_quantized
from shira.weights.targets import resolve


class StandIn(nn.Parameter):
    """A weight that counts as one of torchao's."""

    __module__ = "torchao.stand_in"

    def dequantize(self):
        return self.detach().clone()


def plain():
    return mlp()


def quantized():
    model = mlp()
    for layer in (model[0], model[2]):
        layer.weight = StandIn(layer.weight.data, requires_grad=False)
    assert is_quantized(model[0].weight)
    return model


# how the model is made, the options, and what masters of this kind say of themselves
KINDS = {
    "plain": (plain, {}, {"can_move": True, "can_stay_near": True}),
    "decomposed": (plain, {"decompose": True}, {}),
    "decomposed, of a rank": (plain, {"decompose": 3}, {}),
    "hybrid": (plain, {"low_rank": 2}, {"has_side": True, "has_product": True}),
    "deltas": (quantized, {}, {"in_place": False, "kind": "delta", "has_side": True}),
}
USUAL = {"can_move": False, "can_stay_near": False, "in_place": True, "kind": "overwrite"}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def test_every_kind_has_all_that_masters_have_as_soon_as_it_is_made(kind):
    model, options, says = kind[0](), {"decompose": False, "low_rank": None} | kind[1], USUAL | kind[2]
    targets = resolve(model, "all-linear")
    make, _ = choose(targets, "wm", "values", options["decompose"], options["low_rank"], 0)
    for target in targets:
        indices = torch.arange(3, 9, dtype=torch.int32)
        each = make(target, indices, 1.0)
        assert set(dir(Masters(target, indices))) <= set(dir(each))
        for name in dir(each):
            getattr(each, name)  # a property may need what is not there
        assert each.name == target.name and each.weight is target.weight and each.matrix_shape == target.matrix_shape
        assert torch.equal(each.indices, indices) and each.piece is None and each.earlier.indices.numel() == 0
        assert torch.equal(each.base, target.weight.detach().view(-1)[3:9])
        own = each.parameters
        assert own and all(p.requires_grad and p.dtype == torch.float32 and p.numel() for p in own.values())
        assert torch.equal(each.current().detach(), each.base)  # nothing has changed
        found = {"has_side": each.added is not None, "has_product": each.low_rank is not None}
        found |= {name: getattr(each, name) for name in USUAL}
        assert found == {"has_side": False, "has_product": False} | says


@pytest.mark.parametrize(
    ("can", "act", "message"),
    [
        (
            "can_move",
            lambda tuner, optimizer: tuner.refresh(optimizer),
            "decompose, low_rank or a quantized base cannot be ref",
        ),
        (
            "can_stay_near",
            lambda tuner, _: tuner.stay_near(mlp_batches(2)),
            "no decompose, low_rank, quantized or sharded base",
        ),
    ],
    ids=["refresh", "stay_near"],
)
def test_what_a_kind_cannot_do_is_refused_before_anything_has_changed(kind, can, act, message):
    model, options, says = kind[0](), kind[1], USUAL | kind[2]
    with shira.attach(model, mask="wm", density=0.2, loss_fn=mlp_loss, **options) as tuner:
        optimizer = train(model, tuner)
        before = all_bits(model)
        if says[can]:
            act(tuner, optimizer)
        else:
            with pytest.raises(TuningError, match=message):
                act(tuner, optimizer)
            assert same_bits(before, all_bits(model))


def test_every_kind_trains_and_gives_the_base_back(kind):
    model, options, says = kind[0](), kind[1], USUAL | kind[2]
    before, batch = all_bits(model), mlp_batches(1)[0]
    base = mlp_loss(model, batch).detach()
    with shira.attach(model, mask="wm", density=0.2, loss_fn=mlp_loss, **options) as tuner:
        assert [id(p) for each in tuner._tuned for p in each.parameters.values()] == [id(p) for p in tuner.parameters()]
        assert torch.equal(mlp_loss(model, batch), base)
        train(model, tuner)
        assert mlp_loss(model, batch) < base
        with tuner.reference():
            assert torch.equal(mlp_loss(model, batch), base)
        adapter = tuner.adapter()
    assert {tensor.kind for tensor in adapter.tensors.values()} == {says["kind"]}
    assert ("low_rank" in adapter.metadata) == says.get("has_product", False)
    assert same_bits(before, all_bits(model)) and torch.equal(mlp_loss(model, batch), base)
    assert not any("shira" in name for module in model.modules() for name in (*vars(module), *module._buffers))


def train(model, tuner):
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.02)
    for batch in mlp_batches(1) * 4:
        optimizer.zero_grad()
        mlp_loss(model, batch).backward()
        optimizer.step()
    return optimizer
