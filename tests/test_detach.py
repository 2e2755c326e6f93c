"""The end of training: detach gives everything back, and dropped models are freed."""

import copy
import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import shira
from conftest import all_bits, bits, mlp, mlp_batches, mlp_loss, same_bits
from shira.weights import optimizers
from test_tuning import attach, train, values


def test_a_copy_of_a_model_in_training_works_by_itself():
    model = mlp()
    batch = mlp_batches(1)[0]
    with attach(model) as tuner:
        twin = copy.deepcopy(model)
        train(model, tuner)
        with torch.no_grad():
            assert not torch.equal(model(batch[0]), twin(batch[0]))
        mlp_loss(twin, batch).backward()
        assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)


def test_detach_gives_everything_back():
    model = mlp()
    model[0].bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    names = set(model.state_dict())
    before = all_bits(model)
    tuner = attach(model)
    during = train(model, tuner)
    tuner.detach()
    tuner.detach()
    assert same_bits(before, all_bits(model))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert set(model.state_dict()) == names
    assert all("forward" not in module.__dict__ for module in model)
    after = tuner.adapter("x")
    assert torch.equal(bits(values(during)), bits(values(after)))


def test_detach_after_an_error_inside_the_loop():
    model = mlp()
    before = all_bits(model)
    with pytest.raises(RuntimeError, match="stop"), attach(model) as tuner:
        train(model, tuner)
        raise RuntimeError("stop")
    assert same_bits(before, all_bits(model))


def test_a_model_that_is_dropped_without_detach_is_freed():
    """Torch keeps one pair of hooks for the whole process: it is never taken off, and holds no model."""
    from torch.optim.optimizer import _global_optimizer_post_hooks

    def told():
        return sum(known() is not None for known in optimizers._listeners)

    optimizers.watch()
    hooks, before = len(_global_optimizer_post_hooks), told()
    model = mlp()
    tuner = shira.attach(model, density=0.3)
    assert told() == before + 1
    gone = weakref.ref(model)
    del model, tuner
    gc.collect()
    assert gone() is None and told() == before and len(_global_optimizer_post_hooks) == hooks


def test_threads_that_attach_at_the_same_time_are_all_told_of_steps():
    class Deaf:
        def before(self, optimizer): ...

        def after(self, optimizer): ...

    def come_and_go(kept):
        together.wait()
        for _ in range(5000):
            optimizers.subscribe(kept)
            assert [known() for known in list(optimizers._listeners)].count(kept) == 1
            optimizers.unsubscribe(kept)

    objects, interval = [Deaf() for _ in range(8)], sys.getswitchinterval()
    together = threading.Barrier(len(objects))
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(objects)) as threads:
            list(threads.map(come_and_go, objects))
    finally:
        sys.setswitchinterval(interval)


def test_models_that_are_collected_while_a_step_is_taken():
    """To take a hook off while torch runs its hooks would be an error of the step."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    model = mlp()
    handle = register_optimizer_step_post_hook(lambda *_: gc.collect())
    try:
        with shira.attach(model, density=0.3) as tuner:
            optimizer = torch.optim.AdamW(tuner.parameters())
            for seed in range(3):
                dropped = mlp(seed=seed)
                shira.attach(dropped, density=0.1)
                del dropped
                model(torch.randn(5, 13)).sum().backward()
                optimizer.step()
    finally:
        handle.remove()
