"""Text that others wrote is shown as text: on a terminal, a page, in Markdown, in pictures; and recipes are read strictly."""

import json
import re
import time
import warnings

import pytest
import safetensors.torch
import torch
import yaml
from markupsafe import escape

import shira
import shira.data.reading
from conftest import mlp
from shira import Adapter, DataError, SparseTensor
from shira.analysis import report
from shira.errors import ShiraError
from shira.integrations.card import base_of, card
from shira.runs.recipes import Recipe, load_recipe
from shira.texts import described, markdown, shown, strict_json, visible

HOSTILE = {
    "escape": "\x1b]0;title\x07\x1b[2Jx",
    "c1": "\x9b31mx",
    "line": "x\nOK: all is well\r",
    "markup": "a[/b][link=http://x]y[/link][bold]",
    "bidi": "\u202egpj.exe\u2066",
    "hidden": "a\u200bb\u00ad\ufeff",
    "separators": "a\u2028b\u2029c\x85d",
    "emoji": ":smile: x",
    "formula": "$x^$ ${",
    "legend": "_hidden",
    "html": "<script>alert(1)</script>&amp;\"'",
    "markdown": "`x` *y* [z](http://z) <b> | www.x.org",
    "long": "x" * 100_000,
}
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\u00ad]")


def delta(name="w", count=14):
    return {name: SparseTensor((16, 8), torch.arange(0, 3 * count, 3), torch.randn(count), "delta")}


def test_what_is_seen_stays_and_the_rest_is_escaped():
    for text in HOSTILE.values():
        assert visible(text).isprintable()
    assert visible("naïve · 日本 ‖ΔW‖") == "naïve · 日本 ‖ΔW‖"
    assert visible("a\x1b\n\u202e\ud800") == r"a\x1b\n\u202e\ud800"
    assert visible("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert str(ShiraError("tensor 'a\x1b[2J\n'")) == r"tensor 'a\x1b[2J\n'"
    deep = []
    for _ in range(10_000):
        deep = [deep]
    for value in (deep, 10**6000, "x" * 10**6, {"a\x1b": "\x1b"}, list(range(10**5))):
        assert len(shown(value)) < 600 and shown(value).isprintable()
    assert described(5) == "5 (int)" and described([1]) == "a list" and described(Adapter({})) == "an Adapter"


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("place", ["name", "license", "base", "mask", "training", "fused", "tensor"])
def test_inspect_and_compare_show_text(run, tmp_path, monkeypatch, text, place):
    monkeypatch.chdir(tmp_path)
    value = {
        "base": {"id": text, "dtype": text},
        "mask": {"name": text, "options": {text: text}},
        "training": {text: [text]},
        "fused": {"method": text, "strengths": {text: 1}},
    }.get(place, text)
    Adapter(delta(text if place == "tensor" else "w"), {} if place == "tensor" else {place: value}).save("a.safetensors")
    Adapter(delta(count=20), {"name": "plain"}).save("plain.safetensors")
    for line in ("inspect a.safetensors --tensors", "compare a.safetensors plain.safetensors", "inspect a.safetensors --json"):
        code, out, err = run(line)
        assert code == 0 and not CONTROL.search(out + err), (line, err)
        if text == HOSTILE["markup"] and place != "tensor" and line.startswith("inspect"):
            assert "[link=" in out
        if "--tensors" in line:  # no line is made of what the file says
            assert not re.search(r"^\s*OK: all is well", out, re.MULTILINE)
    code, out, err = run("fuse a.safetensors=0.5 -o fused.safetensors")
    assert code == 0 and not CONTROL.search(out + err)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_page_and_its_pictures_show_text(text):
    adapters = [Adapter(delta(), {"name": text}), Adapter(delta(count=20) | delta(f"layers.0.{text}.weight"), {"name": "x"})]
    found = shira.compare(*adapters)
    named = shira.analysis.comparison.named(adapters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = report.page(found, named, None, f"layers.0.{text}.weight")
    without = re.sub(r'src="data:[^"]*"', "", page)
    assert not CONTROL.search(without) and "<script" not in without
    assert escape(visible(text)) in without


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_model_card_shows_text(text):
    metadata = {"name": text, "license": text, "base": {"id": f"org/{text}", "dtype": text}, "mask": {"name": text}}
    body = card(Adapter(delta(), metadata), "adapter.safetensors", base_of(f"org/{text}", text, "AutoModel"), data=text)
    assert not CONTROL.search(body)
    head, _, rest = body.removeprefix("---\n").partition("\n---\n")
    read = yaml.safe_load(head)
    assert read["license"] == "other" and re.fullmatch(r"[a-z0-9.+-]+", read["license_name"])
    prose, _, code = rest.partition("```python\n")
    without_code = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", prose)
    for sign in ("<script", "[z](", "www.", "*y*"):
        assert sign not in without_code
    compile(code.partition("```\n")[0], "card", "exec")  # a snippet, whatever is in it


def test_markdown_of_plain_text_is_that_text():
    assert [markdown(text) for text in ("poet.safetensors", "Apache-2.0", 3, "a|b", "`", "x_y")] == [
        *("poet.safetensors", "Apache-2.0", "3"),
        *(r"`a\|b`", "`` ` ``", "`x_y`"),
    ]


def test_an_error_is_one_line_without_control(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "w\x1b[2J\n[red]\u202e"
    Adapter(delta(name)).save("a.safetensors")
    with pytest.raises(shira.BaseMismatch) as caught:
        shira.Switcher(mlp()).add("x", "a.safetensors")
    assert str(caught.value).isprintable() and "[red]" in str(caught.value)
    for line in ("compare a.safetensors --tensor x", "inspect 'no\x1b[2J[/b]'", "train x --config 'no\x1b[2J'"):
        code, out, err = run(line)
        assert code == 1 and not CONTROL.search(out + err) and err.count("\n") == 1, err


BOMB = "a: &a [x, x]\n" + "\n".join(f"{new}: &{new} [*{old}, *{old}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True))
NINES = "9" * 5000
RECIPES = {
    "alias bomb": (BOMB, "alias"),
    "merge key": ("x: &x {steps: 3}\n<<: *x\n", "alias"),
    "deep": ("data: " + "[" * 100_000, "deeper than"),
    "deep blocks": ("\n".join(" " * n + "a:" for n in range(900)), "deeper than"),
    "digits": (f"steps: {NINES}", "digits|integer|number"),
    "hexadecimal digits": (f"steps: 0x{NINES}", "steps must be a whole number"),
    "minutes": ("lr: " + ":".join(["59"] * 3000), "lr must be|not YAML"),
    "infinite": ("lr: .inf", "lr must be a finite number"),
    "not a number": ("density: .nan", "density must be a finite number"),
    "key twice": ("steps: 3\nsteps: 4\n", "a key stands there twice"),
    "inner key twice": ("overrides: {a: 1, a: 2}", "a key stands there twice"),
    "a day that is not": ("data: 2001-99-99", "not YAML"),
    "a tag": ("data: !!python/object/apply:os.system [ls]", "not YAML"),
    "a bad tag": ("data: !!int x", "not YAML"),
    "another bad tag": ("data: !!timestamp x", "not YAML"),
    "no key": ("? [a, b]\n: c\n", "not YAML|unknown setting"),
    "a list": ("- a", "must hold settings"),
    "nothing": ("", "must hold settings"),
    "control": ("data: \x1b", "not YAML"),
    "large": ("# " + "x" * 2**21, "more than"),
    "binary": ("\udcff\udcfe", "not YAML"),
}


@pytest.mark.parametrize(("text", "words"), RECIPES.values(), ids=RECIPES)
def test_a_recipe_that_means_harm_is_one_error_at_once(tmp_path, text, words):
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    start = time.monotonic()
    with pytest.raises(DataError, match=words) as caught:
        load_recipe(path, {"data": "spam"} if "data" not in text else {})
    assert time.monotonic() - start < 5 and len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", [5, "x", [5], {"a": 1}, True, -1, None, 10**30, 1e400, [[]], {5: 1}])
def test_a_setting_of_another_type_is_refused_or_right(tmp_path, value):
    refused = 0
    for name in vars(Recipe(data="spam")):
        try:
            Recipe(**{"data": "spam", name: value})
        except DataError as error:
            assert str(error).startswith(f"recipe: {name} must be ") or "eval_" in str(error)
            refused += 1
    assert refused > 5


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', "1e999", "-Infinity", "9" * 41, r'"\ud800"', "[" * 33 + "]" * 33, "{", b"\xff"]
)
def test_json_is_read_strictly(text):
    with pytest.raises(ValueError):
        strict_json(text)


def test_other_json_is_read_as_always():
    value = {"a": [1, -2.5, None, True, "é😀\x1b", {"b": {}}], "9" * 30: int("9" * 40)}
    assert strict_json(json.dumps(value)) == strict_json(json.dumps(value).encode()) == value


def wrong_states(state):
    """A checkpoint with one of its entries wrong, and what the error must say."""
    values = next(key for key in state if key.endswith(".values"))
    mark = next(key for key in state if key.endswith(".mark"))
    good = state[values]
    for wrong, words in (
        (good.clone().fill_(float("nan")), "not finite"),
        (torch.cat([good[:-1], torch.tensor([float("inf")])]), "not finite"),
        (good.double().fill_(1e300), "not finite"),
        (good.int(), "must be floating point"),
        (good.tolist(), "must be a plain tensor"),
        (None, "must be a plain tensor"),
        (good.to_sparse(), "must be a plain tensor"),
        (good.to("meta"), "must be a plain tensor"),
    ):
        yield state | {values: wrong}, words
    for wrong in (state[mark].float(), state[mark][:1], state[mark][None], torch.tensor(3)):
        yield state | {mark: wrong}, "must be whole numbers, int64"
    yield state | {mark: [1, 2]}, "must be a plain tensor"
    yield state | {5: good}, "of other targets"
    yield [state], "tensors by name"
    yield None, "tensors by name"


def test_a_checkpoint_holds_finite_floats_and_marks_only():
    with shira.attach(mlp(), density=0.1) as tuner:
        state = tuner.state_dict()
        before = {key: tensor.clone() for key, tensor in state.items()}
        for wrong, words in wrong_states(state):
            with pytest.raises(shira.TuningError, match=words):
                tuner.load_state_dict(wrong)
        after = tuner.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        tuner.load_state_dict(state)


def test_a_merged_checkpoint_tells_what_was_merged_as_text(tmp_path):
    (tmp_path / "base").mkdir()
    safetensors.torch.save_file({"w": torch.randn(16, 8)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "README.md").write_text("# Base\n")
    path = tmp_path / "a|b`<img>\x1b[2J.safetensors"
    Adapter(delta(), {"license": "MIT |\n# [x](http://y) <script>"}).save(path)
    shira.merge(tmp_path / "base", path, tmp_path / "out")
    added = (tmp_path / "out" / "README.md").read_text().split("## Merged adapters")[1]
    assert not CONTROL.search(added) and "\n#" not in added
    (row,) = [line for line in added.splitlines() if "14" in line]
    cells = re.split(r"(?<!\\)\|", row)
    assert len(cells) == 7 and cells[1] == r" ``a\|b`<img>\x1b[2J.safetensors`` "
    assert cells[5] == r" `MIT \|\n# [x](http://y) <script>` "


@pytest.mark.parametrize("line", ["[" * 10**5, '{"prompt": ' + "[" * 200 + "]" * 200 + "}", '{"text": ' + "9" * 5000 + "}"])
def test_a_row_of_data_that_means_harm_is_one_error(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(DataError, match="line 1") as caught:
        list(shira.data.reading.read_examples(tmp_path / "x.jsonl"))
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()
