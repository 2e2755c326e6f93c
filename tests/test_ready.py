"""What a switcher keeps ready: a bounded number of prepared selections, none prepared twice, files left on disk."""

import pytest
import torch

import shira
from conftest import all_bits, bits, mlp, random_adapter, same_bits
from shira import BaseMismatch, SparseTensor, Switcher, SwitchError, kernels


def test_a_selection_used_again_is_not_prepared_again():
    model = mlp()
    switcher = Switcher(model, ready=2)
    for name, seed in (("a", 1), ("b", 2)):
        switcher.add(name, random_adapter(model, seed))
    pointers = []
    for _ in range(2):
        switcher.use({"a": 1.0, "b": 0.5})
        pointers.append(switcher._state.plans[0].writes[0].values.data_ptr())
        switcher.use(None)
    assert pointers[0] == pointers[1]
    switcher.use({"b": 0.5, "a": 1.0})  # the order does not matter
    assert switcher._state.plans[0].writes[0].values.data_ptr() == pointers[0]


def test_what_is_ready_is_bounded(tmp_path):
    model = mlp()
    before = all_bits(model)
    switcher = Switcher(model, ready=3)
    for seed in range(10):
        random_adapter(model, seed).save(tmp_path / f"{seed}.safetensors")
        switcher.add(str(seed), tmp_path / f"{seed}.safetensors")
    for seed in range(10):
        switcher.use(str(seed))
        assert len(switcher._ready.here) <= 3
    assert list(dict(key.strengths) for key in switcher._ready.here) == [{"7": 1.0}, {"8": 1.0}, {"9": 1.0}]
    switcher.use("7")  # so 8 is now the one used longest ago
    switcher.use("0")
    assert list(dict(key.strengths) for key in switcher._ready.here) == [{"9": 1.0}, {"7": 1.0}, {"0": 1.0}]
    switcher.use(None)
    assert same_bits(before, all_bits(model))
    switcher.remove("9")
    assert len(switcher._ready.here) == 2
    with pytest.raises(SwitchError, match="ready must be a whole number from 1 on"):
        Switcher(model, ready=0)


def test_a_file_that_changed_is_checked_again(tmp_path):
    model = mlp()
    path = tmp_path / "a.safetensors"
    random_adapter(model, 1).save(path)
    switcher = Switcher(model)
    switcher.add("a", path)
    before = all_bits(model)
    random_adapter(mlp(seed=5), 1).save(path)
    with pytest.raises(BaseMismatch):
        switcher.use("a")
    path.unlink()
    with pytest.raises(FileNotFoundError):
        switcher.use("a")
    assert switcher.active == {}
    assert same_bits(before, all_bits(model))
    random_adapter(model, 2).save(path)
    switcher.use("a")
    assert switcher.active == {"a": 1.0}


def test_adapters_of_one_mask_switch_in_one_pass(monkeypatch):
    """No restore in between, positions held once, and still exact."""
    model = mlp()
    before = all_bits(model)
    one = random_adapter(model, 1)
    other = shira.Adapter(
        {n: SparseTensor(t.shape, t.indices.clone(), t.values + 1) for n, t in one.tensors.items()}, one.metadata
    )
    switcher = Switcher(model)
    switcher.add("one", one)
    switcher.add("other", other)
    switcher.add("third", random_adapter(model, 7, density=0.1))
    switcher.use("one")
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "restore_", lambda plan: pytest.fail("restored"))
        patch.setattr(kernels, "swap_", lambda plan: pytest.fail("swapped"))
        switcher.use("other")
        switcher.use({"one": 1.0})
        switcher.use("other")
    for name, tensor in other.tensors.items():
        assert torch.equal(bits(model.get_parameter(name).view(-1)[tensor.indices.long()]), bits(tensor.values))
    parts = {id(write.indices) for held in switcher._ready.here.values() for write in held.plan.writes}
    assert len(parts) == 2
    switcher.use("third")
    switcher.use("one")
    switcher.use(None)
    assert same_bits(before, all_bits(model))


def test_what_is_ready_takes_eight_bytes_an_entry_in_bfloat16(tmp_path):
    """Position, value, and room for what lies under it; an adapter that is a file and not ready takes nothing."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64)).bfloat16()
    for name, seed in (("a", 1), ("b", 2)):
        random_adapter(model, seed).save(tmp_path / name)
    switcher = Switcher(model, ready=1)
    for name in "ab":
        switcher.add(name, tmp_path / name)
    assert not switcher._ready.here
    switcher.use("a")
    switcher.use("b")
    ((plan, _),) = switcher._ready.here.values()
    held = sum(write.indices.nbytes + write.values.nbytes for write in plan.writes) + sum(old.nbytes for old in plan.stash)
    assert held == 8 * sum(write.indices.numel() for write in plan.writes)
    assert all(not isinstance(source._content, shira.Adapter) for source in switcher._sources.values())


@pytest.mark.parametrize("active", [None, "a"])
def test_base_values_of_what_the_model_does_not_have_are_refused(active):
    model = mlp()
    base = model[0].weight.detach().view(-1).clone()
    switcher = Switcher(model)
    switcher.add("a", random_adapter(model, 1))
    switcher.use(active)
    held = all_bits(model)
    for name, indices, words in (
        ("0.weihgt", torch.arange(3), r"no tensor '0\.weihgt'; did you mean '0\.weight'"),
        (3, torch.arange(3), "no tensor 3"),
        ("0.weight", torch.tensor([1, 143]), r"'0\.weight' \(shape \[11, 13\]\).*from 0 to 142.*found 143"),
        ("0.weight", torch.tensor([-1, 3]), "found -1"),
        ("0.weight", torch.tensor([3, 2]), "sorted.*found 2 after 3"),
        ("0.weight", torch.tensor([1.0]), r"int32 or int64.*found float32 \[1\]"),
        ("0.weight", torch.tensor([[1]]), r"found int64 \[1, 1\]"),
        ("0.weight", [1], "found a list"),
    ):
        with pytest.raises(SwitchError, match=words):
            switcher.base_values(name, indices)
    for indices in (torch.tensor([0, 5, 142]), torch.tensor([7], dtype=torch.int32), torch.arange(0)):
        assert torch.equal(switcher.base_values("0.weight", indices), base[indices.long()])
    assert same_bits(held, all_bits(model))
    with pytest.raises(SwitchError, match="meta device"):
        Switcher(mlp().to("meta")).base_values("0.weight", torch.arange(3))
