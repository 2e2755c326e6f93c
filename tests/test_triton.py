"""The kernels for GPUs against the specification: on a GPU where there is one, else in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import bits
from shira import SparseTensor, kernels
from shira.fusion.combining import combine
from shira.fusion.methods import resolve
from shira.kernels import Sum, Write, WritePlan, reference
from shira.kernels.gpu import ops as triton_ops

pytest.importorskip("triton", reason="Triton is not installed: `make test-gpu` installs it and runs these tests")

from shira.kernels.gpu import switch as triton_switch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# numpy, in which the interpreter computes, warns of infinities that are meant
pytestmark = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [(1,), (0, 3), (7, 5), (13, 11, 3)]
ODD = torch.tensor([float("nan"), float("inf"), -0.0, 0.0, 1.5, -2.25])


@pytest.fixture
def windows(monkeypatch):
    """Several windows a tensor, and several blocks a window, which at the real sizes only large tensors have."""
    monkeypatch.setattr(triton_switch, "WINDOW", 128)
    monkeypatch.setattr(triton_switch, "BLOCK", 64)


def random_plan(weights, generator, densities):
    """Positions and values of every kind for each weight; a density of None is one position."""
    parts = []
    for number, weight in enumerate(weights):
        density = densities[number % len(densities)]
        chosen = (torch.rand(weight.numel(), generator=generator) < (1.0 if density is None else density)).nonzero().view(-1)
        if density is None and chosen.numel():
            chosen = chosen[torch.randint(chosen.numel(), (1,), generator=generator)]
        values = ODD[torch.randint(len(ODD), (chosen.numel(),), generator=generator)].to(weight.dtype)
        index = torch.int32 if torch.rand((), generator=generator) < 0.5 else torch.int64
        parts.append(Write(weight, chosen.to(DEVICE, index), values.to(DEVICE)))
    return parts


def states(tensors):
    return [bits(tensor) for tensor in tensors]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def after(act, plan, weights):
    """What a reference action leaves in the weights and in the stash; then the base again."""
    act(plan)
    found = states(weights), states(plan.stash)
    reference.restore_(plan, check=False)
    plan.begun[0] = 0
    return found


@given(
    seed=st.integers(0, 10**6),
    kinds=st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES)), min_size=1, max_size=3),
    densities=st.lists(st.sampled_from([0.0, None, 0.05, 0.5, 1.0]), min_size=1, max_size=3),
    missing=st.sampled_from([(0, 0), (1, 0), (0, 1), (2, 1)]),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_switches_keep_and_put_back_every_bit(windows, seed, kinds, densities, missing):
    """Base to A; A to B, with entries in common and tensors that only one has; A over A; back. Of all dtypes at once."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape, dtype in kinds]
    first, second = (WritePlan.of(random_plan(weights, generator, densities)[skip:]) for skip in missing)
    base = states(weights)
    with_first, with_second = (after(reference.swap_, plan, weights) for plan in (first, second))
    with kernels.backend("triton"):
        kernels.swap_(first)
        assert equal(states(weights), with_first[0]) and equal(states(first.stash), with_first[1])
        kernels.change_(first, second)
        assert equal(states(weights), with_second[0]) and equal(states(second.stash), with_second[1])
        assert not first.begun.any() and second.begun == len(second.writes)
        kernels.change_(second, first)
        assert equal(states(weights), with_first[0])
        twin = WritePlan.of([write._replace(values=write.values.flip(0)) for write in first.writes])
        over = twin.over(first)
        kernels.write_(over, first)
        for write in twin.writes:
            assert torch.equal(bits(kernels.gather(write.weight, write.indices)), bits(write.values))
        kernels.change_(over, second)
        assert equal(states(weights), with_second[0]) and equal(states(second.stash), with_second[1])
        kernels.restore_(second)
        assert equal(states(weights), base)


@given(
    seed=st.integers(0, 10**6),
    kinds=st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES[:3])), min_size=1, max_size=3),
    densities=st.lists(st.sampled_from([0.0, None, 0.3, 1.0]), min_size=1, max_size=3),
    strengths=st.lists(st.sampled_from([1.0, 0.3, -1.7, 0.0]), min_size=1, max_size=3),
    scale=st.sampled_from([1.0, 1e-41, 3e4]),
    change=st.booleans(),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sums_are_those_of_fuse_to_the_bit(windows, seed, kinds, densities, strengths, scale, change):
    """Subnormal and overflowing numbers too; against the reference, and against what `fuse` and the CPU compute."""
    generator = torch.Generator().manual_seed(seed)
    weights = [(scale * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE) for shape, dtype in kinds]
    parts, sums, expected = [], [], []
    for weight in weights:
        runs = [
            random_plan([weight], generator, densities[n % len(densities) :])[0].indices.int() for n in range(len(strengths))
        ]
        held = [(scale * torch.randn(run.numel(), generator=generator)).to(weight.dtype).to(DEVICE) for run in runs]
        union = reference.unite(runs)
        sums.append(Sum.of(union, list(zip(held, strengths, strict=True))))
        parts.append(Write(weight, union.indices, torch.empty_like(union.indices, dtype=weight.dtype)))
        if all(value.isfinite().all() for value in held):
            tensors = [
                (SparseTensor(tuple(weight.shape), run, value), strength)
                for run, value, strength in zip(runs, held, strengths, strict=True)
            ]
            base = reference.gather(weight, union.indices)
            expected.append(bits(combine("w", tensors, union, base, resolve("sum", {}))[1]))
    base = states(weights)
    plan = WritePlan.of(parts, sums)
    finite = []
    wanted = after(lambda plan: finite.append(reference.write_sums_(plan)), plan, weights)
    values = states(part.values for part in parts)
    assert len(expected) < len(parts) or equal(values, expected)
    for part in parts:
        part.values.fill_(7)
    plan = WritePlan.of(parts, sums)
    leaving = WritePlan.of(random_plan(weights, generator, [0.5])) if change else None
    with kernels.backend("triton"):
        if leaving is not None:
            kernels.swap_(leaving)
        assert kernels.write_sums_(plan, leaving) == finite[0]
        assert equal(states(plan.stash), wanted[1])
        if finite[0]:  # else some value is NaN, whose bits nobody is promised
            assert equal(states(weights), wanted[0]) and equal(states(part.values for part in parts), values)
        kernels.restore_(plan)
        assert equal(states(weights), base)
        kernels.swap_(plan)  # from now on a plan like any other
        assert not plan.sums and (not finite[0] or equal(states(weights), wanted[0]))
        kernels.restore_(plan)
        assert equal(states(weights), base)


def test_the_real_windows():
    weight = torch.randn(3, 50_021).to(DEVICE, torch.bfloat16)
    base = bits(weight)
    first, second = (WritePlan.of(random_plan([weight], torch.Generator().manual_seed(seed), [0.02])) for seed in (1, 2))
    wanted = after(reference.swap_, second, [weight])
    with kernels.backend("triton"):
        kernels.swap_(first)
        kernels.change_(first, second)
        assert equal([bits(weight)], wanted[0]) and equal(states(second.stash), wanted[1])
        kernels.restore_(second)
    assert torch.equal(bits(weight), base)


def test_a_launch_that_never_was_puts_nothing_back(monkeypatch):
    """Interrupted between the announcement and the launch: the stash holds nothing, and the base is there."""
    weight = torch.arange(40.0, device=DEVICE)
    first, second = (
        WritePlan.of(
            [Write(weight, torch.arange(n, 30, n, device=DEVICE), torch.full((len(range(n, 30, n)),), -1.0, device=DEVICE))]
        )
        for n in (2, 3)
    )
    base = bits(weight)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def put_back():
        kernels.restore_(second)
        kernels.restore_(first)
        for plan in (first, second):
            plan.begun[0] = 0

    with kernels.backend("triton"):
        for _ in range(2):
            for plan in (first, second):
                plan.stash[0].fill_(9)
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(triton_ops, "_run", interrupt)
                kernels.swap_(second)
            assert second.begun[0] == 1
            put_back()
            assert torch.equal(bits(weight), base)
            kernels.swap_(first)
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(triton_ops, "_run", interrupt)
                kernels.change_(first, second)
            put_back()
            assert torch.equal(bits(weight), base)
            kernels.swap_(first)
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(triton_ops, "_written", interrupt)  # after the launch, before the host knows of it
                kernels.change_(first, second)
            assert first.begun[0] == second.begun[0] == 1 or not first.begun[0]
            put_back()
            assert torch.equal(bits(weight), base)


def test_what_is_launched_is_made_once_for_weights_that_stay():
    weights = [torch.nn.Parameter(torch.zeros(50, device=DEVICE)) for _ in range(2)]
    parts = [Write(weight, torch.tensor([1, 49], device=DEVICE), torch.ones(2, device=DEVICE)) for weight in weights]
    first, second = WritePlan.of(parts), WritePlan.of(parts)
    with kernels.backend("triton"):
        kernels.prepare(first)
        kernels.prepare(second)
        made = [id(launch) for plan in (first, second) for launch in plan.launches.values()]
        assert [bits(w).any() for w in weights] == [False, False]
        for _ in range(3):
            kernels.swap_(first)
            kernels.change_(first, second)
            kernels.restore_(second)
        assert made == [id(launch) for plan in (first, second) for launch in plan.launches.values()]
        (one,), (other,) = first.launches.values(), second.launches.values()
        assert one.windows is other.windows and one.alive[0] is other.alive[0]
        versions = [weight._version for weight in weights]
        kernels.swap_(first)
        assert all(weight._version > version for weight, version in zip(weights, versions, strict=True))
        weights[0].data = torch.full((50,), 2.0, device=DEVICE)
        for call in (kernels.restore_, kernels.swap_, lambda plan: kernels.change_(plan, second)):
            with pytest.raises(kernels.WeightChanged):
                call(first)
        assert bool((weights[0] == 2).all()) and weights[1][49] == 1


def test_overwrite_moves_bits():
    for dtype in DTYPES:
        weight = torch.zeros(7, 5, dtype=dtype, device=DEVICE)
        values = ODD.to(DEVICE, dtype)
        with kernels.backend("triton"):
            kernels.overwrite_(weight, torch.tensor([0, 3, 8, 20, 33, 34], device=DEVICE), values)
            kernels.overwrite_(weight, torch.tensor([], dtype=torch.int32, device=DEVICE), values[:0])
        assert torch.equal(bits(weight.view(-1)[[0, 3, 8, 20, 33, 34]]), bits(values))
        assert int((weight != 0).sum()) == 4 and weight._version


@pytest.mark.parametrize(
    ("indices", "values"),
    [
        (torch.tensor([40]), torch.ones(1)),
        (torch.tensor([-1]), torch.ones(1)),
        (torch.tensor([1, 2, 3]), torch.ones(2)),  # every other one
        (torch.tensor([1]), torch.ones(1).double()),
        (torch.tensor([1]), torch.ones(2)),
        (torch.tensor([1.0]), torch.ones(1)),
    ],
)
def test_nothing_is_launched_that_would_write_elsewhere(indices, values):
    weight = torch.zeros(40, device=DEVICE)
    values, stash = values.to(DEVICE), torch.zeros_like(values, device=DEVICE)
    indices = indices.to(DEVICE)[::2] if len(indices) == 3 else indices.to(DEVICE)  # a copy to a device has no gaps
    plan = replace(WritePlan.of([Write(weight, indices, values)]), stash=(stash,))
    with kernels.backend("triton"), pytest.raises(IndexError):
        kernels.swap_(plan)
    assert not plan.begun.any() and not bits(weight).any()


@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(*[st.sampled_from(sides) for sides in ([1, 17, 70], [1, 33, 130], [1, 9, 131])]),
    dtype=st.sampled_from(DTYPES[:3]),
    index=st.sampled_from([torch.int32, torch.int64]),
    density=st.sampled_from([0.0, None, 0.03, 0.3]),
    way=st.sampled_from(["dense", "blocks", "sampled"]),
)
@settings(max_examples=25)
def test_the_gradient_at_positions_by_every_way(seed, sizes, dtype, index, density, way):
    tokens, rows, columns = sizes
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(tokens, 2 * rows, generator=generator).to(DEVICE, dtype)
    grad_output, input = wide[:, ::2], torch.randn(tokens, columns, generator=generator).to(DEVICE, dtype)
    density = 1.0 if density and rows * columns < 300 else density
    indices = random_plan([torch.empty(rows, columns)], generator, [density])[0].indices.to(DEVICE, index)
    exact = (grad_output.double().T @ input.double()).view(-1)[indices.long()]
    found = triton_ops.product(way, grad_output, input, indices)
    assert found.dtype == torch.float32
    tolerance = 1e-5 if way != "dense" or dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance * tokens**0.5)
