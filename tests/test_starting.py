"""attach(start=…): an adapter's training goes on, and the base stays the base."""

import json

import pytest
import torch
from torch import nn

import shira
from conftest import all_bits, letter_tokenizer, mlp, mlp_batches, mlp_loss, same_bits
from shira import BaseMismatch, MaskError, TuningError
from test_buffers_and_heads import Normed, classifier

BATCHES = mlp_batches(6)


def trained(model, tuner, batches, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(tuner.parameters(), lr=0.5)
    for batch in batches:
        optimizer.zero_grad()
        mlp_loss(model, batch).backward()
        optimizer.step()
    return tuner.adapter("poet")


def same(one, other):
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        found = other.tensors[name]
        assert torch.equal(tensor.indices, found.indices) and torch.equal(tensor.values, found.values), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{"mask": "snip", "calibration": BATCHES[:1]}, {"mask": "struct"}, {"lr_scale": 4.0}], ids=str
)
def test_training_in_two_parts_is_training_in_one(tmp_path, options, dtype):
    model = mlp().to(dtype)
    batches = [tuple(each.to(dtype) if each.is_floating_point() else each for each in batch) for batch in BATCHES]
    options = options | ({"calibration": batches[:1], "loss_fn": mlp_loss} if "calibration" in options else {})
    base = all_bits(model)
    with shira.attach(model, density=0.3, **options) as tuner:
        half = trained(model, tuner, batches[:3])
        whole = trained(model, tuner, batches[3:])
    half.save(tmp_path / "half.safetensors")
    for start in (half, tmp_path / "half.safetensors", str(tmp_path / "half.safetensors")):
        with shira.attach(model, start=start, lr_scale="auto") as tuner:
            assert tuner.lr_scale == options.get("lr_scale", 1)
            same(half, tuner.adapter())
            again = trained(model, tuner, batches[3:])
        assert same_bits(base, all_bits(model))
        if dtype is torch.float32:  # in bfloat16 the file has rounded what was trained
            same(whole, again)
        assert again.fingerprints == whole.fingerprints  # of the true base
        assert again.metadata["mask"]["start"] == "poet" and again.metadata["mask"]["name"] == whole.metadata["mask"]["name"]
    switcher = shira.Switcher(model)
    switcher.add("again", again)
    with pytest.raises(MaskError, match="keeps the entries of its adapter"), shira.attach(model, start=half) as tuner:
        tuner.refresh(torch.optim.SGD(tuner.parameters(), lr=0.1))
    assert same_bits(base, all_bits(model))


def test_deltas_statistics_and_heads_go_on():
    model = mlp()
    with shira.attach(model, density=0.2) as tuner:
        overwrites = trained(model, tuner, BATCHES)
    found = {}
    for name, tensor in overwrites.tensors.items():
        base = model.state_dict()[name].view(-1)[tensor.indices.long()]
        found[name] = shira.SparseTensor(tensor.shape, tensor.indices, tensor.values - base, "delta")
    with shira.attach(model, start=shira.Adapter(found, {})) as tuner:
        for name, tensor in tuner.adapter().tensors.items():
            torch.testing.assert_close(tensor.values, overwrites.tensors[name].values)
        assert tuner.adapter().metadata["mask"] == {"name": "from_adapter", "start": "an adapter"}

    torch.manual_seed(0)
    model, inputs = Normed(), torch.randn(8, 2, 9) + 1
    base = all_bits(model)
    with shira.attach(model, density=0.3) as tuner:
        model(inputs)
        statistics = tuner.adapter("seen")
    with shira.attach(model, start=statistics) as tuner:
        assert "norm.running_mean" in statistics.tensors
        same(statistics, tuner.adapter())
    assert same_bits(base, all_bits(model))

    model = classifier()
    with shira.attach(model, density=0.1) as tuner:
        for parameter in tuner.parameters():
            parameter.detach().add_(0.1)
        half = tuner.adapter("head")
    nn.init.normal_(model.classifier.weight)  # as at another load
    with shira.attach(model, start=half) as tuner:
        again = tuner.adapter()
        same(half, again)
        assert again.metadata["mask"]["whole"] == half.metadata["mask"]["whole"] and again.fingerprints == half.fingerprints


def test_tied_weights_sums_and_shared_statistics(tiny_llama):
    tiny_llama.config.tie_word_embeddings = True
    tiny_llama.tie_weights()
    names = ["lm_head.weight", "model.embed_tokens.weight"]
    base = tiny_llama.lm_head.weight.detach().view(-1)[:3].clone()
    held = shira.SparseTensor(tuple(tiny_llama.lm_head.weight.shape), torch.arange(3), base + 1, "overwrite")
    for given in (names, names[:1], names[1:]):
        with shira.attach(tiny_llama, start=shira.Adapter(dict.fromkeys(given, held), {})) as tuner:
            (found,) = tuner.adapter().tensors.values()
            assert torch.equal(found.values, base + 1)
    other = shira.SparseTensor(held.shape, held.indices, base + 2, "overwrite")
    with pytest.raises(BaseMismatch, match="which are tied here"):
        shira.attach(tiny_llama, start=shira.Adapter({names[0]: held, names[1]: other}, {}))

    model = Normed()
    model.again = model.norm  # one module by two names
    model.norm.running_mean.fill_(3)
    delta = shira.SparseTensor((4,), torch.arange(4), torch.full((4,), 0.5), "delta")
    weight = shira.SparseTensor((2, 4), torch.arange(2), torch.ones(2), "delta")
    adapter = shira.Adapter({"norm.running_mean": delta, "two.weight": weight}, {})
    switcher = shira.Switcher(model)
    switcher.add("sum", adapter)
    switcher.use("sum")
    sums = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    switcher.use(None)
    with shira.attach(model, start=adapter):
        assert torch.equal(model.norm.running_mean, torch.full((4,), 3.5))
        assert all(torch.equal(tensor, sums[name]) for name, tensor in model.state_dict().items() if "shira" not in name)
    half = mlp().half()
    half[0].weight.detach().view(-1)[0] = 60000
    far = shira.SparseTensor(tuple(half[0].weight.shape), torch.tensor([0]), torch.tensor([60000.0]), "delta")
    with pytest.raises(TuningError, match="base and delta of '0.weight' overflow float16"):
        shira.attach(half, start=shira.Adapter({"0.weight": far}, {}))
    wide = mlp().double()
    third = shira.SparseTensor(far.shape, far.indices, torch.tensor([1 / 3], dtype=torch.float64), "overwrite")
    with pytest.raises(TuningError, match="float32 cannot hold"):
        shira.attach(wide, start=shira.Adapter({"0.weight": third}, {}))
    odd = {"mask": {"name": "wm", "seed": 0, "lr_scale": "abc", "whole": [["x"], "0.weight"]}}
    kept = shira.SparseTensor(far.shape, far.indices, torch.tensor([0.5]), "overwrite")
    with shira.attach(mlp(), start=shira.Adapter({"0.weight": kept}, odd), lr_scale="auto", mask="".join(["w", "m"])) as tuner:
        assert tuner.nnz == 1


def test_what_cannot_go_on_is_refused_and_the_model_as_it_was(tmp_path):
    model = mlp()
    with shira.attach(model, density=0.2) as tuner:
        half = trained(model, tuner, BATCHES[:1])
    with shira.attach(model, density=0.2, low_rank=2) as tuner:
        hybrid = tuner.adapter("hybrid")
    base = all_bits(model)
    for options, error, words in [
        ({"start": half, "mask": "snip"}, TuningError, "mask cannot be given with it: leave mask out"),
        ({"start": half, "density": 0.1, "targets": ["0"]}, TuningError, "density, targets cannot be given"),
        ({"start": half, "low_rank": 2}, TuningError, "low_rank cannot be given"),
        ({"start": 5}, TuningError, 'start="poet.safetensors", found 5'),
        ({"start": hybrid}, TuningError, "'hybrid' was trained beside a low-rank part"),
        ({"start": shira.Adapter({}, {})}, TuningError, "holds no entry of a parameter"),
        ({"start": tmp_path / "none.safetensors"}, FileNotFoundError, "none.safetensors"),
    ]:
        with pytest.raises(error, match=words):
            shira.attach(model, **options)
        assert same_bits(base, all_bits(model)) and not hasattr(model, "shira_tuner")
    with torch.no_grad():
        model[0].weight += 1
    with pytest.raises(BaseMismatch, match="'poet' does not belong to this model: the base values under"):
        shira.attach(model, start=half)
    shira.attach(model, density=0.1, mask="wm", exclude=[]).detach()


def test_the_command_goes_on_with_an_adapter(run, tmp_path, monkeypatch, tiny_llama):
    monkeypatch.chdir(tmp_path)
    tiny_llama.save_pretrained("model")
    letter_tokenizer().save_pretrained("model")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "abc" * (1 + n % 3)}) for n in range(9)))
    line = "train model --data a.jsonl --steps 3 --batch-size 3 --lr 0.01"
    assert run(f"{line} --mask snip --density 0.1 -o poet")[0] == 0
    code, out, err = run(f"{line} --start poet -o more.safetensors")
    poet, more = shira.load("poet"), shira.load("more.safetensors")
    assert code == 0 and f"trains the {poet.nnz:,} entries of poet, from its values, in 10 tensors" in " ".join(out.split()), (
        err
    )
    assert more.fingerprints == poet.fingerprints and more.metadata["mask"]["start"] == "poet"
    assert any(not torch.equal(tensor.values, more.tensors[name].values) for name, tensor in poet.tensors.items())
    assert run("train --config more.yaml -o again.safetensors")[0] == 0
    same(more, shira.load("again.safetensors"))
    for options, words in {
        "--start poet --mask snip": "--start takes the entries of poet as they are: leave out --mask",
        "--start poet --targets all-linear --density 0.1": "leave out --density",
        "--start none.safetensors": "none.safetensors",
    }.items():
        code, _, err = run(f"{line} {options} -o other.safetensors")
        assert code == 1 and words in err and "loading" not in err, err
