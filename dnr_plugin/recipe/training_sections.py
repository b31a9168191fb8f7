"""The sections of a recipe that say how a network trains, before the removal and after it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from dnr_plugin.recipe.sections import MOST, Section

Schedule = Literal["constant", "cosine", "linear", "one_cycle"]


def _scheduled(what: str, highest: str, default: Schedule) -> Any:
    """The field of a schedule; `schedules.scheduled` has the formulas."""
    return Field(
        default=default,
        description=f"{what} per step: constant; linear or cosine, down from {highest} to zero; "
        f"one_cycle, up from 4 % to {highest} at 30 % of the steps, then down to zero",
    )


class BatchNormL1Options(Section):
    strength: float = Field(
        ge=0.0,
        le=1e6,
        description="highest weight of the sum of the scales' magnitudes; counts as part of the loss, so it is "
        "clipped with it",
    )
    schedule: Schedule = _scheduled("strength", "full strength", "one_cycle")


class NoiseOptions(Section):
    std: float = Field(
        ge=0.0,
        le=1e6,
        description="highest standard deviation, the same for every element of every gradient; drawn from "
        "seed, epoch and step alone, differently on CPU and GPU",
    )
    schedule: Schedule = _scheduled("standard deviation", "std", "constant")
    when: Literal["before_clipping", "after_clipping"] = Field(
        default="before_clipping",
        description="before_clipping: clip_norm bounds gradient and noise together; "
        "after_clipping: noise comes on top of it; the same without clip_norm",
    )
    neurons: Literal["all", "live"] = Field(
        default="all",
        description="live: none on the weights and BatchNorm scales of neurons that were dead at the last check, so "
        "that noise does not wake them; in train only, where checks tell which these are",
    )


class PressureOptions(Section):
    weight_decay_schedule: Schedule = _scheduled("weight_decay", "weight_decay", "constant")
    bn_l1: BatchNormL1Options | None = Field(default=None, description="L1 penalty on the scales of BatchNorm layers")
    noise: NoiseOptions | None = Field(default=None, description="normal noise added to the gradients")


class TrainOptions(Section):
    epochs: int = Field(ge=0, le=1_000_000, description="passes over the training images")
    batch_size: int = Field(default=128, ge=2, le=MOST, description="images per step")
    optimizer: Literal["sgd", "adam", "adamw"] = Field(default="sgd", description="torch.optim's")
    lr: float = Field(default=0.1, gt=0.0, le=1e30, description="highest learning rate")
    momentum: float | None = Field(default=None, ge=0.0, lt=1.0, description="sgd only; 0.9 by default")
    nesterov: bool = Field(default=False, description="sgd only; needs momentum")
    weight_decay: float = Field(default=5e-4, ge=0.0, le=1000.0, description="on every parameter")
    schedule: Schedule = _scheduled("learning rate", "lr", "cosine")
    warmup_epochs: float = Field(
        default=0.0, ge=0.0, le=1e6, description="linear rise of the learning rate at the start"
    )
    clip_norm: float | None = Field(
        default=None, gt=0.0, le=1e9, description="largest norm of the gradient; no clipping by default"
    )
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0, description="of the cross-entropy")
    amp: Literal["auto", True, False] = Field(
        default="auto",
        description="bfloat16 autocast and channels last; auto: where a short measurement before the training finds it "
        "at least 1.1 times as fast (fine-tuning does as the training did), which results then depend on; "
        "train.amp: false keeps repair from bfloat16, too",
    )
    pressure: PressureOptions = Field(default=PressureOptions(), description="what makes neurons die; off by default")

    @model_validator(mode="after")
    def _combinations(self) -> TrainOptions:
        if self.momentum is not None and self.optimizer != "sgd":
            raise ValueError(f"momentum: expected nothing for {self.optimizer}, found {self.momentum:g}")
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0.0):
            raise ValueError(f"nesterov: expected sgd with momentum above 0, found {self.optimizer}, {self.momentum}")
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs: expected less than epochs ({self.epochs}), found {self.warmup_epochs:g}")
        if self.schedule == "one_cycle" and self.warmup_epochs:
            raise ValueError("warmup_epochs: expected 0 with schedule one_cycle, which has a rise of its own")
        return self


class FinetuneOptions(TrainOptions):
    lr: float = Field(default=0.01, gt=0.0, le=1e30, description="highest learning rate")
