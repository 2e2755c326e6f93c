"""Each training option is defined once, in Recipe: the command, the check, the file and the calls follow from there."""

import contextlib
import inspect
import re
import subprocess
import sys
import warnings
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import shira
from conftest import attach_is_refused, mlp
from shira import DataError, cli
from shira.cli.options import fields_of
from shira.cli.options import given as read
from shira.cli.wording import as_typed
from shira.data.reading import BUILT_IN
from shira.fusion.methods import METHODS
from shira.integrations import transformers as hf
from shira.integrations import transformers_training as training
from shira.runs.options import passed_to
from shira.runs.recipes import Recipe, load_recipe, save_recipe
from shira.texts import plain_number

FIELDS = fields_of(Recipe)
NOT_IN_A_RECIPE = {
    "model": "the live model; a recipe names it",
    "loss_fn": "code",
    "progress": "code",
    "calibration": "batches; a recipe says how many examples they are made of",
    "low_rank": "the result is not one sparse file (Tuner.save_hybrid)",
    "whole": "new heads of classifiers; a recipe trains causal language models, which have none",
}
ANOTHER_DEFAULT = {
    "targets": "the paper's where a model has them; all-linear would change what older commands train",
    "lr_scale": "auto; in attach it would change what the loops of others train",
}


def names_for(receiver):
    return {name for name, (about, _) in FIELDS.items() if receiver in about["to"]}


def default_of(name):
    value = getattr(Recipe(), name)
    return tuple(value) if isinstance(value, list) else value


def test_a_recipe_has_the_options_of_attach_with_the_same_defaults():
    options = inspect.signature(shira.attach).parameters
    assert names_for("attach") == options.keys() - NOT_IN_A_RECIPE.keys()
    for name in names_for("attach") - ANOTHER_DEFAULT.keys():
        # None is not passed on: it leaves the choice to attach
        assert repr(default_of(name)) in ("None", repr(options[name].default)), name


def test_the_trainer_takes_what_is_for_it_with_the_same_defaults():
    options = inspect.signature(training.train).parameters
    for name in names_for("trainer"):
        assert options[name].default in (inspect.Parameter.empty, default_of(name)), name
    assert passed_to("trainer", Recipe(steps=7, seed=3)).items() >= {"steps": 7, "seed": 3}.items()
    assert not {"density", "layers"} & passed_to("attach", Recipe()).keys()


def test_help_shows_every_option(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")
    code, out, _ = run("train --help")
    text = re.sub(r"[│\s]+", " ", out)
    assert code == 0
    for name, (about, _) in FIELDS.items():
        assert re.fullmatch(r"\S.*\S\.", about["help"]), name
        assert about["help"] in text, name
        assert name == "model" or f" --{name.replace('_', '-')} " in text, name
    for group in ("Data", "Mask", "Training", "Results"):
        assert f"─ {group} ─" in out


def test_help_and_version_need_neither_torch_nor_an_extra():
    """That is also why they are there in a quarter of a second."""
    code = """
import sys
for name in ("torch", "numpy", "transformers", "yaml", "datasets", "accelerate"): sys.modules[name] = None
from shira import cli
for words in (["--version"], ["--help"], *([name, "--help"] for name in cli.COMMANDS)):
    sys.argv[1:] = words
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code, words
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"shira {shira.__version__}\n")
    assert done.stdout.count("Usage: shira ") == 1 + len(cli.COMMANDS)


@pytest.mark.parametrize("command", ["train", "eval", "estimate", "fuse", "sample"])
def test_help_names_what_there_is_and_shows_defaults_as_they_are_typed(run, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "300")
    text = re.sub(r"[│\s]+", " ", run(f"{command} --help")[1])
    words = set(re.findall(r"[\w-]+", text))
    if "--data" in text:
        assert BUILT_IN.keys() <= words
    if "--mask" in text:  # those that need an adapter cannot be named
        assert {mask.name for mask in shira.masks.available() if mask.options.get("adapter", "") is not None} <= words
        assert "[default: wm]" in text
    if "--method" in text and command not in ("train", "estimate"):
        assert METHODS.keys() <= words
        assert "[default: sum]" in text and "[default: 0.2]" in text
    assert "[default: (" not in text and "by default" not in text
    if command == "train":
        usual = "the output's, or the data's"
        targets = "q_proj,k_proj,v_proj,up_proj,down_proj if the model has all of them, else all-linear"
        for shown in ("0.01", "no-pack", "false", targets, usual, "512"):
            assert f"[default: {shown}]" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("comparing needs the base: pass base=", "comparing needs the base: pass --base"),
        ("give the model (base=), or density=0.5, or mask='snip'", "give the model (--base), or --density 0.5, or --mask snip"),
        ("a.safetensors: layers=[7, 8] are not there", "a.safetensors: --layers 7,8 are not there"),
        ("layers=['a', 'b[0]'] leaves none, mask='a[b]'", "--layers a,b[0] leaves none, --mask a[b]"),
        ("runs/rank=1/density=0.5.safetensors is a folder", "runs/rank=1/density=0.5.safetensors is a folder"),
        ("mask=a.safetensors: the base a/mask=2 is gone", "mask=a.safetensors: the base a/mask=2 is gone"),
        ("density must be at most 1, found 2", "--density must be at most 1, found 2"),
        ("tensor 'a': rank must be 1 to 4; mask 'x' is unknown", "tensor 'a': rank must be 1 to 4; mask 'x' is unknown"),
        ("recipe: density must be at most 1", "--density must be at most 1"),
        ("recipe: rank must be at most 1", "recipe: rank must be at most 1"),
        ("recipe: give density or eval_data, not both", "give --density or --eval-data, not both"),
        ("method 'ties' has no option 'density'; known: 'k'", "method 'ties' has no option --density; known: 'k'"),
        ("the base must be a model whose density is 1", "the base must be a model whose density is 1"),
        ("by=snip and functools.partial(f, adapter=…)", "by=snip and functools.partial(f, adapter=…)"),
    ],
)
def test_errors_name_options_as_they_are_typed(text, shown):
    flags = {name: f"--{name.replace('_', '-')}" for name in ("base", "density", "rank", "layers", "eval_data", "mask")}
    assert as_typed(text, flags, {"density"}) == shown


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
OF = {
    str: TEXT,
    bool: st.booleans(),
    type(None): st.none(),
    list[str]: st.lists(TEXT, max_size=3),
    list[int]: st.lists(st.integers(-9, 2**63 - 1), max_size=3),
}
BUDGET = st.floats(0.001, 1) | st.fixed_dictionaries({"rank": st.integers(1, 9)})


def values_of(name):
    """Any value that an option may have."""
    about, kinds = FIELDS[name]

    def within(value):
        return all(holds(value, end) for holds, _, end in about["limits"])

    def one(kind):
        if get_origin(kind) is Literal:
            return st.sampled_from(get_args(kind))
        if get_origin(kind) is dict:
            return st.dictionaries(TEXT, BUDGET, max_size=3)
        if kind is int:
            return st.integers(0, 2**63 - 1).filter(within)
        if kind is float:
            return (st.floats(0, 1) | st.floats(0, 1e9) | st.integers(0, 9)).filter(within)
        return OF[kind]

    return st.one_of(*map(one, kinds))


@st.composite
def recipes(draw):
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), unique=True, max_size=12))
    settings = {name: draw(values_of(name)) for name in names}
    settings["data"], settings["model"] = settings.get("data") or "spam", settings.get("model") or "m"
    settings["targets"] = settings.get("targets") or "all-linear"  # else a look at the model says what trained
    try:
        return Recipe(**settings)
    except DataError as error:
        assume("not both" not in str(error))
        raise


@given(recipes())
def test_a_saved_recipe_is_read_as_it_was(tmp_path_factory, recipe):
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    save_recipe(recipe, path)
    assert repr(load_recipe(path, {})) == repr(recipe)  # True is not 1


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("--decompose 8", {"decompose": 8}),
        ("--decompose true", {"decompose": True}),
        ("--decompose 0", {"decompose": True}),  # as earlier releases had it
        ("--decompose false", {"decompose": False}),
        (
            """--overrides '{"down_proj": 0.1, "q_proj": {"total": 5}}'""",
            {"overrides": {"down_proj": 0.1, "q_proj": {"total": 5}}},
        ),
        ("--layers 0,4-6", {"layers": [0, 4, 5, 6]}),
        ("--exclude mlp,norm", {"exclude": ["mlp", "norm"]}),
        ("--avoid a,b --avoid c", {"avoid": ["a,b", "c"]}),
        ("--targets auto", {"targets": "auto"}),
        ("--targets q_proj", {"targets": ["q_proj"]}),
        ("--no-pack", {"pack": False}),
        ("--scope model --floor 0 --lr 1", {"scope": "model", "floor": 0.0, "lr": 1.0}),
        ("somewhere", {"model": "somewhere"}),
    ],
)
def test_the_command_line_says_what_a_file_says(run, tmp_path, monkeypatch, line, value):
    """Also over a file that says otherwise."""
    (tmp_path / "r.yaml").write_text("{model: m, data: spam, decompose: 3, pack: true, exclude: [head], layers: [9]}")
    plain, found = load_recipe(tmp_path / "r.yaml", {}), []

    def check_run(recipe):
        found.append(recipe)
        raise DataError("far enough")

    monkeypatch.setattr(cli.train, "check_run", check_run)
    with pytest.deprecated_call() if line == "--decompose 0" else contextlib.nullcontext():
        code, _, err = run(f"train --config {tmp_path}/r.yaml {line}")
    assert code == 1 and "far enough" in err
    assert repr(found[0]) == repr(Recipe(**(vars(plain) | value)))


def test_decompose_of_earlier_releases(tmp_path):
    """It was None or a rank, with 0 for what is True now."""
    for text, value in (("0", True), ("null", False), ("8", 8), ("true", True), ("false", False), ("1", 1)):
        (tmp_path / "r.yaml").write_text(f"model: m\ndata: spam\ndecompose: {text}\nexclude: null\navoid: null\n")
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            found = load_recipe(tmp_path / "r.yaml", {})
        words = {"0": ["decompose true"], "null": ["decompose false"]}.get(text, [])
        assert [str(warning.message).partition("; use ")[2] for warning in given] == words
        assert found.decompose is value or type(value) is int and found.decompose == value
        assert passed_to("attach", found)["decompose"] is found.decompose
        assert not {"exclude", "avoid"} & passed_to("attach", found).keys()
    with pytest.raises(DataError, match="decompose must be true or false or a whole number from 1 on, found 0"):
        Recipe(decompose=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--mask snap", "MaskError: unknown mask 'snap'; did you mean 'snip'"),
        ("--mask WM", "MaskError: unknown mask 'WM'; did you mean 'wm'"),
        ("--density 5", ": --density must be .* at most 1, found 5.0; 5 % is 0.05"),
        ("--eval-share 20", ": --eval-share must be .* below 1, found 20.0; 20 % is 0.2"),
        ("--density 0", ": --density must be a finite number above 0 and at most 1, found 0.0"),
        ("--density 0.1 --rank 4", "MaskError: give one of them: found --density 0.1 and --rank 4"),
        ("--rank 0", ": --rank must be a whole number from 1 on, found 0"),
        ("--scope all", ": --scope must be one of tensor, model, found 'all'"),
        ("--floor 0.5", "MaskError: --floor 0.5 has a meaning with --scope model only"),
        ("--scope model --floor 2", ": --floor must be a finite number from 0 on and at most 1, found 2.0"),
        ("--overrides '{\"mlp\": 3}'", "MaskError: tensor 'overrides: mlp': density must be above 0 and at most 1, found 3"),
        ("--avoid none.safetensors", "FileNotFoundError: .*none.safetensors"),
        ("--method both", ": --method must be one of values, hook, found 'both'"),
        ("--method hook --decompose 4", ": give --decompose or --method hook, not both"),
        ("--method hook --stay-near own", ": give --method hook or --stay-near, not both"),
        ("--decompose -1", ": --decompose must be true or false or a whole number from 1 on, found -1"),
        ("--decompose 4 --stay-near own", ": give --decompose or --stay-near, not both"),
        ("--refresh-every 2 --decompose true", ": give --decompose or --refresh-every, not both"),
        ("--refresh-every 2 --stay-near own", ": give --refresh-every or --stay-near, not both"),
        ("--refresh-every -1", ": --refresh-every must be a whole number from 0 on, found -1"),
        ("--reach 0", ": --reach must be a finite number above 0, found 0.0"),
        ("--limit 0", ": --limit must be a whole number from 1 on, found 0"),
        ("--schedule liner", "DataError: unknown schedule 'liner'; did you mean 'linear'"),
        ("--report-to tensorbord", "DataError: cannot report to 'tensorbord'"),
        ("--eval-data nowhere.jsonl", "DataError: 'nowhere.jsonl' is neither a file nor a built-in task"),
        ("--stay-near nowhere.jsonl", "DataError: 'nowhere.jsonl' is neither a file nor a built-in task"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(run, tmp_path, monkeypatch, options, words):
    def load_model(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(hf, "load_model", load_model)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n')
    code, _, err = run(f"train model --data a.jsonl {options}")
    assert code == 1 and re.search(words, err), err


@pytest.mark.parametrize("options", ["--decompose many", "--layers 1-x", "--overrides {", '--overrides \'{"a": 1, "a": 2}\''])
def test_what_cannot_be_read_names_the_option_and_what_was_meant(run, options):
    code, _, err = run(f"train model --data a.jsonl {options}")
    name, value = options.split(maxsplit=1)
    text = re.sub(r"[│\s]+", " ", err)
    assert code == 2 and f"Invalid value for {name}: found" in text
    assert FIELDS[name.removeprefix("--")][0]["help"] in text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train m --learning-rate 1e-3", "No such option: --learning-rate; here it is --lr "),
        ("train m -r 8", "here it is --rank "),
        ("train m --epochs 3", "here it is --steps, the number of optimizer steps"),
        ("train m --lora-alpha 16", "there is no such setting here, leave it out"),
        ("serve m --lora-modules a=x", "No such option: --lora-modules; here it is --adapters FOLDER │"),
        ("serve m --enable-lora", "No such option: --enable-lora; there is no such setting here, leave it out │"),
        ("train m --nothing 16", "No such option: --nothing "),
        ("train-image --instance-prompt sks", "here it is --prompt "),
    ],
)
def test_options_of_other_libraries_are_answered_with_ours(run, monkeypatch, line, words):
    monkeypatch.setenv("COLUMNS", "200")
    code, _, err = run(line)
    assert code == 2 and words.replace("│", "╰") in re.sub(r"[│─\s]+", " ", err)


def test_a_setting_of_a_file_is_named_with_the_file(run, tmp_path):
    (tmp_path / "r.yaml").write_text("{model: m, data: spam, lr: fast}")
    code, _, err = run(f"train --config {tmp_path}/r.yaml")
    assert code == 1 and f"{tmp_path}/r.yaml: lr must be a finite number above 0, found 'fast'" in err
    code, _, err = run(f"train --config {tmp_path}/r.yaml --lr 0")
    assert code == 1 and ": --lr must be a finite number above 0, found 0.0" in err and "r.yaml" not in err


@pytest.mark.parametrize("line", ["convert my-lora --base m --keep 90 -o a.safetensors", "extract a b --keep 90"])
def test_a_percentage_is_no_share(run, line):
    code, _, err = run(line)
    assert code == 1 and "--keep must be above 0 and at most 1, found 90.0; 90 % is 0.9" in err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train m --data a.jsonl --density 2%", "'--density': .*; 2 % is 0.02 "),
        ("convert my-lora --base m --keep 99.5% -o a.safetensors", "'--keep': .*; 99.5 % is 0.995 "),
        ("train m --data a.jsonl --density=0.5%", "'--density': .*; 0.5 % is 0.005 "),
        ("train m --data a.jsonl --density 200%", "'--density': [^;]*$"),
        ("train m --data a.jsonl --lr 0.1 --density x%", "'--density': [^;]*$"),
    ],
)
def test_a_percentage_with_its_sign_is_answered_with_the_share(run, line, words):
    code, _, err = run(line)
    assert code == 2 and re.search(words, re.sub(r"[│─╰╯\s]+", " ", err)), err


def test_a_refresh_that_never_comes_is_no_contradiction():
    assert Recipe(refresh_every=100, steps=100, stay_near="own").steps == 100


def test_what_was_not_given_is_left_to_the_file():
    assert read({"steps": None, "avoid": [], "seed": 0, "pack": False}) == {"seed": 0, "pack": False}


@pytest.mark.parametrize("number", [np.int64(2), np.float32(0.25), np.float64(0.25)], ids=repr)
def test_numbers_of_numpy_are_numbers(number, tmp_path):
    given = [{"density": number}, {"floor": number, "scope": "model"}, {"overrides": {"0": {"density": number}, "2": number}}]
    if isinstance(number, np.integer):
        given = [{"rank": number}, {"total": number * 9}, {"seed": number}, {"layers": number}, {"layers": np.arange(3)}]
        given += [{"low_rank": number}, {"decompose": number}, {"overrides": {"0": {"rank": number}}}, {"lr_scale": number}]
    model = mlp()
    for options in given:
        with contextlib.suppress(shira.TargetError):  # this model has no numbered layers
            with shira.attach(model, **options) as tuner:
                tuner.adapter().save(tmp_path / "a.safetensors")  # as JSON
            with shira.attach(model, **options | {key: plain_number(value) for key, value in options.items()}) as plain:
                assert [each.tolist() for each in plain.parameters()] == [each.tolist() for each in tuner.parameters()]
    assert shira.Switcher(model, ready=np.int64(3)).ready == []


HUGE = [{name: 10**400} for name in ("density", "rank", "low_rank", "decompose", "lr_scale", "floor")]
SINGLE = [{name: torch.tensor(1)} for name in ("targets", "exclude", "whole", "layers", "avoid", "density", "seed")]


@pytest.mark.parametrize("options", HUGE + SINGLE, ids=lambda options: next(iter(options)))
def test_wrong_values_of_attach_are_clear_errors(options):
    attach_is_refused(options, shira.ShiraError, f"{next(iter(options))} must be .*found")
