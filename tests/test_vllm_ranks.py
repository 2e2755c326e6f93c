"""Switching in several processes at once: all of them or none. Threads with a barrier stand for the processes."""

import threading

import pytest

import shira
from conftest import all_bits, same_bits
from shira.errors import BaseMismatch
from shira.serving.selections import AdapterReplaced, Part, ServedSelection
from shira.serving.vllm.mapping import Surface
from shira.serving.vllm.ranks import Alone, Ranks
from test_vllm_mapping import SHAPES, Packed, adapter_of, checkpoint, loaded, mapped


class Threads:
    """Some threads as a group of processes."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=20)
        self.said = [None] * size

    def of(self, rank):
        group = Alone()
        group.size = self.size

        def gathered(own):
            self.said[rank] = own
            self.barrier.wait()
            every = list(self.said)
            self.barrier.wait()
            return every

        def combined(content):
            every = gathered(content)
            whole = every[0].clone()
            for each in every[1:]:
                whole |= each
            return whole

        group.gathered, group.combined = gathered, combined
        return group


def on_all(size, call):
    """`call(rank)` in a thread for each process; its results or errors."""
    results = [None] * size

    def run(rank):
        try:
            results[rank] = call(rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def served(folder, size, names=("a", "b"), seed=0):
    """The processes' `Ranks` over one folder of adapters, their models, and the parts of the adapters."""
    from shira.serving.catalogue import Catalogue

    for number, name in enumerate(names, start=1):
        adapter_of(checkpoint(seed), number).save(folder / f"{name}.safetensors")
    catalogue = Catalogue(folder, ["base"])
    parts = {name: Part(name, catalogue.load(name)) for name in names}
    group = Threads(size)
    models = [loaded(rank, size) for rank in range(size)]
    ranks = []
    for rank, model in enumerate(models):
        found = mapped(model)
        ranks.append(Ranks(Surface(model, found), found, folder, group.of(rank) if size > 1 else Alone()))
    return ranks, models, parts


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_processes_switch_together_and_return_to_the_base(tmp_path, size):
    ranks, models, parts = served(tmp_path, size)
    before = [all_bits(model) for model in models]
    reference = Surface(one := loaded(), mapped(one))
    switcher = shira.Switcher(reference)
    for name in parts:
        switcher.add(name, tmp_path / f"{name}.safetensors")
    for selection in ("a", "b", {"a": 0.5, "b": 1.0}, "a", None):
        switcher.use(selection)
        strengths = {selection: 1.0} if isinstance(selection, str) else selection or {}
        key = ServedSelection(tuple(parts[name]._replace(strength=strength) for name, strength in strengths.items())).key
        assert on_all(size, lambda rank, key=key: ranks[rank].use(key)) == [True] * size
        for rank, model in enumerate(models):
            expected = Packed(rank, size)
            expected.load_weights((name, reference._parameters[name]) for name in SHAPES)
            assert same_bits(all_bits(expected), all_bits(model))
    assert all(same_bits(one, all_bits(model)) for one, model in zip(before, models, strict=True))
    assert on_all(size, lambda rank: ranks[rank].use("")) == [False] * size


@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_adapter_of_another_base_is_refused_in_all_processes(tmp_path, size):
    ranks, models, parts = served(tmp_path, size, seed=5)
    before = [all_bits(model) for model in models]
    for _ in range(2):
        errors = on_all(size, lambda rank: ranks[rank].use(ServedSelection((parts["a"],)).key))
        assert all(isinstance(error, BaseMismatch) and "fingerprint" in str(error) for error in errors)
        assert all(same_bits(one, all_bits(model)) for one, model in zip(before, models, strict=True))


def test_a_failure_in_one_process_is_one_in_all(tmp_path, monkeypatch):
    ranks, models, parts = served(tmp_path, 2)
    before = [all_bits(model) for model in models]
    key = ServedSelection((parts["a"],)).key

    def broken(*arguments):
        raise MemoryError("no memory")

    for method in ("prefetch", "use"):
        with monkeypatch.context() as patch:
            plain = ranks[1].resident.use
            patch.setattr(ranks[1].resident, method, lambda given, plain=plain: plain(given) if given == "" else broken())
            errors = on_all(2, lambda rank: ranks[rank].use(key))
        assert isinstance(errors[1], MemoryError)
        assert "failed in process 1 of this model: MemoryError: no memory" in str(errors[0])
        assert all(same_bits(one, all_bits(model)) for one, model in zip(before, models, strict=True))
    assert on_all(2, lambda rank: ranks[rank].use(key)) == [True, True]


def test_a_file_that_was_replaced_is_an_error_in_all_processes(tmp_path):
    ranks, _, parts = served(tmp_path, 2)
    adapter_of(checkpoint(), 9).save(tmp_path / "a.safetensors")
    errors = on_all(2, lambda rank: ranks[rank].use(ServedSelection((parts["a"],)).key))
    assert all(isinstance(error, AdapterReplaced) for error in errors)
    assert on_all(2, lambda rank: ranks[rank].use(ServedSelection((parts["b"],)).key)) == [True, True]


def test_after_a_way_back_that_failed_in_one_process_none_answers(tmp_path, monkeypatch):
    ranks, models, parts = served(tmp_path, 2)
    before = [all_bits(model) for model in models]
    a, b = (ServedSelection((parts[name],)).key for name in "ab")
    assert on_all(2, lambda rank: ranks[rank].use(a)) == [True, True]

    def broken(*arguments):
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(ranks[1].resident._switcher, "_activate", broken)
        for key in (b, "", a):
            assert all(isinstance(error, Exception) for error in on_all(2, lambda rank, key=key: ranks[rank].use(key)))
    assert on_all(2, lambda rank: ranks[rank].use("")) == [True, True]
    assert all(same_bits(one, all_bits(model)) for one, model in zip(before, models, strict=True))
