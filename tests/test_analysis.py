import base64
import datetime
import itertools
import json
import math
import re
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import shira
from conftest import mlp, random_adapter
from shira import AdapterError, BaseMismatch, CheckpointError, SparseTensor
from shira.analysis import spectra as linalg

SEEDS = st.integers(0, 2**31)


def sparse(dense):
    """A dense matrix as linalg's."""
    flat = dense.double().reshape(-1)
    where = flat.nonzero().view(-1)
    return linalg.as_matrix(tuple(dense.shape), where, flat[where])


def scattered(shape, density, seed, dtype=torch.float64):
    """A dense matrix of small whole numbers, most of them zero: their products are exact, and some cancel."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) < density
    return (torch.randint(-2, 3, shape, generator=generator) * kept).to(dtype)


@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 30),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=SEEDS,
    block=st.sampled_from([1, 7, 100, linalg.BLOCK]),
    dense_from=st.sampled_from([0.0, linalg.DENSE_FROM, 2.0]),
)
def test_a_product_in_blocks_is_the_dense_one(rows, columns, density, seed, block, dense_from):
    one, other = scattered((rows, columns), density, seed), scattered((rows, columns), 0.3, seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linalg, "DENSE_FROM", dense_from)
        found = linalg.gram(sparse(one), sparse(other), block)
    product, terms = one.T @ other, (one != 0).double().T @ (other != 0).double()
    assert found.nonzero == int((terms > 0).sum())
    assert found.cancelled == int(((terms > 0) & (product == 0)).sum())
    assert found.squares == float(product.square().sum())


def test_a_product_holds_one_block_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(400, 300, generator=generator) * (torch.rand(400, 300, generator=generator) < 0.02) for _ in "ab")
    sizes = []
    whole = linalg._by_terms
    monkeypatch.setattr(linalg, "_by_terms", lambda *given: sizes.append(given[3] * 300) or whole(*given))
    found = linalg.gram(sparse(one), sparse(other), 3000)
    assert max(sizes) <= 3000 and len(sizes) >= 300 * 300 // 3000
    assert found.nonzero == int((one.T.ne(0).double() @ other.ne(0).double() > 0).sum())
    assert found.squares == pytest.approx(float((one.double().T @ other.double()).square().sum()), rel=1e-12)


def test_singular_values_and_what_follows():
    dense = scattered((40, 25), 0.1, 3) + torch.eye(40, 25, dtype=torch.float64)
    dense[7], dense[:, 4] = 0, 0  # an empty row and column
    for matrix in (dense, dense.T.contiguous()):
        found = linalg.spectrum(sparse(matrix))
        true = torch.linalg.svdvals(matrix)
        torch.testing.assert_close(found.values, true[: found.values.numel()])
        share = true[true > 1e-12] / true.sum()
        assert found.effective_rank == pytest.approx(float(torch.exp(-(share * share.log()).sum())))
        assert found.stable_rank == pytest.approx(float(true.square().sum() / true[0].square()))
        assert found.rank == torch.linalg.matrix_rank(matrix)
        assert found.energy(2.5) == pytest.approx(float((true[:2].square().sum() + true[2].square() / 2) / true.square().sum()))
        assert found.error is None
    empty = linalg.spectrum(sparse(torch.zeros(3, 4)))
    assert (empty.rank, empty.stable_rank, empty.effective_rank, empty.energy(1)) == (0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("decades", [0, 3])
def test_estimated_ranks_keep_to_their_error(monkeypatch, decades):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(300, 260, generator=generator, dtype=torch.float64)
    dense *= (torch.rand(300, 260, generator=generator) < 0.05) * torch.logspace(0, -decades, 260, dtype=torch.float64)
    true = linalg.spectrum(sparse(dense))
    monkeypatch.setattr(linalg, "EXACT_SIDE", 0)
    monkeypatch.setattr(linalg, "STEPS", 64)
    several = [linalg.spectrum(sparse(dense), seed) for seed in range(4)]
    misses = torch.tensor([each.effective_rank - true.effective_rank for each in several])
    errors = torch.tensor([each.error for each in several])
    assert errors.min() > 0 and errors.max() < 0.15 * true.effective_rank
    assert misses.square().mean().sqrt() < 2 * errors.square().mean().sqrt()
    found = several[0]
    assert found.values[0] == pytest.approx(float(true.values[0]), rel=1e-9)
    assert found.stable_rank == pytest.approx(true.stable_rank, rel=1e-9)
    assert found.counts.sum() == pytest.approx(260)
    assert found.rank is None and found.energy(3) is None


def test_an_estimate_of_a_low_rank_ends_where_the_space_does(monkeypatch):
    monkeypatch.setattr(linalg, "EXACT_SIDE", 0)
    one = linalg.spectrum(sparse(torch.arange(1.0, 31.0)[:, None] * torch.arange(1.0, 21.0)))
    assert one.values.isfinite().all()
    assert abs(one.effective_rank - 1) < 3 * one.error
    assert one.stable_rank == pytest.approx(1.0)


def dense_changes(adapter, base, name):
    """ΔW of one tensor in float64 and where it is held, the slow way."""
    change, held = torch.zeros(base[name].numel(), dtype=torch.float64), torch.zeros(base[name].numel(), dtype=torch.bool)
    if name in adapter.tensors:
        tensor = adapter.tensors[name]
        where = tensor.indices.long()
        change[where] = tensor.values.double()
        if tensor.kind == "overwrite":
            change[where] -= base[name].detach().reshape(-1)[where].double()
        held[where] = True
    return change.view(base[name].shape), held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_comparison_against_dense_matrices(dtype):
    model = mlp(dtype)
    base = dict(model.named_parameters())
    given = [random_adapter(model, 1), random_adapter(model, 2, 0.5, "delta"), random_adapter(model, 3)]
    same = base["0.weight"].detach().view(-1)[given[0].tensors["0.weight"].indices.long()]
    given[0].tensors["0.weight"].values[:20] = same[:20]  # held, and not changed
    del given[2].tensors["2.weight"]
    found = shira.compare(*given, base=model)
    assert found.adapters == ["random1", "random2", "random3"]
    assert list(found.tensors) == ["0.weight", "2.weight"]
    sums = {pair: [0.0] * 4 for pair in itertools.combinations(found.adapters, 2)}
    for name, part in found.tensors.items():
        dense = {a.name: dense_changes(a, base, name) for a in given}
        for label, change in part.changes.items():
            delta, held = dense[label]
            assert change.entries == held.sum() and change.changed == delta.count_nonzero()
            assert change.l2 == pytest.approx(float(delta.norm()))
            assert change.lora_rank == held.sum() / sum(delta.shape)
            assert change.rank == torch.linalg.matrix_rank(delta)
        assert ("random3" in part.changes) == (name == "0.weight")
        for pair in part.pairs:
            (one, held_one), (other, held_other) = dense[pair.first], dense[pair.second]
            both = held_one & held_other
            product = one.T @ other
            terms = one.ne(0).double().T @ other.ne(0).double() > 0
            assert pair.shared == both.sum()
            assert pair.jaccard == pytest.approx(float(both.sum() / (held_one | held_other).sum()))
            assert pair.overlap == pytest.approx(float(both.sum() / max(1, min(held_one.sum(), held_other.sum()))))
            assert pair.awom == pytest.approx(float(product.norm()))
            assert pair.awor == pytest.approx(1 - float(terms.double().mean()))
            assert pair.distance == pytest.approx(float((one - other).norm()))
            opposed = one * other < 0
            mass = one.abs() + other.abs()
            assert pair.conflicts == opposed.sum()
            assert pair.conflict_mass == pytest.approx(float(mass[opposed].sum() / mass.sum()))
            assert pair.shared_mass == pytest.approx(float(mass.view(-1)[both].sum() / mass.sum()))
            if other.any() and one.any():
                assert pair.cosine == pytest.approx(float((one * other).sum() / one.norm() / other.norm()))
                assert pair.awom_relative == pytest.approx(float(product.norm() / one.norm() / other.norm()))
            else:
                assert pair.cosine is None and pair.awom_relative == 0
            for place, value in enumerate((product.square().sum(), terms.sum(), terms.numel(), (one - other).square().sum())):
                sums[pair.first, pair.second][place] += float(value)
    for pair in found.total.pairs:
        squares, nonzero, size, distance = sums[pair.first, pair.second]
        assert pair.awom == pytest.approx(math.sqrt(squares))
        assert pair.awor == pytest.approx(1 - nonzero / size)
        assert pair.distance == pytest.approx(math.sqrt(distance))
    assert found.total.pair("random3", "random1") is found.total.pair("random1", "random3")
    assert found.total.changes["random1"].changed == given[0].nnz - 20
    assert sum(map(sum, found.histograms["random1"])) == given[0].nnz - 20
    json.dumps(found.as_dict(), allow_nan=False)


def delta(values, shape=(4,), where=None):
    values = torch.tensor(values)
    return SparseTensor(shape, torch.arange(values.numel()) if where is None else torch.tensor(where), values, "delta")


def test_deltas_need_no_base_and_names_are_told_apart():
    one = shira.Adapter({"w": delta([3.0, 4.0])}, {"name": "a"})
    other = shira.Adapter({"w": delta([5.0], where=[3])}, {"name": "a"})
    found = shira.compare(one, other, one, spectra=False)
    assert found.adapters == ["a", "a (2)", "a (3)"]
    apart, same = found.total.pair("a", "a (2)"), found.total.pair("a", "a (3)")
    assert (apart.shared, apart.jaccard, apart.cosine, apart.awor) == (0, 0.0, 0.0, 1.0)
    assert apart.distance == pytest.approx(math.sqrt(50))
    assert (same.shared, same.overlap, same.cosine, same.distance) == (2, 1.0, 1.0, 0.0)
    assert (same.awor, same.awom) == (0.0, 25.0)  # a vector is one column
    assert found.total.changes["a"].l2 == 5.0
    assert found.total.changes["a"].effective_rank is None
    assert shira.compare(one).total.pairs == []


def test_terms_that_cancel_are_told_from_zeros():
    one = shira.Adapter({"w": delta([1.0, 1.0], (2, 2), [0, 2])})  # a column of ones
    other = shira.Adapter({"w": delta([1.0, -1.0], (2, 2), [1, 3])})
    (pair,) = shira.compare(one, other).total.pairs
    assert (pair.awor, pair.cancelled, pair.awom) == (0.75, 0.25, 0.0)


def test_an_empty_adapter_and_one_without_changes():
    nothing = shira.Adapter({"w": SparseTensor((3, 3), torch.empty(0, dtype=torch.int64), torch.empty(0), "delta")})
    zeros = shira.Adapter({"w": delta([0.0, -0.0], (3, 3))})
    (pair,) = shira.compare(nothing, zeros).total.pairs
    assert (pair.awor, pair.awom, pair.cosine, pair.distance, pair.shared) == (1.0, 0.0, None, 0.0, 0)
    assert shira.compare(zeros).total.changes["1"].changed == 0


def test_what_cannot_be_compared(tmp_path):
    model, other = mlp(seed=0), mlp(seed=1)
    adapter, stranger = random_adapter(model, 1), random_adapter(other, 2)
    with pytest.raises(AdapterError, match="nothing to compare"):
        shira.compare()
    with pytest.raises(AdapterError, match="random1: '0.weight' holds overwritten values.*pass base="):
        shira.compare(adapter)
    with pytest.raises(BaseMismatch, match="random2 does not belong to this model.*fingerprint"):
        shira.compare(adapter, stranger, base=model)
    with pytest.raises(BaseMismatch, match="no tensor '0.weight'"):
        shira.compare(adapter, base={"v": torch.ones(2)})
    broken = shira.Adapter({"w": SparseTensor((4,), torch.tensor([1]), torch.tensor([1.0]))})
    with pytest.raises(BaseMismatch, match="1: the base holds NaN or infinite values under 'w'"):
        shira.compare(broken, base={"w": torch.full((4,), float("nan"))})
    with pytest.raises(AdapterError, match=r"'w' has different shapes in the adapters: \[\[4\], \[5\]\]"):
        shira.compare(shira.Adapter({"w": delta([1.0])}), shira.Adapter({"w": delta([1.0], (5,))}))
    for content in (None, "{", "[]", '{"weight_map": {"a": "none.safetensors"}}'):
        if content:
            (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(CheckpointError, match="no checkpoint|model.safetensors|weight_map"):
            shira.compare(adapter, base=tmp_path)


def test_a_checkpoint_folder_is_as_good_as_the_model(tmp_path):
    model = mlp()
    given = [random_adapter(model, 1), random_adapter(model, 2)]
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    expected = shira.compare(*given, base=model)
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    whole.mkdir(), shards.mkdir()
    save_file(tensors, whole / "model.safetensors")
    for name, tensor in tensors.items():
        save_file({name: tensor}, shards / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in tensors}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    assert shira.compare(*given, base=whole) == shira.compare(*given, base=str(shards)) == expected


@pytest.fixture
def run(run, monkeypatch, tmp_path):
    """Run the command line in a folder with a base and three adapters; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    model = mlp()
    (tmp_path / "base").mkdir()
    save_file({name: p.detach() for name, p in model.named_parameters()}, tmp_path / "base" / "model.safetensors")
    for number in (1, 2, 3):
        random_adapter(model, number).save(f"{number}.safetensors")

    return run


def test_the_command_prints_a_table_or_json(run):
    code, out, err = run("compare 1.safetensors 2.safetensors --base base")
    assert code == 0, err
    assert "random1, random2" in out and "their share" in out and "2/2" in err
    assert "…" not in out  # 80 columns hold it all
    code, out, _ = run("compare 1.safetensors 2.safetensors 3.safetensors --base base --json --no-spectra")
    facts = json.loads(out)
    assert len(facts["total"]["pairs"]) == 3 and facts["tensors"]["0.weight"]["shape"] == [11, 13]


def test_the_report_is_one_page_that_needs_nothing_else(run, tmp_path):
    code, out, err = run("compare 1.safetensors 2.safetensors 3.safetensors --base base --out a/report --tensor 2.weight")
    assert code == 0, err
    assert sorted(path.name for path in (tmp_path / "a" / "report").iterdir()) == ["compare.json", "index.html"]
    page = (tmp_path / "a" / "report" / "index.html").read_text()
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    pictures = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)">', page)
    assert len(pictures) == page.count("<img") == 5
    assert all(alt and base64.b64decode(data).startswith(b"\x89PNG") for alt, data in pictures)
    assert "viewport" in page and "One mask: 2.<wbr>weight" in page and len(page) < 1_000_000
    facts = json.loads((tmp_path / "a" / "report" / "compare.json").read_text())
    assert facts["adapters"] == ["random1", "random2", "random3"]
    today = datetime.date.today().isoformat()
    assert facts["made"] == {"base": "base", "date": today, "version": f"shira {shira.__version__}"}
    assert f"Base: base · {today} · shira {shira.__version__}" in page
    for sentence in ("random1 and random2: nearly orthogonal", "positions would leave", "up to 0.1 “nearly orthogonal”"):
        assert sentence in page
    assert run("compare 1.safetensors --base base --no-spectra --out a/report")[0] == 0  # replaces the first
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("mine")
    code, _, err = run("compare 1.safetensors --base base --out site")
    assert code == 1 and "site/index.html is there already and is of no report" in " ".join(err.split())
    assert (tmp_path / "site" / "index.html").read_text() == "mine"


def test_the_words_follow_from_the_numbers():
    from shira.analysis.words import DIRECTION, SCALES, chance_awor, chance_shared, in_words

    shape = (20, 10)

    def adapter(name, places, sign):
        indices = torch.tensor(places)
        values = torch.full((len(places),), sign)
        return shira.Adapter({"w": shira.SparseTensor(shape, indices, values, "delta")}, {"name": name})

    one, other = adapter("one", range(40), 1.0), adapter("other", range(30, 70), -2.0)
    found = shira.compare(one, other)
    assert chance_shared(found, "one", "other") == pytest.approx(40 * 40 / 200)
    assert chance_awor(found, "one", "other") == pytest.approx((1 - 0.2 * 0.2) ** 20)
    words, first, second = in_words(found)
    assert "one and other: partly opposed (cosine -0.25)" in words
    assert "share 10 positions, 25 % of the smaller one's, about as many as random ones would (8)" in words
    assert "At 100 % of these the signs differ: they mostly differ" in words
    assert "Adding them changes 70 entries and leaves 50.0 % of the change of one, and 87.5 % of that of other" in words
    assert first.startswith("one changes 40 of the 40 entries") and "can hold most of this change" in second
    apart, *_ = in_words(shira.compare(one, adapter("apart", range(100, 140), 1.0), spectra=False))
    assert "nearly orthogonal (cosine 0)" in apart and "share 0 positions, 0 % of the smaller one's, fewer than" in apart
    same, *rest = in_words(shira.compare(one, adapter("same", range(40), 3.0), spectra=False))
    assert "much the same (cosine 1)" in same and "more than random" in same and "mostly agree" in same
    assert "leaves 400.0 % of the change of one, and 133.3 % of that of same" in same
    assert not any("effective rank" in sentence for sentence in rest)
    nothing, *_ = in_words(shira.compare(one, adapter("nothing", [3], 0.0)))
    assert nothing == "one or nothing changes nothing, so they have no direction to compare."
    assert DIRECTION.as_text().startswith("cosine of the two changes: up to −0.5 “opposed”, up to −0.1 “partly opposed”")
    for scale in SCALES:  # a word holds up to and with its end, as the page says
        for (end, word), (_, above) in itertools.pairwise(scale.steps):
            assert scale.word(end) == word and scale.word(end + 1e-9) == above
            assert f"{end:g} “{word}”".replace("-", "−") in scale.as_text()


def test_a_report_of_deltas_and_odd_shapes(tmp_path):
    from shira.analysis import comparison as analysis
    from shira.analysis import pictures, report

    tensors = {"bias": delta([1.0, -2.0]), "conv.weight": delta([1.0, 2.0], (3, 2, 2, 2)), "<b>": delta([0.0], (1, 2000))}
    adapters = analysis.named([shira.Adapter(tensors), shira.Adapter({"bias": delta([1.0])})])
    for tensor in (None, *tensors):
        found = analysis.compare(*adapters.values())
        page = report.page(found, adapters, None, tensor)
        assert "<b>" not in page and page.count("<img") == 5
    assert pictures._cells((3, 500), torch.arange(1500)).eq(1).all()
    assert pictures._cells((500, 320), torch.tensor([0, 159_999])).sum() == pytest.approx(1 / 16 + 1 / 16)


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("compare 1.safetensors --base base --tensor 2.wight --out r", 1, "no adapter holds a tensor '2.wight'; did you mean"),
        ("compare 1.safetensors --out r", 1, "pass --base"),
        ("compare none.safetensors --out r", 1, "FileNotFoundError"),
        ("compare 1.safetensors --base nowhere --out r", 1, "DataError: cannot load 'nowhere'"),
        ("compare 1.safetensors --base nowhere --out 2.safetensors", 1, "DataError: --out: 2.safetensors is no folder"),
        ("compare 1.safetensors --base nowhere --out 2.safetensors/r", 1, "DataError: --out: .*2.safetensors is no folder"),
        ("compare", 2, "Missing argument"),
    ],
)
def test_errors_write_nothing(run, tmp_path, line, code, words):
    found, out, err = run(line)
    assert found == code
    assert re.search(words, re.sub(r"[│\s]+", " ", err)) and "Traceback" not in err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_a_package_the_extra_is_named(run, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = run("compare 1.safetensors 2.safetensors --base base --out r")
    assert code == 1 and "pip install 'shira-adapters[report]'" in err
    assert run("compare 1.safetensors 2.safetensors --base base")[0] == 0


def test_the_orthogonality_benchmark_runs_in_small(run, tmp_path):
    code, out, err = run(f"bench orthogonality --quick --plot {tmp_path}/plot.png")
    assert code == 0, err
    rows = {(row["side"], row["kind"]): row for row in (json.loads(line) for line in out.splitlines() if line[0] == "{")}
    assert len(rows) == 14 and (tmp_path / "plot.png").stat().st_size > 10_000
    assert rows[256, "dense"]["awor"] == rows[256, "LoRA"]["awor"] == 0
    assert rows[256, "rand"]["awor"] == pytest.approx((1 - 1e-4) ** 256, abs=0.002)  # no row is held by both
    assert rows[256, "Struct"]["awor"] > rows[256, "rand"]["awor"]
