"""What the schema of recipes says in words: of a value that is wrong, and of every option."""

from __future__ import annotations

import json
import re
from typing import Any

from dnr_plugin.errors import did_you_mean
from dnr_plugin.recipe.schema import Recipe
from dnr_plugin.recipe.wording import Loc, as_found, dotted_name
from dnr_plugin.recipe.yaml_document import Document

_SCHEMA = Recipe.model_json_schema()
_KINDS = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "text"}
_FAR = 1000
_BOUNDS = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def _resolve(option: dict[str, Any]) -> dict[str, Any]:
    """An option's JSON schema without indirection and without the null of an optional one.

    ``words`` are the values that it may have beside those of its type.
    """
    words = [choice["const"] for choice in option.get("anyOf", []) if "const" in choice]
    for choice in option.get("anyOf", []):
        if choice.get("type") != "null" and "const" not in choice:
            option = {**option, **choice}
    if words:
        option = {**option, "words": words}
    if "$ref" in option:
        option = {**_SCHEMA["$defs"][option["$ref"].rpartition("/")[2]], **option}
    return option


def located_option(path: Loc) -> Loc:
    """Where pydantic found an error, without what it adds to an option that may be of one type or another."""
    option: dict[str, Any] = _SCHEMA
    for count, part in enumerate(path):
        if "words" in option:
            return path[:count]
        choices = option.get("items") if isinstance(part, int) else option.get("properties", {}).get(part)
        if choices is None:
            return path
        option = _resolve(choices)
    return path


def _option(path: Loc) -> dict[str, Any]:
    option: dict[str, Any] = _SCHEMA
    for part in path:
        option = _resolve(option["items"] if isinstance(part, int) else option["properties"][part])
    return option


def _choices(option: dict[str, Any]) -> list[str]:
    """The alternatives of an option in YAML's words."""
    return [choice if isinstance(choice, str) else json.dumps(choice) for choice in option["enum"]]


def _expected(option: dict[str, Any], given: Any = None) -> str:
    """An option's type, alternatives and range in words.

    Args:
        option: its schema.
        given: what was found; bounds that are far beyond what anyone wants are told to those who exceed them.
    """
    if "properties" in option:
        return f"a mapping of {', '.join(option['properties'])}"
    if "enum" in option:
        return f"one of {', '.join(_choices(option))}"
    if option["type"] == "object":
        return "a mapping"
    if option["type"] == "array":
        count = f" of {option['minItems']} or more" if "minItems" in option else ""
        return f"a list{count}, each item {_expected(_resolve(option['items']))}"
    if "maxLength" in option and isinstance(given, str) and len(given) > option["maxLength"]:
        return f"text of at most {option['maxLength']} characters"
    if "pattern" in option:
        return f"text matching {option['pattern']}"
    if option.get("maximum", 0) >= _FAR and not (isinstance(given, int | float) and given > option["maximum"]):
        option = {key: value for key, value in option.items() if key != "maximum"}
    bounds = [f"{words} {_number(option[key])}" for key, words in _BOUNDS.items() if key in option]
    return " or ".join([" ".join([_KINDS[option["type"]], " and ".join(bounds)]).strip(), *option.get("words", [])])


def _number(value: float) -> str:
    return f"{value:g}" if value != int(value) or abs(value) >= 1e15 else str(int(value))


def problem_line(error: Any, document: Document) -> str:
    """One of pydantic's errors as a line."""
    path = located_option(error["loc"])
    if error["type"] == "value_error":
        return _combination(path, str(error["ctx"]["error"]), document)
    if error["type"] == "extra_forbidden":
        known = _option(path[:-1])["properties"]
        hint = did_you_mean(str(path[-1]), known) or f"; known are {', '.join(known)}"
        section = dotted_name(path[:-1]) or "the recipe"
        message = f"expected an option of {section}, found unknown {as_found(path[-1])}{hint}"
    elif error["type"] == "missing":
        message = f"expected {_expected(_option(path))}, found nothing"
    else:
        option, given = _option(path), error["input"]
        hint = did_you_mean(given, _choices(option)) if "enum" in option and isinstance(given, str) else ""
        message = f"expected {_expected(option, given)}, found {as_found(given)}{hint}"
    return f"{document.location(path)}: {dotted_name(path)}: {message}"


def _combination(section: Loc, message: str, document: Document) -> str:
    """The line of a problem among several options of a section, which a validator of the schema found."""
    field, colon, rest = message.partition(": ")
    named = bool(colon) and field in _option(section)["properties"]
    path, shown = ((*section, field), rest) if named else (section, message)
    # Of the options that the message names, the overridden one is what the user has just changed.
    culprits = [
        label
        for known, label in document.overrides.items()
        if known[:-1] == section and re.search(rf"\b{re.escape(str(known[-1]))}\b", message)
    ]
    return f"{culprits[-1] if culprits else document.location(path)}: {dotted_name(path)}: {shown}"


def option_reference() -> str:
    """Every option of a recipe in Markdown: name, type and range, default, meaning; made from the schema."""
    lines = ["# Options of a recipe\n"]

    def describe(section: dict[str, Any], path: Loc) -> None:
        nested: list[tuple[str, dict[str, Any], Loc]] = []
        for name, raw in section["properties"].items():
            option, dotted = _resolve(raw), (*path, name)
            needed = name in section.get("required", [])
            if "properties" in option:
                remark = " (required)" if needed else " (or null, the default)" if "anyOf" in raw else ""
                title = f"\n## {dotted_name(dotted)}\n\n{option['description']}{remark}\n"
                nested.append((title, option, dotted))
                continue
            optional = " (or null)" if "anyOf" in raw else ""
            default = "required" if needed else f"default {json.dumps(option['default'])}"
            lines.append(
                f"- `{dotted_name(dotted)}` [{_expected(option)}{optional}; {default}]: {option['description']}"
            )
        for title, option, dotted in nested:
            lines.append(title)
            describe(option, dotted)

    describe(_SCHEMA, ())
    return "\n".join(lines) + "\n"
