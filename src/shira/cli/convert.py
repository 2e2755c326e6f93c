"""shira convert: PEFT's checkpoints and RL trainers' weight patches as adapters, and adapters as these."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data.models import model_path
from ..errors import AdapterError, CheckpointError, DataError, FormatError, did_you_mean
from .options import DTYPES, Force, check_new, check_shares
from .output import bytes_text, cell, console, progress, waiting

if TYPE_CHECKING:
    from ..adapter import Adapter

__all__ = ["convert"]

WAYS = ("shira", "peft", "trl", "slime", "verl")


def convert(
    source: Annotated[
        Path, typer.Argument(help="What PEFT or Diffusers saved, or a weight patch; with another --to, an adapter.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The adapter's file; with --to peft, a new folder.")],
    to: Annotated[str, typer.Option(help="shira, peft (its SHiRA), or the weight patch of trl, slime or verl.")] = "shira",
    base: Annotated[
        str | None,
        typer.Option(
            help="The model or pipeline it was trained on: a folder or a hub id; PEFT's configuration may name it.",
            show_default=False,
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="For a LoRA and others that are dense: the share of entries to take.", show_default=False),
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Instead, the share of ‖ΔW‖ to keep, with the fewest entries.", show_default=False)
    ] = None,
    scope: Annotated[str, typer.Option(help="What has the budget: tensor (each), or model (all together).")] = "tensor",
    positions: Annotated[
        str | None, typer.Option(help="In a weight patch: gap, or raw (int32), which verl takes.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of an adapter: the dtype to which its base was cast: float32, bfloat16 or float16.", show_default=False
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The adapter's name.", show_default="the folder's")] = None,
    force: Force = False,
) -> None:
    """Convert PEFT's checkpoints: its SHiRA and Super-Tuning exactly; of a LoRA and all that it merges, the largest entries.

    Of a LoRA file for a Diffusers pipeline, too. And weight patches of RL trainers (TRL's, slime's, verl's), exactly.

    Example: shira convert my-lora --base my-model --keep 0.9 -o mine.safetensors

    And back: shira convert mine.safetensors --to peft -o mine-peft

    For its base in another dtype: shira convert mine.safetensors --base my-model --dtype bfloat16 -o mine-bfloat16.safetensors
    """
    check_shares(density=density, keep=keep)
    if dtype is not None:
        given = {"--to": to != "shira", "--density": density is not None, "--keep": keep is not None}
        unfit = next((option for option, there in given.items() if there), None)
        if unfit is not None:
            raise AdapterError(f"--dtype makes an adapter of an adapter, for its base in another dtype: leave out {unfit}")
        _to_dtype(source, output, base, dtype, name, force=force)
        return
    if to not in WAYS:
        raise AdapterError(f"unknown --to {to!r}; {did_you_mean(to, WAYS)}")
    if to == "peft":
        _to_peft(source, output, base, {"--density": density, "--keep": keep, "--name": name})
        return
    from ..checkpoints.extraction import summary
    from ..files.patches import is_patch
    from ..files.suggestions import is_ours, lora_file

    if to != "shira" or is_patch(source):
        for option, value in {"--density": density, "--keep": keep}.items():
            if value is not None:
                raise AdapterError(f"{option} is for checkpoints of PEFT; a weight patch is taken whole: leave it out")
    check_new(output, force=force, read=[source])
    if to != "shira":
        _to_patch(source, output, to, positions, base)
        return
    if is_patch(source):
        _from_patch(source, output, base, name)
        return
    if source.is_file() and is_ours(source):
        raise AdapterError(f"{source} is an adapter of shira already; --to peft makes a checkpoint of PEFT's SHiRA of it")
    if lora_file(source):
        _from_pipeline_lora(source, output, base, name, {"density": density, "keep": keep, "scope": scope})
        return
    from ..files.peft_files import CONFIG, is_sparse, read_config

    if source.is_file() and not (source.parent / CONFIG).is_file():
        _check_whole(source)
    _, config = read_config(source)
    if is_sparse(config):
        if density is not None or keep is not None:
            raise AdapterError(
                f"{source} is a {config['peft_type']}, which is sparse and taken whole: leave out --density and --keep"
            )
        from ..integrations import peft

        with waiting("converting"):
            adapter, how = peft.load(source, base), "exactly as in PEFT"
    else:
        from ..integrations import peft_merging

        with progress("converting", 100) as update, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of Transformers, about what PEFT asks it
            adapter = peft_merging.convert(
                source,
                base,
                density=density,
                keep=keep,
                scope=scope,  # type: ignore[arg-type]  # `convert` checks it
                on_progress=lambda share: update(int(100 * share), ""),
            )
        facts = summary(adapter)
        whole = f", and {len(facts['whole'])} tensors that PEFT trained whole" if facts["whole"] else ""
        how = f"{facts['kept']:.1%} of ‖ΔW‖{whole}"
    if name:
        adapter.metadata["name"] = name
    adapter.save(output)
    _print_saved(output, adapter, f", {how}")


def _to_dtype(source: Path, output: Path, base: str | None, dtype: str, name: str | None, *, force: bool) -> None:
    import torch

    from ..adapter import load
    from ..checkpoints.casting import cast
    from ..runs.bases import pipeline_part

    if dtype not in DTYPES[1:]:
        raise AdapterError(f"unknown --dtype {dtype!r}; {did_you_mean(dtype, DTYPES[1:])}")
    if base is None:
        raise AdapterError("give the model that the adapter was trained on, in the dtype that it had there: --base")
    check_new(output, force=force, read=[source])
    adapter = load(source)
    recorded: Any = (adapter.metadata.get("base") or {}).get("dtype")
    with waiting("casting"):
        part = pipeline_part(base, recorded if recorded in DTYPES else "auto", adapter.tensors)
        adapter = cast(adapter, model_path(base) if part is None else part, getattr(torch, dtype))
    if name:
        adapter.metadata["name"] = name
    adapter.save(output)
    _print_saved(output, adapter, f", for its base as {dtype}")


def _check_whole(source: Path) -> None:
    from ..files.paths import open_regular
    from ..files.tensorfiles import read_header, whole_file

    with whole_file(source), open_regular(source) as file:
        read_header(file)


def _from_pipeline_lora(source: Path, output: Path, base: str | None, name: str | None, options: dict[str, Any]) -> None:
    if base is None:
        raise DataError(f"{source} is a LoRA for a Diffusers pipeline: give the pipeline, --base, a folder or a hub id")
    from ..checkpoints.extraction import summary
    from ..integrations import diffusers_loras
    from ..integrations.diffusers_sampling import load_pipeline

    diffusers_loras.check(source, **options)
    with waiting("loading the pipeline"):
        pipe = load_pipeline(base, "float32")
    with progress("converting", 100) as update:
        adapter = diffusers_loras.convert(
            source, pipe, name=name, on_progress=lambda share: update(int(100 * share), ""), **options
        )
    adapter.save(output)
    _print_saved(output, adapter, f", {summary(adapter)['kept']:.1%} of ‖ΔW‖")


def _from_patch(source: Path, output: Path, base: str | None, name: str | None) -> None:
    from ..integrations import rl_patches

    with waiting("converting"):
        adapter = rl_patches.load(source, None if base is None else model_path(base))
    if name:
        adapter.metadata["name"] = name
    adapter.save(output)
    checked = "" if adapter.fingerprints else "; without fingerprints, so nothing will tell its base from another (--base)"
    _print_saved(output, adapter, f", exactly as in the patch{checked}")


def _to_patch(source: Path, output: Path, to: str, positions: str | None, base: str | None) -> None:
    from ..adapter import load
    from ..integrations import rl_patches

    adapter = load(source)
    with waiting("converting"):
        rl_patches.save(adapter, output, to, positions=positions, base=base)  # type: ignore[arg-type]  # `save` checks them
    _print_saved(output, adapter)


def _print_saved(output: Path, adapter: "Adapter", more: str = "") -> None:
    files = output.iterdir() if output.is_dir() else [output]
    size = bytes_text(sum(file.stat().st_size for file in files))
    console.print(
        f"{cell(output)}: {adapter.nnz:,} entries in {len(adapter.tensors)} tensors, {size}{more}",
        highlight=False,
        soft_wrap=True,
    )


def _to_peft(source: Path, output: Path, base: str | None, options: dict[str, object]) -> None:
    given = [option for option, value in options.items() if value is not None]
    if given:
        raise AdapterError(f"{given[0]} is for checkpoints of PEFT; leave it out with --to peft")
    if output.suffix == ".safetensors":
        raise CheckpointError(f"PEFT loads a folder, found the name of a file, {output}; use --output {output.with_suffix('')}")
    from ..adapter import load
    from ..integrations import peft

    try:
        adapter = load(source)
    except FormatError as error:
        raise FormatError(f"--to peft takes an adapter's file: {error}") from error
    with waiting("converting"):
        lost = peft.save(adapter, output, base)
    _print_saved(output, adapter)
    if lost:
        console.print(
            f"{lost:,} of them differ in the last bits: PEFT adds differences in float32, which cannot give every value"
        )
