"""The real model: SmolLM2-135M-Instruct-Q4_1, fetched once into the user cache."""

import itertools
import json
import resource
import shutil
import subprocess
import sys

import pytest
import torch

import shira
from conftest import all_bits, bits, same_bits
from shira.data.models import model_path
from shira.data.reading import examples_of
from shira.integrations.transformers import load_model, load_tokenizer

pytestmark = pytest.mark.real


def demo(folder, *options):
    command = [sys.executable, "-m", "shira.cli", "demo", "--json", "--output", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    """What the demo is meant to show: 10 points on each task, 80 % of them after fusion, within its time and memory.

    With 30 of the 300 held-out examples of each task: each gains 20 points or more, so 30 tell.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = demo(tmp_path, "--examples", "30")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result["restored"] is True
    base, spam, questions, both, again = result["rows"]
    assert base["changed"] == again["changed"] == 0
    assert min(spam["changed"], questions["changed"], both["changed"]) > 0
    assert {key: value for key, value in base.items() if key != "switch_ms"} == {
        key: value for key, value in again.items() if key != "switch_ms"
    } | {"active": "base"}
    assert spam["file_bytes"] == (tmp_path / "spam.safetensors").stat().st_size
    assert (tmp_path / "questions.yaml").exists()
    assert result["examples"] == 30
    for alone, fused in result["gains"].values():
        assert alone >= 0.10
        assert fused >= 0.8 * alone
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2 * 360  # six minutes of two processors
    assert result["peak_memory_gb"] < 4


def test_it_is_the_real_model_and_comes_back(tmp_path):
    model, tokenizer = load_model("SmolLM2-135M-Instruct-Q4_1"), load_tokenizer("SmolLM2-135M-Instruct-Q4_1")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    before = all_bits(model)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def answer():
        with torch.no_grad():
            return tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :])

    assert "Paris" in answer()
    switcher = shira.Switcher(model)
    for name, scale in (("a", 1.5), ("b", -0.5)):
        with shira.attach(model, mask="wm", density=0.01) as tuner:
            with torch.no_grad():
                for parameter in tuner.parameters():
                    parameter.mul_(scale)
            tuner.adapter(name).save(tmp_path / f"{name}.safetensors")
        switcher.add(name, tmp_path / f"{name}.safetensors")
    switcher.use({"a": 1.0, "b": 0.5})
    assert "Paris" not in answer()
    switcher.use(None)
    assert same_bits(before, all_bits(model))
    assert "Paris" in answer()


@pytest.mark.slow
def test_a_fine_tune_comes_apart_and_together_again(tmp_path):
    """An adapter saved as a full model, extracted, merged: the same entries, the same weights, the same answers."""
    try:
        model = load_model("SmolLM2-135M-Instruct-Q4_1", "bfloat16")  # as the checkpoint that it is compared with
        tokenizer = load_tokenizer("SmolLM2-135M-Instruct-Q4_1")
        with shira.attach(model, mask="rand", density=0.01) as tuner:
            with torch.no_grad():
                for parameter in tuner.parameters():
                    parameter.mul_(1.5)
            adapter = tuner.adapter("tuned")
        switcher = shira.Switcher(model)
        switcher.add("tuned", adapter)
        switcher.use("tuned")
        model.save_pretrained(tmp_path / "tuned", max_shard_size="100MB")
        base = model_path("SmolLM2-135M-Instruct-Q4_1")
        extracted = shira.extract(base, tmp_path / "tuned")
        shira.merge(base, extracted, tmp_path / "merged")
        merged = load_model(str(tmp_path / "merged"))
        assert same_bits(all_bits(model), all_bits(merged))
        ids = tokenizer("The capital of France is", return_tensors="pt")
        with torch.no_grad():
            assert torch.equal(bits(model(**ids).logits), bits(merged(**ids).logits))
        switcher.use(None)  # 0 times 1.5 is 0: an entry that did not change is in the adapter, and not in the difference
        for name, tensor in extracted.tensors.items():
            told, old = adapter.tensors[name], dict(model.named_parameters())[name].view(-1)[adapter.tensors[name].indices]
            differs = (told.values.view(torch.int16) != old.view(torch.int16)).nonzero().view(-1)
            assert torch.equal(tensor.indices, told.indices[differs])
            assert torch.equal(bits(tensor.values), bits(told.values[differs]))
        assert extracted.tensors.keys() == adapter.tensors.keys()
    finally:
        for folder in tmp_path.iterdir():  # half a gigabyte
            shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind, steps", [("Trainer", 6), ("SFTTrainer", 4)])
def test_trainers_save_little_and_resume(tmp_path, short_built_in, kind, steps):
    """Half of the steps, then the others from the checkpoint: the same losses and the same adapter as in one go.

    On three layers of the model.
    """
    import datasets
    import transformers
    import trl

    from shira.files.suggestions import ADAPTER
    from shira.integrations.trainer import ShiraCallback

    tokenizer = load_tokenizer("SmolLM2-135M-Instruct-Q4_1")
    examples = list(itertools.islice(examples_of("spam", "train"), 16))
    half = steps // 2
    usual = {"max_steps": steps, "save_steps": half, "per_device_train_batch_size": 2, "learning_rate": 2e-3}
    usual |= {
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
    }
    found = []
    for checkpoint in (None, str(tmp_path / f"checkpoint-{half}")):
        model = load_model("SmolLM2-135M-Instruct-Q4_1")
        with shira.attach(model, mask="wm", density=0.01) as tuner:
            callbacks = [ShiraCallback(tuner, name="spam", license="Apache-2.0")]
            if kind == "Trainer":
                args = transformers.TrainingArguments(str(tmp_path), **usual)
                collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
                rows = [dict(tokenizer(example.prompt + example.completion)) for example in examples]
                known = {"data_collator": collate, "train_dataset": rows}
                trainer = transformers.Trainer(model=model, args=args, callbacks=callbacks, **known)
            else:
                args = trl.SFTConfig(str(tmp_path), packing=True, max_length=128, activation_checkpointing=True, **usual)
                columns = {"prompt": [e.prompt for e in examples], "completion": [e.completion for e in examples]}
                known = {"processing_class": tokenizer, "train_dataset": datasets.Dataset.from_dict(columns)}
                trainer = trl.SFTTrainer(model=model, args=args, callbacks=callbacks, **known)
            trainer.train(resume_from_checkpoint=checkpoint)
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            found.append((losses, {name: bits(tensor.values) for name, tensor in tuner.adapter().tensors.items()}))
    assert found[0][0] == found[1][0] and len(found[0][0]) == steps
    assert sum(found[0][0][half:]) < sum(found[0][0][:half])
    assert same_bits(found[0][1], found[1][1])
    sizes = {path.name: path.stat().st_size for path in (tmp_path / f"checkpoint-{steps}").iterdir()}
    values = sum(map(len, found[0][1].values()))  # bytes; positions take less than 2.5 for each entry
    assert sizes[ADAPTER] < values * (1 + 2.5 / model.dtype.itemsize)
    assert sizes["model.safetensors"] < 6e5 and sum(sizes.values()) < 8e6
