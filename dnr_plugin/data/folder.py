"""Image folders in the layout of ImageNet and Tiny-ImageNet, streamed from the disk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dnr_plugin.data.augment import apply_augmentations
from dnr_plugin.data.images import Data, check_batches, drawn_rows, normalise
from dnr_plugin.errors import InputError, first_line
from dnr_plugin.recipe.sections import DataOptions

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class FolderImages:
    """Images that worker processes decode from disk; see :class:`ImageSource` for what its methods do.

    Cropping is torchvision's RandomResizedCrop; without it the images are resized and cropped in the middle. Mirroring
    and cutout are done in batches, as for images in memory. Each image's crop has a seed of its own, so the batches do
    not depend on the number of workers.

    Args:
        samples: path and label of each image.
        image_size: side of the square that is delivered.
        workers: processes that decode; 0: the calling one.
        device: of the batches.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        image_size: int,
        workers: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.samples = list(samples)
        self.labels = torch.tensor([label for _, label in self.samples])
        self.mean, self.std = torch.tensor(_IMAGENET_MEAN), torch.tensor(_IMAGENET_STD)
        self.image_size, self.workers, self.device = image_size, workers, torch.device(device)

    def __len__(self) -> int:
        return len(self.samples)

    def to(self, device: torch.device | str) -> FolderImages:
        return FolderImages(self.samples, self.image_size, self.workers, device)

    def subset(self, size: int, seed: int) -> FolderImages:
        """``size`` images drawn without replacement, in their original order; size in [1, len(self)]."""
        rows = drawn_rows(len(self), size, seed).tolist()
        return FolderImages([self.samples[row] for row in rows], self.image_size, self.workers, self.device)

    def batches(
        self, batch_size: int, *, seed: int | None = None, augment: Sequence[str] = (), drop_last: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        check_batches(batch_size, seed, augment)
        return self._batches(batch_size, seed, augment, drop_last)

    def _batches(
        self, batch_size: int, seed: int | None, augment: Sequence[str], drop_last: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator()
        order = torch.arange(len(self))
        if seed is not None:
            order = torch.randperm(len(self), generator=generator.manual_seed(seed))
        crop_seeds = torch.randint(2**62, (len(self),), generator=generator)
        keys = list(zip(order.tolist(), crop_seeds.tolist(), strict=True))
        loader: DataLoader[Any] = DataLoader(
            _Decoder(self.samples, self.image_size, "crop" in augment),
            batch_size=batch_size,
            sampler=keys,
            drop_last=drop_last,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            # Otherwise the loader would draw a number from the global generator.
            generator=torch.Generator(),
        )
        mean, std = self.mean.to(self.device), self.std.to(self.device)
        others = [name for name in augment if name != "crop"]
        for images, labels, unreadable in loader:
            if unreadable:
                raise InputError(*unreadable)
            images = normalise(images.to(self.device, non_blocking=True), mean, std)
            yield apply_augmentations(images, others, generator), labels.to(self.device, non_blocking=True)


class _Decoder(Dataset[Any]):
    """Dataset whose key is (row, seed of the crop); gives a uint8 image [3, S, S] and its label, or what is wrong."""

    def __init__(self, samples: Sequence[tuple[str, int]], image_size: int, random_crop: bool) -> None:
        from torchvision.transforms import v2  # type: ignore[import-untyped, unused-ignore]

        self.samples = samples
        cut = (
            [v2.RandomResizedCrop(image_size)]
            if random_crop
            else [v2.Resize(math.ceil(image_size * 256 / 224)), v2.CenterCrop(image_size)]
        )
        self.transform = v2.Compose([*cut, v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | str:
        from PIL import Image

        row, seed = key
        path, label = self.samples[row]
        try:
            with Image.open(path) as image:
                rgb = image.convert("RGB")
        except Exception as error:
            return f"data.root: expected an image, cannot read {path}: {first_line(error)}"
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the GPUs of the calling process too.
            torch.default_generator.manual_seed(seed)
            return self.transform(rgb), label


def _collate(samples: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor, list[str]]:
    """Stack a batch; problems travel as text, because an exception from a worker would arrive with its traceback."""
    unreadable = [sample for sample in samples if isinstance(sample, str)]
    if unreadable:
        return torch.empty(0), torch.empty(0), unreadable
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), []


def _test_folder(root: Path) -> Path:
    # ImageNet's test split has no labels, so its validation split is what is tested on where both exist.
    return root / "val" if (root / "val").is_dir() else root / "test"


def class_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def folder_problems(root: Path) -> list[str]:
    if not root.is_dir():
        return [f"data.root: expected a folder with train and val (or test) in it, found no folder {root}"]
    splits = [root / "train", _test_folder(root)]
    absent = [name for split, name in zip(splits, ("train", "val or test"), strict=True) if not split.is_dir()]
    if absent:
        return [f"data.root: expected a folder {name} in {root}, found none" for name in absent]
    train, test = (class_names(split) for split in splits)
    if len(train) < 2:
        return [f"data.root: expected a folder for each of at least 2 classes in {splits[0]}, found {len(train)}"]
    if train != test:
        only = [
            f"only in {split.name}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for split, names in (
                (splits[0], sorted(set(train) - set(test))),
                (splits[1], sorted(set(test) - set(train))),
            )
            if names
        ]
        return [f"data.root: expected the same classes in {splits[0]} and {splits[1]}, found {'; '.join(only)}"]
    return []


def load_folder(options: DataOptions, root: Path) -> Data:
    from torchvision import datasets

    side = options.image_size or 224
    splits = []
    for folder in (root / "train", _test_folder(root)):
        try:
            splits.append(datasets.ImageFolder(str(folder)))
        except FileNotFoundError as error:
            raise InputError(f"data.root: expected images of every class in {folder}: {first_line(error)}") from error
    workers = 2 if options.workers is None else options.workers
    train, test = (FolderImages(split.samples, side, workers) for split in splits)
    return Data(train, test, len(splits[0].classes), 3, side, list(splits[0].classes))
