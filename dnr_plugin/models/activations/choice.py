"""Which activations a recipe can choose, and which calls of a network are activations or gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from dnr_plugin.errors import InputError

NAMES = ("relu", "leaky_relu", "silu", "gelu")
HIDDEN_TYPES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish,
    nn.Softplus,
)  # fmt: skip
OTHER_TYPES = (
    nn.PReLU, nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid, nn.Tanh, nn.Hardtanh, nn.Tanhshrink, nn.Softsign,
    nn.Softshrink, nn.Hardshrink, nn.Threshold, nn.GLU, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax,
)  # fmt: skip
# Functions by their name without the underscore of the in-place form: F.relu, torch.relu, Tensor.relu_, aten.relu, ...
HIDDEN = frozenset(kind.__name__.lower() for kind in HIDDEN_TYPES if kind is not nn.LeakyReLU) | {"leaky_relu"}
OTHER = {
    "prelu", "sigmoid", "hardsigmoid", "logsigmoid", "tanh", "hardtanh", "tanhshrink", "softsign", "softshrink",
    "hardshrink", "threshold", "glu", "softmax", "softmin", "log_softmax",
}  # fmt: skip
ATTENTION = {"multi_head_attention_forward", "scaled_dot_product_attention"}


@dataclass(frozen=True)
class Activation:
    """One of the activations that can be chosen.

    Args:
        name: of `NAMES`.
        negative_slope: of leaky_relu, >= 0; unused by the others.

    Raises:
        InputError: another name, or a slope that is negative or not finite.
    """

    name: str
    negative_slope: float = 0.01

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise InputError(f"model.activation: expected one of {', '.join(NAMES)}, found {self.name!r}")
        slope = self.negative_slope
        if isinstance(slope, bool) or not isinstance(slope, int | float) or not 0.0 <= slope < math.inf:
            raise InputError(f"model.negative_slope: expected a number of at least 0, found {slope!r}")

    def __call__(self, x: Tensor) -> Tensor:
        if self.name == "leaky_relu":
            return F.leaky_relu(x, self.negative_slope)
        function: Callable[[Tensor], Tensor] = getattr(F, self.name)
        return function(x)

    def module(self) -> nn.Module:
        """A new module that computes it, not in place."""
        if self.name == "leaky_relu":
            return nn.LeakyReLU(self.negative_slope)
        kinds: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}
        return kinds[self.name]()

    def is_module(self, module: nn.Module) -> bool:
        if isinstance(module, nn.LeakyReLU):
            return self.name == "leaky_relu" and module.negative_slope == self.negative_slope
        if isinstance(module, nn.GELU):
            return self.name == "gelu" and module.approximate == "none"
        return isinstance(module, {"relu": nn.ReLU, "silu": nn.SiLU}.get(self.name, ()))

    def is_call(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call of the function ``name`` computes just this."""
        if name == "leaky_relu":
            slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01)
            return self.name == name and bool(slope == self.negative_slope)
        if name == "gelu":
            return self.name == name and kwargs.get("approximate", "none") == "none"
        return self.name == name

    def spec(self) -> dict[str, Any]:
        """Plain JSON data; the slope only where there is one."""
        return {"name": self.name} | ({"negative_slope": self.negative_slope} if self.name == "leaky_relu" else {})


def are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def is_clamp_from_zero(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if name not in ("clamp", "clip", "clamp_min"):
        return False
    low = args[1] if len(args) > 1 else kwargs.get("min")
    return type(low) in (int, float) and low == 0
