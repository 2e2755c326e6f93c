"""An interrupt at any line of a tuner's calls, and another one in what undoes them: the next call finds the exact base."""

import bisect
import functools
import os

import pytest
import torch
from torch import nn

import shira
from conftest import all_bits, bits, same_bits
from interrupting import interrupted, moments
from shira.weights import optimizers


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.two.bias.requires_grad_(False)

    def forward(self, x):
        return self.two(self.norm(self.one(x)).relu())


@functools.cache
def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 4, generator=generator) for _ in range(2)]


def loss_of(model, batch):
    return model(batch).square().mean()


WHAT = ("tensors", "attributes", "hooks", "hooks of weights", "flags", "gradients")


def everything(model):
    """All that a model is, beside its classes."""
    tensors = {**all_bits(model), **{name: bits(buffer) for name, buffer in model.named_buffers()}}
    attributes = {name: sorted(set(vars(module)) - {"training"}) for name, module in model.named_modules()}
    hooks = {
        name: [len(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks")]
        + [sorted(module._non_persistent_buffers_set)]
        for name, module in model.named_modules()
    }
    own = [len(p._post_accumulate_grad_hooks or ()) if p._post_accumulate_grad_hooks else 0 for p in model.parameters()]
    return tensors, attributes, hooks, own, [p.requires_grad for p in model.parameters()], [p.grad for p in model.parameters()]


@functools.cache
def made():
    """A model, and what it is. It is the same one for each run, since each leaves it as it was."""
    torch.manual_seed(0)
    model = Model()
    return model, everything(model)


def attach(model, mask="snip", **options):
    return shira.attach(model, mask=mask, density=0.3, calibration=batches(), loss_fn=loss_of, **options)


def trained(model, steps=2, **options):
    tuner = attach(model, **options)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.1)
    for batch in batches(1)[:steps]:
        loss_of(model, batch).backward()
        optimizer.step()
    return tuner, optimizer


def attaching(model):
    return lambda: attach(model), lambda: None


def detaching(model):
    tuner, _ = trained(model)
    return tuner.detach, tuner.detach


def detaching_the_hook(model):
    tuner, _ = trained(model, method="hook")
    return tuner.detach, tuner.detach


def leaving_a_block(model):
    tuner, _ = trained(model)
    return lambda: tuner.__exit__(None, None, None), tuner.detach


def refreshing(model):
    tuner, optimizer = trained(model)
    return lambda: tuner.refresh(optimizer, calibration=batches(3), cap=1.5), tuner.detach


def switching_off(model):
    tuner, _ = trained(model)

    def off():
        with tuner.reference():
            loss_of(model, batches()[0])

    return off, tuner.detach


def holding(model):
    tuner, _ = trained(model, 1)
    return lambda: tuner.stay_near(batches(5), loss_fn=loss_of), tuner.detach


def loading(model):
    tuner, _ = trained(model)
    state = {name: tensor.clone() for name, tensor in tuner.state_dict().items()}
    return lambda: tuner.load_state_dict(state), tuner.detach


CALLS = [attaching, detaching, detaching_the_hook, leaving_a_block, refreshing, switching_off, holding, loading]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other make each of some thousand runs slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def base_is_back(call, line, event=0):
    """Interrupt a call, take the way back; whether all interrupts struck."""
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    (model, before), held = made(), []
    act, back = call(model)
    with interrupted(line, event) as left:
        held.append(act())
    back()
    for tuner in held:
        if isinstance(tuner, shira.Tuner):
            tuner.detach()
    attach(model, "wm").detach()  # finishes what was left half done
    now = everything(model)
    for what, one, other in zip(WHAT, before, now, strict=True):
        assert same_bits(one, other) if what == "tensors" else one == other, f"line {line}, event {event}: {what} {one} {other}"
    return not left


def lines_of(call, begin, step, second):
    """Interrupt at every step-th line; with `second`, each time also at every so-many-th call or return after it."""
    line = begin
    while base_is_back(call, line):
        event = 1 + line % (second or 1)
        while second and base_is_back(call, line, event):
            event += second
        line += step
    return line


@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_at_any_line(call):
    from torch.optim.optimizer import _global_optimizer_post_hooks

    optimizers.watch()
    hooks = len(_global_optimizer_post_hooks)
    assert lines_of(call, 2, 29, 0) > 20
    assert len(_global_optimizer_post_hooks) == hooks


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # struck where python drops a generator
@pytest.mark.parametrize("call", CALLS)
def test_a_second_interrupt_in_what_undoes_the_first(call):
    assert lines_of(call, 5, 193, 61) > 20


def test_two_interrupts_as_attach_returns():
    """The tuner is attached by then, and nobody has it yet."""
    last = bisect.bisect_left(range(1, 9999), True, key=lambda line: not base_is_back(attaching, line))
    for event in range(1, 9):
        assert base_is_back(attaching, last, event)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # struck where python drops a generator
@pytest.mark.parametrize("call", CALLS)
def test_interrupts_at_every_line(call):
    act, back = call(made()[0])
    with moments() as numbers:
        held = act()
    back()
    if isinstance(held, shira.Tuner):
        held.detach()
    assert len(numbers) > 20 and all(base_is_back(call, number) for number in numbers)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("call", CALLS)
def test_interrupts_at_pairs(call):
    """Every seventh line, with every fifth call or return after it, in `make soak`; here about one in forty of these pairs."""
    assert lines_of(call, 1, *((7, 5) if os.environ.get("SHIRA_LONG") else (67, 23))) > 20
