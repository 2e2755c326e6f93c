"""The page, in Gradio. What it does is in `local` and `remote`; this file says where it stands. Only `opening` imports it."""

import logging
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import processing_utils

from ..errors import ShiraError
from .asking import MOST, Chosen, Drawing, Place, Words, chosen_from
from .local import Local
from .shown import comparison_html, error_html, head_html, light_html, note_html, switch_html
from .streams import streamed

__all__ = ["page"]

log = logging.getLogger("shira.play")
PROMPTS = {"text": "Write a short message to a friend.", "pictures": "a cat"}
SERVER = (
    "The model runs on a server. Whether its base is exact, comparing adapters, saving a set and adding a file need the "
    "weights on this machine: shira play MODEL."
)
DOWNLOAD = "() => setTimeout(() => document.querySelector('#fused-{number}')?.click(), 300)"


def page(places: Sequence[Place], given: Mapping[str, float]) -> gr.Blocks:
    """The Blocks of one or several places. given: name of an adapter -> its strength when the page is opened."""
    with gr.Blocks(title="shira play", analytics_enabled=False, fill_width=True) as blocks:
        if len(places) == 1:
            _Panel(blocks, places[0], given, 0)
        else:
            with gr.Tabs():
                for number, place in enumerate(places):
                    with gr.Tab("Text" if place.makes == "text" else "Pictures"):
                        _Panel(blocks, place, given, number)
    blocks.queue(max_size=64, api_open=False)
    return blocks


class _Panel:
    """The part of the page for one place. Each person's sliders are in their own browser, and come with each request."""

    def __init__(self, blocks: Any, place: Place, given: Mapping[str, float], number: int) -> None:
        self.place, self.given, self.number = place, given, number
        self.local = place if isinstance(place, Local) else None
        self.stops: dict[str, threading.Event] = {}  # person -> what stops their work
        self.turn = {"concurrency_id": f"place {number}", "concurrency_limit": 1}
        self.state()
        with gr.Row():
            with gr.Column(scale=2, min_width=300, elem_classes="left"):
                self.adapters()
            with gr.Column(scale=5, min_width=300):
                self.asking()
        if self.local is not None:
            self.comparing(self.local)
        self.sliders(blocks)
        blocks.load(self.opened, outputs=[self.picked, self.light], show_progress="hidden", queue=False)
        if self.local is not None:
            blocks.load(self.choices, [self.picked], self.pair, show_progress="hidden", queue=False)
        blocks.unload(self.stop)

    def state(self) -> None:
        gr.HTML(head_html(self.place.title))
        if self.local is None:
            self.light, self.switched = gr.HTML(note_html(SERVER)), gr.HTML(switch_html(None, told=False))
            return
        with gr.Row(elem_classes="state"):
            with gr.Column(scale=5, min_width=300, elem_classes="tight"):
                self.light = gr.HTML(light_html(self.local.light), elem_id=f"light-{self.number}")
                self.switched = gr.HTML(switch_html(None), elem_id=f"switched-{self.number}")
            look = gr.Button("Look at the base now", size="sm", scale=0, min_width=200)
        look.click(self.looked, outputs=[self.light], **self.turn)

    def adapters(self) -> None:
        names = self.place.names()
        first = [name for name in names if name in self.given] or names[:1]
        self.picked = gr.CheckboxGroup(names, value=first, label="Adapters", info="" if names else "None yet.")
        self.place_of_sliders = gr.Column()
        if self.local is None:
            return
        with gr.Column(elem_classes="files"):
            self.save = gr.Button("Save this set as one file", size="md")
            self.saved = gr.HTML(elem_id=f"saved-{self.number}", elem_classes="told")
            self.file = gr.DownloadButton("Download it again", size="md", visible="hidden", elem_id=f"fused-{self.number}")
            self.drop = gr.File(label="Drop an adapter's file to add it", height=150, elem_id=f"drop-{self.number}")
            self.dropped = gr.HTML(elem_id=f"dropped-{self.number}", elem_classes="told")
            self.drop.upload(self.added, [self.drop, self.picked], [self.drop, self.picked, self.dropped], **self.turn)

    def asking(self) -> None:
        text = self.place.makes == "text"
        self.prompt = gr.Textbox(
            PROMPTS[self.place.makes],
            label="Prompt",
            lines=2,
            max_lines=8,
            info="Shift + Enter starts.",
            interactive=True,
            elem_id=f"prompt-{self.number}",
        )
        with gr.Row():
            self.go = gr.Button("Generate", variant="primary", size="md", min_width=120)
            self.end = gr.Button("Stop", size="md", min_width=120)
        self.note = gr.HTML(note_html("Ready."), elem_id=f"note-{self.number}")
        with gr.Row(equal_height=True):
            self.base, self.adapted = self.side("Base", "base"), self.side("With adapters", "adapted")
        with gr.Accordion("Settings", open=False):
            if text:
                raw = gr.Checkbox(
                    self.place.is_chat is False,
                    label="Continue the text as it is, without a chat template",
                    interactive=self.place.is_chat is not False,
                )
                tokens = gr.Slider(1, 512, 80, step=1, label="Tokens at most", interactive=True)
                warm = gr.Slider(
                    0, 2, 0, step=0.05, label="Temperature", info="0: always the most probable token.", interactive=True
                )
                self.settings = [self.prompt, raw, tokens, warm]
            else:
                steps = gr.Slider(1, 100, 20, step=1, label="Steps", interactive=True)
                guidance = gr.Slider(0, 15, 0, step=0.5, label="Guidance", info="0: the pipeline's own.", interactive=True)
                self.settings = [self.prompt, steps, guidance]
            self.settings.append(gr.Number(0, label="Seed", precision=0, interactive=True))
        self.end.click(self.stop, queue=False, show_progress="hidden")

    def side(self, label: str, name: str) -> Any:
        """Where one of both answers stands."""
        look: dict[str, Any] = {"label": label, "interactive": False, "min_width": 260, "elem_id": f"{name}-{self.number}"}
        if self.place.makes == "text":
            return gr.Textbox(lines=9, max_lines=24, buttons=["copy"], **look)
        return gr.Image(type="pil", format="png", height=340, buttons=["download", "fullscreen"], elem_classes="made", **look)

    def comparing(self, local: Local) -> None:
        with gr.Accordion("Compare two adapters", open=False):
            with gr.Row(elem_classes="state"):
                one = gr.Dropdown([], label="One", min_width=160)
                other = gr.Dropdown([], label="Other", min_width=160)
                start = gr.Button("Compare", size="md", min_width=140, scale=0)
            found = gr.HTML(elem_id=f"compared-{self.number}")

        def compared(first: str | None, second: str | None) -> Iterator[str]:
            def work(show: Callable[[str], None]) -> None:
                show(note_html("Waiting for the model …"))
                pair = local.compare(
                    first or "", second or "", lambda done, of: show(note_html(f"Comparing tensor {done} of {of} …"))
                )
                show(note_html("Drawing …"))
                show(comparison_html(pair))

            yield from _or_failure(lambda: streamed(work, threading.Event()), error_html)

        self.pair = [one, other]
        self.picked.change(self.choices, [self.picked], self.pair, show_progress="hidden", queue=False)
        start.click(compared, [one, other], found, show_progress="hidden", **self.turn)

    def sliders(self, blocks: gr.Blocks) -> None:
        """The sliders of the picked adapters, and what takes their values. They are made again when others are picked."""
        place = self.place

        moved = gr.State({})  # what this person has set, also of adapters that are not picked now

        def drawn(picked: list[str], at: Mapping[Any, float]) -> None:
            strengths, blocks = [], []
            for name in picked:
                start = at.get((name, ""), self.given.get(name, 1.0))
                strengths.append(gr.Slider(0, MOST, start, step=0.05, label=f"Strength of {name}", interactive=True))
                if not place.blocks:
                    continue
                with gr.Accordion(f"{name} by block", open=False, elem_classes="blocks"):
                    for block in place.blocks:
                        start = at.get((name, block), 1.0)
                        blocks.append(gr.Slider(0, MOST, start, step=0.05, label=f"× {block}", interactive=True))
            keys = [*((name, "") for name in picked), *((name, block) for name in picked for block in place.blocks)]

            def chosen(values: Sequence[Any]) -> Chosen:
                factors, each = iter(values[len(picked) :]), dict(zip(picked, values, strict=False))
                return chosen_from(each, {name: {block: next(factors) for block in place.blocks} for name in picked})

            all_sliders = [*strengths, *blocks]
            count = len(self.settings)

            def generated(request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
                yield from self.generated(request.session_hash, values[:count], lambda: chosen(values[count:]))

            def timed(at: Mapping[Any, float], *values: Any) -> tuple[Any, Any]:
                now = {**at, **dict(zip(keys, values, strict=True))}
                try:
                    found = self.local.time_switch(chosen(values)) if self.local else None
                except ShiraError as error:
                    return error_html(str(error)), now
                return (gr.skip() if found is None else switch_html(found)), now

            def fused(*values: Any) -> tuple[Any, str]:
                try:
                    file = self.local.fuse(chosen(values)) if self.local else None
                except (ShiraError, OSError) as error:
                    return gr.DownloadButton(visible="hidden"), error_html(str(error))
                return gr.DownloadButton(value=file, visible=True), note_html(f"Saved as {file.name if file else ''}.")

            gr.on(
                [self.go.click, self.prompt.submit],
                generated,
                [*self.settings, *all_sliders],
                [self.base, self.adapted, self.note, self.switched, self.light],
                show_progress="hidden",
                **self.turn,
            )
            for slider in all_sliders:
                slider.input(
                    timed,
                    [moved, *all_sliders],
                    [self.switched, moved],
                    show_progress="hidden",
                    queue=False,
                    trigger_mode="always_last",
                )
            if self.local is None:
                return
            self.save.click(fused, all_sliders, [self.file, self.saved], **self.turn).success(
                None, js=DOWNLOAD.format(number=self.number)
            )

        with self.place_of_sliders:
            gr.render([self.picked, moved], [blocks.load, self.picked.change], show_progress="hidden")(drawn)

    def generated(self, person: str, settings: Sequence[Any], chosen: Callable[[], Chosen]) -> Iterator[tuple[Any, ...]]:
        """One request of a person: what both outputs, the note, the time of the switch and the light show."""
        skip = gr.skip()
        stop = self.stops[person] = threading.Event()

        def started() -> Iterator[Any]:
            return self.place.run((Words if self.place.makes == "text" else Drawing)(*settings), chosen(), stop)

        def failed(text: str) -> tuple[Any, ...]:
            return skip, skip, error_html(text), skip, self.lit()

        try:
            last = None
            for seen in _or_failure(started, lambda text: text):
                if isinstance(seen, str):
                    yield failed(seen)
                    return
                switched = skip if seen.milliseconds is None else switch_html(seen.milliseconds)
                base = skip if last and last.base is seen.base else _for_side(self.base, seen.base)
                adapted = skip if last and last.adapted is seen.adapted else _for_side(self.adapted, seen.adapted)
                yield base, adapted, note_html(seen.note), switched, skip
                last = seen
            note = note_html("Stopped.") if stop.is_set() and last and last.note.endswith("…") else skip
            yield skip, skip, note, skip, self.lit()
        finally:
            stop.set()
            self.stops.pop(person, None)

    def lit(self) -> Any:
        return light_html(self.local.light) if self.local else gr.skip()

    def stop(self, request: gr.Request) -> None:
        """End the work of the person who asks, or who has closed the page."""
        if event := self.stops.get(request.session_hash):
            event.set()

    def looked(self) -> str:
        return light_html(self.local.check()) if self.local else ""

    def opened(self, *_: Any) -> tuple[Any, Any]:
        """What may have changed since the page was made."""
        return gr.CheckboxGroup(choices=self.place.names()), self.lit()

    def choices(self, picked: list[str]) -> tuple[Any, Any]:
        """The adapters that can be compared; the first two that are picked are proposed."""
        names = self.place.names()
        first, second = ([*picked, *(name for name in names if name not in picked)] + [None, None])[:2]
        return gr.Dropdown(names, value=first), gr.Dropdown(names, value=second)

    def added(self, file: str | None, picked: list[str]) -> tuple[Any, Any, str]:
        try:
            name = self.local.add(Path(file)) if self.local and file else ""
        except (ShiraError, OSError) as error:
            Path(file or "").unlink(missing_ok=True)
            return gr.File(value=None), gr.skip(), error_html(str(error))
        names = gr.CheckboxGroup(choices=self.place.names(), value=[*picked, name])
        return gr.File(value=None), names, note_html(f"{name} is added.")


def _for_side(side: Any, made: Any) -> Any:
    """A text as it is; a picture as a file, since Gradio writes the file of a picture again, also while a browser reads it."""
    if made is None or isinstance(made, str):
        return made
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image.png"
        made.save(file)
        return processing_utils.save_file_to_cache(file, side.GRADIO_CACHE)  # a file that is there already stays


def _or_failure(start: Callable[[], Iterator[Any]], failed: Callable[[str], Any]) -> Iterator[Any]:
    """What an iterator yields; at an error, the sentence that `failed` makes of it."""
    try:
        yield from start()
    except (ShiraError, OSError) as error:
        yield failed(str(error))
    except Exception as error:  # of the model or of a library: the page goes on
        log.exception("a request failed")
        yield failed(f"the model failed: {type(error).__name__}: {error}")
