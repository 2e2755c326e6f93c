"""What the page of `shira play` does, without the page: both sides, strengths of several people, the light, files, a server."""

import threading

import pytest
import torch

import shira
from conftest import all_bits, letter_tokenizer, random_adapter, same_bits
from serving import Served
from shira.errors import AdapterError, DataError, FormatError, SwitchError
from shira.integrations.generation import answer
from shira.play import opening
from shira.play.asking import Setting, Words, chosen_from
from shira.play.language import Language, layer_groups
from shira.play.remote import Remote
from shira.play.shown import comparison_html, error_html, light_html, note_html
from shira.play.streams import streamed
from shira.weights.model_tensors import named_tensors

ASKED = Words("hello", most_tokens=12)


@pytest.fixture
def play(tiny_llama, tmp_path):
    """A tiny language model with the adapters "a" and "b"."""
    made, switcher, files = tmp_path / "made", shira.Switcher(tiny_llama), {}
    made.mkdir()
    for seed, name in enumerate("ab"):
        files[name] = tmp_path / f"{name}.safetensors"
        random_adapter(tiny_llama, seed).save(files[name])
        switcher.add(name, files[name])
    return Language("tiny", tiny_llama, letter_tokenizer(), switcher, files, made)


def whole(place, asked=ASKED, **strengths):
    """The last of what is seen."""
    chosen = {name: value if isinstance(value, Setting) else Setting(value) for name, value in strengths.items()}
    return list(place.run(asked, chosen, threading.Event()))[-1]


def alone(place, strengths, asked=ASKED):
    """What the model writes outside of the page with these adapters."""
    with place._switcher.using(strengths):
        prompt = [{"role": "user", "content": asked.prompt}]
        return answer(place._model, place._tokenizer, prompt, max_new_tokens=asked.most_tokens, temperature=0)


def test_both_sides_are_what_the_library_writes_and_the_base_is_back(play):
    before = all_bits(play._model)
    expected = alone(play, {}), alone(play, {"a": 1.0, "b": 0.5})
    seen = whole(play, a=1.0, b=0.5)
    assert (seen.base, seen.adapted) == expected and expected[0] != expected[1]
    assert seen.milliseconds > 0 and "differ" in seen.note
    assert play.light.exact and "the bits" in play.light.text
    assert same_bits(before, all_bits(play._model)) and not play._switcher.active
    assert whole(play).adapted == expected[0]
    assert play.time_switch({"a": Setting(1.0)}) > 0 and play.time_switch({}) is None
    assert same_bits(before, all_bits(play._model))


def test_an_answer_comes_in_pieces(play):
    seen = list(play.run(ASKED, {"a": Setting(1.0)}, threading.Event()))
    texts = [each.base for each in seen if each.base]
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    assert seen[-1].note.startswith("Done")


def test_the_light_says_no_if_a_weight_was_changed(play):
    play._model.model.layers[1].mlp.up_proj.weight.data[3, 2] += 1
    found = play.check()
    assert found.exact is False and "model.layers.1.mlp.up_proj.weight differs" in found.text
    assert "lamp no" in light_html(found)
    play._model.model.layers[1].mlp.up_proj.weight.data[3, 2] -= 0.5
    whole(play)
    assert play.light.exact is False


def test_the_light_says_no_for_a_bit_that_no_comparison_of_numbers_sees(tiny_llama, play):
    weight = tiny_llama.model.norm.weight.data
    weight[0] = 0.0
    watch = type(play._watch)(play._watched())
    assert watch.light(play._watched()).exact
    weight[0] = -0.0
    assert watch.light(play._watched()).exact is False


def test_two_people_at_a_time_do_not_get_each_others_strengths(play):
    wanted = [{"a": 1.0}, {"b": 1.0}, {"a": 0.3, "b": 1.2}, {}]
    asked = [Words(f"hello {number}", most_tokens=10) for number in range(len(wanted))]
    expected = [(alone(play, {}, text), alone(play, one, text)) for one, text in zip(wanted, asked, strict=True)]
    found, errors = {}, []

    def person(number):
        try:
            for _ in range(3):
                play._kept.clear()
                seen = whole(play, asked[number], **wanted[number])
                found.setdefault(number, set()).add((seen.base, seen.adapted))
        except Exception as error:
            errors.append(error)

    people = [threading.Thread(target=person, args=(number,)) for number in range(len(wanted))]
    for each in people:
        each.start()
    for each in people:
        each.join(60)
    assert not errors and found == {number: {both} for number, both in enumerate(expected)}
    assert play.light.exact


def test_who_stops_gets_no_more_and_the_next_one_is_served(play):
    before, stop = all_bits(play._model), threading.Event()
    going = play.run(Words("hello", most_tokens=50), {"a": Setting(1.0)}, stop)
    next(going)
    going.close()  # as when the page is closed
    assert stop.is_set()
    expected = alone(play, {"b": 1.0}) if not play.check().exact else None
    assert expected is None and same_bits(before, all_bits(play._model))
    assert "Done" in whole(play, b=1.0).note


def test_who_waits_is_told_and_can_leave(play):
    stop, seen = threading.Event(), []
    with play._turn.taken(threading.Event()):
        assert play.time_switch({"a": Setting(1.0)}) is None
        going = play.run(ASKED, {"a": Setting(1.0)}, stop)
        seen.append(next(going))
        stop.set()
        assert not list(going)
    assert "somebody else" in seen[0].note


def test_an_error_ends_a_stream_and_leaves_the_base(play):
    before = all_bits(play._model)
    with pytest.raises(SwitchError, match="no adapter 'c'"):
        whole(play, c=1.0)
    with pytest.raises(DataError, match="less than the 64"):
        whole(play, Words("x" * 90), a=1.0)
    assert same_bits(before, all_bits(play._model)) and play.light.exact

    def work(show):
        show(1)
        raise ValueError("wrong")

    going = streamed(work, threading.Event())
    with pytest.raises(ValueError, match="wrong"):
        list(going)


def test_a_dropped_file_is_added_or_is_a_sentence(play, tiny_llama, tmp_path):
    good, bad = tmp_path / "c.safetensors", tmp_path / "bad.safetensors"
    random_adapter(tiny_llama, 7).save(good)
    bad.write_bytes(b"\xff" * 40)
    other = tmp_path / "other.safetensors"
    shira.Adapter({"x": shira.SparseTensor((2, 2), torch.tensor([1]), torch.ones(1))}, {}).save(other)
    for wrong in (bad, other):
        with pytest.raises(shira.ShiraError) as caught:
            play.add(wrong)
        assert str(caught.value).startswith(wrong.name) and str(tmp_path) not in str(caught.value)
    assert play.names() == ["a", "b"]
    assert [play.add(good), play.add(good)] == ["c", "c (2)"] and play.names() == ["a", "b", "c", "c (2)"]
    assert whole(play, c=1.0).adapted == whole(play, **{"c (2)": 1.0}).adapted


def test_blocks_of_a_language_model(play, monkeypatch):
    names = [f"model.layers.{layer}.mlp.weight" for layer in range(10)] + ["lm_head.weight"]
    assert list(layer_groups(names)) == ["layers 0–2", "layers 3–6", "layers 7–9", "other"]
    assert layer_groups(names)["layers 0–2"] == [f"model.layers.{layer}.*" for layer in range(3)]
    assert play.blocks == [] and layer_groups(["a.weight"]) == {}  # two layers are too few
    play._groups = layer_groups(named_tensors(play._model) | {"model.layers.2.x": None})
    groups = list(play._groups)
    uneven = Setting(0.5, ((groups[0], 2.0), (groups[1], 0.0)))
    strengths = {"*": 0.5, "model.layers.0.*": 1.0, "model.layers.1.*": 0.0}
    read, of_file = [], play._adapter
    monkeypatch.setattr(play, "_adapter", lambda name: read.append(name) or of_file(name))
    assert whole(play, a=uneven).adapted == alone(play, {"a": strengths})
    assert read == ["a"]  # before the switch whose time is shown
    even, file = play.fuse({"a": Setting(0.5)}), play.fuse({"a": uneven})
    assert (even.name, file.name) == ("a-0.5.safetensors", "a-0.5-by-block.safetensors")
    assert play.fuse({"a": uneven}) != file and file.exists()  # what somebody downloads now stays as it is
    fused = shira.load(file)
    assert not any(name.startswith("model.layers.1.") and fused.tensors[name].nnz for name in fused.tensors)


def test_a_saved_set_does_what_the_sliders_did(play):
    seen = whole(play, a=0.7, b=1.2)
    file = play.fuse({"a": Setting(0.7), "b": Setting(1.2)})
    assert file.name == "a-0.7+b-1.2.safetensors"
    assert whole(play, **{play.add(file): 1.0}).adapted == seen.adapted
    with pytest.raises(DataError, match="nothing to save"):
        play.fuse({})


def test_a_comparison_is_that_of_the_library(play, tmp_path):
    done = []
    found = play.compare("a", "b", lambda *progress: done.append(progress))
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    expected = shira.compare(*files, base=play._model, spectra=False).total.pairs[0]
    assert found.total.pairs[0].overlap == expected.overlap and found.total.pairs[0].cosine == expected.cosine
    assert done[-1][0] == done[-1][1] == len(found.tensors)
    page = comparison_html(found)
    assert f"{expected.shared:,}" in page and "data:image/png" in page
    with pytest.raises(AdapterError, match="two different"):
        play.compare("a", "a")


def test_texts_of_others_are_quoted():
    for html in (error_html("<b>x</b>"), note_html("<img src=x>")):
        assert "<b>" not in html and "<img" not in html and "&lt;" in html
    assert error_html("there is no prompt").endswith("There is no prompt.</div>")


def test_wrong_values_are_refused():
    assert chosen_from({"a": 0, "b": 1}, {"b": {"x": 0.5}}) == {"b": Setting(1.0, (("x", 0.5),))}
    assert chosen_from({"a": 1}, {"a": {"x": 0, "y": 0}}) == {}
    for wrong in (1.6, -0.1, float("nan"), "1", None, True):
        with pytest.raises(AdapterError, match="from 0 to 1.5"):
            chosen_from({"a": wrong}, {})
    for options in ({"prompt": "  "}, {"seed": 0.5}, {"most_tokens": 0}, {"temperature": float("inf")}, {"seed": None}):
        with pytest.raises(DataError):
            Words(**{"prompt": "x", **options})


def test_which_adapters_a_folder_means(tmp_path, tiny_llama):
    for name in ("one.safetensors", "two.safetensors", "run/adapter.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        random_adapter(tiny_llama, 1).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no adapter")
    (tmp_path / "empty").mkdir()
    expected = [str(tmp_path / name) for name in ("one.safetensors", "run", "two.safetensors")]
    assert opening.adapters_of(str(tmp_path)) == expected
    assert opening.adapters_of(str(tmp_path / "run")) == [str(tmp_path / "run")]
    with pytest.raises(DataError, match="no adapter in the folder"):
        opening.adapters_of(str(tmp_path / "empty"))


def test_wrong_options_are_refused_before_a_model_is_loaded(tmp_path, tiny_llama):
    random_adapter(tiny_llama, 1).save(tmp_path / "a.safetensors")
    (tmp_path / "bad.safetensors").write_text("x")
    files = {"a": str(tmp_path / "a.safetensors")}
    for error, words, options in (
        (DataError, "leave MODEL", {"server": "http://127.0.0.1:1", "model": "x"}),
        (AdapterError, "from 0 to 1.5", {"files": files, "strengths": {"a": 2.0}}),
        (FormatError, "bad.safetensors", {"files": {"bad": str(tmp_path / "bad.safetensors")}}),
        (DataError, "cannot listen", {"host": "192.0.2.1"}),
    ):
        with pytest.raises(error, match=words):
            opening.check(opening.Options(**options))
    opening.check(opening.Options(files=files, strengths={"a": 0.5}))
    with pytest.raises(DataError, match="no server answers"):
        Remote("http://127.0.0.1:9")
    with pytest.raises(DataError, match="an address such as"):
        Remote("localhost:8000")


def test_the_default_model():
    assert opening.Options().language == "SmolLM2-135M-Instruct-Q4_1"
    assert opening.Options(image="pipeline").language == "" and opening.Options(server="http://x").language == ""


def test_against_a_server(tmp_path):
    served = Served(tmp_path)
    with served.listening() as (url, _):
        remote = Remote(url)
        assert remote.names() == ["a", "b"] and url in remote.title
        asked = Words("hello", raw=True, most_tokens=6)
        prompt = served.tokenizer("hello")["input_ids"]
        expected = [served.tokenizer.decode(served.single(text, prompt, 6)).strip() for text in ("base", "a:0.5+b")]
        seen = whole(remote, asked, a=0.5, b=1.0)
        assert [seen.base.strip(), seen.adapted.strip()] == expected and seen.milliseconds is None
        assert whole(remote, Words("hello", most_tokens=6)).note.startswith("No adapter")  # through the chat template
        with pytest.raises(DataError, match="refused with status 404: no adapter 'c'"):
            whole(remote, asked, c=1.0)
        with pytest.raises(DataError, match="one strength for each"):
            whole(remote, asked, a=Setting(1.0, (("x", 0.5),)))
        stop = threading.Event()
        going = remote.run(Words("hello", raw=True, most_tokens=60), {"a": Setting(1.0)}, stop)
        next(going)
        stop.set()
        assert not any(each.note.startswith("Done") for each in going)
