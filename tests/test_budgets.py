import functools
import math
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import shira
from conftest import all_bits, attach_is_refused, llama_batches, mlp, mlp_batches, mlp_loss, random_adapter, same_bits
from shira import MaskError, TargetError, masks
from shira.weights.targets import by_pattern

NAMES = ["e.weight", "c.weight", "a.weight", "b.weight", "d.weight"]  # the model's order is not the alphabet's


def attach(model, mask="wm", **options):
    return shira.attach(model, mask=mask, calibration=mlp_batches(), loss_fn=mlp_loss, **options)


def chosen(tuner):
    return {name: tensor.indices.tolist() for name, tensor in tuner.adapter().tensors.items()}


def best_over_model(scores, shared, floors, avoid):
    """All scores in one list, sorted: what the pool must find without holding them."""
    entries = [
        (-score, number, position)
        for number, name in enumerate(floors)
        for position, score in enumerate(scores[name].flatten().tolist())
        if position not in avoid[name]
    ]
    taken = []
    for number, least in enumerate(floors.values()):
        taken += sorted(entry for entry in entries if entry[1] == number)[:least]
    rest = sorted(set(entries) - set(taken))
    taken += rest[: shared - len(taken)]
    found = {name: sorted(p for _, n, p in taken if n == number) for number, name in enumerate(floors)}
    return {name: positions for name, positions in found.items() if positions}


@given(data=st.data(), seed=st.integers(0, 999), levels=st.integers(1, 12))
def test_a_stream_of_scores_gives_what_ranking_all_of_them_would(data, seed, levels):
    """Many ties, negative scores, floors, avoided entries, tensors in any order; and a bound on what is held."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {name: data.draw(st.integers(1, 60)) for name in NAMES}
    scores = {name: torch.randint(levels, (size,), generator=generator).float() - levels // 2 for name, size in sizes.items()}
    avoid = {name: (torch.rand(size, generator=generator) < 0.2).nonzero().view(-1) for name, size in sizes.items()}
    free = {name: size - avoid[name].numel() for name, size in sizes.items()}
    floors = {name: data.draw(st.integers(0, min(4, free[name]))) for name in NAMES}
    shared = sum(floors.values()) + data.draw(st.integers(0, 8) | st.integers(0, sum(free.values())))
    shared = min(shared, sum(free.values()))
    pool = masks.Pool(shared, floors)
    for name in data.draw(st.permutations(NAMES)):
        pool.add(name, scores[name], avoid[name])
        assert len(pool) <= 2 * shared
    found = {name: positions.tolist() for name, positions in pool.positions().items()}
    assert found == best_over_model(scores, shared, floors, {name: set(p.tolist()) for name, p in avoid.items()})
    assert sum(map(len, found.values())) == shared


def test_the_pool_holds_little_of_many_tensors():
    pool = masks.Pool(100, dict.fromkeys(map(str, range(50)), 0))
    everything = torch.randn(50, 400, generator=torch.Generator().manual_seed(0))
    for number in range(50):
        pool.add(str(number), everything[number])
        assert len(pool) <= 200
    positions = torch.cat([int(name) * 400 + found for name, found in pool.positions().items()])
    assert torch.equal(positions, masks.top_k(everything, 100))


def test_the_pool_refuses_nan_and_scores_that_are_too_few():
    with pytest.raises(MaskError, match="'a.weight': scores hold NaN"):
        masks.Pool(1, {"a.weight": 0}).add("a.weight", torch.tensor([1.0, float("nan")]))
    with pytest.raises(MaskError, match="'a.weight': fewer than the 2 entries of its floor"):
        masks.Pool(2, {"a.weight": 2}).add("a.weight", torch.tensor([1.0, -math.inf]))
    pool = masks.Pool(2, {"a.weight": 0})
    pool.add("a.weight", torch.tensor([1.0, -math.inf]))
    with pytest.raises(MaskError, match="2 more entries are to train over the model, but only 1 have a score"):
        pool.positions()


@given(
    sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=6),
    share=st.floats(0, 1),
    least=st.lists(st.floats(0, 1), min_size=6, max_size=6),
)
def test_sharing_out_is_exact_in_proportion_and_above_the_floors(sizes, share, least):
    named = {str(number): size for number, size in enumerate(sizes)}
    total = int(share * sum(sizes))
    floors = {
        name: int(part * total * size / max(1, sum(sizes))) for (name, size), part in zip(named.items(), least, strict=False)
    }
    floors["0"] = min(sizes[0], total - sum(floors.values()) + floors["0"])  # one that may well be above its proportion
    counts = masks.share_out(total, named, floors)
    assert sum(counts.values()) == total
    assert all(floors[name] <= counts[name] <= size for name, size in named.items())
    free = [name for name in named if counts[name] > floors[name] and named[name]]
    ratio = [Fraction(counts[name], named[name]) for name in free]
    for name, own in zip(free, ratio, strict=True):  # within one entry of each other's proportion
        assert all(
            abs(own - other) * named[name] <= 1 + Fraction(named[name], named[n]) for n, other in zip(free, ratio, strict=True)
        )


@pytest.mark.parametrize("mask", ["wm", "grad", "snip", functools.partial(masks.wm, bottom=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scope_model_is_one_ranking_over_all_targets(mask, dtype):
    model = mlp(dtype)
    dense = mlp(dtype)
    for batch in mlp_batches():
        mlp_loss(dense, batch).backward()
    score = {
        "wm": lambda p: p.detach().float().abs(),
        "grad": lambda p: p.grad.float().abs(),
        "snip": lambda p: (p.detach().float() * p.grad.float()).abs(),
    }.get(mask, lambda p: -p.detach().float().abs())
    scores = {name: score(dense.get_parameter(name)) for name in ("0.weight", "2.weight")}
    for total, floor in ((1, 0.0), (20, 0.0), (20, 0.5), (20, 1.0), (198, 0.0)):
        own = masks.share_out(total, {"0.weight": 143, "2.weight": 55}, {"0.weight": 0, "2.weight": 0})
        floors = {name: math.ceil(floor * count) for name, count in own.items()}
        with attach(model, mask, total=total, scope="model", floor=floor) as tuner:
            assert tuner.nnz == total
            assert chosen(tuner) == best_over_model(scores, total, floors, {name: set() for name in floors})


def test_a_target_that_gets_no_entry_is_left_out():
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    before = all_bits(model)
    with attach(model, total=9, scope="model") as tuner:
        assert list(chosen(tuner)) == ["0.weight"]
        mlp_loss(model, mlp_batches(1)[0]).backward()
    with attach(model, total=9, scope="model", floor=0.01) as tuner:
        assert {name: len(positions) for name, positions in chosen(tuner).items()} == {"0.weight": 8, "2.weight": 1}
    assert same_bits(before, all_bits(model))


@pytest.mark.parametrize("budget", [{"density": 0.1}, {"rank": 1}, {"total": 33}])
def test_a_floor_of_one_is_scope_tensor(budget):
    model = mlp()
    with attach(model, "snip", **budget) as tuner:
        local = chosen(tuner)
    with attach(model, "snip", scope="model", floor=1, **budget) as tuner:
        assert chosen(tuner) == local


def test_scope_model_calibrates_once(tiny_llama):
    calls = []

    def loss_fn(model, batch):
        calls.append(batch)
        return model(**batch).loss

    with shira.attach(
        tiny_llama, mask="snip", total=77, scope="model", floor=0.1, calibration=llama_batches(2), loss_fn=loss_fn
    ) as tuner:
        assert len(calls) == 2
        assert tuner.nnz == 77


@given(total=st.integers(2, 198), mask=st.sampled_from(["wm", "rand"]), scope=st.sampled_from(["tensor", "model"]))
def test_a_total_is_exact(total, mask, scope):
    with attach(mlp(), mask, total=total, scope=scope) as tuner:
        assert tuner.nnz == total == tuner.adapter().nnz
        if scope == "tensor" or mask == "rand":
            counts = {name: len(positions) for name, positions in chosen(tuner).items()}
            assert abs(counts.get("0.weight", 0) - total * 143 / 198) <= 1


def test_overrides_by_name_suffix_and_wildcard(tiny_llama):
    overrides = {"down_proj": 0.5, "layers.0.self_attn.*": {"rank": 1}, "model.layers.1.mlp.up_proj.weight": {"total": 7}}
    for scope in ("tensor", "model"):
        with shira.attach(tiny_llama, density=0.1, overrides=overrides, scope=scope) as tuner:
            counts = {name.removeprefix("model.layers."): len(p) for name, p in chosen(tuner).items()}
            assert tuner.adapter().metadata["mask"]["overrides"] == overrides
        assert counts["0.mlp.down_proj.weight"] == counts["1.mlp.down_proj.weight"] == 480
        assert counts["0.self_attn.q_proj.weight"] == 48
        assert counts["0.self_attn.k_proj.weight"] == 36
        assert counts["1.mlp.up_proj.weight"] == 7
        others = {"0.mlp.up_proj.weight": 96, "0.mlp.gate_proj.weight": 96, "1.mlp.gate_proj.weight": 96}
        others |= {"1.self_attn.q_proj.weight": 58, "1.self_attn.o_proj.weight": 58}
        others |= {"1.self_attn.k_proj.weight": 29, "1.self_attn.v_proj.weight": 29}
        if scope == "tensor":
            assert {name: counts[name] for name in others} == others
        else:
            assert sum(counts[name] for name in others if name in counts) == sum(others.values())


def test_a_total_counts_overrides():
    with attach(mlp(), total=50, overrides={"2": {"total": 11}}) as tuner:
        assert {name: len(positions) for name, positions in chosen(tuner).items()} == {"0.weight": 39, "2.weight": 11}


def test_a_pattern_means_a_whole_name_or_a_suffix_after_a_dot():
    names = ["model.up.weight", "model.startup.weight", "layers.1.up.weight", "layers.11.up.weight"]
    assert list(by_pattern(names, {"up": 1})) == [names[0], names[2], names[3]]
    assert list(by_pattern(names, {"layers.1.*": 1})) == [names[2]]
    assert by_pattern(names, {"model.*": 1, "layers.1?.up": 2}) == {names[0]: 1, names[1]: 1, names[3]: 2}
    with pytest.raises(TargetError, match=r"'uq' matches none of 4 tensors; did you mean 'up'"):
        by_pattern(names, {"uq": 1})
    assert by_pattern(names, {"up": 1, "layers.1.*": 2})[names[2]] == 2
    assert by_pattern(names, {"layers.1.*": 2, "up": 1})[names[2]] == 1


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"density": 0.1, "total": 5}, MaskError, "one of them"),
        ({"total": 0}, MaskError, "from 1 on, found 0"),
        ({"total": 2.5}, MaskError, "from 1 on, found 2.5"),
        ({"total": 1}, MaskError, "leaves 1 for 2 tensors that need at least 2 and hold 198"),
        ({"total": 199}, MaskError, "total=199 does not fit.*hold 198"),
        (
            {"total": 20, "overrides": {"0": {"total": 19}}, "scope": "model", "floor": 2},
            MaskError,
            "floor must be from 0 to 1",
        ),
        ({"total": 20, "overrides": {"0": {"total": 20}}}, MaskError, "overrides take 20, which leaves 0 for 1 tensors"),
        (
            {"total": 20, "overrides": {"0": {"total": 5}, "2": {"total": 6}}},
            MaskError,
            "overrides take 11, which leaves 9 for 0",
        ),
        ({"overrides": {"0": {"total": 144}}}, MaskError, "'0.weight': total must be a whole number from 1 to 143, found 144"),
        ({"overrides": {"0": 2}}, MaskError, "'0.weight': density must be above 0 and at most 1, found 2; 2 % is 0.02"),
        ({"overrides": {"0": "much"}}, MaskError, "'0.weight': density must be above 0"),
        ({"overrides": {"0": {"rank": 7}}}, MaskError, "'0.weight': rank must be from 1 to 5"),
        ({"overrides": {"0": {"share": 7}}}, MaskError, "'0.weight': an override is a density, or one of"),
        ({"overrides": {"1": 0.1}}, TargetError, "'1' matches none of 2 tensors"),
        ({"scope": "global"}, MaskError, "scope must be 'tensor' or 'model', found 'global'"),
        ({"floor": 0.5}, MaskError, "floor=0.5 has a meaning with scope='model' only"),
        ({"scope": "model", "mask": "struct", "density": 0.3}, MaskError, "'struct' ranks no scores"),
        ({"scope": "model", "mask": lambda weight, k: weight}, MaskError, "ranks no scores.*one of wm"),
        ({"scope": "model", "mask": "snip", "calibration": None}, MaskError, "pass calibration="),
    ],
)
def test_a_budget_that_cannot_be_had_changes_nothing(options, error, words):
    attach_is_refused(options, error, words)


@pytest.mark.parametrize("options", [{}, {"rank": 1}, {"total": 5}, {"scope": "model"}, {"overrides": {"empty": 0.5}}])
def test_a_target_without_entries_is_named(options):
    model = nn.Sequential(nn.Linear(4, 4))
    model.empty = nn.Parameter(torch.zeros(0, 4))
    with pytest.raises(MaskError, match=r"tensor 'empty' has no entries, its shape is \[0, 4\]; leave it out of the targets"):
        shira.attach(model, targets=["0", "empty"], **options)


def test_the_adapter_says_how_its_budget_was_shared(tmp_path):
    with attach(
        mlp(), "snip", total=20, scope="model", floor=0.25, overrides={"2": 0.2}, avoid=random_adapter(mlp(), 1)
    ) as tuner:
        tuner.adapter().save(tmp_path / "x.safetensors")
    recorded = shira.load(tmp_path / "x.safetensors").metadata["mask"]
    assert {key: recorded.get(key) for key in ("density", "total", "scope", "floor", "overrides", "avoid")} == {
        "density": None,
        "total": 20,
        "scope": "model",
        "floor": 0.25,
        "overrides": {"2": 0.2},
        "avoid": ["random1"],
    }


def test_the_snippets_of_the_page_run(tiny_llama):
    page = Path(__file__).parents[1] / "docs" / "masks" / "budgets.md"
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) == 4
    before, names = all_bits(tiny_llama), {"shira": shira, "torch": torch, "model": tiny_llama, "batches": llama_batches(4)}
    for snippet in snippets:
        exec(snippet, names)
        assert same_bits(before, all_bits(tiny_llama))
    for name, tensor in names["first"].tensors.items():
        assert not torch.isin(tensor.indices, names["second"].tensors[name].indices).any()
    assert names["moved"] > 0
