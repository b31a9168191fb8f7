"""Reading back what a run left, checked as far as anything asks of it: damage is one line with the file's name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dnr_plugin.errors import InputError
from dnr_plugin.files import read_json, read_json_lines

_Share = Annotated[float, Field(ge=0.0, le=1.0)]
_Count = Annotated[int, Field(ge=0, le=2**53)]
_Positive = Annotated[int, Field(ge=1, le=2**53)]
_Amount = Annotated[float, Field(ge=0.0, le=1e15)]
_Pair = Annotated[list[_Amount], Field(min_length=2, max_length=2)]
_Number = Annotated[float, Field(ge=-1e15, le=1e15)]


class _Stored(BaseModel):
    """Other keys may be there, of this version or another."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Size(_Stored):
    params: _Positive
    flops: _Positive
    accuracy: _Share | None


class _Pruned(_Size):
    accuracy: _Share
    accuracy_before_finetune: _Share | None


class _Seconds(_Stored):
    train: _Amount
    prune: _Amount
    finetune: _Amount
    total: _Amount


class _Sparsity(_Stored):
    neuron: _Number
    weight: _Number


class _Kept(_Stored):
    params: _Amount
    flops: _Amount


class _Target(_Stored):
    kind: str | None
    requested: bool | _Number | None
    achieved: _Number | None
    reached: bool
    predicted: _Number | None = None

    @model_validator(mode="after")
    def _told(self) -> _Target:
        if self.kind is not None and (self.requested is None or self.achieved is None):
            raise ValueError("a target without what was requested and achieved")
        return self


class _Dead(_Stored):
    neurons: _Count | None
    of: _Count


class _Exact(_Stored):
    neurons: _Count
    max_abs_diff: _Amount


class _Row(_Stored):
    name: str
    type: str
    channels_before: _Count
    channels_after: _Count
    params_before: _Count
    params_after: _Count
    flops_before: _Count
    flops_after: _Count


class _Skipped(_Stored):
    layer: str
    reason: str


class _Latency(_Stored):
    runtime: str = "eager"  # reports of earlier versions have no other
    batch: _Positive
    dense_ms: _Amount
    pruned_ms: _Amount
    ratio: _Amount
    spread: _Amount | None = None


class _LayerTime(_Stored):
    name: str
    before: _Amount
    after: _Amount
    least: _Amount
    narrowest: _Pair
    kept: _Pair
    rounded: _Pair


class _Repair(_Stored):
    layers: _Count
    error_before: _Amount
    error_after: _Amount
    left: list[Annotated[list[str], Field(min_length=2, max_length=2)]]


class _Dynamics(_Stored):
    checks: _Count
    died: _Count
    reactivated: _Count
    restored: _Count
    removed: _Count
    stopped: str | None
    wall_clock_ratio: _Amount | None


class _Activation(_Stored):
    name: str | None = None
    left: list[str] = []


class _Precision(_Stored):
    asked: Literal["auto", True, False]
    used: bool
    reason: str | None = None
    images: _Count = 0
    float32_ms: _Amount | None = None
    bfloat16_ms: _Amount | None = None


class _Report(_Stored):
    name: str
    seed: int
    recipe: dict[str, Any]
    device: str
    seconds: _Seconds
    mode: str = "after_training"
    dense: _Size
    pruned: _Pruned
    sparsity: _Sparsity
    kept: _Kept
    target: _Target
    dead: _Dead
    reactivated: _Count
    exact_removal: _Exact
    layers: list[_Row]
    skipped: list[_Skipped]
    unsupported_ops: dict[str, _Count]
    latency: _Latency | None = None
    latencies: list[_Latency] = []
    unmeasured: dict[str, str] = {}
    layer_times: list[_LayerTime] = []
    round_to: _Positive | None = None
    repair: _Repair | None = None
    dynamics: _Dynamics | None = None
    activation: _Activation = _Activation()
    amp: dict[Literal["train", "finetune"], _Precision] = {}  # reports of earlier versions have none


class _Epoch(_Stored):
    stage: Literal["train", "finetune"]
    epoch: _Count
    loss: float
    lr: _Amount
    accuracy: _Share
    seconds: _Amount
    training_seconds: _Amount = 0.0
    check_seconds: _Amount = 0.0


class _CheckEvent(_Stored):
    check: _Count
    epoch: _Amount
    layer: str
    neurons: _Positive
    dead: _Count
    died: _Count
    reactivated: _Count
    candidates: _Count
    nominated: _Count
    restored: _Count
    removed: _Count
    entropy: _Number | None
    drift: _Number | None


class _Removed(_Stored):
    layer: str
    removed: _Count


class _Stopped(_Stored):
    epoch: _Amount
    reason: str


_EVENTS: Mapping[str, type[_Stored]] = {
    "epoch": _Epoch, "check": _CheckEvent, "removed": _Removed, "stopped": _Stopped,
}  # fmt: skip


def stored_report(file: Path) -> dict[str, Any]:
    """A ``report.json``.

    Raises:
        InputError: it cannot be read, or is no report.
    """
    report: dict[str, Any] = _checked(_Report, read_json(file), str(file), "the report of a run")
    return report


def stored_events(file: Path) -> list[dict[str, Any]]:
    """The lines of an ``events.jsonl``.

    Raises:
        InputError: it cannot be read, or a line is no event.
    """
    events = []
    for number, event in enumerate(read_json_lines(file), 1):
        kind = event.get("event") if isinstance(event, dict) else None
        if not isinstance(kind, str):
            raise InputError(f"{file}:{number}: expected an event, found damage")
        events.append(_checked(_EVENTS.get(kind, _Stored), event, f"{file}:{number}", "an event of a run"))
    return events


def _checked(model: type[_Stored], value: Any, where: str, what: str) -> Any:
    try:
        model.model_validate(value)
    except RecursionError as error:
        raise InputError(f"{where}: expected {what}, found damage: nested too deep") from error
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        raise InputError(f"{where}: expected {what}, found damage: {at}: {first['msg']}"[:300]) from error
    return value
