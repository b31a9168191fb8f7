"""YAML 1.2 without anchors and tags, with the line of every part of a document."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import yaml

from dnr_plugin.recipe.wording import Loc, as_found, dotted_name, labelled

MAX_BYTES = 2**20
MAX_DEPTH = 20
MAX_INT_DIGITS = 40
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


class NotAccepted(Exception):
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
            raise NotAccepted(line, f"expected no YAML anchors or aliases, found {as_found(event.anchor)}")
        if getattr(event, "tag", None) is not None:
            raise NotAccepted(line, f"expected no YAML tags, found {as_found(event.tag)}")
        if self.depth >= MAX_DEPTH:
            raise NotAccepted(line, f"expected at most {MAX_DEPTH} levels of nesting, found more")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class RecipeDumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or 1.2 would misread as something other than text; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.yaml_implicit_resolvers = {}
for _name, _pattern, _first in _PLAIN_SCALARS:
    for _class in (_Loader, RecipeDumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})\Z"), _first)


def compose(text: str) -> yaml.Node | None:
    """The one YAML document in ``text``; None where there is none.

    Raises:
        NotAccepted: not YAML, several documents, or parts of YAML that recipes do not use.
    """
    try:
        loader: Any = _Loader(text)
    except yaml.reader.ReaderError as exc:
        line = text.count("\n", 0, exc.position) + 1
        raise NotAccepted(line, f"not YAML: unprintable character U+{ord(text[exc.position]):04X}") from exc
    try:
        node: yaml.Node | None = loader.get_node() if loader.check_node() else None
        if loader.check_node():
            line = loader.peek_event().start_mark.line + 1
            raise NotAccepted(line, "expected one YAML document, found another")
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        context = f" ({exc.context})" if exc.context else ""
        raise NotAccepted(mark.line + 1 if mark else 1, f"not YAML: {exc.problem}{context}") from exc
    except (ValueError, OverflowError) as exc:  # PyYAML lets chr() fail on an escape such as "\UFFFFFFFF"
        raise NotAccepted(loader.line + 1, f"not YAML: {exc}") from exc
    return node


class Document:
    """Plain data, where each part of it was written, and what is already known to be wrong with it."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.where: dict[Loc, str] = {}
        self.overrides: dict[Loc, str] = {}
        self.problems: list[str] = []
        self.reported: set[Loc] = set()

    def report(self, path: Loc, where: str, message: str) -> None:
        self.problems.append(f"{where}: {dotted_name(path)}: {message}")
        self.reported.add(path)

    def plain(self, node: yaml.Node, path: Loc, at: Callable[[yaml.Node], str]) -> Any:
        """Turns a node into plain data and notes where its parts stand (``at``)."""
        self.where.setdefault(path, at(node))  # a value of a mapping already has its key's location
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = key_node.value
                if key_node.tag != _TAG + "str":
                    shown = (key or "null")[:80] if isinstance(key, str) else f"a {key_node.id}"
                    problem = f"expected text as a key, found {shown}"
                    self.problems.append(f"{at(key_node)}: {dotted_name(path) or 'the recipe'}: {problem}")
                elif key in mapping:
                    problem = f"expected each key once, found it again (first at {self.where[(*path, key)]})"
                    self.problems.append(f"{at(key_node)}: {dotted_name((*path, key))}: {problem}")
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
        label = labelled(flag, text)
        name, equals, value = text.partition("=")
        path: Loc = tuple(name.strip().split("."))
        if not equals or not all(path):
            self.problems.append(f"{label}: expected option.name=value, found {as_found(text)}")
            return
        try:
            node = compose(value)
        except NotAccepted as exc:
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
                problem = f"expected {dotted_name(path[:depth])} to be a mapping, found {as_found(section)}"
                return self.report(path, label, problem)
        for recorded in (self.where, self.overrides):
            for stale in [known for known in recorded if known[: len(path)] == path]:
                del recorded[stale]
        self.overrides[path] = label
        section[str(path[-1])] = self.plain(node, path, lambda _: label)

    def location(self, path: Loc) -> str:
        """Where ``path`` was written, or else the nearest section around it."""
        while path not in self.where:
            path = path[:-1]
        return self.where[path]
