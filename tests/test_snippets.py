"""Every snippet of README.md and docs/ runs in a test, or stands in NOT_RUN with the reason.

A page with a test of its own stands in ELSEWHERE. The others run here, on tiny random models: HERE has what a page replaces,
such as numbers of steps. Of a command that does not run, this file checks that it exists and has these options.
"""

import ast
import functools
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import shira
from conftest import all_bits, letter_tokenizer, llama_batches, random_adapter, same_bits
from shira.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text("utf-8") for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
}
BLOCK = re.compile(r"^```(python|bash|console)(?: (\S+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)
MODEL = "SmolLM2-135M-Instruct-Q4_1"

ELSEWHERE = {  # page -> languages of its snippets -> the test that runs them
    "README.md": {"python bash": "test_readme.py"},
    "docs/data.md": {"python bash": "test_reading.py"},
    "docs/diffusers.md": {"python": "test_diffusers.py"},
    "docs/fusion.md": {"python": "test_fusion.py"},
    "docs/masks/budgets.md": {"python": "test_budgets.py"},
    "docs/memory.md": {"bash": "test_estimate.py"},
    "docs/peft.md": {"python bash": "test_peft.py"},
    "docs/quantized.md": {"python": "test_quantized.py"},
    "docs/rl-patches.md": {"python bash": "test_rl_patches.py"},
    "docs/share.md": {"python bash": "test_hub.py"},
    "docs/ten-minutes.md": {"python bash console": "transcript.py"},
    "docs/trainers.md": {"python": "test_trl.py"},
    "docs/try.md": {"python bash": "test_try.py"},
}

HERE = {  # page -> what is replaced in its snippets
    "docs/analysis.md": {},
    "docs/distributed.md": {},
    "docs/extraction.md": {},
    "docs/fusion.md": {"MODEL": "SmolLM2"},
    "docs/gpu.md": {},
    "docs/masks/README.md": {},
    "docs/masks/activation.md": {},
    "docs/masks/gradient.md": {},
    "docs/masks/lowrank.md": {"rank=64": "rank=6"},
    "docs/masks/magnitude.md": {},
    "docs/masks/patterns.md": {"size=32": "size=2", "n=1, m=64": "n=1, m=8", "density=0.01": "density=0.05"},
    "docs/masks/sets.md": {},
    "docs/masks/structured.md": {"-o spam.safetensors": "--density 0.1 -o new.safetensors"},
    "docs/masks/uniform.md": {},
    "docs/on-inputs.md": {MODEL: "SmolLM2"},
    "docs/scale.md": {},
    "docs/serving.md": {},
    "docs/targets.md": {"--layers 0-14": "--layers 0"},
    "docs/train-image.md": {"bluefire --steps 500": "dog --steps 2", '"bluefire", steps=500': '"dog", steps=2'}
    | {"my-dog": "dog", "--class-count 100": "--steps 2 --class-count 2", "--seeds 4 --steps 30": "--seeds 2 --steps 2"}
    | {"--sweep 0,0.5,1,1.25": "--sweep 0,1 --steps 2"},
    "docs/variants.md": {"decompose=256": "decompose=2", "low_rank=8": "low_rank=2"},
}

NOT_RUN = {  # page -> how a snippet begins -> why it does not run
    "docs/diffusers.md": {
        "OMP_NUM_THREADS=1 shira bench": "minutes: a figure of the page",
        "shira convert": "a LoRA of the hub; test_diffusers_loras.py converts one",
    },
    "docs/distributed.md": {
        "config = {": "needs DeepSpeed; `make test-deepspeed` runs these steps in distributed_run.py",
        "torchrun --standalone": "several processes and machines; test_distributed.py starts two",
    },
    "docs/faces.md": {"pip install": "hours: the figures of the page"},
    "docs/gallery.md": dict.fromkeys(["make", "python -m", "shira experiment"], "minutes to hours: the pictures of the page"),
    "docs/gpu.md": {"pip install -e": "needs a GPU"},
    "docs/images.md": {
        "pip install": "minutes: trains the model",
        "from experiments": "needs the model that the command above trains",
        "python -m experiments.image.emoji train ": "80 minutes: trains the model",
    },
    "docs/install.md": {
        "pip install": "`make dist` and `make extras` install in these ways",
        "make test-window": "minutes: installs two environments",
    },
    "docs/masks/README.md": {"python -m": "hours, or results that the runs left: the figures of the page"},
    "docs/performance.md": {"python -m": "needs a checkout of another commit"},
    "docs/play.md": {"pip install": "a server, which does not end; `make test-play` drives it"},
    "docs/results/method.md": {"shira experiment": "hours: the figures of the page"},
    "docs/scale.md": {
        "pip install": "test_readme.py checks that the extra exists",
        "from ray": "needs Ray; `make test-ray` runs it",
    },
    "docs/serving.md": {
        "pip install": "a server, which does not end; its client runs here",
        "VLLM": "needs vLLM; `make test-vllm` runs it",
        "SHIRA_ADAPTERS": "needs vLLM; `make test-vllm` runs it",
    },
    "docs/styles.md": dict.fromkeys(["python -m", "shira experiment"], "hours: the figures of the page"),
}


def snippets(page):
    """(language, text) of the snippets of a page, and whether each one is left out."""
    found = [(language, text) for language, _, text in BLOCK.findall(PAGES[page])]
    left_out = NOT_RUN.get(page, {})
    return [(language, text, any(text.startswith(begin) for begin in left_out)) for language, text in found]


def test_every_snippet_runs_or_says_why_not():
    for page in PAGES:
        elsewhere = {language for languages in ELSEWHERE.get(page, {}) for language in languages.split()}
        for language, text, left_out in snippets(page):
            ways = [language in elsewhere, page in HERE and language not in elsewhere and not left_out, left_out]
            assert sum(ways) == 1, f"{page}: {text}"
        for begin in NOT_RUN.get(page, {}):
            assert any(text.startswith(begin) for _, text, _ in snippets(page)), f"{page} has no snippet {begin!r}"
        others = re.sub(r"^```\w.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
        begins = r"^(?:```\n)?(?:    )?(?:\$ )?(?:shira \w|python -m|pip install|tuner = |shira\.\w+\().*"
        hidden = re.findall(begins, others, re.MULTILINE)
        assert not hidden, f"{page}: not in a block with a language: {hidden}"
    for page, languages in ELSEWHERE.items():
        for test in languages.values():
            parts = (ROOT / "tests" / test).read_text("utf-8")
            assert Path(page).name in parts, f"{test} does not name {page}"
    assert PAGES.keys() >= ELSEWHERE.keys() | HERE.keys() | NOT_RUN.keys()


@pytest.mark.parametrize("page", NOT_RUN)
def test_what_does_not_run_exists(page):
    lines = [line for language, text, left_out in snippets(page) if left_out and language == "bash" for line in commands(text)]
    assert lines or not any(language == "bash" and left_out for language, _, left_out in snippets(page))
    for line in lines:
        for command in line.split(" && "):
            exists(shlex.split(command, comments=True))


def commands(text):
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def exists(words):
    """The command, and its options if it is ours; the modules and targets of the checkout."""
    while re.fullmatch(r"[A-Z0-9_]+=.*", words[0]):
        words = words[1:]
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text("utf-8"), words
    elif "-m" in words[:-1] and (module := words[words.index("-m") + 1]).startswith(("experiments", "benchmarks", "shira.cli")):
        if module == "shira.cli":
            return exists(["shira", *words[words.index("-m") + 2 :]])
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), words
    elif Path(words[0]).name == "shira":
        import typer

        from shira.cli import app

        parameters = typer.main.get_command(app).commands[words[1]].params
        known = {option for each in parameters for option in each.opts + each.secondary_opts}
        given = {word.partition("=")[0] for word in words[2:] if re.match(r"--?[a-z]", word)}
        assert words[1] in COMMANDS and given <= known, f"{words}: {given - known}"
    else:
        assert words[0] in ("pip", "torchrun", "accelerate", "mkdir", "echo") or Path(words[0]).name == "python", words


@pytest.fixture
def prepared(tmp_path, monkeypatch, tiny_llama):
    """A folder with a model, adapters and data, and the names that the snippets use."""
    monkeypatch.chdir(tmp_path)
    tiny_llama.save_pretrained("SmolLM2")
    letter_tokenizer().save_pretrained("SmolLM2")
    switcher = shira.Switcher(tiny_llama)
    for seed, name in enumerate(["poet", "coder", "spam", "questions"]):
        made = random_adapter(tiny_llama, seed, density=0.005 if name == "poet" else 0.05)
        shira.Adapter(made.tensors, made.metadata | {"name": name}).save(f"{name}.safetensors")
        switcher.add(name, f"{name}.safetensors")
    Path("rows.jsonl").write_text("".join(f'{{"prompt": "{n}=", "choices": ["x", "y"], "label": {n % 2}}}\n' for n in range(8)))
    batches = llama_batches()
    libraries = {"shira": shira, "torch": torch, "functools": functools}
    data = {"batches": batches, "batch": batches[0], "inputs": batches[0], "ids": batches[0]["input_ids"]}
    yield libraries | data | {"model": tiny_llama, "switcher": switcher}
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def executed(text, names):
    """Run a snippet, a statement at a time. A second `attach` is another way to do the first: it gets the model back before."""
    for statement in ast.parse(text).body:
        line = ast.unparse(statement)
        if "shira.attach(" in line and hasattr(names["model"], "shira_tuner"):
            names["model"].shira_tuner.detach()
        exec(compile(line, "snippet", "exec"), names)


def in_a_shell(line, run):
    """The exit code of a command of ours in this process, and of any other."""
    if not line.startswith("shira "):
        return subprocess.run(["bash", "-c", line]).returncode, ""
    line = shlex.join(shlex.split(line, comments=True)).replace(MODEL, "SmolLM2").replace("--data spam", "--data rows.jsonl")
    return run(line.removeprefix("shira ") + " --steps 2" * line.startswith("shira train "))[::2]


def for_distributed(names):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return names | {"tuner": shira.attach(names["model"]), "accelerator": Accelerator(cpu=True)}


def for_extraction(names):
    Path("spam.safetensors").unlink()  # the page makes it
    tuned = {name: tensor.clone() for name, tensor in names["model"].state_dict().items()}
    for tensor in tuned.values():
        tensor.view(-1)[::4] += 0.01
    shutil.copytree("SmolLM2", "tuned")
    names["model"].save_pretrained("tuned", state_dict=tuned)
    return names


def for_train_image(names):
    from pipelines import folder_with_pictures, stable_diffusion

    folder_with_pictures(Path())
    for folder in ("stable-diffusion-v1-5/stable-diffusion-v1-5", "pipeline"):
        stable_diffusion().save_pretrained(folder)
    return names


MADE_READY = {
    "docs/distributed.md": for_distributed,
    "docs/extraction.md": for_extraction,
    "docs/train-image.md": for_train_image,
}


SLOW = {"docs/train-image.md": [pytest.mark.slow]}


@pytest.mark.parametrize("page", [pytest.param(p, marks=SLOW.get(p, [])) for p in HERE if p != "docs/serving.md"])
def test_the_snippets_run(page, prepared, run):
    base = all_bits(prepared["model"])
    names = MADE_READY.get(page, lambda names: names)(prepared)
    elsewhere = " ".join(ELSEWHERE.get(page, {}))
    for language, text, left_out in snippets(page):
        if left_out or language in elsewhere:
            continue
        for old, new in HERE[page].items():
            text = text.replace(old, new)
        if language == "python":
            executed(text, names)
        elif language == "bash":
            for line in commands(text):
                code, err = in_a_shell(line, run)
                assert code == 0, f"{line}\n{err}"
        else:
            for line, printed in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
                code, err = in_a_shell(line, run)
                assert code == bool(re.match(r"\w+Error: ", printed)), f"{line}\n{err}"
    if hasattr(prepared["model"], "shira_tuner"):
        prepared["model"].shira_tuner.detach()
    for switcher in {prepared["switcher"], names["switcher"]}:
        switcher.use(None)
    assert same_bits(base, all_bits(prepared["model"]))


def test_the_client_of_a_server(tmp_path, settled):
    """docs/serving.md: its client talks to the server that `shira serve` starts."""
    pytest.importorskip("openai")
    from serving import Served

    served = Served(tmp_path, tokenizer=letter_tokenizer())
    for name in ("poet", "coder"):
        random_adapter(served.model, len(name)).save(tmp_path / f"{name}.safetensors")
        served.catalogue.load(name)
    ((_, snippet, _),) = [each for each in snippets("docs/serving.md") if each[0] == "python"]
    with served.listening() as (address, _):
        exec(snippet.replace("http://127.0.0.1:8000", address).replace(MODEL, "base"), {})
