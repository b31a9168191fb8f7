"""Weights of a consumer once others stand in for the neurons that a group is about to lose."""

from __future__ import annotations

import torch
import torch_pruning as tp
from torch import Tensor

from dnr_plugin.network.batchnorm import constant_absorber
from dnr_plugin.network.kinds import consumer, has_weights
from dnr_plugin.observation.moments import Moments
from dnr_plugin.scoring.brain_surgeon import reproduce
from dnr_plugin.scoring.evidence import Evidence


@torch.no_grad()
def correct(graph: tp.DependencyGraph, e: Evidence) -> str | None:
    """Corrects a consumer's weights, so that inputs that stay stand in for those of ``e.use``, about to be removed.

    What the removed ones contribute on average goes into its bias or the BatchNorm behind it.

    Args:
        graph: of the model.
        e: a consumer, with the channels that go, and second moments.

    Returns:
        Why nothing was changed, or None.
    """
    module, moments = e.use.module, e.activity.moments
    if not has_weights(module):
        return "it has no weights of its own"
    if not isinstance(moments, Moments):
        return f"it reads {e.activity.channels} channels, too many for second moments"
    features = moments.features
    absorber = constant_absorber(graph, module)
    constant = isinstance(absorber, Tensor)
    halves = (None, 0, 1) if moments.sums[:, -1, -1].all() else (None,)
    statistics = [moments.mean_and_covariance(half) for half in halves]
    mean, covariances = statistics[0][0], [cov if constant else cov + torch.outer(mu, mu) for mu, cov in statistics]
    gone = torch.zeros(len(mean), dtype=torch.bool)
    gone[moments.columns(e.use.channels).flatten()] = True
    matrices, shifts = consumer(module).matrices(features), []
    size = len(mean) // len(matrices)
    for number, weights in enumerate(matrices):
        inside = slice(number * size, (number + 1) * size)
        own, stays = gone[inside], ~gone[inside]
        before = weights @ mean[inside]
        if own.any() and stays.any():
            weights[:, stays] += reproduce([c[inside, inside] for c in covariances], own, weights)
        shifts.append(before - weights[:, stays] @ mean[inside][stays])
    consumer(module).assign(features, matrices)
    if isinstance(absorber, Tensor):
        shift = torch.cat(shifts).view(absorber.numel(), -1).sum(1).to(absorber)  # over a kernel's positions
        absorber.add_(shift if absorber is module.bias else -shift)
    torch.clear_autocast_cache()
    return None
