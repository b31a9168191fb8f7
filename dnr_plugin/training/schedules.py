"""How learning rate, penalty and noise come and go over a stage of training."""

from __future__ import annotations

import math

from dnr_plugin.recipe.training_sections import Schedule, TrainOptions

_PEAK = 0.3  # where one_cycle is highest
_START = 0.04  # where one_cycle begins


def scheduled(schedule: Schedule, share: float) -> float:
    r"""The share in [0, 1] of its highest value that a learning rate, a penalty or noise has at a point of a stage.

    With :math:`s` the share of the stage that is done: constant :math:`1`; linear :math:`1 - s`; cosine
    :math:`(1 + \cos \pi s) / 2`; one_cycle rises along a cosine from 0.04 to 1 at :math:`s = 0.3` and falls along
    another to 0 at the end.

    Args:
        schedule: its name.
        share: 0 at the first step, 1 once the last is done; what lies beyond counts as 1.
    """
    share = min(1.0, share)
    if schedule == "one_cycle":
        if share < _PEAK:
            return _START + (1.0 - _START) * _falling(1.0 - share / _PEAK)
        return _falling((share - _PEAK) / (1.0 - _PEAK))
    if schedule == "cosine":
        return _falling(share)
    return 1.0 - share if schedule == "linear" else 1.0


def _falling(share: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * share))


def lr_factor(options: TrainOptions, step: int, steps: int) -> float:
    """Learning rate at a step as a share in [0, 1] of the highest.

    Args:
        options: schedule and warm-up.
        step: 0 for the first.
        steps: of the whole stage.
    """
    warmup = round(options.warmup_epochs * steps / max(options.epochs, 1))
    if step < warmup:
        return (step + 1) / warmup
    return scheduled(options.schedule, (step - warmup) / max(1, steps - warmup))
