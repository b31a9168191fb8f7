"""The built-in networks: ResNets of basic blocks, VGG-16 and a multilayer perceptron."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from dnr_plugin.errors import InputError
from dnr_plugin.models.activations.choice import Activation

Stem = Literal["cifar", "imagenet"]
RELU = Activation("relu")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; [N, in, H, W] -> [N, out, H / stride, W / stride].

    The two activations are modules of their own (torchvision shares one), so that a hook sees each place apart.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = activation.module()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = activation.module()
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        out: Tensor = self.act2(x + shortcut)
        return out


class ResNet(nn.Module):
    """A ResNet of basic blocks whose parameters are named like torchvision's; [N, C, H, W] -> [N, num_classes].

    Args:
        blocks: blocks of each stage; stage i has ``width * 2**i`` channels, every stage but the first halves the image.
        num_classes: outputs.
        in_channels: channels of the images.
        width: channels of the first stage.
        stem: ``cifar``: 3x3 convolution of stride 1; ``imagenet``: 7x7 of stride 2, then max-pooling of stride 2.
        activation: after every BatchNorm but those that end a shortcut.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        num_classes: int,
        in_channels: int = 3,
        width: int = 64,
        stem: Stem = "cifar",
        activation: Activation = RELU,
    ) -> None:
        super().__init__()
        kernel, stride, padding = (3, 1, 1) if stem == "cifar" else (7, 2, 3)
        self.conv1 = nn.Conv2d(in_channels, width, kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = activation.module()
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, stride=2, padding=1)
        self.stages: list[str] = []
        channels = width
        for i, count in enumerate(blocks):
            out = width * 2**i
            stage = [BasicBlock(channels, out, 1 if i == 0 else 2, activation)]
            stage += [BasicBlock(out, out, 1, activation) for _ in range(count - 1)]
            self.stages.append(f"layer{i + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*stage))
            channels = out
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        out: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return out


class VGG16(nn.Module):
    """VGG-16 with BatchNorm: 13 convolutions, five max-poolings, one Linear; [N, C, H, W] -> [N, num_classes], H >= 32.

    The convolutions keep their biases, which BatchNorm makes redundant, so that usual checkpoints fit.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 64, activation: Activation = RELU) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for multiple, count in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            out = width * multiple
            for _ in range(count):
                layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), activation.module()]
                channels = out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return out


def _init_convolutions(model: nn.Module) -> None:
    """Kaiming's normal initialisation (fan-out), as torchvision's; PyTorch's default for everything else."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _resnet18(
    num_classes: int,
    in_channels: int,
    image_size: int,
    width: int = 64,
    stem: Stem = "cifar",
    activation: Activation = RELU,
) -> nn.Module:
    return ResNet((2, 2, 2, 2), num_classes, in_channels, width, stem, activation)


def _resnet20(
    num_classes: int, in_channels: int, image_size: int, width: int = 16, activation: Activation = RELU
) -> nn.Module:
    return ResNet((3, 3, 3), num_classes, in_channels, width, "cifar", activation)


def _resnet56(
    num_classes: int, in_channels: int, image_size: int, width: int = 16, activation: Activation = RELU
) -> nn.Module:
    return ResNet((9, 9, 9), num_classes, in_channels, width, "cifar", activation)


def _vgg16_bn(
    num_classes: int, in_channels: int, image_size: int, width: int = 64, activation: Activation = RELU
) -> nn.Module:
    if image_size < 32:
        raise InputError(f"model.name: expected images of at least 32 pixels a side for vgg16_bn, found {image_size}")
    return VGG16(num_classes, in_channels, width, activation)


def _mlp(
    num_classes: int,
    in_channels: int,
    image_size: int,
    hidden: Sequence[int] = (300, 100),
    activation: Activation = RELU,
) -> nn.Module:
    units = [in_channels * image_size**2, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(units):
        layers += [nn.Linear(before, after), activation.module()]
    return nn.Sequential(*layers, nn.Linear(units[-1], num_classes))


BUILTIN: dict[str, Callable[..., nn.Module]] = {
    "resnet18": _resnet18,
    "resnet20": _resnet20,
    "resnet56": _resnet56,
    "vgg16_bn": _vgg16_bn,
    "mlp": _mlp,
}
