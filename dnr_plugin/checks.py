"""Everything that can be wrong with a run before it computes or writes anything."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .candidates import Timetable
from .checkpoint import load_checkpoint_state
from .data import check_data, data_shape, train_size
from .errors import InputError, did_you_mean
from .graph import kept_modes
from .layers import Limits
from .models import build_model, check_model
from .neurons import SCORES
from .planning import check_target
from .pressure import check_pressure
from .recipe import differing_fields, load_recipe
from .schema import PruneOptions, Recipe


def check_recipe(recipe: Recipe) -> None:
    """Checks everything about a recipe that can be known without reading images or training.

    Raises:
        InputError: all problems of data, model, score and sizes; where there are none, of how they fit each other and
            the target.
    """
    problems: list[str] = []
    checks: list[Callable[[], None]] = [
        lambda: check_data(recipe.data),
        lambda: check_model(recipe.model),
        lambda: check_score(recipe),
        lambda: check_sizes(recipe, train_size(recipe.data)),
        lambda: check_live_noise(recipe),
        lambda: check_timetable(recipe, train_size(recipe.data)),
    ]
    for check in checks:
        try:
            check()
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    classes, in_channels, image_size = data_shape(recipe.data)
    model = build_model(recipe.model, classes, in_channels, image_size)
    example = example_image(in_channels, image_size)
    check_forward(model, example, classes)
    check_pressure(model, recipe)
    target = recipe.prune.target
    if target is not None:
        check_target(model, example, target.kind, target.value, limits_of(recipe))


def check_ranks() -> None:
    """Refuses several processes: each would train a model of its own and write to the same folder."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise InputError(f"torchrun: expected one process, since several are not supported yet, found {ranks}")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def check_writable(folder: Path) -> None:
    """Refuses a folder that is none, or could not be made."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output: expected a folder, found the file {folder}")
    parent = _existing(folder)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"--output: expected a folder that can be written to, found {folder}, where {parent} cannot")


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
    parent = _existing(folder)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(f"--output: expected {needed / 2**20:.0f} MiB free for {folder}, found {free / 2**20:.0f} MiB")


def check_sizes(recipe: Recipe, images: int | None) -> None:
    """Refuses batches larger than the training images, and fewer of these than death is judged on; None: unknown."""
    wanted = {
        f"{stage}.batch_size": options.batch_size
        for stage, options in (("train", recipe.train), ("finetune", recipe.finetune))
        if options.epochs
    }
    wanted["prune.observe.min_samples"] = recipe.prune.observe.min_samples
    found = [
        f"{name}: expected at most {images}, the number of training images, found {value}"
        for name, value in wanted.items()
        if images is not None and value > images
    ]
    if found:
        raise InputError(*found)


def check_live_noise(recipe: Recipe) -> None:
    """Refuses noise on live neurons where no checks tell which these are."""
    noise = recipe.finetune.pressure.noise
    if noise is not None and noise.neurons == "live":
        raise InputError(
            "finetune.pressure.noise.neurons: expected all, since only train checks which neurons are live, found live"
        )


def timetable(recipe: Recipe, images: int) -> Timetable:
    """When a run looks at its neurons, given how many training images there are."""
    train, dynamics = recipe.train, recipe.prune.dynamics
    per_epoch = images // train.batch_size
    every = max(1, round(dynamics.check_every * per_epoch))
    return Timetable(
        every,
        until=math.floor(dynamics.until * train.epochs * per_epoch + 1e-9),
        watched=min(every, -(-recipe.prune.observe.samples // train.batch_size)),
        warmup=round(dynamics.warmup_epochs * per_epoch),
        remove_at=tuple(round(epoch * per_epoch) for epoch in dynamics.remove_at or ()),
    )


def check_timetable(recipe: Recipe, images: int | None) -> None:
    """Refuses a run too short for its own checks, warm-up and patience; images None: unknown."""
    train, dynamics, mode = recipe.train, recipe.prune.dynamics, recipe.prune.mode
    noise = train.pressure.noise
    prior = recipe.prune.prior
    if mode == "after_training" and not prior and (noise is None or noise.neurons == "all"):
        return
    if train.epochs == 0 and (prior or mode != "after_training"):
        why = f"prune.prior {prior:g}" if prior else f"prune.mode {mode}"
        raise InputError(f"train.epochs: expected at least 1 with {why}, found 0")
    if images is None or images < train.batch_size or train.epochs == 0:
        return
    found = []
    times = timetable(recipe, images)
    between = times.check_every * train.batch_size
    if recipe.prune.observe.min_samples > between:
        found.append(
            f"prune.observe.min_samples: expected at most {between}, the images from one check to the next, "
            f"found {recipe.prune.observe.min_samples}"
        )
    if dynamics.check_every > train.epochs:
        found.append(
            f"prune.dynamics.check_every: expected at most {train.epochs}, the epochs there are, "
            f"found {dynamics.check_every:g}"
        )
    elif mode == "dynamic":
        found += _too_short(recipe, times)
    if found:
        raise InputError(*found)


def _too_short(recipe: Recipe, times: Timetable) -> list[str]:
    """What does not fit into the epochs in which neurons may be removed."""
    dynamics = recipe.prune.dynamics
    end = dynamics.until * recipe.train.epochs
    if times.remove_at and times.last * times.check_every > times.until:
        return [
            f"prune.dynamics.remove_at: expected epochs with a check up to epoch {end:g}, which is until "
            f"({dynamics.until:g}) of train.epochs ({recipe.train.epochs}), found {max(dynamics.remove_at or []):g}"
        ]
    if dynamics.remove_at:
        end = max(dynamics.remove_at)
    waiting = times.last - times.first  # checks that the first candidates can wait
    if waiting < 0:
        return [
            f"prune.dynamics.warmup_epochs: expected to end before the last removal (epoch {end:g}), "
            f"found {dynamics.warmup_epochs:g}"
        ]
    if waiting < dynamics.patience:
        return [
            f"prune.dynamics.patience: expected at most {waiting}, the checks from warm-up (epoch "
            f"{dynamics.warmup_epochs:g}) to the last removal (epoch {end:g}), found {dynamics.patience}"
        ]
    return []


def check_forward(model: nn.Module, example: Tensor, num_classes: int) -> None:
    """Calls the model once: it must take the images and return one score per class.

    Raises:
        InputError: it does not.
    """
    try:
        with kept_modes(model), torch.no_grad():
            model.eval()
            logits = model(example)
    except Exception as error:  # whatever the user's network raises on these images
        shape = "x".join(map(str, example.shape))
        raise InputError(
            f"model: expected a network that takes images of {shape}, found {type(error).__name__}: {error}"
        ) from error
    if not isinstance(logits, Tensor):
        raise InputError(f"model: expected a tensor of class scores, found that it returns {type(logits).__name__}")
    if logits.dim() != 2 or logits.shape[1] < num_classes:
        raise InputError(f"model: expected scores of shape [N, {num_classes}], found {list(logits.shape)}")


def check_score(recipe: Recipe) -> None:
    if recipe.prune.score is not None and recipe.prune.score not in SCORES:
        raise InputError(
            f"prune.score: expected one of {', '.join(SCORES)}, found {recipe.prune.score!r}"
            f"{did_you_mean(recipe.prune.score, SCORES)}"
        )


def limits_of(recipe: Recipe) -> Limits:
    """What the recipe allows to be removed."""
    prune = recipe.prune
    return Limits(prune.ignored, prune.round_to, prune.max_pruning_ratio)


def example_image(in_channels: int, image_size: int) -> Tensor:
    """One image of noise, the same every time, for tracing and counting."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, in_channels, image_size, image_size, generator=generator)
