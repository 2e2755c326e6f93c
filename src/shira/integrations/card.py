"""A model card: the README.md of a folder with an adapter, in the Hub's form, from the adapter's own metadata."""

import json
from collections.abc import Mapping
from typing import Any

from ..adapter import Adapter
from ..files.metadata import check_metadata
from ..texts import markdown, visible

__all__ = ["card"]


def card(adapter: Adapter, file: str, loader: str | None) -> str:
    """Markdown with the Hub's header: base model, mask, density, licence, training, and how to load the adapter.

    file: the name of the adapter's file, in the card's folder. loader: the Transformers class that loads the base; None if
    unknown.
    Raises AdapterError for metadata with other types than in docs/format.md.
    """
    check_metadata(adapter.metadata)
    known = adapter.metadata
    base, licence = known.get("base") or {}, known.get("license")
    identity, name = base.get("id", "unknown"), adapter.name or "adapter"
    header: dict[str, Any] = {"library_name": "shira-adapters", "tags": ["shira", "sparse-high-rank-adapter"]}
    if "/" in identity:  # an id on the Hub, not a folder's name
        header["base_model"] = identity
    if licence:
        header["license"] = licence
    mask = known.get("mask") or {}
    facts = {
        "base model": f"{identity}, {_text(base.get('dtype', 'dtype not recorded'))}",
        "mask": _settings({key: value for key, value in mask.items() if key != "calibration"}),
        "density": f"{adapter.density:.3%}, {adapter.nnz:,} entries of {len(adapter.tensors)} tensors",
        "licence": licence or "not stated",
        "training": _settings(known.get("training") or {}) or "not recorded",
    }
    lines = ["---", *(f"{key}: {_quoted(value)}" for key, value in header.items()), "---", "", f"# {markdown(name)}", ""]
    lines += [
        "A Sparse High Rank Adapter (SHiRA, [arXiv 2406.13175](https://arxiv.org/abs/2406.13175)): values for a few of the"
    ]
    lines += ["base model's own weights. The weights of the base are not in this folder.", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {markdown(value)} |" for key, value in facts.items()]
    return "\n".join([*lines, "", "```python", _snippet(identity, base.get("dtype"), name, file, loader), "```", ""])


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in values.items())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _quoted(value: Any) -> str:
    """A value in a form that is valid in JSON, YAML and Python."""
    return json.dumps(value)


def _snippet(identity: str, dtype: Any, name: str, file: str, loader: str | None) -> str:
    if loader is not None:
        asked = f", dtype={_quoted(dtype)}" if isinstance(dtype, str) else ""
        lines = ["import shira", f"from transformers import {loader}", ""]
        lines += [f"model = {loader}.from_pretrained({json.dumps(identity)}{asked})"]
    else:
        lines = ["import shira", "", f"model = ...  # the base model: {visible(identity)}"]
    quoted = json.dumps(name)
    lines += ["switcher = shira.Switcher(model)", f"switcher.add({quoted}, {json.dumps(file)})", f"switcher.use({quoted})"]
    return "\n".join([*lines, "switcher.use(None)  # the base again, bit for bit"])
