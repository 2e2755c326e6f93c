"""A switcher on Triton's kernels, in the interpreter where there is no GPU; what waits in host memory; graphs on a GPU."""

import contextlib
import copy

import pytest
import torch

import shira
from conftest import all_bits, bits, mlp, random_adapter, same_bits
from shira import AdapterError, Switcher, SwitchError, kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# numpy, in which the interpreter computes, warns of infinities that are meant
pytestmark = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: CUDA graphs and their compiled form exist there only")


@contextlib.contextmanager
def triton():
    """Its kernels where Triton is installed."""
    pytest.importorskip("triton", reason="Triton is not installed: `make test-gpu` installs it and runs these tests")
    with kernels.backend("triton"):
        yield


def model_and_adapters(dtype=torch.bfloat16):
    model = mlp(dtype).to(DEVICE)
    one = random_adapter(model.cpu(), 1)
    twin = shira.Adapter(
        {n: shira.SparseTensor(t.shape, t.indices, t.values + 1) for n, t in one.tensors.items()}, one.metadata
    )
    adapters = {"one": one, "twin": twin, "other": random_adapter(model, 2), "delta": random_adapter(model, 3, kind="delta")}
    return model.to(DEVICE), adapters


def switcher_of(model, adapters, **settings):
    switcher = Switcher(model, **settings)
    for name, adapter in adapters.items():
        switcher.add(name, adapter)
    return switcher


SELECTIONS = [
    "one",
    "other",
    "twin",
    {"one": 0.3, "other": -1.5},
    "delta",
    {"one": 1.0, "delta": 0.5},
    {"twin": 1.0, "one": 2.0},
    None,
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_switcher_on_triton_leaves_the_bits_that_one_on_torch_leaves(dtype):
    model, adapters = model_and_adapters(dtype)
    oracle = copy.deepcopy(model)
    with kernels.backend("reference"):
        expected = switcher_of(oracle, adapters)
    with triton():
        switcher = switcher_of(model, adapters, ready=3, host=2)
        pointers = [parameter.data_ptr() for parameter in model.parameters()]
        for selection in [*SELECTIONS, *SELECTIONS[::-1], "one", *SELECTIONS[::2]]:
            switcher.use(selection)
            with kernels.backend("reference"):
                expected.use(selection)
            assert same_bits(all_bits(oracle), all_bits(model))
        assert pointers == [parameter.data_ptr() for parameter in model.parameters()]


def test_sums_that_overflow_change_nothing():
    model, adapters = model_and_adapters(torch.float16)
    with triton():
        switcher = switcher_of(model, adapters)
        base = all_bits(model)
        for before in ("other", {"one": 1.0, "other": 0.5}, None):
            switcher.use(before)
            now = all_bits(model)
            with pytest.raises(AdapterError, match="0.weight' would overflow torch.float16"):
                switcher.use({"one": 1.0, "other": 1e9})
            assert same_bits(now, all_bits(model))
            assert switcher.active == ({before: 1.0} if isinstance(before, str) else before or {})
        assert same_bits(base, all_bits(model))


def test_an_interrupted_change_leaves_the_base(monkeypatch):
    model, adapters = model_and_adapters()
    base = all_bits(model)
    with triton():
        switcher = switcher_of(model, adapters)

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        for step in ("_announce", "_run", "_written"):
            switcher.use("one")
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                run, rest = getattr(kernels.gpu, step), [interrupt]
                patch.setattr(kernels.gpu, step, lambda *a, **k: rest.pop()() if rest else run(*a, **k))  # noqa: B023
                switcher.use("other")
            assert same_bits(base, all_bits(model)) and switcher.active == {}


def test_what_is_launched_is_kept_with_a_selection():
    """After its first use a selection is prepared, and its launch made, no more."""
    model, adapters = model_and_adapters()
    with triton():
        switcher = switcher_of(model, adapters)
        made = []
        for _ in range(3):
            for selection in ("one", "twin", "other"):
                switcher.use(selection)
            made.append([[id(each) for each in held.plan.launches.values()] for held in switcher._ready.here.values()])
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("on", ["native", "triton"])
def test_what_is_no_longer_ready_waits_in_host_memory(on, tmp_path):
    model, adapters = model_and_adapters()
    for name, adapter in adapters.items():
        adapter.save(tmp_path / name)
    expected = {}
    plain = switcher_of(model, adapters)
    for name in [*adapters, None]:
        plain.use(name)
        expected[name] = all_bits(model)
    with triton() if on == "triton" else contextlib.nullcontext():
        switcher = Switcher(model, ready=1, host=3)
        for name in adapters:
            switcher.add(name, tmp_path / name)
        for name in ("one", "other", "twin"):
            switcher.use(name)
        assert [dict(key.strengths) for key in switcher._ready.waiting] == [{"one": 1.0}, {"other": 1.0}]
        for name in ("one", "other", "twin"):
            (tmp_path / name).unlink()  # nothing is read again
        switcher.prefetch("one")
        assert same_bits(expected["twin"], all_bits(model)) and switcher.active == {"twin": 1.0}
        assert len(switcher._ready.arriving) == len(switcher._ready.here) == 1
        switcher.prefetch("one")
        for name in ("one", "other", "twin", "one", None, "other", None):
            switcher.use(name)
            assert same_bits(expected[name], all_bits(model))
        assert len(switcher._ready.here) == 1 and len(switcher._ready.waiting) == 3 and not switcher._ready.arriving
        switcher.prefetch("delta")  # never prepared: read and checked now
        assert {"delta": 1.0} in [dict(key.strengths) for key in switcher._ready.here]
        switcher.prefetch(None)
        for name in adapters:
            switcher.remove(name)
        assert not switcher._ready.here and not switcher._ready.waiting and not switcher._ready.arriving
    assert same_bits(expected[None], all_bits(model))


def test_waiting_takes_six_bytes_an_entry_in_bfloat16():
    model, adapters = model_and_adapters()
    switcher = switcher_of(model, adapters, ready=1, host=1)
    switcher.use("one")
    switcher.use("other")
    ((waiting, _),) = switcher._ready.waiting.values()
    held = sum(piece.nbytes for piece in waiting._pieces.values())
    assert 6 * adapters["one"].nnz <= held < 6 * adapters["one"].nnz + 100
    with pytest.raises(SwitchError, match="host must be a whole number from 0 on"):
        Switcher(model, host=-1)


def test_importing_shira_finds_triton_only_when_it_is_asked():
    assert not kernels.gpu.available() and not kernels.gpu.available(torch.zeros(1))
    assert kernels.gpu.available(torch.zeros(1, device="cuda")) if DEVICE == "cuda" else True


MOVES = {
    "half": lambda model: model.half(),
    "to the CPU": lambda model: model.cpu(),
    "to the CPU in float16": lambda model: model.to("cpu", torch.float16),
    "to the CPU and back": lambda model: model.cpu().to(DEVICE),
    "half on the CPU, and back": lambda model: model.cpu().half().to(DEVICE),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("active", [None, "one", {"one": 0.3, "other": -1.5}], ids=str)
def test_a_model_that_leaves_the_device_keeps_its_base(move, active):
    """With what is active, and with what was only made ready."""
    model, adapters = model_and_adapters()
    switcher = switcher_of(model, {name: shira.Adapter(each.tensors) for name, each in adapters.items()}, ready=3, host=2)
    expected = all_bits(MOVES[move](copy.deepcopy(model)))
    for selection in ("one", "other", {"one": 0.3, "other": -1.5}, active):
        switcher.use(selection)
    MOVES[move](model)
    for selection in (None, "other", {"one": 0.3, "other": -1.5}, "one", None):
        switcher.use(selection)
        assert same_bits(expected, all_bits(model)) == (selection is None)


@on_a_gpu
def test_a_switch_on_another_stream():
    """Work on the stream of the switch comes after it. Another stream waits for that one, as torch's rules are."""
    model, adapters = model_and_adapters()
    oracle, base = copy.deepcopy(model), all_bits(model)
    with kernels.backend("reference"):
        expected = switcher_of(oracle, adapters)
    switcher, side = switcher_of(model, adapters), torch.cuda.Stream()
    for selection in SELECTIONS * 3:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            switcher.use(selection)
        torch.cuda.current_stream().wait_stream(side)
        with kernels.backend("reference"):
            expected.use(selection)
        assert same_bits(all_bits(oracle), all_bits(model))
    assert same_bits(base, all_bits(model))


@on_a_gpu
def test_a_captured_graph_computes_with_what_is_active():
    model, adapters = model_and_adapters()
    switcher = switcher_of(model, adapters)
    input = torch.randn(4, 13, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            model(input)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(input)
        for selection in SELECTIONS:
            switcher.use(selection)
            graph.replay()
            assert torch.equal(bits(output), bits(model(input)))


@on_a_gpu
def test_reduce_overhead_needs_no_recapture():
    from torch._dynamo.testing import CompileCounterWithBackend

    model, adapters = model_and_adapters(torch.float32)
    switcher = switcher_of(model, adapters)
    input = torch.randn(4, 13, device=DEVICE)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, mode="reduce-overhead")
    watched = torch.compile(copy.deepcopy(model), backend=counter)
    watching = switcher_of(watched._orig_mod, adapters)
    with torch.no_grad():
        for _ in range(3):
            compiled(input)
        for selection in SELECTIONS:
            switcher.use(selection)
            watching.use(selection)
            torch.testing.assert_close(compiled(input).clone(), model(input))
            watched(input)
    assert counter.frame_count == 1


@on_a_gpu
def test_an_arrival_beside_a_forward_pass():
    model, adapters = model_and_adapters()
    switcher = switcher_of(model, adapters, ready=1, host=4)
    expected = {}
    for name in adapters:
        switcher.use(name)
        expected[name] = all_bits(model)
    input = torch.randn(4096, 13, device=DEVICE, dtype=torch.bfloat16)
    for name in [*adapters] * 3:
        switcher.prefetch(name)
        for _ in range(50):
            model(input)
        switcher.use(name)
        assert same_bits(expected[name], all_bits(model))
