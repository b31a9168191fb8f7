"""What the stages of a run note for its report; plain values, so that a checkpoint holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dnr_plugin.training.precision import Precision


@dataclass
class Seconds:
    """Wall-clock time of each stage."""

    train: float = 0.0
    prune: float = 0.0
    finetune: float = 0.0

    @property
    def total(self) -> float:
        return self.train + self.prune + self.finetune


@dataclass
class Repaired:
    """What repair did: how many layers it fitted, the mean of their errors, and the layers left as they were.

    ``narrow``: whether networks ran in 16 bits meanwhile.
    """

    layers: int
    error_before: float
    error_after: float
    left: list[tuple[str, str]]
    narrow: bool = False


@dataclass
class Removal:
    """What was removed, all steps or checks together.

    Attributes:
        dead, neurons: of how many neurons so many were dead, before the removal or at the last check.
        skipped: groups left alone, as (root layer, reason).
        exact_neurons: removed ones that were exactly zero; max_abs_diff: how far the outputs moved by these.
        achieved: measure of the target, None where there is none; reached: whether it is met.
        predicted: of a target of latency, what times of layers predict.
        layer_times: of such a target, `latency.LayerTime` of each layer before the first step and after the last.
        round_to: channels of which layers keep a multiple, given or measured; None: of any number.
        repair: of the last step, None where there was none.
    """

    dead: int | None = None
    neurons: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    exact_neurons: int = 0
    max_abs_diff: float = 0.0
    achieved: float | None = None
    reached: bool = True
    repair: Repaired | None = None
    predicted: float | None = None
    round_to: int | None = None
    layer_times: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class CheckSums:
    """Sums over the checks of a training; dead and neurons are of the last."""

    checks: int = 0
    dead: int = 0
    neurons: int = 0
    died: int = 0
    reactivated: int = 0
    restored: int = 0
    removed: int = 0
    exact: int = 0
    max_abs_diff: float = 0.0
    stopped: str | None = None


@dataclass
class Results:
    """Everything that the stages of a run have noted so far."""

    seconds: Seconds = field(default_factory=Seconds)
    dense_accuracy: float | None = None
    accuracy_before_finetune: float | None = None
    removal: Removal | None = None
    dynamics: CheckSums | None = None
    amp: dict[str, Precision] = field(default_factory=dict)  # by training stage

    def plain(self) -> dict[str, Any]:
        """As dicts, lists and plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def of_plain(cls, values: Mapping[str, Any]) -> Results:
        """The reverse of `plain`."""
        removal, sums = values.get("removal"), values.get("dynamics")
        if removal is not None:
            repair = removal.get("repair")
            removal = Removal(**{**removal, "repair": repair if repair is None else Repaired(**repair)})
        return cls(
            Seconds(**values["seconds"]),
            values.get("dense_accuracy"),
            values.get("accuracy_before_finetune"),
            removal,
            None if sums is None else CheckSums(**sums),
            # earlier versions' checkpoints have none
            {stage: Precision(**chosen) for stage, chosen in values.get("amp", {}).items()},
        )
