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
from shira.play.asking import Drawing
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
    stepped(page, STEPS)


def stepped(page, steps):
    """Give a number of steps."""
    number = page.get_by_label("number input for Steps")
    until_it_stays(page, lambda: (number.fill(str(steps)), number.press("Tab")), "Steps", str(steps))


def until_it_stays(page, give, label, value):
    """Give a slider a value, repeatedly. Gradio sets it back once, shortly after it appeared, so it is looked at later."""
    fields = [page.get_by_label(f"{kind} for {label}").locator("visible=true") for kind in ("number input", "range slider")]
    for _ in range(10):
        give()
        page.wait_for_timeout(500)
        if all(field.input_value() == value for field in fields):
            return
    raise AssertionError(f"{label} is {[field.input_value() for field in fields]}, not {value}")


def button(page, name):
    """The button of this tab: the other one has buttons of the same names."""
    return page.get_by_role("button", name=name).locator("visible=true")


def moved(page, name, strength):
    """Give an adapter a strength with the keys of the keyboard, from the left end of its slider."""

    def press():
        page.get_by_label(f"range slider for Strength of {name}").focus()
        page.keyboard.press("Home")
        for _ in range(round(strength / 0.05)):
            page.keyboard.press("ArrowRight")

    until_it_stays(page, press, f"Strength of {name}", f"{strength:g}")


def check_drawn(page, note, base, adapted):
    """After a click the note and both pictures are these, within half a minute. Before it one of them must be another."""
    button(page, "Generate").click()
    end = time.monotonic() + 30
    while True:
        said, found = page.locator("#note-1").inner_text(), [picture(page, side) for side in ("base", "adapted")]
        if note in said and found == [base, adapted]:
            return
        assert time.monotonic() < end, f"{said}; as expected: {found[0] == base, found[1] == adapted}"
        page.wait_for_timeout(100)


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


def test_a_person_at_the_pictures(shown, browser):  # noqa: F811
    place, address = shown
    base, a, both = alone(place, {}), alone(place, {"a": 0.6}), alone(place, {"a": 0.6, "b": 1.0})
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    at_the_pictures(page, address)
    moved(page, "a", 0.6)
    page.locator("#switched-1", has_text=" ms").wait_for()
    check_drawn(page, "Both sides differ", base, a)
    assert list(place._kept) == [Drawing("a dog", STEPS)]  # what was asked for
    page.locator("#light-1", has_text="exact").wait_for()
    assert page.locator("#light-1 .lamp.yes").count() == 1

    page.get_by_role("checkbox", name="b", exact=True).check()
    page.get_by_label("range slider for Strength of b").wait_for()
    check_drawn(page, "Both sides differ", base, both)
    for name in "ab":
        moved(page, name, 0)
    check_drawn(page, "both sides are the base", base, base)

    moved(page, "b", 1)
    moved(page, "a", 0.6)
    button(page, "b by block").click()
    for block in place.blocks:
        slider = page.get_by_label(f"range slider for × {block}").locator("visible=true")
        until_it_stays(page, lambda: (slider.focus(), page.keyboard.press("Home")), f"× {block}", "0")  # noqa: B023
    check_drawn(page, "Both sides differ", base, a)
    moved(page, "a", 0)
    check_drawn(page, "both sides are the base", base, base)
    moved(page, "a", 0.6)
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
    button(page, "Generate").click()
    page.locator("#note-1", has_text="Both sides differ").wait_for()

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
    stepped(page, 100)
    button(page, "Generate").click()
    page.locator("#note-1", has_text="1 of 2: the base, step").wait_for()
    button(page, "Stop").click()
    page.locator("#note-1", has_text="Stopped.").wait_for()
    sync_api.expect(page.locator("#adapted-1 img")).to_have_count(0)
    assert place.light.exact
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["viewport"]["width"]
