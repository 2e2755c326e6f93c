"""A comparison as one HTML page, report.html.j2, with its pictures inside: no script, no other file, nothing fetched."""

import datetime
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any, NamedTuple

from ..adapter import Adapter
from ..checkpoints.sources import CheckpointSource
from ..errors import AdapterError, MissingExtra, did_you_mean
from ..texts import visible
from ..version import __version__
from .comparison import Comparison, deltas
from .pictures import heat_maps, histograms, mask_pictures, matrices, png, spectra_curves
from .words import SCALES, in_words

__all__ = ["check_held", "page", "provenance", "pyplot_and_template", "tables"]


def check_held(adapters: Mapping[str, Adapter], tensor: str) -> None:
    """Raise AdapterError unless some adapter holds this tensor."""
    known = {name for adapter in adapters.values() for name in adapter.tensors}
    if tensor not in known:
        raise AdapterError(f"no adapter holds a tensor {tensor!r}; {did_you_mean(tensor, sorted(known))}")


def pyplot_and_template() -> tuple[Any, Any]:
    """pyplot, which draws into memory, and the page's template. Raises MissingExtra if a library is missing."""
    try:
        import jinja2
        import matplotlib
    except ImportError as error:
        raise MissingExtra(f"a report needs matplotlib and jinja2: pip install 'shira-adapters[report]' ({error})") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_visible)
    return pyplot, environment.from_string(files(__package__).joinpath("report.html.j2").read_text("utf-8"))


def _visible(value: Any) -> Any:
    """A value before the template escapes it: text whose hidden characters are shown, or the template's own HTML."""
    return value if hasattr(value, "__html__") else visible(str(value))


def provenance(adapters: Mapping[str, Adapter], base_name: str | None = None) -> dict[str, str]:
    """The base, the date and the version, for a page or a file. base_name: the base that was given, if one was.

    Otherwise the base is what the adapters record.
    """
    recorded = [known for adapter in adapters.values() if isinstance(known := adapter.metadata.get("base"), dict)]
    named = dict.fromkeys(", ".join(str(value) for value in known.values() if value) for known in recorded)
    base = base_name or "; ".join(filter(None, named)) or "not recorded"
    return {"base": base, "date": datetime.date.today().isoformat(), "version": f"shira {__version__}"}


def page(
    found: Comparison,
    adapters: Mapping[str, Adapter],
    base: CheckpointSource | None,
    tensor: str | None = None,
    base_name: str | None = None,
) -> str:
    """The whole page.

    found: of these adapters. tensor: the one whose mask and spectrum are drawn; by default the one that changes most.
    base_name: what the page calls the base; by default what the adapters record.
    Raises AdapterError if no adapter holds the tensor; MissingExtra without matplotlib or jinja2.
    """
    pyplot, template = pyplot_and_template()
    if tensor is None:
        tensor = max(found.tensors, key=lambda name: sum(c.l2**2 for c in found.tensors[name].changes.values()))
    check_held(adapters, tensor)
    _, shape, changes = next(deltas(adapters, base, tensor))
    about, *meetings = tables(found, adapters)
    pictures = {
        "places": png(pyplot, heat_maps(pyplot, found)),
        "mask": png(pyplot, mask_pictures(pyplot, shape, changes)),
        "sizes": png(pyplot, histograms(pyplot, found)),
        "spectra": png(pyplot, spectra_curves(pyplot, shape, changes)),
    }
    if meetings:
        pictures["matrices"] = png(pyplot, matrices(pyplot, found))
    tensors = _without_empty(Table("Every tensor", TENSOR_HEAD, list(_tensor_rows(found))))
    rendered: str = template.render(
        provenance=provenance(adapters, base_name),
        sentences=in_words(found),
        scales=[scale.as_text() for scale in SCALES],
        adapters=found.adapters,
        about=about,
        meetings=meetings,
        tensors=tensors,
        tensor=tensor,
        shape=shape,
        pictures=pictures,
    )
    return rendered


UNKNOWN = "–"
ADAPTER_HEAD = ["adapter", "mask", "entries", "density", "‖ΔW‖", "effective rank", "LoRA's rank", "LoRA holds"]
PAIR_HEAD = ["pair", "overlap", "Jaccard", "AWOR", "AWOM", "relative", "cosine", "distance", "conflicts", "their share"]
TENSOR_HEAD = ["tensor", "adapter", "entries", "‖ΔW‖", "effective rank", "LoRA's rank", "smallest AWOR"]


class Table(NamedTuple):
    """What stands in a table, as text."""

    title: str
    head: list[str]
    rows: list[list[str]]


def tables(found: Comparison, adapters: Mapping[str, Adapter]) -> list[Table]:
    """A table of the adapters; and one of each two, if there are two."""
    about = []
    for name, change in found.total.changes.items():
        mask = (adapters[name].metadata.get("mask") or {}).get("name", UNKNOWN)
        density = f"{adapters[name].density:.2%}"
        ranks = [_number(change.effective_rank), _number(change.lora_rank), _share(change.lora_energy)]
        about.append([name, str(mask), f"{change.entries:,}", density, _number(change.l2), *ranks])
    pairs = []
    for pair in found.total.pairs:
        shares = [_share(pair.overlap), _share(pair.jaccard), _share(pair.awor)]
        norms = [_number(pair.awom), _number(pair.awom_relative), _number(pair.cosine), _number(pair.distance)]
        pairs.append([f"{pair.first}, {pair.second}", *shares, *norms, f"{pair.conflicts:,}", _share(pair.conflict_mass)])
    listed = [Table("What they change", ADAPTER_HEAD, about), Table("Where they meet", PAIR_HEAD, pairs)]
    return [_without_empty(table) for table in listed if table.rows]


def _without_empty(table: Table) -> Table:
    """The table without columns in which nothing is known, such as ranks without spectra."""
    kept = [number for number in range(len(table.head)) if any(row[number] != UNKNOWN for row in table.rows)]
    return Table(table.title, [table.head[number] for number in kept], [[row[number] for number in kept] for row in table.rows])


def _tensor_rows(found: Comparison) -> Iterable[list[str]]:
    for name, part in found.tensors.items():
        for adapter, change in part.changes.items():
            met = [pair.awor for pair in part.pairs if adapter in (pair.first, pair.second)]
            ranks = [_number(change.effective_rank), _number(change.lora_rank)]
            yield [name, adapter, f"{change.entries:,}", _number(change.l2), *ranks, _share(min(met, default=None))]


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.1%}"
