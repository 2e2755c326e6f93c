"""`shira play` with a pipeline of Diffusers: both pictures, strengths by block, the light, a saved set."""

import threading

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("PIL")

import shira
from conftest import same_bits
from pipelines import pipe_adapter, pipe_bits
from shira.integrations.diffusers_sampling import sample
from shira.play.asking import Drawing, Setting
from shira.play.pictures import Pictures

ASKED = Drawing("a dog", steps=2)


@pytest.fixture
def play(pipe, adapters, tmp_path):
    return Pictures("tiny", pipe, adapters, tmp_path)


def whole(place, **settings):
    return list(place.run(ASKED, settings, threading.Event()))[-1]


def test_both_pictures_and_the_base_is_back(play, pipe, adapters):
    before = pipe_bits(pipe)
    expected = sample(pipe, "a dog", 0, steps=2)
    adapters.set({"a": 0.5})
    other = sample(pipe, "a dog", 0, steps=2)
    adapters.disable()
    seen = list(play.run(ASKED, {"a": Setting(0.5)}, threading.Event()))
    assert seen[-1].base == expected and seen[-1].adapted == other and expected != other
    assert any("step 2 of 2" in each.note for each in seen) and seen[-1].milliseconds > 0
    assert play.light.exact and same_bits(before, pipe_bits(pipe))
    bias = pipe.vae.decoder.conv_in.bias.data
    was = bias.clone()
    bias[0] += 1
    assert play.check().exact is False and "vae.decoder.conv_in.bias" in play.light.text
    bias.copy_(was)


def test_strengths_by_block_live_and_saved(play, adapters, pipe):
    assert play.blocks == ["unet, down", "unet, mid", "unet, up", "text_encoder"]
    setting = Setting(0.8, (("unet, down", 0.5), ("unet, mid", 1.0), ("unet, up", 0.0), ("text_encoder", 1.25)))
    seen = whole(play, b=setting)
    adapters.set({"b": {"*": 0.8, "unet": {"*": 0.8, "down": 0.4, "mid": 0.8, "up": 0.0}, "text_encoder": 1.0}})
    assert seen.adapted == sample(pipe, "a dog", 0, steps=2)
    adapters.disable()
    name = play.add(play.fuse({"b": setting}))
    assert whole(play, **{name: Setting(1.0)}).adapted == seen.adapted
    found = play.compare("b", name).total.pairs[0]
    assert found.overlap == 1.0 and found.cosine > 0.5
    adapters.set([])
    adapters.delete(name)


def test_an_adapter_as_it_was_loaded(adapters, pipe):
    made = pipe_adapter(pipe, 1)
    assert adapters.adapter("a").tensors.keys() == made.tensors.keys()
    with pytest.raises(shira.errors.SwitchError, match="no adapter 'c'"):
        adapters.adapter("c")
