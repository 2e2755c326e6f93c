"""From the options of `shira play` to an open page. What is wrong with them is said before a model is loaded."""

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.models import SMOLLM2
from ..errors import AdapterError, BaseMismatch, DataError, MissingExtra
from ..files.suggestions import adapter_in, is_ours
from ..runs.live import check_files, check_fit, load_live
from .asking import MOST, Place
from .shown import CSS

__all__ = ["Options", "adapters_of", "check", "opened", "places", "workspace"]

ANY_PORT = range(7860, 7960)


@dataclass(frozen=True)
class Options:
    """What is played with, and where the page is.

    files, strengths: name of an adapter -> its file, and its strength when the page opens. port: None takes a free one.
    """

    model: str = ""
    image: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    strengths: Mapping[str, float] = field(default_factory=dict)
    server: str = ""
    key: str = ""
    dtype: str = "auto"
    host: str = "127.0.0.1"
    port: int | None = None
    browser: bool = True

    @property
    def language(self) -> str:
        """The language model: the one that was given, or the built-in one if nothing else is played with."""
        return self.model or ("" if self.image or self.server else SMOLLM2)


def adapters_of(given: str) -> list[str]:
    """The adapters that are meant by a file, a folder with one, or a folder of many files and folders with one each.

    Raises DataError for a folder without any.
    """
    folder = Path(given)
    if not folder.is_dir() or adapter_in(folder) != folder:
        return [given]
    inner = sorted(each for each in folder.iterdir() if not each.name.startswith("."))
    found = [str(each) for each in inner if (adapter_in(each) != each if each.is_dir() else is_ours(each))]
    if not found:
        raise DataError(f"there is no adapter in the folder {given}; give files that shira train or shira convert has written")
    return found


def check(options: Options) -> None:
    """Raise a ShiraError or OSError for options that exclude each other, files that are no adapters, a port that is taken."""
    if options.server and (options.model or options.image or options.files):
        raise DataError("--server plays with what the server has; leave MODEL, --image and --adapters out")
    for name, strength in options.strengths.items():
        if not isinstance(strength, int | float) or not 0 <= strength <= MOST:
            raise AdapterError(f"{name}: a strength to begin with must be a number from 0 to {MOST}, found {strength!r}")
    check_files(options.files, options.strengths)
    _free_port(options.host, options.port)


def _free_port(host: str, port: int | None) -> int:
    """The port, or the first one that is free. Raises DataError if it is taken or not allowed."""
    for each in ANY_PORT if port is None else [port]:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((host, each))
                return int(trial.getsockname()[1])
            except OSError as error:
                why = error.strerror or str(error)
    where = f"port {port}" if port is not None else f"a port from {ANY_PORT[0]} to {ANY_PORT[-1]}"
    raise DataError(f"cannot listen at {host} on {where}: {why}; give another --host or --port")


def places(options: Options, folder: Path) -> list[Place]:
    """What the page plays with: the server; or the language model and the pipeline, each with the adapters that belong to it.

    folder: for files that are made. Raises what loading raises.
    """
    if options.server:
        from .remote import Remote

        return [Remote(options.server, options.key)]
    found: list[Place] = []
    files: dict[str, str] = dict(options.files)
    rest: dict[str, str] = {}
    if options.language and options.image:
        files, rest = _of_the_language_model(options.language, options.files)
    elif options.image:
        files, rest = {}, files
    if options.language:
        from ..integrations.transformers import load_tokenizer
        from .language import Language

        tokenizer = load_tokenizer(options.language)
        model, switcher = load_live(options.language, files, options.dtype)
        found.append(Language(options.language, model, tokenizer, switcher, files, folder))
    if options.image:
        from ..integrations.diffusers import PipelineAdapters
        from ..integrations.diffusers_sampling import load_pipeline, to_the_accelerator
        from .pictures import Pictures

        pipe = load_pipeline(options.image, options.dtype)
        to_the_accelerator(pipe)
        adapters = PipelineAdapters(pipe)
        for name, file in rest.items():
            adapters.load(file, name)
        found.append(Pictures(options.image, pipe, adapters, folder))
    return found


def _of_the_language_model(model: str, files: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The files that fit the language model, and the others, which are the pipeline's."""
    fit: dict[str, str] = {}
    for name, file in files.items():
        with contextlib.suppress(BaseMismatch):
            check_fit(model, {name: file})
            fit[name] = file
    return fit, {name: file for name, file in files.items() if name not in fit}


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A folder for the files that are dropped or made, which is removed after the block. Raises MissingExtra without Gradio."""
    with tempfile.TemporaryDirectory(prefix="shira-play-") as folder:
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")  # read when Gradio is imported, and later
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise MissingExtra(f"shira play needs gradio: pip install 'shira-adapters[play]' ({error})") from error
        yield Path(folder)


@contextlib.contextmanager
def opened(made: Sequence[Place], options: Options) -> Iterator[str]:
    """Show the page of these places, in a `workspace`; gives its address. It is closed after the block."""
    import gradio

    from .page import page

    blocks = page(made, options.strengths)
    how: dict[str, Any] = {"share": False, "quiet": True, "ssr_mode": False, "prevent_thread_lock": True, "footer_links": []}
    how |= {"enable_monitoring": False, "css": CSS, "theme": _theme(gradio), "inbrowser": options.browser}
    port = _free_port(options.host, options.port)
    _, address, _ = blocks.launch(server_name=options.host, server_port=port, **how)
    try:
        yield address
    finally:
        blocks.close(verbose=False)


def _theme(gradio: Any) -> Any:
    """Gradio's own, with labels that can be read, in both modes; its fonts come with it."""
    shades = {"body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_300"}
    titles = {"block_title_text_color": "*body_text_color", "block_title_text_color_dark": "*body_text_color"}
    return gradio.themes.Default().set(**shades, **titles)
