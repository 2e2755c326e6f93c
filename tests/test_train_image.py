"""Training on pictures, on tiny random pipelines."""

import contextlib

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("PIL")

import diffusers
import torch
from PIL import Image

import shira
from conftest import all_bits, same_bits
from pipelines import PIPELINES, SIDE, sd3, sdxl, stable_diffusion
from shira import DataError
from shira.data.pictures import Picture, image_of, pictures_in, square
from shira.integrations.diffusers_sampling import modules_of, sample
from shira.integrations.diffusers_training import Examples, accelerator_for, train
from shira.integrations.diffusion_losses import TrainedComponents
from shira.integrations.transformers import in_software
from shira.runs.image_recipes import ImageRecipe, train_image
from shira.runs.live import InSoftware

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Diffusers' Euler with NumPy 2.4


def overfit(**more):
    settings = {"pipeline": "-", "data": "one", "steps": 30, "lr": 0.01, "density": 0.2, "schedule": "constant"}
    return ImageRecipe(**(settings | {"batch_size": 4, "sample_steps": 2, "guidance": 2.0} | more))


def loss_of(pipe, recipe, resolution=SIDE):
    """The mean loss over fixed noise."""
    parts = TrainedComponents(pipe)
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
        parts = TrainedComponents(pipe, min_snr=cut)
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
        paper = {"epsilon": cuts / snr, "v_prediction": cuts / (snr + 1), "sample": cuts}[name]
        plain = (snr + 1).clamp(max=20) if name == "sample" else torch.ones(3)
        scale = paper if cut else plain
        torch.testing.assert_close(parts(batch), scale.mean())


def test_flow_goes_from_picture_to_noise():
    parts = TrainedComponents(sd3())
    assert parts.levels[0] == 1 and parts.times[0] == 1000 and parts.levels[-1] < 0.01
    level = parts.draw(1000, torch.Generator().manual_seed(0))
    assert level.min() >= 0 and level.max() < 1000 and 400 < level.float().mean() < 600
    with pytest.raises(DataError, match="min_snr is for pipelines that predict noise"):
        TrainedComponents(sd3(), min_snr=5.0)


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
    parts = TrainedComponents(pipe)
    examples = Examples(parts, pictures_in("dog"), resolution=SIDE)
    found = {}
    for size, accumulate in ((4, 1), (2, 2)):
        batch = next(examples.batches(4, seed=0))
        halves = [{key: _part(value, half) for key, value in batch.items()} for half in (slice(0, 2), slice(2, 4))]
        for half in halves:
            half["weight"] = half["weight"] * 2
        with shira.attach(parts, targets=["conv_shortcut"], density=0.2) as tuner:
            given = {0: iter([batch] if accumulate == 1 else halves)}.get  # from the first batch on
            losses = []
            options = {"batch_size": size, "accumulate": accumulate, "learning_rate": 0.01, "steps": 1}
            train(
                tuner,
                parts,
                given,
                accelerator_for("no", accumulate),
                on_step=lambda *step, to=losses: to.append(step),
                **options,
            )
            found[accumulate] = (losses[0][1], torch.cat([each.detach().clone() for each in tuner.parameters()]))
    torch.testing.assert_close(found[1], found[2], rtol=1e-4, atol=1e-5)


def _part(value, half):
    return {key: each[half] for key, each in value.items()} if isinstance(value, dict) else value[half]


@pytest.mark.parametrize("name", ["epsilon", "sdxl", "sd3", "flux"])
def test_the_denoiser_is_called_as_the_pipeline_calls_it(name):
    pipe, calls = PIPELINES[name](), []
    parts = TrainedComponents(pipe)
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
    recipe = overfit(steps=3, mixed_precision="bf16" if precision == "bf16" else "no")
    slow = precision == "bf16" and in_software(torch.bfloat16)
    with pytest.warns(InSoftware, match="--mixed-precision no") if slow else contextlib.nullcontext():
        adapter = train_image(recipe, pipe)
    assert same_bits(before, all_bits(modules_of(pipe)))
    assert adapter.metadata["base"]["dtype"] == ("float32" if precision == "bf16" else "bfloat16")


def test_prior_preservation_takes_pictures_of_the_class(folder):
    pipe, shown = stable_diffusion(), []
    recipe = overfit(
        steps=3, prompt="a photo of sks dog", class_prompt="a dog", class_data="class", class_count=3, prior_weight=0.5
    )
    priors = [Picture("class/green.png", "a dog")]
    parts = TrainedComponents(pipe)
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
    assert sorted(path.name for path in (folder / "class").iterdir()) == ["class-00000.png", "class-00001.png", "green.png"]
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


def test_grey_pictures_of_16_bits_and_captions_of_windows(folder):
    ramp = Image.new("I;16", (3, 2))
    for x, value in enumerate((0, 32768, 65535)):
        ramp.putpixel((x, 0), value)
    ramp.save("grey.png")
    found = image_of(Picture("grey.png", "grey"))
    assert found.mode == "RGB" and [found.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (127,) * 3, (255,) * 3]
    with pytest.raises(DataError, match="floating point"):
        image_of(Picture(Image.new("F", (2, 2)), "x"))
    (folder / "named").mkdir()
    Image.new("RGB", (8, 8)).save("named/a.png")
    (folder / "named" / "a.txt").write_text("a dog", encoding="utf-8-sig")
    assert pictures_in("named")[0].caption == "a dog"


def test_pictures_are_made_square():
    image = Image.new("RGBA", (30, 20), (0, 0, 0, 0))  # transparent is white
    image.paste((255, 0, 0, 255), (0, 0, 5, 20))
    pixels, size = square(Picture(image, ""), 20, "center", torch.Generator())
    assert pixels.shape == (3, 20, 20) and size == (20, 30, 0, 5) and pixels.min() == 1
    lefts = {square(Picture(image, ""), 20, "random", torch.Generator().manual_seed(n))[1][3] for n in range(40)}
    assert lefts == set(range(11))
    pixels, size = square(Picture(image, ""), 40, "center", torch.Generator())
    assert pixels.shape == (3, 40, 40) and size == (20, 30, 0, 10)
    with pytest.raises(
        DataError, match="is 1 x 3000, so at resolution 512 it would be 512 x 1536000 before it is cropped; crop it"
    ):
        square(Picture(Image.new("L", (1, 3000)), ""), 512, "center", torch.Generator())


def test_random_crops_flips_and_dropped_captions(folder):
    parts = TrainedComponents(stable_diffusion())
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": "bad", "prompt": "a sks dog"}, "cut.png is not a picture that can be read"),
        ({"class_data": "bad"}, "cut.png is not a picture that can be read"),
        ({"resolution": 17}, "resolution must be a multiple of 8 for this pipeline, found 17; take 16 or 24"),
    ],
)
def test_what_is_wrong_is_found_before_pictures_of_the_class_are_made(folder, options, words):
    (folder / "bad").mkdir()
    (folder / "bad/cut.png").write_bytes((folder / "dog/red.png").read_bytes()[:-40])  # its size can still be read
    made = []
    with pytest.raises(DataError, match=words):
        train_image(overfit(class_prompt="a dog", **options), stable_diffusion(), on_class=lambda *done: made.append(done))
    assert made == [] and [path.name for path in (folder / "bad").iterdir()] == ["cut.png"]


def test_pipelines_that_cannot_be_trained(folder):
    pipe = stable_diffusion()
    with pytest.raises(DataError, match="resolution must be a multiple of 8 for this pipeline, found 30; take 24 or 32"):
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
    with pytest.raises(shira.TuningError, match="the loss became nan at step .; try a lower learning rate$"):
        train_image(overfit(lr=1e30, steps=5), pipe)
    assert same_bits(before, all_bits(modules_of(pipe)))


def test_the_vae_is_in_float16_again_after_an_interrupt(folder, monkeypatch):
    pipe = sdxl()
    pipe.vae.half()
    before = all_bits(pipe.vae)

    def encode(pixels):
        assert pipe.vae.dtype == pixels.dtype == torch.float32
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe.vae, "encode", encode)
    with pytest.raises(KeyboardInterrupt):
        train_image(overfit(), pipe)
    assert pipe.vae.dtype == torch.float16 and same_bits(before, all_bits(pipe.vae))
