"""Shared by all tests: few threads, one seed, small recipes, and where CIFAR-10 lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

torch.set_num_threads(2)
torch.manual_seed(0)  # for what is drawn while tests are collected

ROOT = Path(__file__).resolve().parent.parent

# Seconds on one core: 16-pixel shapes, an eighth of the usual width.
TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "resnet18", "width": 8},
    "data": {"name": "shapes", "train_size": 192, "test_size": 60, "image_size": 16, "augment": ["flip"]},
    "train": {"epochs": 2, "batch_size": 32, "lr": 0.05},
    "prune": {
        "target": {"flops": 0.5},
        "observe": {"samples": 128, "min_samples": 64, "share": 0.5},
        "recalibrate": 128,
    },
    "finetune": {"epochs": 2, "batch_size": 32, "lr": 0.01},
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Weights that a test draws without a seed of its own are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The file of a recipe that runs in seconds."""
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY, sort_keys=False))
    return file


@pytest.fixture
def cifar10() -> Path:
    """The folder that holds CIFAR-10 as published; skips where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "cifar-10-batches-py").is_dir():
        pytest.skip(f"CIFAR-10 is not in {folder}")
    return folder
