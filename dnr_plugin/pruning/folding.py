"""Means of neurons that are about to be removed, folded into what follows their consumers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch_pruning as tp
from torch import Tensor, nn

from dnr_plugin.network.batchnorm import constant_absorber
from dnr_plugin.network.kinds import consumer
from dnr_plugin.scoring.evidence import Evidence


def fold_means(graph: tp.DependencyGraph, evidence: Sequence[Evidence]) -> list[tuple[str, str, bool]]:
    r"""Moves the mean of neurons that are about to be removed into what follows their consumers.

    For each consumer :math:`y_o \mathrel{+}= \sum_c \bar a_c \sum_k W_{o,c,k}` goes into its bias, or is taken off the
    running mean of the BatchNorm behind it. Costs no FLOPs. For a constant neuron this is exact wherever every kernel
    position reads a real position (`Consumer.folds_exactly`); at the borders of a zero-padded convolution it is not.

    Args:
        graph: of the model.
        evidence: of the group that is going to be pruned, with the indices that go; before it is pruned.

    Returns:
        For each consumer its type, what took the mean ("bias", "BatchNorm", or why nothing did), and whether folding a
        constant there is exact.
    """
    done = []
    for e in evidence:
        absorber = constant_absorber(graph, e.use.module)
        if isinstance(absorber, Tensor):
            with torch.no_grad():
                shift = _shift(e).to(absorber.device, torch.float64)
                sign = 1.0 if absorber is e.use.module.bias else -1.0
                absorber.copy_(absorber.double() + sign * shift)
            what = "bias" if absorber is e.use.module.bias else "BatchNorm"
        else:
            what = absorber
        done.append(
            (type(e.use.module).__name__, what, isinstance(absorber, Tensor) and consumer(e.use.module).folds_exactly)
        )
    torch.clear_autocast_cache()
    return done


def can_fold(graph: tp.DependencyGraph, module: nn.Module) -> bool:
    """Whether a constant input channel of this consumer can be folded away without changing any output."""
    return isinstance(constant_absorber(graph, module), Tensor) and consumer(module).folds_exactly


def _shift(evidence: Evidence) -> Tensor:
    """Change of each output that the removed channels' means cause, float64, shape [out]."""
    module, activity, channels = evidence.use.module, evidence.activity, evidence.use.channels
    constant = activity.highest == activity.lowest
    mean = torch.where(constant, activity.highest.double(), activity.mean).cpu()
    gone = torch.zeros_like(mean)
    gone[channels] = mean[channels]
    return consumer(module).shift(gone)
