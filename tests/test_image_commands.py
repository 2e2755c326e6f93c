"""`shira train-image` and `shira sample`, on tiny random pipelines."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("PIL")

import diffusers
import torch
from PIL import Image

import shira
from conftest import stops
from pipelines import pipe_adapter, stable_diffusion, vae
from shira import BaseMismatch, DataError
from shira.cli import train_image as command
from shira.cli.options import fields_of
from shira.data.grids import grid
from shira.integrations.diffusers import PipelineAdapters
from shira.integrations.diffusers_sampling import load_pipeline, modules_of
from shira.runs.bases import is_pipeline
from shira.runs.image_recipes import ImageRecipe, check_image_run, load_image_recipe

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Diffusers' Euler with NumPy 2.4


LINE = "train-image pipeline --steps 3 --density 0.1 --batch-size 2 --sample-steps 2 --guidance 2"


def test_the_commands(run, folder):
    """Train DreamBooth with samples, repeat it to the bit by its recipe, and make grids of its adapter."""
    stable_diffusion().save_pretrained("pipeline")
    line = f"{LINE} --data dog --prompt 'sks dog' --class-prompt dog --class-count 2 --sample-every 2 --sample-prompt 'a dog'"
    code, out, err = run(f"{line} --sample-prompt 'sks dog' --license MIT --flip -o one.safetensors")
    assert code == 0, err
    assert "the recipe is one.yaml, the model card one.md the samples are one.png" in " ".join(out.split())
    card = (folder / "one.md").read_text()
    assert "![samples](<one.png>)" in card and 'adapters.load("one.safetensors", "one")' in card
    assert re.search(r"^making pictures of the class: 2/2 ", err, re.MULTILINE), err
    assert re.search(r"^training: 3/3 in [\d.]+ s, loss [\d.]+, [\d.]+ pictures/s$", err, re.MULTILINE), err
    one = shira.load("one.safetensors")
    assert one.metadata["base"] == {"id": "pipeline", "dtype": "float32"}
    assert one.metadata["license"] == "MIT" and one.name == "one"
    assert one.metadata["training"]["prompt"] == "sks dog"
    with Image.open("one.png") as samples:
        width, height = samples.size
    assert width > 3 * 128 and height > 2 * 128  # base, step 2, step 3; two prompts

    assert run("train-image --config one.yaml -o two.safetensors")[0] == 0
    two = shira.load("two.safetensors")
    assert two.metadata == one.metadata
    assert all(torch.equal(tensor.values, two.tensors[name].values) for name, tensor in one.tensors.items())
    assert (folder / "one.png").read_bytes() == (folder / "two.png").read_bytes()
    assert (folder / "one.safetensors").read_bytes() == (folder / "two.safetensors").read_bytes()

    assert run(f"{LINE} --data dog --seed 3 --name other -o other.safetensors")[0] == 0
    common = "sample --pipe pipeline -p dog -p tiger --steps 2 --guidance 2"
    code, out, err = run(f"{common} -a one.safetensors -a other.safetensors=0.5 --seeds 3 -o grid.png")
    assert code == 0, err
    assert "grid.png: 2 x 3 pictures" in out and "making pictures: 6/6" in err
    assert run(f"{common} -a one.safetensors --sweep 0,0.5,1 -o sweep.png")[0] == 0
    plain = {
        name.removeprefix("unet."): tensor for name, tensor in one.tensors.items()
    }  # as shira.attach(pipe.unet) names them
    shira.Adapter(plain).save("plain.safetensors")
    both = """-a plain.safetensors='{"unet": {"down": 0.5, "up": {"block_0": 0.0}}}' -a other.safetensors"""
    code, _, err = run(f"{common} {both} --method ties --density 0.5 --sweep 0,1 -o p.png")
    assert code == 0, err
    code, _, err = run(f"{common} {both} --in-turn --sweep 0,1 --seeds 2 -o turns.png")
    assert code == 0, err
    assert run(f"{common} --seeds 1 -o base.png")[0] == 0
    with Image.open("sweep.png") as swept, Image.open("base.png") as base:
        places = [(swept.width - (3 - n) * (128 + 4), swept.height - 128 - 4) for n in range(3)]
        tiles = [swept.crop((x, y, x + 128, y + 128)).tobytes() for x, y in places]
        alone = base.crop((base.width - 132, base.height - 132, base.width - 4, base.height - 4)).tobytes()
    assert tiles[0] == alone and len(set(tiles)) == 3
    with Image.open("turns.png") as turns:
        places = [(turns.width - (4 - n) * (128 + 4), turns.height - 128 - 4) for n in range(4)]
        tiles = [turns.crop((x, y, x + 128, y + 128)).tobytes() for x, y in places]
    assert tiles[0] == alone and len(set(tiles)) == 4


@pytest.mark.parametrize(
    "more",
    [
        "--crop random --flip --drop-captions 0.3 --accumulate 2",
        "--train-text-encoder --class-prompt dog --class-count 2 --flip",
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bytes(run, folder, monkeypatch, more):
    pipe = stable_diffusion()
    pipe.unet.register_to_config(dropout=0.2)  # random numbers in every step
    pipe.save_pretrained("pipeline")
    line = f"{LINE.replace('--steps 3', '--steps 7')} --data dog {more} --name sks --sample-every 3"
    assert run(f"{line} -o whole.safetensors")[0] == 0
    stop = stops(monkeypatch, command, "trained")
    stop[0] = 1
    line, place = f"{line} --save-every 2 -o dog/again", folder / "dog/again.checkpoints"
    assert run(line)[0] == 130 and not place.exists() and not (folder / "dog/again").exists()
    for stop[0] in (5, 6):
        code, out, err = run(line)
        assert code == 130 and "stopped; the same command goes on after step 4, from dog/again.checkpoints" in out, err
    (saved,) = place.glob("checkpoint-*")
    assert saved.name == "checkpoint-4" and sum(path.stat().st_size for path in saved.iterdir()) < 4e5  # without the base
    stop[0] = None
    code, out, err = run(line)
    assert code == 0 and "goes on after step 4" in out and "training: 7/7" in err, err
    assert (folder / "dog/again/adapter.safetensors").read_bytes() == (folder / "whole.safetensors").read_bytes()
    assert not place.exists() and (folder / "dog/again/samples.png").exists()


def test_an_adapters_training_goes_on(run, folder):
    stable_diffusion().save_pretrained("pipeline")
    line = f"{LINE.replace(' --density 0.1', '')} --data dog"
    assert run(f"{line} --density 0.1 -o sks.safetensors")[0] == 0
    code, out, err = run(f"{line} --start sks.safetensors -o more.safetensors")
    assert code == 0 and "entries of sks.safetensors, from its values" in out, err
    sks, more = shira.load("sks.safetensors"), shira.load("more.safetensors")
    assert more.fingerprints == sks.fingerprints and more.tensors.keys() == sks.tensors.keys()
    assert any(not torch.equal(tensor.values, more.tensors[name].values) for name, tensor in sks.tensors.items())


@pytest.mark.slow
def test_two_processes(folder):
    """They train one adapter, on batches of both; the class is made once."""
    stable_diffusion().save_pretrained("pipeline")
    line = f"{LINE} --data dog --class-prompt dog --class-count 2 --class-data made --sample-every 2 -o two.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "shira.cli", *line.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(shira.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "training: 3/3" in done.stderr and "Warning" not in done.stderr
    adapter = shira.load("two.safetensors")
    assert adapter.metadata["training"]["batch_size"] == 4
    pipe = stable_diffusion()
    switcher = shira.Switcher(modules_of(pipe))
    switcher.add("two", adapter)
    assert len(list((folder / "made").iterdir())) == 2 and (folder / "two.png").exists()


def test_wrong_options_are_refused_before_a_pipeline_is_loaded(run, folder, monkeypatch):
    monkeypatch.setattr("shira.integrations.diffusers_sampling.load_pipeline", None)
    for options, words in {
        "--data dog --mask snap": "unknown mask 'snap'; did you mean 'snip'",
        "--data dog --density 0": "--density must be a finite number above 0",
        "--data dog --prior-weight 2": "--class-data and --prior-weight need a --class-prompt",
        "--data dog --schedule liner": "unknown schedule 'liner'; did you mean 'linear'",
        "--data dog --crop middle": "--crop must be one of center, random",
        "--data dog --mixed-precision fp8": "--mixed-precision must be one of no, bf16, fp16",
        "--data cat": "cat is not a folder of pictures",
        "": "no pictures to train on: give --data, a folder of pictures",
        "--data dog -o none/a.safetensors": "there is no folder none",
        "--data dog --min-snr 0": "--min-snr must be a finite number above 0",
    }.items():
        code, _, err = run(f"{LINE} {options}".replace("--density 0.1", "" if "density" in options else "--density 0.1"))
        assert code == 1 and words in " ".join(err.split()), err
    code, _, err = run("train-image --data dog")
    assert code == 1 and "no pipeline to train" in err
    pipe_adapter(stable_diffusion(), 1).save("one.safetensors")
    for options, words in {
        "--sweep 1": "--sweep needs an adapter",
        "-a one.safetensors --in-turn": "--in-turn is for two adapters or more, -a FILE -a FILE, and for no --method; found 1",
        "-o x.txt": "x.txt: expected the ending of a picture that can be written, such as .png or .jpg; found the ending",
        "-o grid": "grid: expected the ending of a picture that can be written, such as .png or .jpg; found no ending",
        "-o grid.psd": "found the ending '.psd'",
        "--first-seed 99999999999999999999999": "--first-seed must be at most 18446744073709551612, found 999999",
        """-a one.safetensors='{"unet": true}'""": "'one.safetensors' in 'unet' must be a finite number, found True",
        "-a one.safetensors=1e38 --sweep 1,10": "must be a finite number, found 1e+39, which float32 does not hold",
        "-a one.safetensors -a ./one.safetensors=2": "twice, as 'one.safetensors' and './one.safetensors'; give it once",
    }.items():
        code, _, err = run(f"sample --pipe pipeline -p x {options}")
        assert code == 1 and words in " ".join(err.split()), err
    code, _, err = run("sample --pipe pipeline -p x --sweep 1,a")
    assert code == 2 and "expected numbers with commas" in " ".join(re.sub("│", " ", err).split())


def test_what_a_pipeline_refuses_is_one_line(run, folder):
    stable_diffusion().save_pretrained("pipeline")
    code, _, err = run("sample --pipe pipeline -p x --resolution 17")
    assert code == 1 and "DataError: StableDiffusionPipeline makes no such picture: `height` and `width` have" in err
    code, _, err = run(f"{LINE} --data dog --resolution 20")
    assert code == 1 and "--resolution must be a multiple of 8 for this pipeline, found 20; take 16 or 24" in err
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8, num_embeds_ada_norm=1000
    )
    diffusers.DiTPipeline(transformer, vae(), diffusers.DDIMScheduler()).save_pretrained("dit")
    code, _, err = run("sample --pipe dit -p x")
    assert code == 1 and "DataError: DiTPipeline makes no pictures of a prompt; take a text-to-image pipeline" in err
    code, _, err = run("train-image dit --data dog")
    assert code == 1 and "DataError: the transformer of this pipeline is a DiTTransformer2DModel" in err


def test_what_is_no_pipeline(run, folder):
    for name in ("empty", "language"):
        (folder / name).mkdir()
    (folder / "language/config.json").write_text('{"model_type": "llama"}')
    for name, words in {
        "empty": "no Diffusers pipeline in that folder",
        "nobody/nothing": "it is no folder, and not in",
    }.items():
        code, _, err = run(f"sample --pipe {name} -p x")
        assert code == 1 and f"DataError: cannot load '{name}': {words}" in err
    code, _, err = run(f"{LINE.replace('pipeline', 'language')} --data dog")
    assert code == 1 and "'language': it is a model of Transformers, no pipeline: `shira train` trains it" in err
    stable_diffusion().save_pretrained("pipeline")
    pipe_adapter(stable_diffusion(), 1).save("mine.safetensors")
    for name, words in {
        "pipeline/text_encoder": "it is a part of a Diffusers pipeline; give the whole, 'pipeline'",
        "mine.safetensors": "it holds an adapter, no model; .*: `shira sample --pipe BASE -a mine.safetensors`",
    }.items():
        for line in (f"sample --pipe {name} -p x", f"train-image {name} --data dog"):
            code, _, err = run(line)
            assert code == 1 and re.search(words, " ".join(err.split())), err


def test_the_options_are_defined_once(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    code, out, _ = run("train-image --help")
    text = re.sub(r"[│\s]+", " ", out)
    assert code == 0
    for name, (about, _) in fields_of(ImageRecipe).items():
        assert re.fullmatch(r"\S.*\S\.", about["help"]), name
        assert about["help"] in text, name
        assert name == "pipeline" or f" --{name.replace('_', '-')} " in text, name
    for group in ("Data", "Mask", "Training", "Results"):
        assert f"─ {group} ─" in out


def test_a_recipe_of_another_kind(folder):
    (folder / "r.yaml").write_text("{pipeline: x, data: dog, max_length: 3}")
    with pytest.raises(DataError, match="unknown setting 'max_length'"):
        load_image_recipe("r.yaml", {})
    (folder / "r.yaml").write_text("{pipeline: x, data: cat}")
    with pytest.raises(DataError, match="r.yaml: data: there is no 'cat' in .*; relative paths in a recipe start from"):
        load_image_recipe("r.yaml", {})
    recipe = load_image_recipe(None, {"pipeline": "x", "data": "dog", "rank": 4})
    check_image_run(recipe)
    assert json.dumps(vars(recipe))


def test_samples_are_not_saved_among_the_pictures_and_do_not_stay_without_an_adapter(run, folder, monkeypatch):
    stable_diffusion().save_pretrained("pipeline")
    line = f"{LINE} --data dog --prompt dog"
    for output in ("-o dog", "-o dog/style.safetensors", "-o ./dog --force"):
        code, _, err = run(f"{line} {output}")
        assert code == 1 and "the samples would be saved in dog" in " ".join(err.split()), err
    monkeypatch.setattr("shira.integrations.diffusers_training.train", lambda *_, **__: 1 / 0)
    for output in ("style", "style.safetensors"):
        with pytest.raises(ZeroDivisionError):
            run(f"{line} -o {output}")
        assert not Path(output).exists() and not Path("style.png").exists()


def test_adapters_of_a_pipeline_are_fused_and_compared_on_its_name(run, folder):
    pipe = stable_diffusion()
    pipe.save_pretrained("pipeline")
    one, two = pipe_adapter(pipe, 1), pipe_adapter(pipe, 2)
    one.save("one.safetensors")
    two.save("two.safetensors")
    assert run("fuse one.safetensors two.safetensors=0.5 --base pipeline -o both.safetensors")[0] == 0
    wanted = shira.fuse({"one": (one, 1.0), "two": (two, 0.5)}, base=modules_of(pipe))
    found = shira.load("both.safetensors")
    assert all(torch.equal(tensor.values, wanted.tensors[name].values) for name, tensor in found.tensors.items())
    code, out, err = run("compare one.safetensors two.safetensors --base pipeline --json --no-spectra")
    assert code == 0, err
    plain = {name.removeprefix("unet."): tensor for name, tensor in pipe_adapter(pipe, 3, ("unet",)).tensors.items()}
    for name in ("a", "b"):
        shira.Adapter(plain).save(f"{name}.safetensors")
    assert run("fuse a.safetensors b.safetensors=0.5 --base pipeline -o plain.safetensors")[0] == 0  # of the denoiser
    assert shira.load("plain.safetensors").tensors.keys() == plain.keys()


def test_an_adapter_is_cast_with_its_pipeline(run, folder):
    pipe = stable_diffusion()
    pipe.save_pretrained("pipeline")
    made = pipe_adapter(pipe, 1)
    made.metadata["base"] = {"id": "pipeline", "dtype": "float32"}
    made.save("whole.safetensors")
    plain = {name.removeprefix("unet."): name for name in made.tensors if name.startswith("unet.")}  # as of attach(pipe.unet)
    prints = {name: made.fingerprints[old] for name, old in plain.items()}
    denoiser = shira.Adapter({name: made.tensors[old] for name, old in plain.items()}, made.metadata | {"fingerprints": prints})
    denoiser.save("denoiser.safetensors")
    adapters = PipelineAdapters(pipe.to(torch.float16))
    for name in ("whole", "denoiser"):
        with pytest.raises(BaseMismatch, match="shira convert ADAPTER --base BASE --dtype float16"):
            adapters.load(f"{name}.safetensors")
        code, out, err = run(f"convert {name}.safetensors --base pipeline --dtype float16 -o {name}-half.safetensors")
        assert code == 0 and "for its base as float16" in out, err
        adapters.load(f"{name}-half.safetensors", name)
        adapters.set(name)
    code, _, err = run("merge pipeline denoiser.safetensors -o merged")
    said = "pipeline is no checkpoint but a Diffusers pipeline; name the folder of one of its components, such as pipeline/unet"
    assert code == 1 and said in " ".join(err.split()), err


@pytest.mark.parametrize(("file", "found"), [("config.json", False), ("model_index.json", True)])
def test_what_the_cache_of_the_hub_has_is_not_asked_for(tmp_path, monkeypatch, file, found):
    """GPT-2's tensors begin with "transformer.", too. Offline, the hub cannot say that it is no pipeline."""
    repo = tmp_path / "models--me--it"
    for place, text in {"refs/main": "abc", f"snapshots/abc/{file}": "{}"}.items():
        (repo / place).parent.mkdir(parents=True, exist_ok=True)
        (repo / place).write_text(text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert is_pipeline("me/it") is found


def test_the_card_loads_a_pipeline_in_the_dtype_of_its_adapter(run, folder):
    stable_diffusion().save_pretrained("pipeline")
    assert run(f"{LINE} --data dog --prompt dog --dtype bfloat16 -o style.safetensors")[0] == 0
    (snippet,) = re.findall(r"```python\n(.*?)```", Path("style.md").read_text(), re.DOTALL)
    assert 'from_pretrained("pipeline", dtype=torch.bfloat16)' in snippet
    names = {}
    exec(snippet.split("pipe(")[0], names)
    assert names["pipe"].unet.dtype == torch.bfloat16


def test_grids():
    tile = Image.new("RGB", (32, 32), "red")
    found = grid([[tile, tile]], ["a tiger"], ["base", "a very long title that takes several lines of the grid"])
    assert found.width > 2 * 128 and found.height > 128
    assert found.getpixel((found.width - 10, found.height - 10)) == (255, 0, 0)
    plain = grid([[tile]], [""], ["x"], smallest=1)
    assert plain.width == 32 + 8
    with pytest.raises(DataError, match="a grid needs a title for each row and column"):
        grid([[tile]], ["a", "b"], ["x"])
    pytest.importorskip("matplotlib")
    drawn = [grid([[tile]], [title], ["x"]).tobytes() for title in ("ä", "ö", "я", "¬")]
    assert len(set(drawn)) == 4  # characters, and not the same box for each


def test_a_pipeline_is_loaded_in_a_dtype(folder):
    stable_diffusion().save_pretrained("pipeline")
    assert load_pipeline("pipeline").unet.dtype == torch.float32
    assert load_pipeline("pipeline", "bfloat16").unet.dtype == torch.bfloat16
