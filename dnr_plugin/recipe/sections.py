"""Every option of a recipe: its type, range, default and meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dnr_plugin.pruning.targets import Target, target_of

MOST = 10**9  # of images


class Section(BaseModel):
    """Unknown keys, silent conversions, NaN and infinity are refused everywhere."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class ModelOptions(Section):
    name: str = Field(
        description="resnet18, resnet20, resnet56, vgg16_bn, mlp; torchvision.NAME for any torchvision classification "
        "model; module:function for a builder of your own"
    )
    num_classes: int | None = Field(
        default=None, ge=2, le=1_000_000, description="outputs; by default the number of classes in the data"
    )
    width: int | None = Field(
        default=None, ge=1, le=65_536, description="channels of the first stage of a built-in network (ResNet-18: 64)"
    )
    stem: Literal["cifar", "imagenet"] | None = Field(
        default=None,
        description="resnet18 only: 3x3 convolution for small images (default), or 7x7 stride 2 and max-pooling",
    )
    activation: Literal["relu", "leaky_relu", "silu", "gelu"] | None = Field(
        default=None,
        description="replaces the activations between the layers of any network, modules and function calls, but not "
        "gates (sigmoid, softmax, ...); by default relu in built-in networks, and the others as they are",
    )
    negative_slope: float | None = Field(
        default=None, ge=0.0, le=1000.0, description="leaky_relu only; 0.01 by default"
    )
    hidden: list[Annotated[int, Field(ge=1, le=1_000_000)]] | None = Field(
        default=None, min_length=1, max_length=1000, description="mlp only: units of each hidden layer"
    )
    kwargs: dict[str, Any] = Field(default={}, description="further arguments of a torchvision builder or of your own")
    checkpoint: str | None = Field(
        default=None, description="a state_dict file (.pt, .pth, .safetensors), loaded without running code from it"
    )


class DataOptions(Section):
    name: Literal["shapes", "cifar10", "cifar100", "mnist", "imagefolder"] = Field(
        description="shapes is drawn by this package and needs no files; the others are torchvision's"
    )
    root: str | None = Field(default=None, description="folder of the data set; needed by all but shapes")
    download: bool = Field(default=False, description="let torchvision download what is missing")
    train_size: int | None = Field(
        default=None, ge=1, le=MOST, description="use this many training images, drawn by the seed; all by default"
    )
    test_size: int | None = Field(
        default=None, ge=1, le=MOST, description="use this many test images, drawn by the seed; all by default"
    )
    image_size: int | None = Field(
        default=None, ge=8, le=16_384, description="side of the images in pixels (imagefolder: 224, shapes: 32)"
    )
    augment: list[Literal["flip", "crop", "cutout"]] = Field(
        default=[],
        description="flip: mirror half; crop: pad by an eighth and crop; cutout: blank a square of half the side",
    )
    workers: int | None = Field(
        default=None, ge=0, le=1024, description="imagefolder only: processes that decode images; 2"
    )

    @model_validator(mode="after")
    def _each_once(self) -> DataOptions:
        if len(set(self.augment)) < len(self.augment):
            raise ValueError(f"augment: expected each of them once, found {', '.join(self.augment)}")
        return self


class TargetOptions(Section):
    """Exactly one of them."""

    flops: float | None = Field(default=None, gt=0.0, lt=1.0, description="share of the FLOPs that is kept")
    params: float | None = Field(default=None, gt=0.0, lt=1.0, description="share of the parameters that is kept")
    latency: float | None = Field(
        default=None,
        gt=0.0,
        lt=1.0,
        description="share of the latency of a batch of 8 that is kept, in prune.runtime: predicted, then measured",
    )
    neuron_sparsity: float | None = Field(
        default=None, gt=0.0, lt=1.0, description="share of the neurons that is removed"
    )
    weight_sparsity: float | None = Field(
        default=None, gt=0.0, lt=1.0, description="share of the parameters that is removed"
    )
    dead: bool | None = Field(default=None, description="true: remove what is dead, and nothing else")

    @model_validator(mode="after")
    def _exactly_one(self) -> TargetOptions:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"expected exactly one of {', '.join(type(self).model_fields)}, found {', '.join(given) or 'none'}"
            )
        if self.dead is False:
            raise ValueError("dead: expected true, found false")
        return self

    @property
    def kind(self) -> str:
        return next(name for name, value in self if value is not None)

    @property
    def value(self) -> float:
        return float(getattr(self, self.kind))

    @property
    def target(self) -> Target:
        """As removal takes it."""
        return target_of(self.kind, self.value)


class ObserveOptions(Section):
    samples: int = Field(
        default=2048,
        ge=1,
        le=MOST,
        description="training images on which activations are read; after training not augmented",
    )
    min_samples: int = Field(
        default=1536, ge=1, le=MOST, description="a neuron is judged dead on no fewer images than this"
    )
    share: float = Field(
        default=0.125, ge=1e-4, le=1.0, description="share of each batch that means, rates and histograms read"
    )
    threshold: float = Field(
        default=0.0, ge=0.0, le=1e6, description="a neuron fires where its activation exceeds this"
    )
    bins: int = Field(
        default=16, ge=2, le=64, description="bins of the activation histogram: one for silent, the others octaves"
    )

    @model_validator(mode="after")
    def _enough(self) -> ObserveOptions:
        if self.min_samples > self.samples:
            raise ValueError(f"min_samples: expected at most samples ({self.samples}), found {self.min_samples}")
        return self


class DynamicsOptions(Section):
    check_every: float = Field(
        default=1.0, ge=1e-4, le=1e6, description="epochs from one check of the neurons to the next"
    )
    warmup_epochs: float = Field(
        default=1.0, ge=0.0, le=1e6, description="no neuron becomes a candidate before this epoch"
    )
    patience: int = Field(
        default=2,
        ge=0,
        le=MOST,
        description="checks that a candidate stays, zeroed but trained, before it is removed; 0: none; at the "
        "last check all go that a target needs",
    )
    zero: bool = Field(
        default=True, description="zero the candidates; false: let them work on until they are removed or restored"
    )
    ramp: Literal["linear", "cubic", "at_once"] = Field(
        default="cubic",
        description="how the target is approached from warm-up on: linear in equal parts; cubic, much at first "
        "(1 - (1 - t)^3); at_once, all at the first check; of no effect on target dead",
    )
    margin: float = Field(
        default=2.0,
        ge=1.0,
        le=1e6,
        description="a candidate that was alive is restored once it would stay even if this many times as much were to "
        "go; 1: as soon as another ranks below it",
    )
    until: float = Field(
        default=0.6,
        gt=0.0,
        le=1.0,
        description="share of train.epochs at which the target is met and removal ends; the rest fine-tunes",
    )
    remove_at: list[Annotated[float, Field(gt=0.0, le=1e6)]] | None = Field(
        default=None,
        min_length=1,
        description="remove only at the first check from each of these epochs on; by default at every check",
    )
    max_share: float = Field(
        default=0.25,
        gt=0.0,
        le=1.0,
        description="largest share of a layer that becomes candidates at one check but the last",
    )
    dying_entropy: float | None = Field(
        default=None,
        gt=0.0,
        le=1e6,
        description="a neuron whose activation histogram has at most this entropy (bits), and less than at the check "
        "before, is dying: a candidate like a dead one; by default only dead ones are",
    )


@dataclass(frozen=True)
class OnlyIn:
    """Of a field: the values of ``prune.mode`` with which it may be set."""

    modes: tuple[str, ...]


_AFTER_TRAINING, _REMOVING = OnlyIn(("after_training",)), OnlyIn(("after_training", "dynamic"))


class PruneOptions(Section):
    mode: Literal["after_training", "dynamic", "watch"] = Field(
        default="after_training",
        description="after_training: train, remove, fine-tune; dynamic: remove while training what does not come back; "
        "watch: remove nothing, record which neurons die and come back",
    )
    target: TargetOptions | None = Field(
        default=None, description="what to reach: exactly one key; needed by every mode but watch"
    )
    dynamics: DynamicsOptions = Field(
        default=DynamicsOptions(),
        description="when to look at the neurons while training, and what to remove in mode dynamic",
    )
    score: Annotated[str | None, _REMOVING] = Field(
        default=None,
        description="what ranks the neurons, low ones first, dead ones before all: redundancy (after_training only, "
        "and its default), variation (the default of dynamic), contribution, magnitude, dormancy, firing_rate, "
        "sample_activity, entropy or on_off_entropy",
    )
    scope: Annotated[Literal["local", "global", "isomorphic", "cost_aware", "latency_aware"] | None, _REMOVING] = Field(
        default=None,
        description="rank within each layer (local), over the whole network (global), among layers of like structure, "
        "or over the whole network by score for what the removal saves, as counted (cost_aware) or in time "
        "(latency_aware, with target latency); by default cost_aware with redundancy and local with other scores",
    )
    repair: Annotated[bool, _AFTER_TRAINING] = Field(
        default=True,
        description="after_training only: fit the layers that are left, in closed form, to what the dense network's "
        "gave",
    )
    repair_samples: Annotated[int, _AFTER_TRAINING] = Field(
        default=4096,
        ge=64,
        le=MOST,
        description="training images for it, augmented as in training; fewer where they are large",
    )
    repair_pairs: Annotated[bool, _AFTER_TRAINING] = Field(
        default=False,
        description="after_training only: also fit layers by what the next one makes of them; takes three times as "
        "long",
    )
    prior: Annotated[float, _AFTER_TRAINING] = Field(
        default=0.0,
        ge=0.0,
        le=1e6,
        description="after_training only: scores are multiplied with the share of checks at which a neuron was alive "
        "while the network trained, to this power; 0: its past does not count",
    )
    steps: Annotated[int, _AFTER_TRAINING] = Field(
        default=1, ge=1, le=1000, description="after_training only: observe and remove in this many equal steps"
    )
    round_to: Annotated[Annotated[int, Field(ge=2, le=65_536)] | Literal["auto"] | None, _REMOVING] = Field(
        default=None,
        description="keep a multiple of this many channels in every layer; auto (after_training only): of as many as "
        "this machine computes in the time of fewer, as measured",
    )
    runtime: Annotated[Literal["eager", "compiled", "onnxruntime"], _AFTER_TRAINING] = Field(
        default="eager",
        description="after_training only: what the network is timed in, with target latency or round_to auto: eager, "
        "compiled (torch.compile) or onnxruntime (on the CPU)",
    )
    max_pruning_ratio: Annotated[float, _REMOVING] = Field(
        default=0.9, gt=0.0, le=1.0, description="largest share taken from one layer"
    )
    ignored: Annotated[list[str], _REMOVING] = Field(
        default=[], description="layers left alone, by name or shell pattern (layer4.*)"
    )
    attention: Annotated[bool, _AFTER_TRAINING] = Field(
        default=False,
        description="after_training only: give attention a layer for each projection, with the same outputs, so that "
        "heads, and channels of query and key, can go",
    )
    verify: Annotated[bool, _REMOVING] = Field(
        default=True,
        description="check Torch-Pruning's groups before they are used, on a copy of the network; what is at fault is "
        "left alone",
    )
    fold: Annotated[bool, _REMOVING] = Field(
        default=True,
        description="move a removed neuron's mean into the next bias or BatchNorm; where recalibrate follows, it takes "
        "the place of this behind a BatchNorm",
    )
    recalibrate: Annotated[int | None, _AFTER_TRAINING] = Field(
        default=None,
        ge=0,
        le=MOST,
        description="after_training only: training images on which BatchNorm statistics are taken anew; 0: none; by "
        "default 2048 without repair, and none with it, which fits them as well",
    )
    observe: ObserveOptions = Field(
        default=ObserveOptions(),
        description="how activations are read: on training images after training, or on the last training batches "
        "before each check",
    )

    @property
    def criterion(self) -> str:
        """The score that ranks the neurons."""
        return self.score or ("redundancy" if self.mode == "after_training" else "variation")

    @property
    def ranking(self) -> str:
        """Among which neurons they are ranked."""
        return self.scope or ("cost_aware" if self.criterion == "redundancy" else "local")

    @property
    def recalibration(self) -> int:
        """Images on which BatchNorm statistics are taken anew."""
        default = 0 if self.repair else 2048
        return default if self.recalibrate is None else self.recalibrate

    @model_validator(mode="after")
    def _dead_at_once(self) -> PruneOptions:
        if self.target is not None and self.target.dead and self.steps > 1:
            raise ValueError(f"steps: expected 1 with target dead, which has no steps, found {self.steps}")
        if self.steps > 1 and self.recalibrate == 0 and not self.repair:
            raise ValueError(
                "recalibrate: expected above 0, or repair, with several steps, which observe in between, found 0"
            )
        return self

    @model_validator(mode="after")
    def _only_what_the_mode_uses(self) -> PruneOptions:
        if (self.target is None) != (self.mode == "watch"):
            expected = "nothing with mode watch" if self.target else f"one with mode {self.mode}"
            raise ValueError(f"target: expected {expected}, found {self.target.kind if self.target else 'nothing'}")
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            modes = next((rule.modes for rule in field.metadata if isinstance(rule, OnlyIn)), (self.mode,))
            if self.mode not in modes and value != field.default:
                shown = ", ".join(value) if isinstance(value, list) else str(value).lower()
                raise ValueError(f"{name}: expected nothing with mode {self.mode}, found {shown}")
        if self.mode == "dynamic" and self.score == "redundancy":
            raise ValueError("score: expected another with mode dynamic, which has no repair, found redundancy")
        for name in ("repair_samples", "repair_pairs"):
            value = getattr(self, name)
            if value != type(self).model_fields[name].default and not self.repair:
                raise ValueError(f"{name}: expected nothing without repair, found {str(value).lower()}")
        given = [name for name, value in self.dynamics if value != DynamicsOptions.model_fields[name].default]
        if self.mode != "dynamic" and set(given) - {"check_every"}:
            shown = ", ".join(name for name in given if name != "check_every")
            raise ValueError(f"dynamics: expected check_every alone with mode {self.mode}, found {shown}")
        if self.mode == "dynamic" and self.target is not None and not self.target.target.resumable:
            kind = self.target.kind
            raise ValueError(
                f"target: expected another than {kind} with mode dynamic, whose timings could not be resumed, "
                f"found {kind}"
            )
        if self.mode == "dynamic" and self.round_to == "auto":
            raise ValueError("round_to: expected a number with mode dynamic, while which nothing is timed, found auto")
        timed = self.round_to == "auto" or (self.target is not None and self.target.target.timed)
        if self.runtime != "eager" and not timed:
            raise ValueError(
                f"runtime: expected nothing without target latency or round_to auto, which time, found {self.runtime}"
            )
        if self.scope == "latency_aware" and self.target is not None and self.target.kind != "latency":
            raise ValueError(
                f"scope: expected another with target {self.target.kind}, which counts no time, found latency_aware"
            )
        if self.mode == "dynamic" and self.fold is False and self.dynamics.patience and self.dynamics.zero:
            raise ValueError("fold: expected nothing where candidates are zeroed, found false")
        return self


class ReportOptions(Section):
    runtimes: list[Literal["compiled", "onnxruntime"]] = Field(
        default=[],
        description="what latency is reported in beside eager mode and prune.runtime, in batches of 1 and 32: compiled "
        "(torch.compile, 20 s to minutes for each of four compilations), onnxruntime (on the CPU)",
    )

    @model_validator(mode="after")
    def _each_once(self) -> ReportOptions:
        if len(set(self.runtimes)) < len(self.runtimes):
            raise ValueError(f"runtimes: expected each of them once, found {', '.join(self.runtimes)}")
        return self
