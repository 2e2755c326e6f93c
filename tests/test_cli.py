import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shira
from conftest import all_bits, letter_tokenizer, mlp, random_adapter


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_llama):
    """A working folder with a tiny model, its tokenizer of single letters, and data."""
    tiny_llama.save_pretrained(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{a}+{b}=", "choices": ["x", "y"], "label": (a + b) % 2} for a in range(6) for b in range(6)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "text.jsonl").write_text('{"text": "abcabcabc"}\n{"prompt": "ab", "completion": "cab"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN = "train model --steps 4 --batch-size 4 --targets all-linear --density 0.05"


@pytest.mark.parametrize(
    "command",
    [
        "train nowhere --data sums.jsonl",
        "train-image nowhere --data pictures --prompt red",
        "demo",
        "experiment nowhere",
        "bench files --quick",
    ],
)
def test_commands_that_train_turn_cudnns_attention_off(run, folder, monkeypatch, command):
    """Before the first slow act, here one that fails. Its gradients are NaN on some GPUs (docs/gpu.md)."""

    def fails(*_):
        raise shira.ShiraError("as far as this")

    (folder / "pictures").mkdir()
    (folder / "pictures" / "red.png").touch()
    monkeypatch.setattr("shira.cli.demo.model_path", fails)
    if command.startswith("bench"):
        monkeypatch.setattr("shira.cli.checkout.module", fails)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        code, _, err = run(command)
        assert code == 1 and not torch.backends.cuda.cudnn_sdp_enabled(), err
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_train_inspect_eval_fuse(run, folder):
    for data, mask in (("sums", "snip"), ("text", "struct --density 0.2")):
        code, out, err = run(f"{TRAIN} --data {data}.jsonl --mask {mask} -o {data}.safetensors --license MIT")
        assert code == 0, err
        assert f"{data}.safetensors" in out and "100%" not in out
        assert re.search(r"^training: 4/4 in [\d.]+ s, loss [\d.]+, [\d,]+ tokens/s$", err, re.MULTILINE), err  # a line a stage
        assert "━" not in err
    adapter = shira.load("sums.safetensors")
    assert adapter.metadata["mask"]["name"] == "snip"
    assert adapter.metadata["base"] == {"id": "model", "dtype": "float32"}
    assert adapter.metadata["training"]["steps"] == 4
    assert adapter.metadata["training"]["data"] == "sums.jsonl"

    code, out, _ = run("inspect sums.safetensors --tensors")
    assert code == 0
    for word in ("sums", "14", "overwrite", "snip", "model", adapter.fingerprint, "MIT", "layers.0.mlp"):
        assert word in out
    code, out, _ = run("inspect sums.safetensors --json")
    facts = json.loads(out)
    assert facts["nnz"] == adapter.nnz
    assert facts["tensors"]["model.layers.0.mlp.up_proj.weight"]["shape"] == [40, 24]

    code, out, _ = run("eval model --data sums.jsonl -a sums.safetensors -a text.safetensors=0.5 --json")
    result = json.loads(out)
    assert [row["active"] for row in result["results"]] == ["base", "sums.safetensors + text.safetensors=0.5"]
    assert {(row["data"], row["examples"]) for row in result["results"]} == {("sums.jsonl", 36)}
    code, out, _ = run("eval model --data sums.jsonl --limit 5")
    assert code == 0 and "sums.jsonl (5)" in out

    code, out, _ = run("fuse sums.safetensors text.safetensors=0.5 --base model -o both.safetensors --name both")
    assert code == 0
    both = shira.load("both.safetensors")
    assert both.name == "both"
    assert both.metadata["fused"]["strengths"] == {"sums.safetensors": 1.0, "text.safetensors": 0.5}
    code, out, _ = run("inspect both.safetensors")
    assert "method sum" in out and "text.safetensors × 0.5" in out

    line = """fuse sums.safetensors 'text.safetensors={"*": 1, "*.mlp.*": 0.5}' --base model --method ties --density 0.5"""
    assert run(f"{line} -o thin.safetensors")[0] == 0
    thin = shira.load("thin.safetensors")
    assert thin.metadata["fused"] == {
        "method": "ties",
        "density": 0.5,
        "strengths": {"sums.safetensors": 1.0, "text.safetensors": {"*": 1.0, "*.mlp.*": 0.5}},
    }
    assert thin.nnz < both.nnz


def test_extract_and_merge(run, folder, tiny_llama):
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            parameter += 0.01 * torch.randn(parameter.shape)
    tiny_llama.save_pretrained(folder / "tuned")
    code, out, err = run("extract model tuned --density 0.05 -o mine.safetensors --license MIT --tensors")
    assert code == 0, err
    assert "suggested" in out and "of ‖ΔW‖" in out and "100/100" in err
    adapter = shira.load("mine.safetensors")
    assert (adapter.name, adapter.metadata["license"]) == ("tuned", "MIT")
    code, out, _ = run("extract model tuned --density 0.05 -o part.safetensors --scope model --targets q_proj,up_proj --json")
    facts = json.loads(out)
    assert facts["nnz"] == shira.load("part.safetensors").nnz
    assert 0 < facts["kept"] < facts["curve"][-1][1] < 1 and facts["left_out"]
    code, out, err = run("merge model mine.safetensors part.safetensors=0.5 -o merged")
    assert code == 0, err
    assert "merged" in out and "100/100" in err
    assert run("eval merged --data sums.jsonl --limit 5")[0] == 0


def test_the_recipe_beside_an_adapter_repeats_it(run, folder):
    assert run(f"{TRAIN} --data sums.jsonl --mask wm -o wm.safetensors")[0] == 0
    assert run(f"{TRAIN} --data text.jsonl --mask wm -o wm2.safetensors --like wm.safetensors")[0] == 0
    assert (folder / "wm2.safetensors").stat().st_size < (folder / "wm.safetensors").stat().st_size
    assert run(f"{TRAIN} --data sums.jsonl --mask rand -o one.safetensors --seed 3")[0] == 0
    assert run("train --config one.yaml -o two.safetensors")[0] == 0
    one, two = shira.load("one.safetensors"), shira.load("two.safetensors")
    assert one.metadata == two.metadata
    assert all(torch.equal(t.values, two.tensors[name].values) for name, t in one.tensors.items())
    assert run("train --config one.yaml --seed 4 -o three.safetensors")[0] == 0
    assert shira.load("three.safetensors").metadata["mask"]["seed"] == 4


@pytest.mark.parametrize("general", ["own", "text.jsonl"])
def test_train_near_the_base(run, folder, general):
    code, _, err = run(f"{TRAIN} --data sums.jsonl --lr 0.05 --accumulate 2 -o far.safetensors")
    assert code == 0, err
    code, _, err = run(
        f"{TRAIN} --data sums.jsonl --lr 0.05 --stay-near {general} --reach 1e-5 --accumulate 2 -o near.safetensors"
    )
    assert code == 0, err
    assert "calibrating" in err
    assert shira.load("near.safetensors").metadata["mask"]["stay_near"]["reach"] == 1e-5
    found = shira.compare("far.safetensors", "near.safetensors", base="model", spectra=False).total.changes.values()
    far, near = (change.l2 for change in found)
    assert near < 0.8 * far
    assert run("train --config near.yaml -o again.safetensors")[0] == 0
    assert shira.load("again.safetensors").fingerprint == shira.load("near.safetensors").fingerprint


def test_train_of_chosen_layers_and_kinds(run, folder):
    code, _, err = run(
        f"{TRAIN} --data sums.jsonl --targets all-linear --exclude mlp,k_proj --layers 1 -o some.safetensors --decompose true"
    )
    assert code == 0, err
    some = shira.load("some.safetensors")
    assert list(some.tensors) == [f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "oqv"]
    assert some.metadata["mask"]["decompose"] is True
    assert run("train --config some.yaml -o again.safetensors")[0] == 0
    assert shira.load("again.safetensors").metadata["mask"] == some.metadata["mask"]


def test_train_with_a_budget_over_the_model_avoiding_another_and_refreshed(run, folder):
    line = TRAIN.replace(" --density 0.05", "") + " --data sums.jsonl --calibration 4"
    assert run(f"{line} --total 200 -o first.safetensors")[0] == 0
    options = "--mask snip --total 300 --scope model --floor 0.2 --avoid first.safetensors --refresh-every 2 --refresh-cap 1.5"
    code, _, err = run(f"{line} {options} -o second.safetensors")
    assert code == 0, err
    first, second = shira.load("first.safetensors"), shira.load("second.safetensors")
    assert (first.nnz, second.metadata["training"]["parameters"]) == (200, 300)
    assert 300 <= second.nnz <= 450
    for name, tensor in second.tensors.items():
        assert not torch.isin(tensor.indices, first.tensors[name].indices).any()
    mask = second.metadata["mask"]
    assert (mask["total"], mask["scope"], mask["floor"], mask["avoid"]) == (300, "model", 0.2, ["first"])
    assert mask["refresh"] == {"times": 1, "cap": 1.5}
    (folder / "more.yaml").write_text(
        (folder / "second.yaml").read_text() + "overrides: {down_proj: 0.1, layers.9.*: {rank: 1}}\n"
    )
    code, _, err = run("train --config more.yaml --refresh-every 0 -o third.safetensors")
    assert code == 1 and "TargetError: pattern 'layers.9.*' matches none of" in err
    (folder / "more.yaml").write_text(
        (folder / "second.yaml").read_text() + "overrides: {down_proj: 0.1, q_proj: {total: 5}}\n"
    )
    assert run("train --config more.yaml --refresh-every 0 -o third.safetensors")[0] == 0
    third = shira.load("third.safetensors")
    assert third.nnz == 300
    assert third.tensors["model.layers.1.mlp.down_proj.weight"].nnz == 96
    assert third.tensors["model.layers.1.self_attn.q_proj.weight"].nnz == 5


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("inspect none.safetensors", 1, "FileNotFoundError: .*none.safetensors"),
        ("inspect sums.jsonl", 1, "FormatError: sums.jsonl is not a whole safetensors file: .*a file of another kind"),
        ("train model --data nowhere.jsonl", 1, "DataError: 'nowhere.jsonl' is neither a file nor a built-in task"),
        ("train model", 1, "DataError: no data to train on"),
        ("train nomodel --data sums.jsonl", 1, "DataError: cannot load 'nomodel'"),
        ("train model --data sums.jsonl --mask snap", 1, "MaskError: unknown mask 'snap'; did you mean 'snip'"),
        ("train model --data sums.jsonl --targets q_prj", 1, "TargetError: .*did you mean 'q_proj'"),
        (
            "train model --data sums.jsonl --density 2",
            1,
            "DataError: --density must be .* above 0 and at most 1, found 2",
        ),
        (
            "train model --data sums.jsonl --total 3 --floor 0.5",
            1,
            "MaskError: --floor 0.5 has a meaning with --scope model only",
        ),
        ("train model --data sums.jsonl --avoid none.safetensors", 1, "FileNotFoundError: .*none.safetensors"),
        (
            "train model --data sums.jsonl --refresh-every 2 --refresh-cap 0.5",
            1,
            "DataError: --refresh-cap must be a .*number from 1 on",
        ),
        ("train model --data sums.jsonl -o no/where.safetensors", 1, "FileNotFoundError: there is no folder no"),
        ("train model --data sums.jsonl --like sums.jsonl", 1, "FormatError: sums.jsonl is not a whole safetensors file"),
        ("train model --data sums.jsonl --like none.safetensors", 1, "FileNotFoundError: .*none.safetensors"),
        ("train model --data sums.jsonl --config none.yaml", 1, "FileNotFoundError: .*none.yaml"),
        ("train model --data sums.jsonl --report-to tensorbord", 1, "DataError: cannot report to 'tensorbord'; did you mean"),
        ("train model --data sums.jsonl --eval-share 1", 1, "DataError: --eval-share must be .* from 0 on and below 1"),
        ("train model --data sums.jsonl --eval-share 0.1 --eval-data a", 1, "DataError: give --eval-data or --eval-share"),
        ("train model --data no/such:train", 1, "DataError: cannot load the data set 'no/such:train'"),
        ("eval model --data text.jsonl --harness", 1, "DataError: --harness asks questions: text.jsonl needs 'choices'"),
        (
            "eval model --data sums.jsonl -a a.safetensors=x",
            1,
            "DataError: .*after '=' must be a number or a JSON object, found 'x'",
        ),
        (
            "eval model --data sums.jsonl -a a.safetensors --method ties --drop 0.5",
            1,
            "AdapterError: .*'ties' has no option --drop; known: --density",
        ),
        ("fuse a.safetensors a.safetensors=2", 1, "DataError: one adapter is given twice"),
        ("fuse a.safetensors --method tise", 1, "AdapterError: unknown fusion method 'tise'; did you mean 'ties'"),
        ("fuse a.safetensors --drop 0.5", 1, "AdapterError: fusion method 'sum' has no option --drop"),
        ("fuse a.safetensors=nan", 1, "AdapterError: the strength of 'a.safetensors' must be a finite number, found nan"),
        ("fuse 'a.safetensors={1: 2}'", 1, "DataError: .*must be a number or a JSON object"),
        ("fuse", 2, "Missing argument"),
        ("generate -p hello", 2, "Give a folder, a hub id, or a built-in model: "),
        ("extract model nowhere", 1, "FileNotFoundError: .*nowhere"),
        ("extract model model", 1, "CheckpointError: model differs nowhere from model"),
        ("extract model model --density 2", 1, "MaskError: --density must be above 0 and at most 1"),
        ("extract model model -o no/where.safetensors", 1, "FileNotFoundError: --output: there is no folder no"),
        ("merge model sums.jsonl -o out", 1, "FormatError: sums.jsonl is not a whole safetensors file"),
        ("merge model a.safetensors a.safetensors=2 -o out", 1, "DataError: one adapter is given twice"),
        ("merge model none.safetensors", 2, "Missing option"),
        ("train model --steps many", 2, "valid int"),
        ("nothing", 2, "No such command"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(run, folder, line, code, words):
    before = sorted(path.name for path in folder.iterdir())
    found, out, err = run(line)
    assert found == code
    assert re.search(words, re.sub(r"[│\s]+", " ", err))
    assert "Traceback" not in err + out
    assert sorted(path.name for path in folder.iterdir()) == before


def test_eval_fuses_by_any_method(run, folder):
    """Two opposite changes add up to nothing; of the largest ones one is left, as in a file that `fuse` made."""
    assert run(f"{TRAIN} --data sums.jsonl -o a.safetensors")[0] == 0
    shutil.copy("a.safetensors", "b.safetensors")
    both = "a.safetensors=-100 b.safetensors=100"
    assert run(f"fuse {both} --base model --method max -o fused.safetensors")[0] == 0

    def accuracies(options):
        code, out, err = run(f"eval model --data sums.jsonl {options} --json")
        assert code == 0, err
        result = json.loads(out)
        return [row["accuracy"] for row in result["results"]], result["method"]

    given = " ".join(f"-a {adapter}" for adapter in both.split())
    (base, fused), _ = accuracies("-a fused.safetensors")
    assert base != fused
    assert accuracies(given) == ([base, base], {"method": "sum"})
    assert accuracies(f"{given} --method max") == ([base, fused], {"method": "max"})
    assert accuracies(f"{given} --method dare --drop 0.25 --seed 3")[1] == {"method": "dare", "drop": 0.25, "seed": 3}
    assert "fused by ties" in run(f"eval model --data sums.jsonl {given} --method ties --density 0.5")[1]
    code, _, err = run("eval model --data sums.jsonl -a a.safetensors -a a.safetensors=2")
    assert code == 1 and "one adapter is given twice" in err


def test_an_adapter_of_another_model_is_refused(run, folder, tiny_llama):
    assert run(f"{TRAIN} --data sums.jsonl -o a.safetensors")[0] == 0
    with torch.no_grad():
        tiny_llama.model.layers[0].mlp.up_proj.weight.mul_(2)
    tiny_llama.save_pretrained(folder / "model")
    for line in ("eval model --data sums.jsonl -a a.safetensors", "fuse a.safetensors --base model"):
        code, _, err = run(line)
        assert code == 1
        assert re.search("BaseMismatch: '?a.safetensors'? does not belong to this model", err)


@pytest.mark.parametrize(
    "command", ["", "demo", "train", "estimate", "eval", "generate", "chat", "inspect", "fuse", "extract", "merge", "bench"]
)
def test_help_shows_an_example(run, command):
    code, out, _ = run(f"{command} --help")
    assert code == 0
    assert f"shira {command} " in out.replace("\n", " ") if command else "demo" in out
    assert not command or "Example:" in out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_write_is_escaped(tmp_path, encoding):
    random_adapter(mlp(), 1).save(tmp_path / "poet 名.safetensors")
    environment = os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "0"}
    for line, words in (("inspect", "poet \\u540d.safetensors"), ("extract --help", "\\u2016\\u0394W\\u2016")):
        command = [sys.executable, "-m", "shira.cli", *line.split(), "poet 名.safetensors"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
        assert done.returncode == 0 and not done.stderr, done.stderr.decode(encoding)
        assert words in done.stdout.decode(encoding)


def test_only_a_checkout_has_the_benchmarks_and_the_experiments(run, tmp_path):
    """An installed package stands beside others, one of which may be called benchmarks."""
    out = run("--help")[1]
    assert re.search(r"\bbench\b", out) and re.search(r"\bexperiment\b", out)
    folder = tmp_path / "lib" / "python" / "site-packages"
    shutil.copytree(Path(shira.__file__).parent, folder / "shira", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "__init__.py").touch()

    code = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from shira.cli import main
for words in (["--help"], ["bench", "--help"], ["experiment", "--help"]):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as stop:
        print("exit", stop.code)
"""
    installed = subprocess.run([sys.executable, "-P", "-c", code, folder], capture_output=True, text=True)
    assert re.search(r"\binspect\b", installed.stdout) and not re.search(r"\bbench\b|\bexperiment\b", installed.stdout)
    assert re.findall(r"exit (\d)", installed.stdout) == ["0", "2", "2"]
    assert re.findall(r"No such command '(\w+)'", installed.stderr) == ["bench", "experiment"]


def test_a_missing_extra_is_named(run, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = run("train model --data sums.jsonl")
    assert code == 1
    assert "MissingExtra" in err and "pip install 'shira-adapters[train]'" in err


def test_the_demos_measurements(tiny_llama):
    from conftest import random_adapter
    from shira.cli.demo import changed_entries, digest

    before, bits_before = digest(tiny_llama), all_bits(tiny_llama)
    adapter = random_adapter(tiny_llama, 1, density=0.1)
    switcher = shira.Switcher(tiny_llama)
    switcher.add("a", adapter)
    assert changed_entries(tiny_llama, switcher, None) == 0
    assert changed_entries(tiny_llama, switcher, "a") == adapter.nnz
    assert switcher.active == {"a": 1.0}
    assert digest(tiny_llama) != before
    switcher.use(None)
    assert digest(tiny_llama) == before
    with torch.no_grad():  # the digest sees a sign of zero
        tiny_llama.model.norm.weight[0] = 0.0
        zero = digest(tiny_llama)
        tiny_llama.model.norm.weight[0] = -0.0
    assert digest(tiny_llama) != zero
    assert bits_before


@pytest.mark.parametrize("what", ["switch", "scale", "files", "load", "fusion"])
def test_the_benchmarks_run_in_small(run, tmp_path, what):
    """Whether they run, not what they measure."""
    plot = f" --plot {tmp_path}/plot.png" if what == "switch" else ""
    code, out, err = run(f"bench {what} --quick{plot}")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert rows and all(row["machine"]["torch"] == torch.__version__ for row in rows)
    assert not plot or (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_the_training_benchmark_runs_in_small(run):
    code, out, err = run("bench train --quick")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert rows[0]["ms"].keys() == {"shira wm", "PEFT LoRA"} < rows[1]["ms"].keys()
    assert rows[0]["parameters"]["shira wm"] == rows[0]["parameters"]["PEFT LoRA"] > 1e6


@pytest.mark.parametrize("columns", [80, 120])
def test_masks_lists_the_catalogue(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = run("masks")
    assert (
        code == 0
        and max(map(len, out.splitlines())) <= columns
        and out.count("\n") < 80
        and all(name in out for name in ("struct", "wanda", "activations", "2506.00772", "… (Python only)"))
    )
    rows = json.loads(run("masks --json")[1])
    assert [row["name"] for row in rows] == [info.name for info in shira.masks.available()]
    assert rows[-4] == {
        "name": "union",
        "meaning": "entries that any of several masks chooses, each asked for equally many",
        "source": "ours",
        "needs": ["weight", "gradient"],
        "options": {"of": ["wm", "snip"]},
    }


def test_train_with_options_of_a_mask(run, folder):
    code, _, err = run(f"{TRAIN} --data sums.jsonl --mask nm:by=snip,n=1,m=8 --calibration 12 -o nm.safetensors")
    assert code == 0, err
    assert "calibrating" in err and "3/3" in err and "4/4" in err
    recorded = shira.load("nm.safetensors").metadata["mask"]
    assert recorded["options"] == {"by": "snip", "n": 1, "m": 8}
    assert recorded["calibration"]["batches"] == 3 and recorded["calibration"]["examples"] == 12
    code, _, err = run(f"{TRAIN} --data sums.jsonl --mask nm:bye=snip")
    assert code == 1 and "'bye=snip' is no option=value; did you mean 'by'" in err
