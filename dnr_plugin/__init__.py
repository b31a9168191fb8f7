"""dnr_plugin: compress convolutional networks by their dying neurons, with Torch-Pruning.

Importing this package loads nothing; each name loads what it needs: torch and Torch-Pruning, and recipes torchvision,
fvcore, matplotlib and pydantic as well.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dnr_plugin.dynamics.dynamics import DyingNeuronDynamics
    from dnr_plugin.dynamics.timetable import Timetable
    from dnr_plugin.errors import InputError, TargetError
    from dnr_plugin.models.saved import load_pruned, save_pruned
    from dnr_plugin.network.batchnorm import recalibrate_batchnorm
    from dnr_plugin.network.cost import flop_report
    from dnr_plugin.network.kinds import register_layer
    from dnr_plugin.network.splitting import split_attention
    from dnr_plugin.observation.observer import Observer
    from dnr_plugin.pruning.dead_neurons import remove_dead_neurons
    from dnr_plugin.pruning.layers import Limits
    from dnr_plugin.pruning.optimizer import follow_optimizer
    from dnr_plugin.pruning.plan import plan_removal
    from dnr_plugin.pruning.removal import prune_neurons
    from dnr_plugin.recipe.load import load_recipe
    from dnr_plugin.repair.network import repair_network
    from dnr_plugin.runs.run import run_recipe
    from dnr_plugin.scoring.importance import DyingNeuronImportance

_HOMES = {
    "DyingNeuronDynamics": "dynamics.dynamics",
    "DyingNeuronImportance": "scoring.importance",
    "InputError": "errors",
    "Limits": "pruning.layers",
    "Observer": "observation.observer",
    "TargetError": "errors",
    "Timetable": "dynamics.timetable",
    "flop_report": "network.cost",
    "follow_optimizer": "pruning.optimizer",
    "load_pruned": "models.saved",
    "load_recipe": "recipe.load",
    "plan_removal": "pruning.plan",
    "prune_neurons": "pruning.removal",
    "recalibrate_batchnorm": "network.batchnorm",
    "register_layer": "network.kinds",
    "remove_dead_neurons": "pruning.dead_neurons",
    "repair_network": "repair.network",
    "run_recipe": "runs.run",
    "save_pruned": "models.saved",
    "split_attention": "network.splitting",
}

__all__ = [
    "DyingNeuronDynamics",
    "DyingNeuronImportance",
    "InputError",
    "Limits",
    "Observer",
    "TargetError",
    "Timetable",
    "flop_report",
    "follow_optimizer",
    "load_pruned",
    "load_recipe",
    "plan_removal",
    "prune_neurons",
    "recalibrate_batchnorm",
    "register_layer",
    "remove_dead_neurons",
    "repair_network",
    "run_recipe",
    "save_pruned",
    "split_attention",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
