import copy
import itertools
import re

import pytest
import torch
from torch import nn

import shira
from conftest import all_bits, attach_is_refused, bits, llama_batches, mlp, mlp_batches, mlp_loss, same_bits
from shira import DataError, MaskError, TargetError, TuningError
from shira.integrations.transformers import checkpointing_of

MASKS = {"struct": 0.3, "rand": 0.1, "wm": 0.1, "grad": 0.1, "snip": 0.1}


def attach(model, mask="wm", **options):
    density = options.pop("density", MASKS[mask] if isinstance(mask, str) else 0.1)
    return shira.attach(model, mask=mask, density=density, calibration=mlp_batches(), loss_fn=mlp_loss, **options)


def step(model, optimizer, batches):
    optimizer.zero_grad()
    for batch in batches:
        (mlp_loss(model, batch) / len(batches)).backward()
    optimizer.step()


def train(model, tuner, steps=6, optimizer=torch.optim.AdamW, **options):
    optimizer = optimizer(tuner.parameters(), **{"lr": 1e-2} | options)
    for batch in itertools.islice(itertools.cycle(mlp_batches(4, seed=9)), steps):
        step(model, optimizer, [batch])
    return tuner.adapter("x")


def values(adapter):
    return torch.cat([tensor.values.float() for tensor in adapter.tensors.values()])


@pytest.mark.parametrize("mask", MASKS)
def test_both_ways_of_the_paper_give_the_same_adapter(mask):
    model = mlp()
    before = all_bits(model)
    trained = {}
    for method in ("values", "hook"):
        with attach(model, mask, method=method) as tuner:
            trained[method] = train(model, tuner, weight_decay=0.1)
        assert same_bits(before, all_bits(model))
    for name, tensor in trained["values"].tensors.items():
        other = trained["hook"].tensors[name]
        assert torch.equal(tensor.indices, other.indices)
        torch.testing.assert_close(tensor.values, other.values, rtol=1e-5, atol=1e-6)
        assert not torch.equal(bits(tensor.values), before[name].view(torch.float32)[tensor.indices])
    assert trained["values"].fingerprints == trained["hook"].fingerprints


def test_a_llama_trains_the_same_both_ways(tiny_llama):
    trained = []
    for method in ("values", "hook"):
        with shira.attach(tiny_llama, mask="snip", density=0.05, calibration=llama_batches(), method=method) as tuner:
            optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
            for batch in llama_batches(5, seed=3):
                optimizer.zero_grad()
                tiny_llama(**batch).loss.backward()
                optimizer.step()
            trained.append(values(tuner.adapter()))
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=["plain", "foreach", "fused"])
def test_every_adamw_reaches_the_weights(options):
    """The fused one does not move its parameters' version counters."""
    model = mlp()
    with attach(model) as tuner:
        adapter = train(model, tuner, **options)
        model(torch.ones(1, 13))  # writes the last step
        for name, tensor in adapter.tensors.items():
            live = model.get_parameter(name).detach().view(-1)[tensor.indices.long()]
            assert torch.equal(bits(live), bits(tensor.values))
    with attach(model) as tuner:
        torch.testing.assert_close(values(train(model, tuner)), values(adapter), rtol=1e-5, atol=1e-6)


def test_a_forward_pass_between_backward_and_step_hides_nothing():
    model = mlp()
    batch = mlp_batches(1)[0]
    with attach(model) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-1, fused=True)
        mlp_loss(model, batch).backward()
        with torch.no_grad():
            before = model(batch[0])
        optimizer.step()
        with torch.no_grad():
            assert not torch.equal(before, model(batch[0]))


def test_two_forward_passes_before_one_backward(tiny_llama):
    """As preference training does; with gradients that were zeroed and not dropped, too."""
    one, other = llama_batches(2)
    with shira.attach(tiny_llama, density=0.05) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)

        def gradient(loss):
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            return torch.cat([parameter.grad.clone() for parameter in tuner.parameters()])

        seen = []
        for _ in range(3):
            apart = gradient(tiny_llama(**one).loss) - gradient(tiny_llama(**other).loss)
            loss = tiny_llama(**one).loss - tiny_llama(**other).loss
            torch.testing.assert_close(gradient(loss), apart, rtol=1e-4, atol=1e-6)
            optimizer.step()
            seen.append(loss.item())
        assert seen[2] < seen[1] < seen[0]


@pytest.mark.parametrize("method", ["values", "hook"])
def test_gradients_exist_at_the_masks_positions_only(method):
    model = mlp()
    with attach(model, method=method) as tuner:
        mlp_loss(model, mlp_batches(1)[0]).backward()
        total = sum(int((p.grad != 0).sum()) for p in tuner.parameters())
        assert 0 < total <= tuner.nnz
        trained = {id(p) for p in tuner.parameters()}
        assert all(p.grad is None for p in model.parameters() if id(p) not in trained)
        if method == "values":
            assert all(p.dtype == torch.float32 and p.ndim == 1 for p in tuner.parameters())
            assert {id(p) for p in model.parameters() if p.requires_grad} == trained  # any trainer finds them


def test_the_gradient_is_the_dense_one_at_the_positions(tiny_llama):
    batch = llama_batches(1)[0]
    dense = copy.deepcopy(tiny_llama)
    dense(**batch).loss.backward()
    with shira.attach(tiny_llama, density=0.1) as tuner:
        tiny_llama(**batch).loss.backward()
        for (name, tensor), parameter in zip(tuner.adapter().tensors.items(), tuner.parameters(), strict=True):
            exact = dense.get_parameter(name).grad.view(-1)[tensor.indices.long()]
            torch.testing.assert_close(parameter.grad, exact, rtol=1e-4, atol=1e-7)


def columns_only(weight, k):
    """Whole columns and nothing else."""
    chosen = torch.zeros(weight.shape, dtype=torch.bool)
    chosen[:, :: -(-weight.numel() // k)] = True
    return chosen


def test_a_column_mask_keeps_only_its_columns_of_the_input():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(60, 50))
    input = torch.randn(4, 7, 60)
    dense = copy.deepcopy(layer)
    dense(input).square().sum().backward()
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with shira.attach(layer, mask=columns_only, density=0.1) as tuner:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = layer(input)
        output.square().sum().backward()
        (values,), (tensor,) = tuner.parameters(), tuner.adapter().tensors.values()
        torch.testing.assert_close(values.grad, dense[0].weight.grad.view(-1)[tensor.indices.long()], rtol=1e-4, atol=1e-4)
    assert 4 * 7 * 6 in saved
    assert input.numel() not in saved


def test_masters_are_float32_on_a_bfloat16_model():
    """Steps too small for bfloat16 add up in the masters."""
    model = mlp(torch.bfloat16)
    before = all_bits(model)
    with attach(model) as tuner:
        assert {p.dtype for p in tuner.parameters()} == {torch.float32}
        start = [p.detach().clone() for p in tuner.parameters()]
        adapter = train(model, tuner, steps=20, optimizer=torch.optim.SGD, lr=1e-4)
        assert all(not torch.equal(p, s) for p, s in zip(tuner.parameters(), start, strict=True))
    assert {t.values.dtype for t in adapter.tensors.values()} == {torch.bfloat16}
    assert same_bits(before, all_bits(model))


def test_gradients_accumulate():
    model = mlp()
    batches = mlp_batches(4, size=5)
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    results = []
    for chosen in ([whole], batches):
        with attach(model) as tuner:
            optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
            for _ in range(3):
                step(model, optimizer, chosen)
            results.append(values(tuner.adapter()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tiny_llama, reentrant):
    results = []
    for checkpoint in (False, True):
        if checkpoint:
            checkpointing_of(tiny_llama)[0]({"use_reentrant": reentrant})
        tiny_llama.train()
        with shira.attach(tiny_llama, density=0.1) as tuner:
            optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
            for batch in llama_batches(3):
                optimizer.zero_grad()
                tiny_llama(**batch).loss.backward()
                optimizer.step()
            results.append(values(tuner.adapter()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_generation_and_evaluation_in_between_change_nothing(tiny_llama):
    results = []
    for disturb in (False, True):
        with shira.attach(tiny_llama, density=0.1) as tuner:
            optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
            for batch in llama_batches(3):
                tiny_llama.train()
                optimizer.zero_grad()
                tiny_llama(**batch).loss.backward()
                optimizer.step()
                if disturb:
                    tiny_llama.eval()
                    tiny_llama.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=3, do_sample=False)
                    with torch.inference_mode():
                        tiny_llama(**batch)
            results.append(values(tuner.adapter()))
    assert torch.equal(bits(results[0]), bits(results[1]))


def test_generation_uses_the_latest_step():
    model = mlp()
    with attach(model) as tuner:
        adapter = train(model, tuner)
        with torch.no_grad():
            live = model(torch.ones(2, 13))
    switcher = shira.Switcher(model)
    switcher.add("x", adapter)
    with switcher.using("x"), torch.no_grad():
        assert torch.equal(bits(live), bits(model(torch.ones(2, 13))))


def test_two_adapters_one_after_the_other():
    model = mlp()
    before = all_bits(model)
    adapters = []
    for seed in (0, 1):
        with attach(model, "rand", seed=seed) as tuner:
            adapters.append(train(model, tuner))
    assert same_bits(before, all_bits(model))
    switcher = shira.Switcher(model)
    for name, adapter in zip("ab", adapters, strict=True):
        switcher.add(name, adapter)
    switcher.use({"a": 1.0, "b": 1.0})
    assert not same_bits(before, all_bits(model))
    switcher.use(None)
    assert same_bits(before, all_bits(model))


def test_autocast():
    model = mlp()
    batch = mlp_batches(1)[0]
    with attach(model) as tuner:
        with torch.autocast("cpu", torch.bfloat16):
            loss = mlp_loss(model, batch)
        loss.backward()
        rough = torch.cat([p.grad for p in tuner.parameters()])
        for parameter in tuner.parameters():
            parameter.grad = None
        mlp_loss(model, batch).backward()
        exact = torch.cat([p.grad for p in tuner.parameters()])
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.02)


def test_tied_linears_share_their_masters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    results = []
    for method in ("values", "hook"):
        with shira.attach(model, density=0.4, method=method) as tuner:
            assert len(tuner.parameters()) == 1
            optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.ones(2, 5)).square().sum().backward()
                optimizer.step()
            results.append(values(tuner.adapter()))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"targets": ["nothing"]}, TargetError, "matches no layer"),
        ({"density": 0}, MaskError, "above 0"),
        ({"density": 1.5}, MaskError, "at most 1"),
        ({"density": 0.1, "rank": 2}, MaskError, "one of them"),
        ({"rank": 99}, MaskError, "rank must be"),
        ({"mask": "snap"}, MaskError, "did you mean 'snip'"),
        ({"mask": "grad"}, MaskError, "pass calibration="),
        ({"mask": "snip", "calibration": []}, MaskError, "no batch"),
        ({"mask": "snip", "calibration": [3]}, DataError, "a batch must be a mapping"),
        ({"method": "magic"}, TuningError, "'values' or 'hook'"),
        ({"mask": "struct", "density": 0.01}, MaskError, "'0.weight'.*struct needs the diagonal"),
    ],
)
def test_a_bad_request_changes_nothing(options, error, words):
    attach_is_refused(options, error, words)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("r", "attach() got an unexpected keyword argument 'r'; here it is rank= (docs/peft.md)"),
        ("target_modules", "'target_modules'; here it is targets= (docs/peft.md)"),
        ("layers_to_transform", "'layers_to_transform'; here it is layers= (docs/peft.md)"),
        ("modules_to_save", "'modules_to_save'; here it is whole= (docs/peft.md)"),
        ("lora_alpha", "'lora_alpha'; there is no such setting here, leave it out (docs/peft.md)"),
        ("nothing", "attach() got an unexpected keyword argument 'nothing'"),
        ("lr", "attach() got an unexpected keyword argument 'lr'"),
    ],
)
def test_a_setting_of_peft_is_answered_with_ours(option, words):
    model = mlp()
    with pytest.raises(TypeError, match=re.escape(words)):
        shira.attach(model, **{option: 8})
    shira.attach(model).detach()


def test_a_second_tuner_on_the_same_layers_is_refused():
    model = mlp()
    with attach(model):
        with pytest.raises(TuningError, match=r"already, to '0.weight'"):
            attach(model)
        mlp_loss(model, mlp_batches(1)[0]).backward()


def test_diverged_training_is_said_so():
    model = mlp()
    before = all_bits(model)
    with attach(model) as tuner, pytest.raises(TuningError, match=r"'0.weight' went wrong.*finite.*lower learning rate"):
        train(model, tuner, optimizer=torch.optim.SGD, lr=float("inf"))
    assert same_bits(before, all_bits(model))


def test_the_adapter_says_where_it_comes_from(tiny_llama):
    with shira.attach(tiny_llama, mask="rand", rank=1, targets="mlp", seed=5) as tuner:
        adapter = tuner.adapter("poet", training={"steps": 3}, license="MIT")
    assert adapter.metadata["mask"] == {"name": "rand", "rank": 1, "seed": 5, "targets": "mlp"}
    assert adapter.metadata["base"] == {"id": "LlamaForCausalLM", "dtype": "float32"}
    assert (adapter.name, adapter.metadata["training"], adapter.metadata["license"]) == ("poet", {"steps": 3}, "MIT")
    assert adapter.nnz == tuner.nnz == 6 * (24 + 40)


def test_a_layer_that_only_has_the_name_of_pefts_layers_trains():
    """As in DLA, whose first layers are called so."""
    model = nn.ModuleDict({"base_layer": nn.Sequential(nn.Linear(4, 4)), "level": nn.Linear(4, 4)})
    with shira.attach(model, mask="rand", density=0.5) as tuner:
        assert set(tuner.adapter().tensors) == {"base_layer.0.weight", "level.weight"}


def test_a_model_that_peft_has_wrapped_is_refused():
    """Its names are no plain model's, and LoRA's factors would be among the targets."""
    import peft

    def lora(model):
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))

    wrapped = lora(mlp())
    wrapped.requires_grad_(False)
    for model in (wrapped, wrapped.base_model.model):
        with pytest.raises(TuningError, match=r"PEFT has wrapped '.*0', .*merge_and_unload\(\) or unload\(\)"):
            shira.attach(model, mask="rand", density=0.1)
    plain = wrapped.unload()
    with shira.attach(plain, mask="rand", density=0.1) as tuner:
        assert set(tuner.adapter().tensors) == {"0.weight", "2.weight"}
