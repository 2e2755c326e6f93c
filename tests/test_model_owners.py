"""A model has one owner at a time: copies of it, shared memory, threads, compiled models."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

import shira
from conftest import all_bits, mlp, random_adapter, same_bits
from interrupting import interrupted
from shira import BaseMismatch, ShiraError, SparseTensor, Switcher, SwitchError
from shira.analysis.comparison import deltas
from shira.checkpoints.extraction import extract_to
from shira.switching.ready import InWeights
from shira.weights import owners
from test_model_changes import adapters, switcher_of


def test_a_copy_of_a_model_is_nobodys():
    model = mlp()
    base = all_bits(model)
    switcher = switcher_of(model)
    switcher.use("a")
    twin = copy.deepcopy(model)
    other = Switcher(twin)
    other.add("x", shira.Adapter(adapters(mlp())["plain"].tensors))
    other.use("x")
    other.use(None)
    assert same_bits(all_bits(twin), all_bits(model))
    switcher.use(None)
    assert same_bits(base, all_bits(model))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps, lambda it: torch.save(it, io.BytesIO())])
def test_a_switcher_is_not_copied(copied):
    """Nor is a module that holds one, without giving it up first. What is active stays."""
    model = mlp()
    switcher = switcher_of(model)
    switcher.use("a")
    held = all_bits(model)
    with pytest.raises(SwitchError, match=r"belongs to one model.*make another one for the copy: shira.Switcher\(copy\)"):
        copied(switcher)
    if copied is not copy.copy:  # which copies no attributes
        model.switcher = switcher
        with pytest.raises(SwitchError, match=r"as with `del module.switcher`"):
            copied(model)
        del model.switcher
        copied(model)
    assert same_bits(held, all_bits(model)) and switcher.active == {"a": 1.0}
    switcher.use(None)
    assert same_bits(all_bits(mlp()), all_bits(model))


def test_a_model_has_one_owner_at_a_time():
    model = mlp()
    base = all_bits(model)
    first, second = switcher_of(model), switcher_of(model)
    inner = Switcher(model[0])
    inner.add("x", shira.Adapter({"weight": SparseTensor((11, 13), torch.tensor([4]), torch.ones(1))}))
    first.use("a")
    held = all_bits(model)
    for call in (
        lambda: second.use("b"),
        lambda: second.add("c", random_adapter(mlp(), 4)),
        lambda: second.prefetch("b"),
        lambda: inner.use("x"),
        lambda: shira.attach(model, density=0.1),
    ):
        with pytest.raises(ShiraError, match=r"a Switcher has 'a' active in it; call its use\(None\) first"):
            call()
        assert same_bits(held, all_bits(model))
    second.use(None)  # it has nothing to put back
    first.use(None)
    second.use("b")
    with pytest.raises(SwitchError, match="'b' active"):
        first.use("a")
    second.use(None)
    assert same_bits(base, all_bits(model))
    second.use("a")
    second = None
    gc.collect()
    assert not same_bits(base, all_bits(model))  # a switcher that is gone owns nothing, and what it left stays active
    first.use("plain")
    first.use(None)
    assert same_bits(base, all_bits(model))


def left(model, name="a"):
    """Leave an adapter active whose switcher is gone, as a function does that makes a switcher."""
    base = all_bits(model)
    switcher_of(model).use(name)
    gc.collect()
    assert not same_bits(base, all_bits(model))


def test_a_model_that_somebody_owns_is_taken_for_no_base(tmp_path):
    """Neither as it is, nor compiled, nor as a part of another model. The weights of a tuned model are taken as they are."""
    model, tuned = mlp(), mlp(seed=1)
    base, delta, plain = all_bits(model), random_adapter(model, 3, kind="delta"), random_adapter(model, 5)
    calls = (
        lambda of: shira.fuse({"d": (delta, 1.0)}, base=of),
        lambda of: shira.fuse({"w": (plain, 0.5)}, base=of),
        lambda of: shira.extract(of, tuned, density=0.1),
        lambda of: extract_to(tmp_path / "a.safetensors", of, tuned, density=0.1),
        lambda of: shira.compare(delta, plain, base=of),
        lambda of: next(deltas({"d": delta}, of)),
    )
    switcher = switcher_of(model)
    switcher.use("a")
    held = all_bits(model)
    for call in calls:
        for of in (model, torch.compile(model, backend="eager"), nn.ModuleDict({"inner": model})):
            with pytest.raises(ShiraError, match=r"in use: a Switcher has 'a' active in it; call its use\(None\) first"):
                call(of)
    shira.extract(tuned, model, density=0.1)
    assert same_bits(held, all_bits(model)) and not list(tmp_path.iterdir())
    switcher.use(None)
    with shira.attach(model, density=0.1):
        for call in calls:
            with pytest.raises(ShiraError, match=r"in use: a tuner is attached .*; call its detach\(\) first"):
                call(model)
    assert same_bits(base, all_bits(model))
    for call in calls:
        call(model)


def test_a_base_is_the_one_under_what_a_switcher_has_left_behind():
    model = mlp()
    expected = shira.extract(model, mlp(seed=1), density=0.1)
    switcher_of(model).use("a")  # gone at once, with "a" active
    gc.collect()
    found = shira.extract(model, mlp(seed=1), density=0.1)
    assert found.fingerprints == expected.fingerprints
    assert all(torch.equal(found.tensors[name].values, tensor.values) for name, tensor in expected.tensors.items())


def test_who_comes_after_a_switcher_that_is_gone_gets_the_base():
    model = mlp()
    base = all_bits(model)
    left(model)
    Switcher(model)
    assert same_bits(base, all_bits(model))
    left(model)
    shira.attach(model, density=0.1).detach()
    assert same_bits(base, all_bits(model))
    left(model)
    part = Switcher(model[0])
    part.use(None)
    assert same_bits(base, all_bits(model))
    assert not owners._left


def test_a_function_that_makes_a_switcher_can_be_called_again():
    model = mlp()
    base = all_bits(model)

    def activate():
        switcher = switcher_of(model)
        switcher.use("a")
        return all_bits(model)

    assert same_bits(activate(), activate())
    Switcher(model)
    assert same_bits(base, all_bits(model))


def test_casts_meanwhile_are_followed_and_other_changes_stay():
    model, twin = mlp(), mlp()
    left(model)
    Switcher(model.half())
    assert same_bits(all_bits(twin.half()), all_bits(model))
    model = mlp()
    left(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    theirs = all_bits(model)
    Switcher(model)
    assert same_bits(theirs, all_bits(model)) and not owners._left


def test_a_switcher_that_is_dropped_in_the_middle_of_a_switch_leaves_the_base():
    model = mlp()
    base = all_bits(model)
    switcher = switcher_of(model)
    switcher.use("a")
    active = switcher._state.plans
    switcher.use("b")
    switcher._state = InWeights(None, (*switcher._state.plans, *active))  # as after two interrupts in one call
    switcher = None
    gc.collect()
    assert same_bits(base, all_bits(model)) and not owners._left


def test_what_is_left_does_not_keep_a_model_alive():
    model = mlp()
    left(model)
    gone = [weakref.ref(model), weakref.ref(model[0].weight)]
    assert owners._left
    del model
    gc.collect()
    assert [each() for each in gone] == [None, None] and not owners._left


def test_weights_that_are_one_memory_are_owned_together():
    model = mlp()
    twin = mlp()
    twin[2].weight.data = model[2].weight.data
    first, second = switcher_of(model), switcher_of(twin)
    first.use("a")
    with pytest.raises(SwitchError, match="already in use"):
        second.use("b")
    first.use(None)
    second.use("b")
    second.use(None)


def test_threads_take_turns():
    model = mlp()
    base = all_bits(model)
    switcher = switcher_of(model)
    failed = []

    def work(names):
        try:
            for number in range(150):
                switcher.use(names[number % len(names)])
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [
        threading.Thread(target=work, args=(names,)) for names in (["a", "b"], ["plain", None], [{"a": 0.5, "b": 1.0}, "a"])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed and not any(thread.is_alive() for thread in threads)
    switcher.use(None)
    assert same_bits(base, all_bits(model))


def test_two_switchers_in_two_threads_never_lose_the_base():
    model = mlp()
    base = all_bits(model)
    foreign = []

    def work(switcher):
        for number in range(150):
            try:
                switcher.use(("a", "b", None)[number % 3])
            except SwitchError:
                pass
            except BaseException as error:  # noqa: BLE001
                foreign.append(error)
        switcher.use(None)

    threads = [threading.Thread(target=work, args=(switcher_of(model),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not foreign
    assert same_bits(base, all_bits(model))


def test_views_of_one_memory_are_one_weight_or_refused():
    flat = torch.randn(200)
    model = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in "abcd"})
    model["a"].weight.data, model["b"].weight.data = flat[:64].view(8, 8), flat[:64].view(8, 8)
    model["c"].weight.data, model["d"].weight.data = flat[100:164].view(8, 8), flat[130:194].view(8, 8)
    base = all_bits(model)
    part = SparseTensor((8, 8), torch.tensor([1, 40]), torch.tensor([5.0, 6.0]))
    switcher = Switcher(model)
    switcher.add("both", shira.Adapter({"a.weight": part, "b.weight": part}))
    switcher.add("second", shira.Adapter({"b.weight": part}))
    for name in ("both", "second"):
        switcher.use({name: 2.0})
        assert torch.equal(model["a"].weight, model["b"].weight) and not same_bits(base, all_bits(model))
        switcher.use(None)
        assert same_bits(base, all_bits(model))
    with pytest.raises(BaseMismatch, match="'c.weight' shares a part of its memory with 'd.weight'"):
        switcher.add("torn", shira.Adapter({"c.weight": part}))


def test_a_cast_model_lays_no_claim_on_the_memory_that_it_gave_back():
    held = []
    for seed in range(20):
        model = mlp(seed=seed)
        switcher = Switcher(model)
        switcher.add("a", shira.Adapter(random_adapter(model, 1).tensors))
        switcher.use("a")
        model.half()
        held.append((model, switcher))
        for other in [mlp(seed=number) for number in range(3)]:
            shira.attach(other, density=0.1).detach()


def test_an_interrupt_leaves_no_other_model_waiting():
    """Whatever line it strikes at: another thread's switcher, over another model, goes on."""
    others = mlp()
    elsewhere, struck = switcher_of(others), 0
    for line in range(1, 400):
        switcher = switcher_of(mlp())
        with interrupted(line) as left:
            switcher.use("a")
        struck += not left
        thread = threading.Thread(target=lambda: (elsewhere.use("b"), elsewhere.use(None)))
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), f"line {line}"
    assert struck > 20
