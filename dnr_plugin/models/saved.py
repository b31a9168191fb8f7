"""Saving and loading of physically pruned models without pickled code.

A pruned model is a dense one, built anew, in which some layers have other sizes. So its description is the builder's
name and arguments, what differs in each module's plain attributes, and the shape of each tensor.
"""

from __future__ import annotations

import hashlib
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

from dnr_plugin.errors import InputError, one_line
from dnr_plugin.files import atomic_write, read_json
from dnr_plugin.network.attention import split_modules
from dnr_plugin.network.calling import copied, eager
from dnr_plugin.network.kinds import Convolution, Linear, TransposedConvolution, kind_of
from dnr_plugin.network.splitting import split_named

FORMAT = 1
ARCHITECTURE, WEIGHTS = "architecture.json", "model.safetensors"
_PLAIN = (bool, int, float, str, type(None))
_HIGHEST, _LONGEST = 2.0**31, 4096  # of numbers in attributes, and of sequences of them


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

    _check_format(architecture)
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
        _check_widths(modules)
        if "frozen" in architecture:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name not in architecture["frozen"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise InputError(
            f"{ARCHITECTURE}: does not fit {str(architecture['builder'].get('name'))[:80]}: {one_line(error)}"
        ) from error
    return model


def _check_format(architecture: Mapping[str, Any]) -> None:
    kinds = {"builder": dict, "modules": dict, "tensors": dict}
    if architecture.get("format") != FORMAT or any(not isinstance(architecture.get(k), t) for k, t in kinds.items()):
        raise InputError(
            f"{ARCHITECTURE}: expected a description of format {FORMAT}, found {architecture.get('format')!r}"[:300]
        )


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
    folder, weights = Path(folder), save(tensors)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / WEIGHTS, "wb") as file:
        file.write(weights)
    with atomic_write(folder / ARCHITECTURE) as file:
        json.dump({**architecture, "sha256": hashlib.sha256(weights).hexdigest()}, file, indent=1)


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
    from safetensors.torch import load

    folder = Path(folder)
    for name in (ARCHITECTURE, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: expected a folder with {ARCHITECTURE} and {WEIGHTS}, found no {name}")
    architecture = read_json(folder / ARCHITECTURE)
    try:
        weights = (folder / WEIGHTS).read_bytes()
        tensors = load(weights)
    except OSError as error:
        raise InputError(f"{folder / WEIGHTS}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: expected files that save_pruned wrote, found damage: {error}") from error
    if not isinstance(architecture, dict):
        raise InputError(f"{folder / ARCHITECTURE}: expected a mapping, found {type(architecture).__name__}")
    _check_belongs(architecture, tensors, weights, folder)
    model = build(architecture, allow_import)
    _load_tensors(model, tensors, str(folder), architecture)
    return model.eval()


def _check_belongs(
    architecture: Mapping[str, Any], tensors: Mapping[str, Tensor], weights: bytes, folder: Path
) -> None:
    """Refuses weights that are not those of the architecture, before anything of its sizes is made.

    Raises:
        InputError: in one line.
    """
    _check_format(architecture)
    digest = hashlib.sha256(weights).hexdigest()
    if architecture.get("sha256", digest) != digest:  # files of earlier versions have none
        raise InputError(
            f"{folder / WEIGHTS}: expected what {ARCHITECTURE} was written with, found other bytes: one of the two is "
            "damaged, or of another model"
        )
    listed = architecture["tensors"]
    if listed.keys() != tensors.keys():
        raise InputError(f"{folder / ARCHITECTURE}: expected the tensors of {WEIGHTS}, found others")
    for name, tensor in tensors.items():
        stored = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        if listed[name] != stored:
            raise InputError(
                f"{folder / ARCHITECTURE}: {name}: expected {stored}, as {WEIGHTS} has it, found {listed[name]!r}"[:300]
            )


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
    numbers = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int | float)]
    if not all(abs(number) <= _HIGHEST for number in numbers) or len(numbers) > _LONGEST:  # NaN neither
        raise TypeError(f"{key} of {type(module).__name__} is out of range: {value!r}"[:200])


def _check_widths(modules: Mapping[str, nn.Module]) -> None:
    """Refuses layers that say another number of channels than their weights have.

    Raises:
        ValueError: in words.
    """
    for name, module in modules.items():
        kind, weight = kind_of(module), module._parameters.get("weight")
        (inputs, outputs), groups = kind.channels, getattr(kind.module, "groups", 1)
        expected: tuple[int, ...]
        if not kind.stock or weight is None or not outputs:
            continue
        if isinstance(kind, TransposedConvolution):
            expected, found = (inputs, outputs // groups), weight.shape[:2]
        elif isinstance(kind, Convolution):
            expected, found = (outputs, inputs // groups), weight.shape[:2]
        elif isinstance(kind, Linear):
            expected, found = (outputs, inputs), weight.shape
        else:  # norms
            expected, found = (outputs,), weight.shape[-1:]
        if tuple(found) != expected:
            raise ValueError(f"{name} says {expected} channels, its weights have {tuple(found)}")


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
    builder = read_json(folder / ARCHITECTURE)["builder"]
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
