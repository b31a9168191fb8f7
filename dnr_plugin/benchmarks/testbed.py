"""What the cells of a benchmark share: a trained network, the images, and what can be done to a pruned copy."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from dnr_plugin.benchmarks.criteria.contenders import Calibration
from dnr_plugin.data.images import ImageSource
from dnr_plugin.devices import fast_layout
from dnr_plugin.network.batchnorm import recalibrate_batchnorm
from dnr_plugin.pruning.layers import Limits
from dnr_plugin.pruning.targets import Baseline
from dnr_plugin.recipe.schema import Recipe
from dnr_plugin.repair.network import repair_towards
from dnr_plugin.repair.reference import Reference
from dnr_plugin.runs.removal_stage import repair_precision, split
from dnr_plugin.runs.run import train_dense
from dnr_plugin.runs.state import RunState, Track
from dnr_plugin.seeds import derive_seed
from dnr_plugin.training.evaluation import evaluate
from dnr_plugin.training.trainer import Trainer

_RECALIBRATED = 2048  # images for BatchNorm where the recipe leaves their number open


def recalibration_images(recipe: Recipe) -> int:
    """Images for BatchNorm, whether the recipe's own run repairs or not."""
    wanted: int | None = recipe.prune.recalibrate
    return _RECALIBRATED if wanted is None else wanted


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe of a seed's dense network."""
    # name and description take no part, and could differ when the benchmark is resumed
    update = {"name": f"dense-seed-{seed}", "description": "a dense network of a benchmark", "seed": seed}
    return recipe.model_copy(update=update)


def dense_folder(folder: Path, seed: int) -> Path:
    """Where a benchmark keeps a seed's dense network."""
    return folder / "dense" / f"seed={seed}"


def _trained_in_bfloat16(run: RunState) -> bool:
    """As its training chose; of a network that was only loaded, as ``train.amp`` asks, "auto" being float32."""
    chosen = run.results.amp.get("train")
    return run.recipe.train.amp is True if chosen is None else chosen.used


@dataclass
class Ground:
    """What all cells of a seed share: the trained network and the images. Nothing in it is changed.

    ``amp``: whether it was trained in bfloat16, in which pruned networks are then tested and fine-tuned.
    """

    recipe: Recipe
    model: nn.Module
    example: Tensor
    limits: Limits
    dense: Baseline
    calibration: Calibration
    recalibration: list[Tensor]
    reference: Reference
    train: ImageSource
    test: ImageSource
    amp: bool

    @classmethod
    def trained(cls, recipe: Recipe, folder: Path, device: str, track: Track) -> Ground:
        """Trains the dense network, or loads it where the folder holds it."""
        run = train_dense(recipe, folder, device=device, track=track)
        split(run)
        observe = recipe.prune.observe
        images, labels = zip(*run.labelled(observe.samples, "calibration images"), strict=True)
        calibration = Calibration(
            torch.cat(images), torch.cat(labels), run.example, run.data.num_classes, observe, run.histories,
            recipe.prune.prior,
        )  # fmt: skip
        augment = recipe.data.augment  # statistics like those of training
        recalibration = list(run.calibration(recalibration_images(recipe), "recalibration images", augment))
        repairing = run.calibration(recipe.prune.repair_samples, "images to repair on", augment)
        model = run.model.eval().to(memory_format=fast_layout(run.example.device))
        reference = Reference(model, run.example, repairing, amp=repair_precision(recipe), seed=recipe.seed)
        return cls(
            recipe, model, run.example, run.limits, run.dense, calibration, recalibration, reference,
            run.train_images, run.test_images, _trained_in_bfloat16(run),
        )  # fmt: skip

    @cached_property
    def accuracy(self) -> float:
        """Of the dense network, tested as the pruned ones are."""
        return self.tested(self.model)

    def tested(self, model: nn.Module) -> float:
        """Accuracy on the test images, in 16 bits where training was, which takes half of the time."""
        return evaluate(model, self.test, amp=self.amp)

    def recalibrated(self, model: nn.Module) -> nn.Module:
        trial = copy.deepcopy(model)
        recalibrate_batchnorm(trial, self.recalibration)
        return trial

    def repaired(self, model: nn.Module, removals: Mapping[str, Sequence[int]]) -> nn.Module:
        trial = copy.deepcopy(model)
        repair_towards(trial, self.reference, removals, pairs=self.recipe.prune.repair_pairs)
        return trial

    def finetuned(self, model: nn.Module) -> nn.Module:
        """Fine-tuned as `run.run_recipe` does it; with ``amp: auto`` as the dense network was trained.

        Raises:
            DivergedError: the loss is not finite.
        """
        trial, options = copy.deepcopy(model), self.recipe.finetune
        if options.amp == "auto":
            options = options.model_copy(update={"amp": self.amp})
        seed = derive_seed(self.recipe.seed, "finetune")
        torch.manual_seed(seed)
        trainer = Trainer(trial, self.train, options, seed, self.recipe.data.augment)
        for number in range(options.epochs):
            trainer.epoch(number)
        return trial
