"""An image to try a network with, and the trial."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dnr_plugin.errors import InputError
from dnr_plugin.network.calling import kept_modes


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


def example_image(in_channels: int, image_size: int) -> Tensor:
    """One image of noise, the same every time, for tracing and counting."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, in_channels, image_size, image_size, generator=generator)
