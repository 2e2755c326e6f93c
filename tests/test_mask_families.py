"""Each family of masks against a slow, obvious implementation."""

import functools
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shira
from conftest import bits, mlp
from shira import MaskError, masks

SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 24))
SEEDS = st.integers(0, 10_000)
STRUCTS = {"direction": st.sampled_from(["rows", "columns"]), "frequency": st.integers(1, 30), "diagonal": st.booleans()}


def inputs_of(shape, seed, levels=None):
    """What a mask may ask for, random; with `levels` of few different values, so that many scores are equal."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sides):
        if levels is None:
            return torch.randn(sides, generator=generator)
        return torch.randint(-levels, levels + 1, sides, generator=generator) / 2

    found = {"weight": draw(*shape), "gradient": draw(*shape), "squared_gradient": draw(*shape) ** 2}
    return found | {"activations": draw(shape[-1]).abs(), "seed": seed}


def run(mask, inputs, k):
    function = masks.resolve(mask)[1]
    known = inputs | {"k": k, "avoid": torch.empty(0, dtype=torch.int64)}
    return function(**{name: known[name] for name in masks.needs(function)})


def best(scores, k, among=None):
    """The positions of the k largest of a nested list's scores, the first of equals first, by sorting."""
    flat = torch.as_tensor(scores).reshape(-1).tolist()
    chosen = sorted(range(len(flat)) if among is None else among, key=lambda i: (-flat[i], i))[:k]
    return sorted(chosen)


@given(shape=SHAPES, seed=SEEDS, levels=st.sampled_from([None, 2]), share=st.floats(0, 1))
def test_scores_are_what_their_formulas_say(shape, seed, levels, share):
    inputs = inputs_of(shape, seed, levels)
    k = round(share * inputs["weight"].numel())
    weight, gradient, norms = inputs["weight"].tolist(), inputs["gradient"].tolist(), inputs["activations"].tolist()
    rows, columns = range(shape[0]), range(shape[1])
    formulas = {
        "wm": [[abs(weight[i][j]) for j in columns] for i in rows],
        "wm:bottom=true": [[-abs(weight[i][j]) for j in columns] for i in rows],
        "grad": [[abs(gradient[i][j]) for j in columns] for i in rows],
        "snip": inputs["weight"].mul(inputs["gradient"]).abs(),
        "fisher": inputs["squared_gradient"],
        "wanda": [[float(torch.tensor(abs(weight[i][j])) * torch.tensor(norms[j])) for j in columns] for i in rows],
    }
    for mask, scores in formulas.items():
        assert run(mask, inputs, k).tolist() == best(scores, k), mask


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (7, 90), (20, 20)])
def test_lift_ranks_the_best_approximation_of_its_rank(shape):
    """A spectrum that falls, as those of trained weights do; and twice the same."""
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator)).Q
    weight = (left * 0.7 ** torch.arange(min(shape))) @ right.T
    for rank in (1, 5):
        u, s, v = torch.linalg.svd(weight.double())
        exact = (u[:, :rank] * s[:rank]) @ v[:rank]
        lifted = masks.lift(weight, 100, seed=3, rank=rank)
        assert lifted.tolist() == best(exact.abs(), 100)
        assert torch.equal(lifted, masks.lift(weight, 100, seed=3, rank=rank))
    assert torch.equal(masks.lift(weight, 100, rank=min(shape)), masks.wm(weight, 100))


def test_the_approximation_of_a_flat_spectrum_is_nearly_the_best():
    """A Gaussian matrix is the worst case: within 1 % of the smallest error there is."""
    weight = torch.randn(90, 120, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(weight)
    for rank in (5, 20):
        error = (weight - masks.lowrank.best_of_rank(weight, rank, seed=1)).norm()
        assert values[rank:].norm() * 0.9999 <= error <= values[rank:].norm() * 1.01


@given(shape=SHAPES, seed=SEEDS, levels=st.sampled_from([None, 2]), size=st.integers(1, 9), share=st.floats(0, 1))
def test_block_takes_the_best_blocks_that_fit(shape, seed, levels, size, share):
    inputs = inputs_of(shape, seed, levels)
    k = round(share * inputs["weight"].numel())
    blocks = []
    for top in range(0, shape[0], size):
        for left in range(0, shape[1], size):
            cells = [(i, j) for i in range(top, min(top + size, shape[0])) for j in range(left, min(left + size, shape[1]))]
            mean = sum(float(inputs["gradient"][cell].abs()) for cell in cells) / len(cells)
            blocks.append((mean, [i * shape[1] + j for i, j in cells]))
    if levels is None:
        scores = sorted(mean for mean, _ in blocks)
        if any(b - a < 1e-5 for a, b in zip(scores, scores[1:], strict=False)):
            return  # which of the two is larger depends on rounding
    expected = []
    for _, cells in sorted(blocks, key=lambda part: -round(part[0], 6)):
        if len(expected) + len(cells) > k:
            break
        expected += cells
    if expected:
        assert run(f"block:by=grad,size={size}", inputs, k).tolist() == sorted(expected)
    else:
        with pytest.raises(MaskError, match=f"entries, but the budget is {k}; use a smaller size"):
            run(f"block:by=grad,size={size}", inputs, k)


@given(shape=SHAPES, seed=SEEDS, levels=st.sampled_from([None, 2]), m=st.integers(1, 9), data=st.data())
def test_nm_takes_the_best_with_at_most_n_of_each_m(shape, seed, levels, m, data):
    inputs = inputs_of(shape, seed, levels)
    n = data.draw(st.integers(1, m))
    scores = inputs["gradient"].abs()
    candidates = []
    for row in range(shape[0]):
        for start in range(0, shape[1], m):
            group = range(row * shape[1] + start, row * shape[1] + min(start + m, shape[1]))
            candidates += best(scores, n, group)
    k = data.draw(st.integers(0, len(candidates)))
    assert run(f"nm:by=grad,n={n},m={m}", inputs, k).tolist() == best(scores, k, candidates)
    if len(candidates) < scores.numel():
        with pytest.raises(MaskError, match=f"{n}:{m} has room for {len(candidates)} of {scores.numel()} entries"):
            run(f"nm:by=grad,n={n},m={m}", inputs, len(candidates) + 1)


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    seed=SEEDS,
    levels=st.sampled_from([None, 2]),
    share=st.floats(0.01, 1),
    parts=st.integers(2, 3),
)
def test_sets_of_masks_are_sets(shape, seed, levels, share, parts):
    """Against Python's sets, at every count there is."""
    inputs = inputs_of(shape, seed, levels)
    numel = inputs["weight"].numel()
    k = max(1, round(share * numel))
    names = ["wm", "snip", "rand"][:parts]

    def chosen(count):
        return [set(run(name, inputs, count).tolist()) for name in names]

    others = set().union(*chosen(k)[1:])
    at = {
        "union": lambda count: set().union(*chosen(count)),
        "intersection": lambda count: set.intersection(*chosen(count)),
        "difference": lambda count: chosen(count)[0] - others,
    }
    for name, function in at.items():
        found = run(f"{name}:of={'+'.join(names)}", inputs, k)
        fitting = [function(count) for count in range(numel + 1)]
        largest = max((f for f in fitting if len(f) <= k), key=len)
        assert set(found.tolist()) == largest, name
        assert found.tolist() == sorted(found.tolist())
        if name == "difference":
            assert found.numel() == min(k, numel - len(others))
        elif len(found) < numel:
            assert k - parts < found.numel() <= k


def test_the_difference_of_a_mask_and_itself_is_the_next_k():
    inputs = inputs_of((20, 30), 5)
    first, both = run("wm", inputs, 60).tolist(), run("wm", inputs, 120).tolist()
    assert run("difference:of=wm+wm", inputs, 60).tolist() == sorted(set(both) - set(first))


@given(shape=SHAPES, offsets=st.tuples(st.integers(0, 29), st.integers(0, 29)), **STRUCTS)
def test_struct_is_every_line_from_its_offset_and_offsets_never_meet(shape, offsets, direction, frequency, diagonal):
    weight = torch.empty(shape)
    across = shape[0] if direction == "rows" else shape[1]
    found = []
    for offset in offsets:
        options = {"direction": direction, "frequency": frequency, "offset": offset, "diagonal": diagonal}
        expected = {
            i * shape[1] + j
            for i in range(shape[0])
            for j in range(shape[1])
            if ((i if direction == "rows" else j) % frequency == offset) or (diagonal and i == j)
        }
        if offset >= min(frequency, across):
            with pytest.raises(MaskError, match="offset must be from 0 to"):
                masks.struct(weight, weight.numel(), **options)
            return
        found.append(masks.struct(weight, weight.numel(), **options).tolist())
        assert found[-1] == sorted(expected)
        assert masks.struct(weight, len(expected), **options).numel() == len(expected)
        with pytest.raises(MaskError, match=f"{len(expected)} of {shape[0]} x {shape[1]} entries, but the budget is"):
            masks.struct(weight, len(expected) - 1, **options)
    if offsets[0] != offsets[1]:
        on_diagonal = {i * (shape[1] + 1) for i in range(min(shape))}
        assert set(found[0]) & set(found[1]) == (on_diagonal if diagonal else set())


@given(shape=SHAPES, direction=st.sampled_from(["rows", "columns"]), share=st.floats(0.2, 0.9), diagonal=st.booleans())
def test_struct_of_one_budget_has_one_frequency_whatever_its_offset(shape, direction, share, diagonal):
    """So that several adapters of one density never meet, but on a diagonal that all of them train."""
    weight = torch.empty(shape)
    k = max(1, round(share * weight.numel()))
    used, offset = set(), 0
    while True:
        try:
            found = set(masks.struct(weight, k, direction, offset=offset, diagonal=diagonal).tolist())
        except MaskError as error:
            if "offset must be" not in str(error):
                return  # the budget is too small
            break
        assert len(found) <= k
        assert used & found == ({i * (shape[1] + 1) for i in range(min(shape))} if diagonal and offset else set())
        used |= found
        offset += 1
    assert not offset or len(used) == weight.numel()  # together the offsets are everything


@pytest.mark.parametrize(
    "options", [{"offset": 3}, {"diagonal": False}, {"offset": 1, "diagonal": False, "direction": "columns"}]
)
def test_a_file_holds_struct_as_a_rule(options, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(60, 50))
    with shira.attach(model, mask=functools.partial(masks.struct, **options), density=0.2) as tuner:
        adapter = tuner.adapter("x")
    assert adapter.metadata["mask"]["options"] == options
    adapter.save(tmp_path / "x.safetensors")
    read = shira.load(tmp_path / "x.safetensors")
    assert torch.equal(bits(read.tensors["0.weight"].indices), bits(adapter.tensors["0.weight"].indices))
    tensor = adapter.tensors["0.weight"]
    rules = shira.files.writing._rules(adapter.metadata, "0.weight", tensor)
    stored = shira.files.encoding.encode(tensor.indices, (50, 60), rules)
    assert stored.array is None and isinstance(stored.positions, dict)
    for wrong in ({"offset": -1}, {"offset": 50}, {"offset": True}, {"diagonal": 0}, {"mood": 1}):
        with pytest.raises(shira.AdapterError, match="does not give|other positions"):
            shira.files.encoding.decode(shira.files.encoding.Stored(stored.positions | wrong, None), (50, 60), adapter.nnz)


def test_from_adapter_takes_the_positions_of_another():
    with shira.attach(mlp(), mask="rand", density=0.2) as tuner:
        first = tuner.adapter("first")
    reuse = functools.partial(masks.from_adapter, adapter=first)
    with shira.attach(mlp(), mask=reuse, density=0.2) as tuner:
        second = tuner.adapter("second")
    assert all(torch.equal(second.tensors[name].indices, first.tensors[name].indices) for name in first.tensors)
    assert second.metadata["mask"]["options"] == {"adapter": "Adapter"}
    for weight, name, k, words in (
        (torch.ones(11, 13), "0.weight", 5, "holds 29 of its entries, but the budget is 5"),
        (torch.ones(11, 12), "0.weight", 50, r"of shape \[11, 13\], here it is \[11, 12\]"),
        (torch.ones(11, 13), "7.weight", 50, "holds nothing of it"),
    ):
        with pytest.raises(MaskError, match=f"'{name}'.*{words}"):
            masks.select(reuse, name, weight, k)
    with pytest.raises(MaskError, match="from_adapter needs an adapter"):
        masks.select("from_adapter", "0.weight", torch.ones(3, 4), 5)


@given(shape=SHAPES, seed=SEEDS, levels=st.sampled_from([None, 1]), share=st.floats(0, 1))
def test_a_mask_has_exactly_its_budget(shape, seed, levels, share):
    inputs = inputs_of(shape, seed, levels)
    k = round(share * inputs["weight"].numel())
    for mask in ("rand", "wm", "wm:bottom=true", "grad", "snip", "fisher", "wanda", "wanda:bottom=true", "lift", "nm:n=4"):
        found = run(mask, inputs, k)
        assert found.numel() == k == found.unique().numel(), mask
        assert torch.equal(found, found.sort().values)


def test_nan_is_refused_and_ties_go_to_the_first():
    inputs = {key: torch.full((6, 6), 2.0) for key in ("weight", "gradient", "squared_gradient")}
    inputs |= {"activations": torch.ones(6), "seed": 1}
    broken = {key: value * float("nan") for key, value in inputs.items() if key != "seed"} | {"seed": 1}
    for mask in (*masks.SCORES, "nm", "block:size=2", "union", "intersection", "difference"):
        if mask not in ("lift", "block:size=2", "difference"):  # a rank-1 approximation is equal but for rounding
            expected = [0, 1, 4, 5] if mask == "nm" else [0, 1, 2, 3]
            assert run(mask, inputs, 4).tolist() == expected, mask
        with pytest.raises(MaskError, match="NaN"):
            run(mask, broken, 4)
    assert run("block:size=2", inputs, 7).tolist() == [0, 1, 6, 7]
    assert run("difference", inputs, 4).tolist() == [4, 5, 6, 7]


def test_what_needs_a_matrix_says_so():
    for mask in ("struct", "wanda", "lift", "block"):
        with pytest.raises(MaskError, match="needs a matrix"):
            run(mask, inputs_of((12,), 0), 5)
    for mask in ("rand", "wm", "grad", "snip", "fisher", "nm", "union"):
        assert run(mask, inputs_of((12,), 0), 5).numel() in (4, 5)


def wrong_masks():
    """What a mask must not return, and what the error says, also where the mask is one of a set."""

    def named(answer):
        def wrong(weight, k):
            return answer(k)

        return wrong

    yield named(lambda k: list(range(k))), "found list"
    yield named(lambda k: None), "found NoneType"
    yield named(lambda k: torch.arange(k) / 2), "found torch.float32"
    yield named(lambda k: torch.ones(2, dtype=torch.bool)), r"boolean mask of shape \[3, 4\], found \[2\]"
    yield named(lambda k: torch.zeros(k + 1, dtype=torch.int64)), "the budget is . positions"
    yield named(lambda k: torch.zeros(k, dtype=torch.int64)), "a position twice"
    yield named(lambda k: torch.arange(k) - 1), "positions must be from 0 to 11, found -1"


WRONG = list(wrong_masks())
SETS = (masks.union, masks.intersection, masks.difference)
WHOLE = ("block:size", "nm:n", "nm:m", "struct:frequency", "struct:offset", "lift:rank")


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ("block:by=wn", "unknown score 'wn'; did you mean"),
        ("block:size=0", "size of at least 1"),
        ("nm:n=5,m=4", "1 ≤ n ≤ m"),
        ("nm:size=4", "'size=4' is no option=value; known: 'n', 'm', 'by'"),
        ("wm:bottom", "'bottom' is no option=value; give it a value"),
        ("wm:bottom=no", "bottom must be true or false, found 'no'"),
        ("wanda:bottom=1", "bottom must be true or false, found '1'"),
        ("union:of=wm", "two or more"),
        ("union:of=wm+snap", "did you mean 'snip'"),
        ("lift:rank=99", "rank must be from 1 to 3"),
        ("struct:frequency=0", "frequency must be at least 1"),
        *[(f"{option}={value}", "must be a whole number, found") for option in WHOLE for value in ("x", "1.5", "true", "")],
        (functools.partial(masks.block, size=2.0), "size must be a whole number, found 2.0"),
        ("block:by=3", "unknown score 3; known: 'wm'"),
        *[(functools.partial(mask, of=("wm", wrong)), f"its mask 'wrong'.*{words}") for mask in SETS for wrong, words in WRONG],
        (functools.partial(masks.block, by=lambda weight: weight[:1]), r"'w'.*a score must be floating point"),
        (functools.partial(masks.block, by=lambda mood: mood), "asks for 'mood'"),
    ],
)
def test_bad_options_are_refused(mask, words):
    with pytest.raises(MaskError, match=words):
        masks.select(mask, "w", torch.randn(3, 4), 6)


def test_the_score_of_a_mask_has_its_options():
    weight = torch.randn(5, 6)
    score = masks.score_of("wm:bottom=true")
    assert torch.equal(masks.top_k(score(weight), 9), masks.wm(weight, 9, bottom=True))
    assert masks.score_of("snip") is masks.SCORES["snip"]
    assert masks.score_of("block") is None and masks.score_of(lambda weight, k: weight) is None


def test_the_masks_that_the_pages_name_exist():
    folder = Path(__file__).parents[1] / "docs" / "masks"
    text = "\n".join(page.read_text(encoding="utf-8") for page in folder.glob("*.md"))
    named = set(re.findall(r'mask="([^"]+)"', text)) | set(re.findall(r"--mask ([^ `]+) ", text))
    assert len(named) > 7
    for mask in named:
        masks.resolve(mask)
    assert {f"{name}.png" for name in re.findall(r"\((\w+)\.png\)", text)} == {path.name for path in folder.glob("*.png")}
