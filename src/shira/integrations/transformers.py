"""Transformers: load models and tokenizers. `transformers_training` trains with its Trainer."""

import contextlib
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import batches, check_packing, mean_loss
from ..data.models import BUILT_IN, built_in, model_path
from ..data.quiet import quiet
from ..data.tokens import Row, encode
from ..errors import DataError, HubError, MissingExtra
from ..files import hub
from ..files.bases import skeleton_of
from ..files.suggestions import instead, instead_of_a_model
from ..texts import shown, strict_json
from ..weights.random_numbers import seeded

__all__ = [
    "batches",
    "causal_skeleton",
    "check_packing",
    "check_there",
    "checkpointing_of",
    "dtype_of",
    "encode",
    "in_software",
    "library",
    "load_config",
    "load_model",
    "load_tokenizer",
    "mean_loss",
    "one_example_a_row",
    "skeleton",
    "untrained",
    "version",
]

INSTRUCTIONS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}  # torch's questions
TOKENIZER_FILES = ("*token*", "*vocab*", "merges.txt", "*.model", "*.bpe")  # a tokenizer has at least one such file
CHECKPOINTING = (  # methods that turn it on and off: in Diffusers, in Transformers, in Transformers before 5.23
    ("enable_gradient_checkpointing", "disable_gradient_checkpointing"),
    ("activation_checkpointing_enable", "activation_checkpointing_disable"),
    ("gradient_checkpointing_enable", "gradient_checkpointing_disable"),
)


def checkpointing_of(model: nn.Module) -> tuple[Callable[..., None], Callable[[], None]]:
    """What turns the gradient checkpointing of a model of Transformers or Diffusers on, and what turns it off."""
    on, off = next(names for names in CHECKPOINTING if hasattr(model, names[0]))
    return getattr(model, on), getattr(model, off)


def load_model(model: str, dtype: str = "auto") -> nn.Module:
    """A causal language model in evaluation mode: a folder, a hub id, or a built-in name ("SmolLM2-135M-Instruct-Q4_1").

    dtype: "auto" (the checkpoint's; float32 for a built-in model where bfloat16 is computed in software), "float32", "bfloat16"
    or "float16". Raises DataError if there is no such model.
    """
    model = built_in(model) or model
    loaded: nn.Module = _pretrained("AutoModelForCausalLM", model, dtype=dtype_of(model, dtype))
    return loaded.eval()


def dtype_of(model: str, dtype: str) -> str:
    """The dtype in which `load_model` loads a model; "auto" is the checkpoint's."""
    return "float32" if dtype == "auto" and built_in(model) and in_software(torch.bfloat16) else dtype


def in_software(dtype: torch.dtype) -> bool:
    """Whether there is no accelerator, and this CPU has no instructions for products in this half precision."""
    if torch.accelerator.is_available() or not torch.backends.mkldnn.is_available():
        return False
    return dtype in INSTRUCTIONS and not getattr(torch.ops.mkldnn, INSTRUCTIONS[dtype])()


def skeleton(model: str) -> nn.Module:
    """The model that a config describes, on the meta device: shapes and names, no data. The config names its class.

    Raises DataError if there is no such model, or if Transformers does not have its class.
    """
    config = load_config(model)
    built = skeleton_of(config)
    if built is None:
        names = getattr(config, "architectures", None) or []
        raise DataError(f"the config of {model!r} names no model class of transformers, found architectures {names}")
    return built


def load_config(model: str) -> Any:
    """A model's configuration, without its weights."""
    return _pretrained("AutoConfig", model)


def causal_skeleton(model: str) -> nn.Module:
    """The causal language model that `load_model` would load, on the meta device: shapes and names, no data.

    Raises DataError if there is no such model, or if it is no causal language model of Transformers.
    """
    config = load_config(model)
    try:
        with torch.device("meta"):
            return untrained(config, torch.float32)
    except ValueError as error:
        said = " ".join(str(error).split())
        raise DataError(f"{model!r} is no causal language model of transformers: {said[:300]}") from error


def untrained(config: Any, dtype: torch.dtype) -> nn.Module:
    """A causal language model of this configuration, with random weights."""
    made: nn.Module = library().AutoModelForCausalLM.from_config(config, dtype=dtype)
    return made


@contextlib.contextmanager
def one_example_a_row() -> Iterator[None]:
    """A context in which Transformers takes every row as one example.

    On tensors without data it cannot check that, and would make an attention mask.
    """
    where = library().masking_utils
    usual = where.find_packed_sequence_indices
    where.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        where.find_packed_sequence_indices = usual


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model, with a padding token. Raises DataError if there is none."""
    folder = Path(model)  # without this check Transformers makes an empty tokenizer for some kinds of models
    if (folder / "config.json").is_file() and not any(any(folder.glob(name)) for name in TOKENIZER_FILES):
        raise DataError(f"{model!r} holds a model and no tokenizer; save one beside it: tokenizer.save_pretrained({model!r})")
    tokenizer = _pretrained("AutoTokenizer", model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def version() -> str:
    """The version of Transformers."""
    return str(library().__version__)


def library() -> Any:
    """Transformers itself. Raises MissingExtra if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra(f"this needs transformers: pip install 'shira-adapters[train]' ({error})") from error
    return transformers


def _pretrained(kind: str, model: str, **options: Any) -> Any:
    transformers = library()
    path = model_path(model)
    check_there(path, "config.json", BUILT_IN)
    try:
        with quiet(transformers):
            return getattr(transformers, kind).from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        what = "folder" if Path(path).exists() else "folder, built-in name, or model id that can be reached"
        is_peft = (Path(path) / "adapter_config.json").is_file()
        said = instead(Path(path)) if is_peft else str(error).strip().splitlines()[0]
        raise DataError(f"cannot load {model!r}: no model in that {what} ({said})") from error
    except ImportError as error:
        raise MissingExtra(f"{model!r} needs what is not installed: {str(error).strip().splitlines()[0]}") from error
    except Exception as error:  # whatever a file that is cut short, or of another version, raises in its parser
        said = " ".join(str(error).split())[:300]
        raise DataError(f"cannot load {model!r}: its files cannot be read ({type(error).__name__}: {said})") from error


def check_there(model: str, file: str, built_in: Collection[str] = ()) -> None:
    """Raise DataError, within seconds, if a name is an adapter's, or no folder, and no model of the hub that can be had.

    file: one that all such models have on the hub. Nothing else is downloaded. built_in: models that it could have been.
    """
    if os.path.exists(model):
        command = "shira generate" if file == "config.json" else "shira sample --pipe"
        if not (Path(model) / file).exists() and (said := instead_of_a_model(Path(model), command)):
            raise DataError(f"cannot load {model!r}: {said}")
        if said := _of_the_other_kind(Path(model), file):
            raise DataError(f"cannot load {model!r}: {said}")
        return
    what = f"no folder, no built-in model ({', '.join(built_in)}), and " if built_in else "no folder, and "
    if not hub.MODEL.fullmatch(model):
        raise DataError(f"cannot load {model!r}: it is {what}no name of a model on the hub")
    folder = hub.cached(model)
    if folder is not None and (folder / file).exists():
        return
    try:
        found = hub.downloaded(model, file, local=what, known=built_in)
    except HubError as error:
        said = str(error).replace(f"{model!r} is ", "it is ", 1).removeprefix(f"{model!r}: ")
        raise DataError(f"cannot load {model!r}: {said}") from error
    if found is None:
        raise DataError(f"cannot load {model!r}: it is on the hub, but is no such model: it has no {file}")


def _of_the_other_kind(folder: Path, file: str) -> str:
    """What to do with a pipeline where a language model is wanted, and the other way round; "" for any other folder."""
    if file == "config.json" and (folder / "model_index.json").is_file() and not (folder / file).exists():
        return "it is a Diffusers pipeline: `shira train-image` trains it, and `shira sample` makes pictures with it"
    if file == "model_index.json" and (folder.parent / file).is_file() and not (folder / file).exists():
        return f"it is a part of a Diffusers pipeline; give the whole, {shown(str(folder.parent))}"
    with contextlib.suppress(OSError, ValueError, TypeError):
        if (
            file != "config.json"
            and not (folder / file).exists()
            and "model_type" in strict_json((folder / "config.json").read_bytes())
        ):
            return "it is a model of Transformers, no pipeline: `shira train` trains it, and `shira generate` lets it answer"
    return ""


@torch.no_grad()
def own_text(
    model: nn.Module, tokenizer: Any, on_token: Callable[[int, int], None] | None = None, *, rows: int = 64, length: int = 96
) -> list[Row]:
    """Rows of text that a causal language model samples without a prompt. Where no data exist, they stand for what it can do.

    The rows are the same each time, and the state of torch's random numbers does not change.
    on_token(done, total) is called after each token of all rows. Raises DataError if no token begins or ends a text.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise DataError("the tokenizer has no token that begins or ends a text, from which the model could write; give data")
    start = torch.full((rows, 1), first, device=next(model.parameters()).device)
    length = min(length, getattr(model.config, "max_position_embeddings", length + 1) - 1)

    def watch(written: Tensor, _scores: Any, **_: Any) -> Tensor:
        if on_token is not None:
            on_token(written.shape[1] - 1, length)
        return torch.zeros(rows, dtype=torch.bool, device=written.device)

    with seeded(0, model.parameters()):
        written = model.generate(  # type: ignore[operator]
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            max_new_tokens=length,
            pad_token_id=first,
            stopping_criteria=[watch],
        )
    return [{"input_ids": ids, "labels": ids} for ids in written.tolist()]
