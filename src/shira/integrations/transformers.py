"""Transformers: load models and tokenizers, and train with its Trainer on batches of `data.batches`."""

import collections
import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import BatchOrder, batches, check_packing, collate, mean_loss
from ..data.models import BUILT_IN, built_in, model_path
from ..data.quiet import quiet
from ..data.tokens import Row, encode
from ..errors import DataError, HubError, MissingExtra, TuningError, did_you_mean
from ..files import hub
from ..files.bases import skeleton_of
from ..files.paths import temporary_folder
from ..masks.calibration import nan_advice
from ..training.tuner import Tuner
from ..weights.modes import modes_kept
from ..weights.random_numbers import seeded

__all__ = [
    "batches",
    "check_packing",
    "check_there",
    "checkpointing_of",
    "dtype_of",
    "encode",
    "in_software",
    "load_config",
    "load_model",
    "load_tokenizer",
    "mean_loss",
    "reporters",
    "skeleton",
    "train",
    "untrained",
    "version",
]

INSTRUCTIONS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}  # torch's questions
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
    made: nn.Module = _library().AutoModelForCausalLM.from_config(config, dtype=dtype)
    return made


@contextlib.contextmanager
def one_example_a_row() -> Iterator[None]:
    """A context in which Transformers takes every row as one example.

    On tensors without data it cannot check that, and would make an attention mask.
    """
    where = _library().masking_utils
    usual = where.find_packed_sequence_indices
    where.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        where.find_packed_sequence_indices = usual


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
    return transformers


def _pretrained(kind: str, model: str, **options: Any) -> Any:
    library = _library()
    path = model_path(model)
    check_there(path, "config.json", BUILT_IN)
    try:
        with quiet(library):
            return getattr(library, kind).from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        what = "folder" if Path(path).exists() else "folder, built-in name, or model id that can be reached"
        raise DataError(f"cannot load {model!r}: no model in that {what} ({str(error).strip().splitlines()[0]})") from error
    except ImportError as error:
        raise MissingExtra(f"{model!r} needs what is not installed: {str(error).strip().splitlines()[0]}") from error
    except Exception as error:  # whatever a file that is cut short, or of another version, raises in its parser
        said = " ".join(str(error).split())[:300]
        raise DataError(f"cannot load {model!r}: its files cannot be read ({type(error).__name__}: {said})") from error


def check_there(model: str, file: str, built_in: Collection[str] = ()) -> None:
    """Raise DataError, within seconds, if a name is no folder, and no model of the hub that can be had.

    file: one that all such models have on the hub. Nothing else is downloaded. built_in: models that it could have been.
    """
    if os.path.exists(model):
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


def reporters(report_to: str) -> list[str]:
    """A comma-separated list of Transformers' reporters as a Python list, checked.

    Raises DataError for a name that Transformers does not know, MissingExtra for a package that is not installed.
    """
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    integrations = _library().integrations
    known = integrations.integration_utils.INTEGRATION_TO_CALLBACK
    for name in names:
        if name not in known:
            raise DataError(f"cannot report to {name!r}; {did_you_mean(name, known)}")
        if name not in integrations.get_available_reporting_integrations():
            raise MissingExtra(
                f"reporting to {name!r} needs a package that is not installed: pip install {name.replace('_', '-')}"
            )
    return names


def check_schedule(schedule: str) -> None:
    """Raise DataError for a schedule of the learning rate that Transformers does not have."""
    known = [each.value for each in _library().SchedulerType]
    if schedule not in known:
        raise DataError(f"unknown schedule {schedule!r}; {did_you_mean(schedule, known)}")


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
    held_out: Sequence[Row] = (),
    report_to: str = "none",
    log_folder: str | Path = "runs",
    on_step: Callable[[int, float, float], None] | None = None,
    on_evaluation: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train the tuner's model with Transformers' Trainer and AdamW, for a number of optimizer steps.

    rows: from `encode` or `pack`. schedule: any of Transformers' ("linear", "cosine", "constant", …). warmup: the share of the
        steps in which the learning rate rises.
    refresh_every: the mask is selected again (`Tuner.refresh`) each time after so many steps, but not after the last one; with
        refresh_cap and, if the mask needs gradients, with the calibration batches, a list. 0: never.
    held_out: rows whose mean loss is computed before the first and after the last step, with on_evaluation(rows done, rows in
        all) before the first batch and after each.
    report_to: Transformers' reporters, comma-separated ("tensorboard,wandb"). log_folder: the folder of TensorBoard's logs.
    on_step(step, loss, tokens per second) is called after each optimizer step. Returns a summary for the adapter's file.
    Raises TuningError if the loss becomes infinite or NaN, or for a refresh that is not possible; and what `reporters` raises.
    """
    library = _library()
    chosen_reporters = reporters(report_to)
    moved: list[int] = []
    losses: list[float] = []  # of the held-out rows
    tokens = [0]  # trained on so far
    clock: collections.deque[tuple[float, int]] = collections.deque(maxlen=11)  # (time, tokens) of the last steps

    def evaluate() -> None:
        if on_evaluation is not None:
            on_evaluation(0, len(held_out))
        losses.append(mean_loss(model, held_out, batch_size, pad, on_evaluation))

    def next_batch(chosen: Sequence[Row]) -> dict[str, Any]:
        tokens[0] += sum(len(row["input_ids"]) for row in chosen)
        return collate(chosen, model, pad)

    class Watch(library.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            loss = (logs or {}).get("loss")
            if loss is None:
                return
            if not math.isfinite(loss):
                advice = nan_advice(next(model.parameters()).device)
                raise TuningError(f"the loss became {loss} at step {state.global_step}; try a lower learning rate{advice}")
            clock.append((time.perf_counter(), tokens[0]))
            if on_step is not None:
                (start, before), (now, after) = clock[0], clock[-1]
                on_step(state.global_step, loss, (after - before) / (now - start))
            if held_out and state.global_step == state.max_steps:
                evaluate()
                trainer.log({"eval_loss": losses[-1]})

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.append((time.perf_counter(), tokens[0]))

        def on_step_end(self, _args: Any, state: Any, _control: Any, **known: Any) -> None:
            if refresh_every and state.global_step % refresh_every == 0 and state.global_step < state.max_steps:
                moved.append(tuner.refresh(known["optimizer"], calibration=calibration, cap=refresh_cap))

    class Trainer(library.Trainer):  # type: ignore[misc,name-defined]
        def _get_train_sampler(self, *_: Any) -> BatchOrder:
            together = batch_size * accumulate * self.args.world_size  # so any number of processes has the same batches
            return BatchOrder([len(row["input_ids"]) for row in rows], together, seed)

    with temporary_folder(Path(tempfile.gettempdir())) as scratch:  # the Trainer requires one; the caller saves the adapter
        arguments = library.TrainingArguments(
            output_dir=str(scratch),
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
            report_to=[name for name in chosen_reporters if name != "tensorboard"] or "none",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            label_names=["labels"],
            use_cpu=not torch.accelerator.is_available(),
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # the copies of nn.DataParallel would not train the values
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=next_batch,
            callbacks=[Watch()],
        )
        if "tensorboard" in chosen_reporters:  # the Trainer's own callback would write into the scratch folder
            board = library.integrations.TensorBoardCallback()
            board.logging_dir = str(log_folder)
            trainer.add_callback(board)
        if on_step is not None:
            trainer.remove_callback(library.PrinterCallback)
        if held_out:
            evaluate()
        with modes_kept(model):
            result = trainer.train()
    summary = {
        "steps": result.global_step,
        "batch_size": batch_size * accumulate * arguments.world_size,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "examples": len(rows),
        "loss": round(result.training_loss, 4),
        "parameters": tuner.nnz,
        "seed": seed,
    }
    if held_out:
        summary["held_out"] = {"rows": len(held_out), "loss_before": round(losses[0], 4), "loss": round(losses[-1], 4)}
    return summary | ({"refresh_every": refresh_every, "moved": moved} if refresh_every else {})
