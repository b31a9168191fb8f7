"""Where the project lies, a recipe that runs in seconds, and what tests need of random networks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

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


def assume(condition: bool, why: str) -> None:
    """What a test needs of its random network to say anything: asserted with the usual seed; skips with others."""
    if not condition and os.environ.get("DNR_TEST_SEED", "0") != "0":
        pytest.skip(f"not with this seed: {why}")
    assert condition, why
