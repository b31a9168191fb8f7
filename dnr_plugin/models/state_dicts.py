"""Loads a state_dict into a model without running code from the file."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.errors import InputError, first_line


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
    if problems := file_problems(path):
        raise InputError(*problems)
    tensors = _state_dict(_read_checkpoint(path), path)
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    expected = model.state_dict()
    # PyTorch before 0.4.1 did not count batches; nothing but a BatchNorm with momentum None reads the count.
    missing = [key for key in expected if key not in tensors and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in tensors if key not in expected]
    shapes = [
        f"{key} expected {list(expected[key].shape)} found {list(value.shape)}"
        for key, value in tensors.items()
        if key in expected and expected[key].shape != value.shape
    ]
    problems = [
        f"model.checkpoint: {path}: {len(entries)} of {total} {what}: {', '.join(entries[:5])}"
        + (", ..." if len(entries) > 5 else "")
        for what, entries, total in (
            ("keys of the model are missing", missing, len(expected)),
            ("keys in the file are unexpected", unexpected, len(tensors)),
            ("shapes differ", shapes, len(expected)),
        )
        if entries
    ]
    if problems:
        raise InputError(*problems)
    model.load_state_dict(tensors, strict=False)


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


def file_problems(path: Path) -> list[str]:
    if path.is_file():
        return []
    return [f"model.checkpoint: expected a file, found {'the folder' if path.is_dir() else 'nothing at'} {path}"]
