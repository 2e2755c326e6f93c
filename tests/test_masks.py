import functools
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import shira
from shira import MaskError, masks
from shira.sparse import positions

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40))


@given(scores=st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, 2.5, float("inf")]), min_size=1, max_size=50), data=st.data())
def test_top_k_is_exact_and_prefers_the_first_among_equals(scores, data):
    k = data.draw(st.integers(0, len(scores)))
    for dtype in (torch.float32, torch.bfloat16):
        found = masks.top_k(torch.tensor(scores, dtype=dtype), k).tolist()
        expected = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])
        assert found == expected


@given(
    numel=st.integers(1, 4000),
    levels=st.integers(1, 50),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
    sample=st.sampled_from([1, 7, 64]),
)
def test_top_k_by_a_guess_is_as_exact(numel, levels, share, seed, sample):
    """Scores with many ties, some of them sorted so that a sample misleads."""
    scores = torch.randint(levels, (numel,), generator=torch.Generator().manual_seed(seed)).float()
    if seed % 3 == 0:
        scores = scores.sort().values
    if seed % 5 == 0:
        scores[:: max(1, numel // sample)] = levels + 1  # just what the sample sees
    k = int(share * numel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shira.sparse.topk, "SAMPLE", sample)
        found = masks.top_k(scores, k)
    expected = scores.sort(descending=True, stable=True).indices[:k].sort().values
    assert torch.equal(found, expected)


def test_top_k_refuses_nan_and_too_large_a_k():
    with pytest.raises(MaskError, match="NaN"):
        masks.top_k(torch.tensor([1.0, float("nan")]), 1)
    with pytest.raises(MaskError, match="3 positions asked of 2 entries"):
        masks.top_k(torch.ones(2), 3)


def test_wm_grad_and_snip_take_the_largest_of_what_they_score():
    weight = torch.tensor([[3.0, -1.0], [0.5, -4.0]])
    gradient = torch.tensor([[0.1, -9.0], [8.0, 0.2]])
    assert masks.wm(weight, 2).tolist() == [0, 3]
    assert masks.grad(gradient, 2).tolist() == [1, 2]
    assert masks.snip(weight, gradient, 2).tolist() == [1, 2]  # 0.3, 9, 4, 0.8


def test_snip_scores_in_float32():
    """In bfloat16 the two products would be equal."""
    weight = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16)
    gradient = torch.tensor([1.0078125, 1.0078125], dtype=torch.bfloat16)
    assert masks.snip(weight, gradient, 1).tolist() == [1]


@given(shape=SHAPES, seed=st.integers(0, 2**63 - 1), data=st.data())
def test_rand_draws_distinct_positions_from_the_seed(shape, seed, data):
    weight = torch.empty(shape)
    k = data.draw(st.integers(0, weight.numel()))
    drawn = masks.rand(weight, k, seed)
    assert drawn.numel() == k == drawn.unique().numel()
    assert torch.equal(drawn, masks.rand(weight, k, seed))
    assert torch.equal(drawn, drawn.sort().values)
    assert k == 0 or (drawn.min() >= 0 and drawn.max() < weight.numel())


@given(numel=st.integers(0, 2**62), k=st.integers(0, 9000), seed=st.integers(0, 2**63 - 1))
@example(numel=9000, k=9000, seed=0)
@example(numel=2**31, k=5, seed=1)
def test_c_draws_what_torch_draws(numel, k, seed):
    assert positions._drawing is not None, "draw.c was not built"
    k = min(numel, k)
    by_c = positions.draw(numel, k, seed)
    with mock.patch.object(positions, "_drawing", None):
        by_torch = positions.draw(numel, k, seed)
    assert by_c.dtype == by_torch.dtype == torch.int64
    assert torch.equal(by_c, by_torch)


def test_rand_is_uniform():
    """Chi-squared over positions and over pairs of neighbours, 3 000 draws of 5 in 50 entries; 99.99 % quantiles."""
    weight, draws = torch.empty(5, 10), 3_000
    counts, pairs = torch.zeros(50), 0
    for seed in range(draws):
        drawn = masks.rand(weight, 5, masks.seed_of(seed, "w"))
        counts[drawn] += 1
        pairs += int(((drawn[1:] - drawn[:-1]) == 1).sum())
    expected = draws * 5 / 50
    chi_squared = float(((counts - expected) ** 2 / (expected * (1 - 5 / 50))).sum())
    assert chi_squared < 96.0  # 49 degrees of freedom
    mean = draws * 49 * (5 / 50) * (4 / 49)
    assert abs(pairs - mean) < 4.5 * mean**0.5


def test_rand_is_the_same_on_every_machine():
    """Positions are rebuilt from seeds, so these must never change."""
    assert masks.rand(torch.empty(100, 100), 5, seed=7).tolist() == [726, 3656, 6299, 7570, 9184]


@given(shape=SHAPES, direction=st.sampled_from(["rows", "columns"]), data=st.data())
def test_struct_is_lines_at_one_distance_and_the_diagonal(shape, direction, data):
    rows, columns = shape
    weight = torch.empty(shape)
    smallest = min(shape) + (columns if direction == "rows" else rows) - 1
    if smallest > weight.numel():
        smallest = weight.numel()
    k = data.draw(st.integers(smallest, weight.numel()))
    chosen = masks.struct(weight, k, direction)
    assert chosen.numel() <= k
    pattern = torch.zeros(weight.numel(), dtype=torch.bool)
    pattern[chosen] = True
    pattern = pattern.view(shape)
    lines = pattern if direction == "rows" else pattern.T
    full = lines.all(1).nonzero().view(-1).tolist()
    assert pattern.diagonal().all()
    frequency = next((f for f in range(1, lines.shape[0] + 1) if set(range(0, lines.shape[0], f)) <= set(full)), None)
    assert frequency is not None
    rebuilt = torch.zeros_like(lines)
    rebuilt[::frequency] = True
    rebuilt.diagonal().fill_(True)
    assert torch.equal(rebuilt, lines)
    if frequency > 1:  # one line more often would not fit the budget
        closer = torch.zeros_like(lines)
        closer[:: frequency - 1] = True
        closer.diagonal().fill_(True)
        assert closer.sum() > k or torch.equal(closer, lines)


def test_struct_refuses_a_budget_without_room_for_the_diagonal_and_a_row():
    with pytest.raises(MaskError, match=r"19 of 10 x 10 entries, but the budget is 18; use a density of at least 0.1900"):
        masks.struct(torch.empty(10, 10), 18)
    with pytest.raises(MaskError, match="needs a matrix"):
        masks.struct(torch.empty(10), 5)
    with pytest.raises(MaskError, match="'rows' or 'columns'"):
        masks.struct(torch.empty(10, 10), 50, direction="diagonal")


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"density": 0.0}, "above 0"),
        ({"density": -1}, "above 0"),
        ({"density": 1.01}, "at most 1"),
        ({"density": float("nan")}, "above 0"),
        ({"rank": 0}, "rank must be from 1 to 3"),
        ({"rank": 4}, "rank must be from 1 to 3"),
        ({}, "give one of density=, rank="),
        ({"rank": 1, "density": 0.1}, "one of them"),
    ],
)
def test_an_impossible_budget_is_refused(given_, words):
    with pytest.raises(MaskError, match=words):
        masks.budget((8, 6), **given_)


def test_budgets():
    assert masks.budget((8, 6), density=1) == 48
    assert masks.budget((8, 6), density=1e-9) == 1
    assert masks.budget((8, 6), rank=2) == 28


def test_two_layers_of_one_shape_differ():
    weight = torch.empty(30, 30)
    one, other = (masks.select("rand", name, weight, 90, seed=0) for name in ("a", "b"))
    assert not torch.equal(one, other)
    assert not torch.equal(one, masks.select("rand", "a", weight, 90, seed=1))
    assert torch.equal(one, masks.select("rand", "a", weight, 90, seed=0))


@pytest.mark.parametrize("wrap", ["mask", "of", "by"])
def test_a_users_own_mask_may_compute_in_place(wrap):
    def scores(weight, gradient):
        return weight.mul_(gradient.neg_()).abs_()

    def mine(weight, gradient, k):
        return masks.top_k(scores(weight, gradient).view(-1), k)

    mask = {"mask": mine, "of": functools.partial(masks.union, of=(mine, "snip")), "by": functools.partial(masks.nm, by=scores)}
    weight, gradient = torch.randn(8, 8), torch.randn(8, 8)
    copies = weight.clone(), gradient.clone()
    masks.select(mask[wrap], "w", weight, 9, gradient=gradient)
    assert torch.equal(weight, copies[0]) and torch.equal(gradient, copies[1])


def test_a_users_own_mask_may_answer_in_any_order_or_as_booleans():
    weight = torch.arange(12.0).view(3, 4)
    assert masks.select(lambda weight, k: torch.tensor([7, 2]), "w", weight, 2).tolist() == [2, 7]
    assert masks.select(lambda weight, k: weight > 9, "w", weight, 2).tolist() == [10, 11]
    columns = functools.partial(masks.struct, direction="columns")
    assert masks.select(columns, "w", weight, 6).tolist() == [0, 4, 5, 8, 10]
    assert masks.resolve(columns)[0] == "struct"


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ("wn", "unknown mask 'wn'; did you mean .*'wm'"),
        (3, "a name or a function"),
        (lambda weight, k, mood: weight, "asks for 'mood'"),
        (lambda weight, k: torch.tensor([1, 1]), "'w'.*a position twice"),
        (lambda weight, k: torch.tensor([99]), "'w'.*0 to 11, found 99"),
        (lambda weight, k: torch.tensor([-1]), "'w'.*found -1"),
        (lambda weight, k: torch.tensor([1, 2, 3]), "'w'.*the budget is 2 positions, it returned 3"),
        (lambda weight, k: torch.tensor([]), "'w'.*found torch.float32"),
        (lambda weight, k: torch.tensor([], dtype=torch.int64), "'w'.*no position"),
        (lambda weight, k: [1, 2], "'w'.*found list"),
        (lambda weight, k: torch.ones(5, dtype=torch.bool), "'w'.*shape"),
        ("snip", "pass calibration="),
    ],
)
def test_a_bad_mask_is_refused_with_the_tensors_name(mask, words):
    with pytest.raises(MaskError, match=words):
        masks.select(mask, "w", torch.ones(3, 4), 2)


def test_the_catalogue_says_what_each_mask_is_and_needs():
    catalogue = {info.name: info for info in masks.available()}
    assert list(catalogue)[:5] == ["struct", "rand", "wm", "grad", "snip"]
    assert all("2406.13175" in catalogue[name].source for name in list(catalogue)[:5])
    assert all(info.source and len(info.meaning) < 110 and not info.meaning.endswith(".") for info in catalogue.values())
    assert catalogue["snip"].needs == ("weight", "gradient")
    assert catalogue["block"].options == {"size": 16, "by": "wm"}
    assert masks.SCORES.keys() <= catalogue.keys()


@pytest.mark.parametrize("name", sorted(masks.SCORES))
def test_a_mask_with_a_score_takes_its_top_k(name):
    generator = torch.Generator().manual_seed(3)
    inputs = {key: torch.randn(7, 9, generator=generator) for key in ("weight", "gradient", "squared_gradient")}
    inputs |= {"activations": torch.rand(9, generator=generator), "seed": 5}
    mask, score = masks.CATALOGUE[name], masks.SCORES[name]
    scores = score(**{key: inputs[key] for key in masks.needs(score)})
    assert scores.dtype == torch.float32 and scores.shape == (7, 9)
    chosen = mask(**{key: inputs[key] for key in masks.needs(mask) if key != "k"}, k=10)
    assert torch.equal(chosen, masks.top_k(scores, 10))


def test_wm_may_take_the_smallest():
    weight = torch.tensor([[3.0, -1.0], [0.5, -4.0]])
    assert masks.wm(weight, 2, bottom=True).tolist() == [1, 2]
