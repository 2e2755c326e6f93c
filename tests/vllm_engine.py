"""The vLLM engine for real, on tiny models: `make test-vllm`, in an environment of its own with vLLM. Not a part of the suite.

Every answer is compared, token by token, with Transformers and a `Switcher` on the same files.
"""

import contextlib
import os

import pytest
import torch

import shira
from conftest import letter_tokenizer
from shira.serving.vllm.offline import llm, sampling
from shira.sparse.tensor import SparseTensor, fingerprint

os.environ |= {  # vLLM is imported later, in `llm`
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
VOCABULARY, TOKENS = 97, 16
SELECTIONS = [None, "a", "b", "a:0.5+b", "c:-0.7"]
PROMPTS = [[(7 * number + 11 * place) % 90 + 4 for place in range(4 + 3 * number)] for number in range(5)]
STRENGTHS = {
    None: {},
    "a": {"a": 1.0},
    "b": {"b": 1.0},
    "a:0.5+b": {"a": 0.5, "b": 1.0},
    "c:-0.7": {"c": -0.7},
    "c": {"c": 1.0},
}


def tiny(folder, tied):
    """A Llama with grouped heads that vLLM's attention on CPUs accepts, saved with a tokenizer of letters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


def random_adapter(model, seed, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    tensors, prints = {}, {}
    for name, weight in model.named_parameters():
        chosen = (torch.rand(weight.numel(), generator=generator) < 0.1).nonzero().view(-1)
        values = scale * torch.randn(chosen.numel(), generator=generator)
        tensors[name] = SparseTensor(tuple(weight.shape), chosen, values)
        prints[name] = fingerprint(weight.detach().view(-1)[chosen])
    return shira.Adapter(tensors, {"fingerprints": prints})


class Oracle:
    """Transformers with a switcher on the same model and the same files."""

    def __init__(self, folder, adapters, names="abc"):
        from transformers import LlamaForCausalLM

        self.model = LlamaForCausalLM.from_pretrained(folder).eval()
        for seed, name in enumerate(names, start=1):
            random_adapter(self.model, seed).save(adapters / f"{name}.safetensors")
        self.switcher = shira.Switcher(self.model)
        for name in names:
            self.switcher.add(name, shira.load(adapters / f"{name}.safetensors"))

    def base(self):
        self.switcher.use(None)
        return self.model

    def answer(self, prompt, selection, tokens=TOKENS):
        self.switcher.use(STRENGTHS[selection])
        generated = self.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=tokens, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return generated[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=["tied", "untied"])
def tied(request):
    return request.param == "tied"


def world(root, tied=True):
    (root / "adapters").mkdir()
    folder = tiny(root / "model", tied)
    return folder, root / "adapters", Oracle(folder, root / "adapters")


@contextlib.contextmanager
def engine(folder, adapters, **options):
    """vLLM's offline engine; at the end the base must be there again, bit for bit and in the same places."""
    chosen = {"dtype": "float32", "max_model_len": 256, "quantum": 3, "enforce_eager": True, **options}
    made, catalogue = llm(str(folder), adapters=adapters, **chosen)
    try:
        before = made.collective_rpc("shira_checksum")
        yield made, catalogue
        ask(made, catalogue, [(PROMPTS[0], None)])
        assert made.collective_rpc("shira_checksum") == before
        assert all(tiers["weights"] == "" for tiers in made.collective_rpc("shira_tiers"))
    finally:
        made.llm_engine.engine_core.shutdown()


def ask(made, catalogue, questions, tokens=TOKENS, **options):
    """The token ids of each answer, or "error"."""
    parameters = [
        sampling(catalogue, selection, max_tokens=tokens, temperature=0, ignore_eos=True, **options)
        for _, selection in questions
    ]
    answers = made.generate([{"prompt_token_ids": prompt} for prompt, _ in questions], parameters, use_tqdm=False)
    return ["error" if answer.outputs[0].finish_reason == "error" else list(answer.outputs[0].token_ids) for answer in answers]


def all_right(made, catalogue, oracle, selections=SELECTIONS, prompts=PROMPTS, tokens=TOKENS):
    questions = [(prompt, selection) for prompt in prompts for selection in selections]
    expected = [oracle.answer(prompt, selection, tokens) for prompt, selection in questions]
    assert ask(made, catalogue, questions, tokens) == expected
    return len(questions)


def test_interleaved_selections_and_faults_while_requests_are_queued(tmp_path, tied):
    folder, adapters, oracle = world(tmp_path, tied)
    with engine(folder, adapters) as (made, catalogue):
        for _ in range(2):
            assert all_right(made, catalogue, oracle) == 25
        _long_prompts_do_not_share_blocks(made, catalogue, oracle)
        _faults(made, catalogue, oracle, adapters)
        all_right(made, catalogue, oracle, [None, "b", "c"])


def _long_prompts_do_not_share_blocks(made, catalogue, oracle):
    long = [[(5 * place) % 90 + 4 for place in range(200)]]
    for _ in range(2):
        for selection in (None, "a", "b", None):
            all_right(made, catalogue, oracle, [selection], long, 4)


def _faults(made, catalogue, oracle, adapters):
    """Files that are spoiled, removed or replaced after requests were made with them; sums that overflow; another base."""
    questions = [(prompt, selection) for prompt in PROMPTS for selection in ("a", None, "b")]
    right = {selection: [oracle.answer(prompt, selection) for prompt in PROMPTS] for selection in (None, "b")}
    file = adapters / "a.safetensors"
    spoiled = {"nonsense": b"nonsense", "too short": file.read_bytes()[:-7], "removed": None, "replaced": file.read_bytes()}
    for seed, (case, content) in enumerate(spoiled.items(), start=40):
        _save(oracle, catalogue, file, seed)
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        answers = ask(made, catalogue, questions)
        assert answers == [each for others in zip(right[None], right["b"], strict=True) for each in ("error", *others)], case
        reasons = made.collective_rpc("shira_failure", args=(catalogue.resolve("a").key,))
        assert all(reasons) and ("removed" in reasons[0] or "replaced" in reasons[0] or case not in ("removed", "replaced"))
    _save(oracle, catalogue, file, 50)
    oracle.switcher.remove("a")
    oracle.switcher.add("a", shira.load(file))
    all_right(made, catalogue, oracle, ["a", None])
    answers = ask(made, catalogue, [(prompt, selection) for prompt in PROMPTS for selection in ("b:1e39", "b")])
    assert answers == [each for answer in right["b"] for each in ("error", answer)]
    other = random_adapter(oracle.base(), 60)
    wrong = dict.fromkeys(other.tensors, fingerprint(torch.zeros(3)))
    shira.Adapter(other.tensors, {"fingerprints": wrong}).save(adapters / "wrong.safetensors")
    catalogue.load("wrong")
    assert ask(made, catalogue, [(PROMPTS[0], "wrong"), (PROMPTS[0], "b")]) == ["error", right["b"][0]]
    reasons = made.collective_rpc("shira_failure", args=(catalogue.resolve("wrong").key,))
    assert all("does not belong to this model" in reason for reason in reasons)


def _save(oracle, catalogue, file, seed):
    """A new version of an adapter, of which the catalogue knows."""
    random_adapter(oracle.base(), seed).save(file)
    catalogue.load(file.stem)


@pytest.fixture
def is_async(request, monkeypatch):
    """Whether the engine chooses the next step before it has this one's output. On CPUs vLLM does not, unless it is made to."""
    if request.param:
        from vllm.platforms.cpu import CpuPlatform

        check = CpuPlatform.check_and_update_config

        def check_again(config):
            check(config)
            config.scheduler_config.async_scheduling = True

        monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(check_again))
    return request.param


@pytest.mark.parametrize("is_async", [True, False], indirect=True)
def test_compiled_code_and_both_schedulers(tmp_path, is_async):
    folder, adapters, oracle = world(tmp_path)
    with engine(folder, adapters, enforce_eager=False) as (made, catalogue):
        assert made.llm_engine.vllm_config.scheduler_config.async_scheduling is is_async
        assert all_right(made, catalogue, oracle) == 25


@pytest.mark.parametrize("is_async", [True, False], indirect=True)
def test_a_kv_cache_that_is_too_small(tmp_path, is_async):
    """The cache holds two of the 15 requests at most; so hidden requests must give up their blocks."""
    folder, adapters, oracle = world(tmp_path)
    prompts = [[(3 * place + number) % 90 + 4 for place in range(100)] for number in range(3)]
    with engine(
        folder, adapters, quantum=2, max_model_len=160, num_gpu_blocks_override=10, block_size=32, max_num_batched_tokens=64,
        disable_log_stats=False, enable_prefix_caching=False,
    ) as (made, catalogue):  # fmt: skip
        assert made.llm_engine.vllm_config.scheduler_config.async_scheduling is is_async
        all_right(made, catalogue, oracle, SELECTIONS, prompts, 24)
        counted = [metric for metric in made.get_metrics() if metric.name == "vllm:num_preemptions"]
        assert sum(metric.value for metric in counted) > 0


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes(tmp_path, tied, processes):
    """With four, two processes hold each of the two heads of keys and values."""
    folder, adapters, oracle = world(tmp_path, tied)
    with engine(folder, adapters, tensor_parallel_size=processes) as (made, catalogue):
        assert len(made.collective_rpc("shira_tiers")) == processes
        all_right(made, catalogue, oracle)
        _faults(made, catalogue, oracle, adapters)
        all_right(made, catalogue, oracle, [None, "b", "c"])
