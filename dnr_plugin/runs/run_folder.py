"""A run's folder: whether a run may write there, whether it fits, and the checkpoint of an interrupted one."""

from __future__ import annotations

import io
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.errors import InputError
from dnr_plugin.files import atomic_write, check_writable, contents, existing_folder
from dnr_plugin.recipe.difference import differing_fields
from dnr_plugin.recipe.load import load_recipe
from dnr_plugin.recipe.schema import Recipe
from dnr_plugin.recipe.sections import PruneOptions
from dnr_plugin.reports.stored import stored_report

CHECKPOINT, BEFORE = "checkpoint.pt", "checkpoint.previous.pt"
_KEYS = {
    "stage": str, "epoch": int, "results": dict, "events": str, "architecture": str, "model": dict, "random": Tensor,
}  # fmt: skip


def save_checkpoint(state: Mapping[str, Any], folder: Path) -> None:
    """Writes the state of an interrupted run: tensors and plain values only, atomically; keeps the one before it."""
    packed = io.BytesIO()  # torch.save hides a full disk behind an error of its own
    torch.save(dict(state), packed)
    with atomic_write(folder / CHECKPOINT, "wb", before=folder / BEFORE) as file:
        file.write(packed.getbuffer())


def remove_checkpoints(folder: Path) -> None:
    """Once they are not needed any more."""
    for name in (BEFORE, CHECKPOINT):
        (folder / name).unlink(missing_ok=True)


def interrupted(folder: Path) -> bool:
    """Whether a run in the folder left a checkpoint."""
    return any((folder / name).is_file() for name in (CHECKPOINT, BEFORE))


def load_checkpoint_state(folder: Path) -> dict[str, Any] | None:
    """Reads what `save_checkpoint` wrote last, or before where that is damaged, which is said; runs no code from it.

    Returns:
        None where there is no checkpoint.

    Raises:
        InputError: all that there is is damaged.
    """
    files = [path for name in (CHECKPOINT, BEFORE) if (path := folder / name).is_file()]
    errors = []
    for file in files:
        try:
            state = _checkpoint_of(file)
        except InputError as error:
            errors.append(error)
            continue
        if errors:
            warnings.warn(f"{errors[0]}; going on from the one before it, {file.name}", stacklevel=2)
        return state
    if errors:
        raise InputError(f"{errors[0]}; delete {folder} or name another folder, and run without --resume")
    return None


def _checkpoint_of(file: Path) -> dict[str, Any]:
    damaged = f"{file}: expected the checkpoint of a run, found a damaged file"
    try:
        with zipfile.ZipFile(file) as archive:
            flipped = archive.testzip()  # torch reads on where a checksum does not fit
        state = torch.load(file, weights_only=True, map_location="cpu") if flipped is None else None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damage shows as a dozen types
        raise InputError(f"{damaged} ({type(error).__name__})") from error
    if flipped is not None:
        raise InputError(f"{damaged} (the checksum of {flipped})")
    if not isinstance(state, dict) or any(not isinstance(state.get(key), kind) for key, kind in _KEYS.items()):
        raise InputError(f"{damaged} (it holds something else)")
    return state


def check_folder(folder: Path, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
    """Refuses a folder that this run may not write to; returns the report of a finished run that is resumed.

    Raises:
        InputError: see the messages.
    """
    check_writable(folder)
    if not contents(folder):
        return None
    saved = folder / "recipe.yaml"
    if not saved.is_file():
        raise InputError(f"--output: expected an empty folder or that of a run, found {folder} with other files in it")
    begun = load_recipe(saved)
    differing = differing_fields(begun, recipe)
    if resume:
        free = _not_begun(folder, begun.prune.mode, recipe.prune.mode)
        differing = [field for field in differing if not field.startswith(free)]
    if differing:
        shown = "; ".join(differing[:8]) + (f" and {len(differing) - 8} more" if len(differing) > 8 else "")
        raise InputError(f"--output: {folder} holds a run of another recipe (there, here): {shown}")
    if not resume:
        raise InputError(
            f"--output: {folder} holds a run of this recipe already: add --resume to go on with it, or name another "
            "folder"
        )
    if interrupted(folder) or not (folder / "report.json").is_file():
        return None
    try:
        return stored_report(folder / "report.json")
    except InputError as error:
        anew = f"the run is finished: delete {folder} or name another folder to do it anew"
        raise InputError(f"{error}; {anew}") from error


def _not_begun(folder: Path, *modes: str) -> tuple[str, ...]:
    """Sections of a recipe that an interrupted run has not come to, so that they may still be changed."""
    state = load_checkpoint_state(folder)
    if state is None:
        return ()
    if state["stage"] in ("train", "prune"):
        # while it trains, the neurons are watched as prune.observe and prune.dynamics say, and in mode dynamic removed
        begun = {"mode", "dynamics"} | ({"observe"} if state["stage"] == "train" else set())
        free = set(PruneOptions.model_fields) - begun if set(modes) == {"after_training"} else set()
        return (*(f"prune.{name}" for name in free), "finetune.", "report.")
    return ("finetune.", "report.") if state["epoch"] == 0 else ("report.",)


def check_space(folder: Path, model: nn.Module) -> None:
    """Refuses to start a run whose checkpoints would not fit on the disk."""
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    needed = 8 * size + 10 * 2**20  # two checkpoints with Adam's moments, the model, plots
    parent = existing_folder(folder)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(f"--output: expected {needed / 2**20:.0f} MiB free for {folder}, found {free / 2**20:.0f} MiB")
