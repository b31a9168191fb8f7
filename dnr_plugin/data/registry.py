"""Data sets by the name in a recipe: what is known of each without reading images, and how it is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dnr_plugin.data.folder import class_names, folder_problems, load_folder
from dnr_plugin.data.images import Data
from dnr_plugin.data.shapes import DRAWN, load_shapes
from dnr_plugin.data.torchvision_sets import SIZES, file_problems, load_published
from dnr_plugin.errors import InputError
from dnr_plugin.recipe.sections import DataOptions
from dnr_plugin.seeds import derive_seed


def check_data(options: DataOptions) -> None:
    """Whether the data set's files are there and the options fit it; opens no file.

    Raises:
        InputError: one line for each option that does not apply, and for absent folders, files and classes.
    """
    problems = _option_problems(options)
    if not problems and options.root is not None:
        if options.name == "imagefolder":
            problems = folder_problems(Path(options.root).expanduser())
        elif not options.download:
            problems = file_problems(options.name, Path(options.root).expanduser())
    if problems:
        raise InputError(*problems)


def data_shape(options: DataOptions) -> tuple[int, int, int]:
    """(classes, channels, side in pixels) of a data set that :func:`check_data` found fit, without reading images."""
    if options.name == "imagefolder":
        assert options.root is not None  # check_data refuses its absence
        classes = class_names(Path(options.root).expanduser() / "train")
        return len(classes), 3, options.image_size or 224
    if options.name == "mnist":
        return 10, 1, 28
    return 100 if options.name == "cifar100" else 10, 3, options.image_size or 32


def train_size(options: DataOptions) -> int | None:
    """Number of training images, or None where only reading the folder tells."""
    return options.train_size or {"shapes": DRAWN, **SIZES}.get(options.name, (None,))[0]


def load_data(options: DataOptions, seed: int) -> Data:
    """Load, download or draw the data set that ``options`` names, and its subsets.

    ``options.augment`` is for the caller to hand to ``train.batches``.

    Args:
        options: the recipe's ``data`` section.
        seed: of the subsets and of drawn data, >= 0.

    Raises:
        InputError: what :func:`check_data` finds, damaged files, a failed download, a subset larger than the data.
    """
    check_data(options)
    if options.name == "shapes":
        return load_shapes(options, seed)
    assert options.root is not None  # check_data refuses its absence
    root = Path(options.root).expanduser()
    data = load_folder(options, root) if options.name == "imagefolder" else load_published(options, root)
    problems = []
    splits: dict[str, Any] = {}
    for split, size in (("train", options.train_size), ("test", options.test_size)):
        source: Any = getattr(data, split)
        if size is not None and size > len(source):
            problems.append(f"data.{split}_size: expected at most {len(source)}, found {size}")
        elif size is not None:
            splits[split] = source.subset(size, derive_seed(seed, "subset", split))
    if problems:
        raise InputError(*problems)
    return replace(data, **splits)


def _option_problems(options: DataOptions) -> list[str]:
    name = options.name
    problems = []
    if name == "shapes" and options.root is not None:
        problems.append(f"data.root: expected nothing for shapes, which needs no files, found {options.root}")
    if name != "shapes" and options.root is None:
        problems.append(f"data.root: expected the folder of {name}, found nothing")
    if name != "imagefolder" and options.workers is not None:
        problems.append(f"data.workers: expected nothing for {name}, which is held in memory, found {options.workers}")
    if name in ("shapes", "imagefolder") and options.download:
        problems.append(f"data.download: expected false for {name}, which is not downloaded, found true")
    if name in SIZES and options.image_size is not None:
        side = 28 if name == "mnist" else 32
        problems.append(
            f"data.image_size: expected nothing for {name}, whose images have {side} pixels a side, "
            f"found {options.image_size}"
        )
    for split, size, most in zip(
        ("train", "test"), (options.train_size, options.test_size), SIZES.get(name, ()), strict=False
    ):
        if size is not None and size > most:
            problems.append(f"data.{split}_size: expected at most {most}, found {size}")
    return problems
