"""What `shira train` writes, where, and that it loses nothing; and that what cannot be is known before a model is loaded."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import shira
from conftest import all_bits, letter_tokenizer, mlp, random_adapter, same_bits
from shira import DataError
from shira.cli import output
from shira.integrations import transformers as hf
from shira.integrations.card import base_of
from shira.runs.announcing import what_trains
from shira.runs.outputs import named, output_for, save_run
from shira.runs.recipes import PAPERS, Recipe, check_run, name_of, usual_targets
from test_cli import TRAIN, folder  # noqa: F401  a fixture

huggingface_hub = pytest.importorskip("huggingface_hub")


def snippet(card):
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def names(path):
    return sorted(each.name for each in path.iterdir())


@pytest.mark.parametrize("output", ["poet", "poet/"])
def test_a_folder_has_all_that_is_pushed(run, folder, tiny_llama, monkeypatch, output):  # noqa: F811
    code, out, err = run(f"{TRAIN} --data sums.jsonl --eval-share 0.2 --license MIT --name 'a poet' -o {output}")
    assert code == 0, err
    assert out.startswith("trains 14 of 14 linear layers: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; ")
    poet = folder / "poet"
    assert names(poet) == ["README.md", "adapter.safetensors", "recipe.yaml"]
    text = (poet / "README.md").read_text()
    assert "`shira train --config recipe.yaml` repeats the run. Relative paths in the recipe start from the folder" in text
    header = huggingface_hub.ModelCard(text).data.to_dict()
    assert header["license"] == "mit" and "base_model" not in header and "There is no hub id of the base" in text
    adapter = shira.load("poet")
    held_out = adapter.metadata["training"]["held_out"]
    assert f"| {held_out['rows']} held-out rows | {held_out['loss_before']} | {held_out['loss']} |" in text
    monkeypatch.chdir(poet)
    (poet / "model").symlink_to(folder / "model")
    state = {}
    exec(snippet(text), state)  # it loads the base by its name, and leaves it as it was
    assert same_bits(all_bits(tiny_llama), all_bits(state["model"])) and state["switcher"].names == ["a poet"]
    code, _, err = run("train --config recipe.yaml")  # no data of that name here: nothing is written
    assert code == 1 and f"recipe.yaml: data: there is no 'sums.jsonl' in {poet}; relative paths in a recipe start from" in err
    assert names(poet) == ["README.md", "adapter.safetensors", "model", "recipe.yaml"]


def test_nothing_is_overwritten(run, folder):  # noqa: F811
    assert run(f"{TRAIN} --data sums.jsonl -o sums.safetensors")[0] == 0
    before = {name: (folder / name).read_bytes() for name in ("sums.safetensors", "sums.yaml", "sums.md")}
    for line, words in {
        f"{TRAIN} --data sums.jsonl -o sums.safetensors": "sums.safetensors is there already.*--force",
        f"{TRAIN} --data sums.jsonl --config sums.yaml -o sums.safetensors": "is there already",
        f"{TRAIN} --data sums.jsonl -o sums.yaml": "is no name for an adapter",
        f"{TRAIN} --data sums.jsonl -o sums.bin": "is no name for an adapter",
        f"{TRAIN} --data sums.jsonl -o sums.jsonl": "is no name for an adapter",
    }.items():
        code, _, err = run(line)
        assert code == 1 and re.search(words, err), err
    assert run("train --config sums.yaml --seed 3")[0] == 0
    assert run("train --config sums.yaml")[0] == 0
    assert run(f"{TRAIN} --data sums.jsonl --steps 2")[0] == 0
    assert before == {name: (folder / name).read_bytes() for name in before}
    assert [shira.load(f"sums-{n}.safetensors").metadata["training"]["steps"] for n in (2, 3, 4)] == [4, 4, 2]
    assert yaml.safe_load((folder / "sums-2.yaml").read_text())["seed"] == 3
    weights = (folder / "model" / "model.safetensors").read_bytes()
    for line, words in {
        "-o model --force": "model is the folder of the model, with files of its own; name another folder",
        "-o model/model.safetensors --force": "is no adapter's file, and --force replaces no others",
    }.items():
        code, _, err = run(f"{TRAIN} --data sums.jsonl {line}")
        assert code == 1 and words in " ".join(err.split()), err
    assert weights == (folder / "model" / "model.safetensors").read_bytes()
    assert run(f"{TRAIN} --data sums.jsonl -o sums.safetensors --force --steps 1")[0] == 0
    assert shira.load("sums.safetensors").metadata["training"]["steps"] == 1


def test_runs_that_end_at_once_lose_nothing(tmp_path, monkeypatch):
    """Each begins to save while another one does. One that is interrupted leaves nothing."""
    monkeypatch.chdir(tmp_path)
    base, whole, saved = base_of("model", None, None), shira.Adapter.save, []
    places = [output_for(Path(name), "") for name in ("a.safetensors", "a", ".")]

    def run_ends(place, others):
        def save(adapter, path, **options):
            if others:
                run_ends(place, others - 1)
            whole(adapter, path, **options)

        with monkeypatch.context() as patch:
            patch.setattr(shira.Adapter, "save", save)
            found = save_run(place, random_adapter(mlp(), others), base, lambda path: path.write_text(str(others)))
        saved.append(found.adapter)
        assert shira.load(found.adapter).name == f"random{others}" and found.recipe.read_text() == str(others)

    def stopped(*_, **__):
        raise KeyboardInterrupt

    for place in places:
        run_ends(place, 2)
    assert len(set(saved)) == 9
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(shira.Adapter, "save", stopped)
    for place in places:
        with pytest.raises(KeyboardInterrupt):
            save_run(place, random_adapter(mlp(), 1), base, lambda path: None)
    assert before == {path for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_saves_does_not_keep_its_name(tmp_path, monkeypatch):
    """Killed before the adapter is there, it leaves nothing that counts. Killed after it, it leaves a whole adapter."""
    monkeypatch.chdir(tmp_path)
    code = """
        import os, signal, sys
        from pathlib import Path
        import shira
        from conftest import mlp, random_adapter
        from shira.integrations.card import base_of
        from shira.runs.outputs import output_for, save_run

        def killed(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)

        _, name, early = sys.argv
        if early == "early":
            shira.Adapter.save = killed
        save_run(output_for(Path(name), ""), random_adapter(mlp(), 1), base_of("model", None, None), killed)
    """
    for name, early in (("a.safetensors", True), ("a", True), (".", True), ("a.safetensors", False), ("a", False)):
        process = [sys.executable, "-c", textwrap.dedent(code), name, "early" if early else "late"]
        assert subprocess.run(process, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}).returncode == -9
        left = {path for path in tmp_path.rglob("*") if path.is_file()}
        assert any(path.name.startswith(".shira-") for path in left)  # the claim, without its lock
        if not early:
            with pytest.raises(DataError, match="is there already, and would be lost; give --force"):
                output_for(Path(name), "")
            shira.load(name)
        place = output_for(Path(name), "", force=not early)
        found = save_run(place, random_adapter(mlp(), 2), base_of("model", None, None), lambda path: path.write_text("mine"))
        assert found == place and shira.load(name).name == "random2" and found.recipe.read_text() == "mine"
        assert not [path for path in tmp_path.rglob(".shira-*")]
        for path in found.files:
            path.unlink(missing_ok=True)


def test_a_configuration_gives_its_name_and_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "again.yaml"
    config.write_text("# mine\n")
    found = output_for(None, "again", config=config, repeats=True)
    assert found.adapter.name == "again.safetensors" and config.absolute() not in [path.absolute() for path in found.files]
    assert output_for(None, "again", config=config).adapter.name == "again-2.safetensors"  # another recipe is to be saved
    assert output_for(None, "no/such: name").adapter.name == "no-such-name.safetensors"
    with pytest.raises(DataError, match="again.yaml is there already"):
        output_for(tmp_path / "again.safetensors", "again", config=config)
    assert output_for(tmp_path / "again.safetensors", "again", config=config, repeats=True).kept


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--targets q_proj,norm --layers 0", "TargetError: target 'norm' is in none of the layers .0.: 'model.norm.weight'"),
        ("--targets q_prj", "TargetError: .*did you mean 'q_proj'"),
        ("--exclude mlpp", "TargetError: --exclude 'mlpp' matches nothing; known: "),
        ("--layers 7", "TargetError: --layers 7 must be numbers of layers"),
        ("--overrides '{\"qq\": 0.1}'", "TargetError: pattern 'qq' matches none of"),
        ('--overrides \'{"q_proj": {"total": 9999999}}\'', "MaskError: .*q_proj"),
        ("--total 99999999", "MaskError: --total 99,999,999 does not fit"),
        ("--density 0.05 --mask nm:n=9,m=8", "MaskError: .*an N:M mask needs 1 ≤ n ≤ m"),
        ("--density 0.05 --mask struct --scope model", "MaskError: --mask 'struct' ranks no scores"),
        ("--density 0.05 --mask from_adapter", "MaskError: .*from_adapter needs an adapter"),
        ("--rank 500", "MaskError: .*rank must be from 1 to 12 .* found 500"),
    ],
)
def test_a_model_is_not_loaded_for_what_its_configuration_tells(run, folder, monkeypatch, options, words):  # noqa: F811
    def load_model(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(hf, "load_model", load_model)
    code, _, err = run(f"{TRAIN.replace('--density 0.05', '')} --data sums.jsonl {options}")
    assert code == 1 and re.search(words, err), err


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("SmolLM2-135M-Instuct", "and not in the cache of the hub; offline, .*did you mean 'SmolLM2-135M-Instruct-Q4_1'"),
        ("org/nothing", "and not in the cache of the hub; offline, because HF_HUB_OFFLINE is set"),
        ("./nowhere", "and no name of a model on the hub"),
        ("a/b/c", "and no name of a model on the hub"),
    ],
)
def test_a_model_that_is_not_there_is_known_at_once(run, folder, model, words):  # noqa: F811
    code, out, err = run(f"train {model} --data sums.jsonl")
    start = f"DataError: cannot load '{model}': it is no folder, no built-in model .SmolLM2-135M-Instruct-Q4_1., "
    assert code == 1 and not out and re.search(start + words, err), err


def test_leaving_the_model_out_lists_what_there_is(run, folder):  # noqa: F811
    code, _, err = run("train --data sums.jsonl")
    assert code == 1 and "no model to train: give a folder, a hub id, or a built-in model: SmolLM2-135M-Instruct-Q4_1" in err


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ("poet.safetensors", "poet"),
        ("runs/poet", "poet"),
        ("runs/v1.5", "v1.5"),
        ("poet/adapter.safetensors", "poet"),
        (".", "spam"),  # the data's
    ],
)
def test_an_adapter_without_a_name_has_its_outputs(output, name):
    assert name_of(named(Recipe(model="any", data="spam"), Path(output))) == name
    recipe = Recipe(model="any", data="spam", name="mine")
    assert named(recipe, Path(output)) is recipe
    assert named(Recipe(model="any", data="spam"), None).name == ""


def test_a_card_of_a_model_on_the_hub_names_it():
    from shira.integrations.card import base_of, card

    adapter = shira.Adapter({"w": shira.SparseTensor((2, 2), torch.tensor([1]), torch.ones(1))}, {"training": {"loss": None}})
    text = card(adapter, "a.safetensors", base_of("org/model", "float32", "AutoModelForCausalLM"), data="org/rows:train")
    header = huggingface_hub.ModelCard(text).data.to_dict()
    assert (header["base_model"], header["base_model_relation"], header["datasets"]) == ("org/model", "adapter", ["org/rows"])
    assert "The loss" not in text and "Nothing was measured" in text
    built_in = card(adapter, "a.safetensors", base_of("SmolLM2-135M-Instruct-Q4_1", "bfloat16", "AutoModelForCausalLM"))
    assert "base_model" not in huggingface_hub.ModelCard(built_in).data.to_dict()
    assert "There is no hub id of the base" in built_in and "4 bits" in built_in
    compile(snippet(built_in), "card", "exec")


def test_before_training_the_same_parts_of_the_data_are_read_as_in_training(monkeypatch):
    asked = []
    monkeypatch.setattr("shira.data.reading.examples_of", lambda data, part: iter(asked.append((data, part)) or ()))
    check_run(Recipe(model="m", data="a", eval_data="b", stay_near="c"))
    assert set(asked) == {("a", "train"), ("b", "test"), ("c", "train")}


def test_a_log_gets_a_line_every_half_minute(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(output, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with output.progress("reading", None) as update:
        for number in range(1, 5):
            clock[0] += 10
            update(number, "examples")
        for step in range(1, 11):
            clock[0] += 10
            update(step, f"loss {step}.0  9 tokens/s", "training", 10)
    lines = ["reading: 3 examples in 30.0 s", "reading: 4 examples in 50.0 s"]
    lines += [f"training: {step}/10 in {10 * step - 10}.0 s, loss {step}.0, 9 tokens/s" for step in (4, 7, 10)]
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize(
    ("kind", "sizes", "names"),
    [
        (
            "opt",
            {"ffn_dim": 24, "word_embed_proj_dim": 16},
            "12 of 12 linear layers: k_proj, v_proj, q_proj, out_proj, fc1, fc2",
        ),
        ("gpt_neox", {"intermediate_size": 24}, "8 of 8 linear layers: query_key_value, dense, dense_h_to_4h, dense_4h_to_h"),
        (
            "phi3",
            {"intermediate_size": 24, "pad_token_id": 0},
            "8 of 8 linear layers: o_proj, qkv_proj, gate_up_proj, down_proj",
        ),
        ("llama", {"intermediate_size": 24}, "10 of 14 linear layers: q_proj, k_proj, v_proj, up_proj, down_proj"),
    ],
)
def test_without_targets_the_papers_train_or_all_linear(kind, sizes, names):
    from transformers import AutoConfig

    shape = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.device("meta"):
        model = hf.untrained(AutoConfig.for_model(kind, **shape, **sizes), torch.float32)
    why = "" if kind == "llama" else f"all-linear, as the model does not have all of {', '.join(PAPERS)}; "
    assert what_trains(Recipe(data="spam"), model).startswith(f"{why}{names}; ")
    assert what_trains(Recipe(data="spam", targets=usual_targets(model)), model).startswith(f"{names}; ")


def test_a_run_without_targets_saves_what_it_trained_and_repeats(run, folder):  # noqa: F811
    from transformers import AutoConfig

    config = AutoConfig.for_model("gpt2", vocab_size=len(letter_tokenizer()), n_embd=16, n_layer=2, n_head=2, n_positions=64)
    hf.untrained(config, torch.float32).save_pretrained("gpt2")
    letter_tokenizer().save_pretrained("gpt2")
    code, out, err = run("train gpt2 --data sums.jsonl --steps 2 --density 0.05 -o one.safetensors")
    assert code == 0, err
    assert out.startswith("trains all-linear, as the model does not have all of q_proj")
    assert yaml.safe_load((folder / "one.yaml").read_text())["targets"] == "all-linear"
    assert run("train --config one.yaml -o two.safetensors")[0] == 0
    assert (folder / "one.safetensors").read_bytes() == (folder / "two.safetensors").read_bytes()
    assert run("train model --data sums.jsonl --steps 1 --density 0.05 -o three.safetensors")[0] == 0
    assert yaml.safe_load((folder / "three.yaml").read_text())["targets"] == PAPERS
