"""TRL's SFTTrainer and DPOTrainer: packed sequences, resuming, and a reference that is the base itself."""

import copy
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import shira
from conftest import all_bits, bits, same_bits
from shira import TuningError
from shira.files.suggestions import ADAPTER
from shira.integrations.trainer import ReferenceModel, ShiraCallback
from trainers import CHECKPOINTING

# TRL 1.16 uses names of Transformers that this has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

WORDS = ["[pad]", "[eos]", *(f"w{number}" for number in range(95))]


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0))


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[pad]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[pad]", eos_token="[eos]")


def text(seed, length):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[number] for number in torch.randint(2, 97, (length,), generator=generator))


def usual(folder, **options):
    usual = {"output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    usual |= {"logging_steps": 1, "save_steps": 3, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return usual | {"bf16": False, CHECKPOINTING: True, "dataloader_pin_memory": False} | options


def sft(model, tokenizer, folder, callbacks, **options):
    data = Dataset.from_dict({"text": [text(seed, 4 + seed % 9) for seed in range(40)]})
    arguments = SFTConfig(**usual(folder, **options))
    return SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=callbacks)


def dpo(model, tokenizer, folder, callbacks, reference=None, **options):
    columns = {"prompt": 3, "chosen": 5, "rejected": 6}
    data = {name: [text(seed * 7 + length, length) for seed in range(12)] for name, length in columns.items()}
    data["prompt"] = [f"{prompt} " for prompt in data["prompt"]]
    arguments = DPOConfig(**usual(folder, beta=0.5, **options))
    return DPOTrainer(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def values(adapter):
    return torch.cat([tensor.values for tensor in adapter.tensors.values()])


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_sft_trains_what_the_gradient_hook_trains(tmp_path, tokenizer, packing):
    trained = []
    for method in ("values", "hook"):
        model = llama()
        with shira.attach(model, density=0.05, method=method) as tuner:
            start = values(tuner.adapter())
            callbacks = [ShiraCallback(tuner)] if method == "values" else []
            trainer = sft(model, tokenizer, tmp_path, callbacks, packing=packing, max_length=24, save_strategy="no")
            assert ("seq_lengths" in trainer.train_dataset.column_names) == packing
            trainer.train()
            trained.append(values(tuner.adapter()) - start)
    ours, oracle = trained
    assert float(oracle.abs().max()) > 1e-4
    assert float((ours - oracle).norm() / oracle.norm()) < 1e-5


def test_sft_resumes_to_the_bit(tmp_path, tokenizer):
    found = []
    for folder, resume in (("whole", None), ("whole", str(tmp_path / "whole" / "checkpoint-3"))):
        model = llama()
        with shira.attach(model, density=0.05) as tuner:
            trainer = sft(model, tokenizer, tmp_path / folder, [ShiraCallback(tuner)], packing=True, max_length=24)
            trainer.train(resume_from_checkpoint=resume)
            found.append((logged(trainer, "loss"), bits(values(tuner.adapter()))))
    assert found[0][0] == found[1][0] and len(found[0][0]) == 6
    assert torch.equal(found[0][1], found[1][1])
    saved = {path.name for path in (tmp_path / "whole" / "checkpoint-6").iterdir()}
    assert {ADAPTER, "README.md", "tokenizer.json"} <= saved and "config.json" not in saved


def test_dpo_refers_to_the_base_without_a_copy(tmp_path, tokenizer):
    """Bit for bit what a second, untouched model as the reference gives: every loss and every reward."""
    found = []
    for reference in ("itself", "a copy", "computed before"):
        model = llama()
        base = all_bits(model)
        untouched = copy.deepcopy(model)
        with shira.attach(model, density=0.05) as tuner:
            given = {"itself": ReferenceModel(tuner), "a copy": untouched}.get(reference)
            options = {"precompute_ref_log_probs": True} if reference == "computed before" else {}
            trainer = dpo(model, tokenizer, tmp_path / reference, [ShiraCallback(tuner)], given, **options)
            if reference == "itself":
                ours = {parameter.data_ptr() for parameter in model.parameters()}
                assert {parameter.data_ptr() for parameter in trainer.ref_model.parameters()} == ours
            trainer.train()
            told = [logged(trainer, key) for key in ("loss", "rewards/chosen", "rewards/rejected")]
            found.append((told, bits(values(tuner.adapter()))))
            if reference == "itself":
                batch = next(iter(trainer.get_train_dataloader()))
                one = trainer.compute_ref_log_probs(trainer.ref_model, batch)
                plain = dpo(llama(), tokenizer, tmp_path / "plain", [], untouched)
                other = plain.compute_ref_log_probs(plain.ref_model, batch)
                assert all(torch.equal(bits(a), bits(b)) for a, b in zip(one, other, strict=True))
        assert same_bits(base, all_bits(model))
    assert len(found[0][0][0]) == 6 and len(set(found[0][0][0])) == 6  # it moves
    assert found[0][0] == found[1][0] == found[2][0]
    assert torch.equal(found[0][1], found[1][1]) and torch.equal(found[0][1], found[2][1])


def test_a_reference_that_moves_is_refused(tmp_path, tokenizer):
    model = llama()
    with shira.attach(model, density=0.05) as tuner, pytest.raises(TuningError, match="sync_ref_model"):
        dpo(model, tokenizer, tmp_path, [ShiraCallback(tuner)], ReferenceModel(tuner), sync_ref_model=True)


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # the page does not say that there is no GPU here
def test_the_snippets_of_the_docs_run(tmp_path, tokenizer, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "trainers.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 4
    monkeypatch.chdir(tmp_path)
    model = llama()
    base = all_bits(model)
    ids = torch.arange(2, 32).view(3, 10)
    names = {
        "torch": torch,
        "model": model,
        "tokenizer": tokenizer,
        "rows": [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids.repeat(8, 1)],
        "texts": Dataset.from_dict({"text": [text(seed, 9) for seed in range(24)]}),
        "pairs": Dataset.from_dict({name: [text(n, 5) for n in range(12)] for name in ("prompt", "chosen", "rejected")}),
        "batch": {"input_ids": ids, "labels": ids},
    }
    for snippet in snippets:
        exec(snippet, names)
        assert same_bits(base, all_bits(model))
    again = snippets[0].replace("trainer.train()", "trainer.train(resume_from_checkpoint=True)")
    exec(again.replace("max_steps=6", "max_steps=8"), names)
    assert names["trainer"].state.global_step == 8
    assert {ADAPTER, "README.md"} <= {path.name for path in (tmp_path / "poet").iterdir()}
