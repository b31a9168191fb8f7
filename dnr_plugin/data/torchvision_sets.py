"""CIFAR-10, CIFAR-100 and MNIST as torchvision reads them, in memory."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dnr_plugin.data.images import Data, Images, channel_statistics
from dnr_plugin.errors import InputError, first_line
from dnr_plugin.recipe.sections import DataOptions

# Images in the train and test split as published: what train_size and test_size may ask for.
SIZES = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "mnist": (60_000, 10_000)}
_FILES = {
    "cifar10": ("cifar-10-batches-py", (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")),
    "cifar100": ("cifar-100-python", ("train", "test", "meta")),
    "mnist": ("MNIST/raw", tuple(f"{s}-{k}-ubyte" for s in ("train", "t10k") for k in ("images-idx3", "labels-idx1"))),
}


def file_problems(name: str, root: Path) -> list[str]:
    folder, files = _FILES[name]
    fetch = "data.download: true would fetch it"
    if not root.is_dir():
        return [f"data.root: expected the folder that holds {folder} ({name}), found no folder {root}; {fetch}"]
    if not (root / folder).is_dir():
        return [f"data.root: expected the folder {folder} ({name}) in {root}, found none; {fetch}"]
    if absent := [file for file in files if not (root / folder / file).is_file()]:
        return [f"data.root: expected {', '.join(absent)} ({name}) in {root / folder}, found none; {fetch}"]
    return []


def load_published(options: DataOptions, root: Path) -> Data:
    from torchvision import datasets  # type: ignore[import-untyped, unused-ignore]

    name = options.name
    kind: Any = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "mnist": datasets.MNIST}[name]
    if options.download:
        try:
            kind(root, train=True, download=True)
        except Exception as error:  # network, disk and checksum failures have no common type
            raise InputError(
                f"data.download: expected to fetch {name} to {root}, failed: {first_line(error)}"
            ) from error
    damaged = _damaged(kind, root)
    try:
        if damaged:
            raise RuntimeError(f"wrong checksum of {', '.join(damaged)}")
        with warnings.catch_warnings():
            # numpy's notice about the alignment flag in the pickles as published; there is nothing to do about it.
            warnings.filterwarnings("ignore", message=r".*align should be passed as Python or NumPy boolean")
            splits = [kind(root, train=train) for train in (True, False)]
        images = [_to_tensor(split.data) for split in splits]
        labels = [torch.as_tensor(split.targets, dtype=torch.int64) for split in splits]
        for split_images, split_labels, expected in zip(images, labels, SIZES[name], strict=True):
            if not len(split_images) == len(split_labels) == expected:
                raise RuntimeError(f"{len(split_images)} images and {len(split_labels)} labels instead of {expected}")
    except Exception as error:  # damaged files raise a dozen types: RuntimeError, ValueError, AssertionError, ...
        raise InputError(
            f"data.root: expected the files of {name} as published in {root / _FILES[name][0]}, found damaged ones "
            f"({first_line(error)}); remove them, and data.download: true would fetch them"
        ) from error
    mean, std = channel_statistics(images[0])
    train, test = (Images(i, y, mean, std) for i, y in zip(images, labels, strict=True))
    classes = [str(c) for c in splits[0].classes]
    return Data(train, test, len(classes), images[0].shape[1], images[0].shape[2], classes)


def _damaged(kind: Any, root: Path) -> list[str]:
    """Names of the files whose checksum is not the published one; torchvision has none for MNIST's unpacked files."""
    from torchvision.datasets.utils import check_md5  # type: ignore[import-untyped, unused-ignore]

    if not hasattr(kind, "train_list"):
        return []
    files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    return [name for name, md5 in files if not check_md5(root / kind.base_folder / name, md5)]


def _to_tensor(images: Any) -> Tensor:
    """[N, H, W] or [N, H, W, C], array or tensor, to contiguous [N, C, H, W]."""
    tensor = torch.as_tensor(images)
    return tensor[:, None] if tensor.dim() == 3 else tensor.permute(0, 3, 1, 2).contiguous()
