"""The picture tab of `shira play` in headless Chromium, on a tiny random pipeline. `make test-play` installs what it needs."""

import io
import time
import warnings

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("PIL")

from PIL import Image

import shira
from conftest import letter_tokenizer, random_adapter
from pipelines import pipe_adapter
from shira.integrations.diffusers_sampling import sample
from shira.play.asking import Picture
from test_play_page import PHONE, browser, pytestmark, sync_api  # noqa: F401  a fixture and marks

STEPS = 2


@pytest.fixture
def shown(tiny_llama, pipe, adapters, tmp_path):
    """A page with a tab for a language model and one for a pipeline with the adapters "a" and "b"."""
    from shira.play.language import Language
    from shira.play.opening import Options, opened, workspace
    from shira.play.pictures import Pictures

    file = tmp_path / "poet.safetensors"
    random_adapter(tiny_llama, 0).save(file)
    switcher = shira.Switcher(tiny_llama)
    switcher.add("poet", file)
    with warnings.catch_warnings(), workspace() as folder:
        warnings.simplefilter("ignore")
        words = Language("tiny", tiny_llama, letter_tokenizer(), switcher, {"poet": file}, folder)
        place = Pictures("tiny pipeline", pipe, adapters, folder)
        with opened([words, place], Options(browser=False)) as address:
            yield place, address


def at_the_pictures(page, address):
    """Load the page, go to the tab, and write a prompt and a number of steps that takes no time."""
    page.goto(address)
    page.get_by_role("tab", name="Pictures").click()
    page.get_by_label("range slider for Strength of a").wait_for()
    page.locator("#prompt-1 textarea").fill("a dog")
    button(page, "Settings").click()
    page.get_by_label("number input for Steps").fill(str(STEPS))
    page.get_by_label("number input for Steps").press("Tab")


def button(page, name):
    """The button of this tab: the other one has buttons of the same names."""
    return page.get_by_role("button", name=name).locator("visible=true")


def moved(page, name, strength):
    """Give an adapter a strength with the keys of the keyboard, from the left end of its slider."""
    slider = page.get_by_label(f"range slider for Strength of {name}")
    slider.focus()
    page.keyboard.press("Home")
    for _ in range(round(strength / 0.05)):
        page.keyboard.press("ArrowRight")
    sync_api.expect(page.get_by_label(f"number input for Strength of {name}")).to_have_value(f"{strength:g}")


def drawn(page, note):
    """Both pictures after a click, once a new note says that they are done."""
    page.locator("#note-1 [role]").evaluate("each => each.classList.add('old')")
    button(page, "Generate").click()
    page.locator("#note-1 [role]:not(.old)", has_text=note).wait_for()
    return [picture(page, side) for side in ("base", "adapted")]


def picture(page, side):
    shown = page.locator(f"#{side}-1 img")
    shown.wait_for()
    return Image.open(io.BytesIO(page.request.get(shown.get_attribute("src")).body())).convert("RGB")


def alone(place, strengths):
    """What the pipeline draws outside of the page."""
    place._adapters.set(strengths)
    try:
        return sample(place._pipe, "a dog", 0, steps=STEPS)
    finally:
        place._adapters.disable()


def test_a_person_at_the_pictures(shown, browser, monkeypatch):  # noqa: F811
    from gradio import processing_utils

    place, address = shown
    saved, save = [], processing_utils.save_pil_to_cache
    monkeypatch.setattr(processing_utils, "save_pil_to_cache", lambda *given, **o: saved.append(0) or save(*given, **o))
    expected = [alone(place, {}), alone(place, {"a": 0.6}), alone(place, {"a": 0.6, "b": 1.0})]
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    at_the_pictures(page, address)
    moved(page, "a", 0.6)
    page.locator("#switched-1", has_text=" ms").wait_for()
    found = drawn(page, "Both sides differ")
    assert list(place._kept) == [Picture("a dog", STEPS)]  # what was asked for
    assert found == expected[:2]
    assert len(saved) == 2  # not again at each step: the browser could find half a file
    assert "exact" in page.locator("#light-1").inner_text() and page.locator("#light-1 .lamp.yes").count() == 1

    page.get_by_role("checkbox", name="b", exact=True).check()
    page.get_by_label("range slider for Strength of b").wait_for()
    assert drawn(page, "Both sides differ") == [expected[0], expected[2]]
    for name in "ab":
        moved(page, name, 0)
    assert drawn(page, "both sides are the base") == [expected[0], expected[0]]

    moved(page, "b", 1)
    button(page, "b by block").click()
    for block in place.blocks:
        page.get_by_label(f"range slider for × {block}").locator("visible=true").focus()
        page.keyboard.press("Home")
    assert drawn(page, "both sides are the base") == [expected[0], expected[0]]
    moved(page, "a", 0.6)
    assert drawn(page, "Both sides differ") == expected[:2]
    with page.expect_download() as download:
        button(page, "Save this set as one file").click()
    assert download.value.suggested_filename == "a-0.6.safetensors"
    assert page.locator("#light-1 .lamp.yes").count() == 1
    assert {url.split("/")[2] for url in asked if url.startswith(("http", "ws"))} == {address.split("/")[2]}


def test_what_goes_wrong_is_a_sentence(shown, browser, pipe, tiny_llama, tmp_path):  # noqa: F811
    place, address = shown
    page = browser.new_page()
    at_the_pictures(page, address)
    page.locator("#prompt-1 textarea").fill(" ")
    button(page, "Generate").click()
    page.locator("#note-1 .error", has_text="There is no prompt: write one first.").wait_for()
    page.locator("#prompt-1 textarea").fill("a dog")
    seed = page.get_by_label("Seed").locator("visible=true")
    for wrong, found in {"-5": "-5", "": "None"}.items():
        seed.fill(wrong)
        seed.press("Tab")
        button(page, "Generate").click()
        words = f"The seed must be a whole number from 0 to 2,147,483,647, found {found}."
        page.locator("#note-1 .error", has_text=words).wait_for()
    seed.fill("0")
    seed.press("Tab")
    drawn(page, "Both sides differ")

    files = {"nothing": b"no adapter"}
    random_adapter(tiny_llama, 0).save(tmp_path / "language.safetensors")
    files["language"] = (tmp_path / "language.safetensors").read_bytes()
    for name, content in files.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        page.locator("#drop-1 input[type=file]").set_input_files(tmp_path / f"{name}.safetensors")
        page.locator("#dropped-1 .error", has_text=f"{name}.safetensors").wait_for()
    assert place.names() == ["a", "b"]
    pipe_adapter(pipe, 7).save(tmp_path / "c.safetensors")
    page.locator("#drop-1 input[type=file]").set_input_files(tmp_path / "c.safetensors")
    page.get_by_label("range slider for Strength of c").wait_for()

    bias = pipe.vae.decoder.conv_in.bias.data
    was = bias.clone()
    bias[0] += 1
    button(page, "Look at the base now").click()
    page.locator("#light-1 .lamp.no").wait_for()
    assert "vae.decoder.conv_in.bias" in page.locator("#light-1").inner_text()
    bias.copy_(was)


def test_stopped_on_a_phone(shown, browser, monkeypatch):  # noqa: F811
    def slow(*given, on_step, **options):
        return sample(*given, on_step=lambda step: (time.sleep(0.1), on_step(step)), **options)

    monkeypatch.setattr("shira.play.pictures.sample", slow)
    place, address = shown
    page = browser.new_context(**PHONE).new_page()
    at_the_pictures(page, address)
    page.get_by_label("number input for Steps").fill("100")
    page.get_by_label("number input for Steps").press("Tab")
    button(page, "Generate").click()
    page.locator("#note-1", has_text="1 of 2: the base, step").wait_for()
    button(page, "Stop").click()
    page.locator("#note-1", has_text="Stopped.").wait_for()
    sync_api.expect(page.locator("#adapted-1 img")).to_have_count(0)
    assert place.light.exact
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["viewport"]["width"]
