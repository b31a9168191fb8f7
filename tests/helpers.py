"""Small networks shared by the tests, and how far rounding may take their outputs. Append only."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNIT = 2.0**-24  # unit roundoff of float32


def rounding(terms: int, layers: int = 1) -> float:
    """Relative error of float32 outputs behind so many layers, each a sum of so many products, in whatever order.

    Of one sum it is about ``sqrt(terms) * UNIT`` (Higham and Mary, *A New Approach to Probabilistic Rounding Error
    Analysis*, SIAM 2019), and errors of layers add up; ten times that, for what cancels in a sum.
    """
    return 10.0 * layers * terms**0.5 * UNIT


class Plain(nn.Module):
    """Three convolutions and a classifier behind a flatten of 2 x 2 positions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.b = nn.Conv2d(width, width, 3, padding=1)
        self.c = nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.a(x)))
        x = F.relu(self.c(F.relu(self.b(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Residual(nn.Module):
    """A stem and two residual blocks that share one ReLU, in place."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.a1 = nn.Conv2d(width, width, 3, padding=1)
        self.a2 = nn.Conv2d(width, width, 3, padding=1)
        self.b1 = nn.Conv2d(width, width, 3, padding=1)
        self.b2 = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(self.a2(self.relu(self.a1(x))) + x)
        x = self.relu(self.b2(self.relu(self.b1(x))) + x)
        return self.fc(x.mean((2, 3)))


class Dense(nn.Module):
    """Two layers whose outputs are concatenated, and read by two consumers at different offsets."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.d1 = nn.Conv2d(width, 4, 3, padding=1)
        self.d2 = nn.Conv2d(width + 4, 4, 3, padding=1)
        self.fc = nn.Linear(width + 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([x, F.relu(self.d1(x))], 1)
        x = torch.cat([F.relu(self.d2(x)), x], 1)
        return self.fc(x.mean((2, 3)))


class Grouped(nn.Module):
    """A grouped convolution between two plain ones."""

    def __init__(self, width: int = 12, groups: int = 3) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.g = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.b = nn.Conv2d(width, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.g(F.relu(self.a(x))))
        return self.fc(F.relu(self.b(x)).mean((2, 3)))


class Mobile(nn.Module):
    """An inverted bottleneck: expand, depthwise, project."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.expand = nn.Conv2d(6, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.project = nn.Conv2d(12, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.project(F.relu(self.depthwise(F.relu(self.expand(x)))))
        return self.fc(x.mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "residual": Residual,
    "concat": Dense,
    "grouped": Grouped,
    "mobile": Mobile,
}


def make(name: str, seed: int = 0) -> nn.Module:
    """A network of `NETS` in eval mode with weights from a seed."""
    torch.manual_seed(seed)
    return NETS[name]().eval()


def images(n: int = 8, seed: int = 1, size: int = 8) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))
