"""Sparse products for the rows of several adapters: every backend against the definition, and what is refused."""

import copy
import dataclasses
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import bits
from shira import AdapterError, kernels
from shira.kernels.sparse_product import SparseLayout

pytestmark = pytest.mark.usefixtures("two_threads")

WIDE, HALF = torch.float32, torch.bfloat16
INF, NAN = float("inf"), float("nan")


def dense(change):
    """The change as a matrix [out, in], float64."""
    matrix = torch.zeros(change.shape, dtype=torch.float64)
    rows = torch.repeat_interleave(torch.arange(change.shape[0]), change.starts.diff())
    matrix[rows, change.columns.long()] = change.changes.double()
    return matrix


def change_of(shape, density, generator, *, whole=False):
    """Changes at random positions; as whole numbers, sums of which are exact in any order."""
    indices = (torch.rand(shape[0] * shape[1], generator=generator) < density).nonzero().view(-1)
    values = torch.randn(indices.numel(), generator=generator)
    return kernels.row_change(indices, (3 * values).round() if whole else values, shape)


def matrix(*entries, shape):
    """A change with these (row, column, change), in order."""
    return kernels.row_change(
        torch.tensor([row * shape[1] + column for row, column, _ in entries]),
        torch.tensor([value for *_, value in entries]),
        shape,
    )


def groups_of(sizes, shape, density, generator, **more):
    """(groups, rows): groups of these numbers of rows, behind each (rows before it, rows in it)."""
    groups, row = [], 0
    for gap, size in sizes:
        groups.append((row + gap, row + gap + size, change_of(shape, density, generator, **more)))
        row += gap + size
    return groups, row


def added(name, output, input, groups):
    """The output of a backend, as a new tensor."""
    result = output.clone(memory_format=torch.contiguous_format)
    with kernels.backend(name):
        kernels.add_products_(result, input, groups)
    return result


@given(
    shape=st.tuples(st.integers(1, 200), st.integers(1, 70)),
    sizes=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 40])), max_size=5),
    tail=st.integers(0, 3),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    outputs=st.sampled_from([WIDE, HALF, torch.float16, torch.float64]),
    inputs=st.sampled_from([WIDE, HALF, torch.float16, torch.float64]),
    seed=st.integers(0, 999),
)
def test_whole_numbers_give_the_same_bits_everywhere(shape, sizes, tail, density, outputs, inputs, seed):
    generator = torch.Generator().manual_seed(seed)
    groups, rows = groups_of(sizes, shape, density, generator, whole=True)
    output = torch.randint(-9, 10, (rows + tail, shape[0]), generator=generator).to(outputs)
    input = torch.randint(-4, 5, (rows + tail, shape[1]), generator=generator).to(inputs)
    exact = output.double().clone()
    for first, end, change in groups:
        exact[first:end] += input[first:end].double() @ dense(change).T
    for name in kernels.BACKENDS:
        assert torch.equal(bits(added(name, output, input, groups) + 0), bits(exact.to(outputs) + 0)), name  # + 0: no -0.0


@given(
    shape=st.tuples(st.sampled_from([1, 63, 64, 65, 130]), st.sampled_from([1, 50, 300])),
    size=st.sampled_from([1, 2, 4, 7, 16, 20]),
    density=st.sampled_from([0.03, 0.5]),
    dtype=st.sampled_from([WIDE, HALF]),
    seed=st.integers(0, 999),
)
def test_sums_are_as_near_as_float32_allows(shape, size, density, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    groups, rows = groups_of([(1, size), (0, 1)], shape, density, generator)
    output = torch.randn(rows, shape[0], generator=generator).to(dtype)
    input = torch.randn(rows, shape[1], generator=generator).to(dtype)
    exact, sizes, terms = output.double(), output.double().abs(), torch.zeros(rows, shape[0], dtype=torch.float64)
    for first, end, change in groups:
        exact[first:end] += input[first:end].double() @ dense(change).T
        sizes[first:end] += input[first:end].double().abs() @ dense(change).abs().T
        terms[first:end] += change.starts.diff()
    of_sums = (terms + 2) * 2.0**-24 * sizes  # each term is rounded once, and each addition
    allowed = of_sums + torch.finfo(dtype).eps / 2 * (exact.abs() + of_sums)
    for name in kernels.BACKENDS:
        wrong = (added(name, output, input, groups).double() - exact).abs()
        assert bool((wrong <= allowed).all()), f"{name}: {float((wrong - allowed).max())} too far"


@pytest.mark.parametrize("name", kernels.BACKENDS)
@pytest.mark.parametrize("size", [1, 4, 7, 16, 18])
def test_the_sum_is_rounded_once_and_ties_go_to_even(name, size):
    """In bfloat16, 1 + 2⁻⁷ is next to 1."""
    step = 2.0**-7
    change = matrix(
        *[(0, 0, step / 2), (1, 0, step / 2), (2, 0, step / 2), (2, 1, step / 64)],
        *[(3, column, step / 4) for column in range(3)],
        (4, 0, -step / 4),
        shape=(6, 3),
    )
    output = torch.tensor([1.0, 1 + step, 1.0, 1.0, 1.0, 1.0]).expand(size, 6).to(HALF)
    expected = torch.tensor([1.0, 1 + 2 * step, 1 + step, 1 + step, 1.0, 1.0]).expand(size, 6).to(HALF)
    assert torch.equal(added(name, output, torch.ones(size, 3, dtype=HALF), [(0, size, change)]), expected)


@pytest.mark.parametrize("name", kernels.BACKENDS)
@pytest.mark.parametrize("size", [1, 4, 7, 16, 18])
@pytest.mark.parametrize("dtype", [WIDE, HALF])
def test_what_is_not_finite(name, size, dtype):
    """It stays where the change has an entry, and in its row: other features and other rows are as they were."""
    shape = (9, 70)
    entries = [
        (0, 0, 1.0),
        (1, 1, 2.0),
        (2, 0, 1.0),
        (2, 69, 1.0),
        (3, 2, 1.0),
        (4, 3, 1.0),
        (6, 5, INF),
        (7, 6, NAN),
        (8, 3, 3e38),
    ]
    row = torch.zeros(70)
    row[:6] = torch.tensor([INF, NAN, 1.0, 3e38, INF, 1.0])
    row[69] = -INF
    input = torch.zeros(size, 70)
    input[size // 2] = row
    output = torch.ones(size, 9)
    output[:, 3], output[:, 5] = INF, NAN
    output[size // 2, 4] = 3.3e38
    found = added(name, output.to(dtype), input.to(dtype), [(0, size, matrix(*entries, shape=shape))])
    expected = torch.ones(size, 9)
    expected[:, 3], expected[:, 5], expected[:, 6], expected[:, 7] = INF, NAN, NAN, NAN  # 0 · inf is not a number
    expected[size // 2] = torch.tensor([INF, NAN, NAN, INF, INF, NAN, INF, NAN, INF])
    assert torch.equal(found.nan_to_num(7.0, 8.0, 9.0), expected.to(dtype).nan_to_num(7.0, 8.0, 9.0))


@pytest.mark.parametrize("name", kernels.BACKENDS)
def test_rows_of_no_group_keep_their_bits(name):
    odd = torch.tensor([NAN, INF, -INF, -0.0, 0.0]).to(HALF)
    output = odd.repeat(12).view(12, 5)
    full = kernels.row_change(torch.arange(15), torch.ones(15), (5, 3))
    empty = kernels.row_change(torch.tensor([], dtype=torch.int32), torch.ones(0), (5, 3))
    groups = [(2, 2, full), (3, 5, full), (5, 6, full), (8, 8, full), (9, 10, full), (12, 12, full)]
    result = added(name, output, torch.ones(12, 3, dtype=HALF), groups)
    outside = [0, 1, 2, 6, 7, 8, 10, 11]
    assert torch.equal(bits(result[outside]), bits(output[outside]))
    assert bool((result[[3, 4, 5, 9]][:, 3:] == 3).all())
    for groups in ([], [(0, 12, empty)], [(0, 0, full)]):
        assert torch.equal(added(name, output, torch.ones(12, 3, dtype=HALF), groups).nan_to_num(7.0), output.nan_to_num(7.0))


@pytest.mark.parametrize("name", kernels.BACKENDS)
@pytest.mark.parametrize(("rows", "outs", "ins"), [(0, 4, 3), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_sides_of_length_zero(name, rows, outs, ins):
    change = kernels.row_change(torch.zeros(0, dtype=torch.int64), torch.zeros(0), (outs, ins))
    output = torch.ones(rows, outs)
    assert torch.equal(added(name, output, torch.ones(rows, ins), [(0, rows, change)]), output)


@pytest.mark.parametrize("name", kernels.BACKENDS)
@pytest.mark.parametrize("dtype", [WIDE, HALF, torch.float16])
def test_inputs_of_any_layout(name, dtype):
    """Rows are counted over all leading dimensions. An output that is its own input gets the products of what was there."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randint(-4, 5, (12, 6), generator=generator).to(dtype)
    groups = [(first, end, change_of((6, 6), 0.5, generator, whole=True)) for first, end in ((1, 2), (3, 8), (10, 12))]
    output = torch.randint(-4, 5, (12, 6), generator=generator).to(dtype)
    expected = added("reference", output, flat, groups)
    wider = torch.full((12, 14), NAN, dtype=dtype)
    wider[:, 1:13:2] = flat
    for input in (flat.T.contiguous().T, wider[:, 1:13:2], flat.clone().requires_grad_()):
        assert torch.equal(added(name, output, input, groups), expected)
    for shape in ((3, 4, 6), (2, 2, 3, 6)):
        turned = flat.view(shape).transpose(0, 1).contiguous().transpose(0, 1)
        assert not turned.is_contiguous()
        assert torch.equal(added(name, output.view(shape), turned, groups), expected.view(shape))
    own = flat.clone()
    with kernels.backend(name):
        kernels.add_products_(own, own, groups)
    assert torch.equal(own, added("reference", flat, flat.clone(), groups))
    row = kernels.row_change(torch.tensor([0]), torch.tensor([2.0]), (6, 6))
    assert added(name, output[0], flat[0], [(0, 1, row)])[0] == output[0, 0] + 2 * flat[0, 0]


@pytest.mark.parametrize("name", kernels.BACKENDS)
def test_gradients_inference_mode_and_autocast(name):
    """No gradient passes through, autograd sees that the output has changed, and autocast does not narrow the sums."""
    change = kernels.row_change(torch.tensor([0, 1]), torch.tensor([1.0, 2.0**-12]), (1, 2))
    weight = torch.ones(3, 1, requires_grad=True)
    output = weight * 2
    version = output._version
    with kernels.backend(name):
        kernels.add_products_(output, torch.ones(3, 2), [(1, 2, change)])
        assert output._version > version and output.detach().view(-1).tolist() == [2.0, 3 + 2.0**-12, 2.0]
        with torch.inference_mode():
            output = torch.ones(3, 1)
            kernels.add_products_(output, torch.ones(3, 2), [(0, 3, change)])
        assert output.view(-1).tolist() == [2 + 2.0**-12] * 3
        output = torch.ones(3, 1)
        with torch.autocast("cpu", torch.bfloat16):
            kernels.add_products_(output, torch.ones(3, 2), [(0, 3, change)])
        assert output.view(-1).tolist() == [2 + 2.0**-12] * 3


@pytest.mark.parametrize("dtype", [WIDE, HALF])
def test_rows_of_c_depend_on_neither_threads_nor_other_rows(dtype):
    generator = torch.Generator().manual_seed(0)
    shape = (300, 90)
    groups, rows = groups_of([(0, 1), (1, 3), (0, 7), (0, 60), (2, 1), (0, 25)], shape, 0.3, generator)
    groups[-1] = (*groups[-1][:2], kernels.row_change(torch.arange(5, 2000), torch.randn(1995), shape))  # all in a few features
    output, input = torch.randn(rows, 300).to(dtype), torch.randn(rows, 90).to(dtype)
    expected = added("native", output, input, groups)
    alone = [(row, row + 1, change) for first, end, change in groups for row in range(first, end)]
    assert torch.equal(bits(added("native", output, input, alone)), bits(expected))
    for threads in (1, 3, 70):
        torch.set_num_threads(threads)
        assert torch.equal(bits(added("native", output, input, groups)), bits(expected))


def whole_change(shape=(4, 3)):
    return kernels.row_change(torch.arange(shape[0] * shape[1]), torch.ones(shape[0] * shape[1]), shape)


def written(change):
    change.columns[1] = 1000
    return change


def started(change):
    change.starts.add_(1)
    return change


@pytest.mark.parametrize("name", kernels.BACKENDS)
@pytest.mark.parametrize(
    ("output", "input", "groups", "error"),
    [
        (torch.ones(5, 4, 2)[..., 0], torch.ones(5, 3), [(0, 5, whole_change())], "contiguous"),
        (torch.ones(4, 5).T, torch.ones(5, 3), [(0, 5, whole_change())], "contiguous"),
        (torch.ones(5, 1).expand(5, 4), torch.ones(5, 3), [(0, 5, whole_change())], "contiguous"),
        (torch.ones(5, 4), torch.ones(4, 3), [(0, 5, whole_change())], "same rows"),
        (torch.ones(5, 4), torch.ones(5, 1, 3), [(0, 5, whole_change())], "same rows"),
        (torch.ones(5, 4).int(), torch.ones(5, 3), [(0, 5, whole_change())], "floating point, found int32"),
        (torch.ones(5, 4), torch.ones(5, 3).long(), [(0, 5, whole_change())], "int64"),
        (torch.ones(5, 4), torch.ones(5, 3, device="meta"), [(0, 5, whole_change())], "same device"),
        (torch.ones(()), torch.ones(()), [(0, 1, whole_change())], "floating point"),
        (torch.ones(5, 4), torch.ones(5, 3), [(0, 5, whole_change((3, 4)))], "a change .3, 4. on cpu"),
        (torch.ones(5, 4), torch.ones(5, 3), [(0, 1, whole_change()), (1, 2, whole_change((4, 4)))], "a change .4, 4. on cpu"),
        (torch.ones(5, 4), torch.ones(5, 3), [(0, 6, whole_change())], "up to 6 in an output of 5 rows"),
        (torch.ones(5, 4), torch.ones(5, 3), [(6, 6, whole_change())], "up to 6 in an output of 5 rows"),
        (torch.ones(5, 4), torch.ones(5, 3), [(-1, 2, whole_change())], "found -1 to 2 after 0"),
        (torch.ones(5, 4), torch.ones(5, 3), [(3, 2, whole_change())], "found 3 to 2 after 0"),
        (torch.ones(5, 4), torch.ones(5, 3), [(0, 2, whole_change()), (1, 3, whole_change())], "found 1 to 3 after 2"),
        (torch.ones(5, 4), torch.ones(5, 3), [(2, 3, whole_change()), (0, 1, whole_change())], "found 0 to 1 after 3"),
        (torch.ones(5, 4), torch.ones(5, 3), [(0, 1.0, whole_change())], "found 0 to 1.0"),
        (torch.ones(5, 4), torch.ones(5, 3), [(0, 2**70, whole_change())], "up to"),
        (torch.ones(5, 4), torch.ones(5, 3), [(0, 1, whole_change()), (1, 2, written(whole_change()))], "written to"),
        (torch.ones(5, 4), torch.ones(5, 3), [(0, 1, started(whole_change()))], "written to"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(name, output, input, groups, error):
    before = bits(output)
    with kernels.backend(name), pytest.raises((IndexError, AdapterError), match=error) as raised:
        kernels.add_products_(output, input, groups)
    assert isinstance(raised.value, AdapterError) == (error == "written to")
    assert torch.equal(bits(output), before)


@pytest.mark.parametrize(
    ("indices", "changes", "shape", "error"),
    [
        (torch.tensor([0, 12]), torch.ones(2), (4, 3), "from 0 to 11 .shape .4, 3.., found 0 to 12"),
        (torch.tensor([-1, 2]), torch.ones(2), (4, 3), "found -1 to 2"),
        (torch.tensor([0, 2**40]), torch.ones(2), (4, 3), "found 0 to 1099511627776"),
        (torch.tensor([0]), torch.ones(1), (4, 0), "from 0 to -1"),
        (torch.tensor([3, 2]), torch.ones(2), (4, 3), "sorted and unique, found 3, then 2"),
        (torch.tensor([1, 2, 2]), torch.ones(3), (4, 3), "sorted and unique, found 2, then 2"),
        (torch.tensor([1]), torch.ones(2), (4, 3), "1 columns and 2 changes"),
        (torch.tensor([1]), torch.ones(1).bfloat16(), (4, 3), "changes must be float32, 1-D, with data, found bfloat16"),
        (torch.tensor([1.0]), torch.ones(1), (4, 3), "indices must be int32 or int64"),
        (torch.tensor([[1]]), torch.ones(1), (4, 3), r"found int64 \[1, 1\]"),
        (torch.tensor([1]), torch.ones(1, 1), (4, 3), "changes must be"),
        (torch.tensor([1], device="meta"), torch.ones(1), (4, 3), "meta"),
        (torch.tensor([1]), torch.ones(1).to_sparse(), (4, 3), "sparse"),
        ([1], torch.ones(1), (4, 3), "indices must be a tensor"),
        (torch.tensor([1]), torch.ones(1), (12,), "shape must be"),
        (torch.tensor([1]), torch.ones(1), (4, 3, 1), "shape must be"),
        (torch.tensor([1]), torch.ones(1), (-4, -3), "shape must be"),
        (torch.tensor([1]), torch.ones(1), (2**31, 1), "shape must be"),
        (torch.tensor([1]), torch.ones(1), (4.0, 3.0), "shape must be"),
        (torch.tensor([1]), torch.ones(1), None, "shape must be"),
    ],
)
def test_a_change_is_checked_when_it_is_made(indices, changes, shape, error):
    with pytest.raises(AdapterError, match=error):
        kernels.row_change(indices, changes, shape)


@pytest.mark.parametrize(
    "other",
    [
        {"starts": torch.tensor([0, 3, 2, 9, 12]).int()},
        {"starts": torch.tensor([0, 3, 6, 9, 13]).int()},
        {"starts": torch.tensor([1, 3, 6, 9, 12]).int()},
        {"starts": torch.tensor([0, 3, 6, 12]).int()},
        {"starts": torch.tensor([0, 3, 6, 9, 12])},
        {"columns": torch.full((12,), 3).int()},
        {"columns": torch.full((12,), -1).int()},
        {"columns": torch.zeros(11).int()},
        {"changes": torch.zeros(13)},
        {"shape": (4, 2)},
        {"shape": (3, 3)},
    ],
)
def test_a_change_made_of_compressed_rows_is_checked_as_well(other):
    with pytest.raises(AdapterError):
        dataclasses.replace(whole_change(), **other)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_a_change_holds_its_own_copies(index):
    indices, values = torch.tensor([1, 5, 11]).to(index), torch.tensor([1.0, 2.0, 3.0])
    change = kernels.row_change(indices, values, (4, 3))
    indices.zero_(), values.zero_()
    assert (change.starts.tolist(), change.columns.tolist()) == ([0, 1, 2, 2, 3], [1, 2, 2])
    assert (change.starts.dtype, change.columns.dtype, change.changes.tolist()) == (torch.int32, torch.int32, [1.0, 2.0, 3.0])
    with pytest.raises(RuntimeError, match="not resizable"):
        change.columns.untyped_storage().resize_(1000)
    with pytest.raises(dataclasses.FrozenInstanceError):
        change.columns = torch.zeros(3).int()
    expected = added("reference", torch.zeros(2, 4), torch.ones(2, 3), [(0, 2, change)])
    assert expected[0].tolist() == [1.0, 2.0, 0.0, 3.0]
    for other in (copy.deepcopy(change), copy.copy(change), pickle.loads(pickle.dumps(change))):
        assert not set(other.addresses) & set(change.addresses)
        assert torch.equal(added("native", torch.zeros(2, 4), torch.ones(2, 3), [(0, 2, other)]), expected)
    with torch.inference_mode():
        inside = kernels.row_change(torch.tensor([1, 5, 11]), torch.tensor([1.0, 2.0, 3.0]), (4, 3))
    assert torch.equal(added("native", torch.zeros(2, 4), torch.ones(2, 3), [(0, 2, inside)]), expected)


@given(
    shape=st.tuples(st.integers(0, 40), st.integers(1, 40)),
    tokens=st.sampled_from([0, 1, 3, 17, 40]),
    density=st.sampled_from([0.0, 0.1, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    values=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_products_of_an_input_with_positions_are_those_of_the_dense_matrix(shape, tokens, density, dtype, values, seed):
    torch.manual_seed(seed)
    dense = torch.where(torch.rand(shape) < density, torch.randn(shape), 0.0).to(values)
    input, indices = torch.randn(tokens, shape[1]).to(dtype), dense.view(-1).nonzero().view(-1)
    positions = kernels.row_positions(indices, shape)
    change = kernels.row_change(indices, torch.zeros(len(indices)), shape)  # is positions, too; its values are not these
    for backend in ("native", "torch") if kernels.native.available() else ("torch",):
        for each in (positions, change):
            with kernels.backend(backend):
                found = kernels.row_products(input, each, dense.view(-1)[indices])
            assert found.dtype == values
            torch.testing.assert_close(found, input.to(values) @ dense.T, rtol=1e-4, atol=1e-4)


def test_arguments_of_a_product_that_do_not_fit_are_refused():
    positions = kernels.row_positions(torch.tensor([1, 5]), (4, 3))
    wrong = [(torch.ones(2, 4), torch.ones(2)), (torch.ones(3), torch.ones(2)), (torch.ones(2, 3), torch.ones(3))]
    for input, values in (*wrong, (torch.ones(2, 3), torch.ones(2).half()), (torch.ones(2, 3).int(), torch.ones(2))):
        with pytest.raises(IndexError, match=r"2 positions in \[4, 3\]"):
            kernels.row_products(input, positions, values)
    positions.columns.add_(1)
    with pytest.raises(AdapterError, match="were written to"):
        kernels.row_products(torch.ones(2, 3), positions, torch.ones(2))


def test_no_tokens_have_a_gradient_of_none():
    values, input = torch.ones(2, requires_grad=True), torch.ones(0, 3, requires_grad=True)
    SparseLayout(torch.tensor([1, 5]), (4, 3)).product(input, values).sum().backward()
    assert input.grad.shape == (0, 3) and values.grad.tolist() == [0, 0]
