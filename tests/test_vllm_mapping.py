"""Where a checkpoint's tensors are in a packed and sharded model; on models of our own that load their weights as vLLM's do."""

import pytest
import torch
from torch import nn

import shira
from conftest import all_bits, bits, same_bits
from shira.errors import BaseMismatch, CheckpointError
from shira.files.tensorfiles import Form
from shira.serving.vllm import mapping
from shira.serving.vllm.mapping import Surface, landings
from shira.sparse.tensor import SparseTensor, fingerprint

HIDDEN, HEAD, HEADS, KV_HEADS, INNER, VOCABULARY = 8, 3, 4, 2, 12, 20
SHAPES = {
    "embed_tokens.weight": (VOCABULARY, HIDDEN),
    "q_proj.weight": (HEADS * HEAD, HIDDEN),
    "k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
    "v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
    "o_proj.weight": (HIDDEN, HEADS * HEAD),
    "gate_up.weight": (2 * INNER, HIDDEN),  # packed in the checkpoint already
    "down.weight": (HIDDEN, INNER),
    "norm.weight": (HIDDEN,),
}
FORMS = {name: Form(shape, torch.float32) for name, shape in SHAPES.items()}


def checkpoint(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


class Packed(nn.Module):
    """One process's part of a layer, packed and cut as in vLLM: by rows or by columns (o_proj, down); kv heads are repeated."""

    def __init__(self, rank=0, size=1, dtype=torch.float32):
        super().__init__()
        self.rank, self.size = rank, size
        heads, kv = HEADS // size, max(1, KV_HEADS // size)
        self.rows = [heads * HEAD, kv * HEAD, kv * HEAD]
        shapes = {
            "embed": (32 // size, HIDDEN),  # vLLM pads the vocabulary
            "qkv": (sum(self.rows), HIDDEN),
            "o": (HIDDEN, heads * HEAD),
            "gate_up": (2 * INNER // size, HIDDEN),
            "down": (HIDDEN, INNER // size),
            "norm": (HIDDEN,),
        }
        for name, shape in shapes.items():
            layer = nn.Module()
            layer.weight = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
            self.add_module(name, layer)
        self.lm_head = self.embed

    def load_weights(self, weights):
        for name, tensor in weights:
            self._load(name, tensor)

    def _load(self, name, tensor):
        rank, size = self.rank, self.size
        if name == "embed_tokens.weight":
            rows = 32 // size
            there = max(0, min(rows, VOCABULARY - rank * rows))
            self.embed.weight[:there].data.copy_(tensor.narrow(0, min(rank * rows, VOCABULARY), there))
        elif name[:2] in ("q_", "k_", "v_"):
            place = "qkv".index(name[0])
            groups = size if place == 0 else min(size, KV_HEADS)
            rows = self.rows[place]
            piece = tensor.narrow(0, rank * groups // size * rows, rows)
            self.qkv.weight.data.narrow(0, sum(self.rows[:place]), rows).copy_(piece)
        elif name == "gate_up.weight":
            for place in range(2):
                rows = INNER // size
                piece = tensor.narrow(0, place * INNER, INNER).narrow(0, rank * rows, rows)
                self.gate_up.weight.data.narrow(0, place * rows, rows).copy_(piece)
        elif name in ("o_proj.weight", "down.weight"):
            weight = self.o.weight if name[0] == "o" else self.down.weight
            weight.data.copy_(tensor.narrow(1, rank * weight.shape[1], weight.shape[1]))
        else:
            self.norm.weight.data.copy_(tensor)


def loaded(rank=0, size=1, seed=0, dtype=torch.float32):
    model = Packed(rank, size, dtype)
    model.load_weights(checkpoint(seed).items())
    return model


def mapped(model):
    return landings(model, FORMS, model.load_weights)


def adapter_of(tensors, seed, share=0.3):
    """An adapter of random positions of these tensors, with fingerprints."""
    generator = torch.Generator().manual_seed(seed)
    made, prints = {}, {}
    for name, tensor in tensors.items():
        chosen = (torch.rand(tensor.numel(), generator=generator) < share).nonzero().view(-1)
        made[name] = SparseTensor(tuple(tensor.shape), chosen, torch.randn(chosen.numel(), generator=generator))
        prints[name] = fingerprint(tensor.view(-1)[chosen])
    return shira.Adapter(made, {"name": f"random{seed}", "fingerprints": prints})


def changed(tensors, adapter):
    """The checkpoint with an adapter merged in."""
    merged = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, sparse in adapter.tensors.items():
        merged[name].view(-1)[sparse.indices.long()] = sparse.values
    return merged


PROCESSES = [(rank, size) for size in (1, 2, 4) for rank in range(size)]


@pytest.mark.parametrize(("rank", "size"), PROCESSES)
def test_each_tensor_is_found_where_the_model_loads_it(rank, size):
    model = loaded(rank, size)
    before = all_bits(model)
    found = mapped(model)
    assert not found.refused and found.landings.keys() == {*SHAPES, "lm_head.weight"}
    assert same_bits(before, all_bits(model))
    surface = Surface(model, found)
    whole = checkpoint()
    for name, tensor in whole.items():
        landing = found.landings[name]
        numbers, places = mapping.local_positions(landing, torch.arange(tensor.numel()))
        assert torch.equal(bits(surface._parameters[name].view(-1)[places]), bits(tensor.view(-1)[numbers]))
        assert places.numel() == surface._parameters[name].numel() and torch.equal(places, places.sort().values)
        assert landing.is_whole == (size == 1 or name == "norm.weight")


@pytest.mark.parametrize(("rank", "size"), PROCESSES)
def test_an_adapter_cut_to_a_process_is_the_whole_one_merged_and_then_loaded(rank, size):
    model = loaded(rank, size)
    before, places = all_bits(model), [weight.data_ptr() for weight in model.parameters()]
    found = mapped(model)
    whole = checkpoint()
    switcher = shira.Switcher(Surface(model, found))
    for seed in (1, 2):
        adapter = adapter_of(whole, seed)
        cut = {name: mapping.cut(name, tensor, found)[0] for name, tensor in adapter.tensors.items()}
        switcher.add(f"a{seed}", shira.Adapter(cut))
        switcher.use(f"a{seed}")
        expected = Packed(rank, size)
        expected.load_weights(changed(whole, adapter).items())
        assert same_bits(all_bits(expected), all_bits(model))
    switcher.use(None)
    assert same_bits(before, all_bits(model))
    assert places == [weight.data_ptr() for weight in model.parameters()]


class One(nn.Module):
    """A model of one weight that is loaded in some way."""

    def __init__(self, way, name="layer", dtype=torch.float32):
        super().__init__()
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=dtype), requires_grad=False)
        holder = self
        *outer, last = name.split(".")
        for part in outer:
            holder.add_module(part, nn.Module())
            holder = getattr(holder, part)
        holder.add_module(last, layer)
        self.way, self.layer_ = way, [layer]

    def load_weights(self, weights):
        for _, tensor in weights:
            self.way(self.layer_[0], tensor)


def copied(layer, tensor):
    layer.weight.data.copy_(tensor)


def halves(layer, tensor):
    layer.weight.data[:, :2].copy_(tensor[:, :2])
    layer.weight.data[:, 2:].copy_(tensor[:, 2:])


def twice(layer, tensor):
    copied(layer, tensor)
    layer.weight.data[:4].copy_(tensor)


def fails(layer, tensor):
    raise RuntimeError("no room")


def buffered(layer, tensor):
    torch.zeros(4, 4).copy_(tensor)


REFUSED = {
    "transposed": (lambda layer, tensor: layer.weight.data.copy_(tensor.t()), "another order"),
    "computed": (lambda layer, tensor: layer.weight.data.copy_(-torch.exp(tensor)), "computed from"),
    "column by column": (halves, "gaps"),
    "twice": (twice, "two places"),
    "not at all": (lambda layer, tensor: None, "not loaded"),
    "an error": (fails, "no room"),
    "no parameter": (buffered, "no parameter"),
    "another shape": (lambda layer, tensor: layer.weight.data.view(2, 8).copy_(tensor.view(2, 8)), "another order|shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_loaded_in_another_way_is_refused_with_the_reason(case):
    way, words = REFUSED[case]
    model = One(way)
    found = landings(model, {"w": Form((4, 4), torch.float32)}, model.load_weights)
    assert not found.landings
    with pytest.raises(BaseMismatch, match=f"'poet' cannot be used here: 'w' .*({words})"):
        mapping.check("'poet'", "w", (4, 4), found)


@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [
        ("layer", torch.int8, "quantized"),
        ("layer", torch.float8_e4m3fn, "quantized"),
        ("attention.kv_b_proj", torch.float32, "latent attention"),
        ("mlp.experts.up", torch.float32, "mixture of experts"),
    ],
)
def test_weights_that_cannot_be_changed_are_refused(name, dtype, words):
    model = One(copied, name, dtype)
    found = landings(model, {"w": Form((4, 4), torch.float32)}, model.load_weights)
    assert not found.landings and words in found.refused["w"]


def test_a_weight_with_a_packed_copy_is_refused():
    model = One(copied)
    model.layer_[0].cpu_linear = lambda x, weight, bias: x
    found = landings(model, {"w": Form((4, 4), torch.float32)}, model.load_weights)
    assert "packed into a copy" in found.refused["w"]
    model.layer_[0].cpu_linear = nn.functional.linear
    assert not landings(model, {"w": Form((4, 4), torch.float32)}, model.load_weights).refused


def test_a_packed_weight_without_data_is_named():
    model = One(lambda layer, tensor: None)
    model.layer_[0].weight = nn.Parameter(torch.empty(0), requires_grad=False)
    found = landings(model, {"w": Form((4, 4), torch.float32)}, model.load_weights)
    assert "'layer.weight' of the model has no data" in found.refused["w"]


def test_a_model_that_nothing_can_be_loaded_into_is_refused():
    model = One(fails)
    with pytest.raises(CheckpointError, match="cannot be mapped: 'w16' .*no room"):
        landings(model, {f"w{number}": Form((4, 4), torch.float32) for number in range(30)}, model.load_weights)


@pytest.mark.parametrize(("rank", "size"), PROCESSES)
def test_rearranged_weights_are_found_out(rank, size):
    model = loaded(rank, size)
    found, whole = mapped(model), checkpoint()

    def rows(name, number):
        return whole[name][number]

    surface = Surface(model, found)
    assert mapping.verified(surface, found, rows) == found
    model.down.weight.data.copy_(model.down.weight.data.roll(1, 0))
    model.embed.weight.data.neg_()
    now = mapping.verified(surface, found, rows)
    gone = {"down.weight"} | ({"embed_tokens.weight", "lm_head.weight"} if rank * 32 // size < VOCABULARY else set())
    assert now.refused.keys() == gone == found.landings.keys() - now.landings.keys()
    assert "rearranged" in now.refused["down.weight"]


def test_an_adapter_of_another_shape_or_name_is_refused():
    found = mapped(loaded())
    with pytest.raises(BaseMismatch, match=r"'norm.weight' has shape \[8\], the adapter expects \[9\]"):
        mapping.check("it", "norm.weight", (9,), found)
    with pytest.raises(BaseMismatch, match="no tensor 'other'"):
        mapping.check("it", "other", (9,), found)
