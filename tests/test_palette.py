"""A method looks the same in all plots."""

import itertools

import pytest
from experiments.palette import LOOKS, look


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved inside a test, by the name of their file, in place of the files."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    found = {}
    monkeypatch.setattr(pyplot.Figure, "savefig", lambda self, path, **options: found.setdefault(path.stem, self))
    return found


def colours(figure):
    """Label -> colour and marker of each line of a figure."""
    lines = [line for axes in figure.axes for line in axes.lines]
    lines += [each.lines[0] for axes in figure.axes for each in axes.containers]
    return {line.get_label(): (line.get_color(), line.get_marker()) for line in lines if line is not None}


def test_two_plots_agree(drawn, tmp_path):
    from experiments.language import forgetting, fused

    answers = {"arc-easy": [0.0, 1.0]}
    curves = {name: {0.0: answers, 1.0: answers} for name in ("wm", "wm-near", "lora")}
    forgetting.plot({"data": "arc-easy"}, curves, {}, tmp_path / "one.png")
    fused.plot(dict(reversed(curves.items())), 0.5, tmp_path / "other.png")
    one, other = (colours(drawn[name]) for name in ("one", "other"))
    for label in ("wm", "wm, held near the base", "lora"):
        assert one[label] == other[label]
    assert one["lora"] == ("#222222", "s") and one["wm, held near the base"] == LOOKS["wm-near"]


def test_methods_differ():
    assert len({colour for colour, _ in LOOKS.values()}) == len(LOOKS)
    shared = ["lora", "wm", "wm-apart", "wm-near", "snip", "snip-near", "rand"]  # methods of one plot: markers differ, too
    assert all(LOOKS[one][1] != LOOKS[other][1] for one, other in itertools.combinations(shared, 2))


@pytest.mark.parametrize(
    ("name", "like", "label"),
    [
        ("LoRA", "lora", "LoRA"),
        ("lora-2e-3", "lora", "lora, rate 2e-3"),
        ("WM-non-overlap", "wm-apart", "WM-non-overlap"),
        ("snip-near", "snip-near", "snip, held near the base"),
        ("lora-near", "lora", "lora, held near the base"),
    ],
)
def test_variants_have_the_colour_of_their_method(name, like, label):
    found = look(name)
    assert found["color"] == LOOKS[like][0] and found["label"] == label
    assert ("linestyle" in found) == (name in {"lora-2e-3", "lora-near"})


def test_what_is_unknown_is_grey():
    assert look("head")["color"] == "#666666"
