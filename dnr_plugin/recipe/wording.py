"""How what was found in a recipe is named in messages."""

from __future__ import annotations

import json
import math
from typing import Any

# The location of an option, as pydantic names it: keys, and indices into lists.
Loc = tuple[str | int, ...]


def as_found(value: Any) -> str:
    """What was found, in one short line and in YAML's words."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def labelled(flag: str, text: str) -> str:
    return f"{flag} {text if text.isprintable() and len(text) <= 200 else as_found(text)}"


def dotted_name(path: Loc) -> str:
    return ".".join(str(part) if str(part).isprintable() and len(str(part)) <= 80 else as_found(part) for part in path)
