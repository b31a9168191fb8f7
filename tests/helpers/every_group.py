"""A network with every kind of dependency group, for the tests of planning and of removal."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from dnr_plugin.network.batchnorm import recalibrate_batchnorm
from dnr_plugin.network.dependencies import channel_groups, output_layers
from dnr_plugin.network.graph import build_graph


def images(samples: int, size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(seed))


def conv(first: int, second: int, kernel: int = 3, act: type[nn.Module] = nn.ReLU, **options: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(first, second, kernel, padding=kernel // 2, bias=False, **options), nn.BatchNorm2d(second), act()
    )


class Net(nn.Module):
    """Plain, residual, grouped and depthwise convolutions, and a hidden linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b = conv(3, 16), conv(16, 20), conv(20, 16)
        self.grouped, self.wide = conv(16, 24, groups=4), conv(24, 32, 1)
        self.depthwise = conv(32, 32, groups=32)
        self.hidden, self.fc = nn.Linear(32, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.b(self.a(x))
        x = self.depthwise(self.wide(self.grouped(x)))
        return self.fc(self.hidden(x.mean((2, 3))).relu())


X = images(1)


# root of each group of `Net`: neurons, channel groups
SIZES = {"b.0": (16, 4), "a.0": (20, 1), "grouped.0": (24, 4), "depthwise.0": (32, 1), "hidden": (24, 1)}


def lively(model: nn.Module, data: Tensor) -> nn.Module:
    """BatchNorm weights about 1 and biases 1, fitting statistics; linear layers whose biases outweigh their inputs.

    In an untrained network some neurons are really zero on a few samples. With activations of about mean 1 and
    deviation 1 before each ReLU, none that was not planted is.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.constant_(module.bias, 1.0)
        elif isinstance(module, nn.Linear):
            nn.init.constant_(module.bias, 1.0)
            module.weight.detach().mul_(0.1)
    recalibrate_batchnorm(model, data.split(32))
    return model.eval()


HIDDEN = sum(size for size, _ in SIZES.values())


def plant(model: nn.Module, example: Tensor, share: float, seed: int) -> dict[str, list[int]]:
    """Zeroes random neurons, in whole channel groups, at everything that makes them; returns root -> neurons."""
    draw, planted = random.Random(seed), {}
    names = {module: name for name, module in model.named_modules()}
    graph = build_graph(model, example)
    outputs = output_layers(model, example)
    for group in graph.get_all_groups():
        root = group[0].dep.target.module
        if root in outputs:
            continue
        width = len(group[0].idxs) // channel_groups(group)
        offsets = draw.sample(range(width), min(round(width * share), width - 1))
        gone = {k for k in range(len(group[0].idxs)) if k % width in offsets}
        if not gone:
            continue
        planted[names[root]] = sorted(gone)
        with torch.no_grad():
            for item in group.items:
                module = item.dep.target.module
                if graph.is_out_channel_pruning_fn(item.dep.handler) and isinstance(
                    module, nn.Conv2d | nn.Linear | nn.BatchNorm2d
                ):
                    channels = [c for c, r in zip(item.idxs, item.root_idxs, strict=True) if r in gone]
                    module.weight[channels] = 0.0
                    if module.bias is not None:
                        module.bias[channels] = 0.0
    return planted


def chain(*layers: nn.Module, act: type[nn.Module] = nn.ReLU, norm: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm or nn.BatchNorm2d(8), act(), *layers)
