"""Torch's random numbers: given back as they were, on the CPU and on the devices of some weights."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["same_random_numbers", "seeded"]


def same_random_numbers(weights: Iterable[Tensor]) -> contextlib.AbstractContextManager[None]:
    """A context that restores the state of torch's random numbers at its end, on the CPU and on the GPUs of these weights."""
    gpus = {weight.device.index for weight in weights if weight.device.type == "cuda"}
    fork: contextlib.AbstractContextManager[None] = torch.random.fork_rng(devices=gpus)
    return fork


@contextlib.contextmanager
def seeded(seed: int, weights: Iterable[Tensor]) -> Iterator[None]:
    """The same, with random numbers from a seed inside, on every kind of device. The others keep theirs.

    `torch.manual_seed` would change those of all devices.
    """
    devices = {weight.device for weight in weights}
    gpus = {device.index for device in devices if device.type == "cuda"}
    others = [torch.get_device_module(kind) for kind in {device.type for device in devices} - {"cpu", "cuda", "meta"}]
    states = [module.get_rng_state() for module in others]  # such as torch.mps, which fork_rng cannot fork
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        try:
            for gpu in gpus:
                torch.cuda.default_generators[gpu].manual_seed(seed)
            for module in others:
                module.manual_seed(seed)
            yield
        finally:
            for module, state in zip(others, states, strict=True):
                module.set_rng_state(state)
