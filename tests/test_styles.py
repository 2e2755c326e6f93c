"""The style experiment: its runs, its trainings on a tiny random pipeline, and what its judges and pages say."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import torch
from experiments import store as stores
from experiments.image import demo, dreambooth, emoji, parts, style_adapters, style_report, style_runs, style_scores, styles
from experiments.language import main as command
from experiments.language import settings
from PIL import Image

import shira
from conftest import all_bits, same_bits
from pipelines import SIDE, stable_diffusion
from shira.data.pictures import Picture
from shira.integrations.diffusers_sampling import modules_of

RECIPE = {
    "concepts": 3,
    "side": 32,
    "steps": 2,
    "batch": 2,
    "sampling": {"steps": 2, "guidance": 1},
    "seeds": 2,
    "rank": 1,
    "styles": ["bluefire", "paintings"],
    "more_styles": ["flat"],
    "rates_style": "bluefire",
    "most_rates": 3,
    "sizes": ["few", "many"],
    "methods": {"LoRA": {"lora": 1, "rates": [1e-3, 2e-3]}, "WM": {"mask": "wm", "rates": [1e-3, 2e-3]}},
    "more_methods": ["WM"],
    "sweep": [0, 0.5, 1],
    "swept": ["WM"],
    "fused": ["LoRA", "WM"],
    "fusions": {"sum": {}, "half": {"strength": 0.5}, "ties": {"method": "ties"}, "apart": {"avoid": True, "near": 0.1}},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "artefacts", lambda: tmp_path)
    return tmp_path


def finished(store, recipe=RECIPE):
    """Give every wanted run a result: the lower of the first learning rates is best for WM, the higher for LoRA."""
    for _ in range(99):
        left = [key for key in style_runs.wanted(recipe, store) if store.get(key) is None]
        if not left:
            return
        key = left[0]
        if key["kind"] == "train":
            loss = key["rate"] if "mask" in key["method"] else 1 - key["rate"]
            store.add(key, {"validation_loss": loss, "parameters": 7}, 0)
        elif key["kind"] == "judges":
            store.add(key, {"style": {"base": 0.9, "all": 0.95}, "concept": {"base": 0.8, "all": 0.7}}, 0)
        else:
            looks = dict.fromkeys(style_scores.LOOKS, (0.2, 0.01))
            both = looks | {
                "recognised": (0.9 - 0.3 * len(key["adapters"]), 0.02),
                "distance": (9.0, 0.1),
                "similarity": (0.8, 0.1),
            }
            store.add(key, {"seen": both, "unseen": both}, 0)
    raise AssertionError("the runs never end")


def test_the_runs_follow_from_the_results(place):
    store = stores.Store(place / "styles.jsonl")
    finished(store)
    assert style_runs.losses(RECIPE, store, "many", "WM") == {
        1e-3: 1e-3,
        2e-3: 2e-3,
        5e-4: 5e-4,
    }  # one beyond the best, then no more
    assert style_runs.best_rate(RECIPE, store, "many", "WM") == 5e-4
    assert style_runs.best_rate(RECIPE, store, "few", "LoRA") == 4e-3
    first, second = style_runs.pair(RECIPE, store, "many", "WM", RECIPE["fusions"]["apart"])
    assert first["near"] == second["near"] == 0.1 and "avoid" not in first
    assert second["avoid"] == [stores.number(first)] and store.get(second)
    text = style_report.in_markdown(style_report.tables(RECIPE, store))
    assert "| WM | apart | 20 | 20 | 20 | 30 ± 2 | 30 ± 2 | 30 | 30 |" in text  # 60 % alone, 30 % together
    assert "| concept | 80 % | 70 % |" in text
    assert "LoRA | ties" not in text and "0.0020 at 0.002" in text and "(lowest)" in text
    page = style_report.page(style_report.tables(RECIPE, store), [("a < b", place / "a.png")])
    assert 'src="a.png"' in page and "a &lt; b" in page and "<td>apart</td>" in page


def test_seeds_of_training(place):
    """Rates are searched on the first seed. Both styles and their sum are made again on each."""
    recipe = RECIPE | {"train_seeds": [3, 5], "sizes": ["many"], "fused": [], "swept": [], "more_styles": []}
    store = stores.Store(place / "styles.jsonl")
    finished(store, recipe)
    trained = [line["key"] for line in store.lines() if line["key"]["kind"] == "train" and "mask" in line["key"]["method"]]
    assert {(key["style"], key["rate"]) for key in trained if key["seed"] == 5} == {("bluefire", 5e-4), ("paintings", 5e-4)}
    assert sorted(key["rate"] for key in trained if key["seed"] == 3) == [5e-4, 5e-4, 1e-3, 2e-3]
    text = style_report.in_markdown(style_report.tables(recipe, store))
    assert "| WM | many | 60 (60, 60) | 60 (60, 60) | 30 (30, 30) | 30 (30, 30) | 30 (30, 30) | 30 (30, 30) |" in text
    assert "each seed of training" not in style_report.in_markdown(style_report.tables(RECIPE, store))


def test_results_name_runs_that_can_be_made_again(place):
    recipe = place / "styles.yaml"
    recipe.write_text(str(RECIPE | {"experiment": "image.style_experiment"}), encoding="utf-8")
    store = stores.Store(place / "styles.jsonl")
    finished(store)
    text = command.main(str(recipe), store.path, run=False)
    assert text == command.main(str(recipe), store.path, run=False)
    with pytest.raises(stores.shira.DataError, match="no run 'nothing'"):
        command.main(str(recipe), store.path, run=False, again="nothing")


def test_results_say_which_base_they_are_of_and_are_not_mixed(place, monkeypatch):
    store = stores.Store(place / "styles.jsonl")
    lab = style_runs.Lab(store)
    monkeypatch.setattr(lab, "pipe", lambda concepts: SimpleNamespace(unet=torch.nn.Linear(2, 2)))
    monkeypatch.setattr(lab, "accuracies", lambda key: {"style": {"all": 1.0}})
    key = style_runs.judges_key(RECIPE)
    result = lab.run(key)
    assert re.fullmatch("[0-9a-f]{12}", result["base"]) and result["style"] == {"all": 1.0}
    store.add(style_runs.score_key(RECIPE, [], None), {"base": "0" * 12}, 0)
    other = style_runs.Lab(store)
    monkeypatch.setattr(other, "pipe", lab.pipe)
    with pytest.raises(stores.shira.DataError, match="is of the base 000000000000, and the one in .*--results mine.jsonl"):
        other.run(key)


@pytest.mark.parametrize("name", ["image", "image-rates", "image-seeds", "image-turns"])
def test_what_decides_a_run_is_in_its_number(name):
    recipe = settings.named(name)
    cases = [("bluefire", "many", name, rate) for name, method in recipe["methods"].items() for rate in method["rates"]]
    keys = [style_runs.train_key(recipe, *case) for case in cases]
    keys += [style_runs.train_key(recipe, *cases[-1], **more) for more in ({"near": 0.1}, {"near": 0.2}, {"avoid": ["a"]})]
    decide = ("concepts", "side", "steps", "batch", "rank", "seed")
    keys += [style_runs.train_key(recipe | {setting: 99}, *cases[-1]) for setting in decide]
    keys += [
        style_runs.train_key(recipe, "paintings", *cases[-1][1:]),
        style_runs.train_key(recipe, "bluefire", "few", *cases[-1][2:]),
    ]
    keys += [style_runs.score_key(recipe, [(keys[0], strength)], "bluefire") for strength in (0.5, 1.0)]
    keys += [style_runs.score_key(recipe, [(keys[0], 1.0)], "bluefire", {"method": name}) for name in ("mean", "ties")]
    both = [(key, 1.0) for key in keys[:2]]
    keys += [style_runs.score_key(recipe, both, None), *(style_runs.added(recipe, keys[:2], {"averaged": n}) for n in (1, 2))]
    assert len({stores.number(key) for key in keys}) == len(keys)


def colour(red):
    return Picture(Image.fromarray(np.full((SIDE, SIDE, 3), [red, 60, 60], np.uint8)), "dog")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # of PEFT, for each adapter after the first
@pytest.mark.parametrize("method", [{"lora": 1}, {"mask": "snip", "rank": 1, "near": 0.1}, {"mask": "wm", "rank": 1}], ids=str)
def test_a_style_is_trained_and_the_base_is_back(tmp_path, method):
    pipe = stable_diffusion()
    before = all_bits(modules_of(pipe))
    options = {"side": SIDE, "steps": 2, "batch": 2, "rate": 1e-2, "seed": 0, "general": [colour(9), colour(99)]}
    folders, summaries = [], []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        summary = style_adapters.trained(method, pipe, [colour(200)] * 2, [colour(100)], tmp_path / name, **options)
        summaries.append(summary)
        folders.append(tmp_path / name)
        assert same_bits(all_bits(modules_of(pipe)), before)
    assert summary["validation_loss"] > 0 and summary["file_bytes"] > 4 * summary["parameters"]
    draw = {"names": ["dog"], "seeds": [0], "steps": 2, "guidance": 1}
    plain = style_runs.drawn(pipe, **draw)["dog"][0]
    with style_adapters.adapted(pipe, folders[:1], [1.0]):
        alone = style_runs.drawn(pipe, **draw)["dog"][0]
        parts = style_adapters.TrainedComponents(pipe)
        examples = style_adapters.Examples(parts, [colour(100)], resolution=SIDE)
        first = style_adapters.loss_of(parts, examples)
    with style_adapters.adapted(pipe, folders, [1.0, 0.5]):
        both = style_runs.drawn(pipe, **draw)["dog"][0]
    with style_adapters.adapted(pipe, folders, [1.0, 0.5], averaged=1) as at_step_end:
        turns = style_runs.drawn(pipe, **draw, at_step_end=at_step_end)["dog"][0]
    assert not np.array_equal(alone, plain) and not np.array_equal(both, alone)
    assert not any(np.array_equal(turns, other) for other in (plain, alone, both))
    assert first == pytest.approx(summaries[0]["validation_loss"], rel=1e-3)  # at the strength at which it was trained
    assert same_bits(all_bits(modules_of(pipe)), before)
    assert np.array_equal(style_runs.drawn(pipe, **draw)["dog"][0], plain)


def test_lora_and_masks_have_as_many_parameters(tmp_path):
    pipe = stable_diffusion()
    counts = []
    for method in ({"lora": 2}, {"mask": "rand", "rank": 2}):
        options = {"side": SIDE, "steps": 1, "batch": 1, "rate": 1e-2, "seed": 0}
        counts.append(style_adapters.trained(method, pipe, [colour(9)], [colour(9)], tmp_path, **options)["parameters"])
    assert counts[0] == counts[1]


def test_scores_count_right_answers(monkeypatch):
    """The judge of concepts reads the concept's number from a picture's first pixel, that of styles from its second."""
    monkeypatch.setattr(
        style_scores, "concepts", lambda count: [style_scores.Emoji(name, "", "") for name in (*styles.SEEN, *styles.UNSEEN)]
    )

    monkeypatch.setattr(style_scores.dino, "features", lambda given, side: torch.tensor(given[:, 0, :2, 0]).float() + 1)

    class Reads(torch.nn.Module):
        def __init__(self, place, classes):
            super().__init__()
            self.place, self.classes = place, classes

        def forward(self, pictures):
            found = ((pictures[:, 0, 0, self.place] + 1) * 127.5).round().long()
            return torch.nn.functional.one_hot(found, self.classes).float()

    def picture(concept, look):
        made = np.zeros((4, 4, 3), np.uint8)
        made[0, 0], made[0, 1] = concept, look
        return made

    seen, unseen = styles.SEEN[0], styles.UNSEEN[0]
    made = {seen: [picture(0, 0), picture(0, 1)], unseen: [picture(8, 0), picture(3, 0)]}
    judges = {"concept": Reads(0, 24), "style": Reads(1, 5)}
    found = style_scores.scores(made, judges, {seen: picture(0, 0), unseen: None})
    assert found["seen"]["recognised"] == (1.0, 0.0) and found["unseen"]["recognised"][0] == 0.5
    assert found["seen"]["base"][0] == found["seen"]["bluefire"][0] == 0.5 and found["unseen"]["base"] == (1.0, 0.0)
    assert found["seen"]["distance"][0] == pytest.approx(0.5 / 16, abs=1e-4) and "distance" not in found["unseen"]
    assert found["seen"]["similarity"][0] == 2.5  # (1 · 1 + 1 · 1) and (1 · 1 + 2 · 1), as the features have it


@pytest.mark.real
def test_what_adapters_see_and_do_not():
    few, many, validated = styles.seen("few"), styles.seen("many"), styles.validated()
    assert len(few) == 8 and set(few) < set(many) and len(many) == styles.MANY and len(validated) == styles.VALIDATED
    unseen = set(styles.UNSEEN)
    assert not unseen & {e.name for e in (*many, *validated)} and not set(many) & set(validated)
    general = {picture.caption for picture in styles.general_pictures(8)}
    assert len(general) == 64 and not general & {e.name for e in (*many, *validated)} and not general & unseen
    pictures = styles.training_pictures("bluefire", "few", 32)
    assert len(pictures) == 64 and {p.caption for p in pictures} == set(styles.SEEN)
    assert len({p.image.tobytes() for p in pictures}) == 64  # the filters' random numbers differ
    flat = styles.training_pictures("flat", "few", 32)
    assert len(flat) == 8 and flat[0].image.size == (32, 32)


@pytest.fixture
def emoji_model(tmp_path, monkeypatch):
    """In place of the model of 24 emoji a random one."""
    torch.manual_seed(0)
    pipe = parts.pipeline(parts.unet(32, (16, 32)), *parts.text_parts())
    (tmp_path / "emoji-24").mkdir()
    emoji.save_pipeline(pipe, tmp_path / "emoji-24" / "pipeline", {"step": 1, "of": 1})
    monkeypatch.setattr(emoji, "folder", lambda count: tmp_path / f"emoji-{count}")


def test_what_dreambooth_learns_from_is_apart_from_what_is_drawn():
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    made = dreambooth.sheet([red] * 4, [[blue] * 10] * len(dreambooth.SHOWN), [f"column {number}" for number in range(10)])
    pixels = np.asarray(made)
    is_red, is_blue = (np.flatnonzero((pixels == colour).all(2).any(1)) for colour in ((255, 0, 0), (0, 0, 255)))
    assert len(is_red) == 96 and len(is_blue) == 4 * 96
    assert is_red.max() + 40 < is_blue.min()  # the titles of the columns are between


@pytest.mark.slow
@pytest.mark.real
def test_dreambooth_draws_a_grid_and_leaves_the_base(emoji_model, tmp_path, monkeypatch, capsys):
    for name, value in {"OF_BASE": 2, "SHOTS": 1, "SAMPLING": 2, "OTHERS": ["cat", "pizza"]}.items():
        monkeypatch.setattr(dreambooth, name, value)
    dreambooth.main(["--out", str(tmp_path / "grid.png"), "--steps", "2", "--seeds", "1"])
    said = capsys.readouterr().out
    assert "as it was: yes" in said and len(re.findall(r"(?:LoRA|WM|Rand) +│ (?:none|dog|all)", said)) == 9
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 10 * 96 and grid.height > 5 * 96


@pytest.mark.slow
@pytest.mark.real
def test_the_demo_leaves_a_grid_and_the_base(emoji_model, tmp_path, monkeypatch, capsys):
    """The whole of `make demo-image`, on a random UNet and for two steps."""
    for name, value in {"VARIANTS": 1, "SHOWN": ("dog", "pizza"), "SAMPLING": 2}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr("shira.cli.demo.SWITCHES", 1)
    demo.main(["--out", str(tmp_path / "made"), "--steps", "2"])
    said = capsys.readouterr().out
    assert "base back bit for bit: yes" in said and "base again" in said
    with Image.open(tmp_path / "made" / "grid.png") as grid:
        assert grid.width > 8 * 96 and grid.height > 2 * 96
    again = shira.load(tmp_path / "made" / "bluefire.safetensors")
    assert again.metadata["training"]["pictures"] == 24 and "Apache-2.0" in again.metadata["license"]
    assert (
        "both at 0.6" in said
        and re.search(r"base again +│ +[\d.]+ │ +0 │", said)
        and not re.search(r"both at 0.6 +│ +[\d.]+ │ +0 │", said)
    )
