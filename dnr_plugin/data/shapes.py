"""Shapes: ten classes of images drawn from a seed, so that nothing has to be downloaded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dnr_plugin.data.images import Data, Images, channel_statistics
from dnr_plugin.recipe.sections import DataOptions
from dnr_plugin.seeds import derive_seed

SHAPES = (
    "disc",
    "ring",
    "square",
    "frame",
    "triangle",
    "cross",
    "plus",
    "horizontal stripes",
    "vertical stripes",
    "checkerboard",
)
DRAWN = (5_000, 1_000)  # shapes, unless train_size and test_size say otherwise


def draw_shapes(count: int, image_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw images of ten classes (``SHAPES``): position, size, slight rotation, colours and noise are random.

    Args:
        count: images, >= 1; the classes are as balanced as it allows.
        image_size: side in pixels, >= 8.
        seed: >= 0.

    Returns:
        Images, uint8 [count, 3, image_size, image_size], and labels, int64 [count].
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(count, generator=generator) % len(SHAPES)
    # In parts of 2**19 pixels: memory stays bounded, and the cache holds what is worked on.
    parts = torch.split(labels, max(1, 2**19 // image_size**2))
    return torch.cat([_draw_part(part, image_size, generator) for part in parts]), labels


def _draw_part(labels: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Labels int64 [B] -> uint8 images [B, 3, side, side]."""
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *(shape or (1, 1)), generator=generator)

    # Pixels in the shape's own frame (u to the right, v down), where it fills the square from -1 to 1.
    radius = uniform(0.42, 0.8)
    angle = uniform(-math.pi / 15, math.pi / 15)
    pixels = (torch.arange(side) + 0.5) * (2 / side) - 1
    x = pixels[None, None, :] - uniform(-1, 1) * (1 - radius)
    y = pixels[None, :, None] - uniform(-1, 1) * (1 - radius)
    u = (torch.cos(angle) * x + torch.sin(angle) * y) / radius
    v = (torch.cos(angle) * y - torch.sin(angle) * x) / radius

    inside = torch.empty(count, side, side)
    for label in range(len(SHAPES)):
        rows = labels == label
        if rows.any():
            inside[rows] = _inside(SHAPES[label], u[rows], v[rows])
    # One pixel of soft edge; distances are in units of the radius.
    coverage = (0.5 + inside * radius * (side / 2)).clamp_(0, 1)[:, None]

    back = torch.rand(count, 3, 1, 1, generator=generator)
    # Every channel of the foreground differs from the background by 0.3 to 0.5, towards the farther end.
    fore = back + torch.where(back < 0.5, 1.0, -1.0) * uniform(0.3, 0.5, 3, 1, 1)
    images = torch.lerp(back, fore, coverage)
    images += 0.08 * torch.randn(images.shape, generator=generator)
    return images.clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def _inside(name: str, u: Tensor, v: Tensor) -> Tensor:
    """About the distance to the shape's edge, positive inside, in units of the shape's radius; u, v: [B, H, W]."""
    square = torch.maximum(u.abs(), v.abs())
    waves = 2.5 * math.pi  # two and a half stripes of each colour, which at 32 pixels are 3 or more wide

    def bars(t: Tensor) -> Tensor:
        return torch.sin(waves * t) / waves

    if name == "disc":
        return 0.95 - torch.hypot(u, v)
    if name == "ring":
        return 0.22 - (torch.hypot(u, v) - 0.73).abs()
    if name == "square":
        return 0.85 - square
    if name == "frame":
        return 0.2 - (square - 0.68).abs()
    if name == "triangle":
        # Equilateral, apex up: the three edges lie 0.5 from the centre.
        return 0.5 - torch.maximum(v, (math.sqrt(3) / 2) * u.abs() - 0.5 * v)
    if name in ("cross", "plus"):
        if name == "cross":
            u, v = (u + v) * math.sqrt(0.5), (u - v) * math.sqrt(0.5)
        a, b = u.abs(), v.abs()
        return torch.maximum(torch.minimum(0.95 - a, 0.25 - b), torch.minimum(0.95 - b, 0.25 - a))
    pattern = {"horizontal stripes": bars(v), "vertical stripes": bars(u), "checkerboard": bars(u) * bars(v) * waves}
    return torch.minimum(0.9 - square, pattern[name])


def load_shapes(options: DataOptions, seed: int) -> Data:
    side = options.image_size or 32
    drawn = [
        draw_shapes(size, side, derive_seed(seed, "shapes", split))
        for split, size in (("train", options.train_size or DRAWN[0]), ("test", options.test_size or DRAWN[1]))
    ]
    mean, std = channel_statistics(drawn[0][0])
    train, test = (Images(images, labels, mean, std) for images, labels in drawn)
    return Data(train, test, len(SHAPES), 3, side, list(SHAPES))
