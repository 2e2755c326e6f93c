"""What users do to a model between two calls of its switcher: it works, or it is one clear error while nothing is written."""

import copy
import gc
import threading

import pytest
import torch
from torch import nn

import shira
from conftest import all_bits, bits, mlp, random_adapter, same_bits
from interrupting import interrupted
from shira import BaseMismatch, ShiraError, SparseTensor, Switcher, SwitchError

CASTS = {
    "bfloat16": lambda model: model.bfloat16(),
    "float16": lambda model: model.half(),
    "float64": lambda model: model.double(),
    "to": lambda model: model.to(torch.bfloat16),
    "half, then bfloat16": lambda model: model.half().bfloat16(),
    "bfloat16, then half": lambda model: model.bfloat16().half(),
    "half and back": lambda model: model.half().float(),
    "bfloat16 and back": lambda model: model.bfloat16().float(),
    "one layer": lambda model: model[2].half(),
    "data": lambda model: _set_data(model, lambda weight: weight.bfloat16()),
    "a copy": lambda model: _set_data(model, torch.clone),
    "assign": lambda model: model.load_state_dict(model.state_dict(), assign=True),
    "new parameters": lambda model: [_replace(layer) for layer in (model[0], model[2])],
    "swapped tensors": lambda model: torch.utils.swap_tensors(model[0].weight, nn.Parameter(model[0].weight.detach().clone())),
    "deep copies of layers": lambda model: [model.__setitem__(at, copy.deepcopy(model[at])) for at in (0, 2)],
}


def _set_data(model, cast):
    for parameter in model.parameters():
        parameter.data = cast(parameter.data)


def _replace(layer):
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def adapters(model):
    """One without fingerprints, which fits the model in any dtype, and two with."""
    plain = random_adapter(model, 1)
    return {"plain": shira.Adapter(plain.tensors), "a": random_adapter(model, 2), "b": random_adapter(model, 3)}


def switcher_of(model):
    switcher = Switcher(model)
    for name, adapter in adapters(model).items():
        switcher.add(name, adapter)
    return switcher


@pytest.mark.parametrize("act", CASTS)
def test_another_sum_after_a_change_starts_from_the_changed_base(act):
    """The sum is new, so it is computed from the base under what is active: from the values that are in the stash."""
    model, other = mlp(), mlp()
    CASTS[act](other)
    for each in (model, other):
        switcher = Switcher(each)
        for name in ("a", "b"):
            switcher.add(name, shira.Adapter(adapters(mlp())[name].tensors))  # without fingerprints it fits in any dtype
        if each is model:
            switcher.use({"a": 0.5, "b": 2.0})
            CASTS[act](model)
        switcher.use({"a": 1.0, "b": 0.5})
    assert same_bits(all_bits(model), all_bits(other))


@pytest.mark.parametrize("act", CASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("active", ["plain", {"a": 0.5, "b": 2.0}])
def test_what_is_done_to_a_model_is_done_to_its_base(act, dtype, active):
    model, other = mlp(dtype), mlp(dtype)
    CASTS[act](other)
    base = all_bits(other)
    switcher = switcher_of(model)
    switcher.use(active)
    CASTS[act](model)
    assert switcher.active  # as long as it is in the weights
    switcher.use(None)
    assert switcher.active == {}
    assert same_bits(base, all_bits(model))
    switcher.use("plain")
    assert not same_bits(base, all_bits(model))
    switcher.use(None)
    assert same_bits(base, all_bits(model))


@pytest.mark.parametrize("act", CASTS)
def test_what_was_made_ready_is_not_written_into_another_model(act):
    model = mlp()
    switcher = switcher_of(model)
    for name in ("plain", "a", "plain", None):
        switcher.use(name)
    CASTS[act](model)
    base = all_bits(model)
    for selection in ("plain", "a", {"a": 0.5, "plain": 1.0}):
        try:
            switcher.use(selection)
        except BaseMismatch:  # the fingerprint is of the values before a cast that changed them
            assert act not in ("float64", "a copy", "assign", "new parameters") and selection != "plain"
        switcher.use(None)
        assert same_bits(base, all_bits(model))


def test_a_cast_is_followed_whatever_is_called_first():
    for call in (lambda s: s.add("c", random_adapter(mlp(), 4)), lambda s: s.prefetch("plain")):
        model, base = mlp(), mlp().double()
        switcher = switcher_of(model)
        switcher.use("plain")
        model.double()
        call(switcher)
        assert switcher.active == {"plain": 1.0}
        assert not same_bits(all_bits(base), all_bits(model))
        switcher.use(None)
        assert same_bits(all_bits(base), all_bits(model))


@pytest.mark.parametrize("assign", [False, True])
def test_a_base_that_is_loaded_over_an_adapter_is_found(assign):
    """The same base again: nothing is left of the adapter, and that is seen."""
    model = mlp()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = all_bits(model)
    switcher = switcher_of(model)
    switcher.use("a")
    model.load_state_dict(state, assign=assign, strict=False)
    switcher.use("b")
    assert switcher.active == {"b": 1.0}
    switcher.use(None)
    assert same_bits(base, all_bits(model))


OTHERS = {
    "load_state_dict": lambda model: model.load_state_dict(mlp(seed=9).state_dict()),
    "assign": lambda model: model.load_state_dict(mlp(seed=9).state_dict(), assign=True),
    "in place": lambda model: [parameter.detach().mul_(1.5) for parameter in model.parameters()],
    "in place, through data": lambda model: [parameter.data.mul_(1.5) for parameter in model.parameters()],
    "in place, under no_grad": lambda model: nn.init.normal_(model[2].weight),
    "data": lambda model: _set_data(model, lambda weight: weight * 1.5),
    "meta": lambda model: model.to("meta"),
    "smaller": lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(11, 7))),
    "cast thrice": lambda model: model.half().bfloat16().half().float(),
}


@pytest.mark.parametrize("act", OTHERS)
def test_a_base_that_is_not_known_any_more_is_an_error_each_time(act):
    model = mlp()
    switcher = switcher_of(model)
    switcher.use("a")
    OTHERS[act](model)
    now = None if act == "meta" else all_bits(model)
    for selection in (None, "b", "a" if act == "meta" else "plain", None):
        with pytest.raises(SwitchError, match=r"^'[02].weight' was .* while 'a' was active in it: found .*release\(\)"):
            switcher.use(selection)
        assert switcher.active == {"a": 1.0}
        assert now is None or same_bits(now, all_bits(model))
    switcher.release()
    assert switcher.active == {}
    if act not in ("meta", "smaller"):
        switcher.use("plain")
        switcher.use(None)
        assert same_bits(now, all_bits(model))


def test_another_base_under_what_is_ready_is_noticed():
    model = mlp()
    switcher = switcher_of(model)
    switcher.use("a")
    switcher.use(None)
    model.load_state_dict(mlp(seed=9).state_dict())
    base = all_bits(model)
    with pytest.raises(BaseMismatch, match="fingerprint"):
        switcher.use("a")
    assert same_bits(base, all_bits(model))
    switcher.use("plain")
    switcher.use(None)
    assert same_bits(base, all_bits(model))


def test_what_is_active_stays_so_if_the_next_does_not_fit_the_changed_model():
    model = mlp()
    switcher = switcher_of(model)
    switcher.add("entry", shira.Adapter({"0.weight": SparseTensor((11, 13), torch.tensor([5]), torch.ones(1))}))
    switcher.use("entry")
    with torch.no_grad():
        model[2].weight.copy_(mlp(seed=9)[2].weight)  # another base under "a"
    active = all_bits(model)
    with pytest.raises(BaseMismatch, match="fingerprint"):
        switcher.use("a")
    assert switcher.active == {"entry": 1.0} and same_bits(active, all_bits(model))
    switcher.use(None)
    assert not same_bits(active, all_bits(model)) and torch.equal(model[0].weight, mlp()[0].weight)


def test_what_others_write_beside_the_adapter_stays():
    model = mlp()
    switcher = Switcher(model)
    switcher.add("x", shira.Adapter({"0.weight": SparseTensor((11, 13), torch.tensor([4, 9]), torch.ones(2))}))
    switcher.use("x")
    with torch.no_grad():
        model[0].weight[0, 0] = 5.0
        model[2].weight.zero_()
    model[0].bias.data.fill_(3.0)
    switcher.use(None)
    expected = mlp()
    with torch.no_grad():
        expected[0].weight[0, 0] = 5.0
        expected[2].weight.zero_()
        expected[0].bias.fill_(3.0)
    assert same_bits(all_bits(expected), all_bits(model))


def test_channels_last_and_a_larger_embedding_give_the_base_back():
    torch.manual_seed(0)
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3), "table": nn.Embedding(10, 8)})
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    switcher = Switcher(model)
    positions = torch.arange(0, 80, 3)
    tensors = {
        name: SparseTensor(tuple(base[name].shape), positions, torch.randn(27)) for name in ("conv.weight", "table.weight")
    }
    switcher.add("x", shira.Adapter(tensors))
    switcher.use("x")
    model.to(memory_format=torch.channels_last)
    larger = nn.Embedding(14, 8)
    larger.weight.data[:10] = model["table"].weight.data
    model["table"] = larger
    switcher.use(None)
    assert torch.equal(model["conv"].weight, base["conv.weight"]) and torch.equal(larger.weight[:10], base["table.weight"])
    with pytest.raises(BaseMismatch, match="'conv.weight' must be a contiguous|'table.weight' has shape"):
        switcher.use("x")


def test_a_replaced_weight_that_comes_back_is_the_base():
    model = mlp()
    base = all_bits(model)
    switcher = switcher_of(model)
    switcher.use("a")
    old = model[0].weight
    model[0].weight = nn.Parameter(old.detach().clone())
    switcher.use(None)
    assert same_bits(base, all_bits(model))
    model[0].weight = old
    assert same_bits(base, all_bits(model))


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
    first.use("plain")  # a switcher that is gone owns nothing: what it left is the base
    first.use(None)


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


@torch.no_grad()
@pytest.mark.parametrize("kind", ["compiled", "compiled inside"])
def test_a_compiled_model_is_switched_under_its_own_names(kind):
    model = mlp()
    base = all_bits(model)
    adapter = random_adapter(model, 1)
    if kind == "compiled":
        outer = torch.compile(model, backend="eager")
    else:
        outer = nn.Sequential(*model)
        outer[2] = torch.compile(model[2], backend="eager")
    inputs = torch.randn(3, 13)
    plain = outer(inputs)
    switcher = Switcher(outer)
    switcher.add("a", adapter)
    switcher.use("a")
    assert not torch.equal(outer(inputs), plain)
    switcher.use(None)
    assert torch.equal(outer(inputs), plain)
    assert same_bits(base, all_bits(model))


def test_inference_mode_leaves_nothing_that_cannot_be_written():
    model = mlp()
    base = all_bits(model)
    switcher = switcher_of(model)
    with torch.inference_mode():
        switcher.use({"a": 0.5, "b": 1.0})
        other = mlp()
        inner = switcher_of(other)
        inner.use("a")
    switcher.use("plain")
    switcher.use(None)
    inner.use("b")
    inner.use(None)
    assert same_bits(base, all_bits(model)) and same_bits(base, all_bits(other))
    model(torch.randn(2, 13)).sum().backward()


def test_buffers_that_a_checkpoint_holds_are_switched_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    base = all_bits(model)
    mean = SparseTensor((4,), torch.arange(4), torch.full((4,), 7.0))
    switcher = Switcher(model)
    switcher.add("x", shira.Adapter({"1.running_mean": mean}))
    switcher.use("x")
    assert torch.equal(model[1].running_mean, mean.values)
    model(torch.randn(8, 4))  # in training, which moves it
    switcher.use(None)
    assert torch.equal(model[1].running_mean, torch.zeros(4))
    model[1].num_batches_tracked.zero_()
    model[1].running_var.fill_(1)
    assert same_bits(base, {name: bits(tensor) for name, tensor in model.named_parameters()})


def test_an_adapter_that_is_changed_after_it_was_added():
    model = mlp()
    base = all_bits(model)
    adapter = shira.Adapter(random_adapter(model, 1).tensors)
    switcher = Switcher(model)
    switcher.add("x", adapter)
    switcher.use("x")
    for tensor in adapter.tensors.values():
        tensor.values.mul_(2)
        tensor.indices.zero_()
    switcher.use(None)
    assert same_bits(base, all_bits(model))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: s.use("a", 0.5), r"use\(\{'a': 0.5\}\)"),
        (lambda s: s.use(["a"]), r'use\("poet"\)'),
        (lambda s: s.use(5), r"use\(None\)"),
        (lambda s: s.use({("a",): 1.0}), "no adapter"),
        (lambda s: s.use({"a": 1.0}, method=None), "method"),
        (lambda s: s.use("a", method="sum", strength=2), "strength"),
        (lambda s: s.prefetch(["a"]), r'use\("poet"\)'),
        (lambda s: s.add("x", 5), r"switcher.add\('poet', 'poet.safetensors'\)"),
        (lambda s: s.add(["x"], random_adapter(mlp(), 1)), 'add\\("poet", adapter\\)'),
        (lambda s: s.remove(["a"]), "no adapter"),
        (lambda s: s.using(["a"]).__enter__(), r'use\("poet"\)'),
        (lambda s: Switcher("org/model"), r"shira.Switcher\(model\)"),
        (lambda s: Switcher(mlp(), ready="8"), "ready must be a whole number"),
        (lambda s: Switcher(mlp(), ready=True), "ready must be a whole number"),
    ],
)
def test_a_wrong_call_shows_the_one_that_was_meant(call, words):
    model = mlp()
    base = all_bits(model)
    switcher = switcher_of(model)
    with pytest.raises(ShiraError, match=words):
        call(switcher)
    assert switcher.active == {} and same_bits(base, all_bits(model))


def test_a_switch_inside_autocast_is_seen():
    model = mlp()
    inputs = torch.randn(3, 13)
    switcher = switcher_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(inputs)
        switcher.use("a")
        adapted = model(inputs)
        switcher.use(None)
        assert torch.equal(model(inputs), plain) and not torch.equal(adapted, plain)
    switcher.use("a")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(inputs), adapted)


@pytest.mark.parametrize("act", ["weight_norm", "parametrized", "removed"])
def test_a_weight_that_is_taken_away_is_an_error_each_time(act):
    model = mlp()
    if act == "removed":
        nn.utils.parametrizations.weight_norm(model[0])
    switcher = Switcher(model)
    switcher.add("a", shira.Adapter(random_adapter(model, 1).tensors))
    switcher.use("a")
    match act:
        case "weight_norm":
            nn.utils.parametrizations.weight_norm(model[0])
        case "parametrized":  # the very same Parameter, under another name
            nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
            switcher.use(None)
            assert torch.equal(model[0].weight, mlp()[0].weight)
            return
        case "removed":
            nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    for _ in range(2):
        with pytest.raises(SwitchError, match=r"while 'a' was active in it: found nothing of that name.*release\(\)"):
            switcher.use(None)
        assert switcher.active == {"a": 1.0}
    switcher.release()


def test_scalars_are_followed():
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(2.3))
    switcher = Switcher(model)
    switcher.add("x", shira.Adapter({"scale": SparseTensor((), torch.tensor([0]), torch.tensor([7.7]))}))
    switcher.use("x")
    model.half()
    switcher.use(None)
    assert torch.equal(model.scale, torch.tensor(2.3).half())


def test_a_module_that_is_put_on_later_is_found():
    model = mlp()
    switcher = switcher_of(model)
    switcher.use("a")
    held = all_bits(model)
    model.add_module("score", nn.Linear(7, 2))
    switcher.add("head", shira.Adapter({"score.weight": SparseTensor((2, 7), torch.tensor([3]), torch.ones(1))}))
    assert switcher.active == {"a": 1.0} and same_bits(held, {name: bits(model.get_parameter(name)) for name in held})
    switcher.use("head")
    assert model.score.weight.view(-1)[3] == 1
    switcher.use(None)


def test_sums_over_a_buffer_are_of_what_it_is_now():
    model = nn.Sequential(nn.BatchNorm1d(4))
    switcher = Switcher(model)
    switcher.add("x", shira.Adapter({"0.running_mean": SparseTensor((4,), torch.arange(4), torch.ones(4))}))
    for before in (0.0, 10.0):
        model[0].running_mean.fill_(before)
        switcher.use({"x": 0.5})
        assert torch.equal(model[0].running_mean, torch.full((4,), (before + 1) / 2))
        switcher.use(None)
        assert torch.equal(model[0].running_mean, torch.full((4,), before))


def test_blocks_that_overlap_end_on_what_was_before_the_first():
    model = mlp()
    base = all_bits(model)
    switcher = switcher_of(model)
    for order in ((0, 1), (1, 0)):
        blocks = [switcher.using("a"), switcher.using("b")]
        for block in blocks:
            block.__enter__()
        for number in order:
            blocks[number].__exit__(None, None, None)
        assert switcher.active == {} and same_bits(base, all_bits(model))
    with switcher.using("a"), switcher.using("b"):
        assert switcher.active == {"b": 1.0}
    assert same_bits(base, all_bits(model))


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
    elsewhere = switcher_of(others)
    for line in range(1, 400):
        switcher = switcher_of(mlp())
        with interrupted(line):
            switcher.use("a")
        thread = threading.Thread(target=lambda: (elsewhere.use("b"), elsewhere.use(None)))
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), f"line {line}"
