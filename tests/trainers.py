"""A tiny Llama and Transformers' Trainer for it; what came out of it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import shira
from conftest import bits, llama_batches

STEPS = 8
CHECKPOINTING = (  # the option of the trainers; Transformers before 5.23 has the second
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)


def llama(dtype=torch.float32, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "attention_dropout": 0.1}
    return LlamaForCausalLM(LlamaConfig(**(sizes | options))).to(dtype)


def rows(count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randint(1, 97, (9,), generator=generator).tolist() for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in made]


def trainer_of(model, folder, callbacks=(), data=None, **options):
    usual = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2}
    usual |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    known = {key: options.pop(key) for key in ("eval_dataset", "compute_metrics", "processing_class") if key in options}
    arguments = TrainingArguments(output_dir=str(folder), **(usual | options))
    return Trainer(model=model, args=arguments, train_dataset=data or rows(), callbacks=list(callbacks), **known)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def values(adapter):
    return torch.cat([tensor.values for tensor in adapter.tensors.values()])


def same_adapter(one, other):
    pairs = [(tensor, other.tensors[name]) for name, tensor in one.tensors.items()]
    assert one.tensors.keys() == other.tensors.keys()
    return all(torch.equal(a.indices, b.indices) and torch.equal(bits(a.values), bits(b.values)) for a, b in pairs)


def snip(model):
    return shira.attach(model, mask="snip", density=0.05, calibration=llama_batches())
