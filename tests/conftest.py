"""Shared by all tests: one thread, one seed, small recipes, and where CIFAR-10 lies.

``DNR_TEST_THREADS`` and ``DNR_TEST_SEED`` (added to every seed) run the same tests under other conditions
(`test_processors`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

THREADS = os.environ.setdefault("DNR_TEST_THREADS", "1")
os.environ["OMP_NUM_THREADS"] = THREADS  # also of the programs that tests start; several workers share the cores

import pytest  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

from dnr_plugin import data, planning, run  # noqa: E402
from dnr_plugin.measure import latencies  # noqa: E402
from dnr_plugin.schema import DataOptions  # noqa: E402

torch.set_num_threads(int(THREADS))
if shift := int(os.environ.get("DNR_TEST_SEED", "0")):
    drawn = torch.manual_seed

    class Shifted(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(seed + shift)

    torch.manual_seed = lambda seed: drawn(seed + shift)
    torch.Generator = Shifted  # type: ignore[misc]
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest starts first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)


@pytest.fixture(scope="session", autouse=True)
def timed_briefly() -> Iterator[None]:
    """Latency is measured for two seconds at the end of every run; that it is right is for `test_measure` to say."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (run, planning):
            patch.setattr(module, "latencies", partial(latencies, seconds=0.1))
        yield


@pytest.fixture(scope="session")
def read_once() -> Iterator[None]:
    """A data set in memory is the same for all tests that ask for this."""
    read, known = data._load_published, {}

    def once(options: DataOptions, root: Path) -> data.Data:
        if (options.name, root) not in known:
            known[options.name, root] = read(options, root)
        return known[options.name, root]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_load_published", once)
        yield
