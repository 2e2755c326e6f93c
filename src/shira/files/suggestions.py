"""A user passed a folder, or another kind of file, instead of an adapter's file: which file is meant, or what to pass."""

import contextlib
import re
import shlex
from collections.abc import Collection, Iterable
from pathlib import Path

from ..errors import CheckpointError, HubError
from ..texts import shown, strict_json
from .hub import downloaded, files_of, repository
from .paths import open_regular
from .tensorfiles import read_header

__all__ = ["ADAPTER", "PEFT_PREFIX", "adapter_in", "instead", "instead_of_a_model", "is_ours", "lora_file"]

ADAPTER = "adapter.safetensors"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
PEFT_PREFIX = "base_model.model."  # of tensor names in PEFT's files
OTHERS = re.compile(r"(model|adapter_model|pytorch_|diffusion_pytorch_|.*/)")  # names of other safetensors files on the hub
MANY = 32  # files of a folder that are opened
FEW = 8  # adapters in a message
SLIME = (
    "it is a delta of slime, bytes against the weights of the version before, compressed with zstd: let slime apply it to a "
    "checkpoint, and extract that: `shira extract BASE APPLIED -o adapter.safetensors`"
)
INDEX = "model.safetensors.index.json"
LORA = re.compile(r"[._]lora[._](A|B|up|down)[._]|[.]lora_linear_layer[.]|[.]hada_w1|^lora_(unet|te)")
PIPELINE_FILE = "pytorch_lora_weights.safetensors"
PIPELINE_LORA = (
    "it is a LoRA for a Diffusers pipeline, which has to be converted: `shira convert {} --base PIPELINE --keep 0.9 -o "
    "adapter.safetensors`"
)


def instead(path: Path, tensors: Collection[str] = ()) -> str:
    """What to pass instead of a folder, or of a safetensors file with these tensors that is not a shira adapter."""
    if _is_delta_of_bytes(path if path.is_dir() else path.parent):
        return SLIME
    if not path.is_dir():
        if path.name in PEFT_FILES or (path.parent / PEFT_FILES[0]).is_file():
            return _converting(str(path.parent))
        if any(name.startswith(PEFT_PREFIX) for name in tensors):
            return _converting("FOLDER")  # the one that it was taken from
        if of_a_pipeline(tensors):
            return PIPELINE_LORA.format(shlex.quote(str(path)))
        return "pass an adapter's .safetensors file"
    ours = _adapters_in(path)
    if not ours and lora_file(path):
        return PIPELINE_LORA.format(shlex.quote(str(path)))
    if ours:
        return f"pass {'the file' if len(ours) == 1 else 'one of the files'} in it, as {str(ours[0])!r}"
    if any((path / name).is_file() for name in PEFT_FILES):
        return _converting(str(path))
    with contextlib.suppress(OSError):
        folders = sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
        if found := [str(each) for each in folders[:MANY] if _adapters_in(each)]:
            return f"pass one of the adapters in it: {', '.join(map(repr, found[:FEW]))}{', …' * (len(found) > FEW)}"
    return "pass an adapter's .safetensors file; there is none in it"


def instead_of_a_model(path: Path, command: str) -> str | None:
    """What to pass where a model is wanted, if a path holds an adapter; None if it holds none. command: one that takes both."""
    ours = _adapters_in(path) if path.is_dir() else [path]
    if not (ours and is_ours(ours[0])):
        return None
    try:
        with open_regular(ours[0]) as content:
            base = f" of {shown(strict_json(read_header(content)[1]['metadata'])['base']['id'])}"
    except (CheckpointError, OSError, ValueError, TypeError, KeyError):
        base = ""
    given = shlex.quote(str(path))
    return f"it holds an adapter{base}, no model; give the model, and the adapter by -a: `{command} BASE -a {given}`"


def of_a_pipeline(tensors: Iterable[str]) -> bool:
    """Whether tensors with these names are a LoRA for a Diffusers pipeline: Diffusers' own names, or kohya's."""
    return any(LORA.search(name) for name in tensors) and not any(name.startswith(PEFT_PREFIX) for name in tensors)


def lora_file(path: Path) -> Path | None:
    """The file with a LoRA for a Diffusers pipeline that a path means, or None."""
    file = path / PIPELINE_FILE if path.is_dir() else path
    try:
        with open_regular(file) as content:
            return file if of_a_pipeline(read_header(content)[0]) else None
    except (CheckpointError, OSError):
        return None


def _converting(folder: str) -> str:
    """What to do with an adapter of PEFT."""
    return (
        f"it is an adapter of PEFT, which has to be converted: `shira convert {shlex.quote(folder)} --base MODEL -o "
        "adapter.safetensors`, with --density 0.01 or --keep 0.9 unless it is a SHiRA"
    )


def _is_delta_of_bytes(folder: Path) -> bool:
    """Whether a folder is one that slime's transport "disk" writes: the layout of a checkpoint, and compressed bytes in it."""
    try:
        with open_regular(folder / INDEX) as file:
            return "delta_encoding" in strict_json(file.read())["metadata"]
    except (CheckpointError, OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def adapter_in(path: Path, revision: str | None = None) -> Path:
    """The adapter's file in a folder or in a repository of the hub (user/repo, user/repo@revision); otherwise the path.

    It is the only one, or `adapter.safetensors`. A path that exists is no name of the hub. A file of the hub is downloaded into
    huggingface_hub's cache, unless it is there.
    Raises HubError if the hub does not have it, or cannot be reached; MissingExtra without huggingface_hub.
    """
    if named := repository(path.as_posix()):
        repo, in_name = named
        if None not in (revision, in_name) and revision != in_name:
            raise HubError(f"{str(path)!r} names the revision {in_name!r}, and revision= says {revision!r}; give one")
        return _adapter_on_the_hub(repo, revision or in_name)
    if revision is not None:
        raise HubError(f"revision={revision!r} is of a name of the hub, 'user/repo'; {str(path)!r} is a path")
    ours = _adapters_in(path) if path.is_dir() else []
    return ours[0] if len(ours) == 1 else path


def _adapter_on_the_hub(repo: str, revision: str | None) -> Path:
    found = downloaded(repo, ADAPTER, revision)
    if found is not None:
        return found
    names = files_of(repo, revision)
    candidates = [name for name in names if name.endswith(".safetensors") and not OTHERS.match(name)]
    if len(candidates) == 1 and (found := downloaded(repo, candidates[0], revision)) is not None:
        return found
    if any(name in PEFT_FILES for name in names):
        get = f"get it by `hf download {repo} --local-dir FOLDER`"
        raise HubError(f"{repo!r} on the hub is no adapter of shira; {_converting('FOLDER')}; {get}")
    few = ", ".join(names[:8]) + ", …" * (len(names) > 8)
    raise HubError(f"{repo!r} on the hub holds no {ADAPTER}; it holds {few or 'nothing'}")


def _adapters_in(folder: Path) -> list[Path]:
    """The adapters' files in a folder; `adapter.safetensors` alone, if it is one."""
    try:
        visible = (file for file in folder.iterdir() if not file.name.startswith("."))
        files = sorted(visible, key=lambda file: (file.name != ADAPTER, file.suffix != ".safetensors", file.name))
    except OSError:
        return []
    ours = [file for file in files[:MANY] if is_ours(file)]
    return ours[:1] if ours and ours[0].name == ADAPTER else ours


def is_ours(file: Path) -> bool:
    """Whether a file is an adapter's, by its header."""
    try:
        with open_regular(file) as content:
            return read_header(content)[1].get("format") == "shira"
    except (CheckpointError, OSError):
        return False
