"""The networks of the zoo, as their packages build them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dnr_plugin.models.foreign import torchvision_names


@dataclass(frozen=True)
class Entry:
    """A network, and the inputs that it takes.

    Attributes:
        name: in the table, PACKAGE.NETWORK.
        builder: what `build.rebuild` takes.
        shapes: of its inputs, without the samples.
        package: to be installed for it, as pip names it.
    """

    name: str
    builder: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...] = ((3, 64, 64),)
    package: str = "torchvision"
    wrapped: bool = field(default=False)


def _foreign(package: str, module: str, shape: tuple[int, ...], rows: dict[str, dict[str, Any]]) -> list[Entry]:
    """Networks that classes or functions of a module make."""
    return [
        Entry(f"{package}.{name}", {"name": f"{module}:{name.split('-')[0]}", "kwargs": kwargs}, (shape,), package)
        for name, kwargs in rows.items()
    ]


_IMAGE_2D = {"spatial_dims": 2, "in_channels": 1}
_UNET = {**_IMAGE_2D, "out_channels": 2, "channels": [8, 16, 32], "strides": [2, 2]}
_NNUNET = {
    **_IMAGE_2D, "out_channels": 2, "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2],
}  # fmt: skip
MONAI = _foreign(
    "monai", "monai.networks.nets", (1, 64, 64),
    {
        "UNet": _UNET,
        "UNet-residual": {**_UNET, "num_res_units": 2},
        "BasicUNet": {**_IMAGE_2D, "out_channels": 2, "features": [8, 8, 16, 32, 64, 8]},
        "AttentionUnet": _UNET,
        "SegResNet": {**_IMAGE_2D, "out_channels": 2, "init_filters": 8},
        "DynUNet": _NNUNET,
        "VNet": {**_IMAGE_2D, "out_channels": 2},
        "DenseNet121": {**_IMAGE_2D, "out_channels": 2},
        "EfficientNetBN": {**_IMAGE_2D, "model_name": "efficientnet-b0", "num_classes": 2, "pretrained": False},
        "SENet154": {**_IMAGE_2D, "num_classes": 2},
    },
)  # fmt: skip

SMP = _foreign(
    "segmentation_models_pytorch", "segmentation_models_pytorch", (3, 128, 128),
    {
        name: {"encoder_name": encoder, "encoder_weights": None, "classes": 2}
        for name, encoder in {
            "Unet": "resnet34", "UnetPlusPlus": "resnet18", "MAnet": "resnet18", "Linknet": "resnet18",
            "FPN": "mobilenet_v2", "PSPNet": "resnet18", "DeepLabV3": "resnet18", "DeepLabV3Plus": "efficientnet-b0",
            "PAN": "resnet18", "Segformer": "resnet18",
        }.items()
    },
)  # fmt: skip


# Images that a classifier of torchvision takes no smaller, or at one size alone; the others get 64 pixels.
_SIDES = {"inception_v3": 96, "alexnet": 96, "maxvit_t": 224}
_SIZED = {"vit_": {"image_size": 64}}


def _torchvision() -> list[Entry]:
    """All classifiers of torchvision."""
    rows = []
    for name in torchvision_names():
        more: dict[str, Any] = next((kwargs for start, kwargs in _SIZED.items() if name.startswith(start)), {})
        if name == "vit_h_14":
            more = {"image_size": 56}
        side = more.get("image_size", _SIDES.get(name, 64))
        builder = {"name": f"torchvision.{name}", "kwargs": {"num_classes": 10, **more}}
        rows.append(Entry(f"torchvision.{name}", builder, ((3, side, side),)))
    return rows


def entries() -> Iterator[Entry]:
    """All networks of the zoo, package by package."""
    yield from _torchvision()
    yield from MONAI
    yield from SMP
