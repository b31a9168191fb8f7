"""Reads, checks and writes recipes: the YAML files that say what ``dnr run`` does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import yaml
from pydantic import ValidationError

from dnr_plugin.errors import InputError
from dnr_plugin.files import atomic_write
from dnr_plugin.recipe.schema import Recipe
from dnr_plugin.recipe.schema_wording import located_option, problem_line
from dnr_plugin.recipe.wording import as_found, labelled
from dnr_plugin.recipe.yaml_document import (
    MAX_BYTES,
    Document,
    NotAccepted,
    RecipeDumper,
    compose,
)


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


def _read_document(path: str | os.PathLike[str], overrides: Sequence[str], varied: Sequence[str]) -> Document:
    file = os.fspath(path)
    try:
        node = compose(_read(file))
    except NotAccepted as exc:
        raise InputError(f"{file}:{exc.line}: {exc}") from None
    if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
        raise InputError(f"{file}:1: expected a mapping of options, found an empty file")
    document = Document()
    data = document.plain(node, (), lambda part: f"{file}:{part.start_mark.line + 1}")
    if not isinstance(data, dict):
        raise InputError(f"{document.where[()]}: expected a mapping of options, found {as_found(data)}")
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
        lines = (problem_line(e, document) for e in errors if located_option(e["loc"]) not in document.reported)
        problems += dict.fromkeys(lines)  # a value of neither type of an option is an error for each
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
        problems.append(f"{document.location(option)}: {problem}" if known else problem)
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
        raise InputError(f"{labelled('--vary', text)}: expected option.name=value,value,..., found {as_found(text)}")
    flow = f"[{values}]"
    try:
        node = compose(flow)
    except NotAccepted as exc:
        raise InputError(f"{labelled('--vary', text)}: {exc}") from None
    # a text such as "1] # " would end the list by itself
    if not isinstance(node, yaml.SequenceNode) or node.end_mark.index != len(flow):
        raise InputError(
            f"{labelled('--vary', text)}: expected values with commas between them, found {as_found(values)}"
        )
    if not node.value:
        raise InputError(f"{labelled('--vary', text)}: expected at least one value, found none")
    return [f"{name.strip()}={flow[item.start_mark.index : item.end_mark.index].strip()}" for item in node.value]


def write_recipe(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Writes every option, defaults included, such that `load_recipe` reads an equal recipe.

    Args:
        recipe: what to write.
        path: the file; replaced if it exists.
    """
    text = yaml.dump(recipe.model_dump(), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=120)
    with atomic_write(path) as file:
        file.write(text)


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package.

    Returns:
        Files by name (``quickstart``, ``cifar10/resnet18-flops50``), quickstart first.
    """
    package = Path(str(resources.files("dnr_plugin")))
    # A wheel carries them inside the package; a checkout or editable install beside it.
    folder = next(
        (location for location in (package / "recipes", package.parent / "recipes") if location.is_dir()), package
    )
    names = {file.relative_to(folder).with_suffix("").as_posix(): file for file in folder.rglob("*.yaml")}
    return {name: names[name] for name in sorted(names, key=lambda name: (name != "quickstart", name))}
