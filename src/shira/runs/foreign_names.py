"""The names that PEFT, Transformers, TRL and Diffusers have for our settings, for whoever types a name from there."""

from collections.abc import Callable, Container

__all__ = ["here"]

THEIRS = {
    "lr": ("learning_rate",),
    "rank": ("r", "lora_r", "lora_rank"),
    "targets": ("target_modules",),
    "exclude": ("exclude_modules",),
    "layers": ("layers_to_transform",),
    "decompose": ("use_dora",),
    "steps": ("max_steps", "max_train_steps", "num_train_epochs", "num_epochs", "epochs"),
    "batch_size": ("per_device_train_batch_size", "train_batch_size"),
    "accumulate": ("gradient_accumulation_steps",),
    "schedule": ("lr_scheduler_type", "lr_scheduler"),
    "warmup": ("warmup_ratio", "warmup_steps", "lr_warmup_steps"),
    "checkpointing": ("gradient_checkpointing",),
    "max_length": ("max_seq_length", "max_seq_len"),
    "pack": ("packing",),
    "dtype": ("torch_dtype", "bf16", "fp16"),
    "log_folder": ("logging_dir",),
    "model": ("model_name_or_path", "base_model_name_or_path", "base_model", "model_name", "model_id"),
    "pipeline": ("pretrained_model_name_or_path", "model", "base_model"),
    "data": ("dataset", "dataset_name", "train_data", "instance_data_dir", "train_data_dir"),
    "prompt": ("instance_prompt",),
    "eval_data": ("eval_dataset",),
    "save_every": ("save_steps",),
    "output": ("output_dir",),
}
UNITS = {"steps": ", the number of optimizer steps", "warmup": ", a share of the steps"}
NOWHERE = ("lora_alpha", "lora_dropout", "use_rslora", "task_type", "peft_type", "bias")


def here(name: str, known: Container[str], quoted: Callable[[str], str] = repr) -> str:
    """What to write in place of a setting of another library: "here it is 'lr'"; "" if the name is of none.

    known: our names that can be used. quoted: how one is shown.
    """
    for ours, theirs in THEIRS.items():
        if name in theirs and ours in known:
            return f"here it is {quoted(ours)}{UNITS.get(ours, '')}"
    return "there is no such setting here, leave it out" if name in NOWHERE else ""
