"""Files of the Hugging Face Hub: names of repositories, and one file of one, from the cache or downloaded into it.

huggingface_hub does the work: its cache, its login, its offline mode. It is imported when a name of a repository is used.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import HubError, MissingExtra, did_you_mean

__all__ = ["MODEL", "NAME", "cached", "downloaded", "failure", "failures", "files_of", "library", "repository"]

NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w./-]+))?")
MODEL = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # old names have no owner: gpt2
FILES = (".safetensors", ".yaml", ".json", ".jsonl", ".parquet", ".csv", ".png", ".bin", ".pt")  # a name that ends so is a path
PATIENCE = 5  # seconds that the hub has for an answer
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def repository(name: str) -> tuple[str, str | None] | None:
    """(repository, revision) of a text of the form user/repo or user/repo@revision that is no path that exists; or None."""
    found = NAME.fullmatch(name)
    if found is None or name.endswith(FILES) or os.path.lexists(name):
        return None
    return found["repo"], found["revision"]


def library() -> Any:
    """huggingface_hub. Raises MissingExtra if it is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtra(f"names of the hub need huggingface_hub: pip install huggingface_hub ({error})") from error
    return huggingface_hub


def downloaded(
    repo: str, file: str, revision: str | None = None, *, local: str = "no file or folder, and ", known: Iterable[str] = ()
) -> Path | None:
    """A file of a repository, in the cache; None if the repository is there and has no such file.

    local, known: for errors, what else the name is not, and what else it could have been.

    Where the hub cannot be reached, or HF_HUB_OFFLINE is set, it is the file that the cache has of this revision.
    Raises HubError if there is none, if the repository or the revision does not exist, or without permission.
    """
    hub = library()
    from huggingface_hub import constants, errors

    folder = cached(repo, revision)
    is_here = folder is not None and (folder / file).exists()
    try:
        if not is_here and not constants.HF_HUB_OFFLINE:  # asked once: hf_hub_download would try for minutes
            hub.get_hf_file_metadata(hub.hf_hub_url(repo, file, revision=revision), timeout=PATIENCE)
        return Path(hub.hf_hub_download(repo, file, revision=revision, etag_timeout=PATIENCE))
    except errors.RemoteEntryNotFoundError:
        return None
    except failures() as error:
        if getattr(error, "response", None) is None and folder is not None:
            return None
        raise failure(error, repo, revision, local, known) from error


def files_of(repo: str, revision: str | None = None) -> list[str]:
    """The names of a repository's files; where the hub cannot be reached, of those in the cache. Raises HubError."""
    hub = library()
    try:
        info = hub.HfApi().repo_info(repo, revision=revision, timeout=PATIENCE)
        return sorted(each.rfilename for each in info.siblings or ())
    except failures() as error:
        if getattr(error, "response", None) is None and (folder := cached(repo, revision)) is not None:
            return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir())
        raise failure(error, repo, revision) from error


def cached(repo: str, revision: str | None = None) -> Path | None:
    """The folder of a repository's revision in the cache, without asking the hub; None if it is not there."""
    from huggingface_hub import constants

    kept = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    name = kept / "refs" / (revision or constants.DEFAULT_REVISION)
    folder = kept / "snapshots" / (name.read_text() if name.is_file() else revision or "")
    return folder if folder.is_dir() and folder.parent.name == "snapshots" else None


def failure(
    error: Exception,
    repo: str,
    revision: str | None = None,
    local: str = "no file or folder, and ",
    known: Iterable[str] = (),
) -> HubError:
    """What went wrong with a repository, in our words. local, known: as in `downloaded`."""
    from huggingface_hub import constants, errors

    cause = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, Exception) and hasattr(cause, "response"):
        error = cause  # the hub gave an answer, a bad one
    name = repo if revision is None else f"{repo}@{revision}"
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{repo!r} on the hub has no revision {revision!r}{_near(str(revision), _revisions(repo))}")
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo}"
        return HubError(f"{repo!r} on the hub is for those who accept its terms: do so at {page}, and {LOGIN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        near = _near(repo, [*known, *_repositories_of(repo)])
        return HubError(f"{name!r} is {local}no repository of the hub that you may read (if it is private, {LOGIN}){near}")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return HubError(f"{name!r}: the hub does not permit this to you ({_line(error)}); {LOGIN}")
    if status is not None:
        return HubError(f"{name!r}: the hub answers {status} ({_line(error)})")
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{name!r} is {local}no name of a repository ({_line(error)})")
    if isinstance(error, ValueError):
        return HubError(f"{name!r}: huggingface_hub cannot use what it was given ({_line(error)})")
    if not local:  # the cache does not matter
        if constants.HF_HUB_OFFLINE:
            return HubError(f"{name!r}: no file was pushed, because HF_HUB_OFFLINE is set; unset it, and try again")
        why = f"{constants.ENDPOINT} cannot be reached ({_line(error)})"
        return HubError(f"{name!r}: no file was pushed, because {why}; try again")
    near = _near(repo, [*known, *_in_cache()])
    if constants.HF_HUB_OFFLINE:
        return HubError(f"{name!r} is {local}not in the cache of the hub; offline, because HF_HUB_OFFLINE is set{near}")
    why = _line(cause if isinstance(cause, Exception) else error)
    return HubError(f"{name!r} is {local}not in the cache of the hub; {constants.ENDPOINT} cannot be reached ({why}){near}")


def _near(word: str, known: Iterable[str]) -> str:
    """The end of a message: what could have been meant."""
    return f"; {did_you_mean(word, choices)}" if (choices := list(known)) else ""


def failures(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where it gets no answer, or a bad one; and others."""
    from huggingface_hub import errors

    of_http = getattr(errors, "HTTPError", OSError)  # the root of what httpx raises
    ours = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.FileMetadataError)
    others = (ValueError, *others)  # for names, for cards, and for an answer that is not JSON
    return (of_http, errors.HfHubHTTPError, ConnectionError, TimeoutError, *ours, *others)


def _line(error: Exception) -> str:
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (said[-1] if said else type(error).__name__)[:300]


def _revisions(repo: str) -> Iterable[str]:
    try:
        refs = library().HfApi().list_repo_refs(repo)
    except failures():
        return []
    return [each.name for each in (*refs.branches, *refs.tags)]


def _repositories_of(repo: str) -> Iterable[str]:
    """Those of the same owner."""
    owner, slash, _ = repo.partition("/")
    try:
        return [each.id for each in library().HfApi().list_models(author=owner, limit=100)] if slash else []
    except failures():
        return []


def _in_cache() -> list[str]:
    from huggingface_hub import constants

    found = Path(constants.HF_HUB_CACHE).glob("models--*")
    return [folder.name.removeprefix("models--").replace("--", "/") for folder in found]
