"""Styles on a face generator: the filters, and adapters of a tiny random generator of the same classes."""

import numpy as np
import pytest
from experiments.image.filters import bluefire, paintings


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


def test_blue_fire_on_black_ground():
    made = bluefire(on_white(64), 0).astype(int)
    assert made[-3:].max() < 60  # below the object, where no flames rise
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
    assert bluefire(grey, 0)[40:].astype(int)[..., 2].min() > 40
