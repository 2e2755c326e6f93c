"""Classification of pictures: how DINOv2 is read and asked, which pictures are whose, and that the table says what came out."""

import random

import numpy as np
import pytest
import torch
from experiments.image import classify, dino, labelled
from experiments.language import methods, settings
from experiments.store import Store, number, work
from transformers import Dinov2Config, Dinov2Model

from conftest import all_bits, same_bits
from shira.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it


def tiny_dino() -> Dinov2Model:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    return Dinov2Model(Dinov2Config(**sizes, image_size=42, patch_size=14, use_mask_token=False)).eval()


def coloured(count: int) -> labelled.Pictures:
    """Pictures whose class is their colour, red or blue, in many shades."""
    drawn = random.Random(count)
    pictures = np.zeros((count, 20, 20, 3), dtype=np.uint8)
    for picture in range(count):
        pictures[picture, :, :, 2 * (picture % 2)] = drawn.randrange(100, 256)
    return labelled.Pictures(pictures, [picture % 2 for picture in range(count)], ["red", "blue"])


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The recipe on a tiny model in a folder, and two sets of coloured pictures."""
    monkeypatch.setenv("SHIRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(labelled, "SETS", {"few": lambda: coloured(60), "many": lambda: coloured(80)})
    labelled._read.cache_clear()
    tiny_dino().save_pretrained(tmp_path / "model")
    recipe = settings.named("table11") | {
        "model": str(tmp_path / "model"),
        "data": ["few", "many"],
        "side": 28,
        "seeds": [0, 1],
    }
    recipe |= {"examples": 20, "steps": 4, "batch_size": 5, "calibration": 8, "validation": 10, "test": 20, "most_rates": 2}
    made = {name: recipe["methods"][name] | {"rates": [0.01, 0.02]} for name in recipe["methods"]}
    yield recipe | {"methods": made}
    labelled._read.cache_clear()


def test_a_table_of_what_was_run(bench, tmp_path, capfd):
    """Every cell is a run; a second time nothing is left to do; the report needs the results alone."""
    bench["methods"] = {name: bench["methods"][name] for name in ("lora", "wm", "head")}
    store = Store(tmp_path / "results.jsonl")
    assert classify.report(bench, store, None) == "no results yet"
    made, failed = [], []
    lab = classify.Lab(store)
    work(
        lambda: classify.wanted(bench, store),
        lab.run,
        store,
        lambda key, left: made.append(key),
        lambda key, what: failed.append(what),
    )
    assert failed == []
    kinds = [key["kind"] for key in made]
    # of 3 methods on 2 sets 2 rates; the better one on another seed; both seeds are scored
    assert kinds.count("train") == 3 * 2 * (2 + 1) and kinds.count("score") == 3 * 2 * 2
    assert all(store.get(key) is not None for key in classify.wanted(bench, store))
    lines = {
        line[0]: line for line in (text.strip("| ").split(" | ") for text in classify.report(bench, store, None).splitlines())
    }
    assert lines["method"][3:5] == ["few", "many"]
    asked = labelled.part("few", "test", 20, 10).labels
    assert lines["most frequent class"][3] == f"{100 * max(asked.count(0), asked.count(1)) / 20:.1f}"
    assert "(p " in lines["wm"][6] and lines["lora"][6] == ""
    assert lines["head"][1] == "0" and lines["lora"][7].count("(2)") == 2
    rows = [store.get(classify.score_key(bench, classify.trained(bench, store, "wm", "few", seed))) for seed in (0, 1)]
    right = [row["right"]["few"] for row in rows]
    assert all(len(digits) == 20 for digits in right)
    assert lines["wm"][3].startswith(f"{100 * sum(digits.count('1') for digits in right) / 40:.1f} ± ")


@pytest.mark.parametrize("name", ["lora", "wm", "snip", "struct", "head"])
def test_the_head_is_in_the_adapter_and_comes_off_again(bench, tmp_path, name, capfd):
    lab = classify.Lab(Store(tmp_path / "results.jsonl"))
    model, _, _ = lab.model(bench["model"], "bfloat16")
    key = classify.train_key(bench, bench["methods"][name], 0.01, 0, "few")
    before, rows = all_bits(model), lab.rows(classify.score_key(bench, key), "test")
    assert model.classifier.weight.dtype == torch.float32
    base = lab.logits(model, rows)
    result = lab.run(key)
    lab.store.add(key, result, 0)
    assert same_bits(before, all_bits(model)) and torch.equal(lab.logits(model, rows), base)
    assert result["parameters"] >= model.classifier.weight.numel()
    with methods.adapted(model, [lab.folder(number(key))]) as ready:
        assert not torch.equal(lab.logits(ready, rows), base)
    assert same_bits(before, all_bits(model))


def test_training_learns_what_decides(bench, tmp_path, capfd):
    """Colours are told apart after 30 steps, and were not before."""
    lab = classify.Lab(Store(tmp_path / "results.jsonl"))
    key = classify.train_key(bench | {"steps": 30, "head_rate": 0.05}, bench["methods"]["wm"], 0.01, 0, "many")
    lab.store.add(key, lab.run(key), 0)
    score = lab.run(classify.score_key(bench, key))
    assert classify.share(score) == 1.0
    model, _, _ = lab.model(bench["model"], "bfloat16")
    asked = lab.rows(classify.score_key(bench, key), "test")
    assert sum(int(answer) == label for answer, (_, label) in zip(lab.logits(model, asked).argmax(-1), asked, strict=True)) < 16


def test_intervals_are_over_seeds():
    """Student's t with two degrees of freedom is 4.303; over two sets, seed by seed."""

    def seeds(*right):
        return [{"right": {"few": "1" * n + "0" * (10 - n)}} for n in right]

    assert classify.over_seeds([seeds(8, 9, 10)]) == "90.0 ± 24.8"
    assert classify.over_seeds([seeds(8, 9, 10), seeds(10, 9, 8)]) == "90.0 ± 0.0"
    assert classify.over_seeds([seeds(7)]) == "70.0"


def test_what_is_trained_on_is_not_what_is_asked(bench):
    """The test and validation pictures are the same for all seeds; those for training are drawn from the others."""
    whole = labelled._read("many").pictures
    marked = labelled.Pictures(np.arange(80 * 1200, dtype=np.uint32).reshape(80, 20, 20, 3), list(range(80)), [])
    labelled.SETS["many"] = lambda: marked
    labelled._read.cache_clear()
    test, validation = (set(labelled.part("many", which, 20, 10).labels) for which in ("test", "validation"))
    training = [labelled.part("many", "train", 20, 10, 30, seed).labels for seed in (0, 1)]
    assert len(test) == 20 and len(validation) == 10 and len(whole) == 80
    assert all(len(set(seed)) == 30 for seed in training) and set(training[0]) != set(training[1])
    assert not test & validation and not (test | validation) & {*training[0], *training[1]}
    assert len(labelled.part("many", "train", 20, 10, 1000, 0).labels) == 50
    drawn = labelled.part("many", "train", 20, 10, 30, 0)
    assert (drawn.pictures == marked.pictures[drawn.labels]).all()
    with pytest.raises(DataError, match="many has 80 pictures, expected at least 90"):
        labelled.part("many", "test", 40, 10)


def test_pictures_as_the_model_takes_them():
    """Scaled to the side, with the photographs' mean and deviation; wrong sizes and types are named."""
    white = np.full((2, 10, 12, 3), 255, dtype=np.uint8)
    made = dino.pixels(white, 28)
    assert made.shape == (2, 3, 28, 28) and made.dtype == torch.float32
    expected = (1 - torch.tensor(dino.MEAN)) / torch.tensor(dino.DEVIATION)
    torch.testing.assert_close(made, expected.view(1, 3, 1, 1).expand_as(made), rtol=0, atol=1e-5)
    with pytest.raises(DataError, match="a side of 30 is not a multiple of 14"):
        dino.pixels(white, 30)
    with pytest.raises(DataError, match=r"expected pictures as uint8 .*, found torch.float32 \[2, 3, 8, 8\]"):
        dino.pixels(torch.zeros(2, 3, 8, 8), 28)


def test_features_have_length_one_whatever_the_batch(monkeypatch):
    model = tiny_dino()
    monkeypatch.setattr(dino, "_model", lambda: model)
    pictures = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    found = dino.features(pictures, side=28)
    assert found.shape == (5, 16)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(dino.features(torch.from_numpy(pictures), side=28, batch=2), found)
    assert dino.features(pictures[:0], side=28).shape == (0, 16)


def test_weights_of_an_exported_graph():
    """Transposed weights are found by the names of nodes, as the exporter leaves them; one that is missing is an error."""
    onnx = pytest.importorskip("onnx")
    model, other = tiny_dino(), tiny_dino()
    old = {new: old for old, new in dino.NEW_NAMES.items()}
    initializers, nodes = [], []

    def keep(name, tensor):
        initializers.append(onnx.numpy_helper.from_array(tensor.detach().numpy().copy(), name))

    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        for new in old:
            name, module = name.replace(new, old[new]), module.replace(new, old[new])
        if name == "embeddings.position_embeddings":
            keep("onnx::Concat_7", tensor[:, :1])
            keep("onnx::Reshape_8", tensor[:, 1:])
        elif name.endswith(".weight") and tensor.dim() == 2:
            keep(f"onnx::MatMul_{len(nodes)}", tensor.T)
            place = "/" + f"backbone.{module}".replace(".", "/").replace("layer/", "layer.") + "/MatMul"
            nodes.append(onnx.helper.make_node("MatMul", ["x", f"onnx::MatMul_{len(nodes)}"], ["y"], name=place))
        else:
            keep(f"backbone.{name}", tensor)
    keep("decoder.final_conv.bias", torch.zeros(1))
    nodes.append(
        onnx.helper.make_node("MatMul", ["q", "k"], ["y"], name="/backbone/encoder/layer.0/attention/attention/MatMul")
    )
    assert not same_bits(all_bits(model), all_bits(other))
    dino.read_weights(other, onnx.helper.make_graph(nodes, "exported", [], [], initializers))
    assert same_bits(all_bits(model), all_bits(other))
    with pytest.raises(RuntimeError, match="encoder.layer.0.attention.q_proj.weight"):
        dino.read_weights(other, onnx.helper.make_graph(nodes[1:], "exported", [], [], initializers))


@pytest.mark.parametrize("there", [True, False])
def test_clip_art_is_the_expected_file_or_none(tmp_path, monkeypatch, there):
    monkeypatch.setenv("SHIRA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    if there:
        (tmp_path / "apt-get").write_text("#!/bin/sh\necho other > openclipart.deb\n")
        (tmp_path / "apt-get").chmod(0o755)
    with pytest.raises(DataError, match="has sha256 .*, expected f07f" if there else "there is no apt-get here"):
        labelled.clip_art()
    assert not list((tmp_path / "cache").iterdir())
