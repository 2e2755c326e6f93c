"""The eight commonsense benchmarks: their texts taken apart, and, once fetched, their parts."""

import functools

import pytest

from shira.data.commonsense import BENCHMARKS, COMMONSENSE, VALIDATION, Benchmark, example

ROWS = [
    (
        "Goal: How do I dry a cup?\n A. Use a towel.\n B. Use a fish.\nAnswer:",
        ("Goal: How do I dry a cup?\nAnswer:", (" Use a towel.", " Use a fish.")),
    ),
    (
        "Roof: A man sits. He\nChoose the best continuation:\n A. stands up.\n B. is a roof.\nAnswer:",
        ("Roof: A man sits. He", (" stands up.", " is a roof.")),
    ),
    (
        "A text of two\nlines.\nQuestion: is it so?\n A. yes\n B. no\nAnswer:",
        ("A text of two\nlines.\nQuestion: is it so?\nAnswer:", (" yes", " no")),
    ),
]


@pytest.mark.parametrize(("query", "expected"), ROWS)
def test_a_question_is_taken_apart(query, expected):
    text = example(query, 1, letters=False)
    assert (text.prompt, text.choices) == expected and text.completion == text.choices[1]
    letters = example(query, 1, letters=True)
    assert (letters.prompt, letters.choices, letters.completion) == (query, (" A", " B"), " B")


@pytest.mark.real
@pytest.mark.slow
def test_the_parts_of_each_benchmark_are_apart(monkeypatch):
    read = Benchmark._read
    monkeypatch.setattr(Benchmark, "_read", functools.cache(lambda *which: list(read(*which))))  # each file once
    sizes = {benchmark.name: len(benchmark.test()) for benchmark in BENCHMARKS}
    assert sizes == {
        "boolq": 3270,
        "piqa": 1838,
        "siqa": 1954,
        "hellaswag": 10042,
        "winogrande": 1267,
        "arc-easy": 2376,
        "arc-challenge": 1172,
        "openbookqa": 500,
    }
    trained = {benchmark.name: benchmark.train() for benchmark in BENCHMARKS}
    piqa = COMMONSENSE["piqa"]
    assert (len(trained["piqa"]), len(piqa.validation())) == (16113 - VALIDATION, VALIDATION)
    assert piqa.validation()[0] not in trained["piqa"][-VALIDATION:]
    for benchmark in BENCHMARKS:
        assert all(len(e.choices) >= 2 and e.choices[e.label] == e.completion for e in benchmark.validation())
    combined = COMMONSENSE["commonsense"].train()
    assert len(combined) == sum(map(len, trained.values()))
    assert [e.prompt for e in combined[:8]] == [examples[0].prompt for examples in trained.values()]
