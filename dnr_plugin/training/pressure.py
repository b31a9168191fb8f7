"""What makes neurons die while a network trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def batchnorm_scales(model: nn.Module) -> list[nn.Parameter]:
    """The scales of all BatchNorm layers that have some and train them, each once."""
    scales: dict[int, nn.Parameter] = {}
    for module in model.modules():
        weight = module.weight if isinstance(module, nn.modules.batchnorm._BatchNorm) else None
        if isinstance(weight, nn.Parameter) and weight.requires_grad:
            scales[id(weight)] = weight
    return list(scales.values())


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
