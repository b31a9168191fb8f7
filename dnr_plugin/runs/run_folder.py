"""A run's folder: whether a run may write there, whether it fits, and the checkpoint of an interrupted one."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnr_plugin.errors import InputError
from dnr_plugin.files import atomic_write, check_writable, existing_folder
from dnr_plugin.recipe.difference import differing_fields
from dnr_plugin.recipe.load import load_recipe
from dnr_plugin.recipe.schema import Recipe
from dnr_plugin.recipe.sections import PruneOptions


def save_checkpoint(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes the state of an interrupted run: tensors and plain values only, atomically."""
    packed = io.BytesIO()  # torch.save hides a full disk behind an error of its own
    torch.save(dict(state), packed)
    with atomic_write(path, "wb") as file:
        file.write(packed.getbuffer())


def load_checkpoint_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote, running no code from it.

    Raises:
        InputError: the file is damaged.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # damage shows as a dozen types
        raise InputError(
            f"{path}: expected the checkpoint of a run, found a damaged file ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict):
        raise InputError(f"{path}: expected the checkpoint of a run, found {type(state).__name__}")
    return state


def check_folder(folder: Path, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
    """Refuses a folder that this run may not write to; returns the report of a finished run that is resumed.

    Raises:
        InputError: see the messages.
    """
    check_writable(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    saved = folder / "recipe.yaml"
    if not saved.is_file():
        raise InputError(f"--output: expected an empty folder or that of a run, found {folder} with other files in it")
    begun = load_recipe(saved)
    differing = differing_fields(begun, recipe)
    if resume:
        free = _not_begun(folder / "checkpoint.pt", begun.prune.mode, recipe.prune.mode)
        differing = [field for field in differing if not field.startswith(free)]
    if differing:
        shown = "; ".join(differing[:8]) + (f" and {len(differing) - 8} more" if len(differing) > 8 else "")
        raise InputError(f"--output: {folder} holds a run of another recipe (there, here): {shown}")
    if not resume:
        raise InputError(
            f"--output: {folder} holds a run of this recipe already: add --resume to go on with it, or name another "
            "folder"
        )
    if (folder / "checkpoint.pt").is_file() or not (folder / "report.json").is_file():
        return None
    finished: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return finished


def _not_begun(path: Path, *modes: str) -> tuple[str, ...]:
    """Sections of a recipe that an interrupted run has not come to, so that they may still be changed."""
    if not path.is_file():
        return ()
    state = load_checkpoint_state(path)
    if state["stage"] in ("train", "prune"):
        # while it trains, the neurons are watched as prune.observe and prune.dynamics say, and in mode dynamic removed
        begun = {"mode", "dynamics"} | ({"observe"} if state["stage"] == "train" else set())
        free = set(PruneOptions.model_fields) - begun if set(modes) == {"after_training"} else set()
        return (*(f"prune.{name}" for name in free), "finetune.")
    return ("finetune.",) if state["epoch"] == 0 else ()


def check_space(folder: Path, model: nn.Module) -> None:
    """Refuses to start a run whose checkpoints would not fit on the disk."""
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    needed = 8 * size + 10 * 2**20  # two checkpoints with Adam's moments, the model, plots
    parent = existing_folder(folder)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(f"--output: expected {needed / 2**20:.0f} MiB free for {folder}, found {free / 2**20:.0f} MiB")
