"""Diffusers: the parts of a pipeline that train, and their loss on a batch of pictures.

Every pipeline here denoises latents in one of four ways, which its scheduler names:

    epsilon, v_prediction, sample   x_t = √ᾱ_t · x + √(1 − ᾱ_t) · ε; the UNet of Stable Diffusion 1, 2 and XL
                                    predicts ε, or √ᾱ_t · ε − √(1 − ᾱ_t) · x, or x
    flow                            x_σ = (1 − σ) · x + σ · ε; the transformer of Stable Diffusion 3 and Flux predicts ε − x

A batch holds everything that is drawn at random, so a loss is a function of the weights alone:

    latents, noise  [n, channels, high, wide]
    level           the number of the noise level: of ᾱ, or of σ; int64 [n]
    weight          of each picture in the loss, [n]
    text            what `TrainedComponents.encode` returns, or the captions
    sizes           (height, width, top, left) of each picture (`data.pictures.square`)
"""

import inspect
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..texts import shown
from ..weights.model_tensors import unwrapped
from .diffusers_components import present_in
from .diffusers_copies import check_own_weights

__all__ = ["TrainedComponents"]

DENOISER_CLASSES = {
    "UNet2DConditionModel": "unet",
    "SD3Transformer2DModel": "transformer",
    "FluxTransformer2DModel": "transformer",
}
NOISE = ("epsilon", "v_prediction", "sample")
MOST = 20.0  # the largest weight of a noise level if the picture is predicted
FLUX_GUIDANCE = 3.5  # what Flux's own scripts train with, where a transformer takes guidance as an input


class TrainedComponents(nn.Module):
    """The parts of a pipeline that train, under the names that the pipeline has for them. Called, it computes the loss.

    Parts that torch.compile has wrapped train without the wrapper.
    Raises DataError if it is not known how such a pipeline is trained, or if it lacks a text encoder, a tokenizer or a VAE.
    """

    pipe: Any

    def __init__(self, pipe: Any, *, text_encoders: bool = False, min_snr: float | None = None) -> None:
        super().__init__()
        self.part, self.denoiser = _denoiser(pipe)
        self.config = SimpleNamespace(_name_or_path=str(getattr(pipe, "name_or_path", "") or type(pipe).__name__))
        self.min_snr = min_snr
        self.__dict__["pipe"] = pipe  # not a module, and its parts must not be found twice
        names = [name for name in pipe.components if name.startswith("text_encoder") and getattr(pipe, name) is not None]
        self.trains_text = text_encoders
        for name in (self.part, *(names if text_encoders else ())):
            self.add_module(name, unwrapped(getattr(pipe, name)))
        if self.part == "unet":
            _check_unet(pipe.unet.config, int(pipe.vae.config.latent_channels))
        self.prediction, self.levels, self.times = _schedule(pipe.scheduler, flow=self.part == "transformer")
        if min_snr is not None and self.prediction == "flow":
            raise DataError("min_snr is for pipelines that predict noise; this one matches a flow, leave it out")

    def check_own(self) -> None:
        """Check that the parts compute with weights of their own, and with nothing else.

        Raises DataError for a LoRA or a compiled block; SwitchError for copies of weights (`check_own_weights`).
        """
        check_own_weights(present_in(self.pipe))
        for name, part in self.named_modules():
            if "base_layer" in part._modules:
                raise DataError(f"the pipeline holds a LoRA, found in {shown(name)}; call pipe.unload_lora_weights() first")
            if part is not unwrapped(part):
                raise DataError(
                    f"pipe.{name} is compiled, which is not possible while it trains; train it plain, pipe.{name}._orig_mod, "
                    f"and compile it afterwards, or compile pipe.{name.partition('.')[0]} as a whole"
                )

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def multiple(self) -> int:
        """Sides of pictures must be multiples of this."""
        factor, config = int(self.pipe.vae_scale_factor), getattr(self.pipe, self.part).config
        if self.part == "unet":
            return math.lcm(8, factor * int(2 ** (len(config.block_out_channels) - 1)))  # samples need multiples of 8
        return factor * (2 if self.denoiser.startswith("Flux") else int(config.patch_size))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Noise levels for pictures, int64 [count]: uniform, or with a flow more often in the middle (arXiv 2403.03206)."""
        if self.prediction != "flow":
            return torch.randint(len(self.levels), (count,), generator=generator, device="cpu")
        share = torch.sigmoid(torch.randn(count, generator=generator, device="cpu"))
        return (share * len(self.levels)).long().clamp(max=len(self.levels) - 1)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """Pictures [n, 3, high, wide] from -1 to 1 as the latents that the pipeline denoises, float32."""
        vae = self.pipe.vae
        dtype = next(vae.parameters()).dtype
        whole = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)  # it overflows in float16
        try:
            if whole:
                vae.to(torch.float32)
            found: Any = vae.encode(pixels.to(self.device, torch.float32 if whole else dtype))
        finally:
            if whole:
                vae.to(dtype)
        found = getattr(found, "latent_dist", getattr(found, "latents", found))
        mean: Tensor = found if isinstance(found, Tensor) else found.mode()
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (mean.float() - shift) * float(vae.config.scaling_factor)

    def encode(self, captions: list[str]) -> dict[str, Tensor]:
        """What the pipeline's text encoders say about captions: "embeds" [n, tokens, width], and "pooled" [n, width]."""
        options = {"device": self.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        options |= {"prompt_2": None, "prompt_3": None}
        known = inspect.signature(self.pipe.encode_prompt).parameters
        found = self.pipe.encode_prompt(captions, **{name: value for name, value in options.items() if name in known})
        if len(found) == 2:  # Stable Diffusion 1 and 2: (embeds, those of the negative prompt)
            return {"embeds": found[0]}
        return {"embeds": found[0], "pooled": found[1 if len(found) == 3 else 2]}  # Flux; SDXL and Stable Diffusion 3

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """The weighted loss of a batch: a float32 number."""
        latents, noise = (batch[key].to(self.device, torch.float32) for key in ("latents", "noise"))
        text = batch["text"]
        if self.trains_text:
            text = self.encode(text)
        text = {key: value.to(self.device) for key, value in text.items()}
        level = self.levels.to(self.device)[batch["level"].to(self.device)].view(-1, 1, 1, 1)
        time = self.times.to(self.device)[batch["level"].to(self.device)]
        if self.prediction == "flow":
            noisy, wanted, scale = (1 - level) * latents + level * noise, noise - latents, torch.ones_like(level)
        else:
            signal, spread = level.sqrt(), (1 - level).sqrt()
            noisy = signal * latents + spread * noise
            wanted = {"epsilon": noise, "v_prediction": signal * noise - spread * latents, "sample": latents}[self.prediction]
            scale = self._scale(level)
        found = self._predict(noisy, time, text, batch["sizes"], latents.shape[-2:])
        errors = (found.float() - wanted).square() * scale
        total: Tensor = (errors.mean(dim=(1, 2, 3)) * batch["weight"].to(self.device)).sum()
        return total

    def _scale(self, level: Tensor) -> Tensor:
        """The weight of each noise level in the loss: min(SNR, γ) in units of the prediction (arXiv 2303.09556).

        Without γ it is 1. Where the picture is predicted it is then SNR + 1, which is 1 for v, up to MOST.
        """
        if self.min_snr is None:
            return (1 / (1 - level)).clamp(max=MOST) if self.prediction == "sample" else torch.ones_like(level)
        ratio = level / (1 - level)
        if self.prediction == "epsilon":
            return (self.min_snr / ratio).clamp(max=1)  # also where the ratio is 0
        cut = ratio.clamp(max=self.min_snr)
        return cut if self.prediction == "sample" else cut / (ratio + 1)

    def _predict(self, noisy: Tensor, time: Tensor, text: dict[str, Tensor], sizes: list[Any], shape: Any) -> Tensor:
        """What the denoiser makes of noisy latents."""
        model = getattr(self, self.part)
        dtype = next(model.parameters()).dtype
        noisy, embeds = noisy.to(dtype), text["embeds"].to(dtype)
        if self.denoiser == "UNet2DConditionModel":
            added = None
            if model.config.addition_embed_type == "text_time":
                side = int(shape[0]) * int(self.pipe.vae_scale_factor)
                rows = [[*map(float, size), side, side] for size in sizes]  # SDXL: size before, corner of the crop, size now
                added = {"text_embeds": text["pooled"].to(dtype), "time_ids": torch.tensor(rows).to(self.device, dtype)}
            found: Tensor = model(noisy, time, embeds, added_cond_kwargs=added, return_dict=False)[0]
            return found
        pooled = text["pooled"].to(dtype)
        if self.denoiser == "SD3Transformer2DModel":
            found = model(noisy, embeds, pooled, time, return_dict=False)[0]
            return found
        count, channels, high, wide = noisy.shape
        patches = noisy.view(count, channels, high // 2, 2, wide // 2, 2).permute(0, 2, 4, 1, 3, 5)
        places = torch.zeros(high // 2, wide // 2, 3)
        places[..., 1] += torch.arange(high // 2)[:, None]
        places[..., 2] += torch.arange(wide // 2)
        guidance = torch.full((count,), FLUX_GUIDANCE, device=self.device) if model.config.guidance_embeds else None
        found = model(
            hidden_states=patches.reshape(count, high * wide // 4, channels * 4),
            timestep=time.to(dtype) / 1000,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3).to(self.device, dtype),
            img_ids=places.view(-1, 3).to(self.device, dtype),
            return_dict=False,
        )[0]
        found = found.view(count, high // 2, wide // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return found.reshape(count, channels, high, wide)


def _denoiser(pipe: Any) -> tuple[str, str]:
    """The name of a pipeline's denoiser, and its class."""
    for name in ("unet", "transformer"):
        model = getattr(pipe, name, None)
        if model is None:
            continue
        kind = type(unwrapped(model)).__name__
        if DENOISER_CLASSES.get(kind) != name:
            raise DataError(f"the {name} of this pipeline is a {kind}; train-image knows {', '.join(DENOISER_CLASSES)}")
        needed = ["vae", "scheduler", *(each for each in pipe.components if each.startswith(("text_encoder", "tokenizer")))]
        missing = [each for each in needed if getattr(pipe, each, None) is None and not _may_lack(pipe, each)]
        if missing or not hasattr(pipe, "encode_prompt"):
            raise DataError(
                f"{type(pipe).__name__} has no {' and no '.join(missing) or 'text encoder'}; it cannot be trained; load the "
                "pipeline with all of its parts"
            )
        return name, kind
    raise DataError(f"{type(pipe).__name__} has neither a unet nor a transformer; train-image needs a text-to-image pipeline")


def _may_lack(pipe: Any, name: str) -> bool:
    """Whether such a pipeline reads its captions without this part: SDXL without the first of two encoders, SD3 without T5."""
    if hasattr(pipe, "transformer"):
        return name.endswith("_3") and pipe.text_encoder_3 is None
    first = name in ("text_encoder", "tokenizer") and pipe.text_encoder is pipe.tokenizer is None
    return first and getattr(pipe, "text_encoder_2", None) is not None


def _check_unet(config: Any, channels: int) -> None:
    if config.in_channels != channels:
        raise DataError(
            f"the unet takes {config.in_channels} channels and the VAE makes {channels}: it is for another task (such as "
            "inpainting); take a text-to-image pipeline"
        )
    wanted = {"class_embed_type": (None,), "addition_embed_type": (None, "text_time"), "encoder_hid_dim_type": (None,)}
    wanted |= {"time_cond_proj_dim": (None,)}
    for name, known in wanted.items():
        if (found := getattr(config, name, None)) not in known:
            raise DataError(f"the unet takes an input that train-image does not know: {name}={found!r}")


def _schedule(scheduler: Any, flow: bool) -> tuple[str, Tensor, Tensor]:
    """The prediction, and for each noise level its ᾱ or σ, and the time that the model is told; float32 and int64 or float32.

    Raises DataError for a prediction that is not known.
    """
    import diffusers

    if flow:
        if not type(scheduler).__name__.startswith("FlowMatch"):
            raise DataError(f"a transformer is trained by flow matching; the scheduler is a {type(scheduler).__name__}")
        fresh = type(scheduler).from_config(scheduler.config)  # sampling changes the tables of a scheduler
        return "flow", fresh.sigmas[: len(fresh.timesteps)].float().cpu(), fresh.timesteps.float().cpu()
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction not in NOISE:
        raise DataError(f"the scheduler's prediction type is {prediction!r}; known: {', '.join(NOISE)}")
    if not hasattr(scheduler, "alphas_cumprod"):
        raise DataError(f"{type(scheduler).__name__} has no noise levels that train-image knows (alphas_cumprod)")
    noise = diffusers.DDPMScheduler.from_config(scheduler.config)
    return prediction, noise.alphas_cumprod.float().cpu(), torch.arange(len(noise.alphas_cumprod))
