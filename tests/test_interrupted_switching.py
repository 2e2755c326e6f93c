"""Interrupted at any line, and once more while that is dealt with: the next call finds the exact base."""

import copy

import pytest
import torch
from torch import nn

import shira
from conftest import all_bits, same_bits
from interrupting import every_moment, interrupted
from shira import SparseTensor, Switcher, kernels
from shira.weights import owners

POSITIONS = torch.randperm(64, generator=torch.Generator().manual_seed(0))


def adapter(part, value):
    return shira.Adapter({"weight": SparseTensor((8, 8), POSITIONS[part].sort().values, torch.full((12,), float(value)))})


ADAPTERS = {"a": adapter(slice(12), 1), "b": adapter(slice(6, 18), 2), "twin": adapter(slice(12), 3)}

CALLS = {
    "another": lambda s: s.use("b"),
    "the same positions": lambda s: s.use("twin"),
    "a sum": lambda s: s.use({"a": 0.5, "b": 2.0}),
    "off": lambda s: s.use(None),
    "add": lambda s: s.add("more", adapter(slice(20, 32), 4)),
    "remove": lambda s: s.remove("b"),
    "prefetch": lambda s: s.prefetch("b"),
    "changes": lambda s: s.changes({"a": 0.5, "b": 2.0}),
    "release": lambda s: s.release(),
}


def using(switcher):
    with switcher.using("b"):
        pass


def cast(switcher):
    switcher._model.double()
    switcher.use("b")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # python swallows what strikes in a destructor
@pytest.mark.parametrize("backend", ["native", pytest.param("torch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("call", [*CALLS, "using", "after a cast"])
def test_a_switcher_that_is_interrupted(call, backend):
    act = CALLS.get(call) or {"using": using, "after a cast": cast}[call]
    torch.manual_seed(0)
    first = nn.Linear(8, 8, bias=False)
    whole = all_bits(copy.deepcopy(first).double() if call == "after a cast" else first)

    def attempt(line, later):
        owners._claims.clear()  # python leaks the frames of some exceptions that a trace function raises, and claims with them
        model, base = copy.deepcopy(first), whole
        with kernels.backend(backend):
            switcher = Switcher(model)
            for name, each in ADAPTERS.items():
                switcher.add(name, each)
            switcher.use("a")
            held = all_bits(model)
            with interrupted(line, later) as left:
                act(switcher)
            if call == "release" and switcher.active == {}:
                base = base if same_bits(base, all_bits(model)) else held
            switcher.use(("twin", "a", None)[line % 3])
            if call == "remove" and "b" not in switcher.names:
                switcher.add("b", ADAPTERS["a"])
                switcher.use("b")
                assert model.weight.view(-1)[POSITIONS[0]] == 1  # nothing of the other b is left
            switcher.use(None)
            assert same_bits(base, all_bits(model)), f"line {line}, then {later}"
            other = Switcher(model)  # nobody owns the model
            other.add("x", ADAPTERS["b"])
            other.use("x")
            other.use(None)
        return not left

    assert every_moment(attempt) > 15
