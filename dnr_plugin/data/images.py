"""Images with labels: what training needs of a data set, and those that are in memory as uint8 tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from dnr_plugin.data.augment import AUGMENTATIONS, apply_augmentations


class ImageSource(Protocol):
    """What training and observing need of a data set; ``Images`` and ``FolderImages`` have it."""

    @property
    def labels(self) -> Tensor:
        """int64 [N]."""
        ...

    def __len__(self) -> int: ...

    def to(self, device: torch.device | str) -> ImageSource:
        """The same images, whose batches lie on ``device``."""
        ...

    def batches(
        self, batch_size: int, *, seed: int | None = None, augment: Sequence[str] = (), drop_last: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the images.

        Args:
            batch_size: images per batch, >= 1.
            seed: shuffles and augments, and nothing else does: the same seed gives the same batches. None: in order.
            augment: any of ``flip``, ``crop``, ``cutout``; needs a seed. Their order does not matter.
            drop_last: leave out a last batch that is not full.

        Returns:
            Pairs of normalised images, float32 [B, C, H, W], and labels, int64 [B], on the device.

        Raises:
            ValueError: batch_size below 1, unknown augmentation, or augmentation without a seed.
        """
        ...


@dataclass(frozen=True)
class Data:
    """A data set, split for training and testing.

    Attributes:
        train, test: the images; both are normalised by the training images' statistics.
        num_classes: labels lie in [0, num_classes).
        in_channels: channels of every image.
        image_size: side of every image in pixels.
        classes: a name for each label.
    """

    train: ImageSource
    test: ImageSource
    num_classes: int
    in_channels: int
    image_size: int
    classes: list[str]


def check_batches(batch_size: int, seed: int | None, augment: Sequence[str]) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
    if unknown := [name for name in augment if name not in AUGMENTATIONS]:
        raise ValueError(f"augment: expected any of {', '.join(AUGMENTATIONS)}, found {', '.join(unknown)}")
    if augment and seed is None:
        raise ValueError("augment: expected a seed to draw from, found None")


@dataclass(frozen=True)
class Images:
    """Images in memory; see :class:`ImageSource` for what its methods do.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        mean: float32 [C], of pixels in [0, 1]; subtracted.
        std: float32 [C], likewise; divided by.
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> Images:
        return Images(self.images.to(device), self.labels.to(device), self.mean.to(device), self.std.to(device))

    def batches(
        self, batch_size: int, *, seed: int | None = None, augment: Sequence[str] = (), drop_last: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        check_batches(batch_size, seed, augment)  # here, as the generator below would wait for its first batch
        return self._batches(batch_size, seed, augment, drop_last)

    def _batches(
        self, batch_size: int, seed: int | None, augment: Sequence[str], drop_last: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator()
        order = None
        if seed is not None:
            order = torch.randperm(len(self), generator=generator.manual_seed(seed)).to(self.images.device)
        last = len(self) - len(self) % batch_size if drop_last else len(self)
        for start in range(0, last, batch_size):
            rows = slice(start, start + batch_size) if order is None else order[start : start + batch_size]
            images = normalise(self.images[rows], self.mean, self.std)
            yield apply_augmentations(images, augment, generator), self.labels[rows]

    def subset(self, size: int, seed: int) -> Images:
        """``size`` images drawn without replacement, in their original order; size in [1, len(self)]."""
        rows = drawn_rows(len(self), size, seed).to(self.images.device)
        return replace(self, images=self.images[rows], labels=self.labels[rows])


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, C, H, W] in [0, 255] to float32 of about zero mean and unit variance in each channel."""
    return images.float().div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])


def drawn_rows(count: int, size: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:size].sort().values


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of uint8 images, in units of 255; float32 [C] each.

    Exact, from counts of the 256 values, so that no float copy of the data set is made. A constant channel has
    standard deviation 1 / 255, as it is divided by.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    shares = counts / counts.sum(1, keepdim=True)
    mean = shares @ values
    variance = (shares * (values - mean[:, None]) ** 2).sum(1)
    return mean.float(), variance.sqrt().clamp(min=1 / 255).float()
