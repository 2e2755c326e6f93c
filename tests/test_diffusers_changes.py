"""What is done to a pipeline, and what interrupts, between two calls of its adapters: the base is never lost."""

import copy
import functools
import gc
import os
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("PIL")

import diffusers
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import shira
from conftest import all_bits, bits, same_bits
from interrupting import interrupted
from pipelines import PARTS, picture, pipe_adapter, pipe_bits, stable_diffusion, unet
from shira import AdapterError, BaseMismatch, SwitchError
from shira.integrations.diffusers import PipelineAdapters


def one_active():
    """A pipeline of its own, the bits of its base, and its adapters, one of them active."""
    pipe = stable_diffusion()
    base = pipe_bits(pipe)
    adapters = PipelineAdapters(pipe)
    adapters.load(pipe_adapter(pipe, 1), "a")
    adapters.set("a")
    return pipe, base, adapters


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_pipeline_is_cast_while_adapters_are_active(dtype):
    pipe, reference = stable_diffusion(), stable_diffusion().to(dtype)
    pipe.to(dtype).to(torch.float32)  # values that the narrower dtype holds, or the adapters would belong to another base
    adapters = PipelineAdapters(pipe)
    adapters.load(pipe_adapter(pipe, 1), "a")
    adapters.load(pipe_adapter(pipe, 2), "b")
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
    adapters.load(pipe_adapter(stable_diffusion(), 1), "a")
    adapters.load(pipe_adapter(stable_diffusion(), 2), "b")
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
    pipe, base, adapters = one_active()
    active, old = pipe_bits(pipe), pipe.unet
    pipe.unet = copy.deepcopy(old)  # a copy with the adapter's values in its weights
    adapters.set("a", 0.5)
    adapters.set("a")
    assert same_bits(pipe_bits(pipe), active)
    assert same_bits(all_bits(old), all_bits(stable_diffusion().unet))
    pipe.unet = stable_diffusion().unet  # the base loaded again
    adapters.set("a")
    assert same_bits(pipe_bits(pipe), active)
    adapters.disable()
    assert same_bits(pipe_bits(pipe), base)


@pytest.mark.parametrize("other", [lambda: stable_diffusion(seed=9).unet, lambda: unet(layers=2), lambda: None])
def test_another_component_gets_no_adapter_of_the_old_one(other):
    pipe, base, adapters = one_active()
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
    adapters.load(pipe_adapter(pipe, 1), "a")
    adapters.set("a", {"unet": 0})
    adapters.disable()
    assert same_bits(pipe_bits(pipe), pipe_bits(stable_diffusion()))


def test_one_owner(pipe, adapters):
    adapters.set("a")
    with pytest.raises(shira.TuningError, match="already in use"):
        shira.attach(pipe.unet, mask="wm", density=0.1, targets=["to_q"])
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    for each in (pipe, other):  # the first is a notebook's cell that is run again
        with pytest.raises(SwitchError, match=r"a PipelineAdapters has 'a' active in it; call its disable\(\) first"):
            PipelineAdapters(each)
    adapters.disable()
    second = PipelineAdapters(other)
    adapters.set("a")
    with pytest.raises(SwitchError, match="already in use"):
        second.load(pipe_adapter(stable_diffusion(), 2), "b")
    adapters.disable()
    second.load(pipe_adapter(pipe, 2), "b")
    second.set("b")
    second.disable()


def test_the_next_one_gets_the_base_if_the_first_is_dropped_while_active():
    pipe, base, adapters = one_active()
    adapters.fuse()
    active = pipe_bits(pipe)
    del adapters
    gc.collect()
    assert same_bits(pipe_bits(pipe), active) and not same_bits(active, base)
    PipelineAdapters(pipe)
    assert same_bits(pipe_bits(pipe), base)


def test_offload_of_whole_models_moves_the_adapter_with_them():
    accelerate = pytest.importorskip("accelerate")
    pipe, base, adapters = one_active()
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
    pipe, base, adapters = one_active()
    wanted = picture(pipe)
    accelerate.cpu_offload(pipe.unet, "cpu")  # enable_sequential_cpu_offload, without an accelerator
    other = pipe_adapter(stable_diffusion(), 2)
    for call in (adapters.disable, lambda: adapters.set("a", 0.5), lambda: adapters.load(other, "b")):
        with pytest.raises(SwitchError, match="remove_all_hooks"):
            call()
    assert torch.equal(picture(pipe), wanted)  # what is active moves along
    accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
    adapters.disable()
    assert same_bits(pipe_bits(pipe), base)


def test_offload_of_one_block_and_offload_to_disk_are_refused(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    pipe, base, adapters = one_active()
    accelerate.cpu_offload(pipe.unet.mid_block, "cpu")
    with pytest.raises(SwitchError, match=r"weights of pipe.unet outside.*pipe.remove_all_hooks\(\)"):
        adapters.disable()
    accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
    adapters.disable()
    assert same_bits(pipe_bits(pipe), base)
    cpu = torch.device("cpu")
    hooks = diffusers.hooks.apply_group_offloading
    hooks(pipe.unet, onload_device=cpu, offload_device=cpu, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    plain = picture(pipe)
    with pytest.raises(SwitchError, match="weights of pipe.unet from disk.*leave offload_to_disk_path out"):
        adapters.set("a")
    assert adapters.active == {} and torch.equal(picture(pipe), plain)


def test_fused_projections_are_refused():
    """They are copies of the weights: what is written would change no picture, and the base would not come back in them."""
    pipe, base, adapters = one_active()
    plain, adapters_own = picture(stable_diffusion()), picture(pipe)
    pipe.fuse_qkv_projections()
    for call in (adapters.disable, lambda: adapters.set("a", 0.5)):
        with pytest.raises(SwitchError, match=r"pipe.unet computes with copies.*call pipe.unet.unfuse_qkv_projections\(\)"):
            call()
    pipe.unfuse_qkv_projections()
    assert torch.equal(picture(pipe), adapters_own)
    adapters.disable()
    assert same_bits({name: base[name] for name in base}, {n: b for n, b in pipe_bits(pipe).items() if n in base})
    assert torch.equal(picture(pipe), plain)


def test_what_is_fused_keeps_its_method(pipe, adapters):
    base = pipe_bits(pipe)
    adapters.load(pipe_adapter(pipe, 7, ("text_encoder",)), "c")
    adapters.set(["a", "b"], method="ties", density=0.5)
    adapters.fuse()
    fused = pipe_bits(pipe)
    adapters.set([])
    assert same_bits(pipe_bits(pipe), fused)
    adapters.set("c", method="sum")
    adapters.disable()
    assert same_bits(pipe_bits(pipe), fused)
    adapters.enable()
    adapters.delete("c")
    assert same_bits(pipe_bits(pipe), fused) and adapters.fused == {"a": 1.0, "b": 1.0}
    adapters.unfuse()
    assert same_bits(pipe_bits(pipe), base)


@pytest.mark.parametrize("by_step", [False, True])
def test_threads_take_turns(pipe, adapters, monkeypatch, by_step):
    """Without turns a is written after b, and b is noted after a; then `active` would be wrong."""
    adapters.set("a")
    begun, written, noted = threading.Event(), threading.Event(), threading.Event()
    last = functools.partial(adapters.by_step(dict), SimpleNamespace(num_timesteps=1), 0, None, {})  # sets a again
    real = adapters._switcher.use

    def use(selection, *method, **options):
        if "a" in selection:
            begun.set()
            written.wait(0.3)
        real(selection, *method, **options)
        if "b" in selection:
            written.set()
            noted.wait(0.3)

    monkeypatch.setattr(adapters._switcher, "use", use)
    second = threading.Thread(target=lambda: (begun.wait(10), adapters.set("b")))
    second.start()
    last() if by_step else adapters.set("a")
    noted.set()
    second.join(10)
    now = pipe_bits(pipe)
    adapters.set(*adapters.active)
    assert same_bits(pipe_bits(pipe), now)


def test_active_is_what_is_in_the_weights_after_an_interrupt(pipe, adapters):
    states = {}
    for strengths in ({}, {"a": 1.0}, {"a": 0.5}, {"b": 1.0}):
        adapters.set(strengths)
        states[str(strengths)] = pipe_bits(pipe)
    for wanted in ({"b": 1.0}, {"a": 0.5}):
        adapters.set("a")
        with interrupted(10**9) as left:
            adapters.set(wanted)
        lines = 10**9 - left[0]
        for line in range(lines - 25, lines):  # the last ones: in them the weights are written
            adapters.set("a")
            with interrupted(line):
                adapters.set(wanted)
            assert same_bits(states[str(adapters.active)], pipe_bits(pipe)), line


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
@settings(max_examples=400 if os.environ.get("SHIRA_LONG") else 15)
def test_the_base_is_exact_after_any_sequence_of_calls(steps):
    pipe = stable_diffusion().to(torch.float16).to(torch.float32)
    made = {"a": pipe_adapter(pipe, 1), "b": pipe_adapter(pipe, 2, ("unet",)), "d": pipe_adapter(pipe, 4, kind="delta")}
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
    small = [pipe_adapter(SimpleNamespace(**parts), seed, share=0.02) for seed in (1, 2, 3)]
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
