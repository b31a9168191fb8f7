"""BatchNorm after surgery: statistics taken anew, and means of removed neurons folded in."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence, Sized
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops

from .graph import kept_modes
from .inputs import batch_inputs, call
from .neurons import Evidence


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
        ValueError: the loader holds no batch.
        AssertionError: it holds fewer than ``batches``, or a BatchNorm layer is used twice (fvcore's check).
    """
    from fvcore.nn.precise_bn import BN_MODULE_TYPES, update_bn_stats

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


def fold_means(graph: tp.DependencyGraph, evidence: Sequence[Evidence]) -> list[tuple[str, str, bool]]:
    r"""Moves the mean of neurons that are about to be removed into what follows their consumers.

    For each consumer :math:`y_o \mathrel{+}= \sum_c \bar a_c \sum_k W_{o,c,k}` goes into its bias, or is taken off the
    running mean of the BatchNorm behind it. Costs no FLOPs. For a constant neuron this is exact wherever every kernel
    position reads a real position (`exact_fold`); at the borders of a zero-padded convolution it is not.

    Args:
        graph: of the model.
        evidence: of the group that is going to be pruned, with the indices that go; before it is pruned.

    Returns:
        For each consumer its type, what took the mean ("bias", "BatchNorm", or why nothing did), and whether folding a
        constant there is exact.
    """
    done = []
    for e in evidence:
        place = place_of_constant(graph, e.use.module)
        if isinstance(place, Tensor):
            with torch.no_grad():
                shift = _shift(e).to(place.device, torch.float64)
                sign = 1.0 if place is e.use.module.bias else -1.0
                place.copy_(place.double() + sign * shift)
            what = "bias" if place is e.use.module.bias else "BatchNorm"
        else:
            what = place
        done.append((type(e.use.module).__name__, what, isinstance(place, Tensor) and exact_fold(e.use.module)))
    return done


def can_fold(graph: tp.DependencyGraph, module: nn.Module) -> bool:
    """Whether a constant input channel of this consumer can be folded away without changing any output."""
    return isinstance(place_of_constant(graph, module), Tensor) and exact_fold(module)


def exact_fold(module: nn.Module) -> bool:
    """Whether a constant input makes a constant output at every position, borders included."""
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.transposed:
            return False
        return module.padding_mode != "zeros" or module.padding == "valid" or not any(_padding(module))
    return isinstance(module, nn.Linear)


def _padding(module: nn.modules.conv._ConvNd) -> Sequence[int]:
    if module.padding == "same":
        return [k - 1 for k in module.kernel_size]
    assert not isinstance(module.padding, str)
    return module.padding


def place_of_constant(graph: tp.DependencyGraph, module: nn.Module) -> Tensor | str:
    """What takes a shift of a consumer's outputs: its bias, else the following BatchNorm's mean, else why not."""
    if isinstance(module, nn.MultiheadAttention):
        return "attention has no place for it"
    if isinstance(module, nn.modules.conv._ConvNd) and module.transposed and any(s > 1 for s in module.stride):
        return "a strided transposed convolution spreads a constant unevenly"
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
    if len(behind) == 1 and behind[0].type == ops.OPTYPE.BN and behind[0].module.running_mean is not None:
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


def _shift(evidence: Evidence) -> Tensor:
    """Change of each output that the removed channels' means cause, float64, shape [out]."""
    module, activity, channels = evidence.use.module, evidence.activity, evidence.use.channels
    constant = activity.highest == activity.lowest
    mean = torch.where(constant, activity.highest.double(), activity.mean).cpu()
    gone = torch.zeros_like(mean)
    gone[channels] = mean[channels]
    assert isinstance(module, nn.modules.conv._ConvNd | nn.Linear)
    weight = module.weight.detach().double().cpu()
    if isinstance(module, nn.Linear):
        return weight @ gone
    taps = weight.flatten(2).sum(2)  # [out, in / groups], transposed: [in, out / groups]
    inputs = gone.view(module.groups, -1)
    if module.transposed:
        return torch.einsum("gio,gi->go", taps.view(module.groups, inputs.shape[1], -1), inputs).flatten()
    return torch.einsum("goi,gi->go", taps.view(module.groups, -1, inputs.shape[1]), inputs).flatten()
