"""Diffusers: a pipeline's adapters by its own LoRA calls, by PEFT's SHiRA, and by shira: what works, and how long it takes."""

import contextlib
import functools
import itertools
import string
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import shira
from shira.integrations.diffusers import PipelineAdapters

from .common import alternate, print_row, show

RANK = 16  # each adapter has as many numbers as a LoRA of this rank
LINEAR = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2"]
NAMES = ("Diffusers LoRA", "PEFT SHiRA", "shira")


def main(plot: Path | None, quick: bool) -> list[dict[str, Any]]:
    """What works, as a table; then milliseconds with 3 and with 20 adapters loaded."""
    diffusers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # PEFT's notes on adapters that are merged
    widths = (32, 64) if quick else (128, 256, 512)
    print_row("diffusers", setup="the UNet", parameters=sum(map(Tensor.numel, Lora(widths).base.values())))
    works = {name: abilities(kind(widths)) for name, kind in zip(NAMES, (Lora, PeftShira, Shira), strict=True)}
    print_row("diffusers", setup="what works", **works)
    table = Table("", *NAMES, title="what works")
    for what in works[NAMES[0]]:
        table.add_row(what, *(works[name][what] for name in NAMES))
    Console(width=150).print(table)
    rows = []
    for count in (2, 3) if quick else (3, 20):
        for what, ms in times(widths, count, 1 if quick else 9).items():
            rows.append(print_row("diffusers", setup=f"{what}, {count} loaded", ms=ms))
    show("diffusers", rows, lambda row: str(row["setup"]), plot)
    return rows


def pipeline(widths: tuple[int, ...]) -> Any:
    """A StableDiffusionPipeline with a random UNet of these widths, and a text encoder and VAE that are tiny."""
    torch.manual_seed(0)
    depth = len(widths) - 1
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D",) * depth + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * depth,
        cross_attention_dim=64,
    )
    letters = string.ascii_lowercase
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={word: at for at, word in enumerate(words)}, merges=[], model_max_length=8)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    ends = {"vocab_size": len(words), "max_position_embeddings": 8, "bos_token_id": 52, "eos_token_id": 53}
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(32,)),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, **ends)),
        tokenizer=tokenizer,
        unet=unet.eval().requires_grad_(False),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Lora:
    """Diffusers' calls on LoRAs of PEFT."""

    convolutions = True

    def __init__(self, widths: tuple[int, ...]) -> None:
        self.pipe = pipeline(widths)
        self.base = {name: weight.clone() for name, weight in self.pipe.unet.named_parameters()}
        self.names: list[str] = []
        self.is_off = False

    def config(self, targets: list[str]) -> Any:
        return peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=False)

    def add(self, name: str, targets: list[str]) -> None:
        torch.manual_seed(sum(map(ord, name)))
        self.pipe.unet.add_adapter(self.config(targets), adapter_name=name)
        self.names.append(name)
        self.off()

    def set(self, names: Any, strengths: Any = None) -> None:
        self.pipe.set_adapters(names, strengths)
        if self.is_off:
            self.pipe.enable_lora()
            self.is_off = False

    def off(self) -> None:
        self.pipe.disable_lora()
        self.is_off = True

    def fuse_and_unfuse(self) -> None:
        self.pipe.fuse_lora(components=["unet"])
        self.pipe.unfuse_lora(components=["unet"])

    def save(self, folder: str) -> None:
        self.set("a")
        layers = peft.get_peft_model_state_dict(self.pipe.unet, adapter_name="a")
        self.pipe.save_lora_weights(folder, unet_lora_layers=layers)

    def load(self, folder: str, name: str) -> None:
        self.pipe.load_lora_weights(folder, adapter_name=name)

    def delete(self, name: str) -> None:
        self.pipe.delete_adapters(name)

    def changed(self) -> int:
        """How many entries of the base's weights differ from what they were."""
        now = {name.replace(".base_layer", ""): weight for name, weight in self.pipe.unet.named_parameters()}
        return sum(int((now[name] != old).sum()) for name, old in self.base.items())

    def noise(self, **options: Any) -> Tensor:
        """What the UNet makes of fixed inputs."""
        generator = torch.Generator().manual_seed(0)
        latents, context = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 8, 64, generator=generator)
        with torch.no_grad():
            found: Tensor = self.pipe.unet(latents, torch.tensor(500), context, **options).sample
        return found


class PeftShira(Lora):
    """Diffusers' calls on PEFT's SHiRA."""

    convolutions = False

    def config(self, targets: list[str]) -> Any:
        return peft.ShiraConfig(r=RANK, target_modules=targets, init_weights=False)


class Shira(Lora):
    """`PipelineAdapters`."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__(widths)
        self.adapters = PipelineAdapters(self.pipe)
        self.made: dict[str, shira.Adapter] = {}

    def add(self, name: str, targets: list[str]) -> None:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        tensors, prints = {}, {}
        for path, layer in self.pipe.unet.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and any(path.endswith(f".{target}") for target in targets):
                weight = self.base[f"{path}.weight"]
                count = RANK * (weight.shape[0] + weight[0].numel())
                where = torch.randperm(weight.numel(), generator=generator)[:count].sort().values
                values = weight.view(-1)[where] + 0.1 * torch.randn(len(where), generator=generator)
                tensors[f"{path}.weight"] = shira.SparseTensor(tuple(weight.shape), where, values)
                prints[f"{path}.weight"] = shira.sparse.tensor.fingerprint(weight.view(-1)[where])
        self.made[name] = shira.Adapter(tensors, {"name": name, "fingerprints": prints})
        self.adapters.load(self.made[name])
        self.names.append(name)

    def set(self, names: Any, strengths: Any = None) -> None:
        self.adapters.set(names, strengths)

    def off(self) -> None:
        self.adapters.disable()

    def fuse_and_unfuse(self) -> None:
        self.adapters.fuse()
        self.adapters.unfuse()

    def save(self, folder: str) -> None:
        self.adapters.save(f"{folder}/a.safetensors", unet=self.made["a"])

    def load(self, folder: str, name: str) -> None:
        self.adapters.load(f"{folder}/a.safetensors", name)

    def delete(self, name: str) -> None:
        self.adapters.delete(name)


def abilities(ours: Lora) -> dict[str, str]:
    """What works: "yes", or what happened instead."""
    plain = ours.noise()

    def acts(targets: list[str], name: str) -> str:
        ours.add(name, targets)
        ours.set(name)
        found = "no" if torch.equal(ours.noise(), plain) else "yes"
        ours.off()
        return found

    def blocks() -> str:
        """Everything in the blocks at 0: only what is outside of them may still act, and the targets are all inside."""
        name = ours.names[-1]
        zero = {"unet": {"down": 0.0, "mid": 0.0, "up": 0.0}}
        ours.set(name)
        whole = float((ours.noise() - plain).abs().max())
        ours.set(name, zero)
        left = float((ours.noise() - plain).abs().max())
        ours.off()
        if left > 1e-4 * whole:
            return f"no: at 0 everywhere, {100 * left / whole:.0f} % of the change are left"
        return "yes" if ours.convolutions else "linear only"

    def by_call() -> str:
        ours.set("a")
        full, half = ours.noise(), ours.noise(cross_attention_kwargs={"scale": 0.5})
        ours.off()
        return "no effect; use set" if torch.equal(full, half) else "yes"

    def again() -> str:
        with tempfile.TemporaryDirectory() as folder:
            ours.set("a")
            wanted = ours.noise()
            ours.save(folder)
            ours.load(folder, "again")
            ours.set("again")
            same = torch.allclose(ours.noise(), wanted, rtol=1e-3, atol=1e-4)
            ours.off()
            ours.delete("again")
        return "yes" if same else "another output"

    def exact() -> str:
        ours.set("a")
        ours.fuse_and_unfuse()
        ours.off()
        return f"{ours.changed():,} of {sum(map(Tensor.numel, ours.base.values())):,} changed"

    return {
        "Linear": _tried(functools.partial(acts, LINEAR, "a")),
        "Conv2d": _tried(functools.partial(acts, CONVOLUTIONS, "c")),
        "strengths by block": _tried(blocks),
        'cross_attention_kwargs={"scale": 0.5}': _tried(by_call),
        "save, load again": _tried(again),
        "base after fuse + unfuse": _tried(exact),
    }


def _tried(call: Callable[[], str]) -> str:
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:70]}"


def times(widths: tuple[int, ...], count: int, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each change, and of one call of the UNet, by library. The adapters change linear layers only."""
    found: dict[str, dict[str, float]] = {}
    kinds = {name: kind(widths) for name, kind in zip(NAMES, (Lora, PeftShira, Shira), strict=True)}
    for ours in kinds.values():
        for number in range(count):
            ours.add(string.ascii_lowercase[number], LINEAR)
    both = (["a", "b"], [1.0, 0.5])
    others = itertools.count(1)
    changes: dict[str, tuple[Callable[[Lora], Any], Callable[[Lora], Any]]] = {
        "base to a": (lambda ours: ours.off(), lambda ours: ours.set("a")),
        "a to b": (lambda ours: ours.set("a"), lambda ours: ours.set("b")),
        "a to a + b/2": (lambda ours: ours.set("a"), lambda ours: ours.set(*both)),
        "a to a strength not used before": (lambda ours: ours.set("a"), lambda ours: ours.set("a", 1 / (1 + next(others)))),
        "fuse a + unfuse": (lambda ours: ours.set("a"), lambda ours: ours.fuse_and_unfuse()),
        "a call of the UNet on the base": (lambda ours: ours.off(), lambda ours: ours.noise()),
        "a call of the UNet with a": (lambda ours: ours.set("a"), lambda ours: ours.noise()),
        "a call of the UNet with a + b/2": (lambda ours: ours.set(*both), lambda ours: ours.noise()),
    }
    for what, (before, change) in changes.items():
        runs = {name: functools.partial(change, ours) for name, ours in kinds.items()}
        seconds = alternate(runs, repeats, between=lambda name, before=before: before(kinds[name]), warmup=2)
        found[what] = {name: 1e3 * value for name, value in seconds.items()}
    del kinds[NAMES[1]]  # it cannot load a file
    with contextlib.ExitStack() as stack:
        folders = {name: stack.enter_context(tempfile.TemporaryDirectory()) for name in kinds}
        for name, ours in kinds.items():
            ours.save(folders[name])

        def from_file(name: str) -> None:
            kinds[name].load(folders[name], "new")
            kinds[name].set("new")
            kinds[name].delete("new")

        seconds = alternate({name: functools.partial(from_file, name) for name in kinds}, repeats)
    found["load a file, set, delete"] = {name: 1e3 * value for name, value in seconds.items()}
    return found
