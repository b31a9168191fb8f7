"""The drop-in snippet on every classification model of torchvision that Torch-Pruning itself can prune.

``pytest -m slow tests/test_torchvision.py -rs`` names the models that Torch-Pruning cannot prune; skipped here too.
"""

from __future__ import annotations

import gc
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import nn

from dnr_plugin import DyingNeuronImportance

MODELS = torchvision.models.list_models(module=torchvision.models)
SMALL = ["mobilenet_v3_small", "resnet18", "squeezenet1_1"]
FIXED_SIZE = ("vit_", "swin", "maxvit")
SECONDS = 120


class TooLong(Exception):
    pass


@contextmanager
def _deadline() -> Iterator[None]:
    """Torch-Pruning's search does not finish on some graphs."""

    def stop(number: int, frame: Any) -> None:
        raise TooLong

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _model(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    size = 224 if name.startswith(FIXED_SIZE) else 96
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **options).eval(), torch.randn(1, 3, size, size)


def _pruned(model: nn.Module, example_inputs: torch.Tensor, importance: Any) -> float:
    """Share of the parameters kept; the model must still run."""
    before = sum(p.numel() for p in model.parameters())
    pruner = tp.pruner.BasePruner(
        model, example_inputs, importance=importance, pruning_ratio=0.5, global_pruning=True,
        in_channel_groups={}, out_channel_groups={},
    )  # fmt: skip
    pruner.step()
    with torch.no_grad():
        model(example_inputs)
    return sum(p.numel() for p in model.parameters()) / before


@pytest.mark.parametrize(
    "name", [name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_the_snippet_runs_on(name: str) -> None:
    warnings.simplefilter("ignore")
    gc.collect()
    try:
        with _deadline():
            theirs = _pruned(*_model(name), tp.importance.MagnitudeImportance())
    except Exception as error:  # whatever Torch-Pruning stumbles over
        pytest.skip(f"{name}: Torch-Pruning with MagnitudeImportance fails: {type(error).__name__}: {error}")
    model, example_inputs = _model(name)
    importance = DyingNeuronImportance()
    with importance.observe(model), torch.no_grad():
        model(example_inputs)
    classes = model(example_inputs).shape[1]
    ours = _pruned(model, example_inputs, importance)
    assert model(example_inputs).shape == (1, classes) == (1, 1000)
    assert ours < 0.8, (ours, theirs)
    assert len(importance.skipped) <= 2, importance.skipped
