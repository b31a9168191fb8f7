"""What can be wrong with a recipe's ``model`` section, told without building the network."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import torch

from dnr_plugin.errors import InputError, did_you_mean, first_line
from dnr_plugin.models.activations.choice import Activation
from dnr_plugin.models.foreign import build_torchvision, shortened, takes_num_classes, torchvision_names, user_function
from dnr_plugin.models.networks import BUILTIN
from dnr_plugin.models.state_dicts import file_problems
from dnr_plugin.recipe.sections import ModelOptions

NETWORK_OPTIONS = ("width", "stem", "hidden")  # of some built-in networks
ACTIVATION_OPTIONS = ("activation", "negative_slope")  # of every network
# num_classes has an option of its own; the others would fetch weights or print about it.
_RESERVED = ("num_classes", "weights", "weights_backbone", "pretrained", "progress")


def model_names() -> list[str]:
    """Every name that ``model.name`` takes but ``module:function``; torchvision's as ``torchvision.NAME``."""
    return [*BUILTIN, *(f"torchvision.{name}" for name in torchvision_names())]


def check_model(options: ModelOptions) -> None:
    """Everything about the model that can be told without building it; a ``module:function`` is imported, not called.

    Raises:
        InputError: one line for each unknown name, option that the model does not have, or missing checkpoint.
    """
    problems = _name_problems(options.name)
    if not problems:
        problems = _option_problems(options)
    if options.checkpoint is not None:
        problems += file_problems(Path(options.checkpoint))
    if problems:
        raise InputError(*problems)


def _name_problems(name: str) -> list[str]:
    if ":" in name:
        return []
    if name.startswith("torchvision."):
        known = [f"torchvision.{known}" for known in torchvision_names(every=True)]
        if name in known:
            return []
        names = ", ".join(known)
        return [f"model.name: expected one of {names}, found {shortened(name)}{did_you_mean(name, known)}"]
    if name in BUILTIN:
        return []
    near = (
        f"; did you mean 'torchvision.{name}'?"
        if name in torchvision_names(every=True)
        else did_you_mean(name, BUILTIN)
    )
    return [
        f"model.name: expected one of {', '.join(BUILTIN)}, torchvision.NAME or module:function, "
        f"found {shortened(name)}{near}"
    ]


def _option_problems(options: ModelOptions) -> list[str]:
    """Options that the (known) model does not have, and values that it refuses."""
    name, builtin = options.name, BUILTIN.get(options.name)
    has = inspect.signature(builtin).parameters if builtin else {}
    problems = [
        f"model.{key}: expected nothing for {name}, which has no such option, found {value}"
        for key in NETWORK_OPTIONS
        if (value := getattr(options, key)) is not None and key not in has
    ]
    if options.negative_slope is not None and options.activation != "leaky_relu":
        with_what = f"activation {options.activation}" if options.activation else "no activation leaky_relu"
        problems.append(f"model.negative_slope: expected nothing with {with_what}, found {options.negative_slope:g}")
    if builtin:
        if options.kwargs:
            problems.append(f"model.kwargs: expected nothing for {name}, found {shortened(options.kwargs)}")
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
                build_torchvision(name, dict(options.kwargs))
        except NotImplementedError:
            pass  # the RegNets compute their widths with tensors, so only the real build can judge their arguments
        except InputError as error:
            problems += error.problems
    return problems


def chosen_activation(options: ModelOptions) -> Activation | None:
    if options.activation is None:
        return None
    return Activation(options.activation, 0.01 if options.negative_slope is None else options.negative_slope)


def _user_problems(options: ModelOptions) -> list[str]:
    try:
        function = user_function(options.name)
    except InputError as error:
        return list(error.problems)
    takes = takes_num_classes(function)
    if options.num_classes is not None and not takes:
        given = options.num_classes
        return [f"model.num_classes: expected nothing for {options.name}, which takes no num_classes, found {given}"]
    try:
        signature = inspect.signature(function)
    except ValueError:
        return []
    try:
        signature.bind(**options.kwargs, **({"num_classes": 2} if takes else {}))
    except TypeError as error:
        return [f"model.kwargs: {options.name}{signature} refuses {shortened(options.kwargs)}: {first_line(error)}"]
    return []
