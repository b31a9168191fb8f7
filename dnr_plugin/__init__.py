"""dnr_plugin: compress convolutional networks by their dying neurons, with Torch-Pruning."""

from .importance import DyingNeuronImportance

__all__ = ["DyingNeuronImportance"]
