"""Switching models that are out of the ordinary: compiled, in inference mode or autocast, with buffers, scalars and blocks."""

import pytest
import torch
from torch import nn

import shira
from conftest import all_bits, bits, mlp, random_adapter, same_bits
from shira import BaseMismatch, SparseTensor, Switcher, SwitchError, TargetError, TuningError
from test_model_changes import switcher_of


@torch.no_grad()
@pytest.mark.parametrize("kind", ["compiled", "compiled inside"])
def test_a_compiled_model_is_switched_under_its_own_names(kind):
    model = mlp()
    base = all_bits(model)
    adapter = random_adapter(model, 1)
    if kind == "compiled":
        outer = torch.compile(model, backend="eager")
    else:
        outer = nn.Sequential(*model)
        outer[2] = torch.compile(model[2], backend="eager")
    inputs = torch.randn(3, 13)
    plain = outer(inputs)
    switcher = Switcher(outer)
    switcher.add("a", adapter)
    switcher.use("a")
    assert not torch.equal(outer(inputs), plain)
    switcher.use(None)
    assert torch.equal(outer(inputs), plain)
    assert same_bits(base, all_bits(model))


def test_inference_mode_leaves_nothing_that_cannot_be_written():
    model = mlp()
    base = all_bits(model)
    switcher = switcher_of(model)
    with torch.inference_mode():
        switcher.use({"a": 0.5, "b": 1.0})
        other = mlp()
        inner = switcher_of(other)
        inner.use("a")
    switcher.use("plain")
    switcher.use(None)
    inner.use("b")
    inner.use(None)
    assert same_bits(base, all_bits(model)) and same_bits(base, all_bits(other))
    model(torch.randn(2, 13)).sum().backward()


def test_buffers_that_a_checkpoint_holds_are_switched_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    base = all_bits(model)
    mean = SparseTensor((4,), torch.arange(4), torch.full((4,), 7.0))
    switcher = Switcher(model)
    switcher.add("x", shira.Adapter({"1.running_mean": mean}))
    switcher.use("x")
    assert torch.equal(model[1].running_mean, mean.values)
    model(torch.randn(8, 4))  # in training, which moves it
    switcher.use(None)
    assert torch.equal(model[1].running_mean, torch.zeros(4))
    model[1].num_batches_tracked.zero_()
    model[1].running_var.fill_(1)
    assert same_bits(base, {name: bits(tensor) for name, tensor in model.named_parameters()})


def test_a_switch_inside_autocast_is_seen():
    model = mlp()
    inputs = torch.randn(3, 13)
    switcher = switcher_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(inputs)
        switcher.use("a")
        adapted = model(inputs)
        switcher.use(None)
        assert torch.equal(model(inputs), plain) and not torch.equal(adapted, plain)
    switcher.use("a")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(inputs), adapted)


def test_scalars_are_followed():
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(2.3))
    switcher = Switcher(model)
    switcher.add("x", shira.Adapter({"scale": SparseTensor((), torch.tensor([0]), torch.tensor([7.7]))}))
    switcher.use("x")
    model.half()
    switcher.use(None)
    assert torch.equal(model.scale, torch.tensor(2.3).half())


def test_a_module_that_is_put_on_later_is_found():
    model = mlp()
    switcher = switcher_of(model)
    switcher.use("a")
    held = all_bits(model)
    model.add_module("score", nn.Linear(7, 2))
    switcher.add("head", shira.Adapter({"score.weight": SparseTensor((2, 7), torch.tensor([3]), torch.ones(1))}))
    assert switcher.active == {"a": 1.0} and same_bits(held, {name: bits(model.get_parameter(name)) for name in held})
    switcher.use("head")
    assert model.score.weight.view(-1)[3] == 1
    switcher.use(None)


def test_sums_over_a_buffer_are_of_what_it_is_now():
    model = nn.Sequential(nn.BatchNorm1d(4))
    switcher = Switcher(model)
    switcher.add("x", shira.Adapter({"0.running_mean": SparseTensor((4,), torch.arange(4), torch.ones(4))}))
    for before in (0.0, 10.0):
        model[0].running_mean.fill_(before)
        switcher.use({"x": 0.5})
        assert torch.equal(model[0].running_mean, torch.full((4,), (before + 1) / 2))
        switcher.use(None)
        assert torch.equal(model[0].running_mean, torch.full((4,), before))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, torch.randn(2, 13))])
def test_torchscript_is_refused_as_a_model_and_as_a_part_of_one(make):
    scripted = make(mlp())
    for model, words in (
        (scripted, "found TorchScript"),
        (nn.Sequential(nn.Linear(13, 13), scripted), "its part '1' is TorchS"),
    ):
        before = all_bits(model)
        with pytest.raises(
            SwitchError, match=rf"{words}.*load the model that was scripted or traced.*shira\.Switcher\(model\)"
        ):
            Switcher(model)
        with pytest.raises(TuningError, match=rf"{words}.*load the model that was scripted or traced.*shira\.attach\(model\)"):
            shira.attach(model, density=0.1)
        assert same_bits(before, all_bits(model))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_that_changes_its_own_weights_is_refused(kind):
    model = nn.Sequential(kind(10, 4, max_norm=1.0), nn.Linear(4, 3))
    switcher = Switcher(model)
    entry = SparseTensor((10, 4), torch.tensor([3]), torch.ones(1))
    with pytest.raises(BaseMismatch, match="'x': '0.weight' belongs to an embedding with max_norm.*set max_norm=None"):
        switcher.add("x", shira.Adapter({"0.weight": entry}))
    model[0].max_norm = None
    switcher.add("x", shira.Adapter({"0.weight": entry}))


def to_mkldnn(part):
    from torch.utils import mkldnn  # which warns

    return mkldnn.to_mkldnn(part)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, to_mkldnn])
def test_torchscript_that_takes_the_place_of_another_part_hinders_nobody(make):
    model = mlp().append(nn.Linear(5, 5))
    base = all_bits(model[:3])
    with shira.attach(model, density=0.3, targets=["0"]) as tuner:
        model[3] = make(model[3])
        with torch.no_grad():
            tuner.parameters()[0].add_(1)
        adapter = tuner.adapter()
    assert same_bits(base, all_bits(model[:3]))
    model[3] = nn.Linear(5, 5)
    switcher = Switcher(model)
    switcher.add("a", adapter)
    switcher.use("a")
    model[3] = make(model[3])
    switcher.use({"a": 0.5})
    switcher.use(None)
    assert same_bits(base, all_bits(model[:3]))
    switcher.use("a")
    model[0] = make(model[0])
    with pytest.raises(SwitchError, match=r"'0.weight' was changed by somebody else while .* found nothing of that name"):
        switcher.use(None)
    switcher.release()


def test_a_lazy_batch_norm_is_left_alone_and_runs_before_it_trains():
    model = mlp().append(nn.LazyBatchNorm1d(affine=False))
    switcher = Switcher(model)
    switcher.add("a", random_adapter(mlp(), 1))
    switcher.use("a")
    switcher.use(None)
    with pytest.raises(TuningError, match="'3.running_mean' is of a lazy module .* run one forward pass, then attach"):
        shira.attach(model)
    model(torch.ones(2, 13))
    shira.attach(model).detach()


def test_a_tensor_that_consists_of_others_is_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    model, adapter = mlp(), random_adapter(mlp(), 1)
    model[0].weight = nn.Parameter(TwoTensor(model[0].weight.detach(), model[0].weight.detach().clone()))
    switcher = Switcher(model)
    words = "'0.weight' must be a plain tensor, found a TwoTensor, which consists of other tensors"
    with pytest.raises(BaseMismatch, match=words):
        switcher.add("a", adapter)
    with pytest.raises(SwitchError, match="'0.weight' is no plain tensor but a TwoTensor"):
        switcher.base_values("0.weight", torch.arange(3))
    with pytest.raises(TargetError, match=words):
        shira.attach(model)
    shira.attach(model, targets=["2"]).detach()
    model.double()
