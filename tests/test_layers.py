"""Layers of every kind train at their masks' positions as they would densely, and stay what they are."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import shira
from conftest import all_bits, bits, same_bits
from families import FAMILIES, family, family_batch
from shira import MaskError, TargetError, TuningError


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 6, 3, padding=1)
        self.two = nn.Conv2d(2, 4, (2, 3), stride=2, groups=2)
        self.three = nn.Conv3d(1, 5, 2, bias=False)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [n, 3, 16]
        x = self.norm(self.one(x)).relu()  # [n, 6, 16]
        x = self.two(x.reshape(-1, 2, 6, 8)).relu()  # [n, 4, 3, 3]
        return self.three(x.reshape(-1, 1, 4, 3, 3)).sum((2, 3, 4))


class Attention(nn.Module):
    """Packed projections of one width, and separate ones of several."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
        self.apart = nn.MultiheadAttention(8, 2, kdim=3, vdim=5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [n, t, 8]
        x = self.packed(x, x, x)[0]
        return self.apart(x, x[..., :3], x[..., :5])[0]


class Words(nn.Module):
    """Embeddings: with a padding row and tied to an output layer; with gradients by frequency."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(23, 6, padding_idx=0)
        self.places = nn.Embedding(9, 6, scale_grad_by_freq=True)
        self.out = nn.Linear(6, 23)
        self.out.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.words(ids) + self.places(torch.arange(ids.shape[1])))


def inputs(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind is Convolutions:
        return torch.randn(4, 3, 16, generator=generator)
    if kind is Attention:
        return torch.randn(4, 5, 8, generator=generator)
    return torch.randint(0, 23, (4, 9), generator=generator)


def loss_of(model, batch):
    return model(batch).square().mean() if isinstance(batch, torch.Tensor) else model(**batch).loss


MODELS = {kind.__name__: kind for kind in (Convolutions, Attention)}
EVERYTHING = {
    "Convolutions": ["one", "two", "three", "norm", "bias"],
    "Attention": ["in_proj_weight", "out_proj", "bias", "bias_k", "k_proj_weight", "in_proj_bias"],
    "Words": ["words", "places", "out.bias"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "norm"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "wte", "wpe", "ln_f", "bias"],
    "mixtral": ["q_proj", "experts", "gate", "embed_tokens", "input_layernorm"],
    "vit": ["projection", "q_proj", "fc1", "bias", "classifier", "cls_token", "layernorm"],
}


def make(name):
    torch.manual_seed(0)
    if name in FAMILIES:
        return family(name), [family_batch(name, seed) for seed in range(3)]
    kind = {"Words": Words, **MODELS}[name]
    return kind().eval(), [inputs(kind, seed) for seed in range(3)]


def columns(weight, k):
    """Whole columns, as many as fit; or the first entries."""
    fits = k // weight.shape[0]
    chosen = torch.zeros(weight.shape, dtype=torch.bool)
    chosen[:, :fits] = True
    return chosen if fits else torch.arange(k)


def rows(weight, k):
    fits = k // weight.shape[1]
    chosen = torch.zeros(weight.shape, dtype=torch.bool)
    chosen[-fits or weight.shape[0] :] = True
    return chosen if fits else torch.arange(k)


@pytest.mark.parametrize("mask", ["rand", "snip", columns, rows])
@pytest.mark.parametrize("name", EVERYTHING)
def test_gradients_are_the_dense_ones_at_the_positions(name, mask):
    model, batches = make(name)
    twin = copy.deepcopy(model)
    before = all_bits(model)
    loss_of(twin, batches[0]).backward()
    expected = loss_of(twin, batches[0])
    options = {"mask": mask, "density": 0.4, "targets": EVERYTHING[name], "calibration": batches, "loss_fn": loss_of}
    with shira.attach(model, **options) as tuner:
        loss = loss_of(model, batches[0])
        assert torch.equal(loss, expected)  # attaching changes nothing
        loss.backward()
        dense = dict(twin.named_parameters())
        assert {entry.name for entry in tuner._tuned} <= dense.keys()
        for entry in tuner._tuned:
            gradient = dense[entry.name].grad.reshape(-1)[entry.touched().indices.long()]
            torch.testing.assert_close(entry.values.grad, gradient, rtol=1e-4, atol=1e-6, msg=entry.name)
            assert entry.weight.grad is None
        assert sum(float(entry.values.grad.abs().sum()) for entry in tuner._tuned) > 0
    assert same_bits(before, all_bits(model))
    assert all("shira" not in key for key in model.state_dict())
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", EVERYTHING)
def test_both_ways_of_the_paper_agree_and_the_adapter_switches(name, tmp_path):
    model, batches = make(name)
    before = all_bits(model)
    trained = {}
    for method in ("values", "hook"):
        with shira.attach(model, mask="rand", density=0.4, targets=EVERYTHING[name], method=method) as tuner:
            optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
            losses = []
            for batch in batches:
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            outputs = loss_of(model, batches[0])
            trained[method] = tuner.adapter()
    for key, tensor in trained["values"].tensors.items():
        torch.testing.assert_close(tensor.values, trained["hook"].tensors[key].values, rtol=1e-4, atol=1e-6)
    assert same_bits(before, all_bits(model))
    trained["values"].save(tmp_path / "adapter.safetensors")
    switcher = shira.Switcher(model)
    switcher.add("trained", tmp_path / "adapter.safetensors")
    switcher.use("trained")
    torch.testing.assert_close(loss_of(model, batches[0]), outputs, rtol=1e-5, atol=1e-7)
    switcher.use(None)
    assert same_bits(before, all_bits(model))


def test_an_embedding_forms_no_gradient_of_its_own_size():
    model = nn.Sequential(nn.Embedding(5000, 8), nn.Linear(8, 3))
    with shira.attach(model, mask="rand", density=0.01, targets=["0"]) as tuner:
        output = model(torch.tensor([[1, 2, 3]])).sum()
        sizes = []
        node = output.grad_fn
        while node is not None:
            node.register_hook(lambda grads, _: sizes.extend(g.numel() for g in grads if g is not None))
            node = next((n for n, _ in node.next_functions if n is not None), None)
        output.backward()
        assert max(sizes) <= tuner.nnz == 400


def test_a_norm_and_a_linear_layers_bias_train_beside_its_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    with shira.attach(model, mask="wm", density=1.0, targets=["0", "bias", "1"]) as tuner:
        assert [e.name for e in tuner._tuned] == ["0.weight", "0.bias", "1.weight", "1.bias", "2.bias"]
        model(torch.randn(3, 5)).square().sum().backward()
        assert all(bool(entry.values.grad.any()) for entry in tuner._tuned)
        assert {name.rpartition(".")[2] for name, _ in model.named_parameters() if "shira" in name} == {
            "shira_values",
            "shira_values_bias",
        }


def test_a_vector_has_no_rank_and_experts_have_one_each():
    model, _ = make("mixtral")
    with shira.attach(model, mask="rand", rank=2, targets=["experts.gate_up_proj", "norm"]) as tuner:
        counts = {entry.name: entry.indices.numel() for entry in tuner._tuned}
    assert counts["model.layers.0.mlp.experts.gate_up_proj"] == 2 * 3 * (40 + 16)
    assert counts["model.norm.weight"] == 16


def test_wanda_knows_which_side_of_a_weight_the_input_is_on():
    model, batches = make("gpt2")
    seen = {}

    def mask(weight, activations, k, name):
        seen[name] = weight.abs() * activations
        return shira.masks.wanda(weight, activations, k)

    with shira.attach(model, mask=mask, density=0.1, targets=["c_fc"], calibration=batches) as tuner:
        kept = []
        module = model.transformer.h[0].mlp.c_fc
        handle = module.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].reshape(-1, 16)))
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        handle.remove()
        entry = tuner._tuned[0]
    expected = entry.weight.abs() * torch.cat(kept).norm(dim=0)[:, None]
    torch.testing.assert_close(seen[entry.name], expected)
    with pytest.raises(MaskError, match="saw no input of a linear layer.*'transformer.wpe.weight'"):
        shira.attach(model, mask="wanda", density=0.1, targets=["wpe", "c_fc"], calibration=batches)


def test_recurrent_layers_are_refused():
    with pytest.raises(TargetError, match="'weight_ih_l0' belongs to a LSTM, which"):
        shira.attach(nn.LSTM(3, 4), targets=["weight_ih_l0"])


def test_embeddings_that_change_their_own_weights_are_refused():
    with pytest.raises(TargetError, match="'0.weight' belongs to a Embedding with max_norm, which"):
        shira.attach(nn.Sequential(nn.Embedding(3, 4, max_norm=1.0)), targets=["0"])


def test_a_part_that_was_frozen_is_not_trained_unasked():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].requires_grad_(False)
    with pytest.raises(TargetError, match=r"1 of 2 targets were frozen.*'1.weight'"):
        shira.attach(model)
    shira.attach(model, exclude="1").detach()
    model.requires_grad_(False)  # as one does before adding adapters: all of it is the base
    shira.attach(model).detach()


def test_values_frozen_after_attach_are_an_error_before_the_first_step():
    model = nn.Sequential(nn.Linear(3, 3)).train()
    with shira.attach(model):
        model.requires_grad_(False)
        with pytest.raises(TuningError, match="frozen .* after attach") as raised:
            model(torch.randn(2, 3))
        assert "PEFT" not in str(raised.value)
        model.eval()
        model(torch.randn(2, 3))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_what_follows_a_target_may_change_its_output_in_place(kind):
    """As after a layer of torch, whose outputs are no views; the gradients are those of a copy out of place."""

    class Model(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            torch.manual_seed(0)
            self.in_place = in_place
            conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 6)
            self.layer = {"linear": nn.Linear(6, 6), "conv1d": conv1d, "embedding": nn.Embedding(9, 6)}[kind]

        def forward(self, x):
            hidden = self.layer(x)
            hidden = hidden if self.in_place else hidden.clone()
            hidden += 0.5
            return nn.functional.relu(hidden, inplace=True).square().mean()

    inputs = torch.arange(8).view(2, 4) if kind == "embedding" else torch.randn(2, 4, 6)
    found = []
    for in_place in (False, True):
        model = Model(in_place)
        with shira.attach(model, targets=["layer"], density=0.5) as tuner:
            loss = model(inputs)
            loss.backward()
            found.append((loss.detach(), *(parameter.grad for parameter in tuner.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("kind", "argument", "shape"),
    [("linear", "input", (2, 6)), ("conv1d", "x", (2, 6)), ("conv2d", "input", (2, 6, 4, 4)), ("embedding", "input", (2, 3))],
)
@pytest.mark.parametrize("grad", [True, False])
def test_an_argument_may_be_given_by_the_name_that_it_has(kind, argument, shape, grad):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 6)
    layer = {"linear": nn.Linear(6, 6), "conv1d": conv1d, "conv2d": nn.Conv2d(6, 6, 3), "embedding": nn.Embedding(9, 6)}[kind]
    inputs = torch.ones(shape, dtype=torch.int64 if kind == "embedding" else torch.float32)
    with shira.attach(nn.Sequential(layer), targets=["0"], density=0.5), torch.set_grad_enabled(grad):
        assert torch.equal(layer(**{argument: inputs}), layer(inputs))


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
@pytest.mark.parametrize("padding", [None, 1])
def test_an_embedding_of_no_ids_has_a_gradient_of_zeros(shape, padding):
    model = nn.Sequential(nn.Embedding(10, 8, padding_idx=padding))
    with shira.attach(model, targets=["0"], density=0.5) as tuner:
        model(torch.zeros(shape, dtype=torch.int64)).sum().backward()
        assert torch.equal(tuner.parameters()[0].grad, torch.zeros(40))


def test_transposed_convolutions_in_any_model(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose2d(4, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 3, 4, 2, 1)
    ).eval()
    base, noise = all_bits(model), torch.randn(2, 4, 3, 3)
    with shira.attach(model, mask="wm", density=0.1, targets=["0", "3"]) as tuner:
        optimizer = torch.optim.Adam(tuner.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(noise).square().mean().backward()
            optimizer.step()
        trained = model(noise)
        tuner.adapter("faces").save(tmp_path / "faces.safetensors")
    switcher = shira.Switcher(model)
    switcher.add("faces", tmp_path / "faces.safetensors")
    switcher.use("faces")
    assert torch.equal(bits(model(noise)), bits(trained))
    switcher.use(None)
    assert same_bits(all_bits(model), base)


class Lists(nn.Module):
    """Weights in lists and dictionaries, which nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.several = nn.ParameterList([nn.ParameterList([nn.Parameter(torch.randn(4, 4))]), nn.Parameter(torch.randn(4, 4))])
        self.named = nn.ParameterDict({"weight": nn.Parameter(torch.randn(4, 4))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.several[0][0] @ self.several[1]).tanh() @ self.named["weight"]


def test_weights_in_lists_train_as_they_would_by_a_hook():
    torch.manual_seed(0)
    model, inputs = Lists(), torch.randn(5, 4)
    base, results = all_bits(model), []
    for method in ("values", "hook"):
        targets = ["several.0.0", "several.1", "named.weight"]
        with shira.attach(model, density=0.4, targets=targets, method=method) as tuner:
            optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                model(inputs).square().mean().backward()
                optimizer.step()
            results.append(tuner.adapter())
        assert same_bits(base, all_bits(model))
        assert (len(model.several), list(model.named)) == (2, ["weight"])
    one, other = (result.tensors for result in results)
    assert len(one) == 3
    for name, tensor in one.items():
        torch.testing.assert_close(tensor.values, other[name].values)
        assert not torch.equal(tensor.values, base[name].view(torch.float32)[tensor.indices])


LAYERS = {
    "linear": lambda: (nn.Linear(4, 4), (2, 4)),
    "convolution": lambda: (nn.Conv2d(2, 3, 3), (1, 2, 5, 5)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own, as it enters dual_level
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_second_and_forward_derivatives_and_torch_func_are_refused(make):
    layer, shape = make()
    model = nn.Sequential(layer)
    inputs = torch.ones(shape, requires_grad=True)
    with shira.attach(model, targets=["0"], density=0.5) as tuner:
        with pytest.raises(TuningError, match="create_graph=True asks for second derivatives, and through '0.weight'"):
            torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        with pytest.raises(TuningError, match="torch.func"):
            torch.func.grad(lambda given: model(given).sum())(inputs.detach())
        with torch.no_grad():
            torch.func.vmap(model)(inputs.detach()[None])
        with forward_ad.dual_level(), pytest.raises(TuningError, match="forward-mode differentiation"):
            model(forward_ad.make_dual(inputs.detach(), inputs.detach()))
        (gradient,) = torch.autograd.grad(model(inputs).sum(), inputs)
        assert bool(gradient.any()) and tuner.attached
    with shira.attach(model, targets=["0"], density=0.5, method="hook"):
        (gradient,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        gradient.square().sum().backward()
        assert bool(layer.weight.grad.any())
