"""Strengths of adapters of pipelines: by component, by block, by step."""

import copy
import re
from types import SimpleNamespace

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("PIL")

import numpy as np
import torch

import shira
from conftest import same_bits
from pipelines import picture, pipe_adapter, pipe_bits, sd3, stable_diffusion
from shira import AdapterError, SwitchError
from shira.integrations.diffusers import PipelineAdapters


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
    made = pipe_adapter(pipe, 1)
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
        ({"unet": {"mid": np.float32(0.5), "up": [np.int64(0), torch.tensor(0.25)]}}, {"unet.mid_block.": 0.5}),
        ({}, {"unet.": 1}),
    ],
)
def test_further_strengths_by_block(pipe, adapters, given, rules):
    found = strengths_by_tensor(pipe, adapters, pipe_adapter(pipe, 1), given)
    for start, expected in rules.items():
        meant = {found[name] for name in found if re.match(start, name) and "samplers" not in name}
        assert meant == {expected}, start


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"up": 0.2, "up_blocks": 0.9}, "'up' and 'up_blocks' in 'unet' both set 'unet.up_blocks.*'; give one of them"),
        ({"up": {"block_0": 0.1}, "up_blocks.0": 0.9}, "'up' and 'up_blocks.0' in 'unet' both set 'unet.up_blocks.0.*'"),
        ({"up": {0: 0.1, "block_0": 0.9}}, "0 and 'block_0' in 'unet.up_blocks' both set 'unet.up_blocks.0.*'"),
    ],
)
def test_two_names_of_one_part_are_refused(pipe, adapters, given, words):
    before = pipe_bits(pipe)
    with pytest.raises(AdapterError, match=re.escape(words)):
        adapters.set("a", {"unet": given})
    assert adapters.active == {} and same_bits(pipe_bits(pipe), before)


def test_blocks_without_entries_are_no_error(pipe, adapters):
    made = pipe_adapter(pipe, 3)
    only = {name: tensor for name, tensor in made.tensors.items() if "up_blocks.0.attentions" in name}
    adapters.load(shira.Adapter(only, made.metadata), "up")
    adapters.set("up", {"unet": {"down": 0.9, "mid": 1, "up": {"block_0": [0.5, 1.0], "block_1": 0.3}}})
    assert adapters.active


def test_nested_names_of_a_transformer():
    pipe = sd3()
    adapters = PipelineAdapters(pipe)
    made = pipe_adapter(pipe, 1, ("transformer",))
    adapters.load(made, "a")
    given = {"transformer": {"transformer_blocks": [0.5, 0.25], "proj_out": 0, "pos_embed.proj": 0.75}}
    found = strengths_by_tensor(pipe, adapters, made, given)
    rules = {"transformer_blocks.0": 0.5, "transformer_blocks.1": 0.25, "proj_out": 0, "pos_embed": 0.75}
    for name, value in found.items():
        assert value == next((v for start, v in rules.items() if name.startswith(f"transformer.{start}")), 1.0), name


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


def test_by_step_with_a_method(pipe, adapters):
    adapters.set(["a", "b"], method="ties", density=0.5)
    wanted, both = picture(pipe, 3), {"a": 1.0, "b": 1.0}
    by_step = adapters.by_step(lambda step, steps: both, method="ties", density=0.5)
    assert torch.equal(picture(pipe, 3, callback_on_step_end=by_step), wanted)
    assert not torch.equal(picture(pipe, 3, callback_on_step_end=adapters.by_step(lambda step, steps: both)), wanted)


def test_a_block_around_a_call_by_step_sets_what_was_set_before(pipe, adapters):
    base = pipe_bits(pipe)
    with adapters.by_step(lambda step, steps: {"a": step / steps}) as at_step_end:
        for step in range(3):  # SDXL's ControlNets with denoising_end say 5 steps and run 3
            at_step_end(SimpleNamespace(num_timesteps=5), step, None, {})
        assert adapters.active == {"a": 0.6}
    assert adapters.active == {} and same_bits(pipe_bits(pipe), base)
    with pytest.raises(KeyboardInterrupt), adapters.by_step(lambda step, steps: {"a": 1.0}) as at_step_end:
        at_step_end(SimpleNamespace(num_timesteps=5), 0, None, {})
        raise KeyboardInterrupt
    assert adapters.active == {} and same_bits(pipe_bits(pipe), base)
    with pytest.warns(UserWarning, match="has not called back"), adapters.by_step(lambda step, steps: {"a": 1.0}):
        picture(pipe, 1)


def ends_after(call, last):
    """A `callback_on_step_end` that calls this one, and ends the picture after a step, as Diffusers' guides tell users to."""

    def at_step_end(pipe, step, timestep, tensors):
        tensors = call(pipe, step, timestep, tensors)
        pipe._interrupt = step == last
        return tensors

    return at_step_end


def test_a_block_by_step_sets_what_was_set_before_it_after_a_picture_that_was_ended_early(pipe, adapters):
    adapters.set("b", 0.7)
    before = pipe_bits(pipe)
    with adapters.by_step(lambda step, steps: {"a": step / steps}) as at_step_end:
        picture(pipe, 4, callback_on_step_end=ends_after(at_step_end, 1))
        picture(pipe, 4, callback_on_step_end=at_step_end)
    assert adapters.active == {"b": 0.7} and same_bits(pipe_bits(pipe), before)


def drawn_by(pipe, steps, choose):
    """A picture whose denoiser's n-th call is replaced by the mean of its calls with what choose(n) sets, one after another."""
    forward, calls = pipe.unet.forward, []

    def instead(*args, **options):
        found = []
        for activate in choose(len(calls)):
            activate()
            found.append(forward(*args, **options)[0])
        calls.append(len(found))
        return (torch.stack(found).mean(0),)

    pipe.unet.forward = instead
    try:
        return picture(pipe, steps), calls
    finally:
        del pipe.unet.forward


@pytest.mark.parametrize("steps, averaged", [(5, 0), (5, 1), (4, 2), (3, 9), (1, 1)])
def test_adapters_take_turns(steps, averaged):
    pipe = stable_diffusion()
    adapters = PipelineAdapters(pipe)
    for seed, name in enumerate("abc"):
        adapters.load(pipe_adapter(pipe, seed, ("unet",)), name)
    given, base = {"a": 1.0, "b": {"unet": {"mid": 0.5}}, "c": 0.5}, pipe_bits(pipe)
    each = [lambda name=name, strength=strength: adapters.set({name: strength}) for name, strength in given.items()]
    wanted, calls = drawn_by(pipe, steps, lambda n: [each[n % 3]] if n < steps - averaged else each)
    assert sum(calls) == steps + 2 * min(averaged, steps)
    adapters.set("b")
    before = pipe_bits(pipe)
    with adapters.in_turn(given, averaged=averaged) as at_step_end:
        for _ in range(2):  # the second picture begins with the first adapter, too
            assert adapters.active == {"a": 1.0}
            assert torch.equal(picture(pipe, steps, callback_on_step_end=at_step_end), wanted)
    assert adapters.active == {"b": 1.0} and same_bits(pipe_bits(pipe), before)
    adapters.disable()
    assert same_bits(pipe_bits(pipe), base) and not pipe.unet._forward_hooks


def test_turns_end_with_their_block(pipe, adapters):
    base = pipe_bits(pipe)
    with pytest.raises(KeyboardInterrupt), adapters.in_turn(["a", "b"]) as at_step_end:
        at_step_end(SimpleNamespace(num_timesteps=5), 0, None, {})
        assert adapters.active == {"b": 1.0}
        raise KeyboardInterrupt
    assert adapters.active == {} and same_bits(pipe_bits(pipe), base) and not pipe.unet._forward_hooks
    with pytest.raises(SwitchError, match="in_turn works in its block"):
        picture(pipe, 2, callback_on_step_end=adapters.in_turn(["a", "b"]))
    with pytest.warns(UserWarning, match="has not called back"), adapters.in_turn(["a", "b"]):
        picture(pipe, 2)
    assert adapters.active == {} and same_bits(pipe_bits(pipe), base)


def in_turn(pipe, adapters, steps=3):
    """A picture of three steps in turn by a and b."""
    with adapters.in_turn(["a", "b"]) as at_step_end:
        return picture(pipe, steps, callback_on_step_end=at_step_end)


def test_turns_after_a_picture_that_was_ended_early_begin_again(pipe, adapters):
    wanted = in_turn(pipe, adapters)
    with adapters.in_turn(["a", "b"]) as at_step_end:
        picture(pipe, 3, callback_on_step_end=ends_after(at_step_end, 0))
        with pytest.raises(SwitchError, match="ended after 1 steps.* call the pipeline again"):
            picture(pipe, 3, callback_on_step_end=at_step_end)
        assert torch.equal(picture(pipe, 3, callback_on_step_end=at_step_end), wanted)
    assert adapters.active == {}


@pytest.mark.parametrize("when", ["before the block", "in the block", "in another pipeline"])
def test_turns_follow_the_denoiser_of_the_pipeline_that_draws(when):
    pipe = stable_diffusion()
    adapters = PipelineAdapters(pipe)
    for seed, name in enumerate("ab"):
        adapters.load(pipe_adapter(pipe, seed, ("unet",)), name)
    wanted, drawn = in_turn(pipe, adapters), pipe
    picture(pipe, 7)
    block, old, new = adapters.in_turn(["a", "b"]), pipe.unet, copy.deepcopy(pipe.unet)
    if when == "before the block":
        pipe.unet = new
    elif when == "in another pipeline":
        drawn = type(pipe)(**pipe.components, requires_safety_checker=False)
    with block as at_step_end:
        if when == "in the block":
            pipe.unet = new
            adapters.set("a")
        assert torch.equal(picture(drawn, 3, callback_on_step_end=at_step_end), wanted)
    assert not old._forward_hooks and not new._forward_hooks


def test_a_block_of_turns_in_itself_is_refused(pipe, adapters):
    wanted = in_turn(pipe, adapters)
    with adapters.in_turn(["a", "b"]) as at_step_end:
        with pytest.raises(SwitchError, match="has begun already"), at_step_end:
            pass
        assert torch.equal(picture(pipe, 3, callback_on_step_end=at_step_end), wanted)
    assert adapters.active == {} and not pipe.unet._forward_hooks


def test_turns_of_a_compiled_denoiser_and_of_a_transformer():
    pipe = sd3()
    adapters = PipelineAdapters(pipe)
    for seed, name in enumerate("ab"):
        adapters.load(pipe_adapter(pipe, seed, ("transformer",)), name)
    pictures = []
    for compiled in (False, True):
        if compiled:
            pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        with adapters.in_turn(["a", "b"]) as at_step_end:
            pictures.append(picture(pipe, 3, callback_on_step_end=at_step_end))
    assert torch.equal(*pictures)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda a: a.in_turn("a"), "expected two adapters or more"),
        (lambda a: a.in_turn(["a", "x"]), "no adapter 'x'"),
        (lambda a: a.in_turn({"a": 1.0, "b": {"vae": 1.0}}), "no component 'vae'"),
        (lambda a: a.in_turn(["a", "b"], averaged=-1), "averaged must be a number of steps"),
        (lambda a: a.in_turn(["a", "b"], averaged=True), "averaged must be a number of steps"),
    ],
)
def test_turns_that_are_refused(pipe, adapters, wrong, message):
    with pytest.raises((AdapterError, SwitchError), match=message):
        wrong(adapters)
    assert adapters.active == {}


def test_strengths_are_the_users_and_those_of_zero_are_not_fused(pipe, adapters):
    given = {"unet": {"mid": 0.5}}
    adapters.set({"a": given, "b": torch.zeros(1, requires_grad=True).sum()})
    given["unet"]["mid"] = 9.0
    adapters.active["a"]["unet"]["mid"] = 9.0
    assert adapters.active == {"a": {"unet": {"mid": 0.5}}}
    adapters.fuse()
    assert list(adapters.fused) == ["a"]
    adapters.delete("b")
    adapters.unfuse()


@pytest.mark.parametrize("name, words", [("a", "delete it first"), ("", "a string that is not empty"), (3, "found 3")])
def test_names_that_cannot_be_taken(pipe, adapters, name, words):
    with pytest.raises(SwitchError, match=words):
        adapters.load(pipe_adapter(pipe, 2), name)
    assert adapters.names == ["a", "b"]


def test_a_folder_of_pefts_shira(pipe, adapters, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(copy.deepcopy(pipe.unet), peft.ShiraConfig(r=2, target_modules=["to_q", "to_v"], random_seed=1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shira" in name:
                parameter.add_(0.5)
    model.save_pretrained(tmp_path / "peft")
    base = pipe_bits(pipe)
    assert adapters.load(tmp_path / "peft", "peft") == "peft"
    adapters.set("peft")
    assert not same_bits(pipe_bits(pipe), base)
    adapters.disable()
    assert same_bits(pipe_bits(pipe), base)
