"""Files that are there as a whole or not at all, and folders that can be written to."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dnr_plugin.errors import InputError


def existing_folder(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def check_writable(folder: Path) -> None:
    """Refuses a folder that is none, or could not be made."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output: expected a folder, found the file {folder}")
    parent = existing_folder(folder)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"--output: expected a folder that can be written to, found {folder}, where {parent} cannot")


def inside(folder: Path, name: object, file: Path) -> str:
    """A name of something in a folder, as a file there has it.

    Args:
        folder: that it may not lead out of.
        name: as read.
        file: that holds it.

    Raises:
        InputError: it is no relative path, or leads out of the folder, by dots or by a link.
    """
    if isinstance(name, str) and name and not Path(name).is_absolute():
        at, root = (folder / name).resolve(), folder.resolve()
        if at != root and root in at.parents:
            return name
    raise InputError(f"{file}: expected names of folders in {folder}, found {name!r}")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a file that replaces ``path`` only when it was written to the end and lies on the disk.

    A kill or a full disk in between leaves the old file as it was, and no rubbish after an exception.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
