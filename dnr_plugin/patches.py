"""What the weights of a layer are multiplied with: channels, or the patches that a kernel covers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def channels_second(module: nn.Module, a: Tensor) -> Tensor:
    """Any input or output of a consumer, as a view of shape [N, C, P]."""
    if isinstance(module, nn.modules.conv._ConvNd):
        spatial = len(module.kernel_size)
        a = a if a.dim() == spatial + 2 else a.unsqueeze(0)
        return a.flatten(2) if a.dim() > 2 else a.unsqueeze(-1)
    if isinstance(module, nn.MultiheadAttention) and not module.batch_first and a.dim() == 3:
        a = a.transpose(0, 1)
    if a.dim() == 1:
        a = a.unsqueeze(0)
    return a.unsqueeze(-1) if a.dim() == 2 else a.movedim(-1, 1).flatten(2)


def taps(module: nn.Module) -> int:
    """Positions of a layer's kernel; 1 for all but convolutions."""
    return math.prod(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else 1


def patches(module: nn.modules.conv._ConvNd, a: Tensor, places: Tensor) -> Tensor:
    """What the kernels of a convolution, not a transposed one, cover at some positions of its output.

    Args:
        module: the convolution.
        a: its input, shape [N, C, *spatial].
        places: flat positions of the output, shape [K].

    Returns:
        Shape [N * K, C * taps], in the order of the weights; the places of one sample next to each other.
    """
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(a, module._reversed_padding_repeated_twice, mode)
    sizes = output_size(module, a)
    rows = []
    for place in places.tolist():
        window = padded
        for dim in reversed(range(len(sizes))):
            place, index = divmod(place, sizes[dim])
            step, start = module.dilation[dim], index * module.stride[dim]
            window = window.narrow(dim + 2, start, step * (module.kernel_size[dim] - 1) + 1)
            window = window[(slice(None),) * (dim + 2) + (slice(None, None, step),)]
        rows.append(window.flatten(1))
    return torch.stack(rows, 1).flatten(0, 1)


def output_size(module: nn.modules.conv._ConvNd, a: Tensor) -> list[int]:
    """Height, width and so on of a convolution's output for an input [N, C, *spatial]."""
    padding = module._reversed_padding_repeated_twice[::-1]
    return [
        (size + padding[2 * k] + padding[2 * k + 1] - module.dilation[k] * (module.kernel_size[k] - 1) - 1)
        // module.stride[k]
        + 1
        for k, size in enumerate(a.shape[2:])
    ]
