r"""Least-squares repair: layers that lost inputs are fitted, in closed form, to give again what they gave before.

After neurons were removed, a layer reads fewer channels, which carry what upstream removals left of them. Layer by
layer, in the order in which they run, its weights and the constant behind them become

.. math:: \arg\min_{W, b} \; \sum_{n,p} \lVert y_{np} - W \tilde x_{np} - b \rVert^2 + \lambda \lVert W - W_0 \rVert^2

with :math:`\tilde x` its input in the pruned and already repaired network (for a convolution, the patch that a kernel
covers), :math:`y` the outputs of the dense network at the same place, and :math:`W_0` its weights as they are. No
labels. What is fitted is what matters:

- outputs behind a BatchNorm, whose mean takes the constant up;
- where they are added to something, as in a residual block, the sum: the last layer to contribute makes up for what the
  others lost;
- where a ReLU follows, its result: outputs that both networks have below zero need not agree (Zhang et al.,
  *Accelerating Very Deep Convolutional Networks*, TPAMI 2016, section 2.2);
- with ``pair``, where nothing but a ReLU lies between two layers, what the second makes of the first (`pair`).

Source: He et al., *Channel Pruning for Accelerating Very Deep Neural Networks*, ICCV 2017, section 3, with a damping
:math:`\lambda` that held-out images choose. ``docs/criterion.md`` has what each part gained.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dnr_plugin.errors import RunError
from dnr_plugin.linalg import without_autocast
from dnr_plugin.network.attention import completed, split_modules
from dnr_plugin.network.calling import call, eager, in_eval, module_names, network_of
from dnr_plugin.network.flow import Calls
from dnr_plugin.network.graph import build_graph, group_of
from dnr_plugin.network.kinds import consumer, has_weights, is_consumer, kind_of
from dnr_plugin.repair.layer import Affine, Fit, LayerRepair
from dnr_plugin.repair.pair import fit_pair
from dnr_plugin.repair.reference import MAX_UNKNOWNS, Reference

_FOLDED = "its outputs are not one for each image"
_SHIFTING = "what it is added to is computed in calls whose number depends on the images"
_UNLIKE = "what it gives is not what its weights make of its inputs, as where a hook changes either"
_OTHERWISE = "{}: the pruned model was expected to run like the dense one, found otherwise"


@dataclass(frozen=True)
class KeptChannels:
    """Which channels of a dense layer the pruned one keeps; bool, shapes [in] and [out]."""

    inputs: Tensor
    outputs: Tensor


def kept_channels(
    dense: nn.Module, example_inputs: Any, removals: Mapping[str, Sequence[int]]
) -> dict[str, KeptChannels]:
    """What remains of each consumer's channels once ``removals`` are taken from a dense model, which stays as it is.

    Args:
        dense: before the removal.
        example_inputs: as Torch-Pruning takes them.
        removals: root layer -> neurons, numbered as in the dense model.
    """
    dense = network_of(dense)
    graph = build_graph(dense, example_inputs)
    modules = dict(dense.named_modules())
    kept = {
        name: KeptChannels(
            torch.ones(kind_of(module).channels[0], dtype=torch.bool),
            torch.ones(kind_of(module).channels[1], dtype=torch.bool),
        )
        for name, module in modules.items()
        if has_weights(module)
    }
    names = module_names(dense)
    for root, neurons in completed(split_modules(dense), removals).items():
        if not neurons:
            continue
        for dep, channels in group_of(graph, modules[root], neurons):
            name = names.get(dep.target.module)
            if name in kept:
                side = kept[name].inputs if graph.is_in_channel_pruning_fn(dep.handler) else kept[name].outputs
                side[list(channels)] = False
    return kept


def repair_network(
    model: nn.Module,
    dense: nn.Module,
    example_inputs: Any,
    removals: Mapping[str, Sequence[int]],
    images: Any,
    *,
    pairs: bool = False,
    rows: int | None = None,
    memory: int = 2**29,
    amp: bool | Literal["auto"] = "auto",
    seed: int = 0,
) -> list[LayerRepair]:
    """Fits a pruned model, layer by layer in the order they run, to what the dense one gave on some images.

    Afterwards BatchNorm's statistics are those of the repaired network, on the places that were read, so that neither
    recalibration nor the first steps of fine-tuning undo the fit.

    Args:
        model: ``dense`` without ``removals``; changed in place.
        dense: the network before anything was removed, on the same device.
        example_inputs: as Torch-Pruning takes them.
        removals: root layer -> neurons that were removed, numbered as in ``dense``.
        pairs: also fit layers by what the next one makes of them, where a ReLU alone lies between (`pair`); takes
            three times as long.
        images, rows, memory, amp, seed: see `Reference`.

    Returns:
        What was done to each layer, in the order they run.

    Raises:
        InputError: there is no image; a model was scripted, traced or exported, or is quantised.
        RunError: the two models do not run alike, or inputs of a layer are not finite.
    """
    eager(model)  # refused before the dense one is run
    reference = Reference(dense, example_inputs, images, rows=rows, memory=memory, amp=amp, seed=seed)
    return repair_towards(model, reference, removals, pairs=pairs)


@torch.no_grad()
def repair_towards(
    model: nn.Module, reference: Reference, removals: Mapping[str, Sequence[int]], *, pairs: bool = False
) -> list[LayerRepair]:
    """`repair_network` for one of several networks that were pruned from the same dense one.

    Args:
        model: ``reference.dense`` without ``removals``; changed in place.
        reference: made once for all of them.
        removals, pairs: see `repair_network`.

    Returns:
        What was done to each layer, in the order they run.

    Raises:
        InputError: the model was scripted, traced or exported, or is quantised.
        RunError: the two models do not run alike, or inputs of a layer are not finite.
    """
    model = eager(model)
    sites, images = reference.sites, reference.images
    kept = kept_channels(reference.dense, reference.example, removals)
    modules = {name: module for module, name in module_names(model).items()}
    left = {name: _left(modules[name]) for name in sites}
    left |= {name: _FOLDED for name in sites if left[name] is None and name not in reference.targets}
    left |= dict.fromkeys(reference.shifting, _SHIFTING) | dict.fromkeys(reference.otherwise, _UNLIKE)
    done = {name: LayerRepair(name, left="it runs more than once, or not at all") for name in kept if name not in sites}
    reached: set[str] = set()
    others: dict[int, Tensor] = {}
    waiting = Counter(site.other for name, site in sites.items() if site.other is not None and left[name] is None)
    calls = Calls({number: _keeper(others, number) for number in waiting})
    firsts: dict[str, Fit] = {}  # of pairs, by the layer that reads it

    def repair(name: str, module: nn.Module, args: Any) -> Any:
        site = sites[name]
        if left[name] is not None:
            done[name] = LayerRepair(name, left=left[name])
            return None
        if name in reached or (site.other is not None and site.other not in others):
            raise RunError(_OTHERWISE.format(name))
        reached.add(name)
        there, goal = reference.at(name, module)
        wide = torch.promote_types(goal.dtype, torch.float32)
        narrow = reference.autocast is not None or goal.dtype != wide
        goal, other = goal[:, kept[name].outputs.to(goal.device)].to(wide), None
        if site.other is not None:
            other = there.pick(consumer(module).by_channel(others[site.other]), 0).to(wide)
            waiting[site.other] -= 1
            if not waiting[site.other]:
                del others[site.other]
        layer = Affine(module, modules[site.norm] if site.norm is not None else None)
        layer_fit = Fit(name, layer, site.rectified, args[0], goal, other, there, narrow)
        done[name] = layer_fit.solve()
        if name in firsts:
            done[name] = fit_pair(firsts.pop(name), layer_fit, done[name])
        if pairs and layer.kind.blocks == 1 and site.reader in sites and left[site.reader] is None:
            firsts[site.reader] = layer_fit
        return (layer_fit.a, *args[1:])

    def fit(name: str) -> Callable[[nn.Module, Any], Any]:
        def hook(module: nn.Module, args: Any) -> Any:
            with calls.paused(), without_autocast(reference.device):
                return repair(name, module, args)

        return hook

    handles = [modules[name].register_forward_pre_hook(fit(name)) for name in sites]
    with in_eval(model, handles), reference.precision(), calls:
        call(model, images)
    torch.clear_autocast_cache()  # of a caller's autocast: weights as they were
    missed = [name for name in reference.targets if left[name] is None and name not in reached]
    if missed:
        raise RunError(_OTHERWISE.format(missed[0]))
    few = [row.layer for row in done.values() if row.few and kind_of(modules[row.layer]).unknowns <= MAX_UNKNOWNS]
    if few:
        more = ", ..." if len(few) > 3 else ""
        warnings.warn(
            f"repair: {len(few)} layers ({', '.join(few[:3])}{more}) were fitted at no more places than an output of "
            f"theirs has weights; more than {reference.count} images would serve them",
            stacklevel=2,
        )
    return list(done.values())


def _left(module: nn.Module) -> str | None:
    """Why a layer cannot be fitted, or None."""
    if not is_consumer(module):  # in the dense network it is one
        return "it has one channel in each of its groups by now, and mixes none"
    return kind_of(module).unrepaired


def _keeper(results: dict[int, Tensor], number: int) -> Callable[[Tensor], None]:
    def keep(result: Tensor) -> None:
        results[number] = result

    return keep
