import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import shira
from conftest import all_bits, bits, llama_batches, mlp, mlp_batches, mlp_loss, same_bits
from shira import MaskError, TuningError
from shira.sparse.tensor import fingerprint

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, amsgrad=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
}


class Wandering:
    """A mask that chooses what it is told to."""

    def __init__(self):
        self.chosen = {}  # shape -> positions

    def __call__(self, weight, k):
        return self.chosen.get(tuple(weight.shape), torch.arange(k))


def attach(model, mask="wm", **options):
    return shira.attach(model, mask=mask, density=0.2, calibration=mlp_batches(), loss_fn=mlp_loss, **options)


def train(model, optimizer, steps, loss=mlp_loss, batches=None):
    losses = []
    for batch in itertools.islice(itertools.cycle(batches or mlp_batches(4, seed=9)), steps):
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return torch.stack(losses)


def changed(model, base):
    """(tensor, position) of each entry whose bits differ from the base's."""
    found = set()
    for name, parameter in model.named_parameters():
        if name in base:
            width = parameter.element_size()
            differs = (bits(parameter).view(-1, width) != base[name].view(-1, width)).any(1)
            found |= {(name, position) for position in differs.nonzero().view(-1).tolist()}
    return found


def entries(adapter):
    return {(name, i) for name, tensor in adapter.tensors.items() for i in tensor.indices.tolist()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_refresh_that_moves_nothing_changes_nothing(name):
    """Bit for bit: losses, weights and optimizer state of a run with it and without."""
    runs = []
    for refreshes in (False, True):
        model = mlp()
        with attach(model, "rand") as tuner:
            optimizer = OPTIMIZERS[name](tuner.parameters())
            losses = []
            for _ in range(4):
                losses.append(train(model, optimizer, 2))
                if refreshes:
                    assert tuner.refresh(optimizer) == 0
            state = [
                value for p in tuner.parameters() for value in optimizer.state[p].values() if isinstance(value, torch.Tensor)
            ]
            runs.append([bits(t) for t in (*losses, *state, *(t.values for t in tuner.adapter().tensors.values()))])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_calibrating_in_between_leaves_random_numbers_and_gradients_alone(tiny_llama):
    """With dropout, a mask that does not move, and gradients that add up over a refresh."""
    tiny_llama.model.layers[0].self_attn.attention_dropout = 0.5
    tiny_llama.train()
    seen = []

    def first(weight, gradient, k):
        seen.append(gradient)
        return torch.arange(k)

    def loss_fn(model, batch):
        return model(**batch).loss

    results = []
    for refreshes in (False, True):
        torch.manual_seed(1)
        options = {"calibration": llama_batches(1), "loss_fn": loss_fn, "density": 0.1}
        with shira.attach(tiny_llama, mask=first, **options) as tuner:
            optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
            for batch in llama_batches(4, seed=5):
                loss_fn(tiny_llama, batch).backward()
                if refreshes:
                    count = len(seen)
                    assert tuner.refresh(optimizer, calibration=llama_batches(1, seed=2)) == 0
                    assert len(seen) == count + 14
                loss_fn(tiny_llama, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            results.append(torch.cat([bits(t.values) for t in tuner.adapter().tensors.values()]))
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_belongs_to_an_entry_moves_with_it(name, dtype):
    """Masters, moments and gradients: carried on the overlap bit for bit; new entries start at the base and at zero."""
    model, mask = mlp(dtype), Wandering()
    base = {name: p.detach().float().view(-1) for name, p in model.named_parameters()}
    with attach(model, mask) as tuner:
        optimizer = OPTIMIZERS[name](tuner.parameters())
        train(model, optimizer, 3)
        mlp_loss(model, mlp_batches(1)[0]).backward()
        parameters = tuner.parameters()

        def everything(parameter):
            """Each thing that is one number an entry, as it is now."""
            state = {k: v for k, v in optimizer.state[parameter].items() if isinstance(v, torch.Tensor) and v.ndim}
            return {k: v.detach().clone() for k, v in {"": parameter, "grad": parameter.grad, **state}.items()}

        before = [everything(parameter) for parameter in parameters]
        steps = [optimizer.state[parameter].get("step") for parameter in parameters]
        mask.chosen = {(11, 13): torch.arange(10, 39), (5, 11): torch.arange(5, 16)}
        assert tuner.refresh(optimizer, cap=2.0) == 10 + 5
        assert all(new is old for new, old in zip(tuner.parameters(), parameters, strict=True))
        for parameter, old, shift, tensor in zip(parameters, before, (10, 5), ("0.weight", "2.weight"), strict=True):
            now, stay = everything(parameter), parameter.numel() - shift
            assert now.keys() == old.keys() and len(now) >= 3
            for key, value in now.items():
                assert torch.equal(bits(value[:stay]), bits(old[key][shift:])), key
                started = base[tensor][shift + stay : 2 * shift + stay] if key == "" else torch.zeros(shift)
                assert torch.equal(bits(value[stay:]), bits(started)), key
        assert [optimizer.state[parameter].get("step") for parameter in parameters] == steps
        losses = train(model, optimizer, 20)
        assert losses[-4:].mean() < losses[:4].mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    name=st.sampled_from(["adamw", "fused", "momentum"]),
    seed=st.integers(0, 999),
    cap=st.sampled_from([1, 1.3, 2.0, 9.0]),
    steps=st.lists(st.integers(0, 2), min_size=1, max_size=4),
)
@settings(max_examples=40)
def test_random_moves_keep_the_cap_and_give_the_base_back(dtype, name, seed, cap, steps):
    """Whatever differs from the base is in the adapter, that never holds more than the cap, and nothing is lost."""
    generator = torch.Generator().manual_seed(seed)
    model, mask = mlp(dtype), Wandering()
    base = all_bits(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with attach(model, mask) as tuner:
        optimizer = OPTIMIZERS[name](tuner.parameters())
        counts = {name: p.numel() for name, p in zip(("0.weight", "2.weight"), tuner.parameters(), strict=True)}
        for count in steps:
            if count:
                train(model, optimizer, count)
            for tensor, k in counts.items():
                mask.chosen[tuple(before[tensor].shape)] = torch.randperm(before[tensor].numel(), generator=generator)[:k]
            values = tuner.adapter().tensors
            tuner.refresh(optimizer, cap=cap)
            adapter = tuner.adapter()
            for tensor, k in counts.items():
                now, left, below = adapter.tensors[tensor], values[tensor], before[tensor].view(-1)
                holds, held_before, wanted = (
                    set(indices.tolist()) for indices in (now.indices, left.indices, mask.chosen[tuple(before[tensor].shape)])
                )
                assert wanted <= holds <= wanted | held_before
                assert len(holds) <= math.floor(cap * k)
                assert holds == wanted | held_before or cap < 9
                live = model.get_parameter(tensor).detach().view(-1)[now.indices.long()]
                assert torch.equal(bits(live), bits(now.values))
                old = dict(zip(left.indices.tolist(), left.values.tolist(), strict=True))
                assert live.tolist() == [old.get(i, below[i].item()) for i in now.indices.tolist()]
                assert adapter.fingerprints[tensor] == fingerprint(below[now.indices.long()])
            assert changed(model, base) <= entries(adapter)
        adapter = tuner.adapter()
    assert same_bits(base, all_bits(model))
    assert entries(tuner.adapter()) == entries(adapter)
    switcher = shira.Switcher(model)
    switcher.add("x", adapter)  # its fingerprints are the base's
    switcher.use("x")
    assert changed(model, base) <= entries(adapter)


def test_of_those_that_leave_the_most_changed_stay():
    model = nn.Sequential(nn.Linear(5, 2, bias=False))
    mask = Wandering()
    base = model[0].weight.detach().clone().view(-1)
    with shira.attach(model, mask=mask, density=0.4) as tuner:
        (masters,) = tuner.parameters()
        optimizer = torch.optim.SGD([masters], lr=1.0)
        with torch.no_grad():
            masters += torch.tensor([0.1, -3.0, 0.2, 0.3])
        mask.chosen = {(2, 5): torch.tensor([9, 3, 8, 7])}
        assert tuner.refresh(optimizer, cap=1.5) == 3
        tensor = tuner.adapter().tensors["0.weight"]
        assert tensor.indices.tolist() == [1, 2, 3, 7, 8, 9]  # position 0 is the base's again
        assert torch.equal(model[0].weight.view(-1)[0], base[0])
        assert tuner.nnz == 4
        mask.chosen = {(2, 5): torch.tensor([0, 1, 8, 9])}  # 1 comes back as it left
        assert tuner.refresh(optimizer, cap=1.5) == 2
        torch.testing.assert_close(masters.detach() - base[[0, 1, 8, 9]], torch.tensor([0.0, -3.0, 0.0, 0.0]))
        assert tuner.adapter().tensors["0.weight"].indices.tolist() == [0, 1, 2, 3, 8, 9]
        assert tuner.refresh(optimizer, cap=1) == 0  # a mask that stays moves nothing out, either
        mask.chosen = {(2, 5): torch.tensor([0, 1, 5, 9])}
        assert tuner.refresh(optimizer, cap=1) == 1
        assert tuner.adapter().tensors["0.weight"].indices.tolist() == [0, 1, 5, 9]
        assert tuner.adapter().metadata["mask"]["refresh"] == {"times": 4, "cap": 1}


@pytest.mark.parametrize("mask", ["wm", "grad", "snip"])
def test_a_refresh_selects_by_the_weights_and_gradients_of_now(mask, tiny_llama):
    """As attaching to a model that already has the trained weights does."""
    batches = llama_batches(2, seed=3)
    with shira.attach(tiny_llama, mask=mask, density=0.1, calibration=llama_batches()) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=3e-2)
        train(tiny_llama, optimizer, 5, lambda model, batch: model(**batch).loss, llama_batches(3, seed=4))
        now = tuner.adapter()
        moved = tuner.refresh(optimizer, calibration=batches, cap=3.0)
        assert moved > 0
        after = tuner.adapter()
    switcher = shira.Switcher(tiny_llama)
    switcher.add("now", now)
    switcher.use("now")
    switcher.release()  # what is in the weights is the base from here on
    with shira.attach(tiny_llama, mask=mask, density=0.1, calibration=batches) as fresh:
        wanted = entries(fresh.adapter())
    assert entries(after) == wanted | entries(now)
    assert len(wanted - entries(now)) == moved


def test_it_goes_on_avoiding():
    model = mlp()
    with attach(model) as tuner:
        taken = tuner.adapter()
    with attach(model, avoid=taken) as tuner:
        optimizer = torch.optim.SGD(tuner.parameters(), lr=1.0)
        with torch.no_grad():
            for parameter in tuner.parameters():
                parameter.zero_()
        assert tuner.refresh(optimizer, cap=2.0) == tuner.nnz
        assert not entries(tuner.adapter()) & entries(taken)


class BlockWise(torch.optim.SGD):
    """Keeps a scale for two entries together, as 8-bit optimizers do."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["scale"] = torch.zeros(parameter.numel() // 2)


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("cap", TuningError, "cap must be a number from 1 on.*found 0.9"),
        ("other", TuningError, "does not train '0.weight'"),
        ("blocks", TuningError, r"state 'scale' of '0.weight', torch.float32 \[14\], is not one number for each of the 29"),
        ("fewer", TuningError, "now chose 28 entries of '0.weight', and 29 train"),
        ("mask", MaskError, "on tensor '0.weight'.*found 999"),
        ("nan", TuningError, "training of '2.weight' went wrong"),
        ("gradients", MaskError, "pass calibration="),
    ],
)
def test_a_refresh_that_cannot_be_changes_nothing(case, error, words):
    model, mask = mlp(), Wandering()
    base = all_bits(model)
    with attach(model, "snip" if case == "gradients" else mask) as tuner:
        optimizer = (BlockWise if case == "blocks" else torch.optim.SGD)(tuner.parameters(), lr=0.1)
        train(model, optimizer, 2)
        model(torch.ones(1, 13))  # writes the last step
        if case == "nan":
            with torch.no_grad():
                tuner.parameters()[1][3] = math.nan
        live, adapter = all_bits(model), entries(tuner.adapter()) if case != "nan" else None
        mask.chosen = {(5, 11): torch.arange(3, 14)}
        mask.chosen |= {"fewer": {(11, 13): torch.arange(28)}, "mask": {(11, 13): torch.full((1,), 999)}}.get(case, {})
        with pytest.raises(error, match=words):
            wrong = torch.optim.SGD([nn.Parameter(torch.ones(1))]) if case == "other" else optimizer
            tuner.refresh(wrong, cap=0.9 if case == "cap" else 1.0)
        assert same_bits(live, all_bits(model))
        assert case == "nan" or entries(tuner.adapter()) == adapter
    assert same_bits(base, all_bits(model))


def test_only_an_attached_tuner_of_values_is_refreshed():
    model = mlp()
    with attach(model) as tuner:
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        for wrong in (None, [optimizer], "adam", torch.optim.SGD):
            with pytest.raises(TuningError, match=r"tuner.refresh\(optimizer\), found"):
                tuner.refresh(wrong)
        with pytest.raises(TuningError, match="calibration must be batches"):
            tuner.refresh(optimizer, calibration=5)
    with attach(model, method="hook") as tuner:
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
        with pytest.raises(TuningError, match="method='values'"):
            tuner.refresh(optimizer)
    with attach(model) as tuner:
        optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    with pytest.raises(TuningError, match="attached"):
        tuner.refresh(optimizer)


@pytest.mark.parametrize("every", [2, 3])
def test_the_trainer_refreshes_in_between_and_not_at_the_end(every, tiny_llama):
    from shira.integrations.transformers_training import train as hf_train

    rows = [{"input_ids": [5, 6, 7, n], "labels": [5, 6, 7, n]} for n in range(8, 24)]
    base, results = all_bits(tiny_llama), []
    for mask, refresh_every in (("rand", 0), ("rand", every), ("snip", every)):
        options = {"calibration": llama_batches(1), "density": 0.1}
        with shira.attach(tiny_llama, mask=mask, **options) as tuner:
            summary = hf_train(
                tuner,
                tiny_llama,
                rows,
                steps=6,
                learning_rate=1e-2,
                batch_size=4,
                refresh_every=refresh_every,
                refresh_cap=2.0,
                calibration=options["calibration"],
                on_step=lambda *_: None,
            )
            adapter = tuner.adapter()
        results.append((summary, adapter))
        assert same_bits(base, all_bits(tiny_llama))
    (plain, without), (still, same), (moving, moved) = results
    assert "refresh_every" not in plain
    assert still["moved"] == [0] * len(moving["moved"]) and len(moving["moved"]) == 5 // every
    assert all(torch.equal(bits(t.values), bits(same.tensors[name].values)) for name, t in without.tensors.items())
    assert still["loss"] == plain["loss"]
    assert min(moving["moved"]) > 0 and moving["refresh_every"] == every
    assert moving["parameters"] < moved.nnz <= 2 * moving["parameters"]
    assert moved.metadata["mask"]["refresh"] == {"times": 5 // every, "cap": 2.0}
