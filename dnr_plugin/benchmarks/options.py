"""What several benchmarks ask of their options."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from dnr_plugin.errors import InputError
from dnr_plugin.files import check_writable


def share(text: str, whole: str) -> float:
    """Reads a share.

    Args:
        text: of it.
        whole: what it is of, for the error.

    Raises:
        ValueError: it is not above 0 and below 1; what was expected.
    """
    with contextlib.suppress(ValueError):
        if 0.0 < float(text) < 1.0:
            return float(text)
    raise ValueError(f"shares of {whole} above 0 and below 1")


def shares(option: str, text: str, whole: str) -> list[float]:
    """Reads shares with commas between them.

    Args:
        option: that they were given by, for the error.
        text: of all.
        whole: see `share`.

    Raises:
        InputError: one that is none.
    """
    values = []
    for item in text.split(","):
        try:
            values.append(share(item, whole))
        except ValueError as error:
            raise InputError(f"{option}: expected {error}, found {item.strip()!r}") from None
    return values


def check_output(output: str | os.PathLike[str], file: str) -> Path:
    """The folder, if nothing that was measured before would be lost.

    Args:
        output: the folder.
        file: that would be overwritten.

    Raises:
        InputError: it cannot be written to, or has such a file.
    """
    folder = Path(output)
    check_writable(folder)
    if (folder / file).exists():
        raise InputError(f"--output: expected a folder without {file}, found {folder / file}")
    return folder
