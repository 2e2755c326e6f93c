"""The page of `shira play` in headless Chromium, on a tiny random model. `make test-play` installs what it needs."""

import os
import shutil
import warnings

import pytest

import shira
from conftest import all_bits, letter_tokenizer, random_adapter, same_bits
from serving import Served
from shira.integrations.generation import answer

HOW = "make test-play installs it"
gradio = pytest.importorskip("gradio", reason=f"Gradio is not installed; {HOW}")
sync_api = pytest.importorskip("playwright.sync_api", reason=f"Playwright is not installed; {HOW}")
CHROMIUM = os.environ.get("SHIRA_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason=f"there is no chromium on PATH, and no SHIRA_CHROMIUM; {HOW}"),
]
PHONE = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}


@pytest.fixture
def shown(tiny_llama, tmp_path):
    """A page with the adapters "a" and "b": what is played with, and the page's address."""
    from shira.play.language import Language
    from shira.play.opening import Options, opened, workspace

    switcher, files = shira.Switcher(tiny_llama), {}
    for seed, name in enumerate("ab"):
        files[name] = tmp_path / f"{name}.safetensors"
        random_adapter(tiny_llama, seed).save(files[name])
        switcher.add(name, files[name])
    with warnings.catch_warnings(), workspace() as folder:
        warnings.simplefilter("ignore")
        place = Language("tiny", tiny_llama, letter_tokenizer(), switcher, files, folder)
        with opened([place], Options(browser=False)) as address:
            yield place, address


@pytest.fixture
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def ready(page, address):
    page.goto(address)
    page.get_by_label("range slider for Strength of a").wait_for()


def alone(place, selection):
    """What the model writes to "hello" outside of the page."""
    with place._switcher.using(selection):
        asked = [{"role": "user", "content": "hello"}]
        return answer(place._model, place._tokenizer, asked, max_new_tokens=80, temperature=0)


def generated(page):
    """What stands on both sides after a click; the right side must become another text than before."""
    adapted = page.locator("#adapted-0 textarea")
    before = adapted.input_value()
    page.get_by_role("button", name="Generate").click()
    sync_api.expect(adapted).not_to_have_value(before, timeout=30_000)
    page.locator("#note-0", has_text="Done").wait_for()
    return [page.locator(f"#{side}-0 textarea").input_value() for side in ("base", "adapted")]


def test_a_person_at_the_page(shown, browser, tmp_path):
    place, address = shown
    before = all_bits(place._model)
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    ready(page, address)
    page.locator("#prompt-0 textarea").fill("hello")
    expected = alone(place, {"a": 0.2})
    base, whole = generated(page)
    assert base and whole and base != whole
    slider = page.get_by_label("range slider for Strength of a")
    slider.focus()
    for _ in range(16):
        page.keyboard.press("ArrowLeft")
    page.locator("#switched-0", has_text=" ms").wait_for()
    assert page.get_by_label("number input for Strength of a").input_value() == "0.2"
    assert generated(page) == [base, expected]
    assert "exact" in page.locator("#light-0").inner_text() and page.locator("#light-0 .lamp.yes").count() == 1

    bad = tmp_path / "bad.safetensors"
    bad.write_text("no adapter")
    page.locator("#drop-0 input[type=file]").set_input_files(bad)
    page.locator("#dropped-0 .error", has_text="bad.safetensors").wait_for()
    assert place.names() == ["a", "b"]
    random_adapter(place._model, 7).save(tmp_path / "c.safetensors")
    page.locator("#drop-0 input[type=file]").set_input_files(tmp_path / "c.safetensors")
    page.get_by_label("range slider for Strength of c").wait_for()

    with page.expect_download() as download:
        page.get_by_role("button", name="Save this set").click()
    download.value.save_as(tmp_path / "saved.safetensors")
    assert shira.load(tmp_path / "saved.safetensors").metadata["fused"]["strengths"] == {"a": 0.2, "c": 1.0}

    page.get_by_role("button", name="Compare two adapters").click()
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator("#compared-0 img").wait_for()
    assert "cosine" in page.locator("#compared-0").inner_text()

    place._model.model.norm.weight.data[0] += 1
    page.get_by_role("button", name="Look at the base now").click()
    page.locator("#light-0 .lamp.no").wait_for()
    place._model.model.norm.weight.data[0] -= 1
    page.reload()
    page.get_by_label("range slider for Strength of a").wait_for()
    assert page.get_by_role("checkbox", name="c").count() == 1
    generated(page)
    assert {url.split("/")[2] for url in asked if url.startswith(("http", "ws"))} == {address.split("/")[2]}
    assert same_bits(before, all_bits(place._model))


def test_two_people_and_a_phone(shown, browser):
    place, address = shown
    one, other = browser.new_context().new_page(), browser.new_context(**PHONE).new_page()
    for page in (one, other):
        ready(page, address)
    other.get_by_role("checkbox", name="a").uncheck()
    other.get_by_role("checkbox", name="b").check()
    other.get_by_label("range slider for Strength of b").wait_for()
    for page in (one, other):
        page.locator("#prompt-0 textarea").fill("hello")
        page.get_by_role("button", name="Generate").click()
    found = []
    for page in (one, other):
        page.locator("#note-0", has_text="Done").wait_for()
        found.append(page.locator("#adapted-0 textarea").input_value())
    assert found == [alone(place, "a"), alone(place, "b")]
    assert found[0] != found[1]
    assert other.evaluate("document.documentElement.scrollWidth") <= PHONE["viewport"]["width"]
    assert other.evaluate("document.body.classList.contains('dark')")


def test_the_page_of_a_server(browser, tmp_path):
    from shira.play.opening import Options, opened, workspace
    from shira.play.remote import Remote

    served = Served(tmp_path)
    with served.listening() as (url, _), workspace(), opened([Remote(url)], Options(browser=False)) as address:
        page = browser.new_page()
        ready(page, address)
        page.locator("#prompt-0 textarea").fill("hello")
        base, adapted = generated(page)
        assert base and adapted and base != adapted
        assert page.get_by_text("need the weights on this machine").is_visible()
        for absent in ("Save this set", "Compare", "Look at the base"):
            assert page.get_by_role("button", name=absent).count() == 0
