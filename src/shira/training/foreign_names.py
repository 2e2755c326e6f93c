"""The names that PEFT, Transformers, TRL, Diffusers and vLLM have for our settings and calls, for whoever types one of them."""

import functools
import inspect
from collections.abc import Callable, Container
from typing import ParamSpec, TypeVar

__all__ = ["PIPELINE_CALLS", "here", "knows_foreign_names"]

THEIRS = {
    "lr": ("learning_rate",),
    "rank": ("r", "lora_r", "lora_rank"),
    "targets": ("target_modules",),
    "exclude": ("exclude_modules",),
    "layers": ("layers_to_transform",),
    "overrides": ("rank_pattern",),
    "whole": ("modules_to_save",),
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
    "adapters": ("lora_modules",),
    "name": ("adapter_name",),
    "names": ("adapter_names",),
    "adapter": ("weight_name",),
    "strengths": ("adapter_weights", "strength"),
}
MORE = {
    "steps": ", the number of optimizer steps",
    "warmup": ", a share of the steps",
    "adapters": " FOLDER",
    "adapter": ", the path of the file",
}
NOWHERE = {"lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "fan_in_fan_out", "task_type", "peft_type", "bias"}
NOWHERE |= {"enable_lora", "max_lora_rank", "hotswap", "safe_fusing"}
ELSEWHERE = {"lora_scale": "give the strength to set(names, strengths) before"}
PIPELINE_CALLS = {  # Diffusers' name of a call on a pipeline -> what is written here in its place
    "load_lora_weights": "load(file, name)",
    "load_lora_adapter": "load(file, name)",
    "set_adapters": "set(names, strengths)",
    "set_lora_device": "the pipeline's to(device), which moves what is active with it",
    "get_active_adapters": "active",
    "active_adapters": "active",
    "get_list_adapters": "names",
    "disable_lora": "disable()",
    "disable_adapters": "disable()",
    "enable_lora": "enable()",
    "enable_adapters": "enable()",
    "enable_lora_hotswap": "nothing: a compiled denoiser is not compiled again",
    "fuse_lora": "fuse()",
    "unfuse_lora": "unfuse()",
    "delete_adapters": "delete(names)",
    "unload_lora_weights": "disable()",
    "save_lora_weights": "save(file, unet=adapter)",
}

P = ParamSpec("P")
R = TypeVar("R")


def here(name: str, known: Container[str], quoted: Callable[[str], str] = repr) -> str:
    """What to write in place of a setting of another library: "here it is 'lr'"; "" if the name is of none.

    known: our names that can be used. quoted: how one is shown.
    """
    for ours, theirs in THEIRS.items():
        if name in theirs and ours in known:
            return f"here it is {quoted(ours)}{MORE.get(ours, '')}"
    return "there is no such setting here, leave it out" if name in NOWHERE else ELSEWHERE.get(name, "")


def knows_foreign_names(page: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the call's TypeError for an argument that is another library's says what is written here in its place.

    page: of the docs, where the names stand beside each other.
    """

    def decorated(call: Callable[P, R]) -> Callable[P, R]:
        known = inspect.signature(call).parameters

        @functools.wraps(call)
        def checked(*args: P.args, **options: P.kwargs) -> R:
            for name in options:
                if name not in known and (said := here(name, known, lambda ours: f"{ours}=")):
                    raise TypeError(f"{call.__name__}() got an unexpected keyword argument {name!r}; {said} ({page})")
            return call(*args, **options)

        return checked

    return decorated
