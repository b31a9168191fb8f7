"""An independent check of Torch-Pruning's groups: do its channels carry the neurons that it says, and may they go?

Three looks at a model, of which none changes it; what one of them finds at fault is left alone, with the reason:

1. marks on every neuron, read at the consumers (`probe`): a consumer has to carry each neuron where Torch-Pruning says,
   and no neuron where it says nothing;
2. the same in train mode, where layers run that eval mode does not reach: Torch-Pruning does not see them, and they
   would break once their inputs are narrower;
3. a trial on a copy: without half of the units of all groups it has to run, and to give what the model gives with these
   units zeroed where they are used. Where it does not, halves of the groups tell whose fault it is.

Where something mixes the channels of a group on their way (attention, a mean over channels), a removal changes what the
other channels give: the trial then has to run, and no more.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.errors import first_line
from dnr_plugin.network.attention import completed, split_modules
from dnr_plugin.network.calling import copied, eval_outputs, mapped, output_difference, without_hooks
from dnr_plugin.network.dependencies import channels_carrying, mixing_reason, uses
from dnr_plugin.network.graph import build_graph, group_of
from dnr_plugin.network.kinds import consumer, is_consumer
from dnr_plugin.network.looking import transparent_norms
from dnr_plugin.network.probe import Mark, carriers, codes, read_marks
from dnr_plugin.pruning.layers import Layer

_TOLERANCE = 1e-3  # of outputs relative to the largest, in float32; a wrong channel is far beyond
_TOLERANCE_16_BITS = 0.1
_TRIALS = 60  # at most, for groups at fault among others

# What was found at fault in a model, by root layer; it stays so while the model shrinks.
_known: weakref.WeakKeyDictionary[nn.Module, dict[str, str | None]] = weakref.WeakKeyDictionary()


def verified(
    model: nn.Module, example_inputs: Any, names: Mapping[nn.Module, str], layers: Sequence[Layer]
) -> dict[str, str]:
    """The layers that are to be left alone, with the reason.

    What was found is remembered with the model, by the names of root layers, so that a training that prunes step by
    step pays for it once.

    Args:
        model: stays as it is.
        example_inputs: one sample, as Torch-Pruning takes them.
        names: of the model's modules.
        layers: groups whose members may all shrink.
    """
    known = _known.setdefault(model, {})
    if not all(layer.name in known for layer in layers):
        known.update(dict.fromkeys((layer.name for layer in layers), None))
        known.update(_at_fault(model, example_inputs, names, layers))
    return {layer.name: reason for layer in layers if (reason := known[layer.name]) is not None}


def _at_fault(
    model: nn.Module, example_inputs: Any, names: Mapping[nn.Module, str], layers: Sequence[Layer]
) -> dict[str, str]:
    if not layers:
        return {}
    marks = _Marks(names, layers)
    read = read_marks(model, example_inputs, marks.of_layers, marks.table)
    reasons, mixed = marks.misread({name: marked for name, marked in (read or {}).items() if marked is not None})
    unclear = {name for name, marked in (read or {}).items() if marked is None}  # samples are mixed on the way there
    mixed |= {layer.name for layer in layers if any(names[use.module] in unclear for use in uses(layer.group))}
    unreached = {name for module, name in names.items() if is_consumer(module)} - set(read or {})
    if read is not None and unreached:
        in_training = read_marks(model, example_inputs, marks.of_layers, marks.table, training=True) or {}
        for name in sorted(unreached & set(in_training)):
            marked = in_training[name]
            for layer in layers if marked is None else marks.carried(marked):
                reasons.setdefault(layer.name, f"{name} reads it, which runs in train mode alone")
    sound = [layer for layer in layers if layer.name not in reasons]
    exact = [layer for layer in sound if layer.name not in mixed and mixing_reason(layer.group) is None]
    loose = [layer for layer in sound if layer not in exact]
    trial = _Trial(model, example_inputs, names)
    for some, check in ((exact, trial.same), (loose, trial.runs)):
        reasons.update(_culprits(some, check))
    return reasons


class _Marks:
    """Marks for the units of some layers, and what becomes of them."""

    def __init__(self, names: Mapping[nn.Module, str], layers: Sequence[Layer]) -> None:
        self.names, self.layers = names, layers
        self.owner = [(layer, unit) for layer in layers for unit in range(layer.units)]
        self.count = len(self.owner)
        self.first = dict(zip((layer.name for layer in layers), _starts(layers), strict=True))
        made: dict[str, dict[int, int]] = {}
        for layer in layers:
            position = {root: k for k, root in enumerate(layer.group[0].idxs)}
            for item in layer.group.items:
                module = item.dep.target.module
                makes = layer.group._DG.is_out_channel_pruning_fn(item.dep.handler)
                if makes and isinstance(module, nn.Module) and is_consumer(module):
                    for channel, root in zip(item.idxs, item.root_idxs, strict=True):
                        unit = int(layer.unit[position[root]])
                        made.setdefault(names[module], {})[channel] = self.first[layer.name] + unit
        self.of_layers = {
            name: Mark(torch.tensor([*units]), torch.tensor([*units.values()])) for name, units in made.items()
        }
        self.table = codes(max(self.count, 2))

    def misread(self, read: Mapping[str, Tensor]) -> tuple[dict[str, str], set[str]]:
        """Layers that a consumer does not read where Torch-Pruning says, with the reason; and those that are mixed."""
        reasons: dict[str, str] = {}
        mixed: set[str] = set()
        told: dict[str, Tensor] = {name: torch.zeros(len(marked), dtype=torch.bool) for name, marked in read.items()}
        for layer in self.layers:
            for use in uses(layer.group):
                name = self.names[use.module]
                if name not in read or int(use.channels.max()) >= len(read[name]):
                    continue
                told[name][use.channels] = True
                marked = read[name][use.channels]
                expected = self.table[self.first[layer.name] + layer.unit[use.neurons]]
                arrived = marked.any(1)
                if bool((expected & ~marked)[arrived].any()):
                    reasons.setdefault(
                        layer.name, f"{name} does not read its neurons at the channels that Torch-Pruning takes there"
                    )
                others = marked[(marked & ~expected).any(1)]
                if len(others) and bool(others.all()):  # every neuron, not just some that are added in another order
                    mixed.add(layer.name)
        for name, marked in read.items():
            for unit in carriers(self.table, marked[~told[name] & marked.any(1)]):
                if unit is not None and unit < self.count:
                    layer, _ = self.owner[unit]
                    reasons.setdefault(layer.name, f"{name} reads its neurons at channels that Torch-Pruning leaves")
        return reasons, mixed

    def carried(self, marked: Tensor) -> list[Layer]:
        """Layers of which any unit may be carried by some channels."""
        marked = marked[marked.any(1)]
        inside = [bool((~self.table[unit] | marked).all(1).any()) for unit in range(self.count)]
        return [layer for layer in self.layers if any(inside[self.first[layer.name] :][: layer.units])]


def _starts(layers: Sequence[Layer]) -> Iterator[int]:
    start = 0
    for layer in layers:
        yield start
        start += layer.units


class _Trial:
    """A model without half of the units of some layers, beside one in which they are zero where they are used."""

    def __init__(self, model: nn.Module, example_inputs: Any, names: Mapping[nn.Module, str]) -> None:
        self.model, self.names, self.example = model, names, mapped(_varied, example_inputs)

    def runs(self, layers: Sequence[Layer]) -> str | None:
        """Why a copy fails without half of these layers' units, or None."""
        outcome = self._without(layers)
        return outcome if isinstance(outcome, str) else None

    def same(self, layers: Sequence[Layer]) -> str | None:
        """Why a copy without half of the units fails, or differs from the model with these zeroed; or None."""
        pruned = self._without(layers)
        if isinstance(pruned, str):
            return pruned
        zeroed = self._zeroed(layers)
        if [out.shape for out in pruned] != [out.shape for out in zeroed]:
            if self._varies():
                return None  # as of a detector, which finds another number of boxes in other features
            return "without some of its neurons the model's outputs have another shape"
        wide = all(out.element_size() >= 4 for out in zeroed if out.is_floating_point())
        if not all(bool(out.isfinite().all()) for out in zeroed):
            return None
        if output_difference(zeroed, pruned)[1] > (_TOLERANCE if wide else _TOLERANCE_16_BITS):
            return "taking neurons out does more than zeroing them where Torch-Pruning says they are used"
        return None

    def _varies(self) -> bool:
        """Whether the shapes of the outputs depend on what is in the inputs."""
        generator = torch.Generator().manual_seed(1)
        other = mapped(
            lambda a: torch.rand(a.shape, generator=generator).to(a) if a.is_floating_point() else a, self.example
        )
        with without_hooks(self.model):
            shapes = [[out.shape for out in eval_outputs(self.model, inputs)] for inputs in (self.example, other)]
        return shapes[0] != shapes[1]

    def _without(self, layers: Sequence[Layer]) -> list[Tensor] | str:
        trial = copied(self.model)
        modules = dict(trial.named_modules())
        try:
            graph = build_graph(trial, self.example)
            halves = {layer.name: layer.neurons(_half(layer)) for layer in layers}
            for name, neurons in completed(split_modules(trial), halves).items():
                group = group_of(graph, modules[name], neurons)
                if not graph.check_pruning_group(group):
                    return "Torch-Pruning cannot take half of its neurons without emptying a layer"
                group.prune()
            with transparent_norms(trial), without_hooks(trial):
                return eval_outputs(trial, self.example)
        except Exception as error:  # whatever a model of someone's does with fewer channels
            return f"the model fails with fewer channels there: {type(error).__name__}: {first_line(error)}"

    def _zeroed(self, layers: Sequence[Layer]) -> list[Tensor]:
        trial = copied(self.model)
        modules = dict(trial.named_modules())
        taken = []
        for layer in layers:
            taken.append((layer.group, torch.zeros(layer.size, dtype=torch.bool)))
            taken[-1][1][layer.neurons(_half(layer))] = True
        with contextlib.ExitStack() as hooks, transparent_norms(trial), without_hooks(trial):
            for module, zero in channels_carrying(taken).items():
                reader = modules[self.names[module]]
                hooks.callback(reader.register_forward_pre_hook(_zeroing(reader, zero)).remove)
            return eval_outputs(trial, self.example)


def _zeroing(module: nn.Module, zero: Tensor) -> Callable[[nn.Module, Any], Any]:
    mask = consumer(module).mask(zero)

    def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
        # of attention, which reads key and value as well
        return tuple(a.masked_fill(mask.to(a.device), 0.0) if isinstance(a, Tensor) and a.is_floating_point() else a
                     for a in args)  # fmt: skip

    return hook


def _half(layer: Layer) -> list[int]:
    """Every second unit of each part, so that none is emptied."""
    return [unit for part in layer.parts for unit in part.units[1::2]]


def _varied(a: Tensor) -> Tensor:
    """An input that is constant, as zeros and ones are, tells channels apart badly: noise in its place."""
    if not a.is_floating_point() or a.numel() < 2 or a.min() < a.max():
        return a
    return torch.randn(a.shape, generator=torch.Generator().manual_seed(0)).to(a)


def _culprits(layers: Sequence[Layer], check: Callable[[Sequence[Layer]], str | None]) -> dict[str, str]:
    """Layers that make a check fail, alone or together with those before them, with the reason."""
    trials = 0

    def failing(some: Sequence[Layer], sound: Sequence[Layer]) -> dict[str, str]:
        """Of some layers, those without which all of the others and the sound ones pass."""
        nonlocal trials
        if not some:
            return {}
        trials += 1
        reason = check([*sound, *some])
        if reason is None:
            return {}
        if len(some) == 1 or trials > _TRIALS:
            return {layer.name: reason for layer in some}
        half = len(some) // 2
        first = failing(some[:half], sound)
        kept = [layer for layer in some[:half] if layer.name not in first]
        return {**first, **failing(some[half:], [*sound, *kept])}

    return failing([layer for layer in layers if _half(layer)], [])
