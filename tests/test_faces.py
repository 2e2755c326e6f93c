"""Styles on a face generator: the filters, and adapters of a tiny random generator of the same classes."""

import copy

import numpy as np
import pytest
import torch
from experiments.image import face_styles
from experiments.image import faces as command
from experiments.image.dcgan import Generator, convolutions, drawn, latents, load
from experiments.image.face_styles import LOW_RANK
from experiments.image.filters import bluefire, paintings
from experiments.store import Store
from PIL import Image

import shira
from conftest import bits, same_bits
from shira import DataError


def on_white(side, width=None):
    """A red disc with a white eye, on white."""
    height, width = side, width or side
    y, x = np.mgrid[:height, :width]
    far = np.hypot(y - height / 2, x - width / 2)
    made = np.full((height, width, 3), 255, np.uint8)
    made[far < side * 0.4] = (220, 40, 30)
    made[far < side * 0.1] = 255
    return made


@pytest.mark.parametrize("style", [bluefire, paintings])
@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (40, 56)])
def test_a_filter_keeps_the_shape_and_repeats_itself(style, shape):
    picture = on_white(*shape)
    before = picture.copy()
    made = style(picture, 3)
    assert made.shape == picture.shape and made.dtype == np.uint8
    assert np.array_equal(picture, before)
    assert np.array_equal(made, style(picture, 3)) and not np.array_equal(made, style(picture, 4))
    assert np.abs(made.astype(int) - picture).mean() > 20


def test_blue_fire_on_white_ground():
    made = bluefire(on_white(64), 0).astype(int)
    assert made[-3:].min() == 255  # below the object, where no flames rise
    above = made[2:6, 28:36].reshape(-1, 3)
    assert (above[:, 2] > above[:, 0] + 10).mean() > 0.9  # flames
    disc = made[20:28, 20:44].reshape(-1, 3)
    assert (disc[:, 2] > disc[:, 0] + 40).mean() > 0.9
    eye = made[30:34, 30:34]
    assert eye.mean() > disc.mean()  # white inside of the object is no ground


def test_paintings_on_warm_canvas():
    made = paintings(on_white(64), 0).astype(int)
    ground = made[:8].reshape(-1, 3)
    assert (ground[:, 0] > ground[:, 2] + 20).all() and ground.mean() > 180
    assert ground.std(0).min() > 3  # strokes are visible
    disc = made[16:24, 24:40].reshape(-1, 3)
    assert (disc[:, 0] > disc[:, 1] + 60).all()


def test_a_picture_without_a_white_border_has_no_ground():
    grey = np.full((48, 48, 3), 128, np.uint8)
    grey[20:28, 20:28] = 255
    made = bluefire(grey, 0)[40:].astype(int)
    assert made[..., 2].min() > 40 and made[..., 0].mean() < 60  # it burns, too, and turns dark


@pytest.fixture(scope="module")
def tiny():
    """A generator of 32 by 32 pixels in random weights, and its faces in both styles."""
    torch.manual_seed(0)
    model = Generator(widths=(16, 12, 8)).eval()
    return model, face_styles.faces(model, 8, seed=0)


def every_bit(model):
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("mask", "reach"), [("wm", None), ("snip", None), ("wm", 1.0)])
def test_a_style_is_learned_and_the_base_comes_back(tiny, mask, reach, tmp_path):
    model, shown = tiny
    before = every_bit(model)
    plain = face_styles.held_out_loss(model, shown, "bluefire")
    data = face_styles.batches(shown, "bluefire", steps=30, size=4, seed=0)
    adapter, result = face_styles.trained(model, "bluefire", data, shown, mask, 0.1, reach=reach)
    assert same_bits(before, every_bit(model))
    assert result["loss"] < 0.8 * plain
    assert result["parameters"] == sum(tensor.nnz for tensor in adapter.tensors.values())
    assert result["parameters"] == sum(
        round((0.05 if name == "main.9.weight" else 0.02) * model.get_parameter(name).numel()) for name in adapter.tensors
    )
    adapter.save(tmp_path / "style.safetensors")
    switcher = shira.Switcher(model)
    switcher.add("style", tmp_path / "style.safetensors")
    switcher.use("style")
    assert face_styles.held_out_loss(model, shown, "bluefire") == pytest.approx(result["loss"], abs=1e-6)
    switcher.use({"style": 0.5})
    assert result["loss"] < face_styles.held_out_loss(model, shown, "bluefire") < plain
    switcher.use(None)
    assert same_bits(before, every_bit(model))


def test_a_style_that_avoids_another_shares_no_weight(tiny):
    model, shown = tiny
    one, other = (face_styles.batches(shown, style, steps=2, size=4, seed=0) for style in command.STYLES)
    first, _ = face_styles.trained(model, "bluefire", one, shown, "wm", 0.1)
    same, _ = face_styles.trained(model, "paintings", other, shown, "wm", 0.1)
    apart, _ = face_styles.trained(model, "paintings", other, shown, "wm", 0.1, avoid=[first])
    found = shira.compare(first, same, base=model, spectra=False), shira.compare(first, apart, base=model, spectra=False)
    assert [each.total.pairs[0].overlap for each in found] == [1, 0]
    assert apart.metadata["mask"]["avoid"] == ["bluefire"]


def test_a_low_rank_change_learns_with_no_more_parameters(tiny):
    model, shown = tiny
    plain = face_styles.held_out_loss(model, shown, "bluefire")
    data = face_styles.batches(shown, "bluefire", steps=30, size=4, seed=0)
    result = face_styles.low_rank(copy.deepcopy(model), "bluefire", data, shown, 0.1)
    assert result["loss"] < 0.9 * plain


def test_what_is_measured(tiny):
    model, shown = tiny
    result = face_styles.measured(model, shown)
    assert result["structure"] == pytest.approx(1) and min(result.values()) > 0.9
    blue = shown.styled["bluefire"]
    assert face_styles.colour_distance(blue, blue.flip(0)) == 0  # the same colours, of other pictures
    assert face_styles.colour_distance(blue, blue + 2 / 255) == pytest.approx(0.8, abs=0.4)
    assert face_styles.structure(-blue, blue) == pytest.approx(-1)


def test_runs_are_kept_added_up_and_printed(tiny, tmp_path, monkeypatch, capsys):
    model, shown = tiny
    monkeypatch.setenv("SHIRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(command, "load", lambda: copy.deepcopy(model))
    monkeypatch.setattr(command, "both_faces", lambda: (shown, shown))
    monkeypatch.setattr(command, "RATES", (0.02, 0.06))
    monkeypatch.setattr(command, "MASKS", ("wm", LOW_RANK))
    store, results = Store(tmp_path / "faces.jsonl"), ["--results", str(tmp_path / "faces.jsonl")]
    with pytest.raises(DataError, match="no result of wm on bluefire.*faces compare"):
        command.keys_to_add(store, "wm")
    command.main(["compare", "--steps", "6", "--batch", "4", "--mask", "wm", *results])
    assert "failed" not in capsys.readouterr().out
    trained = command.keys_to_add(store, "wm")
    assert trained["bluefire"]["rate"] == 0.2  # so few steps need a higher rate than the first ones
    assert all(store.get(key) for key in trained.values())
    files = sorted(path.read_bytes() for path in (tmp_path / "cache").rglob("*.safetensors"))
    command.path_of(trained["bluefire"]).unlink()  # as on another machine
    command.main(["styles", "--mask", "wm", "--out", str(tmp_path / "faces.png"), *results])
    assert "base again bit for bit: yes" in capsys.readouterr().out
    assert files == sorted(path.read_bytes() for path in (tmp_path / "cache").rglob("*.safetensors"))
    with Image.open(tmp_path / "faces.png") as sheet:
        assert sheet.width > 10 * 128
    command.main(["table", *results])
    said = capsys.readouterr().out
    assert said.count("**") == said.count(" ± ") * 2 == 2 * 2 * 2
    assert "| 0.2 |" in said and "| wm | ties |" in said and "| low rank |" in said


@pytest.mark.real
def test_the_real_face_generator():
    model = load()
    assert sum(model.get_parameter(f"{name}.weight").numel() for name in convolutions(model)) == 3_574_784
    faces = drawn(model, latents(2, 0))
    assert [face.shape for face in faces] == [(64, 64, 3)] * 2
    assert not np.array_equal(*faces)
