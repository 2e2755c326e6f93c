import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shira
from conftest import all_bits, mlp, mlp_batches, mlp_loss, random_adapter, same_bits
from shira import BaseMismatch, FormatError, MaskError, masks

SHAPES = st.tuples(st.integers(1, 30), st.integers(1, 30))


def attach(model, mask="wm", **options):
    return shira.attach(model, mask=mask, calibration=mlp_batches(), loss_fn=mlp_loss, **{"density": 0.2} | options)


def trained(model, mask="wm", **options):
    with attach(model, mask, **options) as tuner:
        return tuner.adapter(f"adapter of {mask}")


def entries(*adapters):
    """(tensor, position) of every entry, of each adapter as often as it holds it."""
    return [(name, i) for adapter in adapters for name, tensor in adapter.tensors.items() for i in tensor.indices.tolist()]


def random_case(data, shape, seed):
    """A weight and gradient with many ties, some positions to avoid, and a budget that the others hold."""
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = (torch.randint(-4, 5, shape, generator=generator).float() for _ in range(2))
    avoid = (torch.rand(weight.numel(), generator=generator) < data.draw(st.floats(0, 0.9))).nonzero().view(-1)
    free = weight.numel() - avoid.numel()
    return weight, gradient, avoid, data.draw(st.integers(min(1, free), free))


@given(shape=SHAPES, seed=st.integers(0, 999), data=st.data(), mask=st.sampled_from(["wm", "grad", "snip"]))
def test_scores_of_avoided_entries_count_as_absent(shape, seed, data, mask):
    weight, gradient, avoid, k = random_case(data, shape, seed)
    if k == 0:
        return
    scores = {"wm": weight, "grad": gradient, "snip": weight * gradient}[mask].abs().flatten().tolist()
    free = sorted(set(range(len(scores))) - set(avoid.tolist()), key=lambda position: (-scores[position], position))
    found = masks.select(mask, "w", weight, k, gradient=gradient, avoid=avoid)
    assert found.tolist() == sorted(free[:k])


@given(shape=SHAPES, seed=st.integers(0, 999), data=st.data())
def test_rand_keeps_its_budget_beside_what_it_avoids(shape, seed, data):
    weight, _, avoid, k = random_case(data, shape, seed)
    drawn = masks.rand(weight, k, seed, avoid)
    assert drawn.numel() == k == drawn.unique().numel()
    assert not set(drawn.tolist()) & set(avoid.tolist())
    assert torch.equal(drawn, drawn.sort().values)
    assert k == 0 or (drawn.min() >= 0 and drawn.max() < weight.numel())
    assert torch.equal(masks.rand(weight, k, seed, avoid[:0]), masks.rand(weight, k, seed))


def test_rand_is_uniform_over_what_is_left():
    """Chi-squared over 40 positions that may be drawn, 1 500 draws of 5; 99.99 % quantile."""
    weight, avoid, counts = torch.empty(5, 10), torch.arange(0, 50, 5), torch.zeros(50)
    for seed in range(1500):
        counts[masks.rand(weight, 5, masks.seed_of(seed, "w"), avoid)] += 1
    assert not counts[avoid].any()
    left = counts[counts > 0]
    expected = 1500 * 5 / 40
    assert left.numel() == 40
    assert float(((left - expected) ** 2 / (expected * (1 - 5 / 40))).sum()) < 82.1  # 39 degrees of freedom


@given(shape=SHAPES, seed=st.integers(0, 999), data=st.data(), direction=st.sampled_from(["rows", "columns"]))
def test_struct_leaves_out_single_entries_and_refuses_lines_that_are_held_whole(shape, seed, data, direction):
    weight, _, avoid, _ = random_case(data, shape, seed)
    mask = functools.partial(masks.struct, direction=direction)
    k = data.draw(st.integers(min(sum(shape), weight.numel()), weight.numel()))
    pattern = mask(weight, k)
    frequency = masks.frequency_of(pattern, *shape, direction)
    free = torch.ones(shape, dtype=torch.bool)
    free.view(-1)[avoid] = False
    if bool(free.any(1 if direction == "rows" else 0)[::frequency].all()):
        found = masks.select(mask, "w", weight, k, avoid=avoid)
        assert found.tolist() == sorted(set(pattern.tolist()) - set(avoid.tolist()))
    else:
        with pytest.raises(MaskError, match=f"{direction} whole"):
            masks.select(mask, "w", weight, k, avoid=avoid)


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_the_next_top_one_after_another(scope):
    """The paper's WM-non-overlap: task 2 trains the next largest, task 3 those after."""
    model = mlp()
    before = all_bits(model)
    options = {"density": None, "total": 50, "scope": scope}
    first = trained(model, **options)
    second = trained(model, avoid=first, **options)
    third = trained(model, avoid=[first, second], **options)
    together = entries(first, second, third)
    assert len(together) == len(set(together)) == 150
    assert set(together) == set(entries(trained(model, **options | {"total": 150})))
    assert set(entries(first, second)) == set(entries(trained(model, **options | {"total": 100})))
    assert same_bits(before, all_bits(model))


@pytest.mark.parametrize("mask", ["wm", "grad", "snip", "rand", functools.partial(masks.wm, bottom=True)])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_avoided_entries_do_not_train_and_the_budget_is_kept(mask, scope):
    model = mlp()
    others = [random_adapter(model, 1), random_adapter(model, 2)]
    adapter = trained(model, mask, avoid=others, scope=scope)
    assert not set(entries(adapter)) & set(entries(*others))
    assert adapter.nnz == masks.budget((11, 13), density=0.2) + masks.budget((5, 11), density=0.2)
    assert adapter.metadata["mask"]["avoid"] == ["random1", "random2"]


def test_two_struct_adapters_share_nothing():
    model = mlp()
    rows = trained(model, "struct", density=0.35)
    columns = trained(model, functools.partial(masks.struct, direction="columns"), density=0.35, avoid=rows)
    assert not set(entries(rows)) & set(entries(columns))
    with pytest.raises(MaskError, match=r"'struct' on tensor '0.weight'.*hold 3 of its 3 rows whole, the first is number 0"):
        attach(model, "struct", density=0.35, avoid=rows)


def test_files_are_avoided_as_adapters_are(tmp_path):
    model = mlp()
    first = trained(model)
    first.save(tmp_path / "first.safetensors")
    second = trained(model, avoid=[tmp_path / "first.safetensors"])
    assert sorted(entries(second)) == sorted(entries(trained(model, avoid=first)))
    assert second.metadata["mask"]["avoid"] == ["adapter of wm"]
    nameless = shira.Adapter(first.tensors)
    nameless.save(tmp_path / "nameless.safetensors")
    given_ = str(tmp_path / "nameless.safetensors")
    assert trained(model, avoid=given_).metadata["mask"]["avoid"] == ["nameless.safetensors"]
    assert trained(model, avoid=nameless).metadata["mask"]["avoid"] == ["number 1"]


def test_entries_in_other_layers_are_no_matter():
    model = mlp()
    first = trained(model, targets=["2"])
    assert entries(trained(model, targets=["0"], avoid=first)) == entries(trained(model, targets=["0"]))


def test_a_tied_weight_is_known_by_each_of_its_names():
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh(), torch.nn.Linear(5, 5))
    model[2].weight = model[0].weight
    full = shira.SparseTensor((5, 5), torch.arange(20), torch.ones(20))
    with shira.attach(model, density=0.2, avoid=shira.Adapter({"2.weight": full})) as tuner:
        assert entries(tuner.adapter()) == [("0.weight", i) for i in range(20, 25)]


def test_a_total_is_shared_by_what_may_train():
    model = mlp()
    full = shira.SparseTensor((11, 13), torch.arange(140), torch.ones(140))
    adapter = trained(model, density=None, total=58, avoid=shira.Adapter({"0.weight": full}))
    assert {name: tensor.nnz for name, tensor in adapter.tensors.items()} == {"0.weight": 3, "2.weight": 55}


def test_a_mask_of_ones_own_is_told_what_to_avoid():
    model = mlp()
    first = trained(model)

    def smallest(weight, k, avoid):
        magnitude = weight.flatten().abs().clone()
        magnitude[avoid] = float("inf")
        return magnitude.topk(k, largest=False).indices

    second = trained(model, smallest, avoid=first)
    assert not set(entries(first)) & set(entries(second))
    assert second.nnz == first.nnz
    assert trained(model, smallest).nnz == first.nnz  # nothing to avoid


def held_of_first(count):
    return shira.Adapter({"0.weight": shira.SparseTensor((11, 13), torch.arange(count), torch.ones(count))}, {"name": "big"})


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"mask": lambda weight, k: torch.arange(k)}, MaskError, "'0.weight'.*cannot leave out.*an argument `avoid`"),
        ({"mask": "union:of=wm+rand"}, MaskError, "'union' on tensor '0.weight'.*cannot leave out"),
        (
            {"mask": lambda weight, k, avoid: torch.arange(k)},
            MaskError,
            "'0.weight'.*returned 29 positions to avoid.*first is 0",
        ),
        ({"avoid": held_of_first(120)}, MaskError, "'0.weight': 29 of its entries.*of 143 the adapters to avoid hold 120"),
        (
            {"avoid": held_of_first(143), "scope": "model", "density": 0.5},
            MaskError,
            "100 entries .*only 55 may: of 198 .* hold 143",
        ),
        ({"avoid": held_of_first(143), "scope": "model", "floor": 0.1}, MaskError, "'0.weight': 3 of its entries are to train"),
        ({"avoid": held_of_first(143), "overrides": {"0": 0.1}}, MaskError, "'0.weight': 14 of its entries are to train"),
        ({"avoid": held_of_first(100), "density": None, "total": 99}, MaskError, "total=99 does not fit.*hold 98 entries"),
        ({"avoid": random_adapter(torch.nn.Linear(3, 3), 0)}, BaseMismatch, "'random0' to avoid.*no tensor 'weight'; did you"),
        (
            {"avoid": random_adapter(torch.nn.Sequential(torch.nn.Linear(3, 3)), 0)},
            BaseMismatch,
            r"'random0' to avoid.*'0.weight' has shape \[11, 13\], the adapter expects \[3, 3\]",
        ),
        ({"avoid": __file__}, FormatError, "not a whole safetensors file"),
        ({"avoid": ["none.safetensors"]}, FileNotFoundError, "none.safetensors"),
    ],
)
def test_an_impossible_request_is_refused_with_the_numbers(options, error, words):
    model = mlp()
    before, state = all_bits(model), set(model.state_dict())
    with pytest.raises(error, match=words):
        attach(model, **{"avoid": held_of_first(100)} | options)
    assert same_bits(before, all_bits(model))
    assert set(model.state_dict()) == state
