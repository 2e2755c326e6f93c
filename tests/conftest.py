"""Tiny random models, and how to compare bits."""

import contextlib
import functools
import gc
import os
import shlex
import sys
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a hub, and none may wait for one

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for each other do not take the others' processors
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as processors
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported, by whichever test

import pytest
import typer
from hypothesis import settings
from torch import Tensor, nn

import shira
from shira import cli, kernels

# Machines are shared: no example is timed. Each run draws other examples; SHIRA_LONG=1 draws more at once.
settings.register_profile("shira", deadline=None, max_examples=500 if os.environ.get("SHIRA_LONG") else 50)
settings.load_profile("shira")


def pytest_collection():
    gc.disable()  # while everything is imported


frozen_at = 0  # how many modules there were


def freeze():
    """What was imported until now stays, so that no collection looks through it: a Trainer collects twice in each training."""
    global frozen_at
    frozen_at = len(sys.modules)
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    gc.enable()
    freeze()


def pytest_runtest_logfinish():
    if len(sys.modules) > frozen_at + 200:  # libraries are imported late, in the middle of what needs them
        freeze()


typer.main.get_command = functools.cache(typer.main.get_command)  # it takes 50 ms to put our commands together


@contextlib.contextmanager
def plain_c():
    """The kernels in C without the instructions that not all processors have."""
    token = kernels.native.plain_c.set(True)
    try:
        yield
    finally:
        kernels.native.plain_c.reset(token)


@pytest.fixture
def two_threads():
    """Kernels and fusion share their work among two threads, however many torch has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor: unlike torch.equal on floats, they tell -0.0 from 0.0 and NaN from another NaN."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).clone()


def all_bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: bits(parameter) for name, parameter in model.named_parameters()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Two linear layers whose sides are multiples of nothing."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(13, 11), nn.ReLU(), nn.Linear(11, 5)).to(dtype)


def mlp_batches(count: int = 3, size: int = 7, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 13, generator=generator), torch.randint(5, (size,), generator=generator)) for _ in range(count)]


def mlp_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    weight = next(model.parameters())
    return nn.functional.cross_entropy(model(inputs.to(weight)).float(), labels.to(weight.device))


def attach_is_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    """`attach` with these options raises this error, and the model stays as it is."""
    model = mlp()
    before, state, flags = all_bits(model), set(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=words):
        shira.attach(model, **options)
    assert same_bits(before, all_bits(model))
    assert set(model.state_dict()) == state
    assert [p.requires_grad for p in model.parameters()] == flags


def random_adapter(model: nn.Module, seed: int, density: float = 0.3, kind: str = "overwrite") -> shira.Adapter:
    """An adapter of random positions and values for every matrix of a model, fingerprints included."""
    generator = torch.Generator().manual_seed(seed)
    tensors, prints = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            chosen = (torch.rand(parameter.numel(), generator=generator) < density).nonzero().view(-1)
            values = torch.randn(chosen.numel(), generator=generator).to(parameter.dtype)
            tensors[name] = shira.SparseTensor(tuple(parameter.shape), chosen, values, kind)
            prints[name] = shira.sparse.tensor.fingerprint(parameter.detach().view(-1)[chosen])
    return shira.Adapter(tensors, {"name": f"random{seed}", "fingerprints": prints})


CHAT = (  # of one sign a turn; the answer stands between = and ;
    "{% for m in messages %}{{ {'system': '!', 'user': '?', 'assistant': '='}[m['role']] + m['content'] + ';' }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


def letter_tokenizer(chat_template: str | None = CHAT):
    """A fast tokenizer of single letters, as many as `tiny_llama` knows."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<s>", "<unk>", *(chr(code) for code in range(33, 126)), " "]
    plain = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(letters)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<s>", unk_token="<unk>")
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture
def tiny_llama():
    """A Llama of two layers with tied embeddings, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def llama_batches(count: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, 97, (3, 9), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "labels": i} for i in ids]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with pictures."""
    from pipelines import folder_with_pictures

    monkeypatch.chdir(tmp_path)
    folder_with_pictures(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def one_pipeline():
    from pipelines import stable_diffusion

    return stable_diffusion()


@pytest.fixture
def pipe(one_pipeline):
    """A pipeline of Diffusers for tests that leave it as it was."""
    from pipelines import pipe_bits

    before = pipe_bits(one_pipeline)
    yield one_pipeline
    assert same_bits(pipe_bits(one_pipeline), before)


@pytest.fixture
def adapters(pipe):
    """Two adapters of that pipeline, "a" and "b"."""
    from pipelines import pipe_adapter
    from shira.integrations.diffusers import PipelineAdapters

    made = PipelineAdapters(pipe)
    for seed, name in enumerate("ab", start=1):
        made.load(pipe_adapter(pipe, seed), name)
    yield made
    made.unfuse()
    made.disable()


@pytest.fixture
def settled(monkeypatch):
    """A served folder does not wait until its files have settled: a test writes them at once."""
    from shira.serving import catalogue

    monkeypatch.setattr(catalogue, "SETTLED", -1.0)


@pytest.fixture
def site(tmp_path, settled):
    """An application with the gate and the routes about adapters."""
    from serving_site import Site

    return Site(tmp_path)


@pytest.fixture(scope="session")
def short_model(tmp_path_factory):
    """The real model without its layers from the fourth on, in a folder of its name."""
    from shira.data.models import SMOLLM2
    from shira.integrations.transformers import load_model, load_tokenizer

    model, folder = load_model(SMOLLM2), tmp_path_factory.mktemp("short") / SMOLLM2
    del model.model.layers[3:]
    model.config.num_hidden_layers = 3
    model.config.layer_types = None
    model.save_pretrained(folder)
    load_tokenizer(SMOLLM2).save_pretrained(folder)
    return folder


@pytest.fixture
def short_built_in(short_model, monkeypatch):
    """The name of the built-in model means `short_model`."""
    monkeypatch.setattr("shira.data.models._folder", lambda name: short_model)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; returns (exit code, stdout, stderr)."""

    def run_(line):
        monkeypatch.setattr(sys, "argv", ["shira", *shlex.split(line)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run_


@pytest.hookimpl(trylast=True)  # after those that are not asked for are left out
def pytest_collection_modifyitems(items):
    """The longest tests first, so that no process is left alone with one of them at the end.

    pytest-xdist divides the list into one share for each process; later, a process without tests takes some from the end of
    another's share. So each share begins with some of the longest tests.
    """
    names = ("test_the_demo", "test_the_commands_run", "test_real", "test_readme", "at_every_line", "at_pairs")
    names += ("test_distributed", "test_streaming", "after a cast")

    def place(item):
        found = (number for number, name in enumerate(names) if name in item.nodeid)
        return next(found, len(names) + (item.get_closest_marker("slow") is None))

    items.sort(key=place)
    longest = [item for item in items if place(item) <= len(names)]
    others, ordered = items[len(longest) :], []
    shares = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    for number in range(shares):
        size = (len(items) - len(ordered)) // (shares - number)
        ordered += longest[number::shares]
        count = size - len(longest[number::shares])
        ordered += others[: max(0, count)]
        del others[: max(0, count)]
    items[:] = ordered + others


def stops(monkeypatch, command, training):
    """Let a command's training stop, as by Ctrl-C, after step n if the returned list is [n]; [None] lets it run."""
    original, at = getattr(command, training), [None]

    def watched(*given, on_step, **options):
        def step_done(step, *more):
            on_step(step, *more)
            if step == at[0]:
                raise KeyboardInterrupt

        return original(*given, on_step=step_done, **options)

    monkeypatch.setattr(command, training, watched)
    return at
