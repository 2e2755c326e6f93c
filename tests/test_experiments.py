"""The experiments behind the docs: their masks keep their budgets, and their tables say what was measured."""

import re

import pytest
import torch
from experiments import fusion_masks
from experiments.language import more_tasks, near
from experiments.store import Store

from shira import masks


@pytest.mark.parametrize("rule", sorted(set(fusion_masks.RULES) - {"wm", "snip", "grad", "rand"}))
def test_rules_keep_the_budget_and_see_what_they_say(rule):
    torch.manual_seed(0)
    weight, gradient, k = torch.randn(12, 20), torch.randn(12, 20), 30
    setting = fusion_masks.Setting(torch.nn.Module(), None, "spam", 0, {"w": torch.rand(12, 20)})
    chosen = masks.select(fusion_masks.RULES[rule](setting), "w", weight, k, gradient=gradient)
    assert chosen.numel() == k
    rows, columns = torch.bincount(chosen // 20, minlength=12), torch.bincount(chosen % 20, minlength=20)
    if rule == "snip-rows":
        assert rows.min() >= k // 12
    if rule == "snip-columns":
        assert columns.min() >= k // 20
    if rule == "wm-snip":
        assert weight.abs().view(-1)[chosen].min() >= weight.abs().view(-1).sort().values[-5 * k]


def test_classes_are_disjoint():
    weight, gradient = torch.randn(40, 40), torch.randn(40, 40)
    chosen = [fusion_masks.of_class(number)(weight, gradient, 100) for number in range(4)]
    assert torch.cat(chosen).unique().numel() == 400


def test_the_table_is_of_the_rate_that_validation_chose(tmp_path):
    """Two rates, three tasks; 80 % alone and 70 % fused at the better one."""
    store = Store(tmp_path / "results.jsonl")
    for task in fusion_masks.TASKS:
        store.add({"rule": "base", "task": task}, {"accuracy": 0.5}, 0)
    for rate, validated in ((0.001, 0.6), (0.002, 0.7)):
        for task in fusion_masks.TASKS:
            for part, accuracy in (("validation", validated), ("test", 0.8)):
                key = {"rule": "wm", "adapters": [task], "on": task, "seed": 0, "rate": rate, "part": part}
                store.add(key, {"accuracy": accuracy}, 0)
        for pair in fusion_masks.PAIRS:
            for task in pair:
                key = {"rule": "wm", "adapters": pair, "on": task, "seed": 0, "rate": rate, "part": "test"}
                store.add(key, {"accuracy": 0.7}, 0)
    rows = fusion_masks.summary(store.path)
    assert [(row["rate"], row["chosen"]) for row in rows] == [(0.001, False), (0.002, True)]
    assert "| **wm** | 0.002 | 1 | 80.0 | 70.0 | 10.0 |" in fusion_masks.markdown(rows)
    fusion_masks.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5_000


def test_rules_have_the_names_of_other_pages_and_older_ones_in_the_results_file(tmp_path):
    store = Store(tmp_path / "results.jsonl")
    store.add({"rule": "base", "task": "spam"}, {"accuracy": 0.5}, 0)
    key = {"rule": "wm-penalty", "seed": 0, "rate": 0.001}
    for task in fusion_masks.TASKS:
        for part in ("validation", "test"):
            store.add(key | {"adapters": [task], "on": task, "part": part}, {"accuracy": 0.8}, 0)
    for pair in fusion_masks.PAIRS:
        for task in pair:
            store.add(key | {"adapters": pair, "on": task, "part": "test"}, {"accuracy": 0.7}, 0)
    assert [row["rule"] for row in fusion_masks.summary(store.path)] == ["wm-near"]


def test_the_penalty_on_lora_has_the_gradient_that_autograd_finds():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 7), (5, 3)))
    pull = torch.rand(5, 7, generator=generator)
    (0.5 * (pull * (2.0 * b @ a) ** 2).sum()).backward()
    for found, parameter in zip(near.gradients(a, b, 2.0, pull), (a, b), strict=True):
        torch.testing.assert_close(found(), parameter.grad)


def test_sums_are_right_and_their_parts_apart():
    sums = more_tasks.Sums()
    parts = [sums.train(), sums.validation(), sums.test()]
    prompts = [example.prompt for part in parts for example in part]
    assert len(prompts) == len(set(prompts)) == more_tasks.SUMS
    for example in sums.test():
        first, *changes = map(int, re.findall(r"[0-9]+", example.prompt))
        signs = [-1 if "taken" in said else 1 for said in re.findall(r"more are put|taken out", example.prompt)]
        assert int(example.completion) == first + sum(s * c for s, c in zip(signs, changes, strict=True))
        assert example.choices[example.label] == example.completion and len(set(example.choices)) == 4
