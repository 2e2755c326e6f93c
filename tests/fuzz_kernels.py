"""Plans, merges, fusions, gradients (of convolutions: fuzz_images.py) and products of rows at random.

The kernels in C give the bits of plain torch, or refuse and write nothing.

A case is JSON: how tensors are made, and what is done with them. Weights lie in a larger buffer, all of which is compared. Run
under AddressSanitizer, reads and writes outside of any memory end the process.
"""

import dataclasses
import json

import torch

from conftest import bits, plain_c
from fuzz_images import an_image, image_gradient
from shira import AdapterError, SparseTensor, kernels
from shira.fusion.combining import combine
from shira.fusion.methods import Method
from shira.kernels import Contribution, Write, WritePlan, reference
from shira.kernels.cpu import native

ENDING = ".json"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
INDICES = {"int32": torch.int32, "int64": torch.int64}
SHAPES = ([1], [7, 5], [64, 33], [3, 5, 7], [0, 4], [130, 127])
LAYOUTS = ("plain", "plain", "plain", "offset", "transposed", "expanded", "stepped")
ODD_INDICES = (-1, -(2**31), 2**31 - 1, 2**31, 2**40, -(2**63), 2**63 - 1)
ODD_VALUES = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-40, 65504.0])
STEPS = ("swap a", "swap a", "write b", "restore", "change c", "spoil", "gather")
MARGIN = 8  # entries of the buffer before and after a weight


def case(draw, pool):
    """What is done with which tensors."""
    kind = draw.choice(["plan", "plan", "plan", "unite", "fuse", "gradient", "images", "rows"])
    common = {"kind": kind, "seed": draw.randrange(2**32), "threads": draw.choice([1, 1, 2, 3]), "plain": draw.random() < 0.3}
    if kind == "plan":
        writes = [a_write(draw) for _ in range(draw.choice([1, 1, 2, 3]))]
        steps = [draw.choice(STEPS) for _ in range(draw.randint(1, 6))]
        return common | {"writes": writes, "shared": draw.random() < 0.2, "steps": steps}
    if kind == "gradient":
        sides = {"tokens": draw.choice([0, 1, 17, 300]), "rows": draw.choice([1, 33, 200]), "columns": draw.choice([1, 9, 131])}
        density = draw.choice([0, 0.003, 0.05, 1])
        return (
            common | sides | {"dtype": draw.choice(list(DTYPES)[:2]), "index": draw.choice(list(INDICES)), "density": density}
        )
    if kind == "images":
        return common | an_image(draw)
    if kind == "rows":
        sides = {
            "out": draw.choice([0, 1, 63, 130, 300]),
            "in": draw.choice([1, 2, 7, 64, 301]),
            "tail": draw.choice([0, 1, 3, 3, -1]),
        }
        dtypes = {"dtype": draw.choice(list(DTYPES)[:2]), "inputs": draw.choice(list(DTYPES)[:2])}
        layouts = {"layout": draw.choice(LAYOUTS), "input_layout": draw.choice(LAYOUTS)}
        return common | sides | dtypes | layouts | {"groups": [a_group(draw) for _ in range(draw.choice([0, 1, 2, 8]))]}
    runs = [a_run(draw) for _ in range(draw.choice([1, 2, 3, 5]))]
    common |= {"numel": draw.choice([1, 63, 64, 5000, 200_000]), "runs": runs}
    if kind == "fuse":
        common |= {
            "dtype": draw.choice(list(DTYPES)[:2]),
            "base": draw.random() < 0.7,
            "method": draw.choice(["sum", "mean", "max"]),
        }
        common["units"] = draw.choice([None, None, None, "uint8", "uint16"])
        common["hidden"] = a_run(draw) if draw.random() < 0.3 else None
    return common


def a_run(draw):
    """Positions: how many of the entries, in which dtype, and what is wrong with them."""
    odd = [draw.randrange(1000), draw.choice(ODD_INDICES)] if draw.random() < 0.15 else None
    more = {"strength": draw.choice([1.0, 0.5, -2.0]), "delta": draw.random() < 0.4, "surplus": draw.choice([0] * 12 + [1, -1])}
    return {"density": draw.choice([0, 0.01, 0.3, 1]), "index": draw.choice(list(INDICES)), "odd": odd} | more


def a_write(draw):
    shape, dtype = draw.choice(SHAPES), draw.choice(list(DTYPES))
    other = draw.choice(list(DTYPES)) if draw.random() < 0.05 else dtype
    places = {"stepped": draw.random() < 0.05, "shuffled": draw.random() < 0.1}
    return a_run(draw) | places | {"shape": shape, "dtype": dtype, "values": other, "layout": draw.choice(LAYOUTS)}


def a_group(draw):
    """Rows of one adapter, how many before them belong to none, and what is wrong with them."""
    rows = {
        "gap": draw.choice([0, 0, 1, 5, *[-1] * (draw.random() < 0.05)]),
        "rows": draw.choice([0, 1, 2, 3, 4, 7, 16, 17, 40]),
    }
    wrong = draw.choice([None] * 30 + ["written", "wider", "starts", "columns"])
    return a_run(draw) | rows | {"wrong": wrong}


def dump(case):
    return json.dumps(case, sort_keys=True).encode() + b"\n"


def load(content):
    return json.loads(content)


def run(case):
    """Raises AssertionError where C and the reference differ. Returns the kind of outcome."""
    threads = torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    try:
        if case["plain"]:
            with plain_c():
                return f"{case['kind']} {KINDS[case['kind']](case)}"
        return f"{case['kind']} {KINDS[case['kind']](case)}"
    finally:
        torch.set_num_threads(threads)


def positions(run, numel, generator):
    """Sorted positions below numel, of which one may lie elsewhere."""
    found = (torch.rand(numel, generator=generator) < run["density"]).nonzero().view(-1).to(INDICES[run["index"]])
    if run["odd"] and found.numel() and (run["index"] == "int64" or -(2**31) <= run["odd"][1] < 2**31):
        found[run["odd"][0] % found.numel()] = run["odd"][1]
    return found


def odd_values(count, dtype, generator):
    """Values of which a few are not numbers, or -0.0."""
    values = torch.randn(count, generator=generator)
    chosen = torch.rand(count, generator=generator) < 0.05
    values[chosen] = ODD_VALUES[torch.randint(len(ODD_VALUES), (int(chosen.sum()),), generator=generator)]
    return values.to(dtype)


def weights_of(case, generator):
    """(buffers, weights): each weight is a view of a buffer; with "shared" the second one lies half in the first one."""
    buffers, weights = [], []
    for number, write in enumerate(case["writes"]):
        shape, dtype = write["shape"], DTYPES[write["dtype"]]
        numel = torch.Size(shape).numel()
        if case["shared"] and number == 1 and buffers[0].dtype == dtype and buffers[0].numel() >= numel + 2 * MARGIN:
            buffer = buffers[0]
            weight = buffer[buffer.numel() - MARGIN - numel : buffer.numel() - MARGIN].view(shape)
        else:
            buffer = odd_values(2 * numel + 2 * MARGIN, dtype, generator)
            inner = buffer[MARGIN : MARGIN + numel]
            weight = {
                "plain": lambda inner=inner, shape=shape: inner.view(shape),
                "offset": lambda buffer=buffer, numel=numel, shape=shape: buffer[1 : 1 + numel].view(shape),
                "transposed": lambda inner=inner, shape=shape: inner.view(shape).transpose(0, -1),
                "expanded": lambda inner=inner, shape=shape: inner.view(shape).expand(2, *shape),
                "stepped": lambda buffer=buffer, numel=numel: buffer[: 2 * numel : 2],
            }[write["layout"]]()
        buffers.append(buffer)
        weights.append(weight)
    return buffers, weights


def plan(case):
    """Several writes, through every mode, by both backends."""
    refused, traces = None, []
    for backend in ("native", "reference"):
        generator = torch.Generator().manual_seed(case["seed"])
        buffers, weights = weights_of(case, generator)
        given, fits, taken = [], True, {}
        for write, buffer, weight in zip(case["writes"], buffers, weights, strict=True):
            where = positions(write, weight.numel(), generator)
            if write["shuffled"]:
                where = where[torch.randperm(where.numel(), generator=generator)]
            if write["stepped"]:
                where = where.repeat_interleave(2)[::2]
            if case["shared"]:
                where = without(where, weight, taken.setdefault(buffer.data_ptr(), []))
            count = max(0, where.numel() + write["surplus"])
            values = [odd_values(count, DTYPES[write["values"]], generator) for _ in range(2)]
            inside = not where.numel() or 0 <= int(where.min()) <= int(where.max()) < weight.numel()
            fits &= inside and count == where.numel() and write["values"] == write["dtype"]
            fits &= weight.is_contiguous() and where.is_contiguous()
            given.append((weight, where, values))
        before = [bits(buffer) for buffer in buffers]
        if backend == "reference" and not fits:
            assert refused, "does not fit, and was not refused"
            return "refused"
        steps = case["steps"] if fits else ["gather"] * ("gather" in case["steps"]) + ["swap a"]
        try:
            with kernels.backend(backend):
                traces.append(trace(steps, buffers, given))
        except IndexError as error:
            assert backend == "native" and not fits, f"fits, and was refused: {error}"
            assert same(before, [bits(buffer) for buffer in buffers]), "refused, and yet written to"
            refused = str(error)
    for step, (one, other) in enumerate(zip(*traces, strict=False)):
        if one[0] != other[0]:  # C looks at a few entries of a weight, the reference at all
            few = all(each <= 16 for each in one[2])
            assert other[0] == "changed" and not few, f"step {step}: {one[0]} in C, {other[0]} in the reference"
            return "changed, not seen in C"
        assert same(one[1], other[1]), f"step {step}, {case['steps'][step]}: other bits than the reference"
    return " ".join(dict.fromkeys(name for name, _, _ in traces[0]))


def without(where, weight, taken):
    """The positions whose memory no write before has. taken: what they have, as (address, place) of the storage."""
    held = {at for each in taken for at in each}
    free = [weight.storage_offset() + at not in held for at in where.tolist()]
    taken.append({weight.storage_offset() + at for at in where.tolist()})
    return where if all(free) else where[torch.tensor(free)]


def trace(steps, buffers, given):
    """What each step did: a word, the bits of all memory after it, and how many entries each write has."""
    plans = {
        "a": WritePlan.of([Write(weight, where, values[0]) for weight, where, values in given]),
        "b": WritePlan.of([Write(weight, where, values[1]) for weight, where, values in given]),
        "c": WritePlan.of([Write(weight, where, values[1]) for weight, where, values in given[:1]]),
    }
    active, found, sizes = None, [], [where.numel() for _, where, _ in given]
    for step in steps:
        word, extra = step, []
        try:
            if step == "swap a" and active is None:
                kernels.swap_(plans["a"])
                active = plans["a"]
            elif step == "write b" and active is not None and (over := plans["b"].over(active)) is not None:
                kernels.write_(over, active)
                active = over
            elif step == "restore" and active is not None:
                kernels.restore_(active)
                active = None
            elif step == "change c" and active is not None:
                kernels.change_(active, plans["c"])
                active = plans["c"]
            elif step == "spoil" and given[0][1].numel():
                weight, where, _ = given[0]
                weight.data.view(-1)[int(where[where.numel() // 2])] = 7.25
            elif step == "gather":
                extra = [bits(kernels.gather(weight, where)) for weight, where, _ in given]
            else:
                word = "nothing"
        except kernels.WeightChanged:
            word = "changed"
        stash = [bits(each) for each in active.stash[: int(active.begun[0])]] if active is not None else []
        found.append((word, [bits(buffer) for buffer in buffers] + stash + extra, sizes))
    return found


def same(one, other):
    return len(one) == len(other) and all(torch.equal(here, there) for here, there in zip(one, other, strict=True))


def runs_of(case, generator):
    """Sorted, unique positions, which may begin below 0 or end anywhere."""
    return [positions(run, case["numel"], generator).sort().values.unique() for run in case["runs"]]


def unite(case):
    runs = runs_of(case, torch.Generator().manual_seed(case["seed"]))
    fits = all(not run.numel() or 0 <= int(run[0]) <= int(run[-1]) < 2**62 for run in runs)
    try:
        found = native.unite(runs)
    except IndexError:
        assert not fits, "fits, and was refused"
        return "refused"
    assert fits, "does not fit, and was not refused"
    expected = reference.unite(runs)
    assert torch.equal(found.indices.long(), expected.indices.long()) and torch.equal(found.counts, expected.counts)
    assert all(torch.equal(one, other) for one, other in zip(found.places, expected.places, strict=True))
    return "the same"


def fuse(case):
    """Changes to one tensor in one pass, and as `fusion.combining.combine` defines them."""
    generator, dtype, numel = torch.Generator().manual_seed(case["seed"]), DTYPES[case["dtype"]], case["numel"]
    runs = runs_of(case, generator)
    base = torch.randn(numel, generator=generator).to(dtype) if case["base"] else None
    changes, terms, fits = [], [], True
    for run, where in zip(case["runs"], runs, strict=True):
        count = max(0, where.numel() + run["surplus"])
        inside = not where.numel() or 0 <= int(where[0]) <= int(where[-1]) < numel
        fits &= inside and count == where.numel()
        narrow = where.int() if not where.numel() or -(2**31) <= int(where[0]) <= int(where[-1]) < 2**31 else where
        values = torch.randn(count, generator=generator).to(dtype)
        delta = run["delta"] or base is None
        exact = run["strength"] == 1 and (base is None or not delta)
        changes.append(Contribution(narrow, values, run["strength"], delta, exact))
        if inside and count == where.numel():
            terms.append((SparseTensor((numel,), where, values, "delta" if delta else "overwrite"), run["strength"]))
    if case["units"]:  # gaps of any kind, which need not lead anywhere
        kind = getattr(torch, case["units"])
        units = torch.randint(0, 256, (50,), generator=generator).to(kind)
        count = int((units != torch.iinfo(kind).max).sum())
        changes.append(Contribution(units, torch.randn(count, generator=generator).to(dtype), 0.5, base is None, False))
    weight, hidden = base, None
    if case.get("hidden"):  # the weight has other values there than the base
        where = positions(case["hidden"], numel, generator).sort().values.unique()
        inside = not where.numel() or 0 <= int(where[0]) <= int(where[-1]) < numel
        fits &= inside and base is not None
        narrow = where.int() if not where.numel() or -(2**31) <= int(where[0]) <= int(where[-1]) < 2**31 else where
        hidden = narrow, torch.zeros(where.numel(), dtype=dtype)
        if inside and base is not None:
            weight = base.clone()
            weight[where.long()], hidden = 7.25, (narrow, base[where.long()])
    try:
        found = native.combine(weight, changes, dtype, case["method"], numel, hidden=hidden)
    except IndexError:
        assert not fits, "fits, and was refused"
        return "refused"
    if found is None or case["units"]:
        return "left to the general way" if found is None else "gaps"
    assert fits, "does not fit, and was not refused"
    overlap = reference.unite([tensor.indices for tensor, _ in terms])
    under = torch.zeros(overlap.indices.numel(), dtype=dtype) if base is None else base[overlap.indices.long()]
    with kernels.backend("reference"):
        expected = combine("w", terms, overlap, under, Method(case["method"]), deltas=base is None)
    assert torch.equal(found.indices.long(), expected[0].long()), "other positions"
    assert torch.equal(bits(found.values), bits(expected[1])), "other bits than the reference"
    if base is not None:
        assert torch.equal(bits(found.base), bits(expected[2]))
        for change, kept, (tensor, _) in zip(changes, found.under, terms, strict=True):
            assert change.is_delta or torch.equal(bits(kept), bits(base[tensor.indices.long()]))
    return "the same"


def gradient(case):
    """Sums of products: as many as there are positions, and as near to float64 as float32 allows."""
    generator, dtype = torch.Generator().manual_seed(case["seed"]), DTYPES[case["dtype"]]
    left, right = (torch.randn(case["tokens"], case[side], generator=generator).to(dtype) for side in ("rows", "columns"))
    where = (torch.rand(case["rows"] * case["columns"], generator=generator) < case["density"]).nonzero().view(-1)
    where = where.to(INDICES[case["index"]])
    found = native.sampled_gradient(left, right, where)
    exact = (left.double().T @ right.double()).view(-1)[where.long()]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance * max(1, case["tokens"]) ** 0.5)
    return f"{dtype} {'some' if where.numel() else 'none'}"


def rows(case):
    """Products for the rows of several adapters, in whole numbers, whose sums are exact: the output lies in a larger buffer."""
    generator = torch.Generator().manual_seed(case["seed"])
    outs, ins = case["out"], case["in"]
    groups, row, fits = [], 0, True
    for group in case["groups"]:
        where = positions(group, outs * ins, generator)
        values = torch.randint(-4, 5, (max(0, where.numel() + group["surplus"]),), generator=generator).float()
        try:
            change = kernels.row_change(where, values, (outs, ins))
        except AdapterError as error:
            assert group["odd"] or values.shape != where.shape, f"fits, and was refused: {error}"
            return "no change"
        assert values.shape == where.shape, "does not fit, and was not refused"
        try:
            change = spoiled(change, group["wrong"])
        except AdapterError:
            return "no change"
        fits &= group["gap"] >= 0 and group["wrong"] != "written" and change.shape == (outs, ins)
        groups.append((row + group["gap"], row + group["gap"] + group["rows"], change))
        row += group["gap"] + group["rows"]
    count = max(0, row + case["tail"])
    buffer, output = a_matrix(case["layout"], count, outs, DTYPES[case["dtype"]], generator)
    _, input = a_matrix(case["input_layout"], count, ins, DTYPES[case["inputs"]], generator)
    fits &= output.is_contiguous() and output.shape == (count, outs) and input.shape == (count, ins) and row <= count
    before = bits(buffer)
    try:
        with kernels.backend("native"):
            kernels.add_products_(output, input, groups)
    except (IndexError, AdapterError) as error:
        assert not fits, f"fits, and was refused: {error}"
        assert torch.equal(before, bits(buffer)), "refused, and yet written to"
        return "refused"
    assert fits or not groups, "does not fit, and was not refused"
    found = buffer.clone()
    buffer.copy_(before.view(buffer.dtype))
    with kernels.backend("reference"):
        kernels.add_products_(output, input, groups)
    assert torch.equal(bits(found + 0), bits(buffer + 0)), "other bits than the reference"  # + 0: no -0.0
    return "the same"


def spoiled(change, wrong):
    """A change with one thing wrong. Raises AdapterError if it is found when the change is made."""
    if wrong == "written":
        change.columns.fill_(2**31 - 1)
        return change
    other = {
        "wider": {"shape": (change.shape[0], change.shape[1] + 1)},
        "starts": {"starts": change.starts.flip(0)},
        "columns": {"columns": change.columns + change.shape[1]},
    }
    return dataclasses.replace(change, **other[wrong]) if wrong else change


def a_matrix(layout, rows, columns, dtype, generator):
    """(buffer, matrix): whole numbers; a view of the buffer, which is a matrix [rows, columns] only in plain layouts."""
    buffer = torch.randint(-4, 5, (2 * rows * columns + 2 * MARGIN,), generator=generator).to(dtype)
    inner = buffer[MARGIN : MARGIN + rows * columns].view(rows, columns)
    match layout:
        case "offset":
            return buffer, buffer[1 : 1 + rows * columns].view(rows, columns)
        case "transposed":
            return buffer, inner.view(columns, rows).T
        case "expanded":
            return buffer, inner[:1].expand(rows, columns) if rows else inner
        case "stepped":
            return buffer, buffer[: 2 * rows * columns].view(rows, 2 * columns)[:, ::2]
    return buffer, inner


KINDS = {"plan": plan, "unite": unite, "fuse": fuse, "gradient": gradient, "images": image_gradient, "rows": rows}
