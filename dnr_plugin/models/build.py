"""Builds the network that a recipe names, and builds again what a saved model describes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from dnr_plugin.devices import check_memory
from dnr_plugin.errors import InputError
from dnr_plugin.models.activations.replacing import apply_spec, replace_activations
from dnr_plugin.models.foreign import build_torchvision, build_user, shortened, takes_num_classes, user_function
from dnr_plugin.models.networks import BUILTIN, RELU
from dnr_plugin.models.options import ACTIVATION_OPTIONS, NETWORK_OPTIONS, check_model, chosen_activation
from dnr_plugin.models.state_dicts import load_checkpoint
from dnr_plugin.recipe.sections import ModelOptions

_COPIES = 4  # of the weights: gradients, momentum, and the model as it was built
_LARGEST = 1_000_000
_SIZES = ("num_classes", "in_channels", "image_size")


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
        if takes_num_classes(user_function(name)):
            kwargs["num_classes"] = num_classes
        model = build_user(name, kwargs)
    elif name.startswith("torchvision."):
        if in_channels != 3:
            raise InputError(f"model.name: expected images of 3 channels for {name}, found {in_channels}")
        kwargs = {**options.kwargs, "num_classes": num_classes}
        model = _fitting(partial(build_torchvision, name, kwargs))
    else:
        kwargs = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
        given = {key: value for key in NETWORK_OPTIONS if (value := getattr(options, key)) is not None}
        model = _fitting(partial(BUILTIN[name], **kwargs, **given, activation=chosen_activation(options) or RELU))
        kwargs |= given | {key: value for key in ACTIVATION_OPTIONS if (value := getattr(options, key)) is not None}
    _remember(model, name, kwargs)
    chosen = chosen_activation(options)
    if chosen is not None and name not in BUILTIN:
        from dnr_plugin.models.examples import example_image

        example = example_image(in_channels, image_size)
        replace_activations(model, chosen.name, chosen.negative_slope, example=example)
    if options.checkpoint is not None:
        load_checkpoint(model, options.checkpoint)
    return model


def _fitting(make: Callable[[], nn.Module]) -> nn.Module:
    """A network whose weights, with what training needs beside them, fit into the memory.

    Raises:
        InputError: they do not; it was not made.
    """
    try:
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in make().parameters())
    except (NotImplementedError, RuntimeError):
        parameters = 0  # the RegNets compute their widths with tensors
    check_memory(_COPIES * 4 * parameters, "model", f"{parameters:.3g} parameters with gradients and momentum")
    return make()


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
        raise InputError(f"architecture: expected a name and a mapping of kwargs, found {shortened(dict(spec))}")
    if ":" in name:
        if not allow_import:
            raise InputError(
                f"architecture: {name} is a function outside this package and would run its code; "
                "pass allow_import=True if you trust it"
            )
        model = build_user(name, kwargs)
        _remember(model, name, kwargs)
        return model
    sizes = {key: kwargs[key] for key in _SIZES if key in kwargs}
    rest = {key: value for key, value in kwargs.items() if key not in _SIZES}
    if "num_classes" not in sizes or any(type(size) is not int or not 1 <= size <= _LARGEST for size in sizes.values()):
        raise InputError(
            f"architecture: expected a num_classes and sizes from 1 to {_LARGEST}, found {shortened(kwargs)}"
        )
    try:
        fields = {"kwargs": rest} if name.startswith("torchvision.") else rest
        # What the options do not know at all (checkpoint: a spec holds no file names) is refused here, not passed on.
        if unknown := sorted(set(fields) - {"kwargs", *NETWORK_OPTIONS, *ACTIVATION_OPTIONS}):
            raise InputError(f"architecture: {name} has no argument {', '.join(unknown)}")
        options = ModelOptions(name=name, **fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"architecture: {where}: {first['msg']}, found {shortened(first['input'])}") from error
    return build_model(options, **sizes)


def _remember(
    model: nn.Module, name: str, kwargs: Mapping[str, Any], activation: Mapping[str, Any] | None = None
) -> None:
    spec = {"name": name, "kwargs": dict(kwargs)} | ({} if activation is None else {"activation": dict(activation)})
    # A copy through JSON: the description must not change when the caller's mapping does.
    setattr(model, "dnr_builder", json.loads(json.dumps(spec)))  # noqa: B010
