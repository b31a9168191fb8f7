"""Where the project lies, and a recipe that runs in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
