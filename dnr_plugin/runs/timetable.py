"""When a run looks at its neurons, and whether that fits into its epochs."""

from __future__ import annotations

import math

from dnr_plugin.dynamics.timetable import Timetable
from dnr_plugin.errors import InputError
from dnr_plugin.recipe.schema import Recipe


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
    problems = []
    times = timetable(recipe, images)
    between = times.check_every * train.batch_size
    if recipe.prune.observe.min_samples > between:
        problems.append(
            f"prune.observe.min_samples: expected at most {between}, the images from one check to the next, "
            f"found {recipe.prune.observe.min_samples}"
        )
    if dynamics.check_every > train.epochs:
        problems.append(
            f"prune.dynamics.check_every: expected at most {train.epochs}, the epochs there are, "
            f"found {dynamics.check_every:g}"
        )
    elif mode == "dynamic":
        problems += _too_short(recipe, times)
    if problems:
        raise InputError(*problems)


def _too_short(recipe: Recipe, times: Timetable) -> list[str]:
    """What does not fit into the epochs in which neurons may be removed."""
    dynamics = recipe.prune.dynamics
    end = dynamics.until * recipe.train.epochs
    if times.remove_at and not times.in_time:
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
