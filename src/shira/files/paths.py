"""Files of the operating system: which may be read, which may be replaced, and temporary files that are always removed.

A temporary file or folder is in the folder of the file that it becomes, so that it can be renamed. Its process holds a lock on
it. The system drops the lock when the process ends, in whatever way. The next process that makes a temporary file in the folder
removes those that no process holds.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..errors import CheckpointError, ShiraError
from ..texts import described

__all__ = [
    "CHECKPOINT",
    "OURS",
    "AnyPath",
    "State",
    "claimed",
    "destination",
    "flush_folder",
    "nearby",
    "new_folder",
    "open_regular",
    "path_of",
    "state_of",
    "sweep",
    "temporary_file",
    "temporary_folder",
]

try:
    import fcntl
except ImportError:  # a system without these locks; temporary files of a killed process stay there
    fcntl = None  # type: ignore[assignment]

AnyPath = str | os.PathLike[str]  # a path as users pass it
KINDS = {stat.S_IFIFO: "FIFO", stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFSOCK: "socket", stat.S_IFDIR: "folder"}
OURS = re.compile(r"\.shira-[0-9a-f]{16}\.tmp")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")  # the folder that a training run makes after so many steps


class State(NamedTuple):
    """The state of a file. It changes with every write and replacement, also if the size and a time stay the same."""

    device: int
    inode: int
    size: int  # in bytes
    modified: int  # when the content changed last, in ns
    changed: int  # when the content, the name or the permissions changed last, in ns

    @classmethod
    def of(cls, status: os.stat_result) -> "State":
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def nearby(path: str, endings: tuple[str, ...] = ("",)) -> list[str]:
    """The names beside a path that may not exist, written as that path is. endings: of the names that count."""
    folder = os.path.dirname(path)
    try:
        names = sorted(os.listdir(folder or "."))
    except (OSError, ValueError):
        return []
    return [os.path.join(folder, name) for name in names if name.endswith(endings) and not name.startswith(".")]


def path_of(path: object, call: str, error: type[ShiraError]) -> Path:
    """The path that a user passed. Raises `error` for anything else. call: the call that the message recommends."""
    try:
        found = Path(path)  # type: ignore[arg-type]  # whether it is a path is what this tests
        os.fsencode(found)
    except (TypeError, ValueError):
        raise error(f"expected the path of a file, as in {call}; found {described(path)}") from None
    if path == "":  # which would be the working folder
        raise error(f"expected the path of a file, as in {call}; found '', an empty text")
    if "\0" in str(found):
        raise error(f"expected the path of a file, as in {call}; found {described(path)}, and no path has a NUL in it")
    return found


def open_regular(path: Path, error: type[ShiraError] = CheckpointError) -> BinaryIO:
    """Open a regular file for reading, unbuffered.

    Raises `error` for another kind of file, without waiting for a writer of a FIFO; OSError if it cannot be opened, or is a
    folder.
    """
    file = open(path, "rb", buffering=0, opener=_without_waiting)  # noqa: SIM115  # the caller closes it
    kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
    if kind != stat.S_IFREG:
        file.close()
        raise error(f"{path} is a {KINDS.get(kind, 'special file')}; expected a regular file")
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def state_of(file: BinaryIO) -> State:
    """The state of an opened file."""
    return State.of(os.fstat(file.fileno()))


def destination(path: Path) -> Path:
    """The path to write for a file of this name. A symbolic link is followed, and stays.

    Raises OSError if something is there that is not a regular file: a folder; a FIFO or a device, which a rename would replace.
    """
    target = Path(os.path.realpath(path))
    try:
        kind = stat.S_IFMT(os.lstat(target).st_mode)
    except FileNotFoundError:
        return target
    if kind == stat.S_IFREG:
        return target
    if kind == stat.S_IFLNK:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    raise FileExistsError(errno.EEXIST, f"it is a {KINDS.get(kind, 'special file')}, only a regular file is replaced")


def new_folder(path: Path) -> Path:
    """The folder itself, through links, that an output fills. Raises CheckpointError unless it is new or empty."""
    folder = Path(os.path.realpath(path))  # so that a link to a folder stays a link
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists; name a folder that does not exist, or is empty")
    return folder


def flush_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, as far as its file system can."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextlib.contextmanager
def temporary_file(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file in a folder, open for writing. It is removed at the end unless it was renamed."""
    sweep(folder)
    path, descriptor = _made(folder, is_folder=False)
    try:
        with open(descriptor, "wb") as file:
            yield path, file
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """A new folder in a folder. It is removed at the end with its content unless it was renamed."""
    sweep(folder)
    path, descriptor = _made(folder, is_folder=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether nobody else has claimed this path. Then it is claimed until the end, or until this process is killed.

    The claim is a temporary file beside the path, whose name follows from the path's. Nothing is made at the path itself.
    """
    sweep(path.parent)
    try:
        claim, descriptor = _made(path.parent, is_folder=False, digits=hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16])
    except FileExistsError:
        yield False
        return
    with open(descriptor, "wb") as file:
        try:
            yield True
        finally:
            if os.name == "nt":  # Windows cannot remove an open file
                file.close()
            claim.unlink(missing_ok=True)


def _made(folder: Path, is_folder: bool, digits: str | None = None) -> tuple[Path, int]:
    """A new file or folder, and the descriptor that holds its lock. Without locks, the descriptor of a folder is -1.

    digits: those of its name. Without them the name is random. Raises FileExistsError if the name is taken.
    """
    while True:
        path = folder / f".shira-{digits or secrets.token_hex(8)}.tmp"
        if is_folder:
            path.mkdir()
            if fcntl is None:
                return path, -1
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # another process removed it before it was locked
                continue
        else:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks, where `sweep` removes nothing
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(descriptor, path):
            return path, descriptor
        os.close(descriptor)  # another process removed it before it was locked


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders that ended processes have left in a folder."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if OURS.fullmatch(entry.name) and not entry.is_symlink():
                with contextlib.suppress(OSError):  # in use, of another user, or already removed
                    _remove_abandoned(Path(entry.path), entry.is_dir(follow_symlinks=False))


def _remove_abandoned(path: Path, is_folder: bool) -> None:
    """Remove a temporary file or folder. Raises OSError if a process holds its lock."""
    access = os.O_RDONLY | os.O_DIRECTORY if is_folder else os.O_RDWR
    descriptor = os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(descriptor, path):
            return
        if is_folder:
            shutil.rmtree(path)
        elif stat.S_ISREG(os.fstat(descriptor).st_mode):
            path.unlink()
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a path still leads to the opened file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
