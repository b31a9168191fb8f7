"""How a group's consumers read its neurons, and how their weights change once others stand in for those removed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch_pruning as tp
from torch import Tensor, nn

from .batchnorm import affine, norm_behind, place_of_constant
from .neurons import Evidence, query_weights
from .redundancy import Reader, damages, reproduce


def weight_matrices(module: nn.Module, each: int) -> list[Tensor]:
    """Weights of a consumer by what they are multiplied with, for each group of a grouped convolution.

    Args:
        module: the consumer.
        each: features of a channel (`moments.features_of`): 1, or the positions of the kernel.

    Returns:
        Float64, shape [outputs, features] each. Where a convolution's channels are read alone, every position of the
        kernel is an output of its own.
    """
    if isinstance(module, nn.MultiheadAttention):
        return [query_weights(module).detach().double().cpu()]
    assert isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    weight = module.weight.detach().double().cpu()
    if isinstance(module, nn.Linear):
        return [weight]
    if module.transposed:  # [in, out / groups, *kernel]
        return [part.flatten(1).T.contiguous() for part in weight.chunk(module.groups)]
    if each > 1:
        return [*weight.flatten(1).chunk(module.groups)]
    return [part.movedim(1, -1).flatten(0, -2) for part in weight.chunk(module.groups)]


def _assign(module: nn.Module, each: int, matrices: Sequence[Tensor]) -> None:
    """The reverse of `weight_matrices`."""
    if isinstance(module, nn.MultiheadAttention):
        query_weights(module).copy_(matrices[0])
        return
    assert isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    shape = module.weight.shape
    if isinstance(module, nn.modules.conv._ConvNd) and module.transposed:
        found = torch.cat([part.T for part in matrices])
    elif each > 1 or isinstance(module, nn.Linear):
        found = torch.cat([*matrices])
    else:
        outputs = shape[0] // module.groups
        found = torch.cat([part.view(outputs, *shape[2:], -1).movedim(-1, 1) for part in matrices])
    module.weight.copy_(found.reshape(shape))


def readers(graph: tp.DependencyGraph, evidence: Sequence[Evidence]) -> list[Reader]:
    """A group's consumers as `redundancy.damages` takes them.

    Outputs count in units of what follows: behind a BatchNorm, as it scales them; else relative to their own spread.

    Raises:
        LookupError: neurons with different numbers of channels at one consumer.
    """
    return [reader for e in evidence for reader in _readers(graph, e)]


def _readers(graph: tp.DependencyGraph, e: Evidence) -> list[Reader]:
    module, moments = e.use.module, e.activity.moments
    each = 1 if moments is None else moments.each
    # too wide for moments: nothing is known of how its inputs go together
    covariance = e.activity.variance.cpu() if moments is None else moments.mean_and_covariance()[1]
    matrices = weight_matrices(module, each)
    scale = _scale(graph, module)
    size = e.activity.channels // len(matrices)
    found = []
    for number, weights in enumerate(matrices):
        inside = (e.use.channels // size) == number
        if not inside.any():
            continue
        start = number * size
        part = slice(start * each, (start + size) * each)
        own = covariance[(part,) * covariance.dim()]
        if scale is None:
            explained = weights @ own if own.dim() == 2 else weights * own
            spread = (explained * weights).sum(1).mean().clamp_min(1e-30).sqrt()
            scaled = weights / spread
        else:
            outputs = scale.chunk(len(matrices))[number]
            scaled = weights * outputs.repeat_interleave(len(weights) // len(outputs))[:, None]
        neurons, counts = torch.unique(e.use.neurons[inside], return_counts=True)
        if len(counts.unique()) > 1:
            raise LookupError("its neurons have different numbers of channels at one layer")
        order = e.use.neurons[inside].argsort(stable=True)
        channels = (e.use.channels[inside] - start)[order].view(len(neurons), -1)
        columns = (channels[:, :, None] * each + torch.arange(each)).flatten(1)
        found.append(Reader(own, scaled, neurons, columns))
    return found


def _scale(graph: tp.DependencyGraph, module: nn.Module) -> Tensor | None:
    """What a following BatchNorm multiplies each output with, float64, shape [out]; None where none follows."""
    norm = norm_behind(graph, module)
    if norm is None:
        return None
    return affine(norm)[0].abs().cpu()


def redundancy(graph: tp.DependencyGraph, evidence: Sequence[Evidence], neurons: int) -> Tensor:
    """What removing each neuron costs when the one that costs least always goes first, and others stand in for it.

    Args:
        graph: of the model.
        evidence: every consumer of the group, with second moments.
        neurons: n.

    Returns:
        Ascending in the order in which they go; >= 0, float64, shape [n].
    """
    order, costs = damages(readers(graph, evidence), neurons)
    score = torch.empty(neurons, dtype=torch.float64)
    score[order] = costs.cummax(0).values
    return score


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
    if moments is None:
        return f"it reads {e.activity.channels} channels, too many for second moments"
    each = moments.each
    place = place_of_constant(graph, module)
    constant = isinstance(place, Tensor)
    halves = (None, 0, 1) if moments.sums[:, -1, -1].all() else (None,)
    found = [moments.mean_and_covariance(half) for half in halves]
    mean, covariances = found[0][0], [cov if constant else cov + torch.outer(mu, mu) for mu, cov in found]
    gone = torch.zeros(len(mean), dtype=torch.bool)
    gone[moments.columns(e.use.channels).flatten()] = True
    matrices, shifts = weight_matrices(module, each), []
    size = len(mean) // len(matrices)
    for number, weights in enumerate(matrices):
        inside = slice(number * size, (number + 1) * size)
        own, stays = gone[inside], ~gone[inside]
        before = weights @ mean[inside]
        if own.any() and stays.any():
            weights[:, stays] += reproduce([c[inside, inside] for c in covariances], own, weights)
        shifts.append(before - weights[:, stays] @ mean[inside][stays])
    _assign(module, each, matrices)
    if isinstance(place, Tensor):
        shift = torch.cat(shifts).view(place.numel(), -1).sum(1).to(place)  # over a kernel's positions
        place.add_(shift if place is module.bias else -shift)
    return None
