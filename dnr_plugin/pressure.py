"""What makes neurons die while a network trains, and the schedules by which it comes and goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .errors import InputError
from .schema import Recipe, Schedule

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


def batchnorm_scales(model: nn.Module) -> list[nn.Parameter]:
    """The scales of all BatchNorm layers that have some and train them, each once."""
    scales: dict[int, nn.Parameter] = {}
    for module in model.modules():
        weight = module.weight if isinstance(module, nn.modules.batchnorm._BatchNorm) else None
        if isinstance(weight, nn.Parameter) and weight.requires_grad:
            scales[id(weight)] = weight
    return list(scales.values())


def check_pressure(model: nn.Module, recipe: Recipe) -> None:
    """Refuses pressure on what the model does not have."""
    if batchnorm_scales(model):
        return
    problems = [
        f"{stage}.pressure.bn_l1: expected a model with BatchNorm scales, found none in {recipe.model.name}"
        for stage, options in (("train", recipe.train), ("finetune", recipe.finetune))
        if options.pressure.bn_l1 is not None
    ]
    if problems:
        raise InputError(*problems)


@torch.no_grad()
def add_l1(scales: Iterable[Tensor], strength: float) -> None:
    r"""Adds the gradient of :math:`\lambda \sum |\gamma|` to the gradients that there are.

    The subgradient is :math:`\lambda \, \mathrm{sign}(\gamma)`, 0 at 0. From Liu et al., Learning Efficient
    Convolutional Networks through Network Slimming, ICCV 2017 (https://arxiv.org/abs/1708.06519).

    Args:
        scales: BatchNorm weights :math:`\gamma`.
        strength: :math:`\lambda \ge 0`.
    """
    for scale in scales:
        if scale.grad is not None:
            scale.grad.add_(scale.sign(), alpha=strength)


@torch.no_grad()
def add_noise(
    parameters: Iterable[Tensor], std: float, seed: int, live: Callable[[Tensor], Tensor | None] | None = None
) -> None:
    """Adds normal noise to the gradients that there are.

    It depends on the seed, the shapes and the kind of device alone: the global generators are neither read nor moved,
    and a CPU draws other numbers than a GPU.

    Args:
        parameters: all on one device.
        std: standard deviation of each element's noise, >= 0.
        seed: of this step.
        live: of a parameter, factors that broadcast to its shape: 0 where it belongs to a dead neuron and gets no
            noise, 1 elsewhere; None for 1 everywhere.
    """
    generator: torch.Generator | None = None
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if generator is None:
            generator = torch.Generator(gradient.device).manual_seed(seed)
        noise = torch.randn(gradient.shape, generator=generator, device=gradient.device, dtype=gradient.dtype)
        factors = None if live is None else live(parameter)
        gradient.add_(noise if factors is None else noise * factors, alpha=std)
