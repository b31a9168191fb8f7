"""dnr_plugin: compress convolutional networks by their dying neurons, with Torch-Pruning.

Importing this package loads torch and Torch-Pruning only; torchvision, fvcore, matplotlib and pydantic are loaded by
what needs them.
"""

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
from dnr_plugin.repair.network import repair_network
from dnr_plugin.scoring.importance import DyingNeuronImportance

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
    """Recipes need pydantic and torchvision, which the criterion alone does not."""
    if name == "load_recipe":
        from dnr_plugin.recipe.load import load_recipe

        return load_recipe
    if name == "run_recipe":
        from dnr_plugin.runs.run import run_recipe

        return run_recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
