"""`shira train-image` and `shira sample`, on tiny random pipelines."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("PIL")

import diffusers
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import shira
from conftest import all_bits, letter_tokenizer, same_bits
from shira import DataError
from shira.cli.options import fields_of
from shira.data.grids import grid
from shira.data.pictures import Picture, pictures_in, square
from shira.integrations.diffusers_sampling import load_pipeline, modules_of, sample
from shira.integrations.diffusers_training import Examples, accelerator_for, train
from shira.integrations.diffusion_losses import Parts
from shira.runs.image_recipes import ImageRecipe, check_image_run, load_image_recipe, train_image

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Diffusers' Euler with NumPy 2.4
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


def unet(width=16, channels=4, **more):
    return diffusers.UNet2DConditionModel(
        sample_size=SIDE // 2,
        in_channels=channels,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=2,
        **more,
    ).eval()


def stable_diffusion(prediction="epsilon", **more):
    torch.manual_seed(0)
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


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with two pictures of different shape, captions beside them, and one picture of a class."""
    monkeypatch.chdir(tmp_path)
    for name, colors in {"dog": ["red", "blue"], "one": ["red"], "class": ["green"]}.items():
        (tmp_path / name).mkdir()
        for number, color in enumerate(colors):
            image = Image.new("RGB", (40 + 9 * number, 36), color)
            image.paste("yellow", (5, 5, 20, 15))
            image.save(tmp_path / name / f"{color}.png")
            (tmp_path / name / f"{color}.txt").write_text(f"a {color} dog\n")
    return tmp_path


def overfit(**more):
    settings = {"pipeline": "-", "data": "one", "steps": 30, "lr": 0.01, "density": 0.2, "schedule": "constant"}
    return ImageRecipe(**(settings | {"batch_size": 4, "sample_steps": 2, "guidance": 2.0} | more))


def loss_of(pipe, recipe, resolution=SIDE):
    """The mean loss over fixed noise."""
    parts = Parts(pipe)
    with torch.no_grad():
        batches = Examples(parts, pictures_in(recipe.data), resolution=resolution).batches(16, seed=99)
        return sum(float(parts(next(batches))) for _ in range(4)) / 4


@pytest.mark.parametrize("name", PIPELINES)
def test_training_on_one_picture(folder, name):
    """The loss falls, the base comes back bit for bit, and the adapter's file gives the picture of the end of training."""
    pipe, shown, losses = PIPELINES[name](), {}, []
    before, loss_before, recipe = (
        all_bits(modules_of(pipe)),
        0.0,
        overfit(sample_every=20, resolution=SIDE if name == "flux" else None),
    )
    loss_before = loss_of(pipe, recipe)
    adapter = train_image(
        recipe,
        pipe,
        on_step=lambda step, loss, speed: losses.append(loss),
        on_sample=lambda title, prompts, images: shown.update({title: images[0].tobytes()}),
    )
    assert same_bits(before, all_bits(modules_of(pipe)))
    assert list(shown) == ["base", "step 20", "step 30"] and len(set(shown.values())) == 3 and len(losses) == 30
    part = "transformer" if name in ("sd3", "flux") else "unet"
    assert all(each.startswith(f"{part}.") for each in adapter.tensors)
    assert adapter.fingerprints.keys() == adapter.tensors.keys()
    assert any("attn" in each for each in adapter.tensors)
    assert any("conv" in each for each in adapter.tensors) == (part == "unet")
    adapter.save("a.safetensors")
    switcher = shira.Switcher(modules_of(pipe))
    switcher.add("a", "a.safetensors")
    with switcher.using("a"):
        assert loss_of(pipe, recipe) < 0.95 * loss_before
        image = sample(pipe, "a red dog", 0, steps=2, guidance=2.0, resolution=SIDE)
    assert image.tobytes() == shown["step 30"]
    summary = adapter.metadata["training"]
    assert summary["prediction"] == ("flow" if part == "transformer" else "epsilon" if name == "sdxl" else name)
    assert (summary["data"], summary["pictures"], summary["resolution"]) == ("one", 1, SIDE)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_that_of_a_perfect_prediction(folder, name):
    """A denoiser that knows the noise has no loss; min-SNR weighs an error of 1 as the paper says."""
    pipe = PIPELINES[name]()
    for cut in (None, 5.0):
        parts = Parts(pipe, min_snr=cut)
        batch = next(Examples(parts, pictures_in("dog"), resolution=SIDE).batches(3, seed=1))
        wrong = torch.zeros(())

        def perfect(noisy, time, text, sizes, shape, parts=parts, batch=batch, wrong=wrong):
            signal = parts.levels[time].sqrt().view(-1, 1, 1, 1)
            spread = (1 - signal**2).sqrt()
            torch.testing.assert_close(noisy, signal * batch["latents"] + spread * batch["noise"])
            noise, latents = batch["noise"], batch["latents"]
            right = {"epsilon": noise, "v_prediction": signal * noise - spread * latents, "sample": latents}[name]
            return right + wrong

        parts._predict = perfect
        assert float(parts(batch)) < 1e-10
        wrong += 1
        level = parts.levels[batch["level"]]
        snr = level / (1 - level)
        cuts = snr.clamp(max=5)
        scale = {"epsilon": cuts / snr, "v_prediction": cuts / (snr + 1), "sample": cuts}[name] if cut else torch.ones(3)
        torch.testing.assert_close(parts(batch), scale.mean())


def test_flow_goes_from_picture_to_noise():
    parts = Parts(sd3())
    assert parts.levels[0] == 1 and parts.times[0] == 1000 and parts.levels[-1] < 0.01
    level = parts.draw(1000, torch.Generator().manual_seed(0))
    assert level.min() >= 0 and level.max() < 1000 and 400 < level.float().mean() < 600
    with pytest.raises(DataError, match="min_snr is for pipelines that predict noise"):
        Parts(sd3(), min_snr=5.0)


def test_text_encoders_train_when_asked(folder):
    pipe = stable_diffusion()
    before = all_bits(modules_of(pipe))
    adapter = train_image(overfit(steps=3, train_text_encoder=True, checkpointing=True), pipe)
    assert {name.partition(".")[0] for name in adapter.tensors} == {"unet", "text_encoder"}
    weights = dict(modules_of(pipe).named_parameters())
    for part in ("unet", "text_encoder"):
        moved = [t.values - weights[n].detach().view(-1)[t.indices] for n, t in adapter.tensors.items() if n.startswith(part)]
        assert torch.cat(moved).abs().max() > 0.01
    assert same_bits(before, all_bits(modules_of(pipe)))
    assert not pipe.unet.is_gradient_checkpointing and not pipe.unet.training and not pipe.text_encoder.training


def test_checkpointing_changes_nothing(folder):
    plain = train_image(overfit(steps=2), stable_diffusion())
    other = train_image(overfit(steps=2, checkpointing=True), stable_diffusion())
    for name, tensor in plain.tensors.items():
        torch.testing.assert_close(tensor.values, other.tensors[name].values)


def test_two_batches_a_step(folder):
    """The gradient of a step is the mean over its batches."""
    pipe = stable_diffusion()
    parts = Parts(pipe)
    examples = Examples(parts, pictures_in("dog"), resolution=SIDE)
    found = {}
    for size, accumulate in ((4, 1), (2, 2)):
        batch = next(examples.batches(4, seed=0))
        halves = [{key: _part(value, half) for key, value in batch.items()} for half in (slice(0, 2), slice(2, 4))]
        for half in halves:
            half["weight"] = half["weight"] * 2
        with shira.attach(parts, targets=["conv_shortcut"], density=0.2) as tuner:
            given, accelerator = iter([batch] if accumulate == 1 else halves), accelerator_for("no", accumulate)
            losses = []
            options = {"batch_size": size, "accumulate": accumulate, "learning_rate": 0.01, "steps": 1}
            train(tuner, parts, given, accelerator, on_step=lambda *step, to=losses: to.append(step), **options)
            found[accumulate] = (losses[0][1], torch.cat([each.detach().clone() for each in tuner.parameters()]))
    torch.testing.assert_close(found[1], found[2], rtol=1e-4, atol=1e-5)


def _part(value, half):
    return {key: each[half] for key, each in value.items()} if isinstance(value, dict) else value[half]


@pytest.mark.parametrize("name", ["epsilon", "sdxl", "sd3", "flux"])
def test_the_denoiser_is_called_as_the_pipeline_calls_it(name):
    pipe, calls = PIPELINES[name](), []
    parts = Parts(pipe)
    model = getattr(pipe, parts.part)
    hook = model.register_forward_hook(lambda _, args, options, out: calls.append((args, options, out[0])), with_kwargs=True)
    sample(pipe, "a dog", 0, steps=2, guidance=3.5 if name == "flux" else 1.0, resolution=SIDE)
    hook.remove()
    for args, options, out in calls:
        noisy = args[0] if args else options["hidden_states"]
        time = torch.as_tensor(args[1] if args else options["timestep"]).view(-1)
        text = {"embeds": options["encoder_hidden_states"]}
        if name == "sdxl":
            text["pooled"] = options["added_cond_kwargs"]["text_embeds"]
        elif name != "epsilon":
            text["pooled"] = options["pooled_projections"]
        if name == "flux":
            noisy, out = (pipe._unpack_latents(each, SIDE, SIDE, pipe.vae_scale_factor) for each in (noisy, out))
            time = time * 1000
        with torch.no_grad():
            found = parts._predict(noisy, time, text, [(SIDE, SIDE, 0, 0)], noisy.shape[-2:])
        torch.testing.assert_close(found, out, rtol=1e-4, atol=1e-5)
        if name != "flux":
            torch.testing.assert_close(parts.encode(["a dog"]), text, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2


@pytest.mark.parametrize("mask", ["snip", "rand", "struct", "grad"])
def test_masks(folder, mask):
    adapter = train_image(overfit(steps=2, mask=mask, density=0.5 if mask == "struct" else None), stable_diffusion())
    assert adapter.metadata["mask"]["name"] == mask
    density = 0.5 if mask == "struct" else 0.02  # struct is for larger matrices, and here makes fewer entries
    assert adapter.metadata["mask"]["density"] == density
    assert adapter.density == pytest.approx(density, rel=0.25)


@pytest.mark.parametrize("precision", ["bf16", "weights"])
def test_bfloat16(folder, precision):
    """By Accelerate over float32 weights, or with weights in bfloat16 and masters in float32."""
    pipe = stable_diffusion()
    if precision == "weights":
        pipe.to(torch.bfloat16)
    before = all_bits(modules_of(pipe))
    adapter = train_image(overfit(steps=3, mixed_precision="bf16" if precision == "bf16" else "no"), pipe)
    assert same_bits(before, all_bits(modules_of(pipe)))
    assert adapter.metadata["base"]["dtype"] == ("float32" if precision == "bf16" else "bfloat16")


def test_prior_preservation_takes_pictures_of_the_class(folder):
    pipe, shown = stable_diffusion(), []
    recipe = overfit(prompt="a photo of sks dog", class_prompt="a dog", class_data="class", class_count=3, prior_weight=0.5)
    priors = [Picture("class/green.png", "a dog")]
    parts = Parts(pipe)
    parts.trains_text = True  # a batch then has the captions themselves
    examples = Examples(parts, pictures_in("one", recipe.prompt), priors, resolution=SIDE, prior_weight=0.5)
    batch = next(examples.batches(2, seed=0))
    assert batch["text"] == ["a photo of sks dog"] * 2 + ["a dog"] * 2
    assert batch["weight"].tolist() == [0.5, 0.5, 0.25, 0.25]
    green = parts.latents(square(priors[0], SIDE, "center", torch.Generator())[0][None])[0]
    assert torch.equal(batch["latents"][3], green) and not torch.equal(batch["latents"][1], green)

    (folder / "class/green.txt").unlink()  # they need no captions
    adapter = train_image(recipe, pipe, on_class=lambda done, total: shown.append((done, total)))
    assert shown == [(2, 3), (3, 3)]  # one was there
    assert sorted(path.name for path in (folder / "class").iterdir()) == ["class-00001.png", "class-00002.png", "green.png"]
    assert adapter.metadata["training"]["class_pictures"] == 3
    shown.clear()
    train_image(recipe, pipe, on_class=lambda done, total: shown.append(done))
    assert shown == []
    train_image(ImageRecipe(**(vars(recipe) | {"class_data": None})), pipe, on_class=lambda done, _: shown.append(done))
    assert shown == [1, 2, 3]


def test_captions(folder):
    assert [(each.image.name, each.caption) for each in pictures_in("dog")] == [
        ("blue.png", "a blue dog"),
        ("red.png", "a red dog"),
    ]
    (folder / "dog/metadata.jsonl").write_text('{"file_name": "red.png", "text": "rot"}\n\n')
    assert [(each.image.name, each.caption) for each in pictures_in("dog")] == [("red.png", "rot")]
    assert [each.caption for each in pictures_in("dog", "sks")] == ["sks", "sks"]


def test_pictures_are_made_square():
    image = Image.new("RGBA", (30, 20), (0, 0, 0, 0))  # transparent is white
    image.paste((255, 0, 0, 255), (0, 0, 5, 20))
    pixels, size = square(Picture(image, ""), 20, "center", torch.Generator())
    assert pixels.shape == (3, 20, 20) and size == (20, 30, 0, 5) and pixels.min() == 1
    lefts = {square(Picture(image, ""), 20, "random", torch.Generator().manual_seed(n))[1][3] for n in range(40)}
    assert lefts == set(range(11))
    pixels, size = square(Picture(image, ""), 40, "center", torch.Generator())
    assert pixels.shape == (3, 40, 40) and size == (20, 30, 0, 10)


def test_random_crops_flips_and_dropped_captions(folder):
    parts = Parts(stable_diffusion())
    examples = Examples(parts, pictures_in("dog"), resolution=SIDE, crop="random", flip=True, drop_captions=0.5)
    batches = examples.batches(8, seed=0)
    batch = next(batches)
    assert batch["latents"].shape == (8, 4, SIDE // 2, SIDE // 2) and len({size[3] for size in batch["sizes"]}) > 1
    assert not examples._latents and set(examples._text) == {"", "a red dog", "a blue dog"}
    kept = Examples(parts, pictures_in("dog"), resolution=SIDE, flip=True)
    assert len(kept._latents) == 4
    one, two = (Examples(parts, pictures_in("dog"), resolution=SIDE).batches(3, seed=5) for _ in range(2))
    assert all(torch.equal(next(one)["noise"], next(two)["noise"]) for _ in range(3))


def test_processes_share_the_pictures():
    from shira.integrations.diffusers_training import _order

    alone, first, second = _order(5, 3, 0, 1), _order(5, 3, 0, 2), _order(5, 3, 1, 2)
    whole = [next(alone) for _ in range(20)]
    assert [next(part) for _ in range(10) for part in (first, second)] == whole
    assert sorted(whole[:5]) == list(range(5))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: [path.unlink() for path in (folder / "dog").iterdir()], "dog holds no picture; expected files"),
        (lambda folder: (folder / "dog/red.png").write_bytes(b"\x89PNG no"), r"red\.png is not a picture that can be read"),
        (lambda folder: (folder / "dog/red.txt").unlink(), r"red\.png has no caption; write one into red\.txt beside it"),
        (lambda folder: (folder / "dog/red.txt").write_text(" \n"), r"red\.txt is empty; expected the caption of red\.png"),
        (lambda folder: (folder / "dog/red.txt").write_bytes(b"\xff"), r"red\.txt is not UTF-8"),
        (lambda folder: (folder / "dog/metadata.jsonl").write_text("{"), r"metadata\.jsonl, line 1: it is not JSON"),
        (lambda folder: (folder / "dog/metadata.jsonl").write_text('{"text": 3}'), "expected 'file_name' and 'text'"),
        (
            lambda folder: (folder / "dog/metadata.jsonl").write_text('{"file_name": "x.png", "text": "x"}'),
            r"there is no file 'x\.png' in dog",
        ),
        (lambda folder: (folder / "dog/metadata.jsonl").write_text("\n"), r"metadata\.jsonl lists no picture"),
    ],
)
def test_data_that_cannot_be_used(folder, damage, words):
    damage(folder)
    pipe = stable_diffusion()
    before = all_bits(modules_of(pipe))
    with pytest.raises(DataError, match=words):
        train_image(overfit(data="dog", steps=1), pipe)
    assert same_bits(before, all_bits(modules_of(pipe)))


def test_pipelines_that_cannot_be_trained(folder):
    pipe = stable_diffusion()
    with pytest.raises(DataError, match="resolution must be a multiple of 4 for this pipeline, found 30; take 28 or 32"):
        train_image(overfit(resolution=30), pipe)
    pipe.scheduler.register_to_config(prediction_type="velocity")
    with pytest.raises(DataError, match="prediction type is 'velocity'; known: epsilon, v_prediction, sample"):
        train_image(overfit(), pipe)
    with pytest.raises(DataError, match="StableDiffusionPipeline has neither a unet nor a transformer"):
        pipe.unet = None
        train_image(overfit(), pipe)
    with pytest.raises(DataError, match="the unet takes 9 channels and the VAE makes 4: it is for another task"):
        train_image(overfit(), stable_diffusion(channels=9))
    with pytest.raises(DataError, match="the unet takes an input that train-image does not know: class_embed_type='timestep'"):
        train_image(overfit(), stable_diffusion(class_embed_type="timestep"))
    pipe = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(
            block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
        ),
        diffusers.DDPMScheduler(),
    )
    with pytest.raises(DataError, match="the unet of this pipeline is a UNet2DModel; train-image knows UNet2DConditionModel"):
        train_image(overfit(), pipe)
    pipe = sd3()
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(DataError, match="trained by flow matching; the scheduler is a DDIMScheduler"):
        train_image(overfit(), pipe)


def test_a_loss_that_is_not_finite(folder):
    pipe = stable_diffusion()
    before = all_bits(modules_of(pipe))
    with pytest.raises(shira.TuningError, match="the loss became nan at step"):
        train_image(overfit(lr=1e30, steps=5), pipe)
    assert same_bits(before, all_bits(modules_of(pipe)))


LINE = "train-image pipeline --steps 3 --density 0.1 --batch-size 2 --sample-steps 2 --guidance 2"


def test_the_commands(run, folder):
    """Train DreamBooth with samples, repeat it to the bit by its recipe, and make grids of its adapter."""
    stable_diffusion().save_pretrained("pipeline")
    line = f"{LINE} --data dog --prompt 'sks dog' --class-prompt dog --class-count 2 --sample-every 2 --sample-prompt 'a dog'"
    code, out, err = run(f"{line} --sample-prompt 'sks dog' --license MIT --flip -o one.safetensors")
    assert code == 0, err
    assert "one.yaml, the samples are one.png" in " ".join(out.split())
    assert re.search(r"^making pictures of the class: 2/2 ", err, re.MULTILINE), err
    assert re.search(r"^training: 3/3 in [\d.]+ s loss [\d.]+  [\d.]+ pictures/s$", err, re.MULTILINE), err
    one = shira.load("one.safetensors")
    assert one.metadata["base"] == {"id": "pipeline", "dtype": "float32"}
    assert one.metadata["license"] == "MIT" and one.name == "dog"
    assert one.metadata["training"]["prompt"] == "sks dog"
    with Image.open("one.png") as samples:
        width, height = samples.size
    assert width > 3 * 128 and height > 2 * 128  # base, step 2, step 3; two prompts

    assert run("train-image --config one.yaml -o two.safetensors")[0] == 0
    two = shira.load("two.safetensors")
    assert two.metadata == one.metadata
    assert all(torch.equal(tensor.values, two.tensors[name].values) for name, tensor in one.tensors.items())
    assert (folder / "one.png").read_bytes() == (folder / "two.png").read_bytes()
    assert (folder / "one.safetensors").read_bytes() == (folder / "two.safetensors").read_bytes()

    assert run(f"{LINE} --data dog --seed 3 --name other -o other.safetensors")[0] == 0
    common = "sample --pipe pipeline -p dog -p tiger --steps 2 --guidance 2"
    code, out, err = run(f"{common} -a one.safetensors -a other.safetensors=0.5 --seeds 3 -o grid.png")
    assert code == 0, err
    assert "grid.png: 2 x 3 pictures" in out and "making pictures: 6/6" in err
    assert run(f"{common} -a one.safetensors --sweep 0,0.5,1 -o sweep.png")[0] == 0
    assert run(f"{common} --seeds 1 -o base.png")[0] == 0
    with Image.open("sweep.png") as swept, Image.open("base.png") as base:
        places = [(swept.width - (3 - n) * (128 + 4), swept.height - 128 - 4) for n in range(3)]
        tiles = [swept.crop((x, y, x + 128, y + 128)).tobytes() for x, y in places]
        alone = base.crop((base.width - 132, base.height - 132, base.width - 4, base.height - 4)).tobytes()
    assert tiles[0] == alone and len(set(tiles)) == 3


def test_two_processes(folder):
    """They train one adapter, on batches of both; the class is made once."""
    stable_diffusion().save_pretrained("pipeline")
    line = f"{LINE} --data dog --class-prompt dog --class-count 2 --class-data made --sample-every 2 -o two.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "shira.cli", *line.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(shira.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "training: 3/3" in done.stderr and "Warning" not in done.stderr
    adapter = shira.load("two.safetensors")
    assert adapter.metadata["training"]["batch_size"] == 4
    pipe = stable_diffusion()
    switcher = shira.Switcher(modules_of(pipe))
    switcher.add("two", adapter)
    assert len(list((folder / "made").iterdir())) == 2 and (folder / "two.png").exists()


def test_wrong_options_are_refused_before_a_pipeline_is_loaded(run, folder, monkeypatch):
    monkeypatch.setattr("shira.integrations.diffusers_sampling.load_pipeline", None)
    for options, words in {
        "--data dog --mask snap": "unknown mask 'snap'; did you mean 'snip'",
        "--data dog --density 0": "density must be a finite number above 0",
        "--data dog --prior-weight 2": "class_data and prior_weight need a class_prompt",
        "--data dog --schedule liner": "unknown schedule 'liner'; did you mean 'linear'",
        "--data dog --crop middle": "crop must be one of center, random",
        "--data dog --mixed-precision fp8": "mixed_precision must be one of no, bf16, fp16",
        "--data cat": "cat is not a folder of pictures",
        "": "no pictures to train on: give --data, a folder of pictures",
        "--data dog -o none/a.safetensors": "there is no folder none",
        "--data dog --min-snr 0": "min_snr must be a finite number above 0",
    }.items():
        code, _, err = run(f"{LINE} {options}".replace("--density 0.1", "" if "density" in options else "--density 0.1"))
        assert code == 1 and words in " ".join(err.split()), err
    code, _, err = run("train-image --data dog")
    assert code == 1 and "no pipeline to train" in err
    code, _, err = run("sample --pipe pipeline -p x --sweep 1")
    assert code == 1 and "--sweep needs an adapter" in err
    code, _, err = run("sample --pipe pipeline -p x --sweep 1,a")
    assert code == 2 and "expected numbers with commas" in " ".join(re.sub("│", " ", err).split())


def test_what_is_no_pipeline(run, folder):
    (folder / "empty").mkdir()
    for name in ("empty", "nobody/nothing"):
        code, _, err = run(f"sample --pipe {name} -p x")
        assert code == 1 and f"DataError: cannot load '{name}': no Diffusers pipeline in that folder" in err


def test_the_options_are_defined_once(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    code, out, _ = run("train-image --help")
    text = re.sub(r"[│\s]+", " ", out)
    assert code == 0
    for name, (about, _) in fields_of(ImageRecipe).items():
        assert re.fullmatch(r"\S.*\S\.", about["help"]), name
        assert about["help"] in text, name
        assert name == "pipeline" or f" --{name.replace('_', '-')} " in text, name
    for group in ("Data", "Mask", "Training", "Results"):
        assert f"─ {group} ─" in out


def test_a_recipe_of_another_kind(folder):
    (folder / "r.yaml").write_text("{pipeline: x, data: dog, max_length: 3}")
    with pytest.raises(DataError, match="unknown setting 'max_length'"):
        load_image_recipe("r.yaml", {})
    recipe = load_image_recipe(None, {"pipeline": "x", "data": "dog", "rank": 4})
    check_image_run(recipe)
    assert json.dumps(vars(recipe))


def test_grids():
    tile = Image.new("RGB", (32, 32), "red")
    found = grid([[tile, tile]], ["a tiger"], ["base", "a very long title that takes several lines of the grid"])
    assert found.width > 2 * 128 and found.height > 128
    assert found.getpixel((found.width - 10, found.height - 10)) == (255, 0, 0)
    plain = grid([[tile]], [""], ["x"], smallest=1)
    assert plain.width == 32 + 8
    with pytest.raises(DataError, match="a grid needs a title for each row and column"):
        grid([[tile]], ["a", "b"], ["x"])


def test_a_pipeline_is_loaded_in_a_dtype(folder):
    stable_diffusion().save_pretrained("pipeline")
    assert load_pipeline("pipeline").unet.dtype == torch.float32
    assert load_pipeline("pipeline", "bfloat16").unet.dtype == torch.bfloat16
