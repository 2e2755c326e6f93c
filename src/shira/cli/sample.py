"""shira sample: make pictures with a Diffusers pipeline and adapters."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import DataError
from ..texts import shown
from .adapters import given_adapters
from .options import Density, Drop, Dtype, MethodName, Seed, method_options
from .output import cell, console, progress, waiting

__all__ = ["sample"]

LARGEST_SEED = 2**64 - 1  # of a torch.Generator


def sample(
    pipe: Annotated[str, typer.Option("--pipe", help="A folder of a Diffusers pipeline, or a hub id.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="One row of the grid. May be given more than once.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", "-a", help='FILE or FILE=STRENGTH, a number or JSON: {"unet": {"down": 0.5}}.', show_default=False
        ),
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(help="Factors on all strengths, with commas: 0,0.5,1,1.25. One column each.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="One column for each seed.", show_default="4, or 1 with --sweep", min=1)
    ] = None,
    first_seed: Annotated[int, typer.Option(help="The first of the seeds.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="The number of denoising steps.", min=1)] = 30,
    guidance: Annotated[float | None, typer.Option(help="The guidance.", show_default="the pipeline's own", min=0)] = None,
    resolution: Annotated[
        int | None, typer.Option(help="The side in pixels.", show_default="the pipeline's own", min=8)
    ] = None,
    in_turn: Annotated[
        bool, typer.Option("--in-turn", help="Each step has another of the adapters, the last one the mean of all.")
    ] = False,
    method: MethodName = "sum",
    density: Density = None,
    drop: Drop = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    output: Annotated[Path, typer.Option("--output", "-o", help="The grid's file.")] = Path("grid.png"),
) -> None:
    """Make a labelled grid of pictures: one row for each prompt, one column for each seed or strength.

    Example: shira sample --pipe pipeline -a bluefire.safetensors -a paintings.safetensors=0.5 -p tiger -p dog --seeds 4
    """
    from ..adapter import load
    from ..data.grids import check_ending, grid
    from ..data.pictures import check_caption, check_pillow
    from ..fusion.strengths import finite_number
    from ..integrations.diffusers import PipelineAdapters

    if guidance is not None:
        finite_number("--guidance", guidance)
    for text in prompt:
        check_caption("--prompt", text)
    options = method_options(method, density=density, drop=drop, seed=seed)
    strengths = given_adapters(adapter or [])
    if in_turn and (len(strengths) < 2 or method != "sum"):
        found = f"--method {method}" if method != "sum" else f"{len(strengths)} of them"
        raise DataError(f"--in-turn is for two adapters or more, -a FILE -a FILE, and for no --method; found {found}")
    factors = _factors(sweep)
    selections = [
        {path: _times(f"the strength of {shown(path)}", strength, factor) for path, strength in strengths.items()}
        for factor in factors
    ]
    numbers = [first_seed + number for number in range(seeds or (1 if sweep is not None else 4))]
    if numbers[-1] > LARGEST_SEED:
        raise DataError(
            f"--first-seed must be at most {LARGEST_SEED + 1 - len(numbers)}, found {first_seed}; take a smaller one"
        )
    for path in strengths:
        load(path)  # what is wrong with it should be known before a pipeline is loaded
    if sweep is not None and not strengths:
        raise DataError("--sweep needs an adapter: give -a FILE")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.parent} to save the grid in; make it first")
    check_pillow()
    check_ending(output)
    from ..integrations import diffusers_sampling as sampling

    with waiting("loading the pipeline"):
        loaded = sampling.load_pipeline(pipe, dtype)
        sampling.to_the_accelerator(loaded)
    adapters = PipelineAdapters(loaded)
    for path in strengths:
        adapters.load(path, path)
    asked: dict[str, Any] = {"steps": steps, "guidance": guidance, "resolution": resolution}
    columns: dict[str, list[Any]] = {}
    done = 0
    with progress("making pictures", len(factors) * len(numbers) * len(prompt)) as update:
        for factor, selection in zip(factors, selections, strict=True):
            if not in_turn:
                adapters.set(selection, method=method, **options)
            with adapters.in_turn(selection) if in_turn else contextlib.nullcontext() as at_step_end:
                for number in numbers:
                    images = []
                    for text in prompt:
                        images.append(sampling.sample(loaded, text, number, at_step_end=at_step_end, **asked))
                        done += 1
                        update(done)
                    label = [f"x {factor:g}"] * (sweep is not None) + [f"seed {number}"] * (sweep is None or len(numbers) > 1)
                    columns[", ".join(label)] = images
    adapters.disable()
    grid(list(zip(*columns.values(), strict=True)), prompt, list(columns)).save(output)
    console.print(f"{cell(output)}: {len(prompt)} x {len(columns)} pictures", highlight=False)


def _factors(sweep: str | None) -> list[float]:
    """The factors of --sweep, each once. Raises typer.BadParameter if they are not numbers."""
    try:
        return list(dict.fromkeys(float(part) for part in sweep.split(","))) if sweep is not None else [1.0]
    except ValueError:
        raise typer.BadParameter(f"found {sweep!r}; expected numbers with commas, 0,0.5,1", param_hint="--sweep") from None


def _times(what: str, strength: Any, factor: float) -> Any:
    """A strength as `PipelineAdapters.set` takes it, times a factor. What is not named has 1.0, so it is named.

    what: its name in messages. Raises AdapterError unless all in it are finite numbers.
    """
    from ..fusion.strengths import finite_number

    if isinstance(strength, Mapping):
        return {"*": factor} | {part: _times(f"{what} in {shown(part)}", value, factor) for part, value in strength.items()}
    if isinstance(strength, list):
        return [_times(what, value, factor) for value in strength]
    return finite_number(what, finite_number(what, strength) * factor)
