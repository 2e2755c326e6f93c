"""Quantized bases: deltas train and are served beside layers whose weights nobody can overwrite."""

import copy
import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import shira
from conftest import bits, mlp, random_adapter
from families import family, family_batch
from shira import BaseMismatch, CheckpointError, MaskError, TargetError, TuningError
from shira.kernels.sparse_product import SparseLayout
from shira.weights.quantized import dense, dtype_label, is_quantized, shape_of


def quietly(module):
    """Import a library that says things when it is imported."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pytest.importorskip(module)
    finally:
        logging.disable(logging.NOTSET)


def in_int8(model):
    quietly("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
    return model


def in_nf4(model):
    bnb = quietly("bitsandbytes")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            four = bnb.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
            )
            four.load_state_dict(module.state_dict())
            model.set_submodule(name, four.to("cpu"))
    return model


def test_the_snippet_of_the_page_runs(tmp_path, monkeypatch):
    quietly("torchao")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs/quantized.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(snippet, names := {"torch": torch, "shira": shira, "model": mlp()})
    assert names["switcher"].active == {"poet": 0.5}


QUANTIZE = {"int8": in_int8, "nf4": in_nf4}
LABELS = {"int8": "Int8Tensor", "nf4": "nf4"}


@pytest.fixture(params=QUANTIZE)
def way(request):
    return request.param


def make(way, seed=0):
    return QUANTIZE[way](family("llama", seed)), [family_batch("llama", seed) for seed in range(4)]


def dense_twin(model):
    """A plain model with the values that a quantized one stands for."""
    twin = family("llama")
    values = {name: dense(p).float().clone() for name, p in model.named_parameters()}
    twin.load_state_dict(values | {"lm_head.weight": values["model.embed_tokens.weight"]})
    return twin


def all_codes(model):
    codes = {}
    for name, parameter in model.named_parameters():
        inner = getattr(parameter, "qdata", parameter.data)
        codes[name] = bits(inner)
    return codes


def unchanged(model, codes):
    return all(torch.equal(now, codes[name]) for name, now in all_codes(model).items())


def test_what_a_quantized_weight_stands_for(way):
    model = QUANTIZE[way](mlp())
    weight = model[0].weight
    assert is_quantized(weight) and not is_quantized(model[0].bias)
    assert shape_of(weight) == (11, 13) and dtype_label(weight) == LABELS[way] and dtype_label(model[0].bias) == "float32"
    x = torch.randn(3, 13)
    torch.testing.assert_close(nn.functional.linear(x, dense(weight), model[0].bias), model[0](x), rtol=1e-4, atol=1e-5)
    error = (dense(weight) - mlp()[0].weight.detach()).abs().max()
    assert 0 < float(error) < (0.002 if way == "int8" else 0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [True, False])
def test_the_sparse_product_and_its_gradients_are_the_dense_ones(columns, dtype):
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(7, 9, generator=generator) < 0.3
    if columns:
        chosen[:] = False
        chosen[:, 2::4] = True
    indices = chosen.view(-1).nonzero().view(-1).int()
    x = torch.randn(2, 5, 9, generator=generator).to(dtype).requires_grad_()
    values = torch.randn(indices.numel(), generator=generator).requires_grad_()
    twin_x, twin_values = x.detach().float().requires_grad_(), values.detach().clone().requires_grad_()
    expected = twin_x @ torch.zeros(7, 9).masked_scatter(chosen, twin_values).T
    output = SparseLayout(indices, (7, 9)).product(x, values)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(output.float(), expected, **tolerance)
    weights = torch.randn(output.shape, generator=generator)
    (output * weights.to(dtype)).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad.float(), twin_x.grad, **tolerance)
    torch.testing.assert_close(values.grad, twin_values.grad, **tolerance)
    assert output.dtype == x.dtype and values.grad.dtype == torch.float32


def test_a_product_without_mkl_and_without_entries(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    layout = SparseLayout(torch.tensor([1, 5], dtype=torch.int32), (2, 3))
    assert layout.product(torch.eye(3), torch.tensor([2.0, 7.0])).tolist() == [[0, 0], [2, 0], [0, 7]]
    empty = SparseLayout(torch.tensor([], dtype=torch.int32), (2, 3))
    assert empty.product(torch.ones(1, 3), torch.tensor([])).tolist() == [[0, 0]]


@pytest.mark.parametrize("mask", ["wm", "rand", "struct", "wanda"])
def test_training_beside_a_quantized_base_is_training_over_what_it_stands_for(way, mask):
    """Losses, gradients and three steps of SGD, against overwriting the dequantized weights; then the base again."""
    model, batches = make(way)
    twin, codes = dense_twin(model), all_codes(model)
    before = model(**batches[0]).logits.detach()
    options = {"mask": mask, "density": 0.2, "calibration": batches}
    with shira.attach(model, **options) as tuner, shira.attach(twin, **options) as plain:
        assert torch.equal(model(**batches[0]).logits, before)
        assert [p.shape for p in tuner.parameters()] == [p.shape for p in plain.parameters()]
        assert not any(bool(p.detach().any()) for p in tuner.parameters())
        ours, theirs = (torch.optim.SGD(t.parameters(), lr=0.5) for t in (tuner, plain))
        for batch in batches[:3]:
            losses = []
            for net, optimizer in ((model, ours), (twin, theirs)):
                optimizer.zero_grad()
                loss = net(**batch).loss
                loss.backward()
                losses.append(float(loss.detach()))
            assert losses[0] == pytest.approx(losses[1], rel=1e-4)
            for one, other in zip(tuner.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(one.grad, other.grad, rtol=2e-3, atol=1e-5)
            ours.step()
            theirs.step()
        trained = model(**batches[3]).logits.detach()
        with tuner.reference():
            assert torch.equal(model(**batches[0]).logits, before)
        assert torch.equal(model(**batches[3]).logits, trained)
        state = tuner.state_dict()
        adapter, other = tuner.adapter("q"), plain.adapter()
    assert unchanged(model, codes) and torch.equal(model(**batches[0]).logits, before)
    assert adapter.metadata["base"]["dtype"] == LABELS[way]
    for name, tensor in adapter.tensors.items():
        assert tensor.kind == "delta" and tensor.values.dtype == torch.float32
        delta = other.tensors[name].values - dense(twin.get_parameter(name)).view(-1)[tensor.indices.long()]
        assert torch.equal(tensor.indices, other.tensors[name].indices)
        torch.testing.assert_close(tensor.values, delta, rtol=1e-3, atol=1e-5)
    with shira.attach(model, **options) as tuner:
        tuner.load_state_dict(state)
        assert torch.equal(model(**batches[3]).logits, trained)
    switcher = shira.Switcher(model)
    switcher.add("q", adapter)
    switcher.use("q")
    torch.testing.assert_close(model(**batches[3]).logits, trained, rtol=1e-5, atol=1e-6)
    switcher.use(None)
    assert torch.equal(model(**batches[0]).logits, before)


def test_serving_strengths_fusion_and_the_base(way, tmp_path):
    model, batches = make(way)
    twin, codes = dense_twin(model), all_codes(model)
    names = {n for n, p in model.named_parameters() if is_quantized(p)}
    switchers, adapters = (shira.Switcher(model), shira.Switcher(twin)), {}
    for number, title in enumerate(("a", "b")):
        made = random_adapter(twin, number, 0.2, "delta")
        scaled = {n: shira.SparseTensor(t.shape, t.indices, 0.1 * t.values, "delta") for n, t in made.tensors.items()}
        adapters[title] = shira.Adapter(scaled, {"name": title})  # embeddings too, which are plain: both at once
        assert names < scaled.keys()
        adapters[title].save(tmp_path / f"{title}.safetensors")
        for switcher in switchers:
            switcher.add(title, tmp_path / f"{title}.safetensors")

    def outputs():
        return [net(**batches[0]).logits.detach() for net in (model, twin)]

    base = outputs()[0]
    selections = ["a", {"a": 0.5, "b": -1.0}, "b", None, {"a": {"*": 1.0, "*.mlp.*": 0.0}}]
    for selection in selections:
        for switcher in switchers:
            switcher.use(selection)
        one, other = outputs()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        assert torch.equal(one, base) == (selection is None)
        changes, expected = (switcher.changes(selection) for switcher in switchers)
        assert changes.keys() == expected.keys()
        for name, tensor in changes.items():
            torch.testing.assert_close(tensor.values, expected[name].values, rtol=1e-3, atol=1e-4)
    for switcher in switchers:
        switcher.use({"a": 1.0, "b": 1.0}, "ties", density=0.5)
    torch.testing.assert_close(*outputs(), rtol=1e-3, atol=1e-4)
    with switchers[0].using("a"):
        within = outputs()[0]
    switchers[0].use(None)
    assert torch.equal(outputs()[0], base) and not torch.equal(within, base)
    assert unchanged(model, codes)
    assert not any(module._forward_hooks for module in model.modules())
    fused = shira.fuse({"a": (adapters["a"], 1.0), "b": (adapters["b"], 0.5)})
    switchers[0].add("fused", fused)
    switchers[0].use("fused")
    served = outputs()[0]
    switchers[0].use({"a": 1.0, "b": 0.5})
    torch.testing.assert_close(outputs()[0], served, rtol=1e-5, atol=1e-6)


def test_an_adapter_file_only_of_deltas_switches_among_others(way):
    model, batches = make(way)
    switcher = shira.Switcher(model, ready=1)
    base = model(**batches[0]).logits.detach()
    seen = {}
    for number, title in enumerate("abc"):
        with shira.attach(model, mask="rand", density=0.1, seed=number) as tuner:
            with torch.no_grad():
                for parameter in tuner.parameters():
                    parameter.fill_(0.1 * (number + 1))
            adapter = tuner.adapter()
        switcher.add(title, adapter)
    for title in "abcacb":
        switcher.use(title)
        seen.setdefault(title, model(**batches[0]).logits.detach())
        assert torch.equal(seen[title], model(**batches[0]).logits.detach())
    switcher.use(None)
    assert torch.equal(model(**batches[0]).logits, base)
    assert len({float(logits.sum()) for logits in seen.values()}) == 3


def test_other_adapters_entries_are_avoided(way):
    model, _ = make(way)
    with shira.attach(model, mask="wm", density=0.1) as tuner:
        first = tuner.adapter("first")
    with shira.attach(model, mask="wm", density=0.1, avoid=first, targets=list(first.tensors)) as tuner:
        second = tuner.adapter("second")
    for name, tensor in second.tensors.items():
        assert not set(tensor.indices.tolist()) & set(first.tensors[name].indices.tolist())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": "snip"}, MaskError, "has no gradient for this mask"),
        ({"method": "hook"}, TuningError, "method='values'"),
        ({"decompose": True}, TargetError, "decompose needs weights"),
        ({"low_rank": 2}, TargetError, "low_rank needs weights"),
    ],
)
def test_what_a_quantized_base_cannot_have(way, options, error, message):
    model, batches = make(way)
    codes = all_codes(model)
    with pytest.raises(error, match=message) as raised:
        shira.attach(model, calibration=batches, **options)
    assert f"'model.layers.0.self_attn.q_proj.weight' is {LABELS[way]}" in str(raised.value)
    assert unchanged(model, codes)


def test_overwrites_and_other_shapes_are_refused(way):
    model, _ = make(way)
    twin = dense_twin(model)
    switcher = shira.Switcher(model)
    with pytest.raises(BaseMismatch, match=f"which is {LABELS[way]} in this model and cannot be overwritten"):
        switcher.add("o", random_adapter(twin, 0))
    name = "model.layers.0.mlp.up_proj.weight"
    wrong = shira.SparseTensor((3, 5), torch.tensor([1]), torch.tensor([1.0]), "delta")
    with pytest.raises(BaseMismatch, match=rf"'{name}' has shape \[20, 16\], the adapter expects \[3, 5\]"):
        switcher.add("w", shira.Adapter({name: wrong}))
    delta = shira.SparseTensor((20, 16), torch.tensor([1]), torch.tensor([1.0]), "delta")
    with pytest.raises(BaseMismatch, match="is quantized in this model"):
        shira.fuse({"d": (shira.Adapter({name: delta}), 1.0)}, base=model)
    assert switcher.names == []
    for what in (
        lambda: shira.extract(twin, model),
        lambda: shira.compare(*[random_adapter(twin, n) for n in (0, 1)], base=model),
    ):
        with pytest.raises((CheckpointError, BaseMismatch), match="quantized in this model"):
            what()


def test_plain_layers_beside_quantized_ones_are_overwritten(way):
    model, batches = make(way)
    targets = ["q_proj", "embed_tokens"]
    with shira.attach(model, mask="wm", density=0.1, targets=targets) as tuner:
        model(**batches[0]).loss.backward()
        torch.optim.SGD(tuner.parameters(), lr=0.1).step()
        kinds = {name: tensor.kind for name, tensor in tuner.adapter().tensors.items()}
    assert kinds.pop("model.embed_tokens.weight") == "overwrite" and set(kinds.values()) == {"delta"}


def test_a_checkpoint_that_transformers_quantizes_trains_in_its_trainer(tmp_path):
    quietly("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    family("llama").save_pretrained(tmp_path / "base")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    codes, batch = all_codes(model), family_batch("llama")
    rows = [{key: value[i] for key, value in batch.items()} for i in range(3)]
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path,
        max_steps=2,
        learning_rate=0.1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    model.is_quantized = False  # what docs/quantized.md says
    with shira.attach(model, mask="wm", density=0.1) as tuner:
        result = transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
        adapter = tuner.adapter()
    assert result.global_step == 2 and unchanged(model, codes)
    assert all(bool(tensor.values.all()) and tensor.kind == "delta" for tensor in adapter.tensors.values())


def test_training_after_and_between_evaluations_has_the_whole_gradient():
    """On some CPUs bitsandbytes repacks a weight in its first evaluation, and has no backward pass from then on."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 32)).eval()
    model = in_nf4(copy.deepcopy(plain)).eval()
    x = torch.randn(8, 64)
    stood_for = [dense(model[i].weight) for i in (0, 2, 4)]
    for _ in range(2):
        with torch.no_grad():
            model.eval()(x)
        for i, values in zip((0, 2, 4), stood_for, strict=True):
            torch.testing.assert_close(dense(model[i].weight), values, rtol=1e-2, atol=1e-4)  # scales in bfloat16
            plain[i].load_state_dict({"weight": dense(model[i].weight), "bias": model[i].bias})
        tuners = [shira.attach(net, mask="wm", density=0.2, targets=["0"]) for net in (model, plain)]
        with torch.no_grad():
            model.eval()(x)
        for net in (model.train(), plain.train()):
            net(x).square().sum().backward()
        (ours,), (theirs,) = (tuner.parameters() for tuner in tuners)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
        for tuner in tuners:
            tuner.detach()


def test_a_copy_of_a_quantized_model_trains_for_itself(way):
    model, batches = make(way)
    twin = copy.deepcopy(model)
    with shira.attach(twin, mask="rand", density=0.2) as tuner:
        with torch.no_grad():
            for parameter in tuner.parameters():
                parameter.fill_(0.2)
        assert not torch.equal(model(**batches[0]).logits, twin(**batches[0]).logits)
    assert torch.equal(model(**batches[0]).logits, twin(**batches[0]).logits)
