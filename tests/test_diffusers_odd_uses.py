"""What else users do with a pipeline's adapters: compiled blocks, strengths that change, names that are gone."""

import functools

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("PIL")

import numpy as np
import torch

import shira
from conftest import all_bits, same_bits
from pipelines import flux, pipe_adapter, pipe_bits, stable_diffusion
from shira import AdapterError, BaseMismatch, SwitchError, TargetError
from shira.integrations.diffusers import PipelineAdapters
from shira.training.foreign_names import PIPELINE_CALLS


def plain_bits(pipe):
    return {name.replace("._orig_mod", ""): value for name, value in pipe_bits(pipe).items()}


compiled = functools.partial(torch.compile, backend="eager")


def compile_blocks(pipe):
    """Compile blocks in their places, as Diffusers' documents do. They are never run here."""
    if hasattr(pipe, "unet"):
        pipe.unet.mid_block, pipe.unet.up_blocks[0] = (
            compiled(block) for block in (pipe.unet.mid_block, pipe.unet.up_blocks[0])
        )
    else:
        blocks = pipe.transformer.transformer_blocks
        for number in range(len(blocks)):
            blocks[number] = compiled(blocks[number])


@pytest.mark.parametrize("make", [stable_diffusion, flux])
@pytest.mark.parametrize("earlier", [True, False])
def test_blocks_are_compiled_in_their_places(make, earlier):
    pipe, other = make(), make()
    strengths = (
        {"unet": {"mid": {"resnets": [0.1, 0.2]}, "up": [[0.3]]}}
        if make is stable_diffusion
        else {"transformer": {"transformer_blocks": {"0": {"attn": 0.3}}}}
    )
    base, made = pipe_bits(pipe), pipe_adapter(pipe, 1)
    expected = PipelineAdapters(other)
    expected.load(made, "a")
    expected.set("a", strengths)
    if earlier:
        compile_blocks(pipe)
    adapters = PipelineAdapters(pipe)
    adapters.load(made, "a")
    if not earlier:
        adapters.set("a")
        compile_blocks(pipe)
    adapters.set("a", strengths)
    assert same_bits(plain_bits(pipe), pipe_bits(other))
    adapters.disable()
    assert same_bits(plain_bits(pipe), base)


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_a_strength_stays_what_it_was_when_it_was_given(pipe, adapters, make):
    strength, within = make(0.5), make([0.25])
    adapters.set("a", strength)
    before = pipe_bits(pipe)
    strength[...] = 0.9
    assert adapters.active == {"a": 0.5}
    adapters.disable()
    adapters.enable()
    assert same_bits(pipe_bits(pipe), before)
    adapters.set("a", {"unet": within})
    within[...] = 1.0
    assert adapters.active == {"a": {"unet": 0.25}}
    with pytest.raises(AdapterError, match="must be a finite number, found True"):
        adapters.set("a", make(True))


def test_an_adapter_is_deleted_within_the_steps_of_a_call(pipe, adapters):
    base = pipe_bits(pipe)
    adapters.set(["a", "b"])
    with pytest.warns(UserWarning, match="not called back"), adapters.by_step(lambda step, steps: {"a": step / steps}):
        adapters.delete("b")
    assert adapters.active == {"a": 1.0} and adapters.names == ["a"]
    with pytest.warns(UserWarning, match="not called back"), adapters.by_step(lambda step, steps: {"a": step / steps}):
        adapters.delete("a")
    assert adapters.active == {} and same_bits(pipe_bits(pipe), base)


def test_what_to_call_is_said_in_the_words_of_a_pipeline():
    pipe = stable_diffusion()
    adapters = PipelineAdapters(pipe)
    adapters.load(pipe_adapter(pipe, 1), "a")
    adapters.set("a")
    with torch.no_grad():
        pipe.unet.conv_in.weight.add_(1)
    for call in (lambda: adapters.set("a", 0.5), adapters.disable):
        with pytest.raises(SwitchError, match=r"next time call disable\(\) first"):
            call()
    for name in ([], {}, None):
        with pytest.raises(SwitchError, match="no adapter"):
            adapters.adapter(name)


@pytest.mark.parametrize(
    ("call", "given", "words"),
    [
        ("load", {"adapter": "a", "adapter_name": "z"}, r"load\(\) .* 'adapter_name'; here it is name= \(docs/diffusers.md\)"),
        ("load", {"adapter": "a", "weight_name": "z"}, "'weight_name'; here it is adapter=, the path of the file"),
        ("set", {"names": "a", "adapter_weights": 0.5}, r"set\(\) .* 'adapter_weights'; here it is strengths= "),
        ("set", {"adapter_names": "a"}, "'adapter_names'; here it is names= "),
        ("load", {"adapter": "a", "hotswap": True}, "'hotswap'; there is no such setting here, leave it out"),
        ("fuse", {"lora_scale": 0.7}, r"'lora_scale'; give the strength to set\(names, strengths\) before"),
    ],
)
def test_names_of_diffusers_are_answered_with_ours(adapters, call, given, words):
    now = adapters.active
    with pytest.raises(TypeError, match=words):
        getattr(adapters, call)(**given)
    with pytest.raises(AdapterError, match="fusion method 'sum' has no option 'strenght'"):
        adapters.set("a", strenght=0.5)
    assert adapters.active == now


def test_calls_of_diffusers_are_answered_with_ours(adapters):
    for theirs, ours in PIPELINE_CALLS.items():
        assert not hasattr(adapters, theirs) and hasattr(adapters, ours.partition("(")[0]) == (
            " " not in ours.partition("(")[0]
        )
    with pytest.raises(AttributeError, match=r"'set_adapters'; here it is set\(names, strengths\) \(docs/diffusers.md\)"):
        adapters.set_adapters(["a", "b"], adapter_weights=[0.7, 0.8])
    with pytest.raises(AttributeError, match="a PipelineAdapters has no 'sett'$"):
        adapters.sett("a")


def test_an_adapter_of_a_text_encoder_needs_its_component(tmp_path):
    pipe = stable_diffusion()
    made = pipe_adapter(pipe, 1, ("text_encoder",))
    plain = {name.removeprefix("text_encoder."): tensor for name, tensor in made.tensors.items()}
    shira.Adapter(plain).save(tmp_path / "text.safetensors")
    adapters = PipelineAdapters(pipe)
    for given in (shira.Adapter(plain), tmp_path / "text.safetensors"):
        with pytest.raises(shira.BaseMismatch, match='say component="text_encoder"'):
            adapters.load(given, "text")
        assert adapters.names == []
    assert adapters.load(tmp_path / "text.safetensors", component="text_encoder") == "text"
    with pytest.raises(shira.BaseMismatch, match="has no tensor 'unet.x.weight'(?!.*component)"):
        adapters.load(shira.Adapter({"x.weight": next(iter(plain.values()))}), "other")


@pytest.mark.parametrize("make", [stable_diffusion, flux])
def test_projections_that_attention_does_not_read_are_refused(make):
    """After `fuse_qkv_projections` it reads copies: nothing that is trained or written would have an effect."""
    pipe = make()
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    with shira.attach(model, targets=["to_q"]) as tuner:
        adapter = tuner.adapter("a")
    base = pipe_bits(pipe)
    model.fuse_qkv_projections()
    for targets in (["to_q"], ["to_k"], "all-linear"):
        with pytest.raises(TargetError, match=r"to_[qk].weight' belongs to a projection .* unfuse_qkv_projections\(\) first"):
            shira.attach(model, targets=targets)
    with pytest.raises(TargetError, match="projection of which attention reads a copy"):
        shira.attach(model, start=adapter)
    with pytest.raises(BaseMismatch, match="projection of which attention reads a copy"):
        shira.Switcher(model).add("a", adapter)
    assert same_bits(base, {name: each for name, each in pipe_bits(pipe).items() if name in base})
    with shira.attach(model, targets=["to_out.0"]):
        pass
    model.unfuse_qkv_projections()
    switcher = shira.Switcher(model)
    switcher.add("a", adapter)
    switcher.use("a")
    switcher.use(None)
    assert same_bits(base, {name: each for name, each in pipe_bits(pipe).items() if name in base})


@pytest.mark.parametrize("gone", [False, True])
def test_what_does_not_fit_a_new_component_is_taken_out_without_an_error(tmp_path, gone):
    pipe = stable_diffusion()
    base, half = pipe_bits(pipe), stable_diffusion().unet.half()
    adapters = PipelineAdapters(pipe)
    pipe_adapter(pipe, 1).save(tmp_path / "a.safetensors")
    adapters.load(tmp_path / "a.safetensors", "a")
    adapters.set("a")
    old, pipe.unet = pipe.unet, stable_diffusion().unet if gone else stable_diffusion().unet.half()
    if gone:
        (tmp_path / "a.safetensors").unlink()
    adapters.disable()
    assert adapters.active == {} and same_bits(all_bits(pipe.unet), all_bits(stable_diffusion().unet if gone else half))
    with pytest.raises(FileNotFoundError if gone else BaseMismatch):
        adapters.enable()
    pipe.unet = old
    assert same_bits(pipe_bits(pipe), base)


def test_release_after_a_component_was_replaced_keeps_the_adapter_in_the_new_one():
    pipe, base = stable_diffusion(), pipe_bits(stable_diffusion())
    adapters = PipelineAdapters(pipe)
    adapters.load(pipe_adapter(pipe, 1), "a")
    adapters.set("a")
    wanted = pipe_bits(pipe)
    old, pipe.unet = pipe.unet, stable_diffusion().unet
    adapters.release()
    assert same_bits(pipe_bits(pipe), wanted)
    assert same_bits(
        {f"unet.{name}": each for name, each in all_bits(old).items()}, {n: b for n, b in base.items() if n[:4] == "unet"}
    )


def test_layers_that_are_cast_in_each_forward_pass_do_not_train():
    """Not even in plain torch: their weights have another dtype in the backward pass."""
    model = stable_diffusion().unet
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    before = all_bits(model)
    with pytest.raises(
        TargetError, match=r"to_q.weight' belongs to a layer whose weights are cast .*\(enable_layerwise_casting\)"
    ):
        shira.attach(model, targets=["to_q"])
    assert same_bits(all_bits(model), before)


def test_weights_that_accelerate_keeps_elsewhere_are_refused_with_what_to_do():
    accelerate = pytest.importorskip("accelerate")
    model = stable_diffusion().unet
    with shira.attach(model, targets=["to_q"]) as tuner:
        adapter = tuner.adapter("a")
    accelerate.cpu_offload(model, "cpu")
    with pytest.raises(TargetError, match=r"to_q.weight' .* on meta, without data; if accelerate .*pipe.remove_all_hooks\(\)"):
        shira.attach(model, targets=["to_q"])
    with pytest.raises(BaseMismatch, match=r"to_q.weight' .* on the meta device; .*pipe.remove_all_hooks\(\)"):
        shira.Switcher(model).add("a", adapter)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    shira.Switcher(model).add("a", adapter)
