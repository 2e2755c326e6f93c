"""Transformers: train with its Trainer and AdamW, on batches of `data.batches`."""

import collections
import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.batches import BatchOrder, collate, mean_loss
from ..data.tokens import Row
from ..errors import DataError, MissingExtra, TuningError, did_you_mean
from ..files.paths import temporary_folder
from ..masks.calibration import nan_advice
from ..training.tuner import Tuner
from ..weights.modes import modes_kept
from . import transformers as hf

__all__ = ["check_schedule", "reporters", "train"]


def reporters(report_to: str) -> list[str]:
    """A comma-separated list of Transformers' reporters as a Python list, checked.

    Raises DataError for a name that Transformers does not know, MissingExtra for a package that is not installed.
    """
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    integrations = hf.library().integrations
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
    known = [each.value for each in hf.library().SchedulerType]
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
    save_every: int = 0,
    save_folder: Path | None = None,
) -> dict[str, Any]:
    """Train the tuner's model with Transformers' Trainer and AdamW, for a number of optimizer steps.

    rows: from `encode` or `pack`. schedule: any of Transformers' ("linear", "cosine", "constant", …). warmup: the share of the
        steps in which the learning rate rises.
    refresh_every: the mask is selected again (`Tuner.refresh`) each time after so many steps, but not after the last one; with
        refresh_cap and, if the mask needs gradients, with the calibration batches, a list. 0: never.
    held_out: rows whose mean loss is computed before the first and after the last step, with on_evaluation(rows done, rows in
        all) before the first batch and after each.
    report_to: Transformers' reporters, comma-separated ("tensorboard,wandb"). log_folder: the folder of TensorBoard's logs.
    on_step(step, loss, tokens per second) is called after each optimizer step.
    save_every: a checkpoint is saved each time after so many steps, but not after the last one, in save_folder. If a checkpoint
        is there already, training goes on from it, and the result is the same to the bit. 0: never.
    Returns a summary for the adapter's file.
    Raises TuningError if the loss becomes infinite or NaN, or for a refresh that is not possible; and what `reporters` raises.
    """
    library = hf.library()
    chosen_reporters = reporters(report_to)
    moved: list[int] = []
    losses: list[float] = []  # of the held-out rows
    tokens = [0]  # trained on so far
    steps_of_pass: list[int] = []  # steps in one pass over the rows, once the Trainer knows
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

        def on_train_begin(self, args: Any, state: Any, _control: Any, **known: Any) -> None:
            state.save_steps = args.save_steps  # that of the checkpoint may be another
            steps_of_pass.append(-(-len(known["train_dataloader"]) // accumulate))
            clock.append((time.perf_counter(), tokens[0]))

        def on_step_end(self, _args: Any, state: Any, control: Any, **known: Any) -> None:
            if state.global_step == state.max_steps:
                control.should_save = False
            if refresh_every and state.global_step % refresh_every == 0 and state.global_step < state.max_steps:
                moved.append(tuner.refresh(known["optimizer"], calibration=calibration, cap=refresh_cap))

    class Trainer(library.Trainer):  # type: ignore[misc,name-defined]
        def _get_train_sampler(self, *_: Any) -> BatchOrder:
            together = batch_size * accumulate * self.args.world_size  # so any number of processes has the same batches
            passes = lambda: self.state.global_step // steps_of_pass[0]  # noqa: E731
            return BatchOrder([len(row["input_ids"]) for row in rows], together, seed, passes)

    with contextlib.ExitStack() as scratch:
        # the Trainer requires a folder; the caller saves the adapter
        folder = save_folder or scratch.enter_context(temporary_folder(Path(tempfile.gettempdir())))
        arguments = library.TrainingArguments(
            output_dir=str(folder),
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
            save_strategy="steps" if save_every else "no",
            save_steps=save_every or steps,
            save_total_limit=1,
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
            callbacks=[Watch(), *_savers(tuner, save_every)],
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
            last = library.trainer_utils.get_last_checkpoint(str(folder))
            result = trainer.train(resume_from_checkpoint=last and _checked(Path(last)))
    losses_of_steps = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]  # also those before a stop
    summary = {
        "steps": result.global_step,
        "batch_size": batch_size * accumulate * arguments.world_size,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "examples": len(rows),
        "loss": round(sum(losses_of_steps) / len(losses_of_steps), 4),
        "parameters": tuner.nnz,
        "seed": seed,
    }
    if held_out:
        summary["held_out"] = {"rows": len(held_out), "loss_before": round(losses[0], 4), "loss": round(losses[-1], 4)}
    return summary | ({"refresh_every": refresh_every, "moved": moved} if refresh_every else {})


def _savers(tuner: Tuner, save_every: int) -> list[Any]:
    """What makes the Trainer save checkpoints without the base, if it saves any."""
    if not save_every:
        return []
    from .trainer import ShiraCallback

    return [ShiraCallback(tuner)]


def _checked(checkpoint: Path) -> str:
    """The checkpoint. Raises DataError if one of its files is missing or empty, which the Trainer would take without a word."""
    there = {path.name for path in checkpoint.iterdir() if path.stat().st_size}
    for needed in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        if needed not in there:
            raise DataError(
                f"{checkpoint} is damaged: it has no {needed}, or an empty one; remove {checkpoint.parent} to begin anew"
            )
    return str(checkpoint)
