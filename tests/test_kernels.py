"""Every backend against the specification, on the same cases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import bits
from shira import AdapterError, kernels
from shira.files import encoding

pytestmark = pytest.mark.usefixtures("two_threads")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ODD = torch.tensor([float("nan"), float("inf"), -0.0, 0.0, 1.5, -2.25])


@given(
    shape=st.sampled_from([(7, 5), (1, 1), (64, 33), (13,), (3, 5, 7)]),
    dtype=st.sampled_from(DTYPES),
    index=st.sampled_from([torch.int32, torch.int64]),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 999),
)
def test_gather_and_overwrite_move_bits(shape, dtype, index, density, seed):
    generator = torch.Generator().manual_seed(seed)
    numel = torch.Size(shape).numel()
    pick = torch.randint(len(ODD), (2, numel), generator=generator)
    base, new = ODD[pick[0]].to(dtype).view(shape), ODD[pick[1]].to(dtype)
    indices = (torch.rand(numel, generator=generator) < density).nonzero().view(-1).to(index)
    results = []
    for name in kernels.BACKENDS:
        weight = base.clone()
        with kernels.backend(name):
            old = kernels.gather(weight, indices)
            kernels.overwrite_(weight, indices, new[indices.long()])
            written = bits(weight)
            kernels.overwrite_(weight, indices, old)
        assert torch.equal(bits(weight), bits(base))
        results.append((bits(old), written))
    for old, written in results[1:]:
        assert torch.equal(old, results[0][0])
        assert torch.equal(written, results[0][1])
    expected = base.clone().view(-1)
    expected[indices.long()] = new[indices.long()]
    assert torch.equal(results[0][1], bits(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 1, 1), (33, 20, 65), (0, 4, 4)])
def test_the_sampled_gradient_is_the_dense_one_at_the_positions(dtype, shape):
    tokens, outs, ins = shape
    torch.manual_seed(0)
    grad_output, input = torch.randn(tokens, outs).to(dtype), torch.randn(tokens, ins).to(dtype)
    exact = (grad_output.double().T @ input.double()).view(-1)
    for count in {0, 1, outs * ins}:
        indices = torch.randperm(outs * ins)[:count].sort().values
        for name in kernels.BACKENDS:
            with kernels.backend(name):
                sampled = kernels.sampled_gradient(grad_output, input, indices)
            assert sampled.dtype == torch.float32
            torch.testing.assert_close(
                sampled.double(), exact[indices], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
            )


def plan_over(weights, density, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for weight in weights:
        indices = (torch.rand(weight.numel(), generator=generator) < density).nonzero().view(-1)
        values = ODD[torch.randint(len(ODD), (indices.numel(),), generator=generator)].to(weight.dtype)
        parts.append(kernels.Write(weight, indices.to(torch.int32 if seed % 2 else torch.int64), values))
    return kernels.WritePlan.of(parts)


@pytest.mark.parametrize("name", kernels.BACKENDS)
@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
def test_a_plan_over_many_tensors_and_dtypes(name, density):
    """Large enough that threads share a tensor; restored by another backend than wrote it."""
    shapes = [(7, 5), (0, 3), (300, 401), (1,), (64, 33, 3)]
    torch.manual_seed(0)
    weights = [torch.randn(shape).to(dtype) for shape in shapes for dtype in DTYPES]
    before = [bits(weight) for weight in weights]
    for seed in (1, 2):
        plan = plan_over(weights, density, seed)
        versions = [weight._version for weight in weights]
        with kernels.backend(name):
            kernels.swap_(plan)
        assert plan.begun[0] == len(plan.writes)
        assert all(weight._version > version for weight, version in zip(weights, versions, strict=True) if weight.numel())
        for part, stash, old in zip(plan.writes, plan.stash, before, strict=True):
            expected = old.view(part.weight.dtype).clone()
            assert torch.equal(bits(stash), bits(expected[part.indices.long()]))
            expected[part.indices.long()] = part.values
            assert torch.equal(bits(part.weight), bits(expected))
        for other in kernels.BACKENDS:
            with kernels.backend(other):
                kernels.restore_(plan)
                assert all(torch.equal(bits(weight), old) for weight, old in zip(weights, before, strict=True))
                kernels.swap_(plan)
        kernels.restore_(plan)
        assert all(torch.equal(bits(weight), old) for weight, old in zip(weights, before, strict=True))


@pytest.mark.parametrize("name", kernels.BACKENDS)
def test_only_what_was_begun_is_restored(name):
    weights = [torch.zeros(5) for _ in range(3)]
    plan = plan_over(weights, 1.0, 1)
    for stash in plan.stash:
        stash.fill_(9.0)
    plan.begun[0] = 2
    with kernels.backend(name):
        kernels.restore_(plan, check=False)
    assert [int(weight[0]) for weight in weights] == [9, 9, 0]


@pytest.mark.parametrize("name", kernels.BACKENDS)
@pytest.mark.parametrize("act", ["data", "cast", "cast and back", "shape", "layout", "storage"])
def test_a_plan_is_for_the_weights_it_was_made_for(name, act):
    """Nothing goes to an address that was taken down earlier, even if the allocator has given it out again."""
    weight = torch.nn.Parameter(torch.arange(16.0).view(4, 4) / 3)
    plan = kernels.WritePlan.of([kernels.Write(weight, torch.tensor([1]), torch.ones(1))])
    for active in (False, True):
        if active:
            kernels.swap_(plan)
        before = weight.data
        layer = torch.nn.Linear(4, 4)
        layer.weight = weight
        match act:
            case "data":
                weight.data = torch.full((4, 4), 2.0)
            case "cast":
                layer.bfloat16()
            case "cast and back":
                layer.bfloat16().float()
            case "shape":
                weight.data = weight.data.view(2, 8)
            case "layout":
                weight.data = weight.data.T
            case "storage":
                weight.data = weight.data.view(torch.int32).view(torch.float32).clone()
        now = bits(weight)
        with kernels.backend(name):
            for call in (kernels.swap_, kernels.restore_, lambda plan: kernels.write_(plan.over(plan), plan)):
                with pytest.raises(kernels.WeightChanged):
                    call(plan)
        assert torch.equal(bits(weight), now)
        weight.data = before


@pytest.mark.parametrize("name", kernels.BACKENDS)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("act", ["scaled", "one entry"])
def test_entries_that_others_have_written_are_seen_and_nothing_is_written(name, which, act):
    """Through `.data`, which moves no version counter. Of a few entries each is looked at, of many a few."""
    large = act == "scaled"
    weights = [torch.randn(500 if large else 1, 40), torch.randn(900 if large else 1, 30).bfloat16()]
    plan = plan_over(weights, 0.5 if large else 0.2, 1)
    assert large or all(0 < part.indices.numel() <= 16 for part in plan.writes)
    other = kernels.WritePlan.of([part._replace(values=part.values.flip(0)) for part in plan.writes])
    before = [bits(weight) for weight in weights]
    with kernels.backend(name):
        kernels.swap_(plan)
        part = plan.writes[which]
        kept = part.weight.clone()
        if large:
            part.weight.data.mul_(1.5).add_(1)
        else:
            part.weight.data.view(-1)[int(part.indices[-1])] = 7.25
        foreign = [bits(weight) for weight in weights]
        for call in (kernels.restore_, lambda plan: kernels.change_(plan, other), lambda p: kernels.write_(other.over(p), p)):
            with pytest.raises(kernels.WeightChanged):
                call(plan)
            assert all(torch.equal(bits(weight), old) for weight, old in zip(weights, foreign, strict=True))
        part.weight.data.copy_(kept)
        over = other.over(plan)
        kernels.write_(over, plan)
        kernels.restore_(over)
    assert all(torch.equal(bits(weight), old) for weight, old in zip(weights, before, strict=True))


@pytest.mark.parametrize(
    ("weight", "indices", "values"),
    [
        (torch.zeros(4), torch.tensor([4]), torch.ones(1)),
        (torch.zeros(4), torch.tensor([-1]), torch.ones(1)),
        (torch.zeros(4, 4).T[:2], torch.tensor([1]), torch.ones(1)),
        (torch.zeros(4), torch.tensor([1, 2, 3])[::2], torch.ones(2)),
        (torch.zeros(4), torch.tensor([1]), torch.ones(1).double()),
        (torch.zeros(4), torch.tensor([1]), torch.ones(2)),
        (torch.zeros(4), torch.tensor([1.0]), torch.ones(1)),
    ],
)
def test_the_native_kernel_never_writes_where_it_must_not(weight, indices, values):
    before = bits(weight)
    with kernels.backend("native"), pytest.raises(IndexError):
        kernels.overwrite_(weight, indices, values)
    with kernels.backend("native"), pytest.raises(IndexError):
        kernels.swap_(kernels.WritePlan.of([kernels.Write(weight, indices, values)]))
    assert torch.equal(bits(weight), before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("wrong", [40_000, -1, 2**31 - 1, -(2**31), 2**40])
def test_a_position_outside_is_found_wherever_it_stands(dtype, wrong):
    if wrong == 2**40 and dtype == torch.int32:
        return
    weight = torch.zeros(200, 200)
    indices = torch.arange(0, 40_000, 2, dtype=dtype)
    indices[12_345] = wrong
    plan = kernels.WritePlan.of([kernels.Write(weight, indices, torch.ones(20_000))])
    with kernels.backend("native"), pytest.raises(IndexError, match="outside of a tensor of 40000"):
        kernels.swap_(plan)
    assert not weight.any() and not plan.begun.any()


def test_the_native_kernel_is_built_here():
    """Without a compiler torch's operators serve; but then this machine's figures are not what the docs say."""
    assert "native" in kernels.BACKENDS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 90, 50), (17, 700, 650), (300, 130, 640), (519, 640, 131)])
def test_the_sampled_product_where_it_is_chosen_and_where_not(monkeypatch, dtype, index, tokens, rows, columns):
    """Tokens and positions that fill no block, no tile and no group of four; against float64."""
    torch.manual_seed(0)
    wide = torch.randn(tokens, 2 * rows).to(dtype)
    grad_output, input = wide[:, ::2], torch.randn(tokens, columns).to(dtype)
    exact = (grad_output.double().T @ input.double()).view(-1)
    for density in (0.0, 0.003, 0.05):
        indices = (torch.rand(rows * columns) < density).nonzero().view(-1).to(index)
        for wins in (True, False):
            monkeypatch.setattr(kernels.native, "sampling_wins", lambda *sizes, wins=wins: wins)
            with kernels.backend("native"):
                sampled = kernels.sampled_gradient(grad_output, input, indices)
            tolerance = 1e-5 if wins or dtype == torch.float32 else 2e-2
            torch.testing.assert_close(sampled.double(), exact[indices], rtol=tolerance, atol=tolerance * tokens**0.5)


def test_large_sparse_matrices_are_sampled_and_small_ones_are_not():
    wins = kernels.native.sampling_wins
    assert wins(torch.float32, 4096, 4096, 167_772) and wins(torch.bfloat16, 4096, 4096, 167_772)
    assert not wins(torch.float32, 64, 64, 400)
    assert not wins(torch.float32, 4096, 4096, 4096 * 4096)
    assert not wins(torch.float16, 4096, 4096, 167_772)  # the kernel has no such type


def boolean(shape, kind):
    """Masks of the kinds that `find_whole_lines` tells apart."""
    chosen = torch.zeros(shape, dtype=torch.bool)
    rows, columns = shape
    if "rows" in kind:
        chosen[::7] = True
    if "columns" in kind:
        chosen[:, ::5] = True
    if "diagonal" in kind:
        chosen.diagonal().fill_(True)
    if "random" in kind:
        chosen |= torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.03
    if "one row" in kind:
        chosen[rows // 2] = True
    return chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 20), (20, 33), (40, 40), (1, 9), (9, 1)])
@pytest.mark.parametrize(
    "kind",
    [
        "rows",
        "columns",
        "rows diagonal",
        "columns diagonal",
        "diagonal",
        "random",
        "rows random",
        "one row random",
        "rows columns",
    ],
)
def test_whole_lines_give_the_gradient_of_the_reference(shape, kind, dtype):
    rows, columns = shape
    indices = boolean(shape, kind).view(-1).nonzero().view(-1)
    found_lines = kernels.find_whole_lines(indices, rows, columns)
    if "random" not in kind and kind != "diagonal" and min(shape) > 1 and kind != "rows columns":
        assert found_lines is not None and found_lines.direction == kind.split()[0]
    if found_lines is None:
        return
    torch.manual_seed(0)
    grad_output, input = torch.randn(17, rows).to(dtype), torch.randn(17, columns).to(dtype)
    kept = input[:, found_lines.lines] if found_lines.keeps_columns_only else input
    exact = (grad_output.double().T @ input.double()).view(-1)[indices]
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    found = found_lines.to(torch.device("cpu")).gradient(grad_output, kept)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance * 4)


def test_writing_does_not_move_a_weight():
    weight = torch.zeros(4, 4)
    where = weight.data_ptr()
    kernels.overwrite_(weight, torch.tensor([3]), torch.ones(1))
    assert weight.data_ptr() == where
    assert weight.view(-1)[3] == 1


@given(
    seed=st.integers(0, 999),
    densities=st.lists(st.sampled_from([0.0, 0.001, 0.1, 1.0]), min_size=1, max_size=5),
    numel=st.sampled_from([1, 63, 64, 200, 2**17 - 1, 2**17 + 1, 3 * 2**17]),
    index=st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=40)
def test_unite_finds_the_union_and_each_place_in_it(seed, densities, numel, index):
    generator = torch.Generator().manual_seed(seed)
    runs = [(torch.rand(numel, generator=generator) < density).nonzero().view(-1).to(index) for density in densities]
    held = torch.zeros(numel, dtype=torch.int32)
    for run in runs:
        held[run.long()] += 1
    for name in kernels.BACKENDS:
        with kernels.backend(name):
            indices, places, counts = kernels.unite(runs)
        assert torch.equal(indices, held.nonzero().view(-1).to(index)) and indices.dtype == index
        assert torch.equal(counts, held[held > 0]) and counts.dtype == torch.int32
        for run, place in zip(runs, places, strict=True):
            assert torch.equal(indices[place.long()], run) and place.dtype == torch.int32


def test_unite_refuses_positions_below_zero_in_c():
    if "native" in kernels.BACKENDS:
        with kernels.backend("native"), pytest.raises(IndexError):
            kernels.unite([torch.tensor([-5, 3])])


@pytest.mark.parametrize(
    ("indices", "values", "weight"),
    [
        (torch.tensor([4]), torch.ones(1), torch.zeros(4)),
        (torch.tensor([-1]), torch.ones(1), torch.zeros(4)),
        (torch.tensor([-1]), torch.ones(1), None),
        (torch.tensor([1]), torch.ones(2), torch.zeros(4)),
        (torch.tensor([1]), torch.ones(1), torch.zeros(4).double()),
        (torch.tensor([1]), torch.ones(1), torch.zeros(4, 4).T[:2]),
        (torch.tensor([[1]]), torch.ones(1), torch.zeros(4)),
    ],
)
def test_fusing_in_one_pass_reads_no_other_memory(indices, values, weight):
    change = kernels.Contribution(indices.int(), values, 1.0, False, True)
    with kernels.backend("native"), pytest.raises(IndexError):
        kernels.combine(weight, [change], torch.float32, "sum", 0 if weight is None else weight.numel())


@pytest.mark.parametrize(
    "units",
    [
        [3, 0],
        [255, 255, 0, 5],
        [254, 9],
        [255, 255, 255, 233, 0],
        [3],
        [3, 0, 1],
        [3, 0, 255],
        [255, 255, 255, 235, 0],
        [3, 255],
    ]
    + [[], [0] * 1000, [255] * 9, [65_535, 1], [998, 0], [999, 0]],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_gaps_are_fused_as_positions_are_or_not_at_all(units, dtype):
    """Two values in a tensor of a thousand entries: what leads elsewhere, or to another number of positions, is left alone."""
    array = torch.tensor(units).clamp(max=torch.iinfo(dtype).max).to(dtype)
    try:
        expected = encoding.decode(encoding.Stored("gap", array), (1000,), 2).tolist()
    except AdapterError:
        expected = None
    change = kernels.Contribution(array, torch.tensor([1.5, 2.5]), 1.0, True, True)
    with kernels.backend("native"):
        for weight, count in ((None, 2), (torch.zeros(1000), 1)):
            fused = kernels.combine(weight, [change] * count, torch.float32, "sum", 1000)
            assert (fused and (fused.indices.tolist(), fused.values.tolist())) == (
                expected and (expected, [1.5 * count, 2.5 * count])
            )


def test_what_no_kernel_fuses():
    """It says so, and the general way is taken."""
    change = kernels.Contribution(torch.tensor([1]), torch.ones(1), 1.0, False, True)
    narrow = change._replace(indices=change.indices.int())
    with kernels.backend("native"):
        assert kernels.combine(None, [narrow], torch.float32, "sum", 4).values.tolist() == [1.0]
        assert kernels.combine(None, [change], torch.float32, "sum", 4) is None
        assert kernels.combine(None, [narrow], torch.float16, "sum", 4) is None
        assert kernels.combine(None, [narrow], torch.float32, "ties", 4) is None
        assert kernels.combine(None, [narrow] * 255, torch.float32, "mean", 4).values.tolist() == [1.0]
        assert kernels.combine(None, [narrow] * 256, torch.float32, "mean", 4) is None  # meetings are counted in a byte
    with kernels.backend("torch"):
        assert kernels.combine(None, [narrow], torch.float32, "sum", 4) is None
