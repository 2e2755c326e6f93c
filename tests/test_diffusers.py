"""Adapters of Diffusers' pipelines, on tiny random pipelines of the real classes: the calls, files, and wrong calls."""

import copy
import pickle
import re
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("PIL")

import diffusers
import torch
from torch import nn

import shira
from conftest import bits, same_bits
from pipelines import PARTS, flux, picture, pipe_adapter, pipe_bits, sd3, sdxl, stable_diffusion, unet
from shira import AdapterError, BaseMismatch, SwitchError
from shira.integrations.diffusers import PipelineAdapters

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Diffusers' Euler with NumPy 2.4
KINDS = {"sd": stable_diffusion, "xl": sdxl, "sd3": sd3, "flux": flux}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pipeline(kind, tmp_path):
    pipe = KINDS[kind]()
    before, plain = pipe_bits(pipe), picture(pipe)
    both = pipe_adapter(pipe, 1, PARTS[:4])
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
    adapters.load(pipe_adapter(pipe, 1), "a")
    adapters.set("a")
    kept = pipe_bits(pipe)
    adapters.release()
    adapters.disable()
    assert adapters.active == {} and same_bits(pipe_bits(pipe), kept)
    with pytest.raises(BaseMismatch):
        adapters.set("a")


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
    (lambda a: a.load(pipe_adapter(sd3(), 1), "c"), BaseMismatch, "changes 'transformer'; here are 'unet', 'text_encoder'"),
    (lambda a: a.load(pipe_adapter(sdxl(), 1), "c"), BaseMismatch, "does not belong"),
    (lambda a: a.load(pipe_adapter(flux(), 1, ("transformer",)), "c"), BaseMismatch, "changes 'transformer'"),
    (lambda a: a.load(pipe_adapter(a._pipe, 1), "c", component="vae"), AdapterError, "no component 'vae'"),
    (lambda a: a.load(pipe_adapter(a._pipe, 1), "c", component="unet"), BaseMismatch, "no tensor 'unet.unet"),
    (lambda a: a.save("x.safetensors"), AdapterError, "nothing to save"),
    (lambda a: a.by_step({"a": 1.0}), AdapterError, "expected a function of a step and of their number, by_step.*found"),
    (lambda a: a.save("x.safetensors", vae=pipe_adapter(a._pipe, 1)), AdapterError, "no component 'vae'"),
    (lambda a: a.save("x.safetensors", unet=pipe_adapter(a._pipe, 1)), BaseMismatch, "the adapter for unet"),
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
    tensors = dict(pipe_adapter(pipe, 1).tensors)
    tensors["conv_in.weight"] = tensors["unet.conv_in.weight"]
    with pytest.raises(AdapterError, match="'conv_in' is not a component"):
        adapters.load(shira.Adapter(tensors), "mixed")


def test_a_part_that_the_adapter_does_not_change(pipe, adapters):
    adapters.load(pipe_adapter(pipe, 3, ("unet",)), "c")
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
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", safety_checker=None)
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
    changed = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "changed", safety_checker=None)
    assert torch.equal(picture(changed), apart)


def test_a_file_is_read_again_when_it_is_needed_again(tmp_path):
    pipe = stable_diffusion()
    plain = {name.removeprefix("unet."): tensor for name, tensor in pipe_adapter(pipe, 1, ("unet",)).tensors.items()}
    shira.Adapter(plain).save(tmp_path / "plain.safetensors")
    adapters = PipelineAdapters(pipe, ready=1)
    adapters.load(tmp_path / "plain.safetensors")
    adapters.load(pipe_adapter(pipe, 2), "other")
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


def test_a_relative_path_is_of_the_folder_where_it_was_given(tmp_path, monkeypatch):
    pipe = stable_diffusion()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    pipe_adapter(pipe, 1).save("style.safetensors")
    pipe_adapter(pipe, 2).save("other/style.safetensors")
    adapters = PipelineAdapters(pipe)
    adapters.load("style.safetensors", "one")
    adapters.load(pipe_adapter(pipe, 1), "same")
    adapters.set("same")
    wanted = pipe_bits(pipe)
    monkeypatch.chdir("other")
    adapters.set("one")
    assert same_bits(pipe_bits(pipe), wanted)


def test_several_are_deleted_at_once_or_none(pipe, adapters):
    before = pipe_bits(pipe)
    adapters.set(["a", "b"])
    for wrong in (["a", "c"], [["a"]], 5):
        with pytest.raises(SwitchError, match="no adapter"):
            adapters.delete(wrong)
    assert adapters.names == ["a", "b"] and adapters.active == {"a": 1.0, "b": 1.0}
    adapters.delete(["a", "b", "a"])
    assert adapters.names == [] and adapters.active == {} and same_bits(pipe_bits(pipe), before)


def test_layerwise_casting_while_an_adapter_is_active_leaves_the_base_in_float8():
    pipe, plain = stable_diffusion(), stable_diffusion()
    for each in (pipe, plain):
        each.unet.to(torch.bfloat16)
    adapters = PipelineAdapters(pipe)
    adapters.load(pipe_adapter(pipe, 1, ("unet",)), "a")
    adapters.set("a")
    for each in (pipe, plain):
        each.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    adapters.disable()
    assert same_bits(pipe_bits(pipe), pipe_bits(plain))
    with pytest.raises(BaseMismatch, match="float8"):
        adapters.set("a")
    assert same_bits(pipe_bits(pipe), pipe_bits(plain))


def test_the_snippets_of_the_page_run(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "diffusers.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    pipe = stable_diffusion()
    pipe.unet = unet(layers=2)
    base = pipe_bits(pipe)
    paintings = pipe_adapter(pipe, 2)
    shira.Adapter(paintings.tensors, paintings.metadata | {"name": "paintings"}).save("paintings.safetensors")
    run = pipe.__call__
    monkeypatch.setattr(type(pipe), "__call__", lambda self, *given, **more: run(*given, height=16, width=16, **more))
    names = {"pipe": pipe, "batches": [noise_batch(0), noise_batch(1)], "loss": noise_loss}
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, names)
    assert same_bits(pipe_bits(pipe), base)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_the_adapters_of_a_pipeline_are_not_copied(adapters, copied):
    adapters.set("a")
    with pytest.raises(SwitchError, match=r"a PipelineAdapters belongs to one model.*copy: PipelineAdapters\(copy\)"):
        copied(adapters)
    assert adapters.active == {"a": 1.0}
