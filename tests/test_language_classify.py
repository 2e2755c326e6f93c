"""Classification with a head that is part of the adapter: what is asked, trained, put on and taken off again."""

import pytest
import torch
from experiments.language import classify, glue, methods, settings
from experiments.store import Store, number, work

import shira
from conftest import all_bits, bits, letter_tokenizer, same_bits
from shira import BaseMismatch

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it


@pytest.fixture
def bench(tmp_path, monkeypatch, tiny_llama):
    """The recipe on a tiny model in a folder, and tasks whose texts begin with what they are."""
    monkeypatch.setenv("SHIRA_CACHE", str(tmp_path / "cache"))
    tiny_llama.save_pretrained(tmp_path / "model")
    letter_tokenizer(None).save_pretrained(tmp_path / "model")
    texts = [glue.Text(f"{'xy'[n % 2]}{n:03d}{'z' * (n % 5)}", n % 2) for n in range(42)]
    monkeypatch.setattr(glue, "glue", lambda task: texts)
    monkeypatch.setattr(glue, "film", lambda: [glue.Text(f"{'xy'[n % 2]}{n}", n % 2) for n in range(60)])
    monkeypatch.setattr(glue, "VALIDATION", 12)
    recipe = settings.named("table12") | {"model": str(tmp_path / "model"), "examples": 24, "steps": 4, "batch_size": 6}
    recipe |= {"calibration": 8, "validation": 12, "most_rates": 2, "head_rate": 0.05, "more_seeds": {"wm": [1]}}
    recipe |= {"tasks": {"sst2": ["lora", "wm", "head"], "mrpc": ["lora", "wm"]}}
    lora = {"peft": "LoraConfig", "options": {"r": 2, "lora_dropout": 0.05}, "rates": [0.01, 0.02]}
    wm = {"options": {"mask": "wm", "rank": 2}, "rates": [0.01, 0.02]}
    return recipe | {"methods": {"lora": lora, "wm": wm, "head": recipe["methods"]["head"] | {"rates": [0.05, 0.1]}}}


def test_a_table_of_what_was_run(bench, tmp_path, capfd):
    """Every cell is a run; a second time nothing is left to do; the report needs the results alone."""
    store = Store(tmp_path / "results.jsonl")
    assert classify.report(bench, store, None) == "no results yet"
    made = []
    work(lambda: classify.wanted(bench, store), classify.Lab(store).run, store, lambda key, left: made.append(key))
    kinds = [key["kind"] for key in made]
    # of 3 methods 2 rates; 2 of them on 3 folds; one on another seed; each best one is scored
    assert kinds.count("train") == 3 * 2 + 2 * 3 + 1 and kinds.count("score") == 3 + 2 * 3 + 1
    assert all(store.get(key) is not None for key in classify.wanted(bench, store))
    text = classify.report(bench, store, None)
    lines = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in text.splitlines()}
    assert lines["method"][4:6] == ["sst2 (42)", "mrpc (42)"] and lines["most frequent class"][4:6] == ["50.0", "50.0"]
    assert "2 seeds ±" in lines["wm"][4] and lines["lora"][6] == "" and "(p " in lines["wm"][6]
    assert lines["head"][5] == "" and lines["head"][7] == "" and lines["head"][2] == "0"  # 48 entries
    # every pair is asked once, whatever the fold
    asked = [glue.examples("mrpc", "test", fold=fold, folds=3) for fold in range(3)]
    assert sorted(text for part in asked for text in part) == sorted(glue.glue("mrpc"))
    for fold, part in enumerate(asked):
        assert not set(part) & set(glue.examples("mrpc", "train", fold=fold, folds=3))
        assert [text.label for text in part].count(1) == 7
    # the table's numbers are those of the lines
    (trained,) = classify.trainings(bench, store, "lora", "sst2", 0)
    digits = store.get(classify.score_key(bench, trained))["right"]["sst2"]
    assert lines["lora"][4].startswith(f"{100 * digits.count('1') / 42:.1f} ±")


@pytest.mark.parametrize("name", ["lora", "wm", "snip", "snip-late", "head"])
def test_the_head_is_in_the_adapter_and_comes_off_again(bench, tmp_path, name, capfd):
    bench["methods"]["snip"] = {"options": {"mask": "snip", "rank": 2}}
    bench["methods"]["snip-late"] = {"options": {"mask": "snip", "rank": 2}, "head_first": 6}
    lab = classify.Lab(Store(tmp_path / "results.jsonl"))
    model, _, _ = lab.model(bench["model"], "bfloat16")
    before, rows = all_bits(model), [([3, 4, 5], 0), ([6, 7], 1)]
    assert model.score.weight.dtype == torch.float32
    base = lab.logits(model, rows)
    key = classify.train_key(bench, bench["methods"][name], 0.01, 0)
    lab.store.add(key, lab.run(key), 0)
    assert same_bits(before, all_bits(model)) and all(parameter.requires_grad for parameter in model.parameters())
    with methods.adapted(model, [lab.folder(number(key))]) as ready:
        found = lab.logits(ready, rows)
        head = bits(ready.get_submodule("score").weight if name != "lora" else ready.score.modules_to_save["0"].weight)
    assert not torch.equal(found, base) and not torch.equal(head, before["score.weight"])
    assert same_bits(before, all_bits(model)) and torch.equal(lab.logits(model, rows), base)
    if name != "lora":
        adapter = shira.load(lab.folder(number(key)) / methods.OURS)
        assert adapter.tensors["score.weight"].nnz == 48 and (len(adapter.tensors) == 1) == (name == "head")


def test_a_mask_that_is_chosen_after_the_head_has_trained(bench, tmp_path, capfd):
    """It has as many entries, and others."""
    lab = classify.Lab(Store(tmp_path / "results.jsonl"))
    found = []
    for first in ({}, {"head_first": 6}):
        method = {"options": {"mask": "snip", "rank": 2}} | first
        key = classify.train_key(bench | {"head_rate": 0.5}, method, 0.0, 0)
        lab.store.add(key, lab.run(key), 0)
        found.append(shira.load(lab.folder(number(key)) / methods.OURS))
    early, late = found
    assert early.tensors.keys() == late.tensors.keys() and early.nnz == late.nnz
    assert any(not torch.equal(tensor.indices, late.tensors[name].indices) for name, tensor in early.tensors.items())


def test_an_adapter_with_a_head_fits_a_model_with_another_head(bench, tmp_path, capfd):
    """A head is random whenever a model is loaded anew: what lay under it says nothing of the base, the other weights do."""
    lab = classify.Lab(Store(tmp_path / "results.jsonl"))
    model, _, _ = lab.model(bench["model"], "bfloat16")
    key = classify.train_key(bench, bench["methods"]["wm"], 0.01, 0)
    lab.store.add(key, lab.run(key), 0)
    path, rows = lab.folder(number(key)) / methods.OURS, [([3, 4, 5], 0)]
    switcher = shira.Switcher(model)
    switcher.add("mine", path)
    with switcher.using("mine"):
        expected = lab.logits(model, rows)
    with torch.no_grad():
        model.score.weight.normal_()
    fresh = all_bits(model)
    switcher = shira.Switcher(model)
    switcher.add("mine", path)
    with switcher.using("mine"):
        assert torch.equal(lab.logits(model, rows), expected)
    assert same_bits(fresh, all_bits(model))
    whole = shira.Adapter({"score.weight": shira.load(path).tensors["score.weight"]}, shira.load(path).metadata)
    with pytest.raises(BaseMismatch, match="'score.weight' have fingerprint"):  # nothing else tells the base
        shira.Switcher(model).add("head alone", whole)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1)
    with pytest.raises(BaseMismatch, match=r"'model.layers.1.mlp.up_proj.weight' have fingerprint"):
        shira.Switcher(model).add("mine", path)


def test_the_head_has_a_learning_rate_of_its_own(bench, tmp_path, capfd):
    """After one step of Adam every entry that trains has moved by its learning rate."""
    lab = classify.Lab(Store(tmp_path / "results.jsonl"))
    model, _, _ = lab.model(bench["model"], "bfloat16")
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with shira.attach(model, mask="wm", targets=["v_proj", "score"], overrides={"score": 1.0}) as tuner:
        fixed = {"steps": 1, "batch_size": 2, "warmup": 0.0, "seed": 0}
        classify.fit(tuner, model, [([3, 4, 5], 0), ([6, 7], 1)], learning_rate=0.25, head_rate=0.5, **fixed)
        for name, tensor in tuner.adapter().tensors.items():
            moved = (tensor.values.float() - base[name].view(-1)[tensor.indices.long()].float()).abs()
            torch.testing.assert_close(moved, torch.full_like(moved, 0.5 if "score" in name else 0.25), rtol=0.02, atol=0)


def test_each_epoch_has_every_row_once():
    lengths = [n % 7 for n in range(50)]
    made = classify.batches(lengths, 4, 20, seed=1)
    assert len(made) == 20 and made == classify.batches(lengths, 4, 20, seed=1) != classify.batches(lengths, 4, 20, seed=2)
    assert sorted(row for batch in made[:13] for row in batch) == list(range(50))


def test_what_is_trained_on_is_not_what_is_asked():
    """Words in a row, however they are written; a short text is compared whole."""
    asked = glue.runs_of_words(
        [glue.PROMPTS["sst2"].format(sentence="it 's a film that does n't , really , end . "), "oh come on"]
    )
    same = ["well, it's a film that doesn't end", "a film that doesn't really", "Oh, come on!"]
    others = ["it's a film", "come on", "a film that really does end"]
    assert [bool(glue.runs_of_words([text]) & asked) for text in same + others] == [True] * 3 + [False] * 3
