"""Arguments that several commands take, and the recipe that they name."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dnr_plugin.errors import InputError

if TYPE_CHECKING:
    from dnr_plugin.recipe.schema import Recipe

Commands = Any  # argparse's own class for this is private


def command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """Adds a command; ``text`` is its line in the list, and as a sentence its description."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=_sentence(text))
    parser.set_defaults(command=run)
    return parser


def computes(*parsers: argparse.ArgumentParser) -> None:
    """Says of commands that they train or time networks, for which freed memory is kept (`devices.keep_memory`)."""
    for parser in parsers:
        parser.set_defaults(keeps_memory=True)


def family(commands: Commands, name: str, text: str, title: str, metavar: str) -> Commands:
    """Adds a command that has commands of its own, and returns these."""
    parser = commands.add_parser(name, help=text, description=_sentence(text))
    return parser.add_subparsers(title=title, metavar=metavar, required=True)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def takes_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe (dnr recipes)")
    parser.add_argument(
        "--set", metavar="a.b=value", action="append", default=[], dest="overrides",
        help="override an option; may be repeated",
    )  # fmt: skip


def takes_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def takes_saved(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", metavar="CxHxW", help="shape of one image; default: the builder's, else 3x224x224")
    parser.add_argument(
        "--allow-import", action="store_true", help="let a saved model call the module:function that built it"
    )


def positive(text: str) -> int:
    """A whole number of at least 1, as argparse wants it."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def recipe_file(name: str) -> str:
    """A file as it is, or else the shipped recipe of that name."""
    from dnr_plugin.recipe.load import shipped_recipes

    if os.path.exists(name) or name.endswith((".yaml", ".yml")) or name not in shipped_recipes():
        return name
    return str(shipped_recipes()[name])


@contextlib.contextmanager
def recipe_of(arguments: argparse.Namespace) -> Iterator[Recipe]:
    """The recipe that a command was given; problems with it that show inside are told with its file and line."""
    from dnr_plugin.recipe.load import load_recipe, located

    file = recipe_file(arguments.recipe)
    recipe = load_recipe(file, arguments.overrides)
    try:
        yield recipe
    except InputError as error:
        raise located(error, file, arguments.overrides) from None


def several(text: str) -> list[int]:
    """Whole numbers of at least 1, separated by commas, as argparse wants them."""
    return [positive(part) for part in text.split(",")]
