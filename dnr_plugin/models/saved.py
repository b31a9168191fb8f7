"""Saving and loading of physically pruned models without pickled code.

A pruned model is a dense one, built anew, in which some layers have other sizes. So its description is the builder's
name and arguments, what differs in each module's plain attributes, and the shape of each tensor.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from dnr_plugin.errors import InputError
from dnr_plugin.files import atomic_write
from dnr_plugin.network.attention import split_modules
from dnr_plugin.network.calling import copied, eager
from dnr_plugin.network.splitting import split_named

FORMAT = 1
ARCHITECTURE, WEIGHTS = "architecture.json", "model.safetensors"
_PLAIN = (bool, int, float, str, type(None))


def describe(
    model: nn.Module, builder: Mapping[str, Any] | None = None, *, fresh: nn.Module | None = None
) -> dict[str, Any]:
    """What is needed, besides the tensors, to build a pruned model again; plain JSON data.

    Args:
        model: pruned or dense.
        builder: ``{"name": ..., "kwargs": {...}}`` of the dense model, as in a recipe ("resnet18",
            "torchvision.resnet50", "module:function"); by default what `build.build_model` left on the model.
        fresh: what the builder makes, where it was called before; not changed.

    Raises:
        ValueError: the builder is unknown, or makes modules of other names or types.
    """
    from dnr_plugin.models.build import rebuild

    builder = builder or getattr(model, "dnr_builder", None)
    if builder is None:
        raise ValueError(
            "builder: expected {'name': ..., 'kwargs': {...}} of the dense model, since this one was not made by "
            "dnr_plugin, found nothing; e.g. {'name': 'torchvision.resnet50', 'kwargs': {'num_classes': 1000}}"
        )
    fresh = fresh or rebuild(builder, allow_import=True)
    _materialise(fresh)
    split = list(split_modules(model))
    if split != list(split_modules(fresh)):
        fresh = copied(fresh)
        split_named(fresh, split)
    ours, theirs = dict(model.named_modules()), dict(fresh.named_modules())
    differing = [name for name in {**ours, **theirs} if type(ours.get(name)) is not type(theirs.get(name))]
    if differing:
        raise ValueError(
            f"builder: {builder['name']} makes another model: {', '.join(repr(name) for name in differing[:5])} differ"
        )
    changed, lists = {}, {}
    for name, module in ours.items():
        before, after = _attributes(theirs[name]), _attributes(module)
        altered = {key: value for key, value in after.items() if key not in before or before[key] != value}
        if altered:
            changed[name] = altered
            lists[name] = [key for key in altered if isinstance(getattr(module, key), list)]
    tensors, extra = _state(model)
    architecture = {
        "format": FORMAT,
        "builder": dict(builder),
        "modules": changed,
        "tensors": {
            name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in tensors.items()
        },
    }
    # only where there is anything of the kind, so that most files are as they always were
    more = {
        "split_attention": split,
        "lists": {name: keys for name, keys in lists.items() if keys},
        "buffers": sorted({*tensors} - {*model.state_dict()}),
        "extra_state": extra,
    }
    if _frozen(model) != _frozen(fresh):
        architecture["frozen"] = _frozen(model)
    return architecture | {key: value for key, value in more.items() if value}


def build(architecture: Mapping[str, Any], allow_import: bool = False, *, fresh: nn.Module | None = None) -> nn.Module:
    """Builds the model of an architecture, with tensors of the right shapes and no meaning.

    Args:
        architecture: as `describe` returns it.
        allow_import: let its builder be imported and called.
        fresh: what its builder makes, where that was called before; changed. The builder is not called then.

    Raises:
        InputError: the description is not one, or needs a function outside of this package and ``allow_import`` is
            not given.
    """
    from dnr_plugin.models.build import rebuild

    if architecture.get("format") != FORMAT or not isinstance(architecture.get("tensors"), dict):
        raise InputError(
            f"{ARCHITECTURE}: expected a description of format {FORMAT}, found {architecture.get('format')}"
        )
    model = fresh or rebuild(architecture["builder"], allow_import)
    _materialise(model)
    lists = architecture.get("lists", {})
    try:
        split_named(model, architecture.get("split_attention", ()))
        modules = dict(model.named_modules(remove_duplicate=False))  # tensors have every name of theirs
        for name, attributes in architecture["modules"].items():
            for key, value in attributes.items():
                _check_attribute(modules[name], key, value)
                sequence = isinstance(value, list) and key not in lists.get(name, ())
                setattr(modules[name], key, tuple(value) if sequence else value)
        for name, tensor in architecture["tensors"].items():
            owner, _, key = name.rpartition(".")
            _set_tensor(modules[owner], key, tensor["shape"], getattr(torch, tensor["dtype"]))
        if "frozen" in architecture:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name not in architecture["frozen"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{ARCHITECTURE}: does not fit {architecture['builder'].get('name')}: {error!r}") from error
    return model


def save_pruned(model: nn.Module, folder: str | os.PathLike[str], builder: Mapping[str, Any] | None = None) -> None:
    """Writes a model as ``model.safetensors`` and ``architecture.json``; no pickle.

    Args:
        model: pruned or dense, on any device.
        folder: made where it does not exist.
        builder: see `describe`; needed for models that dnr_plugin did not build.

    Raises:
        ValueError: see `describe`.
    """
    model = eager(model)
    write_saved(model, folder, describe(model, builder))


def write_saved(model: nn.Module, folder: str | os.PathLike[str], architecture: Mapping[str, Any]) -> None:
    """`save_pruned` for a model whose architecture was described before."""
    from safetensors.torch import save

    # shared tensors are written once for each name: safetensors refuses views of the same memory
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in _state(model)[0].items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / WEIGHTS, "wb") as file:
        file.write(save(tensors))
    with atomic_write(folder / ARCHITECTURE) as file:
        json.dump(architecture, file, indent=1)


def load_pruned(folder: str | os.PathLike[str], allow_import: bool = False) -> nn.Module:
    """Loads what `save_pruned` wrote; outputs are equal to the bit.

    Args:
        folder: with ``architecture.json`` and ``model.safetensors``.
        allow_import: let an architecture whose builder is a ``module:function`` outside of this package import and
            call it. Without it nothing in the folder can run code.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        InputError: a file is missing, damaged or does not fit the other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in (ARCHITECTURE, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: expected a folder with {ARCHITECTURE} and {WEIGHTS}, found no {name}")
    try:
        architecture = json.loads((folder / ARCHITECTURE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise InputError(f"{folder}: expected files that save_pruned wrote, found damage: {error}") from error
    if not isinstance(architecture, dict):
        raise InputError(f"{folder / ARCHITECTURE}: expected a mapping, found {type(architecture).__name__}")
    model = build(architecture, allow_import)
    _load_tensors(model, tensors, str(folder), architecture)
    return model.eval()


def _load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], where: str, architecture: Mapping[str, Any]) -> None:
    own = {name: tensor for name, tensor in tensors.items() if name not in architecture.get("buffers", ())}
    state = OrderedDict([*own.items(), *architecture.get("extra_state", {}).items()])
    # the versions of modules, by which some decide how a state is to be read (MNASNet)
    state._metadata = getattr(model.state_dict(), "_metadata", {})  # type: ignore[attr-defined]
    try:
        for name in architecture.get("buffers", ()):
            model.get_buffer(name).copy_(tensors[name])
        model.load_state_dict(state)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise InputError(f"{where}: {WEIGHTS} does not fit {ARCHITECTURE}: {error}".replace("\n", " ")) from error


def _frozen(model: nn.Module) -> list[str]:
    return sorted(name for name, parameter in model.named_parameters() if not parameter.requires_grad)


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor of a model, buffers included that its state leaves out, and what its modules add to their state.

    Raises:
        ValueError: what a module adds is no plain value.
    """
    state = model.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    extra = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    for name, value in extra.items():
        try:
            same = json.loads(json.dumps(value)) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            raise ValueError(
                f"{name}: expected a tensor or plain values, which can be saved without pickle, found a "
                f"{type(value).__name__}"
            )
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name not in state}, extra


def _materialise(model: nn.Module) -> None:
    """Turns lazy modules, which take their sizes from the first input, into what they become; of no size as yet."""
    for module in model.modules():
        if isinstance(module, LazyModuleMixin) and module.cls_to_become is not None:
            for handle in (module._initialize_hook, module._load_hook):
                handle.remove()
            del module._initialize_hook, module._load_hook
            for key, parameter in module._parameters.items():
                if isinstance(parameter, UninitializedParameter):
                    module._parameters[key] = nn.Parameter(torch.empty(0))
            for key, buffer in module._buffers.items():
                if isinstance(buffer, UninitializedBuffer):
                    module._buffers[key] = torch.empty(0)
            module.__class__ = module.cls_to_become


def _check_attribute(module: nn.Module, key: str, value: Any) -> None:
    """Refuses what no saved model holds: methods, hooks, builders, values of another type than the module's own.

    Raises:
        TypeError: in words.
    """
    before = getattr(module, key, None)
    if (
        not isinstance(before, (*_PLAIN, list, tuple))
        or key.startswith("_")
        or key in ("training", "dnr_builder")
        or not isinstance(value, (*_PLAIN, list))
    ):
        raise TypeError(f"{key} is no plain attribute of {type(module).__name__}")
    for kinds in ((bool, int, float), (str,)):  # a size may become a sequence of sizes, and None anything
        if isinstance(before, kinds) and not isinstance(value, (*kinds, list, type(None))):
            raise TypeError(f"{key} of {type(module).__name__} is a {type(before).__name__}, found {value!r}")


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes that are plain values or sequences of them, such as ``in_channels`` and ``normalized_shape``."""
    attributes: dict[str, Any] = {}
    for key, value in vars(module).items():
        if key.startswith("_") or key in ("training", "dnr_builder"):
            continue
        if isinstance(value, _PLAIN):
            attributes[key] = value
        elif isinstance(value, tuple | list) and all(isinstance(item, _PLAIN) for item in value):
            attributes[key] = list(value)
    return attributes


def _set_tensor(module: nn.Module, key: str, shape: list[int], dtype: torch.dtype) -> None:
    old = getattr(module, key, None)
    if isinstance(old, Tensor) and list(old.shape) == shape and old.dtype == dtype:
        return
    new = torch.empty(shape, dtype=dtype)
    if key in module._buffers:
        module._buffers[key] = new
    elif key in module._parameters:
        module._parameters[key] = nn.Parameter(new, requires_grad=old is None or old.requires_grad)
    else:
        raise KeyError(key)


def saved_model(folder: Path, shape: str | None, allow_import: bool) -> tuple[nn.Module, dict[str, Any], Tensor]:
    """A saved model in eval mode, its builder, and a blank image of a size that it takes.

    Args:
        folder: written by `saved.save_pruned`.
        shape: "3x32x32", or None for what the builder says.
        allow_import: see `saved.load_pruned`.

    Raises:
        InputError: the folder holds no model, or the model does not take such images.
    """
    from dnr_plugin.models.examples import check_forward

    model = load_pruned(folder, allow_import)
    builder = json.loads((folder / ARCHITECTURE).read_text(encoding="utf-8"))["builder"]
    kwargs = builder["kwargs"]
    given = shape or f"{kwargs.get('in_channels', 3)}x" + "x".join([str(kwargs.get("image_size", 224))] * 2)
    try:
        sizes = [int(side) for side in given.split("x")]
    except ValueError:
        sizes = []
    if len(sizes) != 3 or min(sizes) < 1:
        raise InputError(f"--input: expected CxHxW such as 3x224x224, found {given!r}")
    example = torch.zeros(1, *sizes)
    check_forward(model, example, 1)
    return model, builder, example
