"""What a removal is asked to reach, and how it is measured against the dense model: one class a kind of target.

A new kind is a class here with an entry in `TARGETS`, and a field of its name in the recipe's ``prune.target``.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from dnr_plugin.errors import TargetError, did_you_mean
from dnr_plugin.network.calling import copied
from dnr_plugin.network.cost import FlopReport, flop_report
from dnr_plugin.pruning.groups import Survey
from dnr_plugin.pruning.layers import Limits


@dataclass(frozen=True)
class Baseline:
    """The dense model that targets refer to, also when removal goes on in later steps.

    Attributes:
        report: its FLOPs and parameters.
        neurons: hidden neurons.
        sizes: root layer -> neurons.
        model: a copy of it, where latency is measured against it.
    """

    report: FlopReport
    neurons: int
    sizes: Mapping[str, int]
    model: nn.Module | None = None


def baseline(
    model: nn.Module,
    example_inputs: Any,
    *,
    keep_model: bool = False,
    survey: Survey | None = None,
    verify: bool = True,
) -> Baseline:
    """Measures the dense model.

    Args:
        model: before anything is removed.
        example_inputs: as Torch-Pruning takes them.
        keep_model: keep a copy, which a latency target is measured against.
        survey: of the model; made here by default.
        verify: see `Limits`.
    """
    prunable = (survey or Survey(model, example_inputs)).within(Limits(verify=verify), {})
    kept = copied(model) if keep_model else None
    sizes = {layer.name: layer.size for layer in prunable.layers}
    return Baseline(flop_report(model, example_inputs), prunable.neurons, sizes, kept)


class Target(ABC):
    """What a removal is asked to reach.

    Args:
        value: of the target's measure: a share that is kept (`keeps`) or removed.

    Attributes:
        kind: its name.
        keeps: whether the measure is what is kept, so that a lower one is further.
        known_beforehand: whether widths alone tell how far it can be reached, before anything is trained.
        counts_flops: whether it is a share of the FLOPs.
        counts_neurons: whether the number of neurons alone tells the measure.
        timed: whether it is measured by running the model.
        resumable: whether a training that removes towards it can be resumed and ends the same.
    """

    kind: ClassVar[str]
    keeps: ClassVar[bool] = False
    known_beforehand: ClassVar[bool] = True
    counts_flops: ClassVar[bool] = False
    counts_neurons: ClassVar[bool] = False
    timed: ClassVar[bool] = False
    resumable: ClassVar[bool] = True

    def __init__(self, value: float = 1.0) -> None:
        self.value = value

    @abstractmethod
    def measure(self, flops: float, params: float, neurons: int, dense: Baseline) -> float:
        """The measure for a model of so many FLOPs, parameters and hidden neurons.

        Args:
            flops, params, neurons: of the model, however narrow by now; FLOPs for one sample.
            dense: what they are compared with.

        Returns:
            A share, in [0, 1].
        """

    def check_counts(self, report: FlopReport) -> None:
        """Warns where it is a share of FLOPs that lack products of matrices; for whoever measures the dense model."""
        products = report.uncounted_products if self.counts_flops else {}
        if products:
            warnings.warn(
                f"prune.target.{self.kind}: a share of the FLOPs that are counted, which lack {', '.join(products)}: "
                "these multiply matrices, or may",
                stacklevel=3,
            )

    def saved(self, flops: float, params: float) -> float:
        """What weighs against a neuron's score where its removal saves so many FLOPs and parameters."""
        return 1.0

    def reached(self, achieved: float) -> bool:
        """Whether a measure meets the target."""
        return achieved <= self.value + 1e-9 if self.keeps else achieved >= self.value - 1e-9

    @property
    def fits(self) -> bool:
        """Whether the value is one that can be asked for."""
        return 0.0 < self.value < 1.0

    @property
    def removed(self) -> float:
        """Share of what is measured that is gone once the target is met."""
        return 1.0 - self.value if self.keeps else self.value

    def with_removed(self, removed: float) -> Target:
        """The target that is met once this share of what is measured is gone."""
        return type(self)(1.0 - removed if self.keeps else removed)

    def after(self, step: int, steps: int) -> Target:
        """The target of one of several equal steps: the last one's is this one."""
        removed = self.removed * step / steps
        return type(self)(1.0 - removed if self.keeps else removed)

    def unreachable(self, closest: float) -> TargetError:
        """That it cannot be met, with the closest measure that can."""
        return TargetError(
            f"{self.kind}: {self.value:g} was asked, {closest:.4f} is the closest that can be reached", closest
        )


class Flops(Target):
    """Share of the FLOPs that is kept."""

    kind = "flops"
    keeps = True
    counts_flops = True

    def measure(self, flops: float, params: float, neurons: int, dense: Baseline) -> float:
        return flops / dense.report.flops

    def saved(self, flops: float, params: float) -> float:
        return flops


class Params(Target):
    """Share of the parameters that is kept."""

    kind = "params"
    keeps = True

    def measure(self, flops: float, params: float, neurons: int, dense: Baseline) -> float:
        return params / dense.report.params

    def saved(self, flops: float, params: float) -> float:
        return params


class NeuronSparsity(Target):
    """Share of the neurons that is removed."""

    kind = "neuron_sparsity"
    counts_neurons = True

    def measure(self, flops: float, params: float, neurons: int, dense: Baseline) -> float:
        return 1.0 - neurons / dense.neurons


class Latency(Target):
    """Share of the latency that is kept: predicted from times of layers, then measured."""

    kind = "latency"
    keeps = True
    known_beforehand = False
    timed = True
    resumable = False

    def measure(self, flops: float, params: float, neurons: int, dense: Baseline) -> float:
        raise NotImplementedError("latency does not follow from counts: `latency.LatencyModel` predicts it")

    def saved(self, flops: float, params: float) -> float:
        return flops


class WeightSparsity(Target):
    """Share of the parameters that is removed."""

    kind = "weight_sparsity"

    def measure(self, flops: float, params: float, neurons: int, dense: Baseline) -> float:
        return 1.0 - params / dense.report.params

    def saved(self, flops: float, params: float) -> float:
        return params


class Dead(NeuronSparsity):
    """All that is dead, and nothing else; the measure is the share of the neurons that is removed."""

    kind = "dead"
    known_beforehand = False

    @property
    def fits(self) -> bool:
        return True


TARGETS: dict[str, type[Target]] = {
    target.kind: target for target in (Flops, Params, Latency, NeuronSparsity, WeightSparsity, Dead)
}


def target_of(kind: str, value: float) -> Target:
    """A target by name.

    Args:
        kind: one of `TARGETS`.
        value: of its measure.

    Raises:
        ValueError: there is none of this name.
    """
    if kind not in TARGETS:
        raise ValueError(f"kind: expected one of {', '.join(TARGETS)}, found {kind!r}{did_you_mean(kind, TARGETS)}")
    return TARGETS[kind](value)
