"""Transformers' Trainer: what its checkpoints hold, that runs resume exactly, and that its options train what they should."""

import copy
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from transformers import LlamaForCausalLM, TrainerCallback, TrainingArguments

import shira
from conftest import all_bits, bits, mlp, same_bits
from shira import BaseMismatch, TuningError
from shira.files.suggestions import ADAPTER
from shira.integrations.trainer import ReferenceModel, ShiraCallback, set_aside
from shira.training.checkpoint_watch import FullCheckpoint
from test_distributed import torchrun
from trainers import CHECKPOINTING, STEPS, llama, losses, rows, same_adapter, snip, trainer_of, values


class StopsWhileSaving:
    """What the Trainer saves after the adapter and before the optimizer; at the step named it waits to be killed."""

    def __init__(self, folder):
        self.folder = folder

    def save_pretrained(self, path):
        if Path(path) == self.folder:
            print("saving", flush=True)
            sys.stdin.read()


class Stops(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step


def run_until_killed(folder):
    model = llama()
    tokenizer = StopsWhileSaving(Path(folder) / "checkpoint-6")
    trainer_of(model, folder, [ShiraCallback(snip(model))], processing_class=tokenizer).train()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bit(tmp_path):
    """SIGKILL in the middle of a save: the half-written checkpoint is not taken, the one before it is."""
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); import test_trainer; test_trainer.run_until_killed(sys.argv[1])"
    killed = tmp_path / "killed"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(killed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        while "saving" not in (line := child.stdout.readline()):
            assert line, "the run ended before its third checkpoint"
        child.kill()
    assert (killed / "checkpoint-6" / ADAPTER).exists() and not (killed / "checkpoint-6" / "optimizer.pt").exists()
    found = {}
    for folder in (killed, tmp_path / "whole"):
        model = llama()
        with snip(model) as tuner:
            trainer = trainer_of(model, folder, [ShiraCallback(tuner)])
            trainer.train(resume_from_checkpoint=True if folder == killed else None)
            found[folder.name] = losses(trainer), tuner.adapter()
    assert (killed / "unfinished-checkpoint-6" / ADAPTER).exists()
    assert found["killed"][0] == found["whole"][0] and len(set(found["whole"][0])) == STEPS
    assert same_adapter(found["killed"][1], found["whole"][1])
    last = [shira.load(tmp_path / name / f"checkpoint-{STEPS}" / ADAPTER) for name in ("killed", "whole")]
    assert same_adapter(*last) and same_adapter(last[0], found["whole"][1])


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"tie_word_embeddings": True}], ids=["bfloat16", "tied"])
def test_resuming_in_the_same_process(tmp_path, options):
    """Masters are kept, not rounded values: on a bfloat16 model they are more."""
    found = []
    for name, stops in (("whole", [STEPS]), ("parts", [4, STEPS])):
        for part, stop in enumerate(stops):
            model = llama(**options)
            before = all_bits(model)
            with shira.attach(model, mask="rand", density=0.05) as tuner:
                callbacks = [ShiraCallback(tuner), Stops(stop)]
                trainer = trainer_of(model, tmp_path / name, callbacks, learning_rate=1e-3)
                trainer.train(resume_from_checkpoint=part > 0)
                masters = bits(torch.cat([parameter.detach() for parameter in tuner.parameters()]))
                adapter = tuner.adapter()
            assert same_bits(before, all_bits(model))
        found.append((losses(trainer), masters, adapter))
    (one, masters, adapter), (other, resumed, again) = found
    assert len(one) == STEPS and one == other
    assert torch.equal(masters, resumed) and same_adapter(adapter, again)


def test_a_run_that_was_over_when_it_is_resumed_stays_as_it_was(tmp_path):
    """Transformers takes one step more. It was found by a kill between the last checkpoint and the adapter."""
    found = []
    for resumed in (False, True):
        model = llama()
        with snip(model) as tuner:
            trainer = trainer_of(model, tmp_path, [ShiraCallback(tuner)])
            trainer.train(resume_from_checkpoint=resumed)
            assert trainer.state.global_step == STEPS and len(losses(trainer)) == STEPS
            found.append(tuner.adapter())
    assert same_adapter(*found)
    assert max(int(path.name.partition("-")[2]) for path in tmp_path.glob("checkpoint-*")) == STEPS


def test_without_the_callback_one_warning_says_that_whole_models_are_saved(tmp_path):
    """`filterwarnings = error` shows that there is none with the callback, nor if nothing is saved, in the other tests."""
    model = llama()
    with snip(model) as tuner:
        trainer = trainer_of(model, tmp_path, save_steps=1, max_steps=2)
        with pytest.warns(
            FullCheckpoint, match=rf"{tuner.nnz:,} entries train.*callbacks=\[ShiraCallback\(tuner\)\]"
        ) as warned:
            trainer.train()
            trainer.save_model(tmp_path / "final")
        assert len(warned) == 1
        model.save_pretrained(tmp_path / "own")  # by the user's own wish: nothing to warn of
    model = llama()
    with snip(model):
        trainer_of(model, tmp_path / "none", save_strategy="no", max_steps=1).train()


def test_a_checkpoint_holds_no_copy_of_the_base(tmp_path):
    model = llama()
    base = all_bits(model)
    with snip(model) as tuner:
        trainer = trainer_of(model, tmp_path, [ShiraCallback(tuner, name="poet", license="MIT")], save_steps=STEPS)
        trainer.train()
        trainer.save_model(tmp_path / "final")
        trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
        trained, count = tuner.adapter(), tuner.nnz
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    small = {"README.md", ADAPTER, "training_args.bin"}
    resumable = {"model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"}
    assert {path.name for path in checkpoint.iterdir()} == small | resumable
    kept = safetensors.torch.load_file(checkpoint / "model.safetensors")
    assert sum(tensor.numel() for tensor in kept.values() if tensor.is_floating_point()) == count
    assert {path.name for path in (tmp_path / "final").iterdir()} == small
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", ADAPTER, "final", checkpoint.name}
    saved = shira.load(tmp_path / "final" / ADAPTER)
    assert same_adapter(saved, trained)
    assert (saved.name, saved.metadata["license"]) == ("poet", "MIT")
    assert saved.metadata["training"]["steps"] == STEPS and saved.metadata["training"]["loss"] == round(losses(trainer)[-1], 4)
    assert same_bits(base, all_bits(model))
    model.save_pretrained(tmp_path / "whole")  # detached: the model's own again
    assert (tmp_path / "whole" / "config.json").exists()
    assert not {"save_pretrained", "load_state_dict"} & set(vars(model))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model = llama(attention_dropout=0.0)
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    with snip(model) as tuner:
        trainer = trainer_of(model, tmp_path, [ShiraCallback(tuner)], eval_dataset=rows(6, 1), learning_rate=0.1, **options)
        trainer.train()
        best = shira.load(Path(trainer.state.best_model_checkpoint) / ADAPTER)
        last = shira.load(tmp_path / f"checkpoint-{STEPS}" / ADAPTER)
        assert not same_adapter(best, last)
        assert same_adapter(best, tuner.adapter())
        assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def test_evaluation_sees_the_trained_values_and_disturbs_nothing(tmp_path):
    """With compute_metrics, and generation in a callback."""
    seen, results = [], []

    class Generates(TrainerCallback):
        def on_evaluate(self, args, state, control, model, **_):
            model.eval()
            seen.append(model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=3, do_sample=False))

    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean())}

    for evaluates in (False, True):
        model = llama(attention_dropout=0.0)
        options = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": rows(6, 1), "compute_metrics": accuracy}
        with snip(model) as tuner:
            callbacks = [ShiraCallback(tuner), Generates()]
            trainer = trainer_of(model, tmp_path, callbacks, save_strategy="no", **(options if evaluates else {}))
            trainer.train()
            results.append(tuner.adapter())
    assert same_adapter(*results)
    assert len(seen) == STEPS // 2
    told = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    switcher = shira.Switcher(model)
    switcher.add("trained", results[0])
    switcher.use("trained")
    merged = trainer_of(model, tmp_path, **options).evaluate()
    assert (told["eval_loss"], told["eval_accuracy"]) == (merged["eval_loss"], merged["eval_accuracy"])


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 3},
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
        {"bf16": True},
        {"optim": "sgd", "weight_decay": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    ],
    ids=["accumulation", "checkpointing-reentrant", "checkpointing", "bf16", "sgd"],
)
def test_options_train_what_the_gradient_hook_trains(tmp_path, options):
    trained = []
    for method in ("values", "hook"):
        model = llama(attention_dropout=0.0)
        start = values(shira.attach(copy.deepcopy(model), density=0.05).adapter())
        with shira.attach(model, density=0.05, method=method) as tuner:
            callbacks = [ShiraCallback(tuner)] if method == "values" else []
            trainer_of(model, tmp_path, callbacks, save_strategy="no", max_steps=4, learning_rate=1e-3, **options).train()
            trained.append(values(tuner.adapter()) - start)
    ours, oracle = trained
    assert float(oracle.abs().max()) > 1e-5
    assert float((ours - oracle).norm() / oracle.norm()) < 1e-5


def test_the_card_tells_how_to_load_and_it_is_so(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "final" / "tiny-llama")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "final" / "tiny-llama")
    with snip(model) as tuner:
        trainer = trainer_of(
            model, tmp_path / "run", [ShiraCallback(tuner, name='my "poet"', license="MIT")], save_strategy="no"
        )
        trainer.train()
        trainer.save_model(tmp_path / "final")
        trainer.evaluate(rows(2))  # writes the last step
        trained = all_bits(model)
    card = (tmp_path / "final" / "README.md").read_text()
    head, body = card.removeprefix("---\n").split("---\n", 1)
    assert 'license: "mit"' in head and "tiny-llama" not in head
    known = shira.load(tmp_path / "final" / ADAPTER)
    for told in (
        "a folder called tiny-llama",
        "dtype | float32",
        "| mask | snip, density 0.05,",
        f"{known.density:.3%}, {known.nnz:,} entries",
        "MIT",
        f"steps {STEPS}",
    ):
        assert told in body
    assert str(tmp_path) not in card
    snippet = body.split("```python\n")[1].split("```")[0]
    *lines, again = snippet.strip().splitlines()
    monkeypatch.chdir(tmp_path / "final")
    names = {}
    exec("\n".join(lines), names)
    assert all(torch.equal(trained[name], now) for name, now in all_bits(names["model"]).items())
    exec(again, names)
    assert same_bits(all_bits(names["model"]), all_bits(model))


@pytest.mark.parametrize(
    ("settings", "options", "error", "words"),
    [
        ({"seed": 1}, {}, TuningError, "another mask: .* other positions of 'model.layers.0.self_attn.q_proj.weight'"),
        ({"density": 0.1}, {}, TuningError, "29 entries .* train there and 58"),
        ({"targets": "mlp"}, {}, TuningError, "of other targets: missing none"),
        ({"lr_scale": 8}, {}, TuningError, "optimizer is of lr_scale 1, and this tuner has 8; attach with lr_scale=1"),
        ({}, {"dtype": torch.bfloat16}, BaseMismatch, "another base"),
        ({}, {"hidden_size": 48}, BaseMismatch, r"another model: '.*q_proj.weight' is \[24, 24\] there and \[48, 48\] here"),
    ],
    ids=["positions", "density", "targets", "scale", "base", "shapes"],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, settings, options, error, words):
    usual = {"mask": "rand", "density": 0.05}
    first = llama()
    with shira.attach(first, **usual) as tuner:
        trainer_of(first, tmp_path, [ShiraCallback(tuner)], max_steps=2).train()
    model = llama(**options)
    before = all_bits(model)
    with shira.attach(model, **(usual | settings)) as tuner:
        start = [bits(parameter) for parameter in tuner.parameters()]
        with pytest.raises(error, match=words):
            trainer_of(model, tmp_path, [ShiraCallback(tuner)]).train(resume_from_checkpoint=True)
        assert all(torch.equal(one, bits(now)) for one, now in zip(start, tuner.parameters(), strict=True))
    assert same_bits(before, all_bits(model))


def test_a_checkpoint_without_an_adapter_is_refused(tmp_path):
    model = llama()
    trainer_of(model, tmp_path, max_steps=2).train()
    with snip(model) as tuner, pytest.raises(TuningError, match="nothing that this tuner trains"):
        trainer_of(model, tmp_path, [ShiraCallback(tuner)]).train(resume_from_checkpoint=True)


def test_tuners_that_cannot_be_trained_so_are_refused(tmp_path):
    model, other = llama(), llama()
    with snip(model) as tuner:
        for given, found in ((model, "a LlamaForCausalLM"), (tuner.adapter(), "an Adapter"), (None, r"None \(NoneType\)")):
            for taker in (ShiraCallback, ReferenceModel):
                words = f"{taker.__name__} takes the tuner that shira.attach returned, found {found}"
                with pytest.raises(TuningError, match=words):
                    taker(given)
    with shira.attach(model, method="hook") as tuner, pytest.raises(TuningError, match="method='values'"):
        ShiraCallback(tuner)
    with shira.attach(mlp(), density=0.1) as tuner, pytest.raises(TuningError, match="PreTrainedModel, found a Sequential"):
        ShiraCallback(tuner)
    with snip(model) as tuner:
        callback = ShiraCallback(tuner)
        with pytest.raises(TuningError, match="another model than the LlamaForCausalLM"):
            trainer_of(other, tmp_path, [callback])
        with pytest.raises(TuningError, match="bf16_full_eval"):
            trainer_of(model, tmp_path, [callback], bf16_full_eval=True)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(TuningError, match="copy the model to 2 GPUs"):
            patch.setattr(TrainingArguments, "n_gpu", 2)
            trainer_of(model, tmp_path, [callback])
        trainer = trainer_of(model, tmp_path, [callback], save_strategy="no")
    with pytest.raises(TuningError, match="only an attached tuner"):
        trainer.train()
    with pytest.raises(TuningError, match="only an attached tuner"):
        ShiraCallback(tuner)
    with snip(model) as tuner:
        trainer = trainer_of(model, tmp_path, [ShiraCallback(tuner)])
        trainer.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        with pytest.raises(TuningError, match="optimizer does not train"):
            trainer.train()


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")  # PEFT asks the model for names that Transformers will drop
def test_layers_of_peft_beside_a_tuner_are_named_as_the_cause(tmp_path):
    peft = pytest.importorskip("peft")
    model = llama()
    with snip(model) as tuner:
        inside = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).train()
        with pytest.raises(
            TuningError, match=r"frozen \(requires_grad=False\) after.* PEFT, which freezes .*: leave out peft_con"
        ):
            inside(input_ids=torch.ones(1, 4, dtype=torch.long))
        with pytest.raises(TuningError, match="than the PeftModel.* as it is, without peft_config="):
            trainer_of(inside, tmp_path, [ShiraCallback(tuner)])
        inside.unload()


def test_engines_that_save_in_their_own_way_are_refused(tmp_path, monkeypatch):
    """FSDP needs GPUs here, so only what accelerate says of itself is changed."""
    model = llama()
    with snip(model) as tuner:
        callback = ShiraCallback(tuner)
        trainer = trainer_of(model, tmp_path, [callback])
        monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", object())
        with pytest.raises(TuningError, match="with fsdp the Trainer saves"):
            callback.on_init_end(trainer.args, trainer.state, trainer.control, model=model)


def run_in_parts(folder):
    """On each of several processes: a run and, from its checkpoint in the middle, the second half of it again."""
    found = []
    for checkpoint in (None, f"{folder}/checkpoint-4"):
        model = llama(attention_dropout=0.0)
        with snip(model) as tuner:
            trainer = trainer_of(model, folder, [ShiraCallback(tuner)])
            trainer.train(resume_from_checkpoint=checkpoint)
            found.append((losses(trainer), tuner.adapter()))
    (one, adapter), (other, again) = found
    assert len(one) == STEPS and one == other and same_adapter(adapter, again)


@pytest.mark.slow
def test_two_processes_resume_to_the_bit(tmp_path):
    code, printed = torchrun(2, "-m", "test_trainer", tmp_path)
    assert code == 0, printed
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= {path.name for path in (tmp_path / "checkpoint-4").iterdir()}


def test_a_mask_that_has_moved_is_not_kept_halfway(tmp_path):
    model = llama()

    class Moves(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer, **_):
            tuner.refresh(optimizer.optimizer)

    with shira.attach(model, density=0.05) as tuner:
        trainer = trainer_of(model, tmp_path, [ShiraCallback(tuner), Moves()])
        with pytest.raises(TuningError, match="has moved"):
            trainer.train()
        trainer.save_model(tmp_path / "final")
        assert same_adapter(shira.load(tmp_path / "final" / ADAPTER), tuner.adapter())


def test_training_that_went_wrong_is_not_saved(tmp_path):
    model = llama()
    with snip(model) as tuner, pytest.raises(TuningError, match="went wrong"):
        trainer_of(model, tmp_path, [ShiraCallback(tuner)], learning_rate=math.inf, optim="sgd").train()
    assert not list(tmp_path.rglob(ADAPTER))


def test_what_is_whole_is_left_alone(tmp_path, caplog):
    model = llama()
    with snip(model) as tuner:
        trainer_of(model, tmp_path, [ShiraCallback(tuner)], max_steps=4).train()
    for name in ("checkpoint-6", "checkpoint-x"):
        shutil.copytree(tmp_path / "checkpoint-4", tmp_path / name)
    state = tmp_path / "checkpoint-6" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:-9])
    abandoned = f".shira-{'0' * 16}.tmp"
    (tmp_path / "checkpoint-6" / abandoned).touch()
    assert set_aside(tmp_path) == [tmp_path / "unfinished-checkpoint-6"]
    assert "checkpoint-6 is not whole" in caplog.text
    assert not (tmp_path / "unfinished-checkpoint-6" / abandoned).exists()
    assert set_aside(tmp_path) == set_aside(tmp_path / "nowhere") == []
    left = {"checkpoint-2", "checkpoint-4", "checkpoint-x", "unfinished-checkpoint-6"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_a_copy_of_the_model_saves_its_own_values(tmp_path):
    model = llama()
    with snip(model) as tuner:
        trainer = trainer_of(model, tmp_path, [ShiraCallback(tuner)], save_strategy="no")
        twin = copy.deepcopy(model)
        trainer.train()
        model.save_pretrained(tmp_path / "trained")
        twin.save_pretrained(tmp_path / "twin")
    kept = [shira.load(tmp_path / name / ADAPTER) for name in ("trained", "twin")]
    assert not same_adapter(*kept)


if __name__ == "__main__":
    run_in_parts(sys.argv[1])
