"""torch's default device and dtype are for tensors that a user makes: what shira does depends on neither."""

import contextlib

import pytest
import torch

import shira
from conftest import all_bits, bits, mlp, random_adapter, same_bits
from shira import Switcher
from shira.analysis import report


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "meta": lambda: torch.device("meta"),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
}


def switched(model, adapters, around):
    switcher = Switcher(model)
    found = []
    with around():
        for name, adapter in adapters.items():
            switcher.add(name, adapter)
        for selection in ("a", {"a": 0.5, "b": 2.0}, {"delta": 0.3, "b": 1.0}, None):
            switcher.use(selection)
            found.append(all_bits(model))
    return found


@pytest.mark.parametrize("default", DEFAULTS)
def test_switching(default, tmp_path):
    model = mlp()
    adapters = {name: random_adapter(model, seed) for name, seed in (("a", 1), ("b", 2))}
    deltas = {name: shira.SparseTensor(t.shape, t.indices, t.values / 8, "delta") for name, t in adapters["a"].tensors.items()}
    adapters["delta"] = shira.Adapter(deltas)
    plain = switched(model, adapters, contextlib.nullcontext)
    with DEFAULTS[default]():
        for name, adapter in adapters.items():
            adapter.save(tmp_path / name)
    files = {name: tmp_path / name for name in adapters}
    for given in (adapters, files):
        assert all(same_bits(one, other) for one, other in zip(plain, switched(model, given, DEFAULTS[default]), strict=True))


@pytest.mark.parametrize("default", DEFAULTS)
def test_fusing(default, tmp_path):
    model = mlp()
    for name, seed in (("a", 1), ("b", 2)):
        random_adapter(model, seed).save(tmp_path / name)
    given = {tmp_path / "a": 0.5, tmp_path / "b": 1.0}
    for method in ("sum", "ties", "dare"):
        plain = shira.fuse(given, model, method=method)
        with DEFAULTS[default]():
            found = shira.fuse(given, model, method=method)
        for name, tensor in plain.tensors.items():
            assert torch.equal(bits(tensor.indices), bits(found.tensors[name].indices))
            assert torch.equal(bits(tensor.values), bits(found.tensors[name].values))


def trained(around, mask, **options):
    torch.manual_seed(0)
    model = mlp()
    base, inputs = all_bits(model), torch.randn(9, 13)
    batches = [torch.randn(4, 13)] if mask in ("snip", "grad", "fisher") else None
    with around(), shira.attach(model, mask=mask, density=0.4, calibration=batches, loss_fn=loss, **options) as tuner:
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        for _ in range(2):
            loss(model, inputs).backward()
            optimizer.step()
        adapter = tuner.adapter()
        tuner.load_state_dict(tuner.state_dict())
    assert same_bits(base, all_bits(model))
    return {name: (bits(tensor.indices), bits(tensor.values)) for name, tensor in adapter.tensors.items()}


def loss(model, batch):
    return model(batch).square().mean()


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("mask", ["wm", "rand", "struct", "lift", "nm", "block:size=2", "snip"])
def test_training(mask, default):
    options = {"decompose": 2} if mask == "wm" else {"low_rank": 2} if mask == "rand" else {}
    plain, found = (trained(around, mask, **options) for around in (contextlib.nullcontext, DEFAULTS[default]))
    assert plain.keys() == found.keys()
    assert all(torch.equal(one, other) for name in plain for one, other in zip(plain[name], found[name], strict=True))


@pytest.mark.parametrize("default", DEFAULTS)
def test_comparing_and_extracting(default):
    model, tuned = mlp(), mlp(seed=1)
    adapters = {f"random{seed}": random_adapter(model, seed) for seed in (1, 2)}

    def found():
        compared = shira.compare(*adapters.values(), base=model)
        return compared, shira.extract(model, tuned, density=0.3), report.page(compared, adapters, model, "0.weight")

    plain = found()
    with DEFAULTS[default]():
        compared, extracted, page = found()
    assert compared == plain[0] and page.count("<img") == plain[2].count("<img")
    for name, tensor in plain[1].tensors.items():
        assert torch.equal(tensor.indices, extracted.tensors[name].indices)
        assert torch.equal(bits(tensor.values), bits(extracted.tensors[name].values))
