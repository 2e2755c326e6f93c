"""Push an adapter to the Hugging Face Hub: what `shira train` wrote, as a repository that `shira.load` reads."""

import errno
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from ..adapter import Adapter, read
from ..errors import HubError
from ..files import hub
from ..files.paths import path_of
from ..files.suggestions import ADAPTER, adapter_in
from ..texts import shown
from .card import base_of, card, with_file

__all__ = ["CARD", "RECIPE", "parcel", "push"]

CARD, RECIPE = "README.md", "recipe.yaml"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


class Parcel(NamedTuple):
    """What is pushed. files: name in the repository -> a file here, or content. left_out: names of files that stay here."""

    files: dict[str, Path | bytes]
    left_out: list[str]


def push(
    source: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload a SHiRA adapter",
) -> str:
    """Push an adapter with its card and recipe, in one commit. Returns user/repo@commit, which `shira.load` takes.

    source: a folder or an adapter's file; see `parcel`. repository: "user/repo"; it is made if there is none.
    private: a new repository is private. revision: a branch; it is made if there is none.

    Raises what `parcel` raises; HubError without permission, if the hub cannot be reached, if the repository holds something
    else, or if it is public and private was asked for. Then no file has been sent.

        shira.integrations.hub.push("poet", "user/poet")
    """
    files = parcel(source, repository).files
    library: Any = hub.library()
    api = library.HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        now = api.repo_info(repository)
        there = {each.rfilename for each in now.siblings or ()} - {".gitattributes"}
        if private and not now.private:
            raise HubError(f"{repository!r} exists and is public, so nothing was sent; make it private first, or name another")
        if there and ADAPTER not in there:
            few = ", ".join(map(shown, sorted(there)[:4]))
            raise HubError(f"{repository!r} holds something else ({few}), so nothing was sent; name another repository")
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        operations = [library.CommitOperationAdd(name, content) for name, content in files.items()]
        done = api.create_commit(repository, operations, commit_message=message, revision=revision)
    except hub.failures(RuntimeError) as error:  # it wraps what went wrong in an upload in a RuntimeError
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, hub.failures()):
            raise HubError(f"{repository!r}: the upload failed ({cause or error})") from error
        raise hub.failure(cause, repository, local="") from error
    return f"{repository}@{done.oid}"


def parcel(source: str | os.PathLike[str], repository: str) -> Parcel:
    """What is pushed of a folder, or of an adapter's file and the recipe, card and picture of its name beside it.

    The adapter becomes adapter.safetensors, whole also if its file takes positions from another one. The card becomes
    README.md, and its code loads the adapter from the repository; if there is no card, one is made. Of a folder the recipe,
    pictures and a LICENSE go along, and nothing else.

    Raises FormatError if there is no adapter, or it is not clear which; OSError if there is no such file; HubError for a name
    that is no repository's, and for a card whose header the hub could not read.
    """
    named = hub.NAME.fullmatch(repository) if isinstance(repository, str) else None
    if named is None or named["revision"]:
        raise HubError(f"a repository of the hub is named user/repo; found {shown(repository)}")
    given = path_of(source, "push('poet', 'user/poet')", HubError)
    if not given.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(given))
    file = adapter_in(given)
    adapter, states = read(file)
    files: dict[str, Path | bytes] = {ADAPTER: file if len(states) == 1 else _whole(adapter)}
    beside = sorted(file.parent.iterdir()) if file.is_file() else []  # of a folder of PEFT, or of a patch, nothing goes along
    here = {path.name: path for path in beside if path.is_file() and path != file}
    if not given.is_dir():
        here = {name: path for name, path in here.items() if path.stem == file.stem}
    written = here.pop(CARD, None) or here.pop(f"{file.stem}.md", None)
    along = {name: path for name, path in here.items() if path.suffix.lower() in PICTURES or path.stem == "LICENSE"}
    along |= {name: here[name] for name in (RECIPE, f"{file.stem}.yaml") if name in here}
    if written is not None:
        try:
            text = written.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise HubError(f"{written} is not a text in UTF-8 ({error}); save it as UTF-8") from error
    else:
        base = adapter.metadata.get("base") or {}
        text = card(adapter, file.name, base_of(base.get("id", "unknown"), base.get("dtype"), None))
    files[CARD] = with_file(_checked(text, written), file.name, repository).encode()
    return Parcel({**files, **along}, [name for name in here if name not in along])


def _checked(text: str, path: Path | None) -> str:
    """A card, if the hub can read its header. Raises HubError if it cannot."""
    try:
        hub.library().ModelCard(text, ignore_metadata_errors=False)
    except Exception as error:  # whatever its parser of YAML raises
        raise HubError(f"the header of {path or 'the card'} is not YAML that the hub reads: {shown(str(error))}") from error
    return text


def _whole(adapter: Adapter) -> bytes:
    """The bytes of an adapter's file that takes no positions from another."""
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder) / ADAPTER)
        return (Path(folder) / ADAPTER).read_bytes()
