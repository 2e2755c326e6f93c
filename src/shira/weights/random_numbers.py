"""Torch's random numbers: given back as they were, on the CPU and on the GPUs of some weights."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["same_random_numbers", "seeded"]


def same_random_numbers(weights: Iterable[Tensor]) -> contextlib.AbstractContextManager[None]:
    """A context that restores the state of torch's random numbers at its end, on the CPU and on the GPUs of these weights."""
    fork: contextlib.AbstractContextManager[None] = torch.random.fork_rng(devices=_gpus(weights))
    return fork


@contextlib.contextmanager
def seeded(seed: int, weights: Iterable[Tensor]) -> Iterator[None]:
    """The same, with random numbers from a seed inside. Other devices keep theirs, unlike with `torch.manual_seed`."""
    gpus = _gpus(weights)
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        yield


def _gpus(weights: Iterable[Tensor]) -> set[int]:
    return {weight.device.index for weight in weights if weight.device.type == "cuda"}
