"""merge maps names as from_pretrained does: checkpoints whose names are not those in memory, of the real classes, both ways."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

import shira
from conftest import all_bits, random_adapter
from families import SMALL, gpt2, llama, mixtral
from shira import BaseMismatch, Switcher
from shira.checkpoints import loading

transformers = pytest.importorskip("transformers")


def llava(layers):
    sight = {key: SMALL[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    vision = transformers.CLIPVisionConfig(num_hidden_layers=1, image_size=8, patch_size=4, **sight)
    text = transformers.LlamaConfig(num_hidden_layers=layers, **SMALL)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=30)
    )


def bert(layers):
    config = transformers.BertConfig(num_hidden_layers=layers, **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})
    return transformers.BertForMaskedLM(config)


def newer_llava(name):
    """The names of LLaVA in memory, as save_pretrained of some releases wrote them."""
    text = name.removeprefix("language_model.")
    if text == name:
        return f"model.{name}"
    return f"model.language_model.{text.removeprefix('model.')}" if text.startswith("model.") else text


WAYS = {  # the model that is saved; whether without its head; how its file's names are changed; the class that loads it
    "gpt2, hub": (gpt2, True, None, "GPT2LMHeadModel"),
    "gpt2, whole": (gpt2, False, None, "GPT2LMHeadModel"),
    "gpt2, without the head": (gpt2, False, None, "GPT2Model"),
    "llama, hub": (llama, True, None, "LlamaForCausalLM"),
    "llama, without the head": (llama, False, None, "LlamaModel"),
    "llava, hub": (llava, False, None, "LlavaForConditionalGeneration"),
    "llava, as in memory": (llava, False, newer_llava, "LlavaForConditionalGeneration"),
    "llava, without the head": (llava, False, None, "LlavaModel"),
    "llava, a head added": (llava, True, None, "LlavaForConditionalGeneration"),
}


def saved(folder, make, bare, rename=None):
    torch.manual_seed(0)
    model = make(1)
    (model.base_model if bare else model).save_pretrained(folder)
    if rename is not None:
        file = folder / "model.safetensors"
        save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize("way", WAYS)
def test_names_are_those_that_from_pretrained_gives(way, tmp_path):
    make, bare, rename, kind = WAYS[way]
    saved(tmp_path / "base", make, bare, rename)
    load = getattr(transformers, kind).from_pretrained
    model = load(tmp_path / "base")
    adapter = random_adapter(model, 1, density=0.05)
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if not name.startswith("lm_head")}  # maybe a new one
    shira.merge(tmp_path / "base", shira.Adapter(tensors, adapter.metadata), tmp_path / "out")
    switcher = Switcher(model)
    switcher.add("x", shira.Adapter(tensors, adapter.metadata))
    switcher.use("x")
    expected, found = all_bits(model), all_bits(load(tmp_path / "out"))
    assert tensors.keys() <= expected.keys()
    assert [name for name in tensors if not torch.equal(expected[name], found[name])] == []
    base = all_bits(load(tmp_path / "base"))
    others = base.keys() - tensors.keys() - {"lm_head.weight"}
    assert others and all(torch.equal(base[name], found[name]) for name in others)


@pytest.mark.parametrize(
    ("make", "bare", "kind", "words"),
    [
        (
            mixtral,
            False,
            "MixtralForCausalLM",
            r"'model.layers.0.mlp.experts.gate_up_proj' is made of 6 of them",
        ),
        (
            bert,
            True,
            "BertForMaskedLM",
            r"MaskedLM has 'cls.predictions.transform.dense.weight', which .* does not hold",
        ),
        (bert, False, "BertModel", r"BertModel has 'pooler.dense.weight', which .* does not hold: it was new in the model"),
        (llama, False, "LlamaForSequenceClassification", r"has 'score.weight', which .* does not hold"),
    ],
)
def test_what_the_checkpoint_lacks_is_named(make, bare, kind, words, tmp_path):
    saved(tmp_path / "base", make, bare)
    model = getattr(transformers, kind).from_pretrained(tmp_path / "base")
    weights = {name: weight for name, weight in model.named_parameters() if weight.ndim > 1}
    one = torch.tensor([0])
    tensors = {name: shira.SparseTensor(tuple(weight.shape), one, torch.ones(1), "delta") for name, weight in weights.items()}
    with pytest.raises(BaseMismatch, match=f"{words}.*Switcher.use, and save it with model.save_pretrained"):
        shira.merge(tmp_path / "base", {"x": (shira.Adapter(tensors), 1.0)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_model_and_unknown_ones(tmp_path, monkeypatch):
    saved(tmp_path / "base", llava, False)
    other = shira.SparseTensor((3, 3), torch.tensor([0]), torch.ones(1), "delta")
    with pytest.raises(BaseMismatch, match="does not belong to this model"):
        shira.merge(tmp_path / "base", shira.Adapter({"model.x.weight": other}), tmp_path / "out")
    names = list(load_file(tmp_path / "base/model.safetensors"))
    assert [way.kind for way in loading.ways_to_load(tmp_path / "base", names)][:2] == [
        "LlavaForConditionalGeneration",
        "LlavaModel",
    ]
    small = '"model_type": "llama", "num_hidden_layers"'
    for config in ('{"model_type": "no such"}', f'{{{small}: "x"}}', f'{{{small}: 1, "hidden_act": "no such"}}', "null"):
        (tmp_path / "base/config.json").write_text(config)
        assert list(loading.ways_to_load(tmp_path / "base", names)) == []
    (tmp_path / "base/config.json").unlink()
    assert list(loading.ways_to_load(tmp_path / "base", names)) == []


def test_advice_is_hidden_in_its_own_thread_alone(caplog):
    """Also if a second thread hides its own meanwhile, and the first ends first: afterwards nothing is hidden."""
    logger = logging.getLogger("transformers.somewhere")
    logging.getLogger("transformers").addHandler(caplog.handler)
    with ThreadPoolExecutor(1) as other, caplog.at_level(logging.WARNING, "transformers"):
        first, second = loading._silent(), loading._silent()
        try:
            first.__enter__()
            logger.warning("advice to the first")
            logger.error("an error of the first")
            other.submit(logger.warning, "warning of the second").result()
            other.submit(second.__enter__).result()
            other.submit(logger.warning, "advice to the second").result()
            first.__exit__(None, None, None)
            logger.warning("warning of the first")
            other.submit(second.__exit__, None, None, None).result()
            other.submit(logger.warning, "the last").result()
        finally:
            logging.getLogger("transformers").removeHandler(caplog.handler)
    seen = list(dict.fromkeys(caplog.messages))
    assert seen == [
        "an error of the first",
        "warning of the second",
        "warning of the first",
        "the last",
    ]
