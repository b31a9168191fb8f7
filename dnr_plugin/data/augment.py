"""Augmentation of a batch of images: each function takes the draws, so that it can be told by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

AUGMENTATIONS = ("flip", "crop", "cutout")


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror left and right where ``mirrored``, bool [B], is true; images: [B, C, H, W]."""
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def crop(images: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
    """Pad with zeros on every side and cut each image back to its size at its own position.

    Args:
        images: [B, C, H, W].
        top: first row of each crop in the padded image, int64 [B], in [0, 2 * padding].
        left: first column, likewise.
        padding: rows and columns of zeros on each side, >= 0.

    Returns:
        [B, C, H, W].
    """
    height, width = images.shape[2:]
    windows = functional.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def cutout(images: Tensor, row: Tensor, column: Tensor, side: int) -> Tensor:
    """Set a square to zero, clipped at the borders.

    Args:
        images: [B, C, H, W].
        row: int64 [B], in [0, H); the square covers rows ``row - side // 2`` to ``row - side // 2 + side - 1``.
        column: likewise.
        side: of the square in pixels, >= 0.

    Returns:
        [B, C, H, W].
    """

    def covered(centre: Tensor, size: int) -> Tensor:
        offset = torch.arange(size, device=images.device) - (centre[:, None] - side // 2)
        return (offset >= 0) & (offset < side)

    inside = covered(row, images.shape[2])[:, None, :, None] & covered(column, images.shape[3])[:, None, None, :]
    return images.masked_fill(inside, 0.0)


def apply_augmentations(images: Tensor, names: Sequence[str], generator: torch.Generator) -> Tensor:
    """Apply ``names`` with draws from a CPU generator, so that every device sees the same augmentation."""
    count, size, device = len(images), images.shape[2], images.device

    def draw(high: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator).to(device)

    if "flip" in names:
        images = flip(images, draw(2).bool())
    if "crop" in names:
        padding = size // 8
        images = crop(images, draw(2 * padding + 1), draw(2 * padding + 1), padding)
    if "cutout" in names:
        images = cutout(images, draw(size), draw(size), size // 2)
    return images
