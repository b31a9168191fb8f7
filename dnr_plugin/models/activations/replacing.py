"""Replaces the activations between a network's layers, modules and function calls, and says which others it has.

A module is swapped in the module that holds it. A call such as ``F.relu(x)`` has no name to swap: one forward pass
tells which modules make such calls, and from then on these run their ``forward`` under a `TorchFunctionMode` that
computes the chosen activation instead. Sigmoid, tanh, softmax and their kin gate or normalise and are never replaced.
"""

from __future__ import annotations

import copyreg
import functools
import types
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from dnr_plugin.errors import InputError
from dnr_plugin.models.activations.choice import HIDDEN, HIDDEN_TYPES, Activation, are_strings
from dnr_plugin.models.activations.recording import ActivationMode, left_activations, record, run_outputs, untouched
from dnr_plugin.network.calling import output_difference


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
        model: any network; its modes, buffers and the random state stay. Where it was built by `build.build_model`,
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
    calls = record(model, example, train=True)
    kept = list(dict.fromkeys(c.name for c in calls if c.gate and isinstance(c.module, HIDDEN_TYPES)))
    functional = list(
        dict.fromkeys(
            c.name for c in calls if c.hidden and not isinstance(c.module, HIDDEN_TYPES) and not c.computes(chosen)
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
        unknown = [name for name in names if name not in known] if are_strings(names) else [names]
        if unknown:
            raise InputError(f"architecture: activation.{key}: expected names of modules, found {unknown[0]!r}")
    try:
        chosen = Activation(spec["name"], spec.get("negative_slope", 0.01))
    except InputError as error:
        raise InputError(*(f"architecture: {line}" for line in error.problems)) from error
    _refuse_scripted(model)
    _apply(model, chosen, spec.get("functional", []), spec.get("kept", []))


class _Redirect(ActivationMode):
    def __init__(self, chosen: Activation) -> None:
        super().__init__()
        self.chosen = chosen

    def activation(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], gate: bool, in_place: bool
    ) -> Any:
        if name not in HIDDEN or gate or self.chosen.is_call(name, args, kwargs):
            return func(*args, **kwargs)
        x: Tensor = args[0] if args else kwargs["input"]
        # a copy, since the backward pass of some activations needs the input that is overwritten
        return x.copy_(self.chosen(x.clone())) if in_place else self.chosen(x)


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
        if name not in kept and isinstance(module, HIDDEN_TYPES) and not chosen.is_module(module)
        if getattr(module, "inplace", False)
    ]
    if not modules:
        return
    with untouched(model):
        state = torch.get_rng_state()
        before = [out.clone() for out in run_outputs(model, example)]
        for module in modules:
            module.inplace = False
        try:
            torch.set_rng_state(state)
            after = run_outputs(model, example)
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
            if not isinstance(child, HIDDEN_TYPES) or chosen.is_module(child) or names[child] in kept:
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
