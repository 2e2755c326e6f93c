"""The harness on a live model gives what our own scores give, adapters and all."""

import functools
import json
import re

import pytest
import torch

import shira
from conftest import letter_tokenizer, random_adapter
from shira import DataError
from shira.data.tasks import Example
from shira.integrations.lm_eval import evaluate, task_of
from shira.runs.evaluation import choice_scores
from shira.runs.significance import interval, mcnemar

WORDS = ["abc", "cab", "ba", "bac", "ca", "ab", "acb"]
SINGLE = [Example(f"{word} is ", "a", ("a", "b", "c"), number % 3) for number, word in enumerate(WORDS)]
LONG = [Example(f"{word} so ", "abc", ("abc", "bb cc"), number % 2) for number, word in enumerate(WORDS[:4])]


@pytest.fixture
def live(tmp_path, monkeypatch, tiny_llama):
    monkeypatch.setenv("SHIRA_CACHE", str(tmp_path))
    return tiny_llama, letter_tokenizer()


def expected(model, tokenizer, examples, by_length):
    """The choice of the highest log-probability, for its length in characters if so wished."""
    right = []
    for example, scores in zip(examples, choice_scores(model, tokenizer, examples), strict=True):
        if by_length:
            scores = [score / len(choice) for score, choice in zip(scores, example.choices, strict=True)]
        right.append(max(range(len(scores)), key=scores.__getitem__) == example.label)
    return tuple(right)


@pytest.mark.parametrize(("examples", "by_length"), [(SINGLE, False), (LONG, True)])
def test_likelihood_of_choices(live, examples, by_length):
    model, tokenizer = live
    done = []
    (score,) = evaluate(model, tokenizer, [task_of("some", examples)], on_progress=done.append, batch_size=3)
    assert score.task == "some" and score.right == expected(model, tokenizer, examples, by_length)
    assert done[-1] == sum(len(example.choices) for example in examples)
    assert len(evaluate(model, tokenizer, [task_of("some", examples)], limit=2)[0].right) == 2


def test_two_tasks_with_an_adapter(live):
    model, tokenizer = live
    switcher = shira.Switcher(model)
    switcher.add("random", random_adapter(model, 1, density=1.0))
    tasks = [task_of("single", SINGLE), task_of("long", LONG)]
    before = evaluate(model, tokenizer, tasks)
    with switcher.using("random"):
        scores = evaluate(model, tokenizer, tasks)
        assert scores[0].right == expected(model, tokenizer, SINGLE, False)
    assert [score.task for score in scores] == ["single", "long"]
    assert evaluate(model, tokenizer, tasks) == before


def test_generated_answers_must_be_the_choice(live):
    model, tokenizer = live
    ids = tokenizer(SINGLE[0].prompt, return_tensors="pt")
    model.config.max_position_embeddings = 128
    with torch.no_grad():
        model.get_output_embeddings().weight[[0, 1, 2, 96]] = 0.0  # else it writes spaces
        written = model.generate(**ids, max_new_tokens=64, do_sample=False)[0, ids["input_ids"].shape[1] :]
    line = tokenizer.decode(written)

    def right(choices):
        examples = [Example(SINGLE[0].prompt, choice, choices, label) for label, choice in enumerate(choices)]
        return evaluate(model, tokenizer, [task_of("written", examples, kind="generated")])[0].right

    assert right((line[0], "zz")) == (True, False)
    many = (line, *(f"no choice {number}" for number in range(30)))
    assert right(many) == (True, *[False] * 30)


@pytest.mark.parametrize(
    ("choices", "text", "found"),
    [
        ((" A", " B"), " B. because A", "B"),
        ((" A", " B"), "Ah, a better one: A", "A"),
        ((" yes", " no"), " Yes, not no", "Yes"),
        ((" ab", " ab c"), " ab c", "ab c"),
        ((" c++", " c"), "c++", "c++"),
        ((" A", " B"), " none", None),
    ],
)
def test_the_answer_is_the_first_choice_that_is_mentioned(choices, text, found):
    task = task_of("x", [Example("q", choices[0], choices, 0)], kind="generated")
    (pattern,) = [f["regex_pattern"] for f in task["filter_list"][0]["filter"] if "regex_pattern" in f]
    assert re.findall(pattern, text)[:1] == ([] if found is None else [found])


def test_what_cannot_be_asked(live):
    with pytest.raises(DataError, match="'x' needs examples with 'choices'"):
        task_of("x", [Example("a", "b")])
    with pytest.raises(DataError, match="kind must be one of likelihood, generated"):
        task_of("x", SINGLE, kind="guess")


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)]
)
def test_intervals_are_wilsons(right, asked, low, high):
    assert interval(right, asked) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("ours", "others", "both"), [(0, 0, 9), (1, 0, 3), (5, 5, 0), (8, 1, 4), (2, 11, 1)])
def test_mcnemar_is_a_binomial_test(ours, others, both):
    from scipy.stats import binomtest

    one = [True] * ours + [False] * others + [True] * both
    other = [False] * ours + [True] * others + [True] * both
    expected = binomtest(ours, ours + others).pvalue if ours + others else 1.0
    assert mcnemar(one, other) == pytest.approx(expected) and mcnemar(other, one) == mcnemar(one, other)


@pytest.fixture
def bars():
    """tqdm's bars are shown at first, and are as they were afterwards: a command hides them to the end of its process."""
    import tqdm

    usual = vars(tqdm.tqdm)["__init__"]
    while isinstance(usual, functools.partialmethod):  # hidden by an earlier test
        usual = usual.func
    tqdm.tqdm.__init__ = usual
    yield
    tqdm.tqdm.__init__ = usual


def test_the_command_asks_the_harness(live, tmp_path, run, bars, capsys):
    model, tokenizer = live
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": e.prompt, "choices": list(e.choices), "label": e.label} for e in LONG]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    random_adapter(model, 1).save(tmp_path / "random.safetensors")
    line = f"eval {tmp_path}/model --data {tmp_path}/long.jsonl -a {tmp_path}/random.safetensors --harness"
    capsys.readouterr()  # those of Transformers, which saved the model
    code, out, err = run(f"{line} --json")
    assert code == 0, err
    assert "it/s" not in err and "%|" not in err  # no bar beside our own lines
    (base, _) = json.loads(out)["results"]
    right = sum(expected(model, tokenizer, LONG, True))
    assert base["accuracy"] == right / len(LONG)
    low, high = interval(right, len(LONG))
    code, out, _ = run(line)
    assert f"({100 * low:.0f}-{100 * high:.0f})" in out
