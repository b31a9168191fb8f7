"""Takes neurons out of a network, with everything in their dependency groups."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.errors import InputError, did_you_mean, first_line
from dnr_plugin.network.attention import completed, split_modules
from dnr_plugin.network.calling import eager, eval_outputs, network_of, one_sample, without_hooks
from dnr_plugin.network.dependencies import shared_reason
from dnr_plugin.network.graph import build_graph, group_of
from dnr_plugin.pruning.folding import fold_means
from dnr_plugin.pruning.optimizer import follow_optimizer
from dnr_plugin.scoring.importance import DyingNeuronImportance


def prune_neurons(
    model: nn.Module,
    example_inputs: Any,
    removals: Mapping[str, Sequence[int]],
    *,
    importance: DyingNeuronImportance | None = None,
    fold: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    followers: Sequence[nn.Module] = (),
) -> int:
    """Physically removes neurons and everything in their dependency groups.

    Afterwards modes, ``requires_grad``, gradients and the memory format are as they were, on the new shapes. All or
    nothing: where a removal fails, or the model would not run afterwards, it is as it was before.

    Args:
        model: changed in place.
        example_inputs: as Torch-Pruning takes them.
        removals: root layer -> neurons, as in `Plan`.
        importance: whose statistics then follow, and whose means are folded.
        fold: move the means of the removed neurons into the next bias or BatchNorm; needs ``importance``.
        optimizer: taken along (`follow_optimizer`).
        followers: models of the same layers that lose the same neurons, as an average of the weights does
            (`torch.optim.swa_utils.AveragedModel`, or the bare network); with ``fold`` the means go into their own
            constants by their own weights.

    Returns:
        Number of consumers that took a mean.

    Raises:
        InputError: the model cannot be traced; there is no such layer or neuron; the model does not run without these.
        RuntimeError: a removal would leave a layer without channels.
    """
    if fold and importance is None:
        raise ValueError("fold: expected an importance, whose statistics hold the means, found none")
    model = eager(model)
    copies = [network_of(eager(follower)) for follower in followers]
    channels_last = [(m, name) for m in (model, *copies) for name, p in m.named_parameters() if _is_channels_last(p)]
    with follow_optimizer(optimizer, model), contextlib.ExitStack() as undone:
        undone.enter_context(_undone_on_failure(model, importance))
        for follower in copies:
            undone.enter_context(_undone_on_failure(follower, None))
            with importance.unchanged() if importance is not None else contextlib.nullcontext():
                _prune(follower, example_inputs, removals, importance, fold)
        folded = _prune(model, example_inputs, removals, importance, fold)
        if any(map(len, removals.values())):
            for pruned in (model, *copies):
                _run(pruned, example_inputs)
    for owner, name in channels_last:
        parameter = owner.get_parameter(name)
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return folded


def _prune(
    model: nn.Module,
    example_inputs: Any,
    removals: Mapping[str, Sequence[int]],
    importance: DyingNeuronImportance | None,
    fold: bool,
) -> int:
    modules, folded = dict(model.named_modules()), 0
    graph = build_graph(model, example_inputs)
    for name, neurons in completed(split_modules(model), removals).items():
        if not neurons:
            continue
        root = modules.get(name)
        if root is None or root not in graph.module2node:
            raise InputError(
                f"removals: expected layers that run in eval mode, found {name!r}{did_you_mean(name, modules)}"
            )
        size = graph.get_out_channels(root)
        if not 0 <= min(neurons) <= max(neurons) < size:
            raise InputError(f"removals: expected neurons of {name} in [0, {size}), found {sorted(neurons)}")
        group = group_of(graph, root, neurons)
        if not graph.check_pruning_group(group):
            raise RuntimeError(f"{name}: removing {len(neurons)} neurons would leave a layer without channels")
        shared = shared_reason(group)
        if shared is not None:
            raise InputError(f"removals: expected neurons that can go from {name} alone, found that {shared}")
        if importance is not None:
            importance.follow(group)
            if fold:
                done = fold_means(graph, importance.evidence(group))
                folded += sum(what in ("bias", "BatchNorm") for _, what, _ in done)
        try:
            group.prune()
        except Exception as error:  # a layer that Torch-Pruning knows and cannot shrink
            raise _cannot_go(name, error) from error
    return folded


def _run(model: nn.Module, example_inputs: Any) -> None:
    """Runs the model once, unseen by hooks that only look on."""
    try:
        with without_hooks(model):
            eval_outputs(model, one_sample(example_inputs))
    except Exception as error:  # whatever a model of someone's does with fewer channels
        raise _cannot_go("the model", error) from error


def _cannot_go(where: str, error: Exception) -> InputError:
    return InputError(
        f"removals: expected neurons that the model can do without, found that {where} fails without them with "
        f"{type(error).__name__}: {first_line(error)}; nothing was removed"
    )


@contextlib.contextmanager
def _undone_on_failure(model: nn.Module, importance: DyingNeuronImportance | None) -> Iterator[None]:
    """Makes a model, and the statistics of an importance, again what they were where something fails inside."""
    before = {module: _state(module) for module in model.modules()}
    constants = [t for t in (*model.parameters(), *model.buffers()) if t.dim() == 1]  # which means are folded into
    values = [constant.detach().clone() for constant in constants]
    restore = importance.snapshot() if importance is not None else None
    try:
        yield
    except BaseException:
        for module, state in before.items():
            module.__dict__.clear()
            module.__dict__.update(state)
        with torch.no_grad():
            for constant, value in zip(constants, values, strict=True):
                constant.copy_(value)
        if restore is not None:
            restore()
        raise


def _state(module: nn.Module) -> dict[str, Any]:
    return {key: value.copy() if type(value) is dict else value for key, value in vars(module).items()}


def _is_channels_last(value: Tensor) -> bool:
    return value.dim() == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)
