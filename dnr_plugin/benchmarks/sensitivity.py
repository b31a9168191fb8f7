"""How much each layer can spare: accuracy once a share of one layer alone was removed."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dnr_plugin.benchmarks.criteria.contenders import build_criterion
from dnr_plugin.benchmarks.options import shares
from dnr_plugin.benchmarks.testbed import Ground, dense_folder, seeded
from dnr_plugin.devices import device_name, versions
from dnr_plugin.errors import InputError
from dnr_plugin.files import atomic_write, check_writable, contents, locked
from dnr_plugin.pruning.groups import prunable_layers
from dnr_plugin.pruning.layers import Layer
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.recipe.schema import Recipe
from dnr_plugin.reports.figures.drawing import save_figure
from dnr_plugin.reports.table import Table
from dnr_plugin.runs.checks import check_ranks, check_recipe
from dnr_plugin.runs.run_folder import check_folder
from dnr_plugin.runs.state import Track
from dnr_plugin.scoring.importance import DyingNeuronImportance
from dnr_plugin.seeds import derive_seed

# In the folder: its own files, and those of the benchmark of criteria, with which it shares dense networks.
_OURS = {
    "dense", "sensitivity.json", "sensitivity.md", "sensitivity.png",
    "recipe.yaml", "cells.jsonl", "criteria.json", "criteria.md", "criteria.png",
}  # fmt: skip
SHARES = "0.25,0.5,0.75,0.9"


def shares_of(text: str | None) -> list[float]:
    """Reads shares with commas between them; by default `SHARES`.

    Raises:
        InputError: one that is not above 0 and below 1.
    """
    return sorted(set(shares("--shares", SHARES if text is None else text, "a layer")))


def run_sensitivity(
    recipe: Recipe,
    output: str | os.PathLike[str],
    shares: Sequence[float],
    *,
    device: str = "auto",
    track: Track = lambda items, total, what: items,
) -> dict[str, Any]:
    """Removes the lowest shares of one layer at a time and tests the network as it is and repaired.

    Args:
        recipe: model, data, training, ``prune.score`` and ``prune.repair_samples``; as in `bench_criteria`.
        output: folder; its dense network is that of a benchmark of criteria, if one lies there, and else trained.
        shares: of a layer's neurons, in (0, 1), ascending.
        device: "auto", "cpu" or "cuda".
        track: see `run.run_recipe`.

    Returns:
        What ``sensitivity.json`` holds: for each layer its neurons, and for each share the accuracies.

    Raises:
        InputError: recipe or folder cannot be used; nothing was written.
    """
    check_ranks()
    folder, recipe = Path(output), seeded(recipe, recipe.seed)
    if recipe.prune.mode != "after_training":
        raise InputError(f"prune.mode: expected after_training for this benchmark, found {recipe.prune.mode}")
    check_recipe(recipe)
    check_writable(folder)
    if foreign := [path for path in contents(folder) if path.name not in _OURS]:
        raise InputError(
            f"--output: expected an empty folder or that of a benchmark, found {folder} with {foreign[0].name} in it"
        )
    check_folder(dense_folder(folder, recipe.seed), recipe, resume=True)
    with locked(folder):
        return _measured(recipe, folder, shares, device, track)


def _measured(recipe: Recipe, folder: Path, shares: Sequence[float], device: str, track: Track) -> dict[str, Any]:
    ground = Ground.trained(recipe, dense_folder(folder, recipe.seed), device, track)
    scored = copy.deepcopy(ground.model)
    seed = derive_seed(recipe.seed, "criterion", recipe.prune.criterion)
    importance = build_criterion(recipe.prune.criterion, scored, ground.calibration, seed)
    assert isinstance(importance, DyingNeuronImportance)
    layers = prunable_layers(scored, ground.example, ground.limits, {}).layers
    cells = [(layer, share) for layer in layers for share in shares]
    rows: dict[str, dict[str, Any]] = {}
    for layer, share in track(cells, len(cells), "layers and shares"):
        gone = _lowest(layer, importance, share)
        removed = copy.deepcopy(ground.model)
        prune_neurons(removed, ground.example, {layer.name: gone})
        repaired = ground.repaired(removed, {layer.name: gone})
        row = rows.setdefault(layer.name, {"layer": layer.name, "neurons": layer.size, "points": []})
        row["points"].append(
            {
                "share": len(gone) / layer.size,
                "removed": ground.tested(removed),
                "repaired": ground.tested(repaired),
            }
        )
    result = {
        "name": "sensitivity", "seed": recipe.seed, "score": recipe.prune.criterion, "dense": ground.accuracy,
        "layers": [*rows.values()], "device": device_name(ground.example.device), "versions": versions(),
    }  # fmt: skip
    _write(folder, result)
    return result


def _lowest(layer: Layer, importance: DyingNeuronImportance, share: float) -> list[int]:
    """The neurons that score lowest, in whole channel groups, at least one and not all."""
    scores = importance(layer.group)
    assert scores is not None
    order = layer.by_unit(scores).argsort().tolist()
    return sorted(layer.neurons(order[: min(max(1, round(share * len(order))), len(order) - 1)]))


def sensitivity_table(result: dict[str, Any]) -> Table:
    """A layer in each row, with the accuracy in % as it is and repaired for each share."""
    shares = [point["share"] for point in result["layers"][0]["points"]]
    head = ["layer", "neurons", *(f"{100 * share:.0f} % gone" for share in shares)]
    rows = [
        [
            row["layer"],
            str(row["neurons"]),
            *(f"{100 * point['removed']:.1f} / {100 * point['repaired']:.1f}" for point in row["points"]),
        ]
        for row in result["layers"]
    ]
    title = f"accuracy in %, as it is / repaired; dense {100 * result['dense']:.2f}"
    return Table(title, head, rows)


def _write(folder: Path, result: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    with atomic_write(folder / "sensitivity.json") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    with atomic_write(folder / "sensitivity.md") as file:
        file.write(f"Test accuracy in %, as it is / repaired; dense {100 * result['dense']:.2f}; {result['score']}\n\n")
        file.writelines(f"{line}\n" for line in sensitivity_table(result).markdown())
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for row in result["layers"]:
        points = [{"share": 0.0, "repaired": result["dense"]}, *row["points"]]
        shares, accuracies = [100 * p["share"] for p in points], [100 * p["repaired"] for p in points]
        axes.plot(shares, accuracies, marker="o", label=row["layer"])
    axes.set_xlabel("neurons of the layer removed, %")
    axes.set_ylabel("test accuracy after repair, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, folder / "sensitivity.png")
