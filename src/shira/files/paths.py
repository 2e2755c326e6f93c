"""Files as the system has them: what may be read, what may be replaced, and temporary files that their process cleans up.

A temporary file or folder lies beside what it becomes, so that it can be renamed, and its process holds a lock on it. The
system drops the lock when the process ends, in whatever way: who makes the next one there removes those that nobody holds.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError, ShiraError
from ..texts import described

__all__ = ["State", "destination", "open_regular", "path_of", "state_of", "sweep", "temporary_file", "temporary_folder"]

try:
    import fcntl
except ImportError:  # no such locks on this system, where what a killed process leaves therefore stays
    fcntl = None  # type: ignore[assignment]

State = tuple[int, ...]  # device, inode, size, and when content and inode were last changed
KINDS = {stat.S_IFIFO: "FIFO", stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFSOCK: "socket", stat.S_IFDIR: "folder"}
OURS = re.compile(r"\.shira-[0-9a-f]{16}\.tmp")


def path_of(path: object, call: str, error: type[ShiraError]) -> Path:
    """A path out of what a user passed. call: what was meant, for the message of the error that is raised for anything else."""
    try:
        found = Path(path)  # type: ignore[arg-type]  # which is what is asked here
        os.fsencode(found)
    except (TypeError, ValueError):
        raise error(f"expected the path of a file, as in {call}; found {described(path)}") from None
    if "\0" in str(found):
        raise error(f"expected the path of a file, as in {call}; found {described(path)}, and no path has a NUL in it")
    return found


def open_regular(path: Path, error: type[ShiraError] = CheckpointError) -> BinaryIO:
    """Open a file to be read, unbuffered. What is no regular file is refused with `error`, without waiting for who would write
    into a FIFO. Raises OSError if it cannot be opened, or is a folder."""
    file = open(path, "rb", buffering=0, opener=_without_waiting)  # noqa: SIM115  # it is given back open
    kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
    if kind != stat.S_IFREG:
        file.close()
        raise error(f"{path} is a {KINDS.get(kind, 'special file')}; expected a regular file")
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def state_of(file: BinaryIO) -> State:
    """What changes when an opened file is changed or replaced, also by one that keeps its size and time."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def destination(path: Path) -> Path:
    """Where a file of this name is to be written: a symbolic link is followed, and stays.

    Raises OSError for what is there and is no regular file: a folder; and a FIFO or a device, which a rename would replace.
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
    raise FileExistsError(errno.EEXIST, f"it is a {KINDS.get(kind, 'special file')}, which no file may take the place of")


@contextlib.contextmanager
def temporary_file(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file in a folder, open for writing, which goes away at the end unless it was renamed."""
    sweep(folder)
    path, descriptor = _made(folder, is_folder=False)
    try:
        with open(descriptor, "wb") as file:
            yield path, file
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """A new folder in a folder, which goes away at the end with all that is in it, unless it was renamed."""
    sweep(folder)
    path, descriptor = _made(folder, is_folder=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)


def _made(folder: Path, is_folder: bool) -> tuple[Path, int]:
    """A new file, or folder, and a descriptor of it that holds its lock; -1 for a folder where there are no locks."""
    while True:
        path = folder / f".shira-{secrets.token_hex(8)}.tmp"
        if is_folder:
            path.mkdir()
            if fcntl is None:
                return path, -1
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # swept away, see below
                continue
        else:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks: nobody can take it for abandoned there
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(descriptor, path):
            return path, descriptor
        os.close(descriptor)  # it was swept away before it was locked


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders that were left here by processes that are gone."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if OURS.fullmatch(entry.name) and not entry.is_symlink():
                with contextlib.suppress(OSError):  # somebody else's, or gone meanwhile
                    _remove_abandoned(Path(entry.path), entry.is_dir(follow_symlinks=False))


def _remove_abandoned(path: Path, is_folder: bool) -> None:
    """Raises OSError if it is held."""
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
    """Whether a path still leads to what was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
