"""A recipe that trains one adapter on pictures. `shira train-image` saves the one that reproduces its run."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import DataError
from .options import check, option, parse_targets, passed_to
from .recipes import check_paths, recipe_of, save_recipe
from .shared_options import Dtype, Masked, Run, attach_options, check_mask

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..integrations.diffusion_losses import TrainedComponents

__all__ = ["DENSITY", "ImageRecipe", "check_image_run", "load_image_recipe", "name_of", "save_image_recipe", "train_image"]

DENSITY = 0.02  # the paper's for image models
STYLES = "(?i).*(attn|attention[.]|conv(?!_in|_out)).*"  # attention and convolutions, but not those from and to four channels
SHOWN = 4  # captions that are sampled if no prompt is given

OnSample = Callable[[str, list[str], list[Any]], None]


@dataclasses.dataclass(frozen=True)
class _Pictures:
    """The pipeline, and the pictures that it learns from."""

    pipeline: str = option("", "A folder of a Diffusers pipeline, or a hub id.")
    data: str = option(
        "", "A folder of pictures, with captions in metadata.jsonl or in NAME.txt beside NAME.png.", group="Data"
    )
    prompt: str | None = option(None, "One caption for all pictures (DreamBooth: a photo of sks dog).")
    class_prompt: str | None = option(None, "Prior preservation: a caption of the whole class (a photo of a dog).")
    class_data: str | None = option(None, "Pictures of the class. The folder is filled with what the pipeline makes.")
    class_count: int = option(100, "With --class-prompt, the number of class pictures.", ge=1)
    prior_weight: float = option(1.0, "The weight of the class in the loss.", ge=0)
    resolution: int | None = option(None, "The side of the square pictures, in pixels.", usual="the pipeline's own", ge=8)
    crop: Literal["center", "random"] = option("center", "Where longer sides are cropped; random keeps no latents.")
    flip: bool = option(False, "Half of the pictures are mirrored.")
    drop_captions: float = option(0.0, "This share of the captions is left empty, as guidance needs.", ge=0, le=1)


@dataclasses.dataclass(frozen=True)
class _Training:
    """What only image models have."""

    calibration: int = option(32, "The number of pictures for masks that need gradients or activations.", ge=1)
    train_text_encoder: bool = option(False, "The text encoders train, too.", group="Training")
    min_snr: float | None = option(None, "Noise levels weigh at most this in the loss (min-SNR, often 5).", gt=0)
    checkpointing: bool = option(False, "Gradient checkpointing: less memory, more time.")
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "Computes in this precision, over weights in --dtype.")
    lr: float = option(1e-4, "The learning rate.", gt=0)
    steps: int = option(500, "The number of optimizer steps.", "trainer", ge=1)
    batch_size: int = option(4, "The number of pictures a batch. Those of the class come on top.", "trainer", ge=1)


@dataclasses.dataclass(frozen=True)
class ImageRecipe(Run, _Training, Masked, _Pictures):  # dataclasses take their fields from the last to the first
    """The settings of `shira train-image`, on the command line or in a YAML file. Each option is defined once."""

    density: float | None = option(None, "Share of each target's entries that train.", "attach", usual=str(DENSITY), gt=0, le=1)
    targets: str | list[str] = option(
        STYLES,
        "Names with commas, all-linear, attention, auto, or a regular expression. Attention and convolutions by default.",
        "attach",
        parse=parse_targets,
    )
    schedule: str = option("linear", "The learning rate schedule of Diffusers: linear, cosine and others.", "trainer")
    dtype: Dtype = option("auto", "The pipeline's dtype. auto: float32.")
    sample_every: int = option(0, "Sample pictures are made each time after this many steps (0: at the end).", ge=0)
    sample_prompt: list[str] | None = option(None, "What the samples show. May be given more than once.", usual="captions")
    sample_steps: int = option(30, "The number of denoising steps of a sample.", ge=1)
    guidance: float | None = option(None, "The guidance of samples.", usual="the pipeline's own", ge=0)

    def __post_init__(self) -> None:
        check(self)
        if self.class_prompt is None and (self.class_data is not None or self.prior_weight != 1.0):
            raise DataError("recipe: class_data and prior_weight need a class_prompt, such as 'a photo of a dog'")


def load_image_recipe(path: str | Path | None, given: Mapping[str, Any]) -> ImageRecipe:
    """A recipe from a YAML file (or none) and from settings given beside it, which win.

    Raises DataError for what is not a recipe, or if pipeline or data are missing; OSError if the file cannot be read.
    """
    recipe = recipe_of(ImageRecipe, path, given)
    if not recipe.pipeline:
        raise DataError("no pipeline to train: give a folder of a Diffusers pipeline, or a hub id")
    if not recipe.data:
        raise DataError("no pictures to train on: give --data, a folder of pictures")
    if path is not None and "data" not in given:
        check_paths(path, {"data": recipe.data})
    return recipe


def save_image_recipe(recipe: ImageRecipe, path: str | Path) -> None:
    """Write a recipe as YAML. A comment gives the versions of shira, torch and diffusers."""
    from ..integrations import diffusers_sampling as sampling

    save_recipe(recipe, path, f"diffusers {sampling.version()}")


def check_image_run(recipe: ImageRecipe) -> None:
    """Check everything that needs no pipeline, before one is loaded: raise what `train_image` would raise later."""
    from ..data.pictures import check_pillow, pictures_in
    from ..integrations import diffusers_sampling as sampling
    from ..integrations import diffusers_training as training

    check_mask(recipe)
    _check_class(recipe)
    check_pillow()
    pictures_in(recipe.data, recipe.prompt)
    sampling.version()
    training.check_schedule(recipe.schedule)


def _check_class(recipe: ImageRecipe) -> None:
    """Raise DataError if pictures of the class would be made among those that train, or where a file is."""
    if recipe.class_data is not None and Path(recipe.class_data).exists() and not Path(recipe.class_data).is_dir():
        raise DataError(f"class_data must be a folder of pictures, found the file {recipe.class_data}")
    if recipe.class_data is not None and Path(recipe.class_data).resolve() == Path(recipe.data).resolve():
        raise DataError(
            f"class_data must be another folder than data, found {recipe.class_data} for both: pictures of the class would be "
            "made among those that train; give a folder of its own"
        )


def train_image(
    recipe: ImageRecipe,
    pipe: Any,
    *,
    on_class: Callable[[int, int], None] | None = None,
    on_picture: Callable[[int, int], None] | None = None,
    on_calibration: Callable[[int, int], None] | None = None,
    on_step: Callable[[int, float, float], None] | None = None,
    on_sample: OnSample | None = None,
    save_every: int = 0,
    save_folder: Path | None = None,
) -> "Adapter":
    """Train one adapter on a pipeline as the recipe says. The pipeline is restored bit for bit, also after an error.

    The adapter's tensors have the pipeline's names before their own: "unet.conv_in.weight". The pipeline stays on the device
    that Accelerate has chosen.
    Callbacks: on_class(done, total) after each picture of the class that is made; on_picture(done, total) after each picture
    that is read; on_calibration(done, total) after each batch of a calibration; on_step(step, loss, pictures per second) after
    each step; on_sample(title, prompts, images) for the base, each time samples are made, and at the end.
    save_every, save_folder: as in `diffusers_training.train`.
    Raises DataError for pictures, a pipeline or settings that cannot be used; SwitchError if a part of the pipeline computes
    with copies of its weights, as after `enable_sequential_cpu_offload`; and what `shira.attach` raises.
    """
    from ..data.pictures import image_of, pictures_in
    from ..integrations import diffusers_sampling as sampling
    from ..integrations import diffusers_training as training
    from ..integrations.diffusion_losses import TrainedComponents
    from ..training.tuning import attach
    from .live import warn_if_mixed_is_slow

    _check_class(recipe)
    warn_if_mixed_is_slow(recipe.mixed_precision)
    parts = TrainedComponents(pipe, text_encoders=recipe.train_text_encoder, min_snr=recipe.min_snr)
    parts.check_own()
    avoided = _avoided(recipe, parts)
    pictures = pictures_in(recipe.data, recipe.prompt)
    accelerator = training.accelerator_for(recipe.mixed_precision, recipe.accumulate, unused=recipe.train_text_encoder)
    pipe.to(accelerator.device)
    resolution = recipe.resolution or _own_resolution(pipe, parts)
    training.check_resolution(parts, resolution)
    shape: dict[str, Any] = {"steps": recipe.sample_steps, "guidance": recipe.guidance, "resolution": resolution}
    prompts = recipe.sample_prompt or list(dict.fromkeys(picture.caption for picture in pictures))[:SHOWN]

    def show(title: str) -> None:
        if on_sample is not None and accelerator.is_main_process:
            on_sample(title, prompts, [sampling.sample(pipe, prompt, recipe.seed, **shape) for prompt in prompts])

    def show_if_due(step: int) -> None:
        if recipe.sample_every and step % recipe.sample_every == 0 and step < recipe.steps:
            show(f"step {step}")

    priors = []
    if recipe.class_prompt is not None:
        for picture in pictures:
            image_of(picture)  # finds broken files before pictures of the class are made
        with accelerator.main_process_first():
            priors = training.class_pictures(
                pipe, recipe.class_prompt, recipe.class_data, recipe.class_count, on_picture=on_class, **shape
            )
    examples = training.Examples(
        parts,
        pictures,
        priors,
        resolution=resolution,
        crop=recipe.crop,
        flip=recipe.flip,
        drop_captions=recipe.drop_captions,
        prior_weight=recipe.prior_weight,
        on_picture=on_picture,
    )
    show("base")
    calibration = itertools.islice(
        examples.batches(recipe.batch_size, recipe.seed), -(-recipe.calibration // recipe.batch_size)
    )
    budget = {} if recipe.density or recipe.rank or recipe.total else {"density": DENSITY}
    with training.training_mode(parts, recipe.checkpointing):
        tuner = attach(
            parts,
            loss_fn=lambda model, batch: model(batch),
            progress=on_calibration,
            **attach_options(recipe, calibration=calibration, avoid=avoided, **budget),
        )
        with tuner:
            summary = training.train(
                tuner,
                parts,
                lambda start: examples.batches(
                    recipe.batch_size, recipe.seed, accelerator.process_index, accelerator.num_processes, start=start
                ),
                accelerator,
                learning_rate=recipe.lr,
                on_step=on_step,
                after_step=show_if_due,
                save_every=save_every,
                save_folder=save_folder,
                **passed_to("trainer", recipe),
            )
            show(f"step {recipe.steps}")
            what = {"data": Path(recipe.data).name, "pictures": len(pictures), "resolution": resolution}
            what |= {"prompt": recipe.prompt} if recipe.prompt is not None else {}
            what |= {"class_prompt": recipe.class_prompt, "class_pictures": len(priors)} if priors else {}
            return tuner.adapter(name_of(recipe), training=what | summary, license=recipe.license)


def _avoided(recipe: ImageRecipe, parts: "TrainedComponents") -> list[Any]:
    """The adapters to avoid, without what they change in text encoders that do not train.

    Raises DataError if `start` changes one of these: its entries would not train.
    """
    from ..adapter import Adapter, load, opened

    def trains(tensor: str) -> bool:
        component = tensor.partition(".")[0]
        return component in parts._modules or component not in parts.pipe.components

    if recipe.start is not None:
        with opened(recipe.start) as start:
            if (still := next((tensor for tensor in start.tensors if not trains(tensor)), None)) is not None:
                raise DataError(
                    f"{recipe.start} changes {still.partition('.')[0]}, which does not train here; give --train-text-encoder "
                    "(train_text_encoder in a recipe)"
                )
    found: list[Any] = []
    for file in recipe.avoid or ():
        adapter = load(file)
        held = {name: tensor for name, tensor in adapter.tensors.items() if trains(name)}
        label = {"name": adapter.name or Path(file).name}
        if held:
            found.append(file if len(held) == len(adapter.tensors) else Adapter(held, label))
    return found


def name_of(recipe: ImageRecipe) -> str:
    """The name of the recipe's adapter, which is that of the folder with the pictures if it has none."""
    return recipe.name or Path(recipe.data).resolve().name


def _own_resolution(pipe: Any, parts: "TrainedComponents") -> int:
    """The side that the pipeline makes by itself."""
    own = getattr(pipe, "default_sample_size", None) or getattr(pipe, parts.part).config.sample_size
    return int(own if isinstance(own, int) else min(own)) * int(pipe.vae_scale_factor)
