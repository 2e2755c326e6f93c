"""What the page shows, as HTML: the light, notes, a comparison. Every text of others is quoted."""

from html import escape
from typing import Any

from ..analysis.comparison import Comparison
from ..analysis.pictures import heat_maps, png
from ..analysis.report import pyplot_and_template
from ..analysis.words import about_pair
from ..texts import visible
from .watching import Light

__all__ = ["CSS", "comparison_html", "error_html", "head_html", "light_html", "note_html", "switch_html"]

CSS = """
.gradio-container { max-width: 1180px !important; width: 100%; margin: 0 auto !important; }
.state { align-items: center; }
.tight { gap: 0.2rem !important; }
.head { display: flex; flex-wrap: wrap; gap: 0.2rem 0.8rem; align-items: baseline; }
.head h1 { font-size: 1.35rem; font-weight: 600; margin: 0; }
.head span, .quiet { opacity: 0.75; overflow-wrap: anywhere; }
.line { display: flex; gap: 0.5rem; align-items: baseline; min-height: 1.5em; overflow-wrap: anywhere; }
.lamp { flex: none; width: 0.75rem; height: 0.75rem; border-radius: 50%; align-self: center; }
.lamp.yes { background: #16a34a; box-shadow: 0 0 0 3px #16a34a40; }
.lamp.no { background: #dc2626; box-shadow: 0 0 0 3px #dc262640; }
.lamp.unknown { background: #9ca3af; }
.error { color: #b91c1c; overflow-wrap: anywhere; }
.dark .error { color: #fca5a5; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 0.6rem; margin: 0.6rem 0; }
.facts div { border: 1px solid var(--border-color-primary); border-radius: var(--radius-md); padding: 0.5rem 0.7rem; }
.facts b { display: block; font-size: 1.15rem; }
.maps { background: #fff; border-radius: var(--radius-md); max-width: 100%; height: auto; width: 44rem; }
.told:not(:has([role])) { display: none; }
@media (max-width: 720px) {
  .left { display: contents !important; }
  .left > * { flex: 1 1 100% !important; }
  .left > .files { order: 2; }
}
.made img { width: 100%; height: 100%; object-fit: contain; }
.blocks { gap: 0.3rem !important; }
.label-wrap { gap: 0.5rem; align-items: center; text-align: left; }
.state input { text-overflow: ellipsis; padding-right: 1.5rem; }
"""


def head_html(title: str) -> str:
    """The head of the page. title: of what is played with."""
    return f'<div class="head"><h1>shira play</h1><span>{_quoted(title)}</span></div>'


def light_html(light: Light) -> str:
    """The light, with its sentence."""
    state = {True: "yes", False: "no", None: "unknown"}[light.exact]
    return f'<div class="line" role="status"><span class="lamp {state}" aria-hidden="true"></span>{_quoted(light.text)}</div>'


def switch_html(milliseconds: float | None, *, told: bool = True) -> str:
    """The time of a switch. told: whether the place tells it at all."""
    if not told:
        return '<div class="line quiet">A server does not tell how long it switches.</div>'
    if milliseconds is None:
        return '<div class="line quiet" role="status">Move a slider: here stands how long a switch takes.</div>'
    text = f"Last switch: <b>{milliseconds:.1f} ms</b> from the base to your adapters."
    return f'<div class="line" role="status"><span>{text}</span></div>'


def note_html(text: str) -> str:
    """A note on what happens."""
    return f'<div class="line quiet" role="status">{_quoted(text)}</div>'


def error_html(text: str) -> str:
    """What went wrong, as a sentence."""
    words = text.split(maxsplit=1)
    sentence = text[:1].upper() + text[1:] if words and words[0].isalpha() else text
    return f'<div class="error" role="alert">{_quoted(sentence)}{"" if sentence.endswith((".", "?", "!")) else "."}</div>'


def comparison_html(found: Comparison) -> str:
    """Two adapters: numbers, sentences, and a picture of where the mass of each lies. Raises MissingExtra."""
    pyplot, _ = pyplot_and_template()
    (pair,) = found.total.pairs
    facts: dict[str, Any] = {
        "positions that both change": f"{pair.shared:,}",
        "overlap, of the smaller one": f"{pair.overlap:.1%}",
        "cosine of the changes": "–" if pair.cosine is None else f"{pair.cosine:.3f}",
        "signs differ at": f"{pair.conflicts:,}",
        "AWOR": f"{pair.awor:.1%}",
    }
    boxes = "".join(f"<div><b>{_quoted(value)}</b>{_quoted(label)}</div>" for label, value in facts.items())
    sentences = "".join(f"<p>{_quoted(sentence)}</p>" for sentence in about_pair(found, pair))
    picture = png(pyplot, heat_maps(pyplot, found))
    about = f"Where the mass of {pair.first} and {pair.second} lies: the share of each one's ‖ΔW‖² by layer and module"
    image = f'<img class="maps" alt="{_quoted(about)}" src="data:image/png;base64,{picture}">'
    return f'<div class="facts">{boxes}</div>{sentences}<p><b>{_quoted(about)}</b></p>{image}'


def _quoted(text: str) -> str:
    return escape(visible(text))
