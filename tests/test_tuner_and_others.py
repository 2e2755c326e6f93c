"""What other code does to a model in training: layers replaced, weights loaded, masters written, optimizers, interrupts."""

import copy
import itertools
import os

import pytest
import torch
from torch import nn

import shira
from conftest import all_bits, bits, mlp, random_adapter, same_bits
from interrupting import interrupted
from shira import BaseMismatch, TuningError


def stepped(model, tuner, **options):
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.05, **options)
    model(torch.randn(5, 13)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("act", ["new", "copy", "deleted"])
def test_a_layer_that_is_replaced_is_an_error_until_it_is_put_back(act):
    model = mlp()
    base = all_bits(model)
    tuner = shira.attach(model, density=0.3)
    optimizer, old = stepped(model, tuner), model[2]
    model[2] = {"new": nn.Linear(11, 5), "copy": copy.deepcopy(old), "deleted": nn.Identity()}[act]
    for call in (
        tuner.adapter,
        tuner.detach,
        tuner.detach,
        optimizer.step,
        lambda: tuner.reference().__enter__(),
        tuner.state_dict,
    ):
        with pytest.raises(TuningError, match=r"the module '2' was replaced.*release\(\)"):
            call()
    model[2] = old
    tuner.detach()
    assert same_bits(base, all_bits(model))


def test_release_takes_what_a_copied_layer_has_brought():
    model = mlp()
    tuner = shira.attach(model, density=0.3)
    stepped(model, tuner)
    model[2] = copy.deepcopy(model[2])
    held = all_bits(model[2])
    tuner.release()
    assert not [name for name, _ in model.named_parameters() if "shira" in name]
    assert not [name for name, _ in model.named_buffers() if "shira" in name]
    assert all("forward" not in vars(module) for module in model.modules())
    assert same_bits({name: held[name] for name in ("weight", "bias")}, all_bits(model[2]))
    shira.attach(model.requires_grad_(True)).detach()  # the copy was made of a layer that was frozen


def test_a_layer_that_is_wrapped_stays_its_own():
    model = mlp()
    base = all_bits(model)
    tuner = shira.attach(model, density=0.3)
    stepped(model, tuner)
    inner = model[2]
    model[2] = nn.Sequential(inner)
    tuner.adapter()
    tuner.detach()
    model[2] = inner
    assert same_bits(base, all_bits(model))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_the_base_loaded_over_what_trains(strict, assign):
    model = mlp()
    state, base = copy.deepcopy(model.state_dict()), all_bits(model)
    tuner = shira.attach(model, density=0.3)
    stepped(model, tuner)
    trained = [parameter.detach().clone() for parameter in tuner.parameters()]
    model.load_state_dict(state, strict=strict, assign=assign)
    assert all(torch.equal(one, other) for one, other in zip(trained, tuner.parameters(), strict=True))
    model(torch.randn(2, 13))
    assert not same_bits(base, {name: bits(model.get_parameter(name)) for name in base})  # the masters are in it again
    tuner.detach()
    assert same_bits(base, all_bits(model))


def test_masters_that_others_write_through_data_are_in_what_is_saved():
    model = mlp()
    tuner = shira.attach(model, density=0.3)
    stepped(model, tuner)
    for parameter in tuner.parameters():
        parameter.data.mul_(2)
    state, adapter = model.state_dict(), tuner.adapter()
    for name, tensor in adapter.tensors.items():
        assert torch.equal(state[name].view(-1)[tensor.indices.long()], tensor.values)
    nn.utils.vector_to_parameters(torch.cat([p.detach() * 2 for p in tuner.parameters()]), tuner.parameters())
    model(torch.randn(2, 13))
    for name, tensor in tuner.adapter().tensors.items():
        assert torch.equal(model.get_parameter(name).detach().view(-1)[tensor.indices.long()], tensor.values)


def test_a_step_inside_reference_shows_after_it():
    model, inputs = mlp(), torch.randn(5, 13)
    base = all_bits(model)
    tuner = shira.attach(model, density=0.3)
    optimizer = stepped(model, tuner)
    model(inputs).square().mean().backward()
    with tuner.reference():
        optimizer.step()
        assert same_bits(base, {name: bits(model.get_parameter(name)) for name in base})
    model(inputs)
    for name, tensor in tuner.adapter().tensors.items():
        assert torch.equal(model.get_parameter(name).detach().view(-1)[tensor.indices.long()], tensor.values)
    tuner.detach()
    assert same_bits(base, all_bits(model))


def test_functional_call_does_not_write_into_what_it_is_given():
    model = mlp()
    given = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    kept = {name: bits(tensor) for name, tensor in given.items()}
    with shira.attach(model, density=0.3) as tuner:
        stepped(model, tuner)
        with pytest.raises(TuningError, match="functional_call"):
            torch.func.functional_call(model, given, (torch.randn(2, 13),))
        assert same_bits(kept, {name: bits(tensor) for name, tensor in given.items()})
        model(torch.randn(2, 13))


def test_calibration_that_casts_the_model_leaves_nothing():
    model = mlp()
    model(torch.randn(2, 13)).sum().backward()
    base = all_bits(mlp().bfloat16())

    def loss(model, batch):
        return model.bfloat16()(batch.bfloat16()).float().square().mean()

    shira.attach(model, mask="snip", density=0.2, calibration=[torch.randn(3, 13)], loss_fn=loss).detach()
    assert same_bits(base, all_bits(model)) and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", ["values", "hook"])
def test_fused_optimizers_are_seen(method):
    """They move no version counter by themselves."""
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(5, 13)
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with shira.attach(model, density=0.2, method=method) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.05, weight_decay=0.3, fused=True)
        for _ in range(2):
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        model(inputs)
        for name, tensor in tuner.adapter().tensors.items():
            expected = base[name].view(-1).index_copy(0, tensor.indices.long(), tensor.values)
            assert torch.equal(model.get_parameter(name).detach().view(-1), expected)


def test_a_full_step_under_what_is_ready_is_another_base():
    model = mlp()
    switcher = shira.Switcher(model)
    switcher.add("a", random_adapter(model, 1))
    switcher.use("a")
    switcher.use(None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.randn(2, 13)).sum().backward()
    optimizer.step()
    with pytest.raises(BaseMismatch):
        switcher.use("a")


class Timeout(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, pytest.param(Timeout, marks=pytest.mark.slow)])
def test_what_was_trained_survives_an_interrupt_in_reference(error):
    """At every other line, or any with SHIRA_LONG, going in, inside, and going out: the next call finds what was trained."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.norm, self.two = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x):
            return self.two(self.norm(self.one(x)).relu())

    def attempt(line):
        torch.manual_seed(0)
        model, inputs = Model(), torch.randn(5, 4)
        tuner = shira.attach(model, density=0.3)
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        model(inputs).square().mean().backward()
        optimizer.step()
        before = {name: (bits(t.indices), bits(t.values)) for name, t in tuner.adapter().tensors.items()}
        assert "norm.running_mean" in before
        with interrupted(line, error=error) as left, tuner.reference():
            model.eval()(inputs)
        model.train()
        tuner.masters("looked at")  # as the next call does
        after = {name: (bits(t.indices), bits(t.values)) for name, t in tuner.adapter().tensors.items()}
        assert before.keys() == after.keys(), f"line {line}"
        assert all(torch.equal(one, other) for name in before for one, other in zip(before[name], after[name], strict=True))
        model(inputs).square().mean().backward()
        assert all(parameter.grad is not None for parameter in tuner.parameters())
        tuner.detach()
        return not left

    line, step = 1, 1 if os.environ.get("SHIRA_LONG") else 2
    while attempt(line):
        line += step
    assert line > 60


def test_a_copied_layer_does_not_write_over_what_another_has_made_of_it():
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4))
    inputs = torch.randn(3, 4, 9)
    with shira.attach(model, density=0.3, targets=["0"]) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.05)
        model(inputs).square().sum().backward()
        optimizer.step()
        fused = nn.utils.fusion.fuse_conv_bn_eval(model.eval()[0], model[1])
        made = bits(fused.weight)
        with pytest.raises(TuningError, match="written to or replaced by others"):
            fused(inputs)
        assert torch.equal(made, bits(fused.weight))


def test_lazy_modules_and_sparse_gradients():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(TuningError, match="'0.weight' is of a lazy module"):
        shira.attach(model, targets=["1"], density=0.5)
    shira.Switcher(model).use(None)
    model(torch.randn(2, 3))
    shira.attach(model, density=0.5).detach()
    ids = torch.tensor([[1, 2, 3]])
    embeddings = (nn.Embedding, nn.EmbeddingBag)
    ways = ({"mask": "snip", "calibration": [ids]}, {"method": "hook"})
    for embedding, options in itertools.product(embeddings, ways):
        own = {"mode": "sum"} if embedding is nn.EmbeddingBag else {}
        model = nn.Sequential(embedding(20, 4, sparse=True, **own), nn.Linear(4, 2))
        base = all_bits(model)
        loss = lambda model, batch: model(batch).square().sum()  # noqa: E731
        with shira.attach(model, targets=["0"], density=0.1, loss_fn=loss, **options) as tuner:
            loss(model, ids).backward()
            torch.optim.SGD(tuner.parameters(), lr=0.1).step()
        assert same_bits(base, all_bits(model))


@pytest.mark.parametrize("stepped", [False, True])
def test_offloading_hooks_that_are_put_on_and_taken_off(stepped):
    accelerate = pytest.importorskip("accelerate")
    model = mlp(torch.bfloat16)
    before = all_bits(model)
    tuner = shira.attach(model, density=0.3)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    x = torch.randn(3, 13).bfloat16()
    model(x).float().square().mean().backward()
    optimizer.step()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if stepped:
        with pytest.raises(TuningError, match="on the meta device, as offloading leaves it"):
            model(x).float().square().mean().backward()
            optimizer.step()
    else:
        with torch.no_grad():
            model(x)
    accelerate.hooks.remove_hook_from_submodules(model)
    if not stepped:
        model(x).float().square().mean().backward()  # the optimizer's own masters train on
        optimizer.step()
        assert tuner.adapter().nnz == tuner.nnz
    tuner.detach()
    assert same_bits(before, all_bits(model))
