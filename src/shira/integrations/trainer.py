"""Transformers' Trainer and TRL's trainers: checkpoints without the base, exact resuming, a reference without a copy.

The trainers save with `model.save_pretrained` and load with `model.load_state_dict`. While a tuner is attached, the
callback replaces both on its model: one writes the adapter and the masters, the other loads the masters. So a trainer needs
no subclass, and still decides itself when to save, to load the best checkpoint, or to resume.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import MissingExtra, TuningError
from ..files.paths import CHECKPOINT, sweep
from ..files.suggestions import ADAPTER
from ..files.tensorfiles import write_whole
from ..texts import described
from ..training.tuner import Tuner
from ..weights.modes import evaluating
from .card import base_of, card
from .hub import CARD

__all__ = ["ReferenceModel", "ShiraCallback", "set_aside"]

try:
    import accelerate
    import transformers
except ImportError as error:
    raise MissingExtra(f"this needs transformers and accelerate: pip install 'shira-adapters[train]' ({error})") from error

MASTERS = "model.safetensors"  # the file whose content the Trainer passes to load_state_dict
PROCESSES = "shira_processes"  # stored with the masters: how many processes trained
SCALE = "shira_lr_scale"  # and in which unit, as the optimizer's state has it; 1 if it is not there
logger = logging.getLogger(__name__)


class ShiraCallback(transformers.TrainerCallback):  # type: ignore[misc]  # mypy does not follow transformers
    """Makes any Trainer save, resume and load its best checkpoint by the adapter instead of by the model.

    The Trainer then saves an adapter file and a model card; its checkpoints also hold the float32 masters. Pass the callback to
    the Trainer's constructor, which sets aside checkpoints that were begun and not finished (`set_aside`).

    name, license: for the adapter's file and card.
    Raises TuningError if the tuner cannot be saved in this way: here, or before the first step.

        tuner = shira.attach(model, mask="wm", density=0.01)
        trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=[ShiraCallback(tuner)])
        trainer.train(resume_from_checkpoint=True)
    """

    def __init__(self, tuner: Tuner, *, name: str | None = None, license: str | None = None) -> None:
        _check_tuner("ShiraCallback", tuner)
        if not isinstance(tuner.model, transformers.PreTrainedModel):
            raise TuningError(
                f"ShiraCallback needs a transformers.PreTrainedModel, found a {type(tuner.model).__name__}, of which the "
                "Trainer saves all weights; train without the callback and save tuner.adapter() at the end"
            )
        tuner.masters("trained with ShiraCallback")
        self.tuner, self.name, self.license = tuner, name, license
        self._run: tuple[Any, Any] | None = None  # the Trainer's arguments and state
        self._end: list[Tensor] | None = None  # what was trained, of a run that is over when it is resumed
        self._install("save_pretrained", self._save_pretrained)
        self._install("load_state_dict", self._load_state_dict)

    def _install(self, name: str, method: Callable[..., Any]) -> None:
        """Replace a method on this model object until the tuner is detached."""
        self.tuner.at_detach.callback(self.tuner.model.__dict__.pop, name, None)
        self.tuner.model.__dict__[name] = method

    def on_init_end(self, args: Any, state: Any, _control: Any, **known: Any) -> None:
        self._check(args, known["model"])
        self._run = args, state
        if args.should_save:
            set_aside(args.output_dir)
        args.distributed_state.wait_for_everyone()  # no process may look for a checkpoint before that

    def on_train_begin(self, args: Any, state: Any, _control: Any, **known: Any) -> None:
        self._check(args, known["model"])
        self._run = args, state
        trained = {id(parameter) for group in known["optimizer"].param_groups for parameter in group["params"]}
        if not trained.issuperset(map(id, self.tuner.parameters())):
            raise TuningError("the Trainer's optimizer does not train this tuner's parameters; attach before it is made")
        over = state.global_step >= state.max_steps > 0
        self._end = [tensor.detach().clone() for tensor in self._changing()] if over else None

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        """Undo the step that Transformers (5.23) takes beyond max_steps when it resumes from the last checkpoint of a run."""
        if self._end is not None:
            with torch.no_grad():
                for tensor, kept in zip(self._changing(), self._end, strict=True):
                    tensor.copy_(kept)
            state.global_step -= 1
            control.should_save = control.should_log = control.should_evaluate = False

    def _changing(self) -> list[Tensor]:
        """What a step changes, beside the optimizer."""
        return [*self.tuner.parameters(), *self.tuner.model.buffers()]

    def on_push_begin(self, args: Any, _state: Any, _control: Any, **_: Any) -> None:
        # the Trainer copies only those files of a checkpoint whose names it knows
        self._save_pretrained(args.output_dir, args.should_save)

    def _check(self, args: Any, model: Any) -> None:
        self.tuner.masters("trained with ShiraCallback")
        if model is not self.tuner.model:
            of_peft = type(model).__module__.startswith("peft.")
            raise TuningError(
                f"the tuner is attached to another model than the {type(model).__name__} that the Trainer trains; pass "
                f"tuner.model to the Trainer as it is{', without peft_config=' if of_peft else ''}"
            )
        state = accelerate.state.AcceleratorState()
        engines = [name for name in ("fsdp", "deepspeed") if getattr(state, f"{name}_plugin", None) is not None]
        if engines:
            raise TuningError(
                f"with {engines[0]} the Trainer saves and loads weights in ways of its own; use DDP, or a loop of your own "
                "(docs/distributed.md)"
            )
        if args.n_gpu > 1:
            raise TuningError(
                f"the Trainer would copy the model to {args.n_gpu} GPUs (nn.DataParallel), and the copies would not train the "
                "values; start a process for each (torchrun, accelerate launch), or set CUDA_VISIBLE_DEVICES=0"
            )
        if args.bf16_full_eval or args.fp16_full_eval:
            raise TuningError("bf16_full_eval and fp16_full_eval cast the masters and the base; use bf16=True instead")
        if getattr(args, "sync_ref_model", False):
            raise TuningError("sync_ref_model moves the reference, which here is the base itself; leave it off")

    def _save_pretrained(self, save_directory: Any, is_main_process: bool = True, push_to_hub: bool = False, **_: Any) -> None:
        """`model.save_pretrained` while the tuner is attached: saves an adapter and a card, no weights."""
        if push_to_hub:
            raise TuningError("save to a folder and push that: shira push FOLDER user/repo")
        if not is_main_process:
            return
        folder, model = Path(save_directory), self.tuner.model
        adapter = self.tuner.adapter(self.name, training=self._summary(), license=self.license)
        folder.mkdir(parents=True, exist_ok=True)
        if CHECKPOINT.fullmatch(folder.name):
            state = self.tuner.state_dict() | {PROCESSES: torch.tensor([self._processes()])}
            state |= {SCALE: torch.tensor([self.tuner.lr_scale])} if self.tuner.lr_scale != 1 else {}
            write_whole(folder / MASTERS, safetensors.torch.save(state, {"format": "pt"}))
        adapter.save(folder / ADAPTER)
        identity = getattr(model.config, "_name_or_path", "")
        loader = type(model).__name__ if identity and hasattr(transformers, type(model).__name__) else None
        base = adapter.metadata["base"]
        text = card(adapter, ADAPTER, base_of(identity or base["id"], base["dtype"], loader))
        write_whole(folder / CARD, text.encode())

    def _load_state_dict(self, state_dict: Mapping[str, Tensor], *_: Any, **__: Any) -> Any:
        """`model.load_state_dict` while the tuner is attached. It reports no missing keys: the base is there already."""
        state = dict(state_dict)
        saved, now = int(state.pop(PROCESSES, torch.tensor([1]))), self._processes()
        if saved != now:
            raise TuningError(
                f"the checkpoint is of {saved} processes and would go on with {now}: each would see other examples in another "
                f"random state; start {saved}, or begin anew"
            )
        scale = float(state.pop(SCALE, torch.tensor([1.0])))
        if scale != self.tuner.lr_scale:
            raise TuningError(
                f"the checkpoint's optimizer is of lr_scale {scale:g}, and this tuner has {self.tuner.lr_scale:g}; attach with "
                f"lr_scale={scale:g}"
            )
        self.tuner.load_state_dict(state)
        return nn.modules.module._IncompatibleKeys([], [])

    def _processes(self) -> int:
        return int(self._run[0].world_size) if self._run else 1

    def _summary(self) -> dict[str, Any] | None:
        """Facts about the run so far for the adapter's file; None before the first step."""
        if self._run is None or not self._run[1].global_step:
            return None
        args, state = self._run
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        found = {
            "steps": state.global_step,
            "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "learning_rate": args.learning_rate,
            "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "parameters": self.tuner.nnz,
            "seed": args.seed,
        }
        return found | ({"loss": round(losses[-1], 4)} if losses and math.isfinite(losses[-1]) else {})


def _check_tuner(taker: str, tuner: Any) -> None:
    if not isinstance(tuner, Tuner):
        raise TuningError(f"{taker} takes the tuner that shira.attach returned, found {described(tuner)}")


def set_aside(folder: Any) -> list[Path]:
    """Rename checkpoints in a Trainer's folder that are not complete, so that none is resumed from. Returns their new paths.

    A process that is killed while it saves leaves a part of a checkpoint. The Trainer writes trainer_state.json last, and
    removes old checkpoints after that. So the newest checkpoint with a complete trainer_state.json is complete.
    No process may save to the folder at the same time.
    """
    moved = []
    for path in sorted(Path(folder).glob("checkpoint-*")):
        if not CHECKPOINT.fullmatch(path.name) or not path.is_dir() or _is_whole(path):
            continue
        aside = path.with_name(f"unfinished-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        sweep(aside)  # nobody writes there again, who would do it
        logger.warning("%s is not whole and was set aside as %s", path, aside.name)
        moved.append(aside)
    return moved


def _is_whole(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict)


class ReferenceModel(nn.Module):
    """The base of a model in training, as the reference model of TRL's DPOTrainer. It uses the model's weights, not a copy.

    Each call switches the adapter off and on again (`Tuner.reference`), and runs without dropout.

        trainer = DPOTrainer(model=model, ref_model=ReferenceModel(tuner), args=args, ...)
    """

    def __init__(self, tuner: Tuner) -> None:
        _check_tuner("ReferenceModel", tuner)
        super().__init__()
        self.model = tuner.model
        self.tuner = tuner

    def __call__(self, *inputs: Any, **options: Any) -> Any:  # not `forward`, because trainers replace that
        with evaluating(self), self.tuner.reference():
            return super().__call__(*inputs, **options)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.model(*inputs, **options)

    def __getattr__(self, name: str) -> Any:
        """All other attributes (config, base_model, get_output_embeddings, …) are those of the model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)
