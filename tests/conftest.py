"""Shared by all tests: one thread, one seed (`helpers`), small recipes, and where CIFAR-10 lies."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from helpers.common import ROOT, TINY
from helpers.layer_times import Measured, stairs
from matplotlib.figure import Figure

import dnr_plugin.pruning.plan as plan_module
import dnr_plugin.runs.latencies as latencies_module
from dnr_plugin.data import registry
from dnr_plugin.data.images import Data
from dnr_plugin.network.cost import forward_times, latencies, timed_in_turn
from dnr_plugin.pruning import latency_table
from dnr_plugin.recipe.sections import DataOptions
from dnr_plugin.runs import int8_export

torch.manual_seed(0)  # for what is drawn while tests are collected


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
def timed_briefly(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Latency is measured for two seconds after every run; that it is right is for `network/test_cost` to say.

    Times of layers are made up, and kept in a folder of the tests' own.
    """
    measured = Measured(stairs(4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(latency_table, "timed_layers", lambda shapes, device: measured(shapes))
        patch.setattr(plan_module, "latencies", partial(latencies, seconds=0.1))
        patch.setattr(latencies_module, "forward_times", partial(forward_times, seconds=0.1))
        patch.setattr(int8_export, "timed_in_turn", partial(timed_in_turn, seconds=0.1))
        yield


# A PNG of one pixel.
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")


@pytest.fixture(autouse=True)
def not_drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take half of the time of a small run: they are drawn where tests look at them, as in `reports`."""
    if "reports" not in request.path.parts and request.node.get_closest_marker("drawn") is None:
        monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(PIXEL))


@pytest.fixture(scope="session")
def read_once() -> Iterator[None]:
    """A data set in memory is the same for all tests that ask for this."""
    read, known = registry.load_published, {}

    def once(options: DataOptions, root: Path) -> Data:
        if (options.name, root) not in known:
            known[options.name, root] = read(options, root)
        return known[options.name, root]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "load_published", once)
        yield
