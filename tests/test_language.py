"""The language experiments: what is run, what is not run again, and that tables say what came out."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from experiments.language import combined, forgetting, fused, merging, methods, one_rate, rule, settings, tables
from experiments.language import main as language
from experiments.language.questions import examples
from experiments.language.runs import Lab, score_key, train_key
from experiments.language.search import rates_to_try
from experiments.store import Store, artefacts, claim, number, work

import shira
from conftest import all_bits, letter_tokenizer, same_bits
from shira import DataError
from shira.data import reading
from shira.data.tasks import Example, Task
from shira.integrations import transformers as hf

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SHIRA_CACHE", str(tmp_path / "cache"))


def test_a_store_knows_what_is_done_and_follows_others(tmp_path):
    one, other = Store(tmp_path / "r.jsonl"), Store(tmp_path / "r.jsonl")
    assert one.get({"a": 1}) is None
    one.add({"a": 1, "b": [2]}, {"x": 3}, 0.5)
    assert other.get({"b": [2], "a": 1}) == {"x": 3}  # in whatever order
    with open(tmp_path / "r.jsonl", "a") as file:
        file.write('{"run": "half')  # another process is writing
    assert len(other.lines()) == 1
    with open(tmp_path / "r.jsonl", "a") as file:
        file.write('way", "result": 4}\n')
    assert other.line("halfway")["result"] == 4
    line = one.line(number({"a": 1, "b": [2]}))
    assert line["versions"]["torch"] == torch.__version__ and line["seconds"] == 0.5
    assert one.forget(lambda line: line["run"] == "halfway") == 1
    assert [line["run"] for line in Store(one.path).lines()] == [line["run"]]


def test_work_is_shared_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.store.WAIT", 0)
    store = Store(tmp_path / "r.jsonl")
    keys = [{"n": n} for n in range(3)]
    made = []

    def run(key):
        made.append(key["n"])
        if key["n"] == 1 and made.count(1) == 1:
            raise KeyboardInterrupt
        return {"square": key["n"] ** 2}

    with pytest.raises(KeyboardInterrupt):
        work(lambda: keys, run, store)
    with claim(number(keys[1])) as mine:
        assert mine  # what was interrupted is free again
        code = f"from experiments.store import claim; c = claim({number(keys[1])!r}); print(c.__enter__())"
        seen = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert seen.stdout == "False\n"
    work(lambda: keys, run, store)
    assert made == [0, 1, 1, 2] and [store.get(key)["square"] for key in keys] == [0, 1, 4]


def test_a_run_that_fails_is_left_and_the_others_go_on(tmp_path):
    store, failed = Store(tmp_path / "r.jsonl"), []

    def run(key):
        if key["n"] == 1 and not failed:
            raise MemoryError("not enough")
        return {"square": key["n"] ** 2}

    for _ in range(2):  # a second time it is tried again
        work(lambda: [{"n": n} for n in range(3)], run, store, on_failure=lambda key, what: failed.append((key["n"], what)))
        assert store.get({"n": 2}) == {"square": 4} and failed == [(1, "MemoryError: not enough")]
    assert store.get({"n": 1}) == {"square": 1}


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({}, [1, 2, 4]),
        ({1: 3, 2: 1, 4: 2}, [1, 2, 4]),
        ({1: 3, 2: 2, 4: 1}, [1, 2, 4, 8]),
        ({1: 3, 2: 2, 4: 1, 8: 0}, [1, 2, 4, 8, 16]),
        ({1: 3, 2: 2, 4: 1, 8: 0, 16: -1}, [1, 2, 4, 8, 16]),
        ({1: 0, 2: 2, 4: 1}, [1, 2, 4, 0.5]),
    ],
)
def test_the_search_for_a_rate_goes_on_beyond_the_best(losses, expected):
    assert rates_to_try([1, 2, 4], losses, 5) == expected


def test_averages_and_paired_differences():
    answers = {"a": [1.0, 0.0, 1.0, 1.0], "b": [0.0, 1.0]}
    mean, error = tables.average(answers)
    assert mean == pytest.approx((0.75 + 0.5) / 2)
    assert error == pytest.approx(((0.25 / 4 + 0.5 / 2) ** 0.5) / 2)
    mean, error = tables.difference({"a": [1.0, 1.0, 0.0, 1.0]}, {"a": [0.0, 1.0, 0.0, 0.0]})
    assert mean == 0.5 and error == pytest.approx((1 / 3 / 4) ** 0.5)
    assert tables.chance(1.96, 1) == pytest.approx(0.05, abs=1e-4) and tables.chance(0, 0) == 1
    assert tables.points(0.031, 0.01) == "+3.1 ± 2.0 (p 0.002)" and tables.probability(1, 0.1) == "p < 0.001"
    assert tables.mean_answers([{"a": "110"}, {"a": "011"}]) == {"a": [0.5, 1.0, 0.5]}


def test_recipes_extend_each_other_and_name_their_mistakes(tmp_path):
    assert {"table2", "table3", "table4"} <= set(settings.recipes())
    small, large = settings.named("table2"), settings.named("table3")
    assert small["targets"] == large["targets"] and large["model"] != small["model"]
    with pytest.raises(DataError, match="no experiment 'tabel2'.*table2"):
        settings.named("tabel2")
    (tmp_path / "table2.yaml").write_text((settings.FOLDER / "table2.yaml").read_text())
    (tmp_path / "mine.yaml").write_text("extends: table2\nstep: 3\n")
    with pytest.raises(DataError, match="unknown setting 'step'.*steps"):
        settings.named(str(tmp_path / "mine.yaml"))


STYLES = {name for name in settings.recipes() if settings.named(name)["experiment"] == "image.style_experiment"}


@pytest.mark.parametrize("name", sorted(settings.recipes().keys() - STYLES))  # those are in test_styles.py
def test_what_decides_a_run_is_in_its_number(name):
    """Every rate and option counts; a method's name does not."""
    recipe = settings.named(name)
    assert all(isinstance(rate, float) for method in recipe["methods"].values() for rate in method["rates"])
    key = language.experiment_of(recipe).train_key
    # those that lie apart are searched as if they did not; those at a rate that lost a search share its runs
    methods = [method for method in recipe["methods"].values() if not {"apart", "most_rates"} & method.keys()]
    keys = [key(recipe, method, rate, 0) for method in methods for rate in method["rates"]]
    assert len({number(key) for key in keys}) == len(keys)


@pytest.fixture
def bench(tmp_path, monkeypatch, tiny_llama):
    """A recipe on a tiny model in a folder, and three tasks that a letter decides."""
    tiny_llama.save_pretrained(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    examples = [Example(f"{'xyz'[n % 3]}{n:03d} is ", "ab"[n % 2], ("a", "b"), n % 2) for n in range(60)]

    class Letters(Task):
        def _examples(self):
            return examples

    for task in ("one", "two"):
        monkeypatch.setitem(reading.BUILT_IN, task, Letters(task, "", "", "", ("a", "b"), None))
    monkeypatch.setattr("shira.data.tasks.HELD_OUT", 20)
    monkeypatch.setattr("experiments.language.questions.VALIDATION", 10)
    monkeypatch.setattr("experiments.language.runs.sentences", lambda count: [Example(completion="some text")] * count)
    recipe = settings.named("table4") | {"model": str(tmp_path / "model"), "dtype": "float32", "examples": 8, "steps": 2}
    recipe |= {
        "batch_size": 4,
        "calibration": 4,
        "validation": 6,
        "test": 10,
        "text": 3,
        "most_rates": 1,
        "strengths": [0.5],
        "data": ["one", "two"],
    }
    lora = {"peft": "LoraConfig", "options": {"r": 2}, "rates": [0.01], "fusions": {"sum": {}, "linear": {}}}
    made = {"lora": lora, "wm": {"options": {"mask": "wm", "rank": 2}, "rates": [0.01], "fusions": {"sum": {}, "ties": {}}}}
    recipe["methods"] = made | {"wm-apart": made["wm"] | {"apart": True}, "wm-near": made["wm"] | {"reach": 1e-4}}
    return recipe | {"seeds": [0, 1]}


def run_all(recipe, store):
    experiment = language.experiment_of(recipe)
    made = []
    work(lambda: experiment.wanted(recipe, store), Lab(store).run, store, lambda key, left: made.append(key))
    return made


def test_examples_with_even_labels_are_as_many_of_each_while_there_are_any(bench):
    rows = [(f"{number}", int(number % 20 == 0)) for number in range(400)]  # 20 of label 1
    task = Task("rare", "", "", "{text}", ("a", "b"), lambda: iter(rows))

    def drawn(seed, count=30, even=True):
        found = examples(task, "train", count, seed, even)
        return found, [sum(example.label == label for example in found) for label in (0, 1)]

    left = sum(example.label for example in task.train()) - 5  # half of the 10 validation examples have it
    assert 0 < left < 15
    assert drawn(0)[1] == [30 - left, left] and drawn(0, 6)[1] == [3, 3]
    assert drawn(0)[0] == drawn(0)[0] != drawn(1)[0] and len(set(drawn(0)[0])) == 30
    assert drawn(0, even=False)[1][1] < left
    assert "even_labels" not in train_key(bench, bench["methods"]["wm"], 0.01, 0)
    assert train_key(bench | {"even_labels": True}, bench["methods"]["wm"], 0.01, 0)["even_labels"]


def test_one_learning_rate_beside_the_best(bench, tmp_path, capfd):
    recipe = bench | {key: settings.named("one-rate")[key] for key in ("experiment", "given", "fixed")}
    recipe |= {"seeds": [0], "data": ["one"]}
    recipe["methods"] = {name: bench["methods"][name] for name in ("lora", "wm")}
    store = Store(tmp_path / "results.jsonl")
    assert one_rate.report(recipe, store, None) == "no results yet"
    made = run_all(recipe, store)
    trained = [key for key in made if key["kind"] == "train"]
    scaled = [key for key in trained if key["method"]["options"].get("lr_scale") == "auto"]
    # each method's best, and the mask's four other ways
    assert len(trained) == 6 and [key["rate"] for key in scaled] == [recipe["given"], 0.01, 0.005]
    assert all(store.get(key)["lr_scale"] == 0.5 for key in scaled)  # rank 2 is a quarter of these weights
    assert run_all(recipe, store) == []
    report = one_rate.report(recipe, store, None)
    assert report.count(" in 1 |") == 4 and "| wm | 0.01 | 0.5 | 1 |" in report


def test_the_page_says_what_the_searches_found():
    """Each line of the table about the rule, from the results and the scale that stands in it; and what is counted below it."""
    page = (ROOT / "docs" / "masks" / "README.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- rule -->\n(.*?)<!-- rule end -->", page, re.DOTALL)[1].splitlines()
    cells = [line.strip("| ").split(" | ") for line in table]
    assert cells[0] == rule.HEAD
    expected = []
    for name in dict.fromkeys(row[0] for row in cells[2:]):
        for key, tried, lora in rule.searches(Store(rule.RESULTS / f"{name}.jsonl")):
            scale = float(cells[2 + len(expected)][4])
            expected.append(rule.row(name, key, tried, lora, scale))
    assert cells[2:] == expected
    octaves = [float(row[8]) for row in expected]
    exact, near, far = sum(o < 0.05 for o in octaves), sum(0.05 <= o <= 1 for o in octaves), sum(o > 1 for o in octaves)
    assert f"In {exact} of these {len(octaves)} searches" in page and f"in {near} one that is within" in page
    assert f"in {far} one that is" in page


@pytest.mark.slow
def test_three_adapters_fused(bench, tmp_path, capfd):
    """Table 4 on a tiny model: every cell is a run, PEFT's as well as ours; a second time nothing is left to do."""
    store = Store(tmp_path / "results.jsonl")
    made = run_all(bench, store)
    kinds = [key["kind"] for key in made]
    # of 4 methods on 2 seeds 2 adapters; alone, added, and on the first seed one more fusion and one more strength; what lies
    # apart begins with the same adapter
    assert kinds.count("train") == 4 * 2 * 2 - 2 and kinds.count("score") == 2 + (4 * 2 * 2 * 2 - 2) + 4 * 2 * 2
    assert kinds.count("compare") == 4
    assert run_all(bench, store) == []
    apart = [key for key in made if key["kind"] == "train" and "avoid" in key]
    assert len(apart) == 2 and all(store.line(run)["key"]["data"] == "one" for key in apart for run in key["avoid"])
    text = fused.report(bench, store, tmp_path)
    assert "| wm-apart | 0.01 (1) | 2 |" in text and "| lora | linear | " in text and "| wm | sum | " in text
    assert "| α = 0.5 | α = 1 |" in text and text.count("; seeds ") == 4
    assert (tmp_path / "results.png").stat().st_size > 5000
    assert "| method (first seed) | base to one | base to two | one and two | one and two, AWOR |" in text
    near = next(key for key in made if "reach" in key.get("method", {}))
    assert shira.load(artefacts() / number(near) / methods.OURS).metadata["mask"]["stay_near"]["reach"] == 1e-4
    # the table's numbers are those of the lines
    run = number(train_key(bench | {"data": "one"}, bench["methods"]["lora"], 0.01, 0))
    digits = store.get(score_key(bench, [run], "one"))["right"]["one"]
    assert len(digits) == 10 and set(digits) <= {"0", "1"}


@pytest.mark.slow
def test_many_adapters_at_once(bench, tmp_path, capfd):
    """Two tasks, or one, of two: every cell is a run; the penalty on LoRA counts; one adapter learns both in as many steps."""
    recipe = bench | {"experiment": "merging", "searched": 1, "sizes": [1, 2], "together": ["wm"], "seeds": [0]}
    ways = [{"fusion": "sum"}, {"fusion": "sum", "strength": 0.5}, {"fusion": "ties", "options": {"density": 0.5}}]
    recipe["methods"] = {name: method | {"fusions": ways} for name, method in bench["methods"].items() if name != "wm-near"}
    recipe["methods"]["lora-near"] = recipe["methods"]["lora"] | {"reach": 1e-6}
    store = Store(tmp_path / "results.jsonl")
    assert merging.report(recipe, store, None) == "no results yet"
    made = run_all(recipe, store)
    assert run_all(recipe, store) == []
    # of four methods two adapters, the first of wm-apart being wm's, and one adapter for both, which for one task is wm's
    trained = [key for key in made if key["kind"] == "train"]
    assert len(trained) == 4 * 2 - 1 + 1 and sorted(key["steps"] for key in trained) == [2] * 7 + [4]
    text = merging.report(recipe, store, tmp_path)
    assert text.count("| ties, density 0.5 |") == 4 and "| wm | one adapter trained on all |" in text
    assert "| 1 adapters added |" in text and (tmp_path / "results.png").stat().st_size > 5000
    held, free = (store.get(key) for key in (trained[-2], trained[0]))
    assert trained[-2]["method"]["reach"] == 1e-6 and held["validation_loss"] != free["validation_loss"]


def test_an_adapter_and_the_other_tasks(bench, tmp_path, capfd):
    recipe = bench | {"experiment": "forgetting", "data": "one", "others": ["two"], "others_test": 5, "strengths": [1, 2]}
    recipe["methods"] = {"wm": bench["methods"]["wm"]}
    store = Store(tmp_path / "results.jsonl")
    assert forgetting.report(recipe, store, None) == "no results yet"
    assert [key["kind"] for key in run_all(recipe, store)] == ["score"] * 2 + ["train", "score", "score", "score"] * 2
    text = forgetting.report(recipe, store, tmp_path)
    assert "| wm | 0.01 (1) |" in text and "| one, strength | 1 | 2 |" in text and text.count("\n| base | ") == 1
    assert (tmp_path / "results.png").stat().st_size > 5000


@pytest.mark.slow
def test_one_adapter_for_all_by_the_rate_that_validation_chose(bench, tmp_path, capfd):
    recipe = bench | {"experiment": "combined", "data": "one", "more_seeds": {"wm": [1]}, "most_rates": 3, "seeds": [0]}
    recipe["without"] = []
    recipe["methods"] = {"lora": bench["methods"]["lora"], "wm": bench["methods"]["wm"] | {"rates": [0.01, 0.02]}}
    store = Store(tmp_path / "results.jsonl")
    assert combined.report(recipe, store, None) == "no results yet"
    run_all(recipe, store)
    losses = combined.losses(recipe, recipe["methods"]["wm"], store)
    assert len(losses) == 3  # the better of two is at an end
    best = min(losses, key=losses.get)
    assert combined.best_rate(recipe, recipe["methods"]["wm"], store) == best
    alone = recipe["methods"]["wm"] | {"rates": [0.01], "most_rates": 1}  # as it is, though it may have lost
    assert combined.best_rate(recipe, alone, store) == 0.01
    report = combined.report(recipe, store, tmp_path)
    assert f"| wm | {best:g} (3) | 2 |" in report and (tmp_path / "results.png").exists()
    sized = [combined.summary(recipe, store)[-1]._replace(name=f"wm-{size}") for size in (0.01, 0.1)]
    assert [list(found) for found in combined.curves([*sized, sized[0]._replace(name="wm-dora")]).values()] == [sized]
    combined.plot_curves(sized, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000
    # a run that is forgotten is made again, and alone; its adapter is there still
    run = number(score_key(recipe, [], "one"))
    assert store.forget(lambda line: line["run"] == run) == 1
    assert [number(key) for key in run_all(recipe, store)] == [run]


def test_the_rate_of_adapters_to_be_fused_is_the_best_for_them_together(bench, tmp_path):
    """What is best for one of two benchmarks is not the best."""
    method = bench["methods"]["wm-apart"] | {"rates": [0.01, 0.02]}
    store = Store(tmp_path / "results.jsonl")
    assert fused.trained(bench, store, method, 0) == []
    for rate, losses in ((0.01, (1.0, 4.0)), (0.02, (2.0, 2.0))):
        for key, loss in zip(fused.a_benchmark_each(bench, method, rate, 0), losses, strict=True):
            store.add(key, {"validation_loss": loss}, 0)
    first, second = fused.trained(bench, store, method, 1)
    assert first["rate"] == 0.02 and first["seed"] == 1 and second["avoid"] == [number(first)]
    wanted = list(fused.wanted(bench | {"methods": {"wm-apart": method}}, store))
    assert all(key["rate"] == 0.02 for key in wanted if key.get("avoid")) and first in wanted


def test_an_adapter_that_is_gone_is_trained_again_to_the_bit(bench, tmp_path, capfd):
    store = Store(tmp_path / "results.jsonl")
    key = train_key(bench | {"data": "one"}, bench["methods"]["wm"], 0.01, 0)
    lab = Lab(store)
    store.add(key, lab.run(key), 0)
    path = lab.folder(number(key)) / methods.OURS
    before = path.read_bytes()
    path.unlink()
    path.parent.rmdir()
    assert (lab.folder(number(key)) / methods.OURS).read_bytes()[-500:] == before[-500:]  # its head tells the time
    with pytest.raises(DataError, match="no run nothing"):
        lab.folder("nothing")


@pytest.mark.parametrize("name", ["lora", "wm"])
def test_distances_are_those_of_the_weights(bench, tmp_path, name, capfd):
    lab = Lab(Store(tmp_path / "results.jsonl"))
    model, _, _ = lab.model(bench["model"], "float32")
    base = torch.cat([p.detach().flatten() for p in model.parameters()])
    weights, runs = [], []
    for task in ("one", "two"):
        key = train_key(bench | {"data": task}, bench["methods"][name], 0.01, 0)
        lab.store.add(key, lab.run(key), 0)
        runs.append(lab.folder(number(key)))
        if name == "lora":
            import peft

            merged = peft.PeftModel.from_pretrained(copy.deepcopy(model), runs[-1]).merge_and_unload()
            weights.append(torch.cat([p.detach().flatten() for p in merged.parameters()]))
        else:
            with methods.adapted(model, runs[-1:]):
                weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    found = methods.distances(model, runs)
    assert found["to_base"] == pytest.approx([float((w - base).norm()) for w in weights], rel=1e-3)
    assert found["distance"] == pytest.approx([float((weights[0] - weights[1]).norm())], rel=1e-3)


@pytest.mark.parametrize("name", ["lora", "wm"])
def test_the_model_comes_back(bench, tmp_path, name, capfd):
    model, tokenizer = hf.load_model(bench["model"]), hf.load_tokenizer(bench["model"])
    before = all_bits(model)
    lab = Lab(Store(tmp_path / "results.jsonl"))
    key = train_key(bench | {"data": "one"}, bench["methods"][name], 0.01, 0)
    lab.store.add(key, lab.run(key), 0)
    ids = tokenizer("x001 is ", return_tensors="pt")
    base = model(**ids).logits
    with methods.adapted(model, [lab.folder(number(key))]) as ready:
        assert not torch.equal(ready(**ids).logits, base)
        once = ready(**ids).logits
    with methods.adapted(
        model, [lab.folder(number(key))] * 2 if name == "lora" else [lab.folder(number(key))], strength=0.5
    ) as ready:
        half = ready(**ids).logits
    if name == "lora":  # half of it twice is all of it
        torch.testing.assert_close(half, once)
    assert same_bits(before, all_bits(model)) and torch.equal(model(**ids).logits, base)


@pytest.mark.parametrize("name", language.PAGES)
def test_the_pages_of_results_say_what_is_in_the_results(name):
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert language.fill(page, settings.FOLDER.parent / "results") == page


def test_the_command(bench, tmp_path, run):
    recipe = bench | {"methods": {"wm": bench["methods"]["wm"]}, "seeds": [0], "compare_with": "wm"}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    line = f"experiment {tmp_path}/small.yaml --results {tmp_path}/r.jsonl"
    code, out, err = run(f"{line} --report")
    assert code == 0 and "no results yet" in out
    code, out, err = run(f"{line} --plots {tmp_path}/plots")
    assert code == 0, err
    assert "| wm | 0.01 (1) | 1 |" in out and "1 left" in err and (tmp_path / "plots" / "r.png").exists()
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    code, out, err = run(f"{line} --again {lines[-1]['run']}")
    assert code == 0 and err.count("left") == 1
    assert run(f"{line} --again 123")[0] == 1
    recipe["methods"] |= {"none": {"options": {"mask": "wm", "density": 7.0}, "rates": [0.01], "fusions": {"sum": {}}}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    code, out, err = run(line)
    assert code == 1 and "| wm | 0.01 (1) | 1 |" in out and "2 runs failed" in err and "density" in err
    code, out, err = run("experiment")
    assert code == 0 and "table2" in out and "Table 4" in out
    assert language.label(lines[0]["key"]).endswith("score the base on one")


def test_a_plot_of_merging_has_the_best_strength_for_each_number_of_adapters():
    ways = [{"fusion": "sum"}, {"fusion": "sum", "strength": 0.5}, {"fusion": "mean"}]
    few, half, all_of = ({"a": [float(right) for right in rights]} for rights in ((0, 0), (0, 1), (1, 1)))
    curves = {"sum": {2: half, 5: few}, "sum, strength 0.5": {2: few, 5: half}, "mean": {2: all_of, 5: all_of}}
    found = merging.Found(few, {"wm": all_of}, {("wm", way): curve for way, curve in curves.items()}, {})
    assert merging.best_sums({"methods": {"wm": {"fusions": ways}}}, found, "wm") == {2: (1.0, half), 5: (0.5, half)}
