"""Builders that are not this package's: torchvision's, and functions of the user's own."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from dnr_plugin.errors import InputError, did_you_mean, first_line


def torchvision_names(*, every: bool = False) -> list[str]:
    """torchvision's classifiers, and with ``every`` its networks for segmentation, detection and video as well."""
    import torchvision  # type: ignore[import-untyped, unused-ignore]

    models = torchvision.models
    modules = [models, models.segmentation, models.detection, models.video] if every else [models]
    return [name for module in modules for name in models.list_models(module=module)]


def build_torchvision(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    import torchvision

    short = name.removeprefix("torchvision.")
    # Auxiliary heads lie outside what is traced; without init_weights these two warn that its default will change.
    fixed: dict[str, Any] = (
        {"aux_logits": False, "init_weights": True} if short in ("googlenet", "inception_v3") else {}
    )
    if "weights_backbone" in inspect.signature(torchvision.models.get_model_builder(short)).parameters:
        fixed["weights_backbone"] = None  # by default they would be downloaded
    try:
        model: nn.Module = torchvision.models.get_model(short, **{"weights": None, **fixed, **kwargs})
    except NotImplementedError:
        raise
    except Exception as error:
        given = {key: value for key, value in kwargs.items() if key != "num_classes"}
        raise InputError(f"model.kwargs: {name} refuses {shortened(given)}: {first_line(error)}") from error
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


def user_function(name: str) -> Callable[..., Any]:
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise InputError(f"model.name: expected module:function, found {name!r}")
    try:
        with _importable_here():
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
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
    checked: Callable[..., Any] = function
    return checked


def takes_num_classes(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # written in C, without a signature
        return False
    return any(
        p.kind is p.VAR_KEYWORD or (p.name == "num_classes" and p.kind is not p.POSITIONAL_ONLY) for p in parameters
    )


def build_user(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    function = user_function(name)
    try:
        with _importable_here():
            model = function(**kwargs)
    except (Exception, SystemExit) as error:
        raise InputError(f"model.name: {name} raised {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"model.name: expected a torch.nn.Module from {name}, it returned {shortened(model)}")
    return model


def shortened(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 120 else f"{text[:117]}..."
