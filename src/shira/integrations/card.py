"""A model card: the README.md of a folder with an adapter, in the Hub's form, from the adapter's own metadata."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..adapter import Adapter
from ..data.models import ALIASES, BUILT_IN, built_in
from ..data.tasks import TASKS
from ..files.metadata import check_metadata
from ..texts import markdown, visible

__all__ = ["Base", "base_of", "card", "with_file"]

ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LICENCES = {  # identifiers that the hub knows; any other licence is "other" with a name
    *("apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m", "bigcode-openrail-m"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "cc-by-3.0"),
    *("gpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "wtfpl"),
    *("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "gemma"),
}
REPEATS = "repeats the run. Relative paths in the recipe start from the folder where the run was started"


class Base(NamedTuple):
    """The base of an adapter, for its card. hub_id: of the model on the hub; None if it is not known to be there."""

    words: str  # a sentence or two
    load: tuple[str, ...]  # lines of code that make `model`, or `pipe`
    hub_id: str | None = None


def base_of(identity: str, dtype: Any, loader: str | None, library: str = "transformers") -> Base:
    """The base that an id, a built-in name or a folder means.

    loader: the class of the library that loads it, or None if only what an adapter's file has recorded is known. Then an
        earlier name of a built-in model may also be that of another folder.
    """
    name, shown = ("pipe" if library == "diffusers" else "model"), markdown(identity)
    asked = f", dtype={json.dumps(dtype)}" if isinstance(dtype, str) and library == "transformers" else ""
    half = library == "diffusers" and dtype in ("bfloat16", "float16")  # in which Diffusers loads no pipeline by itself
    asked = f", dtype=torch.{dtype}" if half else asked
    recorded_earlier = ALIASES.get(identity) if loader is None else None
    own = None if recorded_earlier else built_in(identity)
    if own is not None:
        package, (source,) = BUILT_IN[own], BUILT_IN[own].members
        words = (
            f"There is no hub id of the base. It is shira's built-in {markdown(own)}, made of {markdown(Path(source).name)} in "
            f"the package {package.name} {package.version} ({package.license}). Its weights were quantized to 4 bits (those of "
            "the embedding to 8) and turned back, so they are not those of the hub's model of a similar name, and the adapter "
            "does not fit that one."
        )
        code = f"{name} = load_model({json.dumps(own)}{asked.replace('dtype=', '')})"
        return Base(words, ("from shira.integrations.transformers import load_model", "", code))
    on_hub = ON_HUB.fullmatch(identity) is not None and not os.path.exists(identity)
    if on_hub:
        words = f"The base is {shown} on the hub."
    elif identity == "unknown":
        words = "The base was not recorded, and no hub id of it is known."
    else:
        words = (
            f"There is no hub id of the base, which was {'a folder called ' if loader else ''}{markdown(Path(identity).name)}."
        )
    if recorded_earlier:
        words += (
            f" Earlier versions of shira gave this name to their built-in {markdown(recorded_earlier)}, whose weights are not "
            "those of the hub's model of a similar name."
        )
    if loader is None:
        return Base(words, (f"{name} = ...  # the base: {visible(identity)}",), identity if on_hub else None)
    code = f"{name} = {loader}.from_pretrained({json.dumps(identity if on_hub else Path(identity).name)}{asked})"
    imports = ["import torch"] * half + [f"from {library} import {loader}"]
    return Base(words, (*imports, "", code), identity if on_hub else None)


def card(
    adapter: Adapter,
    file: str,
    base: Base,
    *,
    recipe: str | None = None,
    picture: str | None = None,
    data: str | None = None,
) -> str:
    """Markdown with the Hub's header: base model, results, how to use it, mask, density, training, and licence.

    file: the name of the adapter's file, in the card's folder. recipe: of the recipe that repeats the run, there. picture: of a
    picture of samples, there. data: as a recipe names the training data.
    Raises AdapterError for metadata with other types than in docs/format.md.
    """
    check_metadata(adapter.metadata)
    known, name = adapter.metadata, adapter.name or "adapter"
    for_images = base.load[-1].startswith("pipe ")
    task = TASKS.get(data or "")
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in _header(known, base, for_images, data).items()), "---"]
    lines += ["", f"# {markdown(name)}", ""]
    lines += [
        "A Sparse High Rank Adapter (SHiRA, [arXiv 2406.13175](https://arxiv.org/abs/2406.13175)): new values for "
        f"{adapter.nnz:,} of the base model's own weights. The other weights of the base are not in this folder.",
        "",
        base.words,
    ]
    if picture is not None:
        lines += ["", f"![samples](<{visible(picture)}>)"]
    lines += ["", "## Results", "", *_results(known.get("training") or {})]
    extra = "image" if for_images else "demo" if "load_model" in base.load[0] else "train"
    lines += ["", "## How to use it", "", f"It needs the Python package `shira-adapters[{extra}]`.", ""]
    lines += ["```python", *_snippet(base, name, file, for_images), "```"]
    mask = {key: value for key, value in (known.get("mask") or {}).items() if key != "calibration"}
    dtype = (known.get("base") or {}).get("dtype", "not recorded")
    training = {key: value for key, value in (known.get("training") or {}).items() if key not in ("loss", "held_out")}
    facts = {
        "dtype": _text(dtype),
        "mask": _settings(mask) or "not recorded",
        "density": f"{adapter.density:.3%}, {adapter.nnz:,} entries of {len(adapter.tensors)} tensors",
        "data": task.source if task else data,
        "training": _settings(training) or "not recorded",
        "recipe": recipe and f"`shira {'train-image' if for_images else 'train'} --config {recipe}` {REPEATS}",
    }
    lines += ["", "## How it was made", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value if key == 'recipe' else markdown(value)} |" for key, value in facts.items() if value]
    licence = f"{markdown(known['license'])}." if known.get("license") else "Not stated: ask before you use it."
    return "\n".join([*lines, "", "## Licence", "", f"{licence} The base and the data have licences of their own.", ""])


def with_file(text: str, old: str, new: str) -> str:
    """A card whose snippets name another file of the adapter, or a repository of the hub."""
    quoted = f"({re.escape(json.dumps(old))}|{re.escape(json.dumps(visible(old)))})"

    def renamed(block: re.Match[str]) -> str:
        return re.sub(rf"(?<=[ (]){quoted}(?=[,)])", lambda _: json.dumps(new), block[0])

    return re.sub(r"^```python\n.*?^```$", renamed, text, flags=re.DOTALL | re.MULTILINE)


def _header(known: Mapping[str, Any], base: Base, for_images: bool, data: str | None) -> dict[str, Any]:
    header: dict[str, Any] = {"library_name": "shira-adapters", "tags": ["shira", "sparse-high-rank-adapter"]}
    if for_images or any("CausalLM" in line or "load_model" in line for line in base.load):
        header["pipeline_tag"] = "text-to-image" if for_images else "text-generation"
    if base.hub_id:
        header |= {"base_model": base.hub_id, "base_model_relation": "adapter"}
    name = (data or "").partition(":")[0].partition("@")[0]
    if ON_HUB.fullmatch(name) and not os.path.exists(name) and Path(name).suffix not in (".csv", ".json", ".jsonl", ".parquet"):
        header["datasets"] = [name]
    if licence := known.get("license"):
        plain = re.sub(r"[^a-z0-9.+]+", "-", licence.lower()).strip("-")
        header |= {"license": plain} if plain in LICENCES else {"license": "other", "license_name": plain or "other"}
    return header


def _results(training: Mapping[str, Any]) -> list[str]:
    """What was measured, as lines of Markdown."""
    held_out, loss = training.get("held_out"), training.get("loss")
    rows = []
    if isinstance(held_out, Mapping):
        before, after = (_text(held_out.get(key)) for key in ("loss_before", "loss"))
        rows.append(f"| {markdown(_text(held_out.get('rows')))} held-out rows | {markdown(before)} | {markdown(after)} |")
        rows = ["| mean loss | base | with the adapter |", "|---|---|---|", *rows]
    else:
        rows.append("Nothing was measured on held-out data.")
    if loss is not None:
        rows += ["", f"The loss in training was {markdown(_text(loss))}."]
    return rows


def _settings(values: Mapping[str, Any]) -> str:
    given = {key: _text(value) for key, value in values.items() if value is not None}
    return ", ".join(text if key == "name" else f"{key} {text}" for key, text in given.items())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _snippet(base: Base, name: str, file: str, for_images: bool) -> list[str]:
    """Code that loads the adapter by its name, switches it on, and off again."""
    quoted, where = json.dumps(name), json.dumps(file)
    if for_images:
        return [
            base.load[0],
            "from shira.integrations.diffusers import PipelineAdapters",
            *base.load[1:],
            "adapters = PipelineAdapters(pipe)",
            f"adapters.load({where}, {quoted})",
            f"adapters.set({{{quoted}: 1.0}})",
            "adapters.disable()  # the base again, bit for bit",
        ]
    return [
        "import shira",
        *([""] if len(base.load) == 1 else []),
        *base.load,
        "switcher = shira.Switcher(model)",
        f"switcher.add({quoted}, {where})",
        f"switcher.use({quoted})  # or at half its strength: switcher.use({{{quoted}: 0.5}})",
        "switcher.use(None)  # the base again, bit for bit",
    ]
