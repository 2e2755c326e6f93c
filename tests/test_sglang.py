"""The weight loader for SGLang, on a model that packs its weights as SGLang's do."""

import pytest
from safetensors.torch import save_file

from conftest import all_bits, same_bits
from shira import ShiraError
from shira.serving.catalogue import Catalogue
from shira.serving.selections import AdapterReplaced
from shira.serving.sglang import CHECKPOINT, FOLDER, message, use
from test_vllm_mapping import adapter_of, changed, checkpoint, loaded


def test_a_selection_is_put_into_a_running_model(tmp_path, monkeypatch):
    model, whole = loaded(), checkpoint()
    save_file(whole, tmp_path / "model.safetensors")
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    for seed, name in enumerate("ab", start=1):
        adapter_of(whole, seed).save(adapters / f"{name}.safetensors")
    catalogue = Catalogue(adapters, ["model"])
    for name in "ab":
        catalogue.load(name)
    base = all_bits(model)
    monkeypatch.delenv(FOLDER, raising=False)
    with pytest.raises(ShiraError, match=f"set {FOLDER} and {CHECKPOINT}"):
        use(model, message(""))
    monkeypatch.setenv(FOLDER, str(adapters))
    monkeypatch.setenv(CHECKPOINT, str(tmp_path / "model.safetensors"))
    for text, seed in (("a", 1), ("b", 2), ("a", 1)):
        use(model, message(catalogue.resolve(text).key))
        expected = loaded()
        expected.load_weights(changed(whole, adapter_of(whole, seed)).items())
        assert same_bits(all_bits(model), all_bits(expected))
    for wrong in ([], [("weight", message("")[0][1])], message("") * 2):
        with pytest.raises(ShiraError, match="expected one tensor"):
            use(model, wrong)
    old = catalogue.resolve("b").key.replace(catalogue.versions["b"], "0")
    with pytest.raises(AdapterReplaced):
        use(model, message(old))
    assert same_bits(all_bits(model), base)
    use(model, message(catalogue.resolve("a:0.5+b").key))
    use(model, message(""))
    assert same_bits(all_bits(model), base)
