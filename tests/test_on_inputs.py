"""`fuse_on_inputs`: each adapter keeps its effect on inputs of its own task."""

import copy

import pytest
import torch
from torch import nn

import shira
from conftest import all_bits, llama_batches, mlp, mlp_batches, mlp_loss, random_adapter, same_bits
from shira import DataError, MaskError, SwitchError, TuningError
from shira.switching import on_inputs
from shira.switching.on_inputs import fuse_on_inputs


def task_batches(seed, count=3):
    """Inputs that lie near a few directions of their own, so that tasks can be told apart."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(3, 13, generator=generator)
    return [(torch.randn(7, 3, generator=generator) @ directions, labels) for _, labels in mlp_batches(count, seed=seed)]


def switcher_of(model, count=2, **more):
    switcher = shira.Switcher(model)
    for seed in range(count):
        switcher.add("abc"[seed], random_adapter(model, seed, **more))
    return switcher


def plain(model, switcher, inputs):
    """Weight -> its fused value, row by row in float64, from the definition alone."""
    base = {name: weight.detach().double() for name, weight in model.named_parameters()}
    weights = {name: weight for name, weight in base.items() if weight.ndim == 2}
    changes = []
    for name in inputs:
        with switcher.using({name: 1.0}):
            changes.append({each: model.get_parameter(each).detach().double() - weights[each] for each in weights})
    added = switcher.changes(dict.fromkeys(inputs, 1.0))
    products = {name: [] for name in weights}
    for name, batches in inputs.items():
        seen = {}
        with switcher.using({name: 1.0}), torch.no_grad():
            for batch, _ in batches:
                hidden = batch
                for number, layer in enumerate(model):
                    if isinstance(layer, nn.Linear):
                        seen.setdefault(f"{number}.weight", []).append(hidden.double())
                    hidden = layer(hidden)
        for tensor, rows in seen.items():
            x = torch.cat(rows)
            product = x.T @ x / len(x)
            size = product.diagonal().clone()
            product *= 0.9
            product.diagonal().copy_(size)
            products[tensor].append(product / size.mean())
    found = {}
    for tensor, weight in weights.items():
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[added[tensor].indices] = True
        fused, own, kept = torch.zeros_like(weight), 0.0, 0.0
        for row, columns in enumerate(mask.view(weight.shape)):
            at = columns.nonzero().view(-1)
            if at.numel():
                blocks = [product[at][:, at] for product in products[tensor]]
                parts = [change[tensor][row, at] for change in changes]
                system = sum(blocks)
                system += torch.eye(at.numel()) * on_inputs.RIDGE * system.diagonal().mean()
                right = sum(block @ part for block, part in zip(blocks, parts, strict=True))
                fused[row, at] = torch.linalg.solve(system, right)
                own += sum(float(part @ block @ part) for block, part in zip(blocks, parts, strict=True))
                kept += float(fused[row, at] @ right)
        found[tensor] = weight + fused * own / kept
    return found


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_the_result_is_what_the_definition_says(density):
    model = mlp()
    before, switcher = all_bits(model), switcher_of(model, 3, density=density)
    inputs = {name: task_batches(seed) for seed, name in enumerate("abc")}
    both = fuse_on_inputs(switcher, inputs, loss_fn=mlp_loss)
    assert same_bits(all_bits(model), before) and switcher.active == {}
    wanted = plain(model, switcher, inputs)
    switcher.add("both", both)
    switcher.use({"both": 1.0})
    for name, weight in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).double(), weight, rtol=2e-3, atol=2e-4)
    switcher.use(None)
    assert same_bits(all_bits(model), before)


def test_it_is_nearer_to_each_adapter_on_its_inputs_than_the_sum(monkeypatch):
    model = mlp()
    switcher = switcher_of(model)
    inputs = {name: task_batches(seed) for seed, name in enumerate("ab")}
    switcher.add("both", fuse_on_inputs(switcher, inputs, loss_fn=mlp_loss))

    def outputs(selection, name):
        with switcher.using(selection), torch.no_grad():
            return torch.cat([model(batch) for batch, _ in inputs[name]])

    for name in "ab":
        alone = outputs({name: 1.0}, name)
        far = [float((outputs(how, name) - alone).norm()) for how in ({"both": 1.0}, {"a": 1.0, "b": 1.0})]
        assert far[0] < 0.7 * far[1], far


@pytest.mark.parametrize("wide", [False, True])
def test_neither_memory_nor_what_is_active_changes_the_result(tiny_llama, wide, monkeypatch):
    model = tiny_llama.to(torch.bfloat16) if wide else tiny_llama
    switcher = switcher_of(model)
    inputs = {name: llama_batches(2, seed) for seed, name in enumerate("ab")}
    told = []
    one = fuse_on_inputs(switcher, inputs, progress=lambda *done: told.append(done))
    assert told == [(n, 4 + len(one.tensors)) for n in range(1, 5 + len(one.tensors))]
    assert one.metadata["fused"] == {"method": "regmean", "adapters": ["a", "b"]} and one.name == "random0+random1"
    switcher.use("a")
    active = all_bits(model)
    monkeypatch.setattr(on_inputs, "SYSTEMS", 1)
    other = fuse_on_inputs(switcher, inputs, memory=1)
    assert switcher.active == {"a": 1.0} and same_bits(all_bits(model), active)
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor.indices, other.tensors[name].indices)
        torch.testing.assert_close(tensor.values, other.tensors[name].values, rtol=1e-2, atol=1e-3)


def test_features_that_no_input_has_and_inputs_that_are_not_finite():
    model = mlp(torch.float64)
    switcher, before = switcher_of(model, density=1.0), all_bits(model)
    inputs = {name: [(batch.double(), labels) for batch, labels in task_batches(seed)] for seed, name in enumerate("ab")}
    for batches in inputs.values():
        for batch, _ in batches:
            batch[:, 3:] = 0
    both = fuse_on_inputs(switcher, inputs, loss_fn=mlp_loss)
    fused = both.tensors["0.weight"]
    assert fused.values.dtype == torch.float64 and bool(fused.values.isfinite().all())
    unseen = fused.indices % 13 >= 3
    assert torch.equal(fused.values[unseen], model[0].weight.detach().view(-1)[fused.indices[unseen]])
    inputs["a"][0][0][0, 0] = torch.nan
    with pytest.raises(SwitchError, match="'0.weight': an input of its layer is NaN"):
        fuse_on_inputs(switcher, inputs, loss_fn=lambda model, batch: model(batch[0]))
    assert same_bits(all_bits(model), before) and switcher.active == {}


def test_weights_that_no_linear_layer_multiplies_are_added():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(13, 6), nn.Linear(6, 5))
    switcher = switcher_of(model)
    inputs = {name: [torch.randint(13, (4, 7))] for name in "ab"}
    both = fuse_on_inputs(switcher, inputs, loss_fn=lambda model, batch: model(batch))
    added = shira.fuse({name: (random_adapter(model, seed), 1.0) for seed, name in enumerate("ab")}, base=model)
    close = {name: torch.allclose(t.values, added.tensors[name].values, atol=1e-6) for name, t in both.tensors.items()}
    assert close == {"0.weight": True, "1.weight": False}


def test_transposed_weights_are_solved_as_linear_ones():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model, other = nn.Sequential(nn.Linear(13, 5)), nn.Sequential(Conv1D(5, 13))
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight.T)
        other[0].bias.copy_(model[0].bias)
    switcher, swapped = switcher_of(model), shira.Switcher(other)
    for seed, name in enumerate("ab"):
        dense = torch.zeros(5, 13)
        tensor = random_adapter(model, seed).tensors["0.weight"]
        dense.view(-1)[tensor.indices] = tensor.values
        places = dense.T.reshape(-1).nonzero().view(-1)
        turned = shira.SparseTensor((13, 5), places, dense.T.reshape(-1)[places], "overwrite")
        swapped.add(name, shira.Adapter({"0.weight": turned}))
    inputs = {name: task_batches(seed) for seed, name in enumerate("ab")}
    weights = []
    for each, net in ((switcher, model), (swapped, other)):
        each.add("both", fuse_on_inputs(each, inputs, loss_fn=lambda model, batch: model(batch[0])))
        with each.using({"both": 1.0}):
            weights.append(net[0].weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1].T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda given: {"a": given["a"]}, SwitchError, "expected two adapters or more"),
        (lambda given: given | {"x": given["a"]}, SwitchError, "no adapter 'x'"),
        (lambda given: [given], SwitchError, "expected fuse_on_inputs"),
        (lambda given: given | {"b": given["b"][0]}, TuningError, "the inputs of 'b' must be batches"),
        (lambda given: given | {"b": []}, MaskError, "holds no batch"),
        (lambda given: given | {"b": ["words"]}, DataError, "a batch must be a mapping"),
    ],
)
def test_wrong_inputs_are_refused_and_the_model_is_as_before(tiny_llama, change, error, message):
    switcher = switcher_of(tiny_llama)
    before = all_bits(tiny_llama)
    with pytest.raises(error, match=message):
        fuse_on_inputs(switcher, change({name: llama_batches(1, seed) for seed, name in enumerate("ab")}))
    assert same_bits(all_bits(tiny_llama), before) and switcher.active == {}
    with pytest.raises(SwitchError, match="memory must be a number of bytes"):
        fuse_on_inputs(switcher, {name: llama_batches(1) for name in "ab"}, memory=0)


def test_a_copy_of_the_model_gives_the_same(tiny_llama):
    twin = copy.deepcopy(tiny_llama)
    inputs = {name: llama_batches(1, seed) for seed, name in enumerate("ab")}
    one, other = (fuse_on_inputs(switcher_of(model), inputs) for model in (tiny_llama, twin))
    assert all(torch.equal(one.tensors[name].values, other.tensors[name].values) for name in one.tensors)


def test_wrong_options_of_the_command_are_refused_before_the_model_is_loaded(run, tmp_path, monkeypatch, tiny_llama):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        random_adapter(tiny_llama, seed).save(f"{name}.safetensors")
    for options, words in {
        "--on spam --on film": "--on runs the model: give it, --base MODEL",
        "--base none --on spam": "--on must be given once for each adapter, 2 times, in their order; found 1",
        "--base none --on spam --on film --method ties": "--on takes the place of strengths and methods",
        "--base none --on spam --on film --method sum --on film": "found 3",
    }.items():
        code, _, err = run(f"fuse a.safetensors b.safetensors {options}")
        assert code == 1 and words in " ".join(err.split()), err
    code, _, err = run("fuse a.safetensors b.safetensors=0.5 --base none --on spam --on film")
    assert code == 1 and "--on takes the place of strengths and methods" in " ".join(err.split()), err
