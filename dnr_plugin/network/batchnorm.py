"""BatchNorm after surgery: statistics taken anew, and the layer as one affine map."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sized
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops

from dnr_plugin.network.calling import batch_inputs, call, kept_modes, refuse_frozen
from dnr_plugin.network.kinds import consumer, is_batchnorm


class _Called(nn.Module):
    """Takes a batch's inputs as one argument, whatever their form, as fvcore hands them over."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Any:
        return call(self.model, inputs)


def recalibrate_batchnorm(model: nn.Module, loader: Iterable[Any], batches: int | None = None) -> int:
    """Replaces BatchNorm's running statistics by those of the given data (fvcore's precise_bn).

    After channels were removed the old statistics describe inputs that no longer exist. Only BatchNorm layers run in
    train mode meanwhile, so dropout stays off. Layers that the data do not reach keep their statistics, and all do
    where the model fails.

    Args:
        model: any network; a model without BatchNorm is left as it is.
        loader: batches of inputs, or of (input, target) pairs, on the model's device.
        batches: how many to take; by default all, for which a loader without a length is read into memory.

    Returns:
        Number of batches used.

    Raises:
        InputError: the model was scripted, traced or exported.
        ValueError: the loader holds no batch.
        AssertionError: it holds fewer than ``batches``, or a BatchNorm layer is used twice (fvcore's check).
    """
    from fvcore.nn.precise_bn import BN_MODULE_TYPES, update_bn_stats

    refuse_frozen(model)
    layers = [m for m in model.modules() if isinstance(m, BN_MODULE_TYPES) and m.track_running_stats]
    if not layers:
        return 0
    if batches is None:
        loader = loader if isinstance(loader, Sized) else list(loader)
        batches = len(loader)
    if batches < 1:
        raise ValueError("recalibrate_batchnorm: expected at least one batch, found none")
    before = [(layer.momentum, copy.deepcopy(layer.state_dict()), set(layer._forward_pre_hooks)) for layer in layers]
    unreached = layers
    with kept_modes(model), torch.no_grad():
        model.eval()
        for layer in layers:
            layer.train()
        try:
            update_bn_stats(_Called(model), map(batch_inputs, loader), batches)
            unreached = [
                layer for layer, (_, state, _) in zip(layers, before, strict=True)
                if torch.equal(layer.num_batches_tracked, state["num_batches_tracked"])
            ]  # fmt: skip
        finally:  # update_bn_stats sets layers without inputs to zero, and an error leaves its traces in all
            for layer, (momentum, state, hooks) in zip(layers, before, strict=True):
                layer.momentum = momentum
                for key in set(layer._forward_pre_hooks) - hooks:
                    del layer._forward_pre_hooks[key]
                if layer in unreached:
                    layer.load_state_dict(state)
                layer.running_var.clamp_min_(0.0)  # a constant's variance comes out as a difference of large squares
    return batches


def constant_absorber(graph: tp.DependencyGraph, module: nn.Module) -> Tensor | str:
    """What absorbs a constant shift of a consumer's outputs.

    Args:
        graph: of the model.
        module: the consumer.

    Returns:
        Its bias, to which a shift is added; else the running mean of the BatchNorm behind it, from which a shift is
        taken off; else why there is neither.

    Raises:
        TypeError: the module is no consumer.
    """
    reason = consumer(module).no_constant
    if reason is not None:
        return reason
    if isinstance(module.bias, Tensor):
        return module.bias
    norm = norm_behind(graph, module)
    if norm is not None:
        assert norm.running_mean is not None
        return norm.running_mean
    return "neither a bias nor a BatchNorm follows"


def norm_behind(graph: tp.DependencyGraph, module: nn.Module) -> nn.modules.batchnorm._BatchNorm | None:
    """The BatchNorm with running statistics that alone reads a layer's outputs, if there is one."""
    behind = graph.module2node[module].outputs
    if len(behind) == 1 and behind[0].type == ops.OPTYPE.BN and is_batchnorm(behind[0].module):
        norm: nn.modules.batchnorm._BatchNorm = behind[0].module
        return norm
    return None


def affine(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """A BatchNorm in eval mode as ``scale * y + shift``; float64, shape [out] each."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = torch.zeros_like(scale)
    if norm.affine:
        scale, shift = scale * norm.weight.detach().double(), norm.bias.detach().double()
    return scale, shift - scale * norm.running_mean.double()


def assign_affine(
    norm: nn.modules.batchnorm._BatchNorm, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor
) -> None:
    """Makes a BatchNorm ``scale * y + shift`` in eval mode, with the statistics of y wherever it can hold both.

    Args:
        norm: with running statistics; changed in place. One without weights of its own keeps its variance, which then
            is what scales, so that ``scale`` must be as it was.
        scale, shift: float64, shape [out] each.
        mean, variance: of what it reads, shape [out] each.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    if norm.affine:
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_(scale * (variance + norm.eps).sqrt())
        norm.bias.copy_(shift + scale * mean)
    else:
        norm.running_mean.copy_(-shift / scale)
