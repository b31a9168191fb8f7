"""The benchmark of criteria: Torch-Pruning's and ours on the same trained networks, images and FLOPs.

A cell is one seed, criterion, scope and level. Its network is pruned in one step without folding, and tested as it is,
with BatchNorm recalibrated, and repaired, which is offered to every criterion alike.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnr_plugin.benchmarks.criteria.contenders import CRITERIA, Criterion, build_criterion, check_scores
from dnr_plugin.benchmarks.criteria.grid import Grid, Key
from dnr_plugin.benchmarks.criteria.plot import criteria_figure
from dnr_plugin.benchmarks.criteria.tables import PAIRS, markdown, summary
from dnr_plugin.benchmarks.testbed import Ground, dense_folder, recalibration_images, seeded
from dnr_plugin.devices import device_name, pick_device
from dnr_plugin.errors import InputError, first_line, one_line
from dnr_plugin.files import atomic_write, check_writable, contents, locked, read_json_lines
from dnr_plugin.pruning.order import SCOPES
from dnr_plugin.pruning.plan import plan_removal, reachable
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.recipe.difference import differing_fields
from dnr_plugin.recipe.load import load_recipe, write_recipe
from dnr_plugin.recipe.schema import Recipe
from dnr_plugin.reports.figures.drawing import save_figure
from dnr_plugin.runs.checks import Prepared, as_pruned, check_ranks, check_recipe, limits_of
from dnr_plugin.runs.run_folder import check_folder
from dnr_plugin.runs.state import Track
from dnr_plugin.scoring.importance import DyingNeuronImportance
from dnr_plugin.seeds import derive_seed
from dnr_plugin.training.trainer import DivergedError

_CELLS = "cells.jsonl"
# Options that decide nothing here: the grid stands in for them, and nothing is folded.
_FREE = (
    "name", "description", "seed",
    "prune.target.", "prune.score", "prune.scope", "prune.steps", "prune.fold", "prune.repair:", "report.",
)  # fmt: skip
Cell = dict[str, Any]


def run_criteria(
    recipe: Recipe,
    output: str | os.PathLike[str],
    grid: Grid,
    *,
    finetune: bool = False,
    resume: bool = False,
    device: str = "auto",
    track: Track = lambda items, total, what: items,
) -> dict[str, Any]:
    """Runs the benchmark and fills its folder.

    Each seed's dense network is trained once, in ``dense/seed=N``. Each cell is a line of ``cells.jsonl`` as soon as it
    is finished; a cell that could not be made holds the reason, and is not tried again unless its line is deleted.
    Several processes may fill one folder, each with seeds of its own; the last to end sums all of them up.

    Args:
        recipe: model, data and training; ``prune.observe.samples`` images for every criterion, ``prune.recalibrate``
            for BatchNorm, ``prune.repair_samples`` for repair; ``prune``'s limits; ``finetune``. Its seed and target
            play no part.
        output: folder, which also gets ``criteria.json``, ``criteria.md`` and ``criteria.png``.
        grid: the cells; one that is in the folder already is not run again.
        finetune: also fine-tune each network, from recalibrated and from repaired.
        resume: go on with what lies in the folder; the grid may be another, the recipe must make the same networks.
        device: "auto", "cpu" or "cuda".
        track: see `run.run_recipe`.

    Returns:
        What ``criteria.json`` holds: `summary` of all cells in the folder.

    Raises:
        InputError: recipe, levels or folder cannot be used; nothing was written.
        RunError: a dense training failed.
    """
    check_ranks()
    chosen, folder = pick_device(device), Path(output)
    _check_options(recipe, finetune)
    cells = _earlier(folder, recipe, resume)
    _check_levels(check_recipe(recipe), grid.levels)
    seeds = {seed: seeded(recipe, seed) for seed in grid.seeds}
    for seed, own_recipe in seeds.items():
        check_folder(dense_folder(folder, seed), own_recipe, resume=True)

    folder.mkdir(parents=True, exist_ok=True)
    _tidy(folder / _CELLS, cells)  # first: with it the folder is that of a benchmark
    if not (folder / "recipe.yaml").is_file():
        write_recipe(recipe, folder / "recipe.yaml")
    missing = [key for key in grid.cells if not _finished(cells.get(key), finetune)]
    for seed, of_seed in itertools.groupby(missing, key=lambda key: key.seed):
        with locked(dense_folder(folder, seed)):  # other processes may have other seeds
            ground = Ground.trained(seeds[seed], dense_folder(folder, seed), device, track)
            _fill_seed(ground, seed, [*of_seed], folder, cells, finetune, chosen, track)
    cells = _earlier(folder, recipe, resume=True)  # with those of processes that ran meanwhile
    result = summary(recipe, recalibration_images(recipe), list(cells.values()))
    write_criteria(folder, result)
    return result


def _fill_seed(
    ground: Ground, seed: int, missing: Sequence[Key], folder: Path, cells: dict[Key, Cell], finetune: bool,
    chosen: torch.device, track: Track,
) -> None:  # fmt: skip
    """Runs the missing cells of a seed, and writes each as soon as it is there."""
    for criterion, of_criterion in itertools.groupby(missing, key=lambda key: key.criterion):
        keys = list(of_criterion)
        for cell in track(_run_cells(ground, keys, finetune), len(keys), f"seed {seed}, {criterion}"):
            cell["device"] = device_name(chosen)
            with (folder / _CELLS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(cell) + "\n")
            cells[_key(cell)] = cell


def _check_options(recipe: Recipe, finetune: bool) -> None:
    problems = []
    if recipe.prune.mode != "after_training":
        problems.append(f"prune.mode: expected after_training for this benchmark, found {recipe.prune.mode}")
    elif not recalibration_images(recipe):
        problems.append("prune.recalibrate: expected above 0 for this benchmark, found 0")
    if finetune and not recipe.finetune.epochs:
        problems.append("finetune.epochs: expected at least 1 with --finetune, found 0")
    if problems:
        raise InputError(*problems)


def _check_levels(prepared: Prepared, levels: Sequence[float]) -> None:
    recipe, example = prepared.recipe, prepared.example
    model = as_pruned(recipe, prepared.model, example)
    furthest = reachable(model, example, "flops", limits_of(recipe), prepared.dense)
    problems = [
        f"--levels: expected at least {furthest:.4f}, which is as far as ignored, round_to and max_pruning_ratio "
        f"allow, found {level:g}"
        for level in levels
        if level < furthest
    ]
    if problems:
        raise InputError(*problems)


def _earlier(folder: Path, recipe: Recipe, resume: bool) -> dict[Key, Cell]:
    """The finished cells of the benchmark that lies in the folder; the later of two lines counts.

    Raises:
        InputError: the folder may not be written to, holds something else, or the benchmark of another recipe.
    """
    check_writable(folder)
    if not contents(folder):
        return {}
    file, saved = folder / _CELLS, folder / "recipe.yaml"
    if not file.is_file():
        raise InputError(
            f"--output: expected an empty folder or that of a benchmark of criteria, found {folder} with other files "
            "in it"
        )
    if not resume:
        raise InputError(
            f"--output: {folder} holds a benchmark already: add --resume to go on with it, or name another folder"
        )
    if saved.is_file():
        changed = differing_fields(load_recipe(saved), recipe)
        differing = [field for field in changed if not field.startswith(_FREE)]
        if differing:
            shown = "; ".join(differing[:8]) + (f" and {len(differing) - 8} more" if len(differing) > 8 else "")
            raise InputError(f"--output: {folder} holds a benchmark of another recipe (there, here): {shown}")
    cells: dict[Key, Cell] = {}
    for number, cell in enumerate(read_json_lines(file), 1):
        try:
            cells[_key(cell)] = cell
            _check_cell(cell)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}:{number}: expected a cell, found damage: {one_line(error)}") from error
    return cells


def _check_cell(cell: Cell) -> None:
    """Refuses a cell without what tables and plots ask of it.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: in words.
    """
    CRITERIA[cell["criterion"]], SCOPES.index(cell["scope"])
    numbers = [cell["level"], cell["dense_accuracy"], cell["seconds"], *cell["accuracy"].values()]
    if cell["kept"] is not None:
        numbers.append(cell["kept"])
    for number in numbers:
        if isinstance(number, bool) or not math.isfinite(number) or number < 0:
            raise ValueError(f"{number!r}")
    if type(cell["seed"]) is not int or not isinstance(cell["reason"], str | None):
        raise TypeError("seed or reason")


def _key(cell: Mapping[str, Any]) -> Key:
    return Key(cell["seed"], cell["criterion"], cell["scope"], cell["level"])


def _tidy(file: Path, cells: Mapping[Key, Cell]) -> None:
    """Leaves nothing but these cells in the file, which is not written anew without need: others may append to it."""
    text = "".join(json.dumps(cell) + "\n" for cell in cells.values())
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        with atomic_write(file) as out:
            out.write(text)


def _finished(cell: Cell | None, finetune: bool) -> bool:
    return cell is not None and bool(cell["reason"] or not finetune or PAIRS[1][1] in cell["accuracy"])


def _run_cells(ground: Ground, keys: Sequence[Key], finetune: bool) -> Iterator[Cell]:
    """The cells of one seed and criterion, which is built once for all of them."""
    scored, name = copy.deepcopy(ground.model), keys[0].criterion
    criterion, reason = None, None
    try:
        seed = derive_seed(ground.recipe.seed, "criterion", name)
        criterion = build_criterion(name, scored, ground.calibration, seed)
        check_scores(criterion, scored, ground.example, ground.limits)
    except Exception as error:  # criteria of Torch-Pruning fail with anything
        reason = _reason(error)
    for key in keys:
        start = time.perf_counter()
        cell: Cell = {**key._asdict(), "dense_accuracy": ground.accuracy, "kept": None, "accuracy": {}}
        cell["reason"] = reason
        if criterion is not None and reason is None:
            _fill(cell, ground, key, criterion, scored, finetune)
        cell["seconds"] = time.perf_counter() - start
        yield cell


def _fill(cell: Cell, ground: Ground, key: Key, criterion: Criterion, scored: nn.Module, finetune: bool) -> None:
    """Prunes and tests; notes the reason where that is not possible."""
    torch.manual_seed(derive_seed(key.seed, key.criterion, key.scope, str(key.level)))  # what "random" draws from
    runtime = ground.recipe.prune.runtime if ground.limits.round_to == "auto" else "eager"  # else nothing is timed
    trial = criterion.unchanged() if isinstance(criterion, DyingNeuronImportance) else contextlib.nullcontext()
    try:
        with trial:
            plan = plan_removal(
                scored, ground.example, criterion, "flops", key.level, scope=key.scope, limits=ground.limits,
                dense=ground.dense, runtime=runtime,
            )  # fmt: skip
    except Exception as error:  # a scope that the criterion has not, a level that it cannot reach, or anything
        cell["reason"] = _reason(error)
        return
    pruned = copy.deepcopy(ground.model)
    prune_neurons(pruned, ground.example, plan.removals)
    cell["kept"] = plan.achieved
    recalibrated, repaired = ground.recalibrated(pruned), ground.repaired(pruned, plan.removals)
    accuracy = cell["accuracy"]
    for name, model in (
        ("removed", pruned),
        ("recalibrated", recalibrated),
        ("repaired", repaired),
    ):
        accuracy[name] = ground.tested(model)
    if finetune:
        try:
            accuracy["recalibrated_finetuned"] = ground.tested(ground.finetuned(recalibrated))
            accuracy["repaired_finetuned"] = ground.tested(ground.finetuned(repaired))
        except DivergedError as error:
            cell["reason"] = _reason(error)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def write_criteria(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes ``criteria.json``, ``criteria.md`` and ``criteria.png``."""
    with atomic_write(folder / "criteria.json") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    with atomic_write(folder / "criteria.md") as file:
        file.write(markdown(result))
    save_figure(criteria_figure(result), folder / "criteria.png")
