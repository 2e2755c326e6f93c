"""The built-in model is named for what it is; its earlier name and the adapters of that time still work."""

import warnings

import pytest
import torch
from experiments import levels

import shira
from conftest import all_bits, letter_tokenizer, same_bits
from shira import BaseMismatch
from shira.data.models import ALIASES, BUILT_IN, SMOLLM2, built_in, model_path
from shira.integrations import transformers as hf
from shira.integrations.card import base_of
from shira.integrations.transformers import load_model
from shira.masks import wm
from shira.runs.live import InSoftware, load_live
from shira.runs.recipes import load_recipe

(EARLIER,) = ALIASES
WARNING = f"model name '{EARLIER}' is deprecated, and gone in shira .*; use '{SMOLLM2}'"
deprecated = pytest.mark.filterwarnings(f"ignore:the {WARNING}:DeprecationWarning")


@pytest.fixture
def converted(tiny_llama, tmp_path, monkeypatch):
    """A tiny model in the place of the converted one, and an empty working directory."""
    monkeypatch.setenv("SHIRA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "models" / SMOLLM2
    tiny_llama.bfloat16().save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def change(model, name, base=None):
    """An adapter with other values at 5 % of the entries. base: the id of the base that it records instead of the real one."""
    with shira.attach(model, mask="wm", density=0.05) as tuner:
        with torch.no_grad():
            for parameter in tuner.parameters():
                parameter.mul_(1.5)
        adapter = tuner.adapter(name)
    known = adapter.metadata["base"]
    return shira.Adapter(adapter.tensors, adapter.metadata | {"base": known | ({"id": base} if base else {})})


@deprecated
def test_both_names_mean_one_model_and_new_adapters_record_the_new_one(converted):
    assert list(BUILT_IN) == [SMOLLM2] and SMOLLM2.endswith("-Q4_1")
    assert [model_path(name) for name in (SMOLLM2, EARLIER, str(converted))] == [str(converted)] * 3
    assert same_bits(all_bits(load_model(EARLIER)), all_bits(load_model(SMOLLM2)))
    assert change(load_model(EARLIER), "a").metadata["base"]["id"] == SMOLLM2
    assert load_recipe(None, {"model": EARLIER, "data": "spam"}).model == SMOLLM2
    assert model_path("HuggingFaceTB/" + EARLIER) == "HuggingFaceTB/" + EARLIER


def test_the_earlier_name_gives_one_warning_that_names_the_new_one(converted, run):
    with pytest.warns(DeprecationWarning, match=WARNING) as given:
        load_model(EARLIER)
    assert [warning.filename for warning in given] == [__file__]
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("ignore")  # as Python does where a library calls
        assert run(f"targets {EARLIER}")[0] == 0
    assert [warning.category for warning in given] == [DeprecationWarning]


def test_a_folder_with_the_earlier_name_is_that_folder(converted, tiny_llama):
    tiny_llama.save_pretrained(EARLIER)
    assert model_path(EARLIER) == EARLIER and built_in(EARLIER) is None
    assert load_recipe(None, {"model": EARLIER, "data": "spam"}).model == EARLIER
    assert "4 bits" not in base_of(EARLIER, "bfloat16", "AutoModelForCausalLM").words


def test_adapters_that_record_the_earlier_name_fit_by_their_values(converted, tmp_path):
    model = load_model(SMOLLM2)
    before = all_bits(model)
    change(model, "old", EARLIER).save(tmp_path / "old.safetensors")
    change(model, "new").save(tmp_path / "new.safetensors")
    switcher = shira.Switcher(model)
    for name in ("old", "new"):
        switcher.add(name, tmp_path / f"{name}.safetensors")
    switcher.use("old")
    changed = all_bits(model)
    assert not same_bits(before, changed)
    switcher.use("new")
    assert same_bits(changed, all_bits(model))
    switcher.use(None)
    assert same_bits(before, all_bits(model))
    fused = shira.fuse({tmp_path / "old.safetensors": 1.0, tmp_path / "new.safetensors": 0.5}, base=model)
    assert fused.nnz == shira.load(tmp_path / "new.safetensors").nnz


@pytest.mark.parametrize("recorded", [EARLIER, "HuggingFaceTB/" + EARLIER])
def test_an_adapter_of_another_model_of_that_name_is_refused(converted, recorded):
    other = load_model(SMOLLM2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)  # as the hub's weights, which were not rounded
    switcher = shira.Switcher(load_model(SMOLLM2))
    words = rf"does not belong to this model.*\(base: {recorded}, .*a model of the same name may have other values"
    with pytest.raises(BaseMismatch, match=words):
        switcher.add("a", change(other, "a", recorded))


@deprecated
def test_cards_say_what_the_base_is(converted):
    for identity in (SMOLLM2, EARLIER, str(converted)):
        base = base_of(identity, "bfloat16", "AutoModelForCausalLM")
        assert f"built-in `{SMOLLM2}`, made of" in base.words and "4 bits" in base.words
        assert base.hub_id is None and base.load[-1] == f'model = load_model("{SMOLLM2}", "bfloat16")'
    recorded = base_of(EARLIER, "bfloat16", None)
    assert f"Earlier versions of shira gave this name to their built-in `{SMOLLM2}`" in recorded.words
    assert recorded.load == (f"model = ...  # the base: {EARLIER}",)


def test_levels_and_ties_are_counted():
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(64, 64, generator=generator)
    blocks = plain.view(-1, 32)
    low, high = blocks.aminmax(dim=1, keepdim=True)
    step = (high - low) / 15

    def stored(weight):
        return ((weight.view(-1, 32) - low) / step).round()

    rounded = (stored(plain) * step + low).view(64, 64)
    assert levels.distinct(plain).min() == 32 and levels.distinct(rounded).max() <= 16
    drawn = levels.moved(rounded, generator)
    assert torch.equal(stored(drawn), stored(rounded)) and levels.distinct(drawn).float().mean() > 30
    for bottom in (False, True):
        found, magnitudes = levels.ties(rounded, 200, bottom), rounded.abs().view(-1).tolist()
        chosen = wm(rounded, 200, bottom=bottom).tolist()
        last = (max if bottom else min)(magnitudes[i] for i in chosen)
        edge = [i for i, magnitude in enumerate(magnitudes) if magnitude == last]
        alike = sum(magnitudes[i // 32 * 32 : i // 32 * 32 + 32].count(magnitudes[i]) > 1 for i in chosen)
        assert (found["chosen"], found["in_block"]) == (200, alike)
        assert (found["edge"], found["left_out"]) == (len(set(edge) & set(chosen)), len(set(edge) - set(chosen)))
    ((_, whole, *shown), *others) = levels.tied({"model.up_proj.weight": rounded}, 0.05)
    assert whole == "this model" and shown[-1] == "100.0" and all(float(row[-1]) < 100 for row in others[:2])
    assert levels.kinds_of({"model.up_proj.weight": rounded, "model.norm.weight": plain[0]})[0][:3] == [
        "linear layers",
        "4,096",
        "98.46 %",
    ]


@pytest.mark.real
def test_the_real_model_has_the_levels_that_the_docs_say():
    from shira.checkpoints.sources import Checkpoint

    tensors = Checkpoint(model_path(SMOLLM2))
    for name in (f"model.layers.{layer}.{part}.weight" for layer in (0, 29) for part in ("self_attn.q_proj", "mlp.down_proj")):
        assert levels.distinct(tensors[name]).max() == 16
    assert levels.distinct(tensors["model.embed_tokens.weight"]).float().mean() > 28


def test_the_built_in_model_is_float32_where_bfloat16_is_in_software(converted, monkeypatch):
    found = []
    for lacking in (True, False):
        monkeypatch.setattr(hf, "in_software", lambda dtype, lacking=lacking: lacking)
        found.append([hf.load_model(SMOLLM2, dtype).dtype for dtype in ("auto", "bfloat16")])
    assert found == [[torch.float32, torch.bfloat16], [torch.bfloat16, torch.bfloat16]]


def test_what_is_in_software_is_what_torch_says():
    assert not hf.in_software(torch.float32)
    if torch.backends.mkldnn.is_available() and not torch.accelerator.is_available():
        assert hf.in_software(torch.bfloat16) is not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_a_checkpoint_in_a_dtype_of_software_gives_a_warning(converted, tmp_path, monkeypatch):
    hf.load_model(SMOLLM2, "bfloat16").save_pretrained(tmp_path / "other")
    monkeypatch.setattr(hf, "in_software", lambda dtype: dtype is torch.bfloat16)
    with pytest.warns(InSoftware, match="checkpoint is bfloat16.*--dtype float32 is several times as fast"):
        load_live(str(tmp_path / "other"), {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model, dtype in ((str(tmp_path / "other"), "bfloat16"), (str(tmp_path / "other"), "float32"), (SMOLLM2, "auto")):
            load_live(model, {}, dtype)
