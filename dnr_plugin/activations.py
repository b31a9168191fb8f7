"""Replaces the activations between a network's layers, modules and function calls, and says which others it has.

A module is swapped in the module that holds it. A call such as ``F.relu(x)`` has no name to swap: one forward pass
tells which modules make such calls, and from then on these run their ``forward`` under a `TorchFunctionMode` that
computes the chosen activation instead. Sigmoid, tanh, softmax and their kin gate or normalise and are never replaced.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import math
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .errors import InputError, first_line
from .graph import kept_modes
from .inputs import call, tensors
from .removal import output_difference

NAMES = ("relu", "leaky_relu", "silu", "gelu")

_HIDDEN_TYPES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish,
    nn.Softplus,
)  # fmt: skip
_OTHER_TYPES = (
    nn.PReLU, nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid, nn.Tanh, nn.Hardtanh, nn.Tanhshrink, nn.Softsign,
    nn.Softshrink, nn.Hardshrink, nn.Threshold, nn.GLU, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax,
)  # fmt: skip
# Functions by their name without the underscore of the in-place form: F.relu, torch.relu, Tensor.relu_, aten.relu, ...
_HIDDEN = frozenset(kind.__name__.lower() for kind in _HIDDEN_TYPES if kind is not nn.LeakyReLU) | {"leaky_relu"}
_OTHER = {
    "prelu", "sigmoid", "hardsigmoid", "logsigmoid", "tanh", "hardtanh", "tanhshrink", "softsign", "softshrink",
    "hardshrink", "threshold", "glu", "softmax", "softmin", "log_softmax",
}  # fmt: skip
_ATTENTION = {"multi_head_attention_forward", "scaled_dot_product_attention"}


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


@dataclass(frozen=True)
class Replacement:
    """What `replace_activations` did, by names in the model ("" is the model itself).

    Attributes:
        activation: the chosen one.
        modules: activation modules that were swapped.
        functional: modules whose calls of activation functions are redirected.
        kept: ReLU6 modules that are the gate of a hard sigmoid written by hand, ``relu6(x + 3) / 6``.
        left: other activations that the model still has, one line each; see `left_activations`.
    """

    activation: Activation
    modules: list[str] = field(default_factory=list)
    functional: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def spec(self) -> dict[str, Any]:
        """Plain JSON data with which `apply_spec` does the same to another model of the same builder."""
        return self.activation.spec() | {"functional": self.functional, "kept": self.kept}


def replace_activations(
    model: nn.Module, activation: str, negative_slope: float = 0.01, *, example: Any
) -> Replacement:
    """Replaces the activations between the layers of any network, in place.

    Swapped are modules (ReLU, ReLU6, LeakyReLU, RReLU, ELU, CELU, SELU, SiLU, GELU, Mish, Hardswish, Softplus) and
    calls of their functions and methods; never what gates or normalises (sigmoid, tanh, softmax, GLU, ...), nor
    PReLU, whose slopes are parameters. A module that replaces one that worked in place does not. Names of modules and
    keys of the state_dict stay; the model can still be copied, pickled, traced and pruned.

    Args:
        model: any network; its modes, buffers and the random state stay. Where it was built by `models.build_model`,
            its ``dnr_builder`` learns of the replacement, so that it can be saved and rebuilt.
        activation: relu, leaky_relu, silu or gelu.
        negative_slope: of leaky_relu, >= 0.
        example: a tensor, a sequence of tensors or a dict of them; the model is run on it, in eval mode and then in
            training mode, to see its calls. Calls that it does not make on this example are not found.

    Raises:
        InputError: unknown activation, a model that fails on the example, or one in which calls cannot be replaced;
            the model is unchanged.
    """
    chosen = Activation(activation, float(negative_slope))
    _refuse_scripted(model)
    calls = _record(model, example, train=True)
    kept = list(dict.fromkeys(c.name for c in calls if c.gate and isinstance(c.module, _HIDDEN_TYPES)))
    functional = list(
        dict.fromkeys(
            c.name for c in calls if c.hidden and not isinstance(c.module, _HIDDEN_TYPES) and not c.computes(chosen)
        )
    )
    _refuse_in_place(model, example, chosen, kept)
    modules = _apply(model, chosen, functional, kept)
    done = Replacement(chosen, modules, functional, kept)
    done.left.extend(left_activations(model, example, chosen.name, chosen.negative_slope))
    builder = getattr(model, "dnr_builder", None)
    if isinstance(builder, dict):
        builder["activation"] = done.spec
    return done


def apply_spec(model: nn.Module, spec: Any) -> None:
    """Does to a model what `replace_activations` did to another of the same builder, without running it.

    Args:
        model: freshly built.
        spec: `Replacement.spec`, plain JSON data; it may come from an untrusted file.

    Raises:
        InputError: malformed spec, or names that the model does not have.
    """
    keys = {"name", "negative_slope", "functional", "kept"}
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str) or not set(spec) <= keys:
        raise InputError(f"architecture: activation: expected a mapping of {', '.join(sorted(keys))}, found {spec!r}")
    known = {name for name, _ in model.named_modules()}
    for key in ("functional", "kept"):
        names = spec.get(key, [])
        unknown = [name for name in names if name not in known] if _strings(names) else [names]
        if unknown:
            raise InputError(f"architecture: activation.{key}: expected names of modules, found {unknown[0]!r}")
    try:
        chosen = Activation(spec["name"], spec.get("negative_slope", 0.01))
    except InputError as error:
        raise InputError(*(f"architecture: {line}" for line in error.problems)) from error
    _refuse_scripted(model)
    _apply(model, chosen, spec.get("functional", []), spec.get("kept", []))


def left_activations(
    model: nn.Module, example: Any, activation: str | None = None, negative_slope: float = 0.01
) -> list[str]:
    """Every activation of a network but the chosen one, such as ``features.1.block.1.fc1 (Sigmoid)``, each place once.

    Modules of PyTorch by their type, called or not; calls of functions by the function's name and the module that makes
    them, as far as the model makes them on the example in eval mode. Attention counts as softmax, ``clamp`` from 0 on
    as an activation. What a scripted module computes cannot be seen, and the line says so.

    Args:
        model: any network; its modes and the random state stay.
        example: a tensor, a sequence of tensors or a dict of them.
        activation: the one that is not listed; None lists all.
        negative_slope: of leaky_relu; one of another slope is listed.

    Raises:
        InputError: the model fails on the example.
    """
    chosen = None if activation is None else Activation(activation, negative_slope)
    return _left(model, _record(model, example), chosen)


def _left(model: nn.Module, recorded: list[_Call], chosen: Activation | None) -> list[str]:
    found: dict[str, None] = {}
    calls: dict[str, list[_Call]] = {}
    for seen in recorded:
        calls.setdefault(seen.name, []).append(seen)
    for name, module in model.named_modules():
        shown = name or "the model"
        if isinstance(module, torch.jit.ScriptModule):
            found[f"{shown} (scripted, cannot be seen)"] = None
        elif isinstance(module, (*_HIDDEN_TYPES, *_OTHER_TYPES)):
            if chosen is None or not chosen.is_module(module):
                found[f"{shown} ({type(module).__name__})"] = None
        else:
            for seen in calls.get(name, []):
                if chosen is None or not seen.computes(chosen):
                    found[f"{shown} ({seen.function})"] = None
    return list(found)


def summary(model: nn.Module, example: Any) -> dict[str, Any]:
    """The activations of a model that `models.build_model` or `rebuild` made, for a run's report.

    Returns:
        ``name``: the chosen activation, or None where none was chosen; ``negative_slope`` of leaky_relu; ``places``:
        how many modules are it or call it; ``left``: see `left_activations`, all of them where none was chosen.
    """
    builder = getattr(model, "dnr_builder", {"name": ":", "kwargs": {}})
    spec = builder.get("activation")
    if spec is None and not any(mark in builder["name"] for mark in ".:"):  # a network of this package
        kwargs = builder["kwargs"]
        spec = {"name": kwargs.get("activation", "relu"), "negative_slope": kwargs.get("negative_slope", 0.01)}
    calls = _record(model, example)
    if spec is None:
        return {"name": None, "places": 0, "left": _left(model, calls, None)}
    chosen = Activation(spec["name"], spec.get("negative_slope", 0.01))
    places = {name for name, module in model.named_modules() if chosen.is_module(module)}
    places |= {seen.name for seen in calls if seen.computes(chosen)}
    return {**chosen.spec(), "places": len(places), "left": _left(model, calls, chosen)}


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


class _ActivationMode(TorchFunctionMode):
    """Hands each call of an activation function to `activation`, and runs every other function as it is."""

    def __init__(self) -> None:
        super().__init__()
        self._shifted: Callable[[], Tensor | None] = lambda: None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        full = getattr(func, "__name__", "").partition(".")[0]  # "relu.default" of the aten operators
        name = full.removesuffix("_")
        if name == "hardtanh" and kwargs.get("min_val") == 0:
            name = "relu6"  # what nn.ReLU6 calls
        if name in _HIDDEN or name in _OTHER or name in _ATTENTION or _is_clamp_from_zero(name, args, kwargs):
            x = args[0] if args else kwargs.get("input")
            gate = name == "relu6" and x is self._shifted()
            in_place = full.endswith("_") or bool(kwargs.get("inplace"))
            return self.activation(func, name, args, kwargs, gate, in_place)
        out = func(*args, **kwargs)
        if name == "add" and isinstance(out, Tensor) and any(type(a) in (int, float) and a == 3 for a in args):
            self._shifted = weakref.ref(out)
        return out

    def activation(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], gate: bool, in_place: bool
    ) -> Any:
        raise NotImplementedError


def _is_clamp_from_zero(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if name not in ("clamp", "clip", "clamp_min"):
        return False
    low = args[1] if len(args) > 1 else kwargs.get("min")
    return type(low) in (int, float) and low == 0


class _Redirect(_ActivationMode):
    def __init__(self, chosen: Activation) -> None:
        super().__init__()
        self.chosen = chosen

    def activation(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], gate: bool, in_place: bool
    ) -> Any:
        if name not in _HIDDEN or gate or self.chosen.is_call(name, args, kwargs):
            return func(*args, **kwargs)
        x: Tensor = args[0] if args else kwargs["input"]
        # a copy, since the backward pass of some activations needs the input that is overwritten
        return x.copy_(self.chosen(x.clone())) if in_place else self.chosen(x)


@dataclass(frozen=True)
class _Call:
    """A call of an activation function: by which module, and whether it computes the gate of a hard sigmoid."""

    name: str
    module: nn.Module
    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    gate: bool

    @property
    def hidden(self) -> bool:
        return self.function in _HIDDEN and not self.gate

    def computes(self, chosen: Activation) -> bool:
        return not self.gate and chosen.is_call(self.function, self.args, self.kwargs)


class _Recorder(_ActivationMode):
    def __init__(self, stack: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.stack, self.calls = stack, list[_Call]()

    def activation(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], gate: bool, in_place: bool
    ) -> Any:
        plain = tuple(value for value in args[1:] if not isinstance(value, Tensor))
        shown = "softmax" if name in _ATTENTION else name
        numbers = {key: value for key, value in kwargs.items() if not isinstance(value, Tensor)}
        self.calls.append(_Call(*self.stack[-1], shown, (None, *plain), numbers, gate))
        return func(*args, **kwargs)


def _record(model: nn.Module, example: Any, train: bool = False) -> list[_Call]:
    """The calls of activation functions in a forward pass in eval mode, and in training mode where that is asked for.

    Raises:
        InputError: the model fails in eval mode.
    """
    stack: list[tuple[str, nn.Module]] = [("", model)]
    recorder = _Recorder(stack)
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            stack.append((name, module))

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            stack.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with _untouched(model):
            with recorder:
                _run(model, example)
            if train:
                # two images, since BatchNorm does not train on one; a network that fails here was seen in eval mode
                with contextlib.suppress(Exception), recorder:
                    call(model.train(), _copied(example, 2))
    finally:
        for handle in handles:
            handle.remove()
    return recorder.calls


def _run(model: nn.Module, example: Any) -> list[Tensor]:
    """The outputs in eval mode."""
    try:
        return list(tensors(call(model.eval(), _copied(example))))
    except Exception as error:  # whatever the network raises on the example
        raise InputError(
            f"model.activation: expected a network that runs on the example, found {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """No gradients; modes, buffers and random states are as before afterwards."""
    buffers = [
        (module, key, buffer, buffer.clone())
        for module in model.modules()
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    with kept_modes(model), torch.no_grad(), torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for module, key, buffer, before in buffers:
                module._buffers[key] = buffer.copy_(before)


def _copied(value: Any, times: int = 1) -> Any:
    """Copies of the inputs, side by side along the first dimension: what works in place may write to them."""
    if isinstance(value, Tensor):
        return torch.cat([value] * times) if value.dim() else value.clone()
    if isinstance(value, dict):
        return {key: _copied(item, times) for key, item in value.items()}
    return [_copied(item, times) for item in value] if isinstance(value, list | tuple) else value


def _refuse_scripted(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"model.activation: expected modules of Python, found that {name or 'the model'} is scripted, so that "
                "nothing in it can be replaced"
            )


def _refuse_in_place(model: nn.Module, example: Any, chosen: Activation, kept: list[str]) -> None:
    """Refuses modules that overwrite an input which is read again: their replacement leaves it as it is."""
    modules = [
        module
        for name, module in model.named_modules()
        if name not in kept and isinstance(module, _HIDDEN_TYPES) and not chosen.is_module(module)
        if getattr(module, "inplace", False)
    ]
    if not modules:
        return
    with _untouched(model):
        state = torch.get_rng_state()
        before = [out.clone() for out in _run(model, example)]
        for module in modules:
            module.inplace = False
        try:
            torch.set_rng_state(state)
            after = _run(model, example)
        finally:
            for module in modules:
                module.inplace = True
    if before and output_difference(before, after)[1] > 1e-3:
        raise InputError(
            "model.activation: expected activations whose result is used, found in-place ones whose input is read "
            "again; set inplace=False where the model means that"
        )


def _apply(model: nn.Module, chosen: Activation, functional: list[str], kept: list[str]) -> list[str]:
    """Swaps and redirects; the names of the swapped modules."""
    names = {module: name for name, module in model.named_modules()}
    redirected = [module for module, name in names.items() if name in functional]
    for module in redirected:
        # fx copies a graph module by its own means; a forward of the instance's own goes before that of its class
        if isinstance(module, fx.GraphModule) or "forward" in vars(module):
            what = "a graph of torch.fx" if isinstance(module, fx.GraphModule) else "a patched forward"
            raise InputError(
                f"model.activation: expected calls in the forward method of a class, found {what} in "
                f"{names[module] or 'the model'}"
            )
    new: dict[nn.Module, nn.Module] = {}
    for parent in list(names):
        for key, child in parent._modules.items():
            if not isinstance(child, _HIDDEN_TYPES) or chosen.is_module(child) or names[child] in kept:
                continue
            if child not in new:
                new[child] = chosen.module().train(child.training)
            parent._modules[key] = new[child]
            if isinstance(parent, nn.TransformerEncoderLayer):
                parent.activation_relu_or_gelu = 0  # its fused path would compute the old one
    for module in redirected:
        if not isinstance(module, _Redirected):
            module.__class__ = _redirected(type(module))  # type: ignore[arg-type]
    for module in names:
        if isinstance(module, _Redirected):  # also those of an earlier replacement
            module._activation = chosen
    return [names[child] for child in new]


class _Redirected(nn.Module):
    """Mixed in before a module's own class: runs its ``forward`` with activation functions redirected."""

    _activation: Activation

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Redirect(self._activation):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the mixed class has no name of its own that pickle could import; the module's class has
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        return _blank, (type(self).__mro__[2], *reduced[1][1:]), *reduced[2:]


def _blank(kind: type[nn.Module], *arguments: Any) -> Any:
    return copyreg.__newobj__(_redirected(kind), *arguments)  # type: ignore[attr-defined, arg-type]


@functools.cache  # one class for each, so that two models of one builder have modules of the same types
def _redirected(kind: type[nn.Module]) -> type[nn.Module]:
    def fill(namespace: dict[str, Any]) -> None:
        namespace.update(__module__=kind.__module__, __qualname__=kind.__qualname__, __doc__=kind.__doc__)

    return types.new_class(kind.__name__, (_Redirected, kind), exec_body=fill)
