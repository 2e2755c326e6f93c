"""Adapters of Diffusers' pipelines, on tiny random pipelines of the real classes."""

import copy
import re
import string
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import shira
from conftest import all_bits, bits, same_bits
from interrupting import interrupted
from shira import AdapterError, BaseMismatch, SwitchError
from shira.integrations.diffusers import PipelineAdapters

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
diffusers.utils.logging.disable_progress_bar()

CROSS = {"cross_attention_dim": 16, "attention_head_dim": 4, "norm_num_groups": 4}


def tokenizer():
    words = [
        *string.ascii_lowercase,
        *(f"{letter}</w>" for letter in string.ascii_lowercase),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {word: number for number, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=8)


def text_encoder(kind="CLIPTextModel", seed=1):
    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=16,
        bos_token_id=52,
        eos_token_id=53,
    )
    return getattr(transformers, kind)(config).eval()


def unet(seed=0, layers=1, **more):
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=layers,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **CROSS,
        **more,
    ).eval()


def vae():
    torch.manual_seed(2)
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    blocks = {"block_out_channels": (4, 4), "down_block_types": down, "up_block_types": up}
    return diffusers.AutoencoderKL(latent_channels=4, norm_num_groups=2, shift_factor=0.0, **blocks).eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion():
    return quiet(
        diffusers.StableDiffusionPipeline(
            vae=vae(),
            text_encoder=text_encoder(),
            tokenizer=tokenizer(),
            unet=unet(),
            scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def xl():
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 40}
    return quiet(
        diffusers.StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=text_encoder(),
            text_encoder_2=text_encoder("CLIPTextModelWithProjection", 3),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=diffusers.UNet2DConditionModel.from_config({**unet(**more).config, "cross_attention_dim": 32}).eval(),
            scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
            add_watermarker=False,
        )
    )


def sd3():
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    parts = dict.fromkeys(("text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"))
    parts |= {f"text_encoder{end}": text_encoder("CLIPTextModelWithProjection", 4 + len(end)) for end in ("", "_2")}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return quiet(diffusers.StableDiffusion3Pipeline(transformer=transformer.eval(), scheduler=scheduler, vae=vae(), **parts))


def flux():
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    parts = {"text_encoder": text_encoder(), **dict.fromkeys(("text_encoder_2", "tokenizer", "tokenizer_2"))}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return quiet(diffusers.FluxPipeline(transformer=transformer.eval(), scheduler=scheduler, vae=vae(), **parts))


PIPELINES = {"sd": stable_diffusion, "xl": xl, "sd3": sd3, "flux": flux}
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "vae")


def picture(pipe, steps=2, **options):
    """The pixels of an image, from the same noise each time."""
    if hasattr(pipe, "transformer"):
        context, pooled = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(5)), torch.ones(1, 16)
        options |= {"prompt_embeds": context, "pooled_prompt_embeds": pooled, "guidance_scale": 0.0}
    else:
        options |= {"prompt": "a dog"}
    options |= {"height": 16, "width": 16, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    return bits(pipe(num_inference_steps=steps, **options).images)


def part_bits(pipe, part):
    """The bits of one component, named with the component in front."""
    return {f"{part}.{name}": value for name, value in all_bits(getattr(pipe, part)).items()}


def pipe_bits(pipe):
    parts = [part for part in PARTS if isinstance(getattr(pipe, part, None), nn.Module)]
    return {name: value for part in parts for name, value in part_bits(pipe, part).items()}


def adapter(pipe, seed, components=("unet", "transformer", "text_encoder"), share=0.1, kind="overwrite"):
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


@pytest.fixture(scope="module")
def shared():
    """A pipeline for tests that leave it as it was."""
    return stable_diffusion()


@pytest.fixture
def pipe(shared):
    before = pipe_bits(shared)
    yield shared
    assert same_bits(pipe_bits(shared), before)


@pytest.fixture
def adapters(pipe):
    made = PipelineAdapters(pipe)
    made.load(adapter(pipe, 1), "a")
    made.load(adapter(pipe, 2), "b")
    yield made
    made.unfuse()
    made.disable()


@pytest.mark.parametrize("kind", PIPELINES)
def test_every_kind_of_pipeline(kind, tmp_path):
    pipe = PIPELINES[kind]()
    before, plain = pipe_bits(pipe), picture(pipe)
    both = adapter(pipe, 1, PARTS[:4])
    both.save(tmp_path / "both.safetensors")
    adapters = PipelineAdapters(pipe)
    assert adapters.load(tmp_path / "both.safetensors") == "random1"
    assert same_bits(pipe_bits(pipe), before)
    adapters.set("random1")
    for name, tensor in both.tensors.items():
        component, _, rest = name.partition(".")
        now = getattr(pipe, component).get_parameter(rest).detach().view(-1)[tensor.indices]
        assert torch.equal(bits(now), bits(tensor.values)), name
    assert not torch.equal(picture(pipe), plain)
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    adapters.set("random1", {part: 0.5, "*": 0})
    changed = {name for name, value in pipe_bits(pipe).items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith(f"{part}.") for name in changed)
    adapters.disable()
    assert same_bits(pipe_bits(pipe), before)
    assert torch.equal(picture(pipe), plain)


def test_other_methods_of_fusion_hold_for_a_replaced_component_too(pipe, adapters):
    base = pipe_bits(pipe)
    adapters.set(["a", "b"], [1.0, 0.5])
    by_sum = pipe_bits(pipe)
    adapters.set(["a", "b"], [1.0, 0.5], method="ties", density=0.5)
    by_ties = pipe_bits(pipe)
    assert not same_bits(by_sum, by_ties)
    pipe.unet = copy.deepcopy(pipe.unet)
    adapters.enable()
    assert same_bits(pipe_bits(pipe), by_ties)
    adapters.fuse()
    assert same_bits(pipe_bits(pipe), by_ties)
    with pytest.raises(AdapterError, match="tie"):
        adapters.set([], method="tie")
    assert same_bits(pipe_bits(pipe), by_ties)
    adapters.unfuse()
    assert same_bits(pipe_bits(pipe), base)


def test_calls_as_in_the_documentation(pipe, adapters):
    base = pipe_bits(pipe)
    assert adapters.names == ["a", "b"] and adapters.active == {}
    adapters.set("a")
    assert adapters.active == {"a": 1.0}
    adapters.set(["a", "b"], [1.0, 0.5])
    both = pipe_bits(pipe)
    assert adapters.active == {"a": 1.0, "b": 0.5}
    adapters.disable()
    assert adapters.active == {} and same_bits(pipe_bits(pipe), base)
    adapters.enable()
    assert same_bits(pipe_bits(pipe), both)
    adapters.set({"a": 1.0, "b": 0.5})
    assert same_bits(pipe_bits(pipe), both)
    adapters.set(["a", "b"], 0.5)
    assert adapters.active == {"a": 0.5, "b": 0.5}
    adapters.delete("b")
    assert adapters.names == ["a"] and adapters.active == {"a": 0.5}
    adapters.set([])
    assert adapters.active == {} and same_bits(pipe_bits(pipe), base)


def test_what_is_fused_stays_under_what_is_set_later(pipe, adapters):
    base = pipe_bits(pipe)
    adapters.set(["a", "b"])
    both = pipe_bits(pipe)
    adapters.set("a")
    alone = pipe_bits(pipe)
    adapters.fuse()
    assert adapters.fused == {"a": 1.0} and adapters.active == {} and same_bits(pipe_bits(pipe), alone)
    adapters.set("b")
    assert adapters.active == {"b": 1.0} and same_bits(pipe_bits(pipe), both)
    adapters.disable()
    assert same_bits(pipe_bits(pipe), alone)
    for call in (lambda: adapters.set("a"), lambda: adapters.delete("a")):
        with pytest.raises(SwitchError, match="unfuse"):
            call()
    with pytest.raises(SwitchError, match="nothing is active"):
        adapters.fuse()
    adapters.unfuse()
    assert adapters.fused == {} and same_bits(pipe_bits(pipe), base)


def test_release_keeps_what_is_active_for_good():
    pipe = stable_diffusion()
    adapters = PipelineAdapters(pipe)
    adapters.load(adapter(pipe, 1), "a")
    adapters.set("a")
    kept = pipe_bits(pipe)
    adapters.release()
    adapters.disable()
    assert adapters.active == {} and same_bits(pipe_bits(pipe), kept)
    with pytest.raises(BaseMismatch):
        adapters.set("a")


def strengths_by_tensor(pipe, adapters, made, given):
    """Tensor -> the strength with which it was changed: 0, 1, or a value in between, from the largest change."""
    base = {name: value.view(torch.float32) for name, value in pipe_bits(pipe).items()}
    adapters.set("a", given)
    now = {name: value.view(torch.float32) for name, value in pipe_bits(pipe).items()}
    adapters.disable()
    found = {}
    for name, tensor in made.tensors.items():
        whole = tensor.values - base[name][tensor.indices]
        place = int(whole.abs().argmax())
        change = now[name][tensor.indices] - base[name][tensor.indices]
        found[name] = round(float(change[place] / whole[place]), 3)
    return found


def test_strengths_by_block_as_diffusers_reads_them(pipe, adapters):
    made = adapter(pipe, 1)
    given = {"unet": {"down": 0.9, "mid": 0.7, "up": {"block_0": [0.4, 0.8], "block_1": 0.6}}, "text_encoder": 0.5}
    for name, found in strengths_by_tensor(pipe, adapters, made, given).items():
        rules = {
            "unet.down_blocks.": 0.9,
            "unet.mid_block.": 0.7,
            "unet.up_blocks.0.attentions.0.": 0.4,
            "unet.up_blocks.0.resnets.0.": 0.4,
            "unet.up_blocks.0.attentions.1.": 0.8,
            "unet.up_blocks.0.resnets.1.": 0.8,
            "unet.up_blocks.1.": 0.6,
            "text_encoder.": 0.5,
        }
        assert found == next((value for start, value in rules.items() if name.startswith(start)), 1.0), name


@pytest.mark.parametrize(
    "given,rules",
    [
        ({"unet": {"up": [0.2, 0.4]}}, {r"unet.up_blocks.\d.\w+.0.": 0.2, r"unet.up_blocks.\d.\w+.1.": 0.4}),
        ({"unet": {"*": 0, "up_blocks.0.resnets": [0.25, 0.5]}}, {"unet.up_blocks.0.resnets.1.": 0.5}),
        ({"unet": {"up.block_0": 0.5, "up": 0.25}}, {"unet.up_blocks.0.": 0.5, "unet.up_blocks.1.": 0.25}),
        ({"*": 0, "unet": {"mid": [0.5]}}, {"unet.mid_block.": 0.5, "text_encoder.": 0, "unet.conv_in": 0}),
        ({"text_encoder": {"encoder": 0.5, "*": 0}}, {"unet.": 1, "text_encoder.encoder": 0.5, "text_encoder.embeddings": 0}),
        ({}, {"unet.": 1}),
    ],
)
def test_further_strengths_by_block(pipe, adapters, given, rules):
    found = strengths_by_tensor(pipe, adapters, adapter(pipe, 1), given)
    for start, expected in rules.items():
        meant = {found[name] for name in found if re.match(start, name) and "samplers" not in name}
        assert meant == {expected}, start


def test_blocks_without_entries_are_no_error(pipe, adapters):
    made = adapter(pipe, 3)
    only = {name: tensor for name, tensor in made.tensors.items() if "up_blocks.0.attentions" in name}
    adapters.load(shira.Adapter(only, made.metadata), "up")
    adapters.set("up", {"unet": {"down": 0.9, "mid": 1, "up": {"block_0": [0.5, 1.0], "block_1": 0.3}}})
    assert adapters.active


def test_nested_names_of_a_transformer():
    pipe = sd3()
    adapters = PipelineAdapters(pipe)
    made = adapter(pipe, 1, ("transformer",))
    adapters.load(made, "a")
    given = {"transformer": {"transformer_blocks": [0.5, 0.25], "proj_out": 0, "pos_embed.proj": 0.75}}
    found = strengths_by_tensor(pipe, adapters, made, given)
    rules = {"transformer_blocks.0": 0.5, "transformer_blocks.1": 0.25, "proj_out": 0, "pos_embed": 0.75}
    for name, value in found.items():
        assert value == next((v for start, v in rules.items() if name.startswith(f"transformer.{start}")), 1.0), name


WRONG = [
    (lambda a: a.set("c"), SwitchError, "no adapter 'c'"),
    (lambda a: a.set(["a", "a"]), SwitchError, "twice"),
    (lambda a: a.set(3), SwitchError, "expected a name"),
    (lambda a: a.set([3]), SwitchError, "expected a name"),
    (lambda a: a.set({3: 1.0}), SwitchError, "no adapter 3"),
    (lambda a: a.set({"a": 1.0}, 0.5), SwitchError, "expected a name"),
    (lambda a: a.set(["a", "b"], [1.0]), AdapterError, "each of 2 adapters"),
    (lambda a: a.set("a", "strong"), AdapterError, "finite number, found 'strong'"),
    (lambda a: a.set("a", True), AdapterError, "finite number"),
    (lambda a: a.set("a", float("nan")), AdapterError, "finite number"),
    (lambda a: a.set("a", {"unet": "strong"}), AdapterError, "finite number, found 'strong'"),
    (lambda a: a.set("a", {"unet": {"mid": None}}), AdapterError, "finite number"),
    (lambda a: a.set("a", {"*": {}}), AdapterError, "finite number"),
    (lambda a: a.set("a", {"unet": {"*": [1]}}), AdapterError, "must be a number"),
    (lambda a: a.set("a", {"transformer": 1.0}), AdapterError, "no component 'transformer'.*unet"),
    (lambda a: a.set("a", {"vae": 1.0}), AdapterError, "no component 'vae'"),
    (lambda a: a.set("a", {3: 1.0}), AdapterError, "no component 3"),
    (lambda a: a.set("a", {"unet": {"side": 1.0}}), AdapterError, "no part 'side'; .*'mid'"),
    (lambda a: a.set("a", {"unet": {"up": {"block_7": 1.0}}}), AdapterError, "no part 'block_7'; .*'block_0'"),
    (lambda a: a.set("a", {"unet": {"up": {"block_0": [1, 2, 3]}}}), AdapterError, "2 numbered layers, found a list of 3"),
    (lambda a: a.set("a", {"unet": {"conv_in": [1, 2]}}), AdapterError, "0 numbered layers"),
    (lambda a: a.set("a", {"unet": {"mid": []}}), AdapterError, "found a list of 0"),
    (lambda a: a.set("a", 1e39), AdapterError, "float32"),
    (lambda a: a.set("a", 3e38), AdapterError, "overflow"),
    (lambda a: a.delete("c"), SwitchError, "no adapter 'c'"),
    (lambda a: a.delete([]), SwitchError, "no adapter"),
    (lambda a: a.load(3), AdapterError, "load"),
    (lambda a: a.load(shira.Adapter({}), "a"), SwitchError, "there is an adapter 'a' already"),
    (lambda a: a.load(adapter(sd3(), 1), "c"), BaseMismatch, "changes 'transformer'; here are 'unet', 'text_encoder'"),
    (lambda a: a.load(adapter(xl(), 1), "c"), BaseMismatch, "does not belong"),
    (lambda a: a.load(adapter(flux(), 1, ("transformer",)), "c"), BaseMismatch, "changes 'transformer'"),
    (lambda a: a.load(adapter(a._pipe, 1), "c", component="vae"), AdapterError, "no component 'vae'"),
    (lambda a: a.load(adapter(a._pipe, 1), "c", component="unet"), BaseMismatch, "no tensor 'unet.unet"),
    (lambda a: a.save("x.safetensors"), AdapterError, "nothing to save"),
    (lambda a: a.save("x.safetensors", vae=adapter(a._pipe, 1)), AdapterError, "no component 'vae'"),
    (lambda a: a.save("x.safetensors", unet=adapter(a._pipe, 1)), BaseMismatch, "the adapter for unet"),
]


@pytest.mark.parametrize("call,error,text", WRONG)
def test_what_is_not_possible_is_one_error_and_changes_nothing(pipe, adapters, call, error, text):
    adapters.set(["a", "b"], [0.5, 1.0])
    before = pipe_bits(pipe)
    with pytest.raises(error, match=text):
        call(adapters)
    assert adapters.active == {"a": 0.5, "b": 1.0} and adapters.names == ["a", "b"]
    assert same_bits(pipe_bits(pipe), before)


def test_names_of_two_kinds_are_refused(pipe, adapters):
    tensors = dict(adapter(pipe, 1).tensors)
    tensors["conv_in.weight"] = tensors["unet.conv_in.weight"]
    with pytest.raises(AdapterError, match="'conv_in' is not a component"):
        adapters.load(shira.Adapter(tensors), "mixed")


def test_a_part_that_the_adapter_does_not_change(pipe, adapters):
    adapters.load(adapter(pipe, 3, ("unet",)), "c")
    with pytest.raises(AdapterError, match="changes nothing in 'text_encoder', only in 'unet'"):
        adapters.set("c", {"text_encoder": 0.5})


@pytest.mark.parametrize("what", [None, "pipe", nn.Linear(2, 2)])
def test_only_a_pipeline_has_adapters(what):
    with pytest.raises(SwitchError, match="one of the components unet"):
        PipelineAdapters(what)


def noise_loss(model, batch):
    latents, noise, steps, context = batch
    return nn.functional.mse_loss(model(latents + noise, steps, context).sample, noise)


def noise_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    return latents, noise, torch.randint(1000, (2,), generator=generator), torch.randn(2, 8, 16, generator=generator)


def test_train_save_load_and_generate(tmp_path):
    """Convolutions and linear layers, trained through `attach`; the image is the one that the trained pipeline gives."""
    pipe = stable_diffusion()
    before, plain = pipe_bits(pipe), picture(pipe)
    with shira.attach(pipe.unet, mask="rand", density=0.05, targets=["to_q", "to_v", "conv1", "conv2", "conv_in"]) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.1)
        for step in range(2):
            noise_loss(pipe.unet, noise_batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained = picture(pipe)
        tuner.adapter("bluefire").save(tmp_path / "unet.safetensors")
    with shira.attach(pipe.text_encoder, mask="rand", density=0.05, targets=["q_proj"]) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.1)
        pipe.text_encoder(torch.tensor([[52, 3, 14, 53]])).last_hidden_state.square().mean().backward()
        optimizer.step()
        encoder = tuner.adapter("bluefire")
    assert same_bits(pipe_bits(pipe), before) and not torch.equal(trained, plain)
    pipe.save_pretrained(tmp_path / "pipe")
    again = quiet(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", safety_checker=None))
    adapters = PipelineAdapters(again)
    assert adapters.load(tmp_path / "unet.safetensors") == "bluefire"  # plain names: the denoiser's
    adapters.set("bluefire")
    assert torch.equal(picture(again), trained)
    adapters.load(encoder, "encoder", component="text_encoder")
    adapters.set(["bluefire", "encoder"])
    apart = picture(again)
    adapters.save(tmp_path / "both.safetensors", unet=tmp_path / "unet.safetensors", text_encoder=encoder)
    adapters.load(tmp_path / "both.safetensors", "both")
    adapters.set("both")
    assert torch.equal(picture(again), apart) and not torch.equal(apart, trained)
    again.save_pretrained(tmp_path / "changed")  # while it is active: a plain pipeline with the adapter in it
    adapters.disable()
    assert same_bits(pipe_bits(again), before)
    changed = quiet(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "changed", safety_checker=None))
    assert torch.equal(picture(changed), apart)


def test_a_file_is_read_again_when_it_is_needed_again(tmp_path):
    pipe = stable_diffusion()
    plain = {name.removeprefix("unet."): tensor for name, tensor in adapter(pipe, 1, ("unet",)).tensors.items()}
    shira.Adapter(plain).save(tmp_path / "plain.safetensors")
    adapters = PipelineAdapters(pipe, ready=1)
    adapters.load(tmp_path / "plain.safetensors")
    adapters.load(adapter(pipe, 2), "other")
    adapters.set("plain")
    first = pipe_bits(pipe)
    adapters.set("other")
    adapters.set("plain")
    assert same_bits(pipe_bits(pipe), first)
    adapters.set("other")
    (tmp_path / "plain.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        adapters.set("plain")
    assert adapters.active == {"other": 1.0}


def test_transposed_convolutions_in_any_model(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose2d(4, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 3, 4, 2, 1)
    ).eval()
    base, noise = all_bits(model), torch.randn(2, 4, 3, 3)
    with shira.attach(model, mask="wm", density=0.1, targets=["0", "3"]) as tuner:
        optimizer = torch.optim.Adam(tuner.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(noise).square().mean().backward()
            optimizer.step()
        trained = model(noise)
        tuner.adapter("faces").save(tmp_path / "faces.safetensors")
    switcher = shira.Switcher(model)
    switcher.add("faces", tmp_path / "faces.safetensors")
    switcher.use("faces")
    assert torch.equal(bits(model(noise)), bits(trained))
    switcher.use(None)
    assert same_bits(all_bits(model), base)


def test_by_step_changes_the_strength_and_the_base_is_back(pipe, adapters):
    base, plain, seen = pipe_bits(pipe), picture(pipe, 4), []

    def strengths(step, steps):
        seen.append((step, steps))
        return {"a": step / steps, "b": {"unet": {"mid": 0.5}}}

    changed = picture(pipe, 4, callback_on_step_end=adapters.by_step(strengths))
    assert seen == [(1, 4), (2, 4), (3, 4)] and adapters.active == {}
    assert same_bits(pipe_bits(pipe), base) and not torch.equal(changed, plain)
    adapters.set("a")
    before = pipe_bits(pipe)
    assert torch.equal(picture(pipe, 1), picture(pipe, 1, callback_on_step_end=adapters.by_step(strengths)))
    assert not torch.equal(picture(pipe, 2), picture(pipe, 2, callback_on_step_end=adapters.by_step(lambda step, steps: {})))
    assert same_bits(pipe_bits(pipe), before) and adapters.active == {"a": 1.0}


def test_a_constant_strength_by_step_is_that_strength(pipe, adapters):
    adapters.set("a", 0.5)
    assert torch.equal(
        picture(pipe, 3), picture(pipe, 3, callback_on_step_end=adapters.by_step(lambda step, steps: {"a": 0.5}))
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_pipeline_is_cast_while_adapters_are_active(dtype):
    pipe, reference = stable_diffusion(), stable_diffusion().to(dtype)
    pipe.to(dtype).to(torch.float32)  # values that the narrower dtype holds, or the adapters would belong to another base
    adapters = PipelineAdapters(pipe)
    adapters.load(adapter(pipe, 1), "a")
    adapters.load(adapter(pipe, 2), "b")
    adapters.set("a")
    adapters.fuse()
    adapters.set("b", 0.5)
    pipe.to(dtype)
    adapters.set("b")
    assert (adapters.fused, adapters.active) == ({"a": 1.0}, {"b": 1.0})
    adapters.unfuse()
    adapters.disable()
    assert same_bits(pipe_bits(pipe), pipe_bits(reference))


def test_a_compiled_denoiser_is_not_compiled_again():
    pipe = stable_diffusion()
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounter()
    adapters = PipelineAdapters(pipe)
    pipe.unet = torch.compile(pipe.unet, backend=counted)
    adapters.load(adapter(stable_diffusion(), 1), "a")
    adapters.load(adapter(stable_diffusion(), 2), "b")
    inputs = [torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 8, 16)]

    def output():
        with torch.no_grad():
            return bits(pipe.unet(*inputs).sample)

    plain, compiled = output(), counted.frame_count
    assert compiled
    seen = []
    for call in (
        lambda: adapters.set("a"),
        lambda: adapters.set(["a", "b"], 0.5),
        lambda: adapters.set("b", {"unet": {"mid": 0.5}}),
    ):
        call()
        seen.append(output())
        assert counted.frame_count == compiled
    assert not any(torch.equal(one, plain) for one in seen)
    adapters.disable()
    assert torch.equal(output(), plain) and counted.frame_count == compiled
    assert PipelineAdapters(pipe).names == []


def test_a_component_is_replaced():
    pipe = stable_diffusion()
    base = pipe_bits(pipe)
    adapters = PipelineAdapters(pipe)
    adapters.load(adapter(pipe, 1), "a")
    adapters.set("a")
    active, old = pipe_bits(pipe), pipe.unet
    pipe.unet = copy.deepcopy(old)  # a copy with the adapter's values in its weights
    adapters.set("a", 0.5)
    adapters.set("a")
    assert same_bits(pipe_bits(pipe), active)
    assert same_bits(all_bits(old), all_bits(unet()))
    pipe.unet = unet()  # the base loaded again
    adapters.set("a")
    assert same_bits(pipe_bits(pipe), active)
    adapters.disable()
    assert same_bits(pipe_bits(pipe), base)


@pytest.mark.parametrize("other", [lambda: unet(seed=9), lambda: unet(layers=2), lambda: None])
def test_another_component_gets_no_adapter_of_the_old_one(other):
    pipe = stable_diffusion()
    base = pipe_bits(pipe)
    adapters = PipelineAdapters(pipe)
    adapters.load(adapter(pipe, 1), "a")
    adapters.set("a")
    old, pipe.unet = pipe.unet, other()
    fresh = pipe_bits(pipe) | {name: value for name, value in base.items() if name.startswith("text_encoder.")}
    with pytest.raises(BaseMismatch):
        adapters.set("a", 0.5)
    assert adapters.active == {} and same_bits(pipe_bits(pipe), fresh)
    assert same_bits(
        {f"unet.{name}": b for name, b in all_bits(old).items()}, {n: b for n, b in base.items() if n.startswith("unet.")}
    )
    pipe.unet = old
    adapters.enable()
    assert adapters.active == {"a": 1.0}
    adapters.disable()
    assert same_bits(pipe_bits(pipe), base)


def test_a_component_that_comes_later():
    pipe = stable_diffusion()
    encoder, pipe.text_encoder = pipe.text_encoder, None
    adapters = PipelineAdapters(pipe)
    pipe.text_encoder = encoder
    adapters.load(adapter(pipe, 1), "a")
    adapters.set("a", {"unet": 0})
    adapters.disable()
    assert same_bits(pipe_bits(pipe), pipe_bits(stable_diffusion()))


def test_one_owner(pipe, adapters):
    adapters.set("a")
    with pytest.raises(shira.TuningError, match="already in use"):
        shira.attach(pipe.unet, mask="wm", density=0.1, targets=["to_q"])
    second = PipelineAdapters(diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False))
    with pytest.raises(SwitchError, match="already in use"):
        second.load(adapter(stable_diffusion(), 2), "b")
    adapters.disable()
    second.load(adapter(pipe, 2), "b")
    second.set("b")
    second.disable()


def test_offload_of_whole_models_moves_the_adapter_with_them():
    accelerate = pytest.importorskip("accelerate")
    pipe = stable_diffusion()
    base = pipe_bits(pipe)
    adapters = PipelineAdapters(pipe)
    adapters.load(adapter(pipe, 1), "a")
    adapters.set("a")
    wanted = picture(pipe)
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):  # enable_model_cpu_offload, without an accelerator
        accelerate.cpu_offload_with_hook(part, "cpu")
    assert torch.equal(picture(pipe), wanted)
    for part in (pipe.unet, pipe.text_encoder):  # to a device and back: other memory, the same values
        part._apply(lambda tensor: tensor.clone())
    adapters.set("a", 0.5)
    pipe.unet._apply(lambda tensor: tensor.clone())
    adapters.set("a")
    assert torch.equal(picture(pipe), wanted)
    adapters.disable()
    assert same_bits(pipe_bits(pipe), base)


def test_offload_of_single_weights_is_refused():
    accelerate = pytest.importorskip("accelerate")
    pipe = stable_diffusion()
    base = pipe_bits(pipe)
    adapters = PipelineAdapters(pipe)
    adapters.load(adapter(pipe, 1), "a")
    adapters.set("a")
    wanted = picture(pipe)
    accelerate.cpu_offload(pipe.unet, "cpu")  # enable_sequential_cpu_offload, without an accelerator
    for call in (adapters.disable, lambda: adapters.set("a", 0.5), lambda: adapters.load(adapter(stable_diffusion(), 2), "b")):
        with pytest.raises(SwitchError, match="remove_all_hooks"):
            call()
    assert torch.equal(picture(pipe), wanted)  # what is active moves along
    accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
    adapters.disable()
    assert same_bits(pipe_bits(pipe), base)


BLOCKS = {"unet": {"up": {"block_0": [0.5, 1.0]}, "down": 0.25}}
NAMES = st.lists(st.sampled_from("abd"), unique=True, max_size=3)
VERBS = ("disable", "enable", "fuse", "unfuse", "reload", "cast", "copy")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), NAMES, st.sampled_from([1.0, 0.5, -1.0, BLOCKS])),
        st.tuples(st.sampled_from(VERBS)),
        st.tuples(st.sampled_from(["delete", "load"]), st.sampled_from("abd")),
    ),
    max_size=12,
)


@given(STEPS)
@settings(max_examples=40)
def test_the_base_is_exact_after_any_sequence_of_calls(steps):
    pipe = stable_diffusion().to(torch.float16).to(torch.float32)
    made = {"a": adapter(pipe, 1), "b": adapter(pipe, 2, ("unet",)), "d": adapter(pipe, 4, kind="delta")}
    reference = {part: copy.deepcopy(getattr(pipe, part)) for part in PARTS if hasattr(pipe, part)}
    adapters = PipelineAdapters(pipe, ready=2)
    casts = [torch.float16, torch.float32]
    for verb, *what in steps:
        try:
            if verb == "set":
                adapters.set(*what)
            elif verb == "load":
                adapters.load(made[what[0]], what[0])
            elif verb == "delete":
                adapters.delete(what[0])
            elif verb == "reload" and len(casts) == 2:
                pipe.unet = copy.deepcopy(reference["unet"])
            elif verb == "cast" and casts:
                dtype = casts.pop(0)
                pipe.to(dtype)
                for model in reference.values():
                    model.to(dtype)
            elif verb == "copy":
                pipe.unet = copy.deepcopy(pipe.unet)
            elif verb in VERBS[:4]:
                getattr(adapters, verb)()
        except shira.ShiraError:
            pass
    adapters.unfuse()
    adapters.disable()
    assert adapters.active == adapters.fused == {}
    assert same_bits(
        pipe_bits(pipe), {f"{part}.{n}": b for part, model in reference.items() for n, b in all_bits(model).items()}
    )


INTERRUPTED = {
    "load": lambda adapters: adapters.load(adapters.third, "c"),
    "set": lambda adapters: adapters.set(["a", "b"], 0.5),
    "fuse": lambda adapters: (adapters.set("a"), adapters.fuse(), adapters.set("b")),
    "unfuse": lambda adapters: (adapters.set("a"), adapters.fuse(), adapters.unfuse(), adapters.disable()),
    "delete": lambda adapters: (adapters.set("a"), adapters.delete("a")),
    "replace": lambda adapters: (adapters.set("a"), setattr(adapters._pipe, "unet", adapters.copy), adapters.set("b")),
}


@pytest.mark.parametrize("call", INTERRUPTED)
def test_the_base_survives_interrupts(pipe, call):
    base, original = pipe_bits(pipe), pipe.unet
    parts = {"unet": copy.deepcopy(pipe.unet), "text_encoder": copy.deepcopy(pipe.text_encoder)}
    small = [adapter(SimpleNamespace(**parts), seed, share=0.02) for seed in (1, 2, 3)]
    few = ["unet.conv_in.weight", "unet.conv_out.weight", "text_encoder.encoder.layers.0.mlp.fc1.weight"]
    small = [shira.Adapter({name: each.tensors[name] for name in few}, each.metadata) for each in small]
    lines, line = 10**9, 10**9
    while line > 0:
        adapters = PipelineAdapters(pipe)
        adapters.third, adapters.copy = small[2], parts["unet"]
        adapters.load(small[0], "a")
        adapters.load(small[1], "b")
        with interrupted(line) as left:
            INTERRUPTED[call](adapters)
        assert bool(left) == (line == 10**9)
        lines = lines - left[0] if left else lines  # the first time nothing strikes, and the lines are counted
        adapters.unfuse()
        adapters.disable()
        assert same_bits(pipe_bits(pipe), base), line
        assert same_bits(all_bits(parts["unet"]), all_bits(original)), line
        pipe.unet = original
        adapters.set("b")
        adapters.disable()
        assert same_bits(pipe_bits(pipe), base), line
        line = min(line, lines) - 1 - lines // 20
    assert lines > 100


def test_the_snippets_of_the_page_run(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "diffusers.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    pipe = stable_diffusion()
    pipe.unet = unet(layers=2)
    base = pipe_bits(pipe)
    paintings = adapter(pipe, 2)
    shira.Adapter(paintings.tensors, paintings.metadata | {"name": "paintings"}).save("paintings.safetensors")
    run = pipe.__call__
    monkeypatch.setattr(type(pipe), "__call__", lambda self, *given, **more: run(*given, height=16, width=16, **more))
    names = {"pipe": pipe, "batches": [noise_batch(0), noise_batch(1)], "loss": noise_loss}
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, names)
    assert same_bits(pipe_bits(pipe), base)


@pytest.mark.slow
def test_the_benchmark_runs_in_small(run, tmp_path):
    code, out, err = run(f"bench diffusers --quick --plot {tmp_path}/plot.png")
    assert code == 0, err
    assert "0 of 1,120,548 changed" in out and (tmp_path / "plot.png").exists()
