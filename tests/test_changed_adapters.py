"""What users do to the tensors of an adapter in memory: it is found before anything is written, or crashes."""

import pytest
import torch
from safetensors.torch import save_file

import shira
from conftest import all_bits, mlp, random_adapter, same_bits
from shira import masks
from shira.integrations import peft, peft_masks, rl_patches

NAME = "2.weight"


def freed(tensor):
    tensor.untyped_storage().resize_(0)


def shortened(tensor):
    tensor.resize_(3)


def reordered(tensor):
    tensor.copy_(tensor.flip(0))


def far(tensor):
    tensor.add_(10**6)


def infinite(tensor):
    tensor.fill_(float("inf"))


def saved(model, folder):
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


CHANGES = [
    *[(part, change, words) for part in ("indices", "values") for change, words in ((freed, "was freed"), (shortened, "1-D"))],
    ("indices", reordered, "sorted and unique"),
    ("indices", far, "must be from 0 to"),
    ("values", infinite, "finite"),
]
USES = {
    "Switcher.add": lambda model, adapter, other, folder: shira.Switcher(model).add("a", adapter),
    "fuse": lambda model, adapter, other, folder: shira.fuse({"a": (adapter, 1.0), "b": (other, 0.5)}, base=model),
    "compare": lambda model, adapter, other, folder: shira.compare(other, adapter),
    "merge": lambda model, adapter, other, folder: shira.merge(saved(model, folder), adapter, folder / "out"),
    "start": lambda model, adapter, other, folder: shira.attach(model, start=adapter),
    "avoid": lambda model, adapter, other, folder: shira.attach(model, mask="rand", density=0.1, avoid=[adapter]),
    "from_adapter": lambda model, adapter, other, folder: masks.from_adapter(model[2].weight, 1000, NAME, adapter),
    "save": lambda model, adapter, other, folder: adapter.save(folder / "a.safetensors"),
    "peft.save": lambda model, adapter, other, folder: peft.save(adapter, folder / "peft", base=model),
    "peft_masks": lambda model, adapter, other, folder: peft_masks.mask_fn(model, adapter)(model[2], 1),
    "rl_patches": lambda model, adapter, other, folder: rl_patches.save(adapter, folder / "patch", "trl"),
}


@pytest.mark.parametrize(("part", "change", "words"), CHANGES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("use", USES)
def test_tensors_that_are_not_valid_any_more_are_refused_everywhere(tmp_path, use, part, change, words):
    model = mlp()
    before = all_bits(model)
    adapter, other = random_adapter(model, seed=1), random_adapter(model, seed=2)
    change(getattr(adapter.tensors[NAME], part))
    with pytest.raises(shira.AdapterError, match=rf"tensor '{NAME}' was changed in memory.*{words}.*; make the adapter again"):
        USES[use](model, adapter, other, tmp_path)
    assert not list(tmp_path.glob("out*")) and not (tmp_path / "peft").exists() and not (tmp_path / "patch").exists()
    assert same_bits(all_bits(model), before)


@pytest.mark.parametrize(("part", "change", "words"), CHANGES, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("active", ["a", "b"])
def test_the_base_returns_whatever_is_done_to_the_tensors_of_an_active_adapter(active, part, change, words):
    model = mlp()
    before = all_bits(model)
    adapter = random_adapter(model, seed=1)
    switcher = shira.Switcher(model)
    switcher.add("a", adapter)
    switcher.add("b", random_adapter(model, seed=2))
    switcher.use(active)
    change(getattr(adapter.tensors[NAME], part))
    with pytest.raises(shira.AdapterError, match=rf"tensor '{NAME}' was changed in memory.*{words}"):
        switcher.use({"a": 0.5, "b": 1.0})
    assert switcher.active == {active: 1.0}
    switcher.use(None)
    assert same_bits(all_bits(model), before)


def test_valid_changes_to_an_adapter_count_from_the_next_selection_on():
    model = mlp()
    adapter = random_adapter(model, seed=1)
    switcher = shira.Switcher(model, ready=1)
    switcher.add("a", adapter)
    switcher.add("b", random_adapter(model, seed=2))
    switcher.use("a")
    tensor = adapter.tensors[NAME]
    tensor.values.mul_(2)
    switcher.use("b")
    switcher.use("a")
    assert torch.equal(model[2].weight.detach().view(-1)[tensor.indices.long()], tensor.values)


def test_an_entry_that_is_no_sparse_tensor_any_more_is_refused():
    model = mlp()
    adapter = random_adapter(model, seed=1)
    adapter.tensors[NAME] = torch.ones(3)
    with pytest.raises(shira.AdapterError, match="are .name: SparseTensor.; found"):
        shira.Switcher(model).add("a", adapter)
