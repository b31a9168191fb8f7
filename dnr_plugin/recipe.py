"""Reads, checks and writes recipes: the YAML files that say what ``dnr run`` does."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dnr_plugin.errors import InputError, did_you_mean
from dnr_plugin.files import atomic_write
from dnr_plugin.schema import Recipe

MAX_BYTES = 2**20
MAX_DEPTH = 20
MAX_INT_DIGITS = 40

# The location of an option, as pydantic names it: keys, and indices into lists.
Loc = tuple[str | int, ...]

# YAML 1.2 core. PyYAML follows 1.1, which reads 5e-4 as text, yes and off as booleans, 010 as 8 and 12:30:45 as 45045.
_PLAIN_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
_TAG = "tag:yaml.org,2002:"


class _NotAccepted(Exception):
    """Text that is not YAML, or uses more of YAML than a recipe may."""

    def __init__(self, line: int, message: str) -> None:
        self.line = line
        super().__init__(message)


class _Loader(yaml.SafeLoader):
    """Composes nodes by YAML 1.2's rules for plain scalars, with neither anchors nor tags; constructs nothing."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if event.anchor is not None:
            raise _NotAccepted(line, f"expected no YAML anchors or aliases, found {_show(event.anchor)}")
        if getattr(event, "tag", None) is not None:
            raise _NotAccepted(line, f"expected no YAML tags, found {_show(event.tag)}")
        if self.depth >= MAX_DEPTH:
            raise _NotAccepted(line, f"expected at most {MAX_DEPTH} levels of nesting, found more")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or 1.2 would misread as something other than text; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {}
for _name, _pattern, _first in _PLAIN_SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})\Z"), _first)


def _show(value: Any) -> str:
    """What was found, in one short line and in YAML's words."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _label(flag: str, text: str) -> str:
    return f"{flag} {text if text.isprintable() and len(text) <= 200 else _show(text)}"


def _dotted(path: Loc) -> str:
    return ".".join(str(part) if str(part).isprintable() and len(str(part)) <= 80 else _show(part) for part in path)


def _compose(text: str) -> yaml.Node | None:
    """The one YAML document in ``text``; None where there is none.

    Raises:
        _NotAccepted: not YAML, several documents, or parts of YAML that recipes do not use.
    """
    try:
        loader: Any = _Loader(text)
    except yaml.reader.ReaderError as exc:
        line = text.count("\n", 0, exc.position) + 1
        raise _NotAccepted(line, f"not YAML: unprintable character U+{ord(text[exc.position]):04X}") from exc
    try:
        node: yaml.Node | None = loader.get_node() if loader.check_node() else None
        if loader.check_node():
            line = loader.peek_event().start_mark.line + 1
            raise _NotAccepted(line, "expected one YAML document, found another")
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        context = f" ({exc.context})" if exc.context else ""
        raise _NotAccepted(mark.line + 1 if mark else 1, f"not YAML: {exc.problem}{context}") from exc
    except (ValueError, OverflowError) as exc:  # PyYAML lets chr() fail on an escape such as "\UFFFFFFFF"
        raise _NotAccepted(loader.line + 1, f"not YAML: {exc}") from exc
    return node


class _Document:
    """Plain data, where each part of it was written, and what is already known to be wrong with it."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.where: dict[Loc, str] = {}
        self.overrides: dict[Loc, str] = {}
        self.problems: list[str] = []
        self.reported: set[Loc] = set()

    def report(self, path: Loc, where: str, message: str) -> None:
        self.problems.append(f"{where}: {_dotted(path)}: {message}")
        self.reported.add(path)

    def plain(self, node: yaml.Node, path: Loc, at: Callable[[yaml.Node], str]) -> Any:
        """Turns a node into plain data and notes where its parts stand (``at``)."""
        self.where.setdefault(path, at(node))  # a value of a mapping already has its key's place
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = key_node.value
                if key_node.tag != _TAG + "str":
                    found = (key or "null")[:80] if isinstance(key, str) else f"a {key_node.id}"
                    problem = f"expected text as a key, found {found}"
                    self.problems.append(f"{at(key_node)}: {_dotted(path) or 'the recipe'}: {problem}")
                elif key in mapping:
                    problem = f"expected each key once, found it again (first at {self.where[(*path, key)]})"
                    self.problems.append(f"{at(key_node)}: {_dotted((*path, key))}: {problem}")
                else:
                    self.where[(*path, key)] = at(key_node)
                    mapping[key] = self.plain(value_node, (*path, key), at)
            return mapping
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, (*path, index), at) for index, item in enumerate(node.value)]
        return self._scalar(node.tag.removeprefix(_TAG), node.value, path)

    def _scalar(self, kind: str, text: str, path: Loc) -> Any:
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            if len(text) > MAX_INT_DIGITS:
                self.report(path, self.where[path], f"expected at most {MAX_INT_DIGITS} digits, found {len(text)}")
                return 0
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if kind == "float":
            number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            if not math.isfinite(number):
                self.report(path, self.where[path], f"expected a finite number, found {text[:80]}")
            return number
        return text

    def override(self, text: str, flag: str) -> None:
        """Applies one ``a.b=value`` that came with ``flag``."""
        label = _label(flag, text)
        name, equals, value = text.partition("=")
        path: Loc = tuple(name.strip().split("."))
        if not equals or not all(path):
            self.problems.append(f"{label}: expected option.name=value, found {_show(text)}")
            return
        try:
            node = _compose(value)
        except _NotAccepted as exc:
            return self.report(path, label, str(exc))
        if node is None:
            return self.report(path, label, "expected a value (null for none, \"''\" for empty text), found nothing")
        section = self.data
        for depth, part in enumerate(path[:-1], start=1):
            if section.get(str(part)) is None:
                section[str(part)] = {}
                self.where[path[:depth]] = label
            section = section[str(part)]
            if not isinstance(section, dict):
                problem = f"expected {_dotted(path[:depth])} to be a mapping, found {_show(section)}"
                return self.report(path, label, problem)
        for places in (self.where, self.overrides):
            for stale in [known for known in places if known[: len(path)] == path]:
                del places[stale]
        self.overrides[path] = label
        section[str(path[-1])] = self.plain(node, path, lambda _: label)

    def place(self, path: Loc) -> str:
        """Where ``path`` was written, or else the nearest section around it."""
        while path not in self.where:
            path = path[:-1]
        return self.where[path]


_SCHEMA = Recipe.model_json_schema()
_KINDS = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "text"}
_BOUNDS = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def _resolve(option: dict[str, Any]) -> dict[str, Any]:
    """An option's JSON schema without indirection and without the null of an optional one."""
    for choice in option.get("anyOf", []):
        if choice.get("type") != "null":
            option = {**option, **choice}
    if "$ref" in option:
        option = {**_SCHEMA["$defs"][option["$ref"].rpartition("/")[2]], **option}
    return option


def _option(path: Loc) -> dict[str, Any]:
    option: dict[str, Any] = _SCHEMA
    for part in path:
        option = _resolve(option["items"] if isinstance(part, int) else option["properties"][part])
    return option


def _expected(option: dict[str, Any]) -> str:
    """An option's type, alternatives and range in words."""
    if "properties" in option:
        return f"a mapping of {', '.join(option['properties'])}"
    if "enum" in option:
        return f"one of {', '.join(option['enum'])}"
    if option["type"] == "object":
        return "a mapping"
    if option["type"] == "array":
        count = f" of {option['minItems']} or more" if "minItems" in option else ""
        return f"a list{count}, each item {_expected(_resolve(option['items']))}"
    if "pattern" in option:
        return f"text matching {option['pattern']}"
    bounds = [
        f"{words} {int(option[key]) if option[key] == int(option[key]) else option[key]}"
        for key, words in _BOUNDS.items()
        if key in option
    ]
    return " ".join([_KINDS[option["type"]], " and ".join(bounds)]).strip()


def _problem(error: Any, document: _Document) -> str:
    """One of pydantic's errors as a line."""
    path: Loc = error["loc"]
    if error["type"] == "value_error":
        return _combination(path, str(error["ctx"]["error"]), document)
    if error["type"] == "extra_forbidden":
        known = _option(path[:-1])["properties"]
        hint = did_you_mean(str(path[-1]), known) or f"; known are {', '.join(known)}"
        section = _dotted(path[:-1]) or "the recipe"
        message = f"expected an option of {section}, found unknown {_show(path[-1])}{hint}"
    elif error["type"] == "missing":
        message = f"expected {_expected(_option(path))}, found nothing"
    else:
        option, found = _option(path), error["input"]
        hint = did_you_mean(found, option["enum"]) if "enum" in option and isinstance(found, str) else ""
        message = f"expected {_expected(option)}, found {_show(found)}{hint}"
    return f"{document.place(path)}: {_dotted(path)}: {message}"


def _combination(section: Loc, message: str, document: _Document) -> str:
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
    return f"{culprits[-1] if culprits else document.place(path)}: {_dotted(path)}: {shown}"


def _read(file: str) -> str:
    try:
        with open(file, "rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{file}: expected a recipe file, found no such file") from None
    except IsADirectoryError:
        raise InputError(f"{file}: expected a recipe file, found a directory") from None
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise InputError(f"{file}: expected a recipe file, found one that cannot be read ({reason})") from None
    if len(raw) > MAX_BYTES:
        raise InputError(f"{file}: expected at most {MAX_BYTES} bytes, found more")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        line = raw.count(b"\n", 0, exc.start) + 1
        raise InputError(f"{file}:{line}: expected UTF-8 text, found byte 0x{raw[exc.start]:02x}") from None


def _read_document(path: str | os.PathLike[str], overrides: Sequence[str], varied: Sequence[str]) -> _Document:
    file = os.fspath(path)
    try:
        node = _compose(_read(file))
    except _NotAccepted as exc:
        raise InputError(f"{file}:{exc.line}: {exc}") from None
    if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
        raise InputError(f"{file}:1: expected a mapping of options, found an empty file")
    document = _Document()
    data = document.plain(node, (), lambda part: f"{file}:{part.start_mark.line + 1}")
    if not isinstance(data, dict):
        raise InputError(f"{document.where[()]}: expected a mapping of options, found {_show(data)}")
    document.data = data
    for flag, texts in (("--set", overrides), ("--vary", varied)):
        for text in texts:
            document.override(text, flag)
    return document


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = (), varied: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, applies overrides and checks every option.

    Args:
        path: a YAML file.
        overrides: ``a.b=value`` each, the value in YAML; a later one wins.
        varied: further overrides, which come last; problems name them ``--vary`` instead of ``--set``.

    Returns:
        The recipe, with the defaults filled in.

    Raises:
        InputError: one line for each problem of the file and the overrides.
    """
    document = _read_document(path, overrides, varied)
    problems = document.problems
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as exc:
        errors = exc.errors(include_url=False)
        problems += [_problem(error, document) for error in errors if error["loc"] not in document.reported]
    if problems:
        raise InputError(*problems)
    return recipe


def located(
    error: InputError, path: str | os.PathLike[str], overrides: Sequence[str] = (), varied: Sequence[str] = ()
) -> InputError:
    """The same error with the recipe's file and line before each problem that begins with an option's dotted name.

    For what shows only when data, model and target are looked at, after the recipe itself was found to be well-formed.
    """
    document = _read_document(path, overrides, varied)
    problems = []
    for problem in error.problems:
        option = tuple(problem.partition(":")[0].split("."))
        known = option[0] in Recipe.model_fields
        problems.append(f"{document.place(option)}: {problem}" if known else problem)
    return InputError(*problems)


def listed_values(text: str) -> list[str]:
    """Takes ``a.b=v1,v2`` apart, the values being the items of a YAML list without its brackets.

    Returns:
        ``a.b=v1`` and ``a.b=v2``, each an override as `load_recipe` takes them.

    Raises:
        InputError: not of this form.
    """
    name, equals, values = text.partition("=")
    if not equals or not all(part.strip() for part in name.split(".")):
        raise InputError(f"{_label('--vary', text)}: expected option.name=value,value,..., found {_show(text)}")
    flow = f"[{values}]"
    try:
        node = _compose(flow)
    except _NotAccepted as exc:
        raise InputError(f"{_label('--vary', text)}: {exc}") from None
    # a text such as "1] # " would end the list by itself
    if not isinstance(node, yaml.SequenceNode) or node.end_mark.index != len(flow):
        raise InputError(f"{_label('--vary', text)}: expected values with commas between them, found {_show(values)}")
    if not node.value:
        raise InputError(f"{_label('--vary', text)}: expected at least one value, found none")
    return [f"{name.strip()}={flow[item.start_mark.index : item.end_mark.index].strip()}" for item in node.value]


def write_recipe(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Writes every option, defaults included, such that `load_recipe` reads an equal recipe.

    Args:
        recipe: what to write.
        path: the file; replaced if it exists.
    """
    text = yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    with atomic_write(path) as file:
        file.write(text)


def leaves(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted names and values in JSON, which tells 1 from true and from 1.0."""
    found: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            found |= leaves(item, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(item, ensure_ascii=False, default=repr)
    return found


def differing_fields(a: Recipe, b: Recipe) -> list[str]:
    """Names the options in which two recipes differ.

    Args:
        a: one recipe.
        b: the other.

    Returns:
        ``dotted.name: value in a, value in b`` for each; empty for equal recipes.
    """
    left, right = leaves(a.model_dump()), leaves(b.model_dump())
    return [
        f"{name}: {left.get(name, 'nothing')}, {right.get(name, 'nothing')}"
        for name in left | right
        if left.get(name) != right.get(name)
    ]


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package.

    Returns:
        Files by name (``quickstart``, ``cifar10/resnet18-flops50``), quickstart first.
    """
    package = Path(__file__).resolve().parent
    # A wheel carries them inside the package; a checkout or editable install beside it.
    folder = next((place for place in (package / "recipes", package.parent / "recipes") if place.is_dir()), package)
    names = {file.relative_to(folder).with_suffix("").as_posix(): file for file in folder.rglob("*.yaml")}
    return {name: names[name] for name in sorted(names, key=lambda name: (name != "quickstart", name))}


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
                title = f"\n## {_dotted(dotted)}\n\n{option['description']}{remark}\n"
                nested.append((title, option, dotted))
                continue
            optional = " (or null)" if "anyOf" in raw else ""
            default = "required" if needed else f"default {json.dumps(option['default'])}"
            lines.append(f"- `{_dotted(dotted)}` [{_expected(option)}{optional}; {default}]: {option['description']}")
        for title, option, dotted in nested:
            lines.append(title)
            describe(option, dotted)

    describe(_SCHEMA, ())
    return "\n".join(lines) + "\n"
