"""Calibration: what it hands out, that it leaves no trace, and what it costs."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import shira
from conftest import all_bits, llama_batches, mlp, mlp_batches, mlp_loss, same_bits
from shira import DataError, MaskError
from shira.integrations.transformers import checkpointing_of, in_software
from shira.masks.calibration import _inputs_kept as inputs_kept
from shira.masks.calibration import calibrate, nan_advice
from shira.weights.random_numbers import seeded

BOTH = ("gradient", "squared_gradient")


def weights_of(model):
    return {name: p for name, p in model.named_parameters() if name.endswith("weight") and p.ndim == 2}


def collect(model, batches, loss_fn=mlp_loss, **options):
    """All that calibration hands out, and what it says of itself."""
    received = {}

    def receive(name, statistics):
        assert name not in received
        received[name] = {key: value.clone() for key, value in statistics.items()}

    summary = calibrate(model, weights_of(model), batches, receive, loss_fn=loss_fn, **options)
    return received, summary


def per_batch(model, batches):
    """The oracle: each batch's gradient of each weight, float64."""
    found = {name: [] for name in weights_of(model)}
    for batch in batches:
        model.zero_grad()
        mlp_loss(model, batch).backward()
        for name, weight in weights_of(model).items():
            found[name].append(weight.grad.double())
    return found


@pytest.mark.parametrize("memory", [0, 4 * 13 * 11 + 1, 2**30])
@pytest.mark.parametrize("count", [1, 3])
def test_gradients_are_the_sum_and_the_mean_square_in_any_grouping(memory, count):
    batches = mlp_batches(count)
    expected = per_batch(mlp(), batches)
    received, summary = collect(mlp(), iter(batches), statistics=BOTH, memory=memory)
    assert received.keys() == expected.keys()
    for name, found in received.items():
        gradients = torch.stack(expected[name])
        torch.testing.assert_close(found["gradient"].double(), gradients.sum(0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found["squared_gradient"].double(), gradients.square().mean(0), rtol=1e-5, atol=1e-9)
        assert {value.dtype for value in found.values()} == {torch.float32}
    assert summary == {"statistics": list(BOTH), "batches": count}


def test_calibration_leaves_no_trace():
    model = mlp()
    model[2].weight.requires_grad_(False)
    model[0].bias.grad = torch.full((11,), 7.0)
    collect(model, mlp_batches(2), statistics=(*BOTH, "activations"), memory=0)
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True]
    assert torch.equal(model[0].bias.grad, torch.full((11,), 7.0))
    assert model[0].weight.grad is None
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_one_batch_holds_one_gradient_at_a_time():
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    held = []

    def receive(name, statistics):
        held.append(sum(w.grad is not None for w in weights_of(model).values()))

    calibrate(model, weights_of(model), [torch.ones(2, 6)], receive, loss_fn=lambda m, batch: m(batch).sum())
    assert held == [0] * 5


@pytest.mark.parametrize("memory", [0, 2**30])
def test_gradients_that_the_last_batch_does_not_reach_are_handed_out(memory):
    def loss_fn(model, batch):
        return model(torch.ones(1, 13)).sum() if batch == "both" else model[0](torch.ones(1, 13)).sum()

    dense = mlp()
    (loss_fn(dense, "both") + loss_fn(dense, "first")).backward()
    received, _ = collect(mlp(), ["both", "first"], loss_fn, memory=memory)
    for name, weight in weights_of(dense).items():
        torch.testing.assert_close(received[name]["gradient"], weight.grad)


def test_many_small_bfloat16_gradients_add_up():
    """300 gradients of 1/128 after one of 4: a bfloat16 sum would stay at 4, as less than 1/512 of it is rounded off."""
    model = nn.Linear(3, 2, bias=False).to(torch.bfloat16)
    batches = [torch.full((1, 3), 4.0, dtype=torch.bfloat16)] + [torch.full((1, 3), 1 / 128, dtype=torch.bfloat16)] * 300
    narrow = torch.zeros((), dtype=torch.bfloat16)
    for batch in batches:
        narrow += batch[0, 0]
    assert float(narrow) == 4.0
    received, _ = collect(model, batches, lambda m, batch: m(batch).sum(), statistics=BOTH)
    assert torch.equal(received["weight"]["gradient"], torch.full((2, 3), 4 + 300 / 128))
    expected = torch.full((2, 3), (16 + 300 / 128**2) / 301)
    torch.testing.assert_close(received["weight"]["squared_gradient"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_the_norms_of_each_layers_inputs(dtype):
    model, batches = mlp(dtype), mlp_batches(3)
    seen = {"0.weight": [], "2.weight": []}
    for inputs, _ in batches:
        seen["0.weight"].append(inputs.to(dtype).double())
        seen["2.weight"].append(model[1](model[0](inputs.to(dtype))).detach().double())
    received, summary = collect(model, batches, statistics=["activations"])
    for name, tokens in seen.items():
        found = received[name]["activations"]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), torch.cat(tokens).norm(dim=0), rtol=1e-5, atol=0)
    assert summary == {"statistics": ["activations"], "batches": 3}


def test_activations_need_no_labels_and_leave_padding_out(tiny_llama):
    ids = llama_batches(1)[0]["input_ids"]  # [3, 9]
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(3, 4), torch.ones(3, 9)], dim=1).long()
    weights = {"q": tiny_llama.model.layers[0].self_attn.q_proj.weight}  # the first layer: it does not know of positions yet
    plain, hidden = {}, {}
    one = calibrate(tiny_llama, weights, [{"input_ids": ids}], plain.__setitem__, statistics=["activations"])
    batch = {"input_ids": padded, "attention_mask": mask}
    two = calibrate(tiny_llama, weights, [batch], hidden.__setitem__, statistics=["activations"])
    torch.testing.assert_close(plain["q"]["activations"], hidden["q"]["activations"])
    assert one == two == {"statistics": ["activations"], "batches": 1, "examples": 3, "tokens": 27}


@pytest.mark.parametrize(
    ("mask", "statistics"),
    [
        ("snip", ["gradient"]),
        ("fisher", ["squared_gradient"]),
        ("wanda", ["activations"]),
        ("union:of=wanda+fisher+grad", ["activations", "squared_gradient", "gradient"]),
        ("block:by=snip,size=4", ["gradient"]),
    ],
)
def test_attach_selects_by_what_was_calibrated_and_says_so(mask, statistics, tiny_llama):
    tiny_llama.to(torch.bfloat16)
    batches, told = llama_batches(3), []
    options = {"mask": mask, "density": 0.1, "calibration": iter(batches), "progress": lambda *step: told.append(step)}
    with shira.attach(tiny_llama, **options) as tuner:
        adapter = tuner.adapter("x")
    passes = len({name == "activations" for name in statistics})
    assert told == [(done, 3 * passes) for done in range(1, 3 * passes + 1)]
    recorded = adapter.metadata["mask"]
    assert recorded["calibration"] == {"statistics": statistics, "batches": 3, "examples": 9, "tokens": 81}
    found = {}
    weights = {name: tiny_llama.get_parameter(name) for name in adapter.tensors}
    calibrate(tiny_llama, weights, batches, found.__setitem__, statistics=statistics)
    for name, tensor in adapter.tensors.items():
        k = shira.masks.budget(tensor.shape, density=0.1)
        expected = shira.masks.select(mask, name, weights[name], k, **found[name])
        assert torch.equal(tensor.indices.long(), expected)


def passes(model, batches, **options):
    told = []
    shira.attach(model, mask="snip", calibration=batches, progress=lambda *step: told.append(step), **options).detach()
    total = told[-1][1]
    assert told == [(done, total) for done in range(1, total + 1)]
    return total // len(batches)


def test_sums_that_would_take_more_than_training_are_made_in_groups(monkeypatch, tiny_llama):
    """At 1/32 of the entries training takes 16/32 of a byte an entry, and sums 4: an eighth of the weights at a time. It also
    keeps the inputs of all layers, and calibration only those of the layers whose sums it makes, if there are many tokens."""
    assert passes(tiny_llama, llama_batches(2), density=1 / 32) == 1  # less than a MiB
    monkeypatch.setattr(shira.masks.selector, "LEAST_MEMORY", 0)
    few = [{"input_ids": torch.ones(1, 2, dtype=torch.int64), "labels": torch.ones(1, 2, dtype=torch.int64)}] * 2
    assert 8 <= passes(tiny_llama, few, density=1 / 32) <= 14  # of 14 weights of different sizes
    assert 2 <= passes(tiny_llama, llama_batches(2), density=1 / 32) <= 5  # of 27 tokens
    assert passes(tiny_llama, llama_batches(2), density=1 / 4) == 1


def test_checkpointing_leaves_no_inputs_to_count_on(monkeypatch, tiny_llama):
    """Training keeps them no longer, so there is no room for more sums than its own numbers take."""
    monkeypatch.setattr(shira.masks.selector, "LEAST_MEMORY", 0)
    tiny_llama.train()
    for reentrant in (False, True):
        checkpointing_of(tiny_llama)[0]({"use_reentrant": reentrant})
        tiny_llama.enable_input_require_grads()
        assert 8 <= passes(tiny_llama, llama_batches(2), density=1 / 32) <= 14


class Packed(torch.Tensor):
    """A parameter that is made of other tensors, as quantized and sharded ones are."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function is torch.ops.aten.detach.default
        return packed()


def packed():
    return torch.Tensor._make_wrapper_subclass(Packed, (3, 4), dtype=torch.int8)


def test_parameters_without_a_storage_are_no_obstacle(monkeypatch):
    monkeypatch.setattr(shira.masks.selector, "LEAST_MEMORY", 0)
    model = mlp()
    model[0].register_parameter("packed", nn.Parameter(packed(), requires_grad=False))
    assert passes(model, mlp_batches(2), loss_fn=mlp_loss, density=0.01, targets=["0.weight", "2.weight"]) >= 1


def test_nothing_stays_of_the_pass_that_looks_for_inputs():
    nodes, model = [], mlp()

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden):
            nodes.append(weakref.ref(ctx))
            ctx.save_for_backward(hidden)
            return hidden * 1

    gc.disable()  # a cycle would keep the activations of a batch until it runs
    try:
        inputs_kept(
            model, weights_of(model), mlp_batches(1)[0][0], lambda m, batch: m(Watched.apply(m[0](batch)) @ m[0].weight)
        )
        assert nodes[0]() is None
    finally:
        gc.enable()


def test_the_inputs_that_training_keeps_are_counted_once():
    """Two layers with one input; one whose input is kept by the activation as well; one whose weight is no target."""
    model = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in "abcd"})

    def loss_fn(model, batch):
        hidden = torch.relu(model["a"](batch) + model["b"](batch)).tanh()  # tanh keeps its result, which is c's input
        return model["d"](model["c"](hidden)).sum()

    weights = {f"{name}.weight": model[name].weight for name in "abc"}
    kept = inputs_kept(model.requires_grad_(False), weights, torch.ones(5, 8), loss_fn)
    assert kept["a.weight"] == kept["b.weight"] and list(kept["a.weight"].values()) == [5 * 8 * 4]
    assert kept["c.weight"] == {}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [
        (lambda model, batch: mlp_loss(model, batch) * float("nan"), r"batch 1.*finite number, found nan"),
        (lambda model, batch: model(batch[0]), r"one finite number, found a tensor of shape \[7, 5\]"),
        (lambda model, batch: None, r"batch 1 must be one finite number, found None, which is no tensor"),
        (lambda model, batch: mlp_loss(model, batch).item(), r"one finite number, found \d+\.\d+, which is no tensor"),
        (lambda model, batch: model[0](batch[0]).sum(), r"no gradient.*'2.weight'"),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_calibration_that_cannot_work(loss_fn, words, count):
    model = mlp()
    with pytest.raises(MaskError, match=words):
        shira.attach(model, mask="snip", calibration=mlp_batches(count), loss_fn=loss_fn)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_loss_that_has_run_its_own_backward_pass():
    def loss(model, batch):
        loss = mlp_loss(model, batch)
        loss.backward(retain_graph=True)
        return loss

    with pytest.raises(MaskError, match="'2.weight' got two gradients from one batch: .* return the loss alone"):
        shira.attach(mlp(), mask="snip", calibration=mlp_batches(1), loss_fn=loss)


def test_a_batch_of_a_tokenizer_that_made_no_tensors(tiny_llama):
    with pytest.raises(DataError, match="'input_ids' of a batch must be a tensor, found list: .*return_tensors='pt'"):
        shira.attach(tiny_llama, mask="snip", calibration=[{"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]}])


def test_advice_about_cudnn_is_for_gpus_that_use_it():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for on in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(on)
            assert ("enable_cudnn_sdp(False)" in nan_advice(torch.device("cuda"))) == on
            assert nan_advice(torch.device("cpu")) == ""
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_calibration_without_batches_inputs_or_labels(tiny_llama):
    with pytest.raises(MaskError, match="no batch"):
        collect(mlp(), iter([]))
    with pytest.raises(MaskError, match=r"no input.*'2.weight'"):
        collect(mlp(), mlp_batches(1), lambda model, batch: model[0](batch[0]), statistics=["activations"])
    with pytest.raises(DataError, match="must be a mapping"):
        collect(mlp(), [3], None, statistics=["activations"])
    with pytest.raises(DataError, match="'labels'"):
        shira.attach(tiny_llama, mask="snip", calibration=[{"input_ids": torch.ones(1, 4, dtype=torch.int64)}])
    with pytest.raises(MaskError, match="needs activations: pass calibration="):
        shira.attach(tiny_llama, mask="wanda")


PEAK = r"""
import re, sys, torch, shira.masks.selector
from torch import nn
tokens, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
loss_fn = lambda model, batch: model(batch).float().square().mean()

def train(model, batches):
    with shira.attach(model, mask="rand", density=0.1) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-3)
        for batch in batches[:2]:  # the optimizer has its moments from the second step on
            loss_fn(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

def calibrate(model, batches):
    shira.attach(model, mask="snip", density=0.1, calibration=batches, loss_fn=loss_fn).detach()

def make(sides, layers):
    model = nn.Sequential(*(nn.Linear(sides, sides, bias=False) for _ in range(layers))).to(dtype)
    return model, [torch.randn(tokens, sides).to(dtype) for _ in range(3)]

def status(key):
    return int(re.search(key + r":\s+(\d+) kB", open("/proc/self/status").read())[1]) / 1024

def peak(step):
    model, batches = make(1024, 16)
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again from what the process has now
    before = status("VmRSS")
    step(model, batches)
    return status("VmHWM") - before

for step in (train, calibrate):  # what they load when they are first used counts for neither
    step(*make(64, 2))
print(peak(train), peak(calibrate))
shira.masks.selector.TRAINING_BYTES = 2**40
print(peak(calibrate))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure a process's peak memory")
@pytest.mark.slow
@pytest.mark.parametrize("tokens, dtype", [(16, "bfloat16"), (512, "float32"), (1024, "bfloat16")])
def test_calibration_takes_no_more_memory_than_a_training_step(tokens, dtype):
    """In a fresh process: a training step; calibration on three batches as it is; and with all sums held at once, which must
    take more, or this test could not fail. VmHWM and not ru_maxrss: that one starts from the parent's peak."""
    if tokens == 1024 and in_software(torch.bfloat16):
        pytest.skip("takes minutes on a processor without instructions for bfloat16")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # give freed memory back at once
    command = [sys.executable, "-c", PEAK, str(tokens), dtype]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    training, calibrating, at_once = map(float, printed.split())
    print(f"training {training:.0f} MiB, calibrating {calibrating:.0f}, all sums at once {at_once:.0f}")
    assert calibrating <= training < at_once


def test_a_gradient_that_is_nan(tiny_llama):
    """As from attention by cuDNN on some GPUs: the loss is finite. The flag is the user's, so the error on a GPU names it."""
    name = "model.layers.0.self_attn.q_proj.weight"
    weight, before, flag = tiny_llama.get_parameter(name), all_bits(tiny_llama), torch.backends.cuda.cudnn_sdp_enabled()

    def loss_fn(model, batch):
        return model(**batch).loss + (weight.sum() * 0).sqrt()  # adds 0; its gradient is 0 * infinity

    for batches in (1, 2):
        with pytest.raises(MaskError, match=f"'{name}': its gradient is NaN; check the model and the calibration data$"):
            shira.attach(tiny_llama, mask="snip", density=0.1, calibration=llama_batches(batches), loss_fn=loss_fn)
        assert same_bits(all_bits(tiny_llama), before)
    assert torch.backends.cuda.cudnn_sdp_enabled() is flag


def test_dropout_is_the_same_in_every_pass(tiny_llama):
    """In however many groups weights are taken; and torch's random numbers go on as if nothing had been drawn."""
    for layer in tiny_llama.model.layers:
        layer.self_attn.attention_dropout = 0.3
    tiny_llama.train()
    weights = {name: weight for name, weight in tiny_llama.named_parameters() if "proj" in name}
    found, batches = [], llama_batches(2)
    for memory in (2**30, 0):
        torch.manual_seed(5)
        found.append({})
        calibrate(tiny_llama, weights, batches, lambda name, got: found[-1].update({name: got["gradient"]}), memory=memory)
        found[-1]["next"] = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(found[0]["next"], torch.rand(1))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    torch.manual_seed(6)
    calibrate(tiny_llama, weights, batches, lambda name, got: found[1].update({name: got["gradient"]}))
    assert not any(torch.equal(found[0][name], found[1][name]) for name in weights)  # there was dropout


def test_numbers_from_a_seed_leave_other_devices_alone(monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", None)  # it seeds every device there is
    before = torch.random.get_rng_state()
    with seeded(3, [torch.zeros(2)]):
        drawn = torch.rand(4)
    assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(before, torch.random.get_rng_state())


def test_an_accelerator_that_is_not_cuda_is_seeded_and_given_back(monkeypatch):
    calls, real = [], torch.get_device_module
    module = SimpleNamespace(get_rng_state=lambda: "before", manual_seed=calls.append, set_rng_state=calls.append)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module if kind == "mps" else real(kind))
    with pytest.raises(KeyboardInterrupt), seeded(3, [SimpleNamespace(device=torch.device("mps")), torch.zeros(2)]):
        assert calls == [3]
        raise KeyboardInterrupt
    assert calls == [3, "before"]
