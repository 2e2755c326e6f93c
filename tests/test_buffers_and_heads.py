"""What trains beside the entries: buffers that move, new heads; and targets that never learn."""

import copy

import pytest
import torch
from torch import nn

import shira
from conftest import bits, mlp, mlp_batches, mlp_loss, same_bits
from shira import TargetError, TuningError
from shira.training.untrained import NotTrained


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.two(self.norm(self.one(x)).relu().mean(-1))


def test_statistics_come_back_and_are_in_the_adapter(tmp_path):
    torch.manual_seed(0)
    model = Normed()
    base = copy.deepcopy(model)
    inputs = torch.randn(8, 2, 9) + 1
    kept = {name: bits(buffer) for name, buffer in model.named_buffers()}
    options = {"calibration": [inputs], "loss_fn": lambda m, x: m(x).square().mean(), "mask": "snip", "density": 0.3}
    with shira.attach(model, **options) as tuner:
        assert {name: bits(b).tolist() for name, b in model.named_buffers() if "shira" not in name} == {
            name: found.tolist() for name, found in kept.items()
        }
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.1)
        for _ in range(3):
            model(inputs).square().mean().backward()
            optimizer.step()
        outputs = model.eval()(inputs)
        with tuner.reference():
            assert torch.equal(model(inputs), base.eval()(inputs))
        assert torch.equal(model(inputs), outputs)
        adapter = tuner.adapter("x")
    assert same_bits(kept, {name: bits(buffer) for name, buffer in model.named_buffers()})
    assert {"norm.running_mean", "norm.running_var"} <= adapter.tensors.keys() == adapter.fingerprints.keys()
    assert tuner.adapter("x").tensors.keys() == adapter.tensors.keys()
    adapter.save(tmp_path / "x.safetensors")
    for name, tensor in shira.load(tmp_path / "x.safetensors").tensors.items():
        live = base.state_dict()[name]
        live.view(-1)[tensor.indices.long()] = tensor.values
    torch.testing.assert_close(base(inputs), outputs)


def test_statistics_are_cast_with_the_model():
    model, expected = Normed(), None
    tuner = shira.attach(model, density=0.3)
    base = {name: buffer.clone() for name, buffer in model.named_buffers() if "shira" not in name}
    model(torch.randn(8, 2, 9))
    model.half().double()
    tuner.detach()
    expected = {name: b.half().double() if b.is_floating_point() else b for name, b in base.items()}
    assert same_bits({name: bits(b) for name, b in model.named_buffers()}, {name: bits(b) for name, b in expected.items()})


def classifier():
    from transformers import BertConfig, BertForTokenClassification

    sides = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20, "vocab_size": 30}
    torch.manual_seed(0)
    return BertForTokenClassification(BertConfig(**sides, num_labels=3)).eval()


def test_a_new_head_trains_whole(tmp_path):
    model = classifier()
    ids, labels = torch.randint(1, 30, (2, 5)), torch.randint(3, (2, 5))
    with shira.attach(model, density=0.05) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
        outputs = model(input_ids=ids).logits
        adapter = tuner.adapter("x")
    assert adapter.metadata["mask"]["whole"] == ["classifier.weight", "classifier.bias"]
    assert adapter.tensors["classifier.weight"].nnz == 48 and adapter.tensors["classifier.bias"].nnz == 3
    assert not any("classifier" in name for name in adapter.fingerprints) and len(adapter.fingerprints) == 6
    nn.init.normal_(model.classifier.weight)  # as at another load
    nn.init.normal_(model.classifier.bias)
    switcher = shira.Switcher(model)
    switcher.add("x", adapter)
    switcher.use("x")
    torch.testing.assert_close(model(input_ids=ids).logits, outputs)
    switcher.use(None)
    for options, names in [
        ({"exclude": "classifier"}, set()),
        ({"whole": ()}, set()),
        ({"whole": ["bert.embeddings.LayerNorm"]}, {"bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias"}),
        ({"targets": ["query", "classifier"]}, set()),
        ({"low_rank": 2}, {"classifier.weight", "classifier.bias"}),
        ({"method": "hook", "scope": "model"}, {"classifier.weight", "classifier.bias"}),
    ]:
        with shira.attach(model, density=0.5, **options) as tuner:
            assert set(tuner._whole) == names
    with pytest.raises(TargetError, match="whole='head' matches no module"):
        shira.attach(model, whole=["head"])


class Aside(nn.Module):
    """A layer whose weight is read without calling it, one that is never called, one whose output is dropped."""

    def __init__(self):
        super().__init__()
        self.read, self.idle, self.lost, self.used = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        self.lost(x)
        return self.used(x @ self.read.weight)


def test_targets_that_never_learn_are_said_once():
    model = Aside()
    tuner = shira.attach(model, density=0.5)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    with pytest.warns(NotTrained, match=r"1 of 4 targets got no gradient.*'lost.weight'; .*does not reach the loss"):
        optimizer.step()
    with pytest.warns(NotTrained, match=r"2 of 4 targets.*'read.weight', 'idle.weight'; their modules were never called"):
        tuner.adapter()
    tuner.adapter()
    tuner.detach()


def test_an_optimizer_that_was_made_before_attach_is_said():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with shira.attach(model, density=0.3):
        mlp_loss(model, mlp_batches(1)[0]).backward()
        with pytest.warns(NotTrained, match=r"none of tuner.parameters\(\).*after attach"):
            optimizer.step()
        optimizer.step()
        torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1).step()


def test_a_run_with_statistics_is_resumed():
    """In the loop that docs/trainers.md shows."""
    inputs = torch.randn(3, 8, 2, 9, generator=torch.Generator().manual_seed(1)) + 1

    def fresh():
        torch.manual_seed(0)
        model = Normed()
        tuner = shira.attach(model, density=0.3)
        return model, tuner, torch.optim.AdamW(tuner.parameters(), lr=0.1)

    def trained(stop):
        model, tuner, optimizer = fresh()
        for number, batch in enumerate(inputs):
            if number == stop:
                state, moments = tuner.state_dict(), optimizer.state_dict()
                model, tuner, optimizer = fresh()
                tuner.load_state_dict(state)
                optimizer.load_state_dict(moments)
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        return model, tuner

    (whole, one), (again, two) = trained(None), trained(2)
    assert same_bits(dict(whole.named_buffers()), dict(again.named_buffers()))
    found = [tuner.adapter() for tuner in (one, two)]
    assert "norm.running_mean" in found[0].tensors and found[0].tensors.keys() == found[1].tensors.keys()
    for name, tensor in found[0].tensors.items():
        assert torch.equal(tensor.values, found[1].tensors[name].values), name
    with two.reference():
        inside = two.adapter()
    assert all(torch.equal(tensor.values, inside.tensors[name].values) for name, tensor in found[0].tensors.items())
    state = two.state_dict()
    assert int(state["shira_buffer:norm.num_batches_tracked"]) == 3
    before = {name: buffer.clone() for name, buffer in again.named_buffers()}
    for key, value in {"shira_buffer:norm.running_mean": torch.ones(5), "shira_buffer:elsewhere": torch.ones(4)}.items():
        with pytest.raises(TuningError, match=f"has a buffer '{key.partition(':')[2]}'"):
            two.load_state_dict(state | {key: value})
    assert same_bits(before, dict(again.named_buffers()))


def test_a_new_head_is_resumed_in_another_process():
    """Where it has other random values."""
    model, states = classifier(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        nn.init.normal_(model.classifier.weight)
        with shira.attach(model, density=0.2) as tuner:
            for state in states:
                tuner.load_state_dict(state)
            states.append(tuner.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items() if name.endswith(".values"))


class Remembers(nn.Module):
    """Keeps its input in a buffer, by assignment."""

    def __init__(self, change=lambda module: None):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.change = nn.Linear(8, 4), change
        self.register_buffer("last", torch.zeros(5, 8))
        self.register_buffer("other", torch.ones(1).expand(3))

    def forward(self, x):
        self.last = x.detach()
        self.change(self)
        return self.layer(x)


def trained_on(model, inputs):
    tuner = shira.attach(model, density=0.3)
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    model(inputs).square().mean().backward()
    optimizer.step()
    return tuner


def test_tensors_of_others_in_buffers_are_not_written_to():
    inputs = torch.randn(20, 8)
    kept, model, base = inputs.clone(), Remembers(), Remembers()
    options = {"mask": "snip", "density": 0.3, "calibration": [inputs[:5]]}
    shira.attach(model, loss_fn=lambda m, x: m(x).square().mean(), **options).detach()
    tuner = trained_on(model.double().float(), inputs[:5])
    with tuner.reference(), torch.no_grad():
        assert torch.equal(model(inputs[:5]), base(kept[:5]))
    assert model.last.data_ptr() == inputs.data_ptr()
    adapter = tuner.adapter()
    tuner.load_state_dict(tuner.state_dict())
    model.double()
    model.float()(inputs[5:10])
    tuner.detach()
    assert not model.last.any() and "last" in adapter.tensors
    switcher = shira.Switcher(model)
    switcher.add("a", adapter)
    for selection in ("a", {"a": 0.5}, None):
        model(inputs[10:15])
        switcher.use(selection)
        model(inputs[15:])
    switcher.use("a")
    model(inputs[10:15])
    switcher.use(None)
    assert torch.equal(inputs, kept) and torch.equal(model.last, kept[15:])  # what the last pass on the base has left


def test_buffers_stay_the_same_objects_where_they_are_the_models_own():
    """Others may hold them, as captured graphs do. After a cast they are other objects, by torch."""
    model = Normed()
    found = model.norm.running_mean
    tuner = shira.attach(model, density=0.3)
    model(torch.randn(8, 2, 9))
    tuner.load_state_dict(tuner.state_dict())
    with tuner.reference():
        assert model.norm.running_mean is found
    tuner.detach()
    assert model.norm.running_mean is found and not found.any()


def change_to(value):
    return lambda module: setattr(module, "other", value)


@pytest.mark.parametrize(
    "change", [change_to(None), change_to(torch.ones(2)), change_to(torch.zeros(1).expand(3)), lambda m: m.other[:1].zero_()]
)
def test_buffers_that_take_another_form_come_back(change):
    model = Remembers(change)
    tuner = trained_on(model, torch.randn(5, 8))
    now = model.other
    with tuner.reference():
        assert model.other.tolist() == [1, 1, 1]
    assert model.other is now
    tuner.load_state_dict(tuner.state_dict())
    model(torch.randn(5, 8))
    tuner.adapter()
    tuner.detach()
    assert model.other.tolist() == [1, 1, 1]


UNUSUAL = {
    "csr": lambda: torch.eye(8).to_sparse_csr(),
    "csc": lambda: torch.eye(8).to_sparse_csc(),
    "bsr": lambda: torch.eye(8).to_sparse_bsr((2, 2)),
    "coo": lambda: torch.eye(8).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.quint8),
    "by channel": lambda: torch.quantize_per_channel(torch.zeros(4, 4), torch.ones(4), torch.zeros(4), 0, torch.qint8),
    "conjugated": lambda: torch.zeros(4, dtype=torch.complex64).conj(),
    "negated": lambda: torch.ones(4, dtype=torch.complex64).conj().imag,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("late", [False, True])
def test_unusual_buffers_are_left_alone(kind, late, tmp_path):
    unusual = UNUSUAL[kind]()
    model = Remembers(change_to(unusual) if late else lambda module: None)
    model.other = model.other if late else unusual
    before = model.layer.weight.detach().clone()
    tuner = trained_on(model, torch.randn(5, 8))
    with tuner.reference():
        pass
    tuner.load_state_dict(tuner.state_dict())
    adapter = tuner.adapter()
    tuned = {f"layer.{name}": getattr(model.layer, name).detach().clone() for name in ("weight", "bias")}
    tuner.detach()
    assert model.other is unusual and torch.equal(model.layer.weight, before)
    switcher = shira.Switcher(model)
    switcher.add("a", adapter)
    switcher.use({"a": 0.5})
    switcher.use(None)
    adapter.save(tmp_path / "a.safetensors")
    shira.fuse({tmp_path / "a.safetensors": 0.5}, base=model)
    shira.compare(adapter, adapter, base=model)
    tuned |= {"other": unusual, "last": model.last}
    assert "layer.weight" in shira.extract(model, tuned, density=0.3).tensors
    assert torch.equal(model.layer.weight, before)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sparse_weights_are_refused_only_as_targets():
    model = mlp()
    model.aside = nn.Linear(4, 4)
    model.aside.weight = nn.Parameter(torch.eye(4).to_sparse_csr())
    shira.attach(model, density=0.3, exclude="aside").detach()
    with pytest.raises(TargetError, match=r"'aside.weight' must be a dense tensor.*sparse_csr"):
        shira.attach(model, density=0.3)
    one = shira.SparseTensor((4, 4), torch.tensor([0]), torch.ones(1), "overwrite")
    with pytest.raises(shira.BaseMismatch, match=r"'aside.weight' must be a dense tensor.*sparse_csr"):
        shira.Switcher(model).add("a", shira.Adapter({"aside.weight": one}))
