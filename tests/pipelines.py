"""Tiny random pipelines of Diffusers, and pictures to train them on."""

import copy
import functools

import diffusers
import torch
from PIL import Image
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import shira
from conftest import all_bits, bits, letter_tokenizer

SIDE = 32  # of pictures; latents have half of it


def tokenizer():
    made = letter_tokenizer()
    made.model_max_length = 12
    return made


def clip(kind=CLIPTextModelWithProjection):
    config = CLIPTextConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=16,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    return kind(config).eval()


def vae(**more):
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
        **more,
    ).eval()


def unet(width=16, channels=4, layers=1, **more):
    return diffusers.UNet2DConditionModel(
        sample_size=SIDE // 2,
        in_channels=channels,
        out_channels=4,
        layers_per_block=layers,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=2,
        **more,
    ).eval()


def stable_diffusion(prediction="epsilon", seed=0, **more):
    """A copy, which takes a tenth of the time that a new one takes."""
    made = copy.deepcopy(new_stable_diffusion(prediction, seed, **more))
    torch.manual_seed(seed)
    return made


@functools.cache
def new_stable_diffusion(prediction, seed, **more):
    torch.manual_seed(seed)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(CLIPTextModel),
        tokenizer=tokenizer(),
        unet=unet(**more),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl():
    torch.manual_seed(0)
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(force_upcast=True),
        text_encoder=clip(CLIPTextModel),
        text_encoder_2=clip(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet(
            width=32, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64
        ),
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def t5(width):
    return T5EncoderModel(T5Config(vocab_size=97, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def sd3():
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        text_encoder_2=clip(),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5(32),
        tokenizer_3=tokenizer(),
    )


def flux():
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    made = diffusers.FluxPipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip(CLIPTextModel),
        tokenizer=tokenizer(),
        text_encoder_2=t5(32),
        tokenizer_2=tokenizer(),
    )
    made.encode_prompt = functools.partial(made.encode_prompt, max_sequence_length=12)  # 512 tokens take a minute
    return made


PIPELINES = {
    "epsilon": stable_diffusion,
    "v_prediction": lambda: stable_diffusion("v_prediction"),
    "sample": lambda: stable_diffusion("sample"),
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
}


PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "vae")


def picture(pipe, steps=2, **options):
    """The pixels of an image, from the same noise each time."""
    pipe.set_progress_bar_config(disable=True)
    options |= {"height": 16, "width": 16, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    return bits(pipe("a dog", num_inference_steps=steps, **options).images)


def pipe_bits(pipe):
    """The bits of all components, each name with the component in front."""
    parts = [part for part in PARTS if isinstance(getattr(pipe, part, None), nn.Module)]
    return {f"{part}.{name}": value for part in parts for name, value in all_bits(getattr(pipe, part)).items()}


def pipe_adapter(pipe, seed, components=("unet", "transformer", "text_encoder"), share=0.1, kind="overwrite"):
    """Random positions and values in every matrix and convolution of some components, named with the component in front."""
    generator = torch.Generator().manual_seed(seed)
    tensors, prints = {}, {}
    for component in components:
        for name, weight in (getattr(pipe, component, None) or nn.Module()).named_parameters():
            if weight.ndim > 1:
                chosen = (torch.rand(weight.numel(), generator=generator) < share).nonzero().view(-1)
                old = weight.detach().reshape(-1)[chosen]
                values = old + 0.3 * torch.randn(len(chosen), generator=generator).to(old.dtype)
                tensors[f"{component}.{name}"] = shira.SparseTensor(tuple(weight.shape), chosen, values, kind)
                prints[f"{component}.{name}"] = shira.sparse.tensor.fingerprint(old)
    return shira.Adapter(tensors, {"name": f"random{seed}", "fingerprints": prints})


def folder_with_pictures(folder):
    """Write folders: two pictures of different shape, captions beside them, and one picture of a class."""
    for name, colors in {"dog": ["red", "blue"], "one": ["red"], "class": ["green"]}.items():
        (folder / name).mkdir()
        for number, color in enumerate(colors):
            image = Image.new("RGB", (40 + 9 * number, 36), color)
            image.paste("yellow", (5, 5, 20, 15))
            image.save(folder / name / f"{color}.png")
            (folder / name / f"{color}.txt").write_text(f"a {color} dog\n")
