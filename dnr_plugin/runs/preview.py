"""What a recipe would remove, without training or writing anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dnr_plugin.devices import pick_device
from dnr_plugin.errors import TargetError
from dnr_plugin.network.cost import flop_report
from dnr_plugin.pruning.plan import Plan
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.recipe.schema import Recipe
from dnr_plugin.reports.layer_report import layer_rows
from dnr_plugin.runs.removal_stage import importance_of, observe, plan_towards, split
from dnr_plugin.runs.run import begun
from dnr_plugin.runs.state import Track, quiet


def plan_recipe(
    recipe: Recipe, device: str = "auto", track: Track = quiet
) -> tuple[Plan | None, list[dict[str, Any]], TargetError | None]:
    """What a recipe would remove from its model as it is now, in one step; writes nothing.

    Returns:
        The plan (None in mode watch, which removes nothing), the layers before and after, and the error where the
        target cannot be reached: then the plan is the closest.

    Raises:
        InputError: as `run_recipe`.
    """
    run = begun(recipe, Path(os.devnull), pick_device(device), track)
    if recipe.prune.target is None:
        return None, layer_rows(run.dense.report, run.dense.report), None
    split(run)
    importance = importance_of(run)
    observe(run, importance)
    missed = None
    try:
        plan = plan_towards(run, importance, recipe.prune.target.target)
    except TargetError as error:
        plan, missed = error.plan, error
    prune_neurons(run.model, run.example, plan.removals)
    return plan, layer_rows(run.dense.report, flop_report(run.model, run.example)), missed
