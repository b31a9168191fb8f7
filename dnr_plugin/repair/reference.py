"""What the layers of a dense network give on some images, towards which pruned ones are repaired."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dnr_plugin.devices import has_bfloat16
from dnr_plugin.errors import InputError
from dnr_plugin.linalg import without_autocast
from dnr_plugin.network.calling import (
    batch_inputs,
    call,
    concatenated,
    eager,
    eval_outputs,
    in_eval,
    module_names,
    output_difference,
    part_of,
    samples_in,
    tensors,
)
from dnr_plugin.network.flow import Calls, Site, trace_sites
from dnr_plugin.network.kinds import consumer, kind_of
from dnr_plugin.repair.layer import Affine
from dnr_plugin.repair.places import CHUNK, Places

# Places of each image, and for each weight of an output, at which layers are compared.
_PER_IMAGE, _PER_UNKNOWN = 16, 1.5
MAX_UNKNOWNS = 8192  # weights of one output: beyond, the moments of the inputs outgrow memory,
_MOST_ROWS = 4096  # so that a layer is fitted by fewer places than it has weights
_AT_ONCE = 2**27  # bytes of the largest output of a layer while the dense network runs
_CHECKED = 4  # images with which a layer's own computation is checked, and the network's in bfloat16
_LONG = 2**34  # multiply-adds of the dense network on all images, from which on bfloat16 is worth it
_UNLIKE, _UNLIKE_16_BITS = 1e-2, 0.1  # of the largest output; far beyond rounding, TensorFloat-32 included


class Reference:
    """What the layers of a dense network give on some images, at the places where repaired networks are compared.

    One reference serves any number of networks that were pruned from the dense one; `repair_network` makes its own.

    Args:
        dense: the network before anything was removed; not to be changed afterwards.
        example_inputs: as Torch-Pruning takes them.
        images: a batch of inputs like those of training, on the device, or many, as a loader gives them
            (`calling.batch_inputs`); read as far as ``memory`` goes.
        rows: places, of all images together, at which a layer's outputs are compared; by default 16 of each image, as
            far as ``memory`` goes, but at least one and a half times the weights of an output of the pruned layer;
            4,096 at most where these weights are more than 8,192.
        memory: bytes of the largest output of a layer, and of what is read of one. A pruned model runs on all images
            at once.
        amp: run both networks under bfloat16 autocast; what is fitted is float32 or wider all the same. "auto": on a
            CPU with instructions for it, where the dense network does at least 2^34 multiply-adds on the images and its
            outputs on four of them differ by less than a tenth of the largest. False: as the caller runs them.
        seed: draws the places.

    Attributes:
        autocast: the type of 16 bits that both networks run in, or None; by default the caller's.

    Raises:
        InputError: there is no image; the network was scripted, traced or exported, or is quantised.
    """

    @torch.no_grad()
    def __init__(
        self,
        dense: nn.Module,
        example_inputs: Any,
        images: Any,
        *,
        rows: int | None = None,
        memory: int = 2**29,
        amp: bool | Literal["auto"] = "auto",
        seed: int = 0,
    ) -> None:
        dense = eager(dense)
        self.dense, self.example = dense, example_inputs
        self.sites = trace_sites(dense, example_inputs)
        each = 4 * max(site.size for site in self.sites.values())  # bytes
        self.images = _some(images, example_inputs, memory // each)
        self.count = samples_in(self.images)
        modules = {name: module for module, name in module_names(dense).items()}
        self.rows, self.memory = rows, memory
        self.places = {
            name: Places(f"{seed} {name}", self._per_image(modules[name]), self.count) for name in self.sites
        }
        other = trace_sites(dense, part_of(self.images, slice(samples_in(example_inputs) + 1)))
        # calls are known by their numbers, which in a loop over images depend on how many there are
        self.shifting = {name for name, site in self.sites.items() if _where(other.get(name, Site())) != _where(site)}
        fitted = {
            name: site
            for name, site in self.sites.items()
            if kind_of(modules[name]).unrepaired is None and name not in self.shifting
        }
        self.device = next(tensors(self.images)).device
        type = self.device.type
        self.autocast = torch.get_autocast_dtype(type) if torch.is_autocast_enabled(type) else None
        if self._gains_by_bfloat16(modules) if amp == "auto" else amp:
            self.autocast = torch.bfloat16
        chunk = next(iter(self.places.values())).chunk
        at_once = chunk * min(max(_AT_ONCE // (each * chunk), 1), 4)
        with self.precision():
            self.targets = _targets(dense, fitted, self.places, self.images, at_once)
        few = min(_CHECKED, chunk)
        self.otherwise = _otherwise(dense, fitted, self.places, part_of(self.images, slice(few)))

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """What both networks run in; weights, which change, are not taken from a cache."""
        if self.autocast is None:
            return without_autocast(self.device)
        return torch.autocast(self.device.type, self.autocast, cache_enabled=False)

    def _gains_by_bfloat16(self, modules: Mapping[str, nn.Module]) -> bool:
        work = self.count * sum(site.size * kind_of(modules[name]).unknowns for name, site in self.sites.items())
        types = {p.dtype for p in self.dense.parameters()}
        if work < _LONG or types != {torch.float32} or not has_bfloat16(self.device):
            return False
        some = part_of(self.images, slice(_CHECKED))
        try:
            with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
                narrow = eval_outputs(self.dense, some)
        except RuntimeError:  # it mixes types that autocast does not see
            return False
        return output_difference(eval_outputs(self.dense, some), narrow)[1] <= _UNLIKE_16_BITS

    def _per_image(self, module: nn.Module) -> int:
        """Places of an image at which a layer is compared."""
        count, unknowns = self.count, max(1, kind_of(module).unknowns)
        default = max(min(_PER_IMAGE * count, self.memory // (4 * unknowns)), round(_PER_UNKNOWN * unknowns))
        rows = self.rows or default
        return max(1, (min(rows, _MOST_ROWS) if unknowns > MAX_UNKNOWNS else rows) // count)

    def at(self, name: str, module: nn.Module) -> tuple[Places, Tensor]:
        """The places at which a narrower ``module`` is compared with the layer ``name``, and the goals there, [R, out].

        They are the first of the layer's own, in every image, as many as it still takes.
        """
        places, targets = self.places[name], self.targets[name]
        there = copy.copy(places)
        there.per_image = min(places.per_image, self._per_image(module))
        return there, targets.view(self.count, -1, targets.shape[1])[:, : there.per_image].flatten(0, 1)


def _where(site: Site) -> tuple[int | None, int | None]:
    return site.sum, site.other


def _otherwise(dense: nn.Module, sites: Mapping[str, Site], places: Mapping[str, Places], images: Any) -> set[str]:
    """Layers whose outputs, behind their BatchNorm, are not what `Affine` says, as where hooks have a hand in them."""
    modules = {name: module for module, name in module_names(dense).items()}
    expected: dict[str, Tensor] = {}
    differing: set[str] = set()
    handles = []

    def expect(name: str, norm: str | None) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            layer, positions = Affine(module, modules[norm] if norm is not None else None), places[name].of_chunk(0)
            rows = layer.kind.rows(args[0], positions).to(torch.promote_types(output.dtype, torch.float32))
            with without_autocast(output.device):
                expected[name] = layer.outputs(rows)

        return hook

    def compare(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            given = places[name].pick(consumer(modules[name]).by_channel(output), 0).to(expected[name])
            limit = _UNLIKE if output.element_size() > 2 else _UNLIKE_16_BITS
            if bool(given.isfinite().all()) and not output_difference([given], [expected[name]])[1] <= limit:
                differing.add(name)

        return hook

    for name in places:
        if name in sites and places[name].positions:
            handles.append(modules[name].register_forward_hook(expect(name, sites[name].norm)))
            handles.append(modules[sites[name].norm or name].register_forward_hook(compare(name)))
    with in_eval(dense, handles):
        call(dense, images)
    return differing


def _some(images: Any, example: Any, most: int) -> Any:
    """The first samples, at most so many, but one batch at least of 64, in the form that the model is called with."""
    several = isinstance(example, dict | list | tuple) and len(example) > 1
    whole = isinstance(images, Tensor | dict) or (
        several and isinstance(images, tuple) and isinstance(images[0], Tensor)
    )
    batches: list[Any] = []
    room = max(most, CHUNK)
    for batch in [images] if whole else images:
        batches.append(part_of(batch_inputs(batch, example), slice(room)))
        room -= samples_in(batches[-1])
        if room == 0:
            break
    if not batches:
        raise InputError("images: expected at least one batch, found none")
    return concatenated(batches)


def _targets(
    dense: nn.Module, sites: Mapping[str, Site], places: Mapping[str, Places], images: Any, at_once: int
) -> dict[str, Tensor]:
    """What each layer should give, in the dense network, run on so many images at once: rows of all images, [R, out].

    Without layers whose outputs are not one for each image, as where frames are folded into the batch.
    """
    modules = {name: module for module, name in module_names(dense).items()}
    goals: dict[str, list[Tensor]] = {name: [] for name in sites}
    first, part = 0, images

    def read(name: str, output: Tensor) -> None:
        values = consumer(modules[name]).by_channel(output)
        if len(values) != samples_in(part):
            return
        places[name].positions = values.shape[2]
        goals[name].append(places[name].pick(values, first))

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
    with in_eval(dense, handles):
        for first in range(0, samples_in(images), at_once):
            part = part_of(images, slice(first, first + at_once))
            calls.count = 0
            with calls:
                call(dense, part)
    return {name: torch.cat(rows) for name, rows in goals.items() if rows}
