"""Runs that were stopped go on from their checkpoint, by the same command, to the same bytes."""

import json
import shutil

import pytest
import torch
import transformers

import shira
from conftest import letter_tokenizer, stops
from shira.cli import train as command
from shira.files.paths import claimed

LINE = "train model --data a.jsonl --steps 7 --batch-size 3 --density 0.1 --lr 0.01 --max-length 64"


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_llama):
    monkeypatch.chdir(tmp_path)
    tiny_llama.save_pretrained("model")
    letter_tokenizer().save_pretrained("model")
    rows = [{"prompt": "abc"[: 1 + n % 3] * (1 + n % 4), "completion": "xyz"[n % 3 :]} for n in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.fixture
def stop(monkeypatch):
    """stop(n): an interrupt comes after step n of the runs of `shira train` that follow; stop(None): none comes."""
    at = stops(monkeypatch, command, "train_adapter")
    return lambda step: at.__setitem__(0, step)


@pytest.mark.parametrize(
    "more",
    [
        "--accumulate 2 --mask snip --schedule cosine --warmup 0.3",
        "--eval-share 0.3 --mask rand --lr-scale 1 --pack",
        "--decompose 2 --batch-size 4",
        "--stay-near own --calibration 4 --dtype bfloat16",
    ],
)
def test_a_run_goes_on_to_the_same_bytes(run, folder, stop, more):
    assert run(f"{LINE} {more} --name poet -o whole.safetensors")[0] == 0
    line = f"{LINE} {more} --name poet --save-every 2 -o again/poet.safetensors"
    (folder / "again").mkdir()
    place = folder / "again/poet.checkpoints"
    stop(1)
    place.mkdir()  # as a kill may leave it
    assert run(line)[0] == 130 and not place.exists()  # nothing was saved yet
    code, out, _ = run(line.replace("--save-every 2", ""))
    assert code == 130 and "stopped, and nothing was saved; --save-every 100 saves a checkpoint" in out
    stop(5)
    code, out, err = run(line)
    assert code == 130 and "stopped; the same command goes on after step 4, from again/poet.checkpoints" in out, err
    assert [path.name for path in place.glob("check*")] == ["checkpoint-4"]
    assert not [path for path in (place / "checkpoint-4").iterdir() if path.stat().st_size > 1e6]
    stop(6)
    code, out, _ = run(line)
    assert code == 130 and "goes on after step 4, from again/poet.checkpoints" in out
    stop(None)
    code, out, err = run(line)
    assert code == 0 and "training: 7/7" in err, err
    assert not place.exists()
    assert (folder / "again/poet.safetensors").read_bytes() == (folder / "whole.safetensors").read_bytes()


def test_checkpoints_of_other_runs_are_not_gone_on_from(run, folder, stop):
    line = f"{LINE} --save-every 2 -o poet"
    stop(5)
    assert run(line)[0] == 130
    stop(None)
    kept = sorted(path.name for path in (folder / "poet.checkpoints").iterdir())
    rows = (folder / "a.jsonl").read_text()
    for change, words in {
        "--lr 0.02": "poet.checkpoints is of a run with lr 0.01, and this one has 0.02; give the same command again",
        "--mask snip": "a run with mask 'wm', and this one has 'snip'",
        "rows": "a run with content of a.jsonl",
        "foreign": "holds no checkpoints of a run; move it away",
        "claimed": "another run saves its checkpoints in poet.checkpoints now",
    }.items():
        if change == "rows":
            (folder / "a.jsonl").write_text(rows.replace("abc", "cba"))
        elif change == "foreign":
            (folder / "mine.checkpoints").mkdir()
            (folder / "mine.checkpoints" / "run.json").write_text("[1]")
        with claimed(folder / "poet.checkpoints" if change == "claimed" else folder / "other"):
            code, _, err = run(
                f"{LINE} --save-every 2 -o mine" if change == "foreign" else f"{line} {change if change[0] == '-' else ''}"
            )
        assert code == 1 and words in err and "loading" not in err, err
        assert kept == sorted(path.name for path in (folder / "poet.checkpoints").iterdir())
        (folder / "a.jsonl").write_text(rows)
    torch.manual_seed(1)
    other = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained("model"))
    other.save_pretrained("model")
    code, _, err = run(line)
    assert code == 1 and "the checkpoint is of another" in err, err
    code, out, err = run(f"{line} --lr 0.02 --force")
    assert code == 0 and "goes on" not in out and not (folder / "poet.checkpoints").exists(), err
    assert shira.load("poet").metadata["training"]["learning_rate"] == 0.02


def test_what_a_failure_leaves_does_not_stop_the_same_command(run, folder, stop, monkeypatch):
    line, place = f"{LINE} --save-every 2 -o poet", folder / "poet.checkpoints"
    stop(5)
    assert run(line)[0] == 130
    (place / "checkpoint-6").mkdir()  # as a kill in the middle of saving leaves it
    (place / "checkpoint-6" / "model.safetensors").write_bytes(b"")
    stop(None)
    with monkeypatch.context() as patch:
        patch.setattr("shira.runs.outputs.card", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
        code, out, _ = run(line)
    assert code == 1 and "goes on after step 4" in out and "stopped; the same command goes on after step 6" in out
    assert not (folder / "poet" / "adapter.safetensors").exists()
    code, out, _ = run(line.replace("--save-every 2", ""))
    assert "poet.checkpoints is of a run that was stopped; --save-every goes on with it" in out and code == 0
    shutil.rmtree(folder / "poet")
    (place / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    code, _, err = run(line)
    assert code == 1 and "checkpoint-6 is damaged: it has no optimizer.pt, or an empty one; remove poet.checkpoints" in err
    shutil.rmtree(place)
    stop(4)
    assert run(line)[0] == 130 and [path.name for path in place.glob("check*")] == ["checkpoint-2"]
    stop(6)
    assert run(line.replace("--save-every 2", "--save-every 5"))[0] == 130
    assert [path.name for path in place.glob("check*")] == ["checkpoint-5"]


def test_without_checkpoints_an_adapter_that_was_written_stays(run, folder, monkeypatch):
    monkeypatch.setattr("shira.runs.outputs.card", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
    assert run(f"{LINE} -o poet")[0] == 1
    assert shira.load("poet").nnz


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("", "--save-every needs --output"),
        ("-o poet --refresh-every 2", "--save-every is not possible with --refresh-every"),
        ("-o poet --method hook", "--save-every is not possible with"),
    ],
)
def test_what_cannot_go_on_is_refused_at_once(run, folder, monkeypatch, more, words):
    monkeypatch.setattr("shira.integrations.transformers.load_model", None)
    code, _, err = run(f"{LINE} --save-every 2 {more}")
    assert code == 1 and words in err and not list(folder.glob("*.checkpoints"))
