"""Masks chosen once, again, or by steady gradients, at equal compute (experiments/language/schedules.py)."""

import torch
from experiments.language import methods, runs, schedules, settings
from experiments.store import Store, number

import shira
from shira import masks
from test_language import bench, run_all  # noqa: F401, a fixture


def test_steady_gradients_count_more():
    """The third entry has the largest |weight · gradient|, but its two batches cancel nearly."""
    weight = torch.tensor([1.0, 1.0, 10.0])
    batches = torch.tensor([[1.0, 0.1, 9.0], [1.0, 0.1, -8.0]])
    gradient, squares = batches.sum(0), batches.square().mean(0)
    assert masks.snip(weight, gradient, 1).tolist() == [2]
    assert methods.steady_snip(weight, gradient, squares, 1).tolist() == [0]
    assert methods.steady_snip(torch.ones(2), torch.zeros(2), torch.zeros(2), 1).tolist() == [0]  # no NaN


def test_every_method_of_the_recipe_takes_as_much_compute():
    """A pass over the calibration examples costs as much as their number of training examples."""
    recipe = settings.named("schedules")
    for name, method in recipe["methods"].items():
        every = method.get("refresh", {}).get("refresh_every", method["steps"])
        passes = 0 if method["options"]["mask"] == "wm" else 1 + (method["steps"] - 1) // every
        assert method["steps"] + passes * recipe["calibration"] / recipe["batch_size"] == recipe["steps"], name


def test_the_runs_and_their_table(bench, tmp_path, capfd):  # noqa: F811
    recipe = bench | {"experiment": "schedules", "compare_with": "snip", "data": "one", "steps": 6, "calibration": 8}
    snip = {"options": {"mask": "snip", "rank": 2}, "steps": 4, "rates": [0.01]}
    recipe["methods"] = {
        "snip": snip,
        "snip-again": snip | {"refresh": {"refresh_every": 2, "refresh_cap": 1.0}},
        "steady": snip | {"options": {"mask": "steady-snip", "rank": 2}},
    }
    store = Store(tmp_path / "results.jsonl")
    assert schedules.report(recipe, store, None) == "no results yet"
    made = run_all(recipe, store)
    assert [key["steps"] for key in made] == [4] * 6 and run_all(recipe, store) == []
    lines = schedules.report(recipe, store, None).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| snip", "| snip-again", "| steady"]
    assert all(" | 0.01 (1) | 2 | " in line for line in lines[2:])
    assert all(" ± " in line for line in lines[3:])
    of_name = {name: schedules.one(recipe, method, 0.01, 0)[0] for name, method in recipe["methods"].items()}
    found = {name: shira.load(runs.artefacts() / number(key) / methods.OURS) for name, key in of_name.items()}
    assert found["snip-again"].metadata["mask"]["refresh"]["times"] == 1
    positions = {name: [tensor.indices for tensor in adapter.tensors.values()] for name, adapter in found.items()}
    for name in ("snip-again", "steady"):
        assert not all(map(torch.equal, positions["snip"], positions[name])), name
