"""Transformers: models and tokenizers, batches out of examples, and training with its Trainer."""

import contextlib
import inspect
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.models import model_path
from ..data.tasks import Example
from ..errors import DataError, MissingExtra, TuningError
from ..refresh import check_cap
from ..tuning import Tuner

__all__ = ["batches", "encode", "load_model", "load_tokenizer", "skeleton", "train", "version"]

IGNORED = -100  # the label of a token that does not count in the loss

Row = dict[str, list[int]]


def load_model(model: str, dtype: str = "auto") -> nn.Module:
    """A causal language model in evaluation mode: a folder, a hub id, or a built-in name ("SmolLM2-135M-Instruct").

    dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
    Raises DataError if there is no such model.
    """
    loaded: nn.Module = _pretrained("AutoModelForCausalLM", model, dtype=dtype)
    return loaded.eval()


def skeleton(model: str) -> nn.Module:
    """The model that a config describes, of the class that its checkpoint names, on the meta device: shapes and names, no data.

    Raises DataError if there is no such model, or it needs code of its own.
    """
    library = _library()
    config = _pretrained("AutoConfig", model)
    names = getattr(config, "architectures", None) or []
    kind = next((getattr(library, name) for name in names if hasattr(library, name)), None)
    if kind is None:
        raise DataError(f"the config of {model!r} names no model class of transformers, found architectures {names}")
    with torch.device("meta"):
        built: nn.Module = kind(config)
    return built.eval()


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model, with a padding token."""
    tokenizer = _pretrained("AutoTokenizer", model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def version() -> str:
    """The version of Transformers."""
    return str(_library().__version__)


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtra(f"this needs transformers: pip install 'shira-adapters[train]' ({error})") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _pretrained(kind: str, model: str, **options: Any) -> Any:
    path = model_path(model)
    try:
        return getattr(_library(), kind).from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        what = "folder" if Path(path).exists() else "folder, built-in name, or model id that can be reached"
        raise DataError(f"cannot load {model!r}: no model in that {what} ({str(error).strip().splitlines()[0]})") from error


def encode(tokenizer: Any, examples: Sequence[Example], max_length: int = 512) -> list[Row]:
    """Token ids and labels: the loss counts the completion and the end-of-text token after it, not the prompt.

    What is longer than max_length loses the beginning of its prompt. Raises DataError if there are no examples.
    """
    if not examples:
        raise DataError("no example to train on")
    rows = []
    for example in examples:
        prompt = tokenizer(example.prompt)["input_ids"] if example.prompt else []
        completion = tokenizer(example.completion, add_special_tokens=not example.prompt)["input_ids"]
        if not example.choices and tokenizer.eos_token_id is not None:
            completion = [*completion, tokenizer.eos_token_id]
        ids = prompt + completion
        labels = [IGNORED] * len(prompt) + completion
        rows.append({"input_ids": ids[max(0, len(ids) - max_length) :], "labels": labels[max(0, len(ids) - max_length) :]})
    return rows


def left_padded(rows: Sequence[list[int]], pad: int) -> dict[str, Tensor]:
    """Token ids [rows, longest], padded on the left, with their attention mask and position ids.

    On the left, so that all rows end together and logits are needed at the last few places only.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def takes(model: nn.Module, argument: str) -> bool:
    """Whether a model's forward names an argument; what it takes as **kwargs it may well ignore."""
    return argument in inspect.signature(model.forward).parameters


def collate(rows: Sequence[Row], model: nn.Module, pad: int = 0) -> dict[str, Any]:
    """One batch for a model. Logits and labels only from the place before the first completion on, if the model can: most
    of a small model's step would go into logits over the prompts, which the loss does not count."""
    batch: dict[str, Any] = left_padded([row["input_ids"] for row in rows], pad)
    kept = batch["input_ids"].shape[1]
    if takes(model, "logits_to_keep"):
        kept = min(kept, max(sum(label != IGNORED for label in row["labels"]) for row in rows) + 1)
        batch["logits_to_keep"] = kept
    if not takes(model, "position_ids"):
        del batch["position_ids"]
    # a row's first token has nothing before it to be predicted from, but padding
    labels = [[IGNORED] * kept + [IGNORED, *row["labels"][1:]] for row in rows]
    batch["labels"] = torch.tensor([row[len(row) - kept :] for row in labels])
    return batch


@contextlib.contextmanager
def few_logits(model: nn.Module) -> Iterator[None]:
    """Make the output layer's input contiguous: on a slice of the sequence (`logits_to_keep`), the CPU otherwise copies
    the layer's weight once for each row of the batch."""
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    hook = None
    if isinstance(output, nn.Module):
        hook = output.register_forward_pre_hook(lambda _module, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def batches(rows: Sequence[Row], model: nn.Module, size: int, pad: int = 0) -> list[dict[str, Any]]:
    """All rows in their order, as batches of `size` for a model; what calibration takes."""
    return [collate(rows[start : start + size], model, pad) for start in range(0, len(rows), size)]


def train(
    tuner: Tuner,
    model: nn.Module,
    rows: Sequence[Row],
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 16,
    accumulate: int = 1,
    schedule: str = "linear",
    warmup: float = 0.0,
    seed: int = 0,
    pad: int = 0,
    refresh_every: int = 0,
    refresh_cap: float = 1.0,
    calibration: Iterable[Any] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train what the tuner is attached to, with Transformers' Trainer and AdamW, for a number of optimizer steps.

    rows: from `encode`. schedule: any of Transformers' ("linear", "cosine", "constant", …); warmup: its share of the steps.
    refresh_every: after so many steps, again and again but not after the last, the mask is selected anew
        (`Tuner.refresh`), with refresh_cap and with the calibration batches, a list, if it needs gradients; 0: never.
    on_step(step, loss) is called after each optimizer step. Returns a summary for the adapter's file.
    Raises TuningError if the loss stops being finite, or for a refresh that cannot be.
    """
    if refresh_every < 0:
        raise TuningError(f"refresh_every must be a number of steps, or 0 for never; found {refresh_every}")
    check_cap(refresh_cap)
    library = _library()
    moved: list[int] = []

    class Watch(library.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            loss = (logs or {}).get("loss")
            if loss is None:
                return
            if not math.isfinite(loss):
                raise TuningError(f"the loss became {loss} at step {state.global_step}; try a lower learning rate")
            if on_step is not None:
                on_step(state.global_step, loss)

        def on_step_end(self, _args: Any, state: Any, _control: Any, **known: Any) -> None:
            if refresh_every and state.global_step % refresh_every == 0 and state.global_step < state.max_steps:
                moved.append(tuner.refresh(known["optimizer"], calibration=calibration, cap=refresh_cap))

    with tempfile.TemporaryDirectory() as scratch:  # the Trainer wants a folder; the adapter is saved by who asked for it
        arguments = library.TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            lr_scheduler_type=schedule,
            warmup_steps=round(warmup * steps),
            seed=seed,
            logging_steps=1,
            logging_nan_inf_filter=False,
            disable_tqdm=on_step is not None,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            train_sampling_strategy="group_by_length",
            dataloader_pin_memory=False,
            label_names=["labels"],
        )
        trainer = library.Trainer(
            model=model,
            args=arguments,
            train_dataset=list(rows),
            data_collator=lambda chosen: collate(chosen, model, pad),
            callbacks=[Watch()],
        )
        if on_step is not None:
            trainer.remove_callback(library.PrinterCallback)
        with few_logits(model):
            result = trainer.train()
    model.eval()
    summary = {
        "steps": result.global_step,
        "batch_size": batch_size * accumulate,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "examples": len(rows),
        "loss": round(result.training_loss, 4),
        "parameters": tuner.nnz,
        "seed": seed,
    }
    return summary | ({"refresh_every": refresh_every, "moved": moved} if refresh_every else {})
