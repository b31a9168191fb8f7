"""Networks by recipe name: built-in ones, torchvision's classifiers, and builders of the user's own."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dnr_plugin.activations import Activation, apply_spec, replace_activations
from dnr_plugin.errors import InputError, did_you_mean, first_line
from dnr_plugin.schema import ModelOptions

Stem = Literal["cifar", "imagenet"]

_RELU = Activation("relu")


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
        activation: Activation = _RELU,
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

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 64, activation: Activation = _RELU) -> None:
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
    activation: Activation = _RELU,
) -> nn.Module:
    return ResNet((2, 2, 2, 2), num_classes, in_channels, width, stem, activation)


def _resnet20(
    num_classes: int, in_channels: int, image_size: int, width: int = 16, activation: Activation = _RELU
) -> nn.Module:
    return ResNet((3, 3, 3), num_classes, in_channels, width, "cifar", activation)


def _resnet56(
    num_classes: int, in_channels: int, image_size: int, width: int = 16, activation: Activation = _RELU
) -> nn.Module:
    return ResNet((9, 9, 9), num_classes, in_channels, width, "cifar", activation)


def _vgg16_bn(
    num_classes: int, in_channels: int, image_size: int, width: int = 64, activation: Activation = _RELU
) -> nn.Module:
    if image_size < 32:
        raise InputError(f"model.name: expected images of at least 32 pixels a side for vgg16_bn, found {image_size}")
    return VGG16(num_classes, in_channels, width, activation)


def _mlp(
    num_classes: int,
    in_channels: int,
    image_size: int,
    hidden: Sequence[int] = (300, 100),
    activation: Activation = _RELU,
) -> nn.Module:
    units = [in_channels * image_size**2, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(units):
        layers += [nn.Linear(before, after), activation.module()]
    return nn.Sequential(*layers, nn.Linear(units[-1], num_classes))


_BUILTIN: dict[str, Callable[..., nn.Module]] = {
    "resnet18": _resnet18,
    "resnet20": _resnet20,
    "resnet56": _resnet56,
    "vgg16_bn": _vgg16_bn,
    "mlp": _mlp,
}
_SIZES = ("num_classes", "in_channels", "image_size")
_OPTIONS = ("width", "stem", "hidden")  # of some built-in networks
_ACTIVATION = ("activation", "negative_slope")  # of every network
# num_classes has an option of its own; the others would fetch weights or print about it.
_RESERVED = ("num_classes", "weights", "pretrained", "progress")


def model_names() -> list[str]:
    """Every name that ``model.name`` takes but ``module:function``; torchvision's as ``torchvision.NAME``."""
    return [*_BUILTIN, *(f"torchvision.{name}" for name in _torchvision_names())]


def check_model(options: ModelOptions) -> None:
    """Everything about the model that can be told without building it; a ``module:function`` is imported, not called.

    Raises:
        InputError: one line for each unknown name, option that the model does not have, or missing checkpoint.
    """
    problems = _name_problems(options.name)
    if not problems:
        problems = _option_problems(options)
    if options.checkpoint is not None:
        problems += _file_problems(Path(options.checkpoint))
    if problems:
        raise InputError(*problems)


def build_model(options: ModelOptions, num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """Build the network that ``options`` names and load ``options.checkpoint``, where there is one.

    Args:
        options: the recipe's ``model`` section.
        num_classes: classes of the data, >= 2; ``options.num_classes`` may only raise it.
        in_channels: channels of the images, 1 or more; torchvision's networks take 3.
        image_size: side of the images in pixels; the mlp depends on it.

    Returns:
        The model, in training mode, on the CPU. Its ``dnr_builder`` holds what :func:`rebuild` needs.

    Raises:
        InputError: unknown name, option that the model does not have, builder that fails, activations that cannot be
            replaced, checkpoint that does not fit.
    """
    check_model(options)
    if options.num_classes is not None:
        if options.num_classes < num_classes:
            raise InputError(
                f"model.num_classes: expected at least {num_classes}, the classes of the data, "
                f"found {options.num_classes}"
            )
        num_classes = options.num_classes
    name = options.name
    if ":" in name:
        kwargs = dict(options.kwargs)
        if _takes_num_classes(_user_function(name)):
            kwargs["num_classes"] = num_classes
        model = _build_user(name, kwargs)
    elif name.startswith("torchvision."):
        if in_channels != 3:
            raise InputError(f"model.name: expected images of 3 channels for {name}, found {in_channels}")
        kwargs = {**options.kwargs, "num_classes": num_classes}
        model = _build_torchvision(name, kwargs)
    else:
        kwargs = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
        given = {key: value for key in _OPTIONS if (value := getattr(options, key)) is not None}
        model = _BUILTIN[name](**kwargs, **given, activation=_activation(options) or _RELU)
        kwargs |= given | {key: value for key in _ACTIVATION if (value := getattr(options, key)) is not None}
    _remember(model, name, kwargs)
    chosen = _activation(options)
    if chosen is not None and name not in _BUILTIN:
        from dnr_plugin.checks import example_image

        example = example_image(in_channels, image_size)
        replace_activations(model, chosen.name, chosen.negative_slope, example=example)
    if options.checkpoint is not None:
        load_checkpoint(model, options.checkpoint)
    return model


def rebuild(spec: Mapping[str, Any], allow_import: bool = False) -> nn.Module:
    """Build again, with fresh weights, the architecture that ``model.dnr_builder`` describes.

    Args:
        spec: ``{"name": str, "kwargs": dict}``, plain JSON data; it may come from an untrusted file. Where activations
            were replaced, also ``"activation"``: see `activations.Replacement.spec`.
        allow_import: let a ``module:function`` spec import and call that function. Nothing else runs foreign code.

    Raises:
        InputError: malformed spec, unknown name or argument, or a spec that needs ``allow_import``.
    """
    model = _rebuild(spec, allow_import)
    if "activation" in spec:
        apply_spec(model, spec["activation"])
        _remember(model, spec["name"], spec["kwargs"], spec["activation"])
    return model


def _rebuild(spec: Mapping[str, Any], allow_import: bool) -> nn.Module:
    name, kwargs = spec.get("name"), spec.get("kwargs")
    if not isinstance(name, str) or not isinstance(kwargs, dict):
        raise InputError(f"architecture: expected a name and a mapping of kwargs, found {_short(dict(spec))}")
    if ":" in name:
        if not allow_import:
            raise InputError(
                f"architecture: {name} is a function outside this package and would run its code; "
                "pass allow_import=True if you trust it"
            )
        model = _build_user(name, kwargs)
        _remember(model, name, kwargs)
        return model
    sizes = {key: kwargs[key] for key in _SIZES if key in kwargs}
    rest = {key: value for key, value in kwargs.items() if key not in _SIZES}
    if "num_classes" not in sizes or any(type(size) is not int or size < 1 for size in sizes.values()):
        raise InputError(f"architecture: expected a num_classes and sizes of at least 1, found {_short(kwargs)}")
    try:
        fields = {"kwargs": rest} if name.startswith("torchvision.") else rest
        # What the options do not know at all (checkpoint: a spec holds no file names) is refused here, not passed on.
        if unknown := sorted(set(fields) - {"kwargs", *_OPTIONS, *_ACTIVATION}):
            raise InputError(f"architecture: {name} has no argument {', '.join(unknown)}")
        options = ModelOptions(name=name, **fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"architecture: {where}: {first['msg']}, found {_short(first['input'])}") from error
    return build_model(options, **sizes)


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a state_dict into ``model``, in place, without running code from the file.

    Args:
        model: receives the values; its dtypes and devices stay.
        path: ``.safetensors``, or anything ``torch.load(weights_only=True)`` reads: a state_dict, or a dict that holds
            one under ``state_dict``, ``model`` or ``net``. A ``module.`` before every key is taken off.

    Raises:
        InputError: missing or damaged file, pickle that needs code, keys or shapes that differ; the model is unchanged.
    """
    path = Path(path)
    if problems := _file_problems(path):
        raise InputError(*problems)
    found = _state_dict(_read_checkpoint(path), path)
    if all(key.startswith("module.") for key in found):
        found = {key.removeprefix("module."): value for key, value in found.items()}
    expected = model.state_dict()
    # PyTorch before 0.4.1 did not count batches; nothing but a BatchNorm with momentum None reads the count.
    missing = [key for key in expected if key not in found and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in found if key not in expected]
    shapes = [
        f"{key} expected {list(expected[key].shape)} found {list(value.shape)}"
        for key, value in found.items()
        if key in expected and expected[key].shape != value.shape
    ]
    problems = [
        f"model.checkpoint: {path}: {len(entries)} of {total} {what}: {', '.join(entries[:5])}"
        + (", ..." if len(entries) > 5 else "")
        for what, entries, total in (
            ("keys of the model are missing", missing, len(expected)),
            ("keys in the file are unexpected", unexpected, len(found)),
            ("shapes differ", shapes, len(expected)),
        )
        if entries
    ]
    if problems:
        raise InputError(*problems)
    model.load_state_dict(found, strict=False)


def _read_checkpoint(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        # torch.load reports a pickle that names anything but tensors this way, and some damaged files too.
        needs = re.search(r"GLOBAL ([\w.]+)", str(error))
        if needs is None:
            raise InputError(f"model.checkpoint: {path}: expected a state_dict, the file is damaged") from error
        raise InputError(
            f"model.checkpoint: {path}: expected tensors only, found a pickle that needs code ({needs[1]}), which is "
            "not run; save model.state_dict() instead"
        ) from error
    except Exception as error:  # damaged files raise a dozen types: KeyError, EOFError, RuntimeError, ...
        raise InputError(
            f"model.checkpoint: {path}: cannot be read, the file is damaged ({first_line(error)})"
        ) from error


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, dict):
        for key in ("state_dict", "model", "net"):
            if isinstance(content.get(key), dict):
                content = content[key]
                break
        if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
            return dict(content)
        what = f"a dict with {', '.join(map(str, list(content)[:5])) or 'nothing'}"
    else:
        what = f"a {type(content).__name__}"
    raise InputError(
        f"model.checkpoint: {path}: expected a state_dict, or a dict with one under state_dict, model or net, "
        f"found {what}"
    )


def _file_problems(path: Path) -> list[str]:
    if path.is_file():
        return []
    return [f"model.checkpoint: expected a file, found {'the folder' if path.is_dir() else 'nothing at'} {path}"]


def _name_problems(name: str) -> list[str]:
    if ":" in name:
        return []
    if name.startswith("torchvision."):
        known = [f"torchvision.{known}" for known in _torchvision_names()]
        if name in known:
            return []
        names = ", ".join(known)
        return [f"model.name: expected one of {names}, found {name!r}{did_you_mean(name, known)}"]
    if name in _BUILTIN:
        return []
    near = f"; did you mean 'torchvision.{name}'?" if name in _torchvision_names() else did_you_mean(name, _BUILTIN)
    return [
        f"model.name: expected one of {', '.join(_BUILTIN)}, torchvision.NAME or module:function, found {name!r}{near}"
    ]


def _option_problems(options: ModelOptions) -> list[str]:
    """Options that the (known) model does not have, and values that it refuses."""
    name, builtin = options.name, _BUILTIN.get(options.name)
    has = inspect.signature(builtin).parameters if builtin else {}
    problems = [
        f"model.{key}: expected nothing for {name}, which has no such option, found {value}"
        for key in _OPTIONS
        if (value := getattr(options, key)) is not None and key not in has
    ]
    if options.negative_slope is not None and options.activation != "leaky_relu":
        with_what = f"activation {options.activation}" if options.activation else "no activation leaky_relu"
        problems.append(f"model.negative_slope: expected nothing with {with_what}, found {options.negative_slope:g}")
    if builtin:
        if options.kwargs:
            problems.append(f"model.kwargs: expected nothing for {name}, found {_short(options.kwargs)}")
        return problems
    try:
        json.dumps(options.kwargs)
    except (TypeError, ValueError) as error:
        return [
            *problems,
            f"model.kwargs: expected plain values (numbers, strings, lists, mappings): {first_line(error)}",
        ]
    if reserved := [key for key in _RESERVED if key in options.kwargs and (":" not in name or key == "num_classes")]:
        instead = {"num_classes": "model.num_classes", "progress": "nothing"}
        return problems + [
            f"model.kwargs.{key}: expected {instead.get(key, 'model.checkpoint')} instead of it, "
            f"found {options.kwargs[key]!r}"
            for key in reserved
        ]
    if ":" in name:
        return problems + _user_problems(options)
    if options.kwargs:
        try:
            with torch.device("meta"):
                _build_torchvision(name, dict(options.kwargs))
        except NotImplementedError:
            pass  # the RegNets compute their widths with tensors, so only the real build can judge their arguments
        except InputError as error:
            problems += error.problems
    return problems


def _activation(options: ModelOptions) -> Activation | None:
    if options.activation is None:
        return None
    return Activation(options.activation, 0.01 if options.negative_slope is None else options.negative_slope)


def _torchvision_names() -> list[str]:
    import torchvision  # type: ignore[import-untyped, unused-ignore]

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _build_torchvision(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    import torchvision

    short = name.removeprefix("torchvision.")
    # Auxiliary heads lie outside what is traced; without init_weights these two warn that its default will change.
    fixed = {"aux_logits": False, "init_weights": True} if short in ("googlenet", "inception_v3") else {}
    try:
        model: nn.Module = torchvision.models.get_model(short, **{"weights": None, **fixed, **kwargs})
    except NotImplementedError:
        raise
    except Exception as error:
        given = {key: value for key, value in kwargs.items() if key != "num_classes"}
        raise InputError(f"model.kwargs: {name} refuses {_short(given)}: {first_line(error)}") from error
    return model


@contextmanager
def _importable_here() -> Iterator[None]:
    """The current directory first on the import path, as under ``python -m``; ``dnr`` does not put it there."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _user_function(name: str) -> Callable[..., Any]:
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise InputError(f"model.name: expected module:function, found {name!r}")
    try:
        with _importable_here():
            module = importlib.import_module(module_name)
    except Exception as error:
        # The module itself or a package above it; an import that fails inside it is the module's own error.
        parents = [".".join(module_name.split(".")[: i + 1]) for i in range(module_name.count(".") + 1)]
        if isinstance(error, ModuleNotFoundError) and error.name in parents:
            raise InputError(f"model.name: no module {error.name!r} on the Python path or in {os.getcwd()}") from error
        what = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"model.name: importing {module_name} raised {what}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(
            f"model.name: expected a function {function_name!r} in {module_name}, "
            f"found {', '.join(known) or 'none'}{did_you_mean(function_name, known)}"
        )
    found: Callable[..., Any] = function
    return found


def _takes_num_classes(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # written in C, without a signature
        return False
    return any(
        p.kind is p.VAR_KEYWORD or (p.name == "num_classes" and p.kind is not p.POSITIONAL_ONLY) for p in parameters
    )


def _user_problems(options: ModelOptions) -> list[str]:
    try:
        function = _user_function(options.name)
    except InputError as error:
        return list(error.problems)
    takes = _takes_num_classes(function)
    if options.num_classes is not None and not takes:
        found = options.num_classes
        return [f"model.num_classes: expected nothing for {options.name}, which takes no num_classes, found {found}"]
    try:
        signature = inspect.signature(function)
    except ValueError:
        return []
    try:
        signature.bind(**options.kwargs, **({"num_classes": 2} if takes else {}))
    except TypeError as error:
        return [f"model.kwargs: {options.name}{signature} refuses {_short(options.kwargs)}: {first_line(error)}"]
    return []


def _build_user(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    function = _user_function(name)
    try:
        with _importable_here():
            model = function(**kwargs)
    except Exception as error:
        raise InputError(f"model.name: {name} raised {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"model.name: expected a torch.nn.Module from {name}, it returned {_short(model)}")
    return model


def _remember(
    model: nn.Module, name: str, kwargs: Mapping[str, Any], activation: Mapping[str, Any] | None = None
) -> None:
    spec = {"name": name, "kwargs": dict(kwargs)} | ({} if activation is None else {"activation": dict(activation)})
    # A copy through JSON: the description must not change when the caller's mapping does.
    setattr(model, "dnr_builder", json.loads(json.dumps(spec)))  # noqa: B010


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 120 else f"{text[:117]}..."
