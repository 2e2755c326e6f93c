"""A comparison as one HTML page with its pictures inside: no script, no other file, nothing fetched."""

import html
from collections.abc import Iterable, Mapping, Sequence

from ..adapter import Adapter
from ..checkpoints.checkpoint import CheckpointSource
from ..errors import AdapterError, did_you_mean
from ..texts import visible
from .comparison import Comparison, deltas
from .pictures import heat_maps, histograms, mask_pictures, matrices, needs_matplotlib, picture, spectra_curves

__all__ = ["check_held", "page", "tables"]

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:0 auto;padding:1rem;color:#222}
h1,h2{overflow-wrap:anywhere}h1{font-size:1.5rem}h2{font-size:1.15rem;margin:2rem 0 .3rem}
img{max-width:100%;height:auto;display:block;margin:.5rem auto}
table{border-collapse:collapse;font-size:.85rem}th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}div.wide{overflow-x:auto}p.note{color:#555;font-size:.9rem}
th{white-space:nowrap}summary{cursor:pointer;margin-top:2rem}"""


def check_held(adapters: Mapping[str, Adapter], tensor: str) -> None:
    """Raise AdapterError unless some adapter holds this tensor."""
    known = {name for adapter in adapters.values() for name in adapter.tensors}
    if tensor not in known:
        raise AdapterError(f"no adapter holds a tensor {tensor!r}; {did_you_mean(tensor, sorted(known))}")


def page(found: Comparison, adapters: Mapping[str, Adapter], base: CheckpointSource | None, tensor: str | None = None) -> str:
    """The whole page.

    found: of these adapters. tensor: the one whose mask and spectrum are drawn; the one that changes most, if none is named.
    Raises AdapterError if no adapter holds it; MissingExtra without matplotlib.
    """
    pyplot = needs_matplotlib()
    if tensor is None:
        tensor = max(found.tensors, key=lambda name: sum(c.l2**2 for c in found.tensors[name].changes.values()))
    check_held(adapters, tensor)
    _, shape, changes = next(deltas(adapters, base, tensor))
    called = _escaped(tensor)
    broken = called.replace(".", ".<wbr>")
    about, *pairs = tables(found, adapters)
    pieces = [
        f"<h1>{_escaped(' · '.join(found.adapters))}</h1>",
        _table(*about[1:]),
        '<p class="note">Effective rank: of ΔW, the mean over its tensors. LoRA\'s rank: of a LoRA with as many parameters. '
        "LoRA holds: the most of ‖ΔW‖² that a change of that rank can.</p>",
    ]
    for title, head, rows in pairs:
        pieces += [
            f"<h2>{title}</h2>",
            _table(head, rows),
            '<p class="note">AWOM: ‖A₁ᵀA₂‖; relative: over ‖A₁‖·‖A₂‖. AWOR: the share of zeros in A₁ᵀA₂. Conflicts: positions '
            "that both change, with different signs, and their share of all |ΔW|.</p>",
            picture(pyplot, matrices(pyplot, found), "Overlap, AWOR and cosine of each two adapters"),
        ]
    pieces += [
        "<h2>Where the change lies</h2>",
        picture(pyplot, heat_maps(pyplot, found), "Heat map of each adapter's share of its squared change by layer and module"),
        '<p class="note">Share of ‖ΔW‖² by layer (down) and module (across).</p>',
        f"<h2>One mask: {broken}</h2>",
        picture(pyplot, mask_pictures(pyplot, shape, changes), f"Positions that each adapter holds in {called}"),
        f'<p class="note">{" × ".join(map(str, shape))} entries; a pixel is the share held among those it stands for.</p>',
        "<h2>How large the changes are</h2>",
        picture(pyplot, histograms(pyplot, found), "Histogram of the changes by magnitude, in all tensors"),
        '<p class="note">In all tensors; positive changes upwards, negative ones downwards. Steps show the precision of the '
        "values: in bfloat16 a weight can change by few sizes only.</p>",
        f"<h2>Singular values: {broken}</h2>",
        picture(
            pyplot, spectra_curves(pyplot, shape, changes), f"Singular values of each change of {called}, with LoRA's rank"
        ),
        '<p class="note">Dotted: the rank of a LoRA with as many parameters, beyond which its change has nothing.</p>',
        "<details><summary>Every tensor</summary>",
        _table(["tensor", "adapter", "entries", "‖ΔW‖", "effective rank", "LoRA's rank", "smallest AWOR"], _tensor_rows(found)),
        "</details>",
    ]
    title = _escaped(" and ".join(found.adapters))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title} compared</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>\n'
        + "\n".join(pieces)
        + "\n</body></html>\n"
    )


ADAPTER_HEAD = ["adapter", "mask", "entries", "density", "‖ΔW‖", "effective rank", "LoRA's rank", "LoRA holds"]
PAIR_HEAD = ["pair", "overlap", "Jaccard", "AWOR", "AWOM", "relative", "cosine", "distance", "conflicts", "their share"]

Table = tuple[str, list[str], list[list[str]]]


def tables(found: Comparison, adapters: Mapping[str, Adapter]) -> list[Table]:
    """Title, head and rows: of the adapters, and of each two, if there are two."""
    about = []
    for name, change in found.total.changes.items():
        mask = (adapters[name].metadata.get("mask") or {}).get("name", "–")
        density = f"{adapters[name].density:.2%}"
        ranks = [_number(change.effective_rank), _number(change.lora_rank), _share(change.lora_energy)]
        about.append([name, str(mask), f"{change.entries:,}", density, _number(change.l2), *ranks])
    pairs = []
    for pair in found.total.pairs:
        shares = [_share(pair.overlap), _share(pair.jaccard), _share(pair.awor)]
        norms = [_number(pair.awom), _number(pair.awom_relative), _number(pair.cosine), _number(pair.distance)]
        pairs.append([f"{pair.first}, {pair.second}", *shares, *norms, f"{pair.conflicts:,}", _share(pair.conflict_mass)])
    listed: list[Table] = [("What they change", ADAPTER_HEAD, about), ("Where they meet", PAIR_HEAD, pairs)]
    return [table for table in listed if table[2]]


def _tensor_rows(found: Comparison) -> Iterable[list[str]]:
    for name, part in found.tensors.items():
        for adapter, change in part.changes.items():
            met = [pair.awor for pair in part.pairs if adapter in (pair.first, pair.second)]
            ranks = [_number(change.effective_rank), _number(change.lora_rank)]
            yield [name, adapter, f"{change.entries:,}", _number(change.l2), *ranks, _share(min(met, default=None))]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _escaped(text: str) -> str:
    return html.escape(visible(text))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join(f"<td>{_escaped(cell)}</td>" for cell in row) for row in rows]
    titles = "".join(f"<th>{_escaped(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><tr>{titles}</tr>\n' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"
