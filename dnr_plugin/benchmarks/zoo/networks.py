"""The networks of the zoo, as their packages build them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dnr_plugin.errors import InputError, did_you_mean
from dnr_plugin.models.foreign import torchvision_names


@dataclass(frozen=True)
class Entry:
    """A network, and the input that it takes.

    Attributes:
        name: in the table, PACKAGE.NETWORK.
        builder: what `build.rebuild` takes.
        shape: of its input, without the samples.
        package: to be installed for it, as pip names it.
        trains: whether train mode takes images alone; detectors want boxes as well.
    """

    name: str
    builder: dict[str, Any]
    shape: tuple[int, ...]
    package: str = "torchvision"
    trains: bool = True


def _foreign(
    package: str, module: str, shape: tuple[int, ...], rows: Mapping[str, Mapping[str, Any]], *, trains: bool = True
) -> list[Entry]:
    """Networks that classes or functions of a module make."""
    return [
        Entry(
            f"{package}.{name}", {"name": f"{module}:{name.split('-')[0]}", "kwargs": dict(kwargs)}, shape, package,
            trains,
        )
        for name, kwargs in rows.items()
    ]  # fmt: skip


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


def _classifiers() -> list[Entry]:
    """All classifiers of torchvision."""
    rows = []
    for name in torchvision_names():
        sized = {"image_size": 56 if name == "vit_h_14" else 64} if name.startswith("vit_") else {}
        side = sized.get("image_size", _SIDES.get(name, 64))
        builder: dict[str, Any] = {"name": f"torchvision.{name}", "kwargs": {"num_classes": 10}}
        if sized:  # an argument of the function, where image_size means the data's
            builder = {"name": f"torchvision.models:{name}", "kwargs": {"num_classes": 10, "weights": None, **sized}}
        rows.append(Entry(f"torchvision.{name}", builder, (3, side, side)))
    return rows


_UNTRAINED = {"weights": None, "weights_backbone": None}
_SEGMENTING = {"num_classes": 2, **_UNTRAINED}
DENSE_TASKS = [
    *_foreign(
        "torchvision", "torchvision.models.segmentation", (3, 64, 64),
        dict.fromkeys(
            ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large"),
            _SEGMENTING,
        ),
    ),
    *_foreign(
        "torchvision", "torchvision.models.detection", (3, 128, 128),
        dict.fromkeys(
            ("fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn"), _SEGMENTING | {"min_size": 128}
        )
        | {"ssdlite320_mobilenet_v3_large": _SEGMENTING},
        trains=False,
    ),
    *_foreign("torchvision", "torchvision.models.video", (3, 8, 56, 56), {"r3d_18": {"weights": None}}),
]  # fmt: skip

TIMM = [
    Entry(
        f"timm.{name}", {"name": "timm:create_model", "kwargs": {"model_name": name, "num_classes": 10}},
        (3, side, side), "timm",
    )
    for side, names in {
        64: "resnet26d resnetv2_50 resnext26ts seresnet50 skresnet18 res2net50d resnest14d ecaresnet26t gcresnet33ts "
            "dla34 hrnet_w18_small vovnet39a ese_vovnet19b_dw cspresnet50 cspdarknet53 darknet53 dpn48b xception41 "
            "mobilenetv3_small_100 mobilenetv4_conv_small efficientnet_lite0 "
            "tinynet_e ghostnet_100 mnasnet_small lcnet_050 rexnet_100 repvgg_a0 nfnet_f0 densenetblur121d selecsls42 "
            "convnextv2_atto edgenext_xx_small fastvit_t8",
        128: "inception_resnet_v2 inception_v4",
        224: "deit_tiny_patch16_224 xcit_nano_12_p16_224 levit_128s pvt_v2_b0 poolformer_s12",
    }.items()
    for name in names.split()
]  # fmt: skip

ULTRALYTICS = [
    Entry(
        f"ultralytics.{name}",
        {"name": f"ultralytics.nn.tasks:{kind}", "kwargs": {"cfg": f"{name}.yaml", "verbose": False}},
        (3, 64, 64), "ultralytics", trains=kind == "ClassificationModel",
    )
    for kind, names in {
        "DetectionModel": "yolov3-tiny yolov5n yolov6n yolov8n yolov9t yolov10n yolo11n yolo12n",
        "SegmentationModel": "yolov8n-seg",
        "ClassificationModel": "yolov8n-cls",
    }.items()
    for name in names.split()
]  # fmt: skip


def entries() -> list[Entry]:
    """All networks of the zoo, package by package."""
    return [*_classifiers(), *DENSE_TASKS, *TIMM, *MONAI, *SMP, *ULTRALYTICS]


def chosen(patterns: Sequence[str]) -> list[Entry]:
    """The networks of these names or shell patterns, in the zoo's order.

    Raises:
        InputError: a pattern that fits none.
    """
    known = entries()
    names = [entry.name for entry in known]
    problems = [
        f"NETWORK: expected a network of the zoo (--list) or a pattern, found {pattern!r}{did_you_mean(pattern, names)}"
        for pattern in patterns
        if not fnmatch.filter(names, pattern)
    ]
    if problems:
        raise InputError(*problems)
    return [entry for entry in known if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in patterns)]
