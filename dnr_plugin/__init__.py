"""dnr_plugin: compress convolutional networks by their dying neurons, with Torch-Pruning.

Importing this package loads torch and Torch-Pruning only; torchvision, fvcore, matplotlib and pydantic are loaded by
what needs them.
"""

from .batchnorm import recalibrate_batchnorm
from .candidates import Timetable
from .checkpoint import load_pruned, save_pruned
from .dynamics import DyingNeuronDynamics
from .errors import InputError, TargetError
from .importance import DyingNeuronImportance
from .layers import Limits
from .measure import flop_report
from .observe import Observer
from .optimizer import follow_optimizer
from .planning import plan_removal
from .removal import prune_neurons, remove_dead_neurons
from .repair import repair_network

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
    "remove_dead_neurons",
    "repair_network",
    "run_recipe",
    "save_pruned",
]


def __getattr__(name: str) -> object:
    """Recipes need pydantic and torchvision, which the criterion alone does not."""
    if name == "load_recipe":
        from .recipe import load_recipe

        return load_recipe
    if name == "run_recipe":
        from .run import run_recipe

        return run_recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
