"""What is asked of a layer by its type, with the answers where a type is not known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dnr_plugin.network.calling import input_of

Scaling = Literal["product", "square", "linear"]


class Kind:
    """A layer that uses no neurons of its own accord; the base of all kinds.

    Args:
        module: the layer.

    Attributes:
        consumes: whether it mixes its input channels, so that a neuron's activation is "used" there.
        scaling: what FLOPs and matrices of parameters grow with: "product" of input and output channels, "square" of
            the output channels, or "linear" in these.
    """

    consumes: ClassVar[bool] = False
    scaling: Scaling = "linear"

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @property
    def channels(self) -> tuple[int, int]:
        """Input and output channels (or features); 0 where the layer is none that is known here."""
        return 0, 0

    @property
    def blocks(self) -> int:
        """Equal blocks of channels that must stay equally wide, such as the groups of a convolution."""
        return 1

    @property
    def reading(self) -> float:
        """Share of its matrices that the input channels pass, where it scales as a "product"."""
        return 1.0

    @property
    def separate(self) -> bool:
        """Whether a norm treats each channel by itself."""
        return False

    @property
    def stock(self) -> bool:
        """Whether it runs by a ``forward`` of torch's own."""
        return bool(type(self.module).forward.__module__.startswith("torch."))

    @property
    def unrepaired(self) -> str | None:
        """Why least squares cannot fit its weights, or None where they can."""
        return f"{type(self.module).__name__} is not repaired"

    @property
    def unknowns(self) -> int:
        """Weights of one output; 0 where repair does not ask."""
        return 0

    def makes(self, parameter: Tensor) -> int | None:
        """Dimension of one of `maker`'s parameters that numbers output channels, or None where none does."""
        return 0

    @property
    def maker(self) -> nn.Module:
        """The module whose parameters make the output channels."""
        return self.module  # type: ignore[no-any-return]


class Consumer(Kind):
    """A layer that mixes its input channels. `a` is its input, or its output, of any shape that it takes or gives."""

    consumes = True
    scaling: Scaling = "product"

    def by_channel(self, a: Tensor) -> Tensor:
        """Any input or output as a view of shape [N, C, P]: samples, channels, positions."""
        raise NotImplementedError

    def reads(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """What it reads, of the arguments that it is called with; None where that is no float tensor."""
        return input_of(args, kwargs)

    def batched(self, a: Tensor) -> Tensor:
        """An input with a dimension of samples in front, also where it had none."""
        return a if a.dim() > 1 else a.unsqueeze(0)

    def mask(self, channels: Tensor) -> Tensor:
        """A value for each input channel, shape [C], in a shape that broadcasts to an input."""
        return channels

    @property
    def taps(self) -> int:
        """Positions of a kernel."""
        return 1

    def features(self, most: int) -> int:
        """Values of a channel that second moments keep apart: the taps, where there are at most so many in all.

        Args:
            most: values of all channels together, >= 1.
        """
        return 1

    def rows(self, a: Tensor, places: Tensor) -> Tensor:
        """What the weights of an output are multiplied with, at some positions of the output.

        Args:
            a: an input.
            places: flat positions of the output, shape [K], int64.

        Returns:
            Shape [N * K, in * taps], in the order of the weights; the places of one sample next to each other.
        """
        return self.by_channel(a).transpose(1, 2)[:, places.to(a.device)].flatten(0, 1)

    def positions(self, a: Tensor) -> int:
        """Positions of the output for an input; as many as of the input, by default."""
        return self.by_channel(a).shape[2]

    def matrices(self, each: int) -> list[Tensor]:
        """Weights by what they are multiplied with, for each group of a grouped convolution.

        Args:
            each: features of a channel (`features`).

        Returns:
            Float64 on the CPU, shape [outputs, features] each. Where a convolution's channels are read alone, every
            position of the kernel is an output of its own.
        """
        raise NotImplementedError

    def assign(self, each: int, matrices: Sequence[Tensor]) -> None:
        """The reverse of `matrices`: changes the weights in place.

        Args:
            each: features of a channel (`features`).
            matrices: float64, in the shapes that `matrices` gives.
        """
        raise NotImplementedError

    @property
    def share(self) -> float:
        """How many outputs of a layer each of its own stands for, where losses are compared."""
        return 1.0

    def norms(self) -> Tensor:
        """L2 norm of the weights that read each input channel, float64, shape [in]."""
        raise NotImplementedError

    def run(self, a: Tensor, weights: Tensor, constants: Tensor) -> Tensor:
        """What comes out of an input with other weights and constants.

        Args:
            a: an input.
            weights: shape [out, in * taps].
            constants: shape [out].
        """
        raise NotImplementedError

    @property
    def no_constant(self) -> str | None:
        """Why no shift of its outputs can stand in for a constant input, or None where one can, borders aside."""
        return None

    @property
    def folds_exactly(self) -> bool:
        """Whether a constant input makes a constant output at every position, borders included."""
        return False

    def shift(self, inputs: Tensor) -> Tensor:
        """Outputs for inputs that are constant, shape [in] -> [out], float64, borders aside."""
        raise NotImplementedError


def channels_second(a: Tensor) -> Tensor:
    if a.dim() == 1:
        a = a.unsqueeze(0)
    return a.unsqueeze(-1) if a.dim() == 2 else a.movedim(-1, 1).flatten(2)


def widened(weight: Tensor) -> Tensor:
    return weight.detach().double().cpu()


def l2_norm(weight: Tensor, dim: int | tuple[int, ...]) -> Tensor:  # a 16-bit sum would make many neurons tie
    wide = weight if weight.element_size() >= 4 else weight.float()
    norms: Tensor = torch.linalg.vector_norm(wide, dim=dim)
    return norms.double()
