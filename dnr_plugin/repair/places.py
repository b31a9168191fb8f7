"""Where the outputs of a layer are read: at some positions of each image, the same in two networks."""

from __future__ import annotations

import random

import torch
from torch import Tensor

CHUNK = 64  # images that are read at the same positions, at most
_CHUNKS = 4  # at least, so that the last quarter of the images, which judges a fit, is read at positions of its own


class Places:
    """Positions at which one layer is read: new ones for every few images, the same in both networks.

    Args:
        seed: draws them.
        per_image: places of an image.
        images: that will be read in all.

    Attributes:
        chunk: images that are read at the same positions.
        positions: of an image, once it is known.
    """

    def __init__(self, seed: str, per_image: int, images: int) -> None:
        self.seed, self.per_image = seed, per_image
        self.chunk = min(CHUNK, -(-images // _CHUNKS))
        self.positions = 0

    def of_chunk(self, first: int) -> Tensor:
        """Flat positions of the outputs of the images from ``first`` on, shape [K]."""
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {first}").getrandbits(63))
        return torch.randperm(self.positions, generator=generator)[: self.per_image]

    def pick(self, values: Tensor, first: int) -> Tensor:
        """Values of shape [N, C, P] of the images from ``first`` on, at the positions, as rows [R, C]."""
        rows = []
        for start in range(0, len(values), self.chunk):
            positions = self.of_chunk(first + start).to(values.device)
            rows.append(values[start : start + self.chunk].transpose(1, 2)[:, positions].flatten(0, 1))
        return torch.cat(rows)
