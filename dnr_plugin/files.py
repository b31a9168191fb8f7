"""Files that are there as a whole or not at all, and folders that can be written to."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dnr_plugin.errors import InputError, first_line

_held: set[Path] = set()  # folders that this process has locked
_TEMPORARY = ".dnr-tmp"  # ends the names of files half written, which begin with a dot


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
    long = isinstance(name, str) and any(len(part.encode(errors="surrogatepass")) > 255 for part in Path(name).parts)
    if isinstance(name, str) and name and "\0" not in name and not long and not Path(name).is_absolute():
        at, root = (folder / name).resolve(), folder.resolve()
        if at != root and root in at.parents:
            return name
    raise InputError(f"{file}: expected names of folders in {folder}, found {name!r}"[:300])


def read_json(file: Path) -> Any:
    """What a file holds.

    Raises:
        InputError: it cannot be read, or holds no JSON that can be.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # JSON, UTF-8 and numbers of thousands of digits alike
        raise InputError(f"{file}: expected JSON, found damage: {first_line(error)}"[:300]) from error


def read_json_lines(file: Path) -> list[Any]:
    """What the lines of a file hold; what follows the last end of line was cut off by a kill.

    Raises:
        InputError: see `read_json`, with the line.
    """
    try:
        *lines, _ = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: expected lines of JSON, found damage: {first_line(error)}"[:300]) from error
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}:{number}: expected JSON, found damage: {first_line(error)}"[:300]) from error
    return values


def contents(folder: Path) -> list[Path]:
    """What is in a folder, none where there is no such folder; without what a kill has left of files half written."""
    return [path for path in folder.iterdir() if not _half_written(path)] if folder.is_dir() else []


def _half_written(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(_TEMPORARY)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a folder, which is made, to this process; the system lets go of it when the process ends, however it does.

    Raises:
        InputError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = folder.resolve()
    try:
        import fcntl
    except ImportError:  # Windows, which locks no folders
        fcntl = None  # type: ignore[assignment]
    if fcntl is None or own in _held:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"--output: {folder} is in use: another process is writing to it") from error
        except OSError:  # a file system without locks
            pass
        for left in [path for path in folder.iterdir() if _half_written(path)]:
            left.unlink(missing_ok=True)
        _held.add(own)
        yield
    finally:
        _held.discard(own)
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(
    path: str | os.PathLike[str], mode: str = "w", *, before: str | os.PathLike[str] | None = None
) -> Iterator[IO[Any]]:
    """Opens a file that replaces ``path`` only when it was written to the end and lies on the disk.

    A kill or a full disk in between leaves the old file as it was, and no rubbish after an exception.

    Args:
        path: the file.
        mode: "w" or "wb".
        before: where the file that it replaces is kept, if there is one; between the two this is the only one.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY)
    try:
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        if before is not None and path.exists():
            os.replace(path, before)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
