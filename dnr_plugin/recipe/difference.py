"""In which options two recipes differ."""

from __future__ import annotations

import json
from typing import Any

from dnr_plugin.recipe.schema import Recipe


def leaves(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted names and values in JSON, which tells 1 from true and from 1.0."""
    texts: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            texts |= leaves(item, f"{prefix}{key}.")
        else:
            texts[f"{prefix}{key}"] = json.dumps(item, ensure_ascii=False, default=repr)
    return texts


def differing_fields(a: Recipe, b: Recipe) -> list[str]:
    """Names the options in which two recipes differ.

    Args:
        a: one recipe.
        b: the other.

    Returns:
        ``dotted.name: value in a, value in b`` for each; empty for equal recipes.
    """
    of_a, of_b = leaves(a.model_dump()), leaves(b.model_dump())
    return [
        f"{name}: {of_a.get(name, 'nothing')}, {of_b.get(name, 'nothing')}"
        for name in of_a | of_b
        if of_a.get(name) != of_b.get(name)
    ]
