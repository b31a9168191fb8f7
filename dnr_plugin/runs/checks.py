"""Everything that can be wrong with a run before it computes or writes anything."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dnr_plugin.data.registry import check_data, data_shape, load_data, train_size
from dnr_plugin.devices import check_memory
from dnr_plugin.errors import InputError, did_you_mean
from dnr_plugin.models.build import build_model
from dnr_plugin.models.examples import check_forward, example_image
from dnr_plugin.models.options import check_model
from dnr_plugin.network.calling import copied
from dnr_plugin.network.runtimes import check_runtime
from dnr_plugin.network.splitting import split_attention
from dnr_plugin.pruning.groups import Survey
from dnr_plugin.pruning.layers import Limits
from dnr_plugin.pruning.plan import check_target
from dnr_plugin.pruning.targets import Baseline, baseline
from dnr_plugin.recipe.schema import Recipe
from dnr_plugin.runs.timetable import check_timetable
from dnr_plugin.scoring.scores import SCORES
from dnr_plugin.seeds import derive_seed
from dnr_plugin.training.pressure import batchnorm_scales


@dataclass(frozen=True)
class Prepared:
    """A recipe that was found to be fine, and what was built to find out.

    Attributes:
        recipe: as it was checked.
        model: as a run with this recipe begins, on the CPU.
        example: an image that it takes.
        shape: classes, channels and side of the images, as the recipe has them.
        dense: the model's measures, which targets refer to.
    """

    recipe: Recipe
    model: nn.Module
    example: Tensor
    shape: tuple[int, int, int]
    dense: Baseline


def check_recipe(recipe: Recipe) -> Prepared:
    """Checks everything about a recipe that can be known without reading images or training.

    Returns:
        What was built for it; its weights are those of a run.

    Raises:
        InputError: all problems of data, model, score and sizes; where there are none, of how they fit each other and
            the target.
    """
    problems: list[str] = []
    checks: list[Callable[[], None]] = [
        lambda: check_data(recipe.data),
        lambda: check_model(recipe.model),
        lambda: check_score(recipe),
        lambda: check_sizes(recipe, train_size(recipe.data)),
        lambda: check_live_noise(recipe),
        lambda: check_timetable(recipe, train_size(recipe.data)),
        lambda: check_runtimes(recipe),
    ]
    for check in checks:
        try:
            check()
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)
    classes, in_channels, image_size = shape = data_shape(recipe.data)
    if recipe.data.name != "imagefolder":  # which reads its files batch by batch
        images = train_size(recipe.data) or 0
        check_memory(images * in_channels * image_size**2, "data", f"{images} images of {image_size}x{image_size}")
    torch.manual_seed(derive_seed(recipe.seed, "weights"))
    model = build_model(recipe.model, classes, in_channels, image_size)
    example = example_image(in_channels, image_size)
    check_forward(model, example, classes)
    check_pressure(model, recipe)
    pruned = as_pruned(recipe, model, example)
    survey = Survey(pruned, example)
    dense = baseline(pruned, example, survey=survey, verify=recipe.prune.verify)
    target = recipe.prune.target
    if target is not None:
        check_target(pruned, example, target.kind, target.value, limits_of(recipe), dense, survey)
    return Prepared(recipe, model, example, shape, dense)


def as_pruned(recipe: Recipe, model: nn.Module, example: Tensor) -> nn.Module:
    """The model with the layers that a removal finds: a copy with its attention split, where the recipe asks for it."""
    if not recipe.prune.attention:
        return model
    split = copied(model)
    split_attention(split, example)
    return split


def check_images(recipe: Recipe) -> None:
    """What only reading the data tells: damaged files, and how many images there are; after `check_recipe`.

    Nothing is drawn or downloaded for it.

    Raises:
        InputError: as a run of the recipe would.
    """
    if recipe.data.name != "shapes" and not recipe.data.download:
        images = len(load_data(recipe.data, recipe.seed).train)
        check_sizes(recipe, images)
        check_timetable(recipe, images)


def check_ranks() -> None:
    """Refuses several processes: each would train a model of its own and write to the same folder."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise InputError(f"torchrun: expected one process, since several are not supported yet, found {ranks}")


def check_sizes(recipe: Recipe, images: int | None) -> None:
    """Refuses batches larger than the training images, and fewer of these than death is judged on; None: unknown."""
    wanted = {
        f"{stage}.batch_size": options.batch_size
        for stage, options in (("train", recipe.train), ("finetune", recipe.finetune))
        if options.epochs
    }
    wanted["prune.observe.min_samples"] = recipe.prune.observe.min_samples
    problems = [
        f"{name}: expected at most {images}, the number of training images, found {value}"
        for name, value in wanted.items()
        if images is not None and value > images
    ]
    if problems:
        raise InputError(*problems)


def check_live_noise(recipe: Recipe) -> None:
    """Refuses noise on live neurons where no checks tell which these are."""
    noise = recipe.finetune.pressure.noise
    if noise is not None and noise.neurons == "live":
        raise InputError(
            "finetune.pressure.noise.neurons: expected all, since only train checks which neurons are live, found live"
        )


def check_score(recipe: Recipe) -> None:
    if recipe.prune.score is not None and recipe.prune.score not in SCORES:
        raise InputError(
            f"prune.score: expected one of {', '.join(SCORES)}, found {recipe.prune.score!r}"
            f"{did_you_mean(recipe.prune.score, SCORES)}"
        )


def check_runtimes(recipe: Recipe) -> None:
    """Refuses runtimes that this machine lacks something for."""
    problems: list[str] = []
    asked = [("prune.runtime", recipe.prune.runtime), *(("report.runtimes", name) for name in recipe.report.runtimes)]
    for field, name in asked:
        try:
            check_runtime(name, field)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(*problems)


def limits_of(recipe: Recipe) -> Limits:
    """What the recipe allows to be removed."""
    prune = recipe.prune
    return Limits(prune.ignored, prune.round_to, prune.max_pruning_ratio, verify=prune.verify)


def check_pressure(model: nn.Module, recipe: Recipe) -> None:
    """Refuses pressure on what the model does not have."""
    if batchnorm_scales(model):
        return
    problems = [
        f"{stage}.pressure.bn_l1: expected a model with BatchNorm scales, found none in {recipe.model.name}"
        for stage, options in (("train", recipe.train), ("finetune", recipe.finetune))
        if options.pressure.bn_l1 is not None
    ]
    if problems:
        raise InputError(*problems)
