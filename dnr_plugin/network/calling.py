"""How models are called: their inputs, outputs, modes and names; what looks on meanwhile."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from dnr_plugin.errors import InputError


@contextlib.contextmanager
def kept_modes(model: nn.Module, *, attributes: bool = True) -> Iterator[None]:
    """Restores each module's train or eval mode afterwards, and drops tensors that the model kept on itself meanwhile.

    Modules compiled in place run as they were written.

    Features, attention maps or caches that a forward pass leaves in attributes would hold a graph that `copy.deepcopy`
    refuses. Parameters, buffers and hooks are not looked at.

    Args:
        model: any network.
        attributes: whether to drop such tensors.
    """
    modes = {module: module.training for module in model.modules()}
    compiled = {module: module._compiled_call_impl for module in modes if module._compiled_call_impl is not None}
    looked_at = [module for module in modes if attributes and not isinstance(module, LazyModuleMixin)]
    kept = {module: _attributes(module) for module in looked_at}
    contents = [(v, v.copy()) for values in kept.values() for v in values.values() if type(v) in (dict, list)]
    for module in compiled:  # in place, by `nn.Module.compile`
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call_impl in compiled.items():
            module._compiled_call_impl = call_impl
        for module, training in modes.items():
            module.training = training
        for module, values in kept.items():
            changed = {name: v for name, v in _attributes(module).items() if v is not values.get(name, module)}
            if all(next(tensors(value), None) is None for value in changed.values()):
                continue
            for name in changed:  # with what says that they are there, or of which size
                if name in values:
                    module.__dict__[name] = values[name]
                else:
                    del module.__dict__[name]
        for value, before in contents:
            if len(value) != len(before) and next(tensors(value), None) is not None:
                value.clear()
                value.extend(before) if isinstance(value, list) else value.update(before)


@contextlib.contextmanager
def in_eval(model: nn.Module, hooks: Iterable[torch.utils.hooks.RemovableHandle] = ()) -> Iterator[None]:
    """The model in eval mode; on leaving its modes are as they were (`kept_modes`), and the hooks gone."""
    try:
        with kept_modes(model):
            model.eval()
            yield
    finally:
        for hook in hooks:
            hook.remove()


_OF_EVERY_MODULE = set(vars(nn.Module()))


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that keeps tensors of an autograd graph on itself, which are detached in it."""
    memo = {id(t): t.detach().clone() for m in model.modules() for t in tensors(vars(m)) if not t.is_leaf}
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Keeps forward hooks of a model silent: of observers, and of whoever else is not meant to see what runs inside.

    Hooks of torch's own, by which `torch.nn.utils` computes weights, go on.
    """
    hooks = [m.__dict__[name] for m in model.modules() for name in ("_forward_hooks", "_forward_pre_hooks")]
    before = [registered.copy() for registered in hooks]
    for registered in hooks:
        for key in [key for key, hook in registered.items() if not type(hook).__module__.startswith("torch.nn.utils")]:
            del registered[key]
    try:
        yield
    finally:
        for registered, saved in zip(hooks, before, strict=True):
            registered.clear()
            registered.update(saved)


def eval_outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Every tensor that a model returns in eval mode, as copies, without gradients; modes are restored."""
    with kept_modes(model), torch.no_grad():
        model.eval()
        return [out.clone() for out in tensors(call(model, inputs))]


def call(model: nn.Module, inputs: Any) -> Any:
    """Calls a model, as it was written, with a tensor, a sequence of tensors or a dict of them."""
    with uncompiled():
        return call_as_it_is(model, inputs)


def call_as_it_is(model: nn.Module, inputs: Any) -> Any:
    """`call`, but compiled where the model is."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, list | tuple) else model(inputs)


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Lets compiled models run as they were written, with hooks that were added since and with widths that changed."""
    stance = getattr(torch.compiler, "set_stance", None)  # from torch 2.6 on
    return contextlib.nullcontext() if stance is None else stance("force_eager")


def eager(model: nn.Module) -> nn.Module:
    """The model itself, also of one that `torch.compile` returned.

    Raises:
        InputError: it is scripted, traced, exported or quantised, and cannot be changed.
    """
    refuse_frozen(model)
    for name, module in model.named_modules():
        if _is_quantised(module):
            raise InputError(
                f"model: expected layers with float weights, found {name} ({type(module).__name__}), which is "
                "quantised: prune before quantising"
            )
    return model._orig_mod if is_compiled(model) else model  # type: ignore[return-value]


def refuse_frozen(model: nn.Module) -> None:
    """Refuses what was scripted, traced or exported, whose layers can neither be seen nor changed.

    Raises:
        InputError: it is such a model, in a wrapper or not, or holds an exported part.
    """
    network = network_of(model)
    for name, module in network.named_modules():
        exported = isinstance(module, torch.fx.GraphModule) and "eval" in vars(module)
        if exported or (module is network and isinstance(module, torch.jit.ScriptModule)):
            raise InputError(
                f"model: expected a torch.nn.Module as it was written, found {name or 'one'} that was scripted, traced "
                "or exported, whose layers are fixed: prune the model that it was made from"
            )


def is_compiled(module: nn.Module) -> bool:
    """Whether it is what `torch.compile` made of a module."""
    inner = getattr(module, "_orig_mod", None)
    return type(module).__name__ == "OptimizedModule" and isinstance(inner, nn.Module) and "forward" in vars(module)


def _is_quantised(module: nn.Module) -> bool:
    """Whether its weights are integers, or packed where nothing can be taken away from them."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    kind, weight = type(module), module._parameters.get("weight")
    if isinstance(weight, Tensor) and not (weight.is_floating_point() or weight.is_complex()):
        return True
    # these compute in floats what a converted model computes in integers
    of_torch = kind.__module__.startswith("torch.") and "quantized" in kind.__module__.split(".")
    return of_torch and kind.__name__ not in ("FloatFunctional", "FXFloatFunctional")


def one_sample(inputs: Any) -> Any:
    """The first sample of a tensor, or of each tensor in a sequence or dict."""
    return part_of(inputs, slice(1))


def batch_inputs(batch: Any, example: Any = None) -> Any:
    """The model's inputs of a batch, whatever else a loader adds to it.

    Args:
        batch: inputs, or a sequence that begins with them, or a dict that holds them.
        example: the model's example inputs, which tell how many there are, or their names; one by default.

    Returns:
        For one input: the batch itself or its first element. For a sequence of inputs: the first element if it is a
        sequence itself, else as many elements as there are inputs. For a dict: the entries of these names.

    Raises:
        InputError: the batch holds fewer inputs, or others.
    """
    if isinstance(example, dict):
        batch = batch[0] if isinstance(batch, Sequence) and batch and isinstance(batch[0], dict) else batch
        if not isinstance(batch, dict) or not set(example) <= set(batch):
            raise InputError(
                f"batch: expected a dict with {', '.join(example)}, as example_inputs, found {_form(batch)}"
            )
        return {key: batch[key] for key in example}
    if isinstance(batch, dict):
        if example is not None:
            raise InputError(f"batch: expected inputs like example_inputs, {_form(example)}, found {_form(batch)}")
        return batch
    if not isinstance(batch, Sequence) or isinstance(batch, str):
        if isinstance(example, list | tuple) and len(example) > 1:
            raise InputError(f"batch: expected {len(example)} inputs, as example_inputs, found {_form(batch)}")
        return batch
    if not isinstance(example, list | tuple):
        return batch[0]
    inputs = batch[0] if isinstance(batch[0], list | tuple) else batch
    if len(inputs) < len(example):
        raise InputError(f"batch: expected {len(example)} inputs, as example_inputs, found {_form(batch)}")
    return tuple(inputs[: len(example)])


def samples_in(inputs: Any) -> int:
    """How many samples a batch of inputs holds: the first dimension of its first tensor."""
    return len(next(tensors(inputs)))


def part_of(inputs: Any, samples: slice) -> Any:
    """Some of the samples of a tensor, or of each tensor in a sequence or dict."""
    return mapped(lambda a: a[samples], inputs)


def mapped(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """A function of a tensor, or of each tensor in a sequence or dict; what is no tensor stays."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, dict):
        return {key: mapped(function, value) for key, value in inputs.items()}
    if not isinstance(inputs, list | tuple):
        return inputs
    values = [mapped(function, value) for value in inputs]
    return type(inputs)(*values) if hasattr(inputs, "_fields") else type(inputs)(values)


def concatenated(batches: Sequence[Any]) -> Any:
    """Batches of the same form as one."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat([*batches])
    if isinstance(first, dict):
        return {key: concatenated([batch[key] for batch in batches]) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(concatenated(values) for values in zip(*batches, strict=True))
    return first


def _form(value: Any) -> str:
    """What a batch is, in words."""
    if isinstance(value, dict):
        return f"a dict with {', '.join(map(str, value))}"
    return f"{len(value)} elements" if isinstance(value, list | tuple) else type(value).__name__


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a model's output, in order, through sequences, named tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


# Where a DataParallel, DistributedDataParallel or compiled model keeps the network it wraps.
_WRAPPED = ("module", "_orig_mod")


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """Name of each module below a model's wrappers, so that a wrapped model and the bare one agree on names."""
    while [name for name, _ in model.named_children()] in [[name] for name in _WRAPPED]:
        (_, model), *_ = model.named_children()
    return {module: name for name, module in model.named_modules()}


def network_of(model: nn.Module) -> nn.Module:
    """The network itself, below any wrappers."""
    return next(iter(module_names(model)))


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What a consumer is called on: its first argument, by position or name; None where that is no float tensor."""
    a = args[0] if args else kwargs.get("input", kwargs.get("query"))
    return a if isinstance(a, Tensor) and a.is_floating_point() else None


class Pausable:
    """What looks on while a model is called, and can look away."""

    _paused = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Lets things be called without being noticed."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before


def output_difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[float, float]:
    """Largest difference of outputs.

    Args:
        before, after: tensors of a model's output, in order.

    Returns:
        The largest absolute difference, and the same relative to the largest absolute output before; both >= 0, and
        infinite where the shapes differ, as where a detector finds another number of boxes.
    """
    if [a.shape for a in before] != [b.shape for b in after]:
        return math.inf, math.inf
    before, after = [a for a in before if a.numel()], [b for b in after if b.numel()]
    if not before:
        return 0.0, 0.0
    absolute = max(float((a.double() - b.double()).abs().max()) for a, b in zip(before, after, strict=True))
    largest = max(float(a.double().abs().max()) for a in before)
    return absolute, absolute / largest if largest > 0 else absolute
