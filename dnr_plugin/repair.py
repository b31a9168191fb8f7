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
- with ``pairs``, where nothing but a ReLU lies between two layers, what the second makes of the first (`pairs`).

Source: He et al., *Channel Pruning for Accelerating Very Deep Neural Networks*, ICCV 2017, section 3, with a damping
:math:`\lambda` that held-out images choose. ``docs/criterion.md`` has what each part gained.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .affine import Affine
from .errors import InputError, RunError
from .fitting import Fit, LayerRepair
from .flow import Calls, Site, trace_sites
from .graph import build_graph, kept_modes
from .inputs import call
from .observe import input_channels, is_consumer, module_names, output_channels
from .pairs import fit_pair
from .patches import channels_second
from .places import CHUNK, Places

_MAX_UNKNOWNS = 8192  # weights of one output: beyond, the moments of the inputs outgrow memory
_EACH, _PER_UNKNOWN = 16, 1.5  # places of each image, and for each weight of an output, at which layers are compared
_OTHERWISE = "{}: the pruned model was expected to run like the dense one, found otherwise"


@dataclass(frozen=True)
class Kept:
    """Which channels of a dense layer are left in the pruned one; bool, shapes [in] and [out]."""

    inputs: Tensor
    outputs: Tensor


def kept_channels(dense: nn.Module, example_inputs: Any, removals: Mapping[str, Sequence[int]]) -> dict[str, Kept]:
    """What is left of each consumer's channels once ``removals`` are taken from a dense model, which stays as it is.

    Args:
        dense: before the removal.
        example_inputs: as Torch-Pruning takes them.
        removals: root layer -> neurons, numbered as in the dense model.
    """
    graph = build_graph(dense, example_inputs)
    modules = dict(dense.named_modules())
    kept = {
        name: Kept(
            torch.ones(input_channels(module), dtype=torch.bool),
            torch.ones(output_channels(module), dtype=torch.bool),
        )
        for name, module in modules.items()
        if is_consumer(module)
    }
    names = module_names(dense)
    for root, neurons in removals.items():
        if not neurons:
            continue
        prune = graph.get_pruner_of_module(modules[root]).prune_out_channels
        group = graph.get_pruning_group(modules[root], prune, [*neurons])
        for dep, channels in group:
            name = names.get(dep.target.module)
            if name in kept:
                side = kept[name].inputs if graph.is_in_channel_pruning_fn(dep.handler) else kept[name].outputs
                side[list(channels)] = False
    return kept


class Reference:
    """What the layers of a dense network give on some images, at the places where repaired networks are compared.

    One reference serves any number of networks that were pruned from the dense one; `repair_network` makes its own.

    Args:
        dense: the network before anything was removed; not to be changed afterwards.
        example_inputs: as Torch-Pruning takes them.
        images: a batch of inputs like those of training, on the device, or many; read as far as ``memory`` goes.
        rows: places, of all images together, at which a layer's outputs are compared; by default 16 of each image, as
            far as ``memory`` goes, but at least one and a half times the weights of an output of the pruned layer.
        memory: bytes of the largest output of a layer, and of what is read of one. A pruned model runs on all images
            at once.
        seed: draws the places.
    """

    @torch.no_grad()
    def __init__(
        self,
        dense: nn.Module,
        example_inputs: Any,
        images: Tensor | Iterable[Tensor],
        *,
        rows: int | None = None,
        memory: int = 2**29,
        seed: int = 0,
    ) -> None:
        self.dense, self.example = dense, example_inputs
        self.sites = trace_sites(dense, example_inputs)
        most = memory // (4 * max(site.size for site in self.sites.values()))
        self.images = _some([images] if isinstance(images, Tensor) else images, most)
        modules = {name: module for module, name in module_names(dense).items()}
        self.rows, self.memory = rows, memory
        count = len(self.images)
        self.places = {name: Places(f"{seed} {name}", self._each(modules[name]), count) for name in self.sites}
        fitted = {name: site for name, site in self.sites.items() if _kind(modules[name]) is None}
        self.targets = _targets(dense, fitted, self.places, self.images)

    def _each(self, module: nn.Module) -> int:
        """Places of an image at which a layer is compared."""
        count, unknowns = len(self.images), max(1, _unknowns(module))
        default = max(min(_EACH * count, self.memory // (4 * unknowns)), round(_PER_UNKNOWN * unknowns))
        return max(1, (self.rows or default) // count)

    def at(self, name: str, module: nn.Module) -> tuple[Places, Tensor]:
        """The places at which a narrower ``module`` is compared with the layer ``name``, and the goals there, [R, out].

        They are the first of the layer's own, in every image, as many as it still takes.
        """
        places, targets = self.places[name], self.targets[name]
        there = copy.copy(places)
        there.each = min(places.each, self._each(module))
        return there, targets.view(len(self.images), -1, targets.shape[1])[:, : there.each].flatten(0, 1)


def repair_network(
    model: nn.Module,
    dense: nn.Module,
    example_inputs: Any,
    removals: Mapping[str, Sequence[int]],
    images: Tensor | Iterable[Tensor],
    *,
    pairs: bool = False,
    rows: int | None = None,
    memory: int = 2**29,
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
        pairs: also fit layers by what the next one makes of them, where a ReLU alone lies between (`pairs`); takes
            three times as long.
        images, rows, memory, seed: see `Reference`.

    Returns:
        What was done to each layer, in the order they run.

    Raises:
        InputError: there is no image.
        RunError: the two models do not run alike, or inputs of a layer are not finite.
    """
    reference = Reference(dense, example_inputs, images, rows=rows, memory=memory, seed=seed)
    return repair_towards(model, reference, removals, pairs=pairs)


@torch.no_grad()
def repair_towards(
    model: nn.Module, reference: Reference, removals: Mapping[str, Sequence[int]], *, pairs: bool = False
) -> list[LayerRepair]:
    """`repair_network` for one of several networks that were pruned from the same dense one."""
    sites, images = reference.sites, reference.images
    kept = kept_channels(reference.dense, reference.example, removals)
    modules = {name: module for module, name in module_names(model).items()}
    left = {name: _left(modules[name]) for name in sites}
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
        goal, other = goal[:, kept[name].outputs.to(images.device)].to(wide), None
        if site.other is not None:
            other = there.pick(channels_second(module, others[site.other]), 0).to(wide)
            waiting[site.other] -= 1
            if not waiting[site.other]:
                del others[site.other]
        assert isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
        layer = Affine(module, modules[site.norm] if site.norm is not None else None)
        one = Fit(name, layer, site.rectified, args[0], goal, other, there)
        done[name] = one.solve()
        if name in firsts:
            done[name] = fit_pair(firsts.pop(name), one, done[name])
        if pairs and layer.groups == 1 and site.reader in sites and left[site.reader] is None:
            firsts[site.reader] = one
        return (one.a, *args[1:])

    def fit(name: str) -> Callable[[nn.Module, Any], Any]:
        def hook(module: nn.Module, args: Any) -> Any:
            with calls.paused():
                return repair(name, module, args)

        return hook

    handles = [modules[name].register_forward_pre_hook(fit(name)) for name in sites]
    try:
        with kept_modes(model), calls:
            model.eval()
            call(model, images)
    finally:
        for handle in handles:
            handle.remove()
    missed = [name for name in reference.targets if left[name] is None and name not in reached]
    if missed:
        raise RunError(_OTHERWISE.format(missed[0]))
    return list(done.values())


def _kind(module: nn.Module) -> str | None:
    """Why layers of this kind cannot be fitted, or None."""
    if not isinstance(module, nn.Linear) and (not isinstance(module, nn.modules.conv._ConvNd) or module.transposed):
        return f"{type(module).__name__} is not repaired"
    return None


def _left(module: nn.Module) -> str | None:
    """Why a layer cannot be fitted, or None."""
    unknowns = _unknowns(module)
    if unknowns > _MAX_UNKNOWNS:
        return f"its outputs read {unknowns} inputs each, more than {_MAX_UNKNOWNS}"
    return _kind(module)


def _unknowns(module: nn.Module) -> int:
    """Weights of one output of a layer; 0 of attention, which is not fitted."""
    return module.weight[0].numel() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) else 0


def _some(batches: Iterable[Tensor], most: int) -> Tensor:
    """The first images, at most so many, but one batch at least of 64."""
    found: list[Tensor] = []
    left = max(most, CHUNK)
    for batch in batches:
        found.append(batch[:left])
        left -= len(found[-1])
        if left == 0:
            break
    if not found:
        raise InputError("images: expected at least one batch, found none")
    return torch.cat(found)


def _keeper(results: dict[int, Tensor], number: int) -> Callable[[Tensor], None]:
    def keep(result: Tensor) -> None:
        results[number] = result

    return keep


def _targets(
    dense: nn.Module, sites: Mapping[str, Site], places: Mapping[str, Places], images: Tensor
) -> dict[str, Tensor]:
    """What each layer should give, in the dense network: rows of all images, [R, out]."""
    modules = {name: module for module, name in module_names(dense).items()}
    found: dict[str, list[Tensor]] = {name: [] for name in sites}
    first = 0

    def read(name: str, output: Tensor) -> None:
        values = channels_second(modules[name], output)
        places[name].positions = values.shape[2]
        found[name].append(places[name].pick(values, first))

    wanted: dict[int, Callable[[Tensor], None]] = {}
    handles = []
    calls = Calls(wanted)

    def after(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            with calls.paused():
                read(name, output)

        return hook

    for name, site in sites.items():
        if site.sum is not None:
            wanted[site.sum] = partial(read, name)
        else:
            handles.append(modules[site.norm or name].register_forward_hook(after(name)))
    try:
        with kept_modes(dense):
            dense.eval()
            for first in range(0, len(images), 4 * CHUNK):
                part = images[first : first + 4 * CHUNK]
                calls.count = 0
                with calls:
                    call(dense, part)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(rows) for name, rows in found.items() if rows}
