"""A run underway: what it works on, how far it is, and its folder's files that grow while it runs."""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.data.images import Data, ImageSource
from dnr_plugin.devices import to_device
from dnr_plugin.errors import InputError, first_line
from dnr_plugin.files import atomic_write, read_json_lines
from dnr_plugin.models.saved import build, describe
from dnr_plugin.observation.history import NeuronHistory
from dnr_plugin.pruning.layers import Limits
from dnr_plugin.recipe.schema import Recipe
from dnr_plugin.runs.checks import Prepared, limits_of
from dnr_plugin.runs.results import Results
from dnr_plugin.runs.run_folder import load_checkpoint_state, save_checkpoint
from dnr_plugin.seeds import derive_seed
from dnr_plugin.training.evaluation import Progress, evaluate
from dnr_plugin.training.trainer import Trainer

Track = Callable[[Iterable[Any], int, str], Iterable[Any]]
BATCH = 250  # images per step where nothing is learned: observing, recalibrating


def quiet(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    """A `Track` that shows nothing."""
    return items


def calibration_images(
    source: ImageSource, samples: int, seed: int, progress: Progress, augment: Sequence[str] = (), batch: int = BATCH
) -> Iterator[tuple[Tensor, Tensor]]:
    """The first images in an order of a run's seed, with their labels, in equal batches.

    Args:
        source: the training images.
        samples: how many; all where there are fewer.
        seed: of the run.
        progress: wraps the batches for display.
        augment: see `ImageSource.batches`.
        batch: most images in one.
    """
    remaining = min(samples, len(source))
    steps = -(-remaining // batch)
    size = -(-remaining // steps)  # equal batches: BatchNorm fails on one image
    batches = source.batches(size, seed=derive_seed(seed, "calibration"), augment=augment)
    for images, labels in progress(islice(batches, steps), steps):
        yield images[:remaining], labels[:remaining]
        remaining -= len(images)


class RunState:
    """What the stages of a run share.

    Args:
        prepared: the recipe with its model, as checked; the model is changed.
        data: its images.
        folder: of the run.
        device: to run on.
        track: wraps an iterable for display.

    Attributes:
        model: as it is now; untouched: as it was built, on the CPU.
        stage, epoch: where the run is: "train", "prune" or "finetune", and epochs of it that are done.
        histories: of the neurons that remain, from training on.
    """

    def __init__(self, prepared: Prepared, data: Data, folder: Path, device: torch.device, track: Track) -> None:
        self.recipe: Recipe = prepared.recipe
        self.folder, self.device, self.track = folder, device, track
        self.data, self.train_images, self.test_images = data, data.train.to(device), data.test.to(device)
        self.untouched = copy.deepcopy(prepared.model)
        self.model, self.example = to_device(prepared.model, device), prepared.example.to(device)
        self.limits: Limits = limits_of(self.recipe)
        self.dense = prepared.dense
        self.stage, self.epoch = "train", 0
        self.results = Results()
        self.events = folder / "events.jsonl"
        self.histories: dict[str, NeuronHistory] = {}

    def describe(self) -> None:
        """Notes the model's architecture, after it changed."""
        self.architecture = json.dumps(describe(self.model, fresh=self.untouched))

    def calibration(self, samples: int, what: str, augment: Sequence[str] = ()) -> Iterator[Tensor]:
        """The first training images in an order of the seed."""
        for images, _ in self.labelled(samples, what, augment):
            yield images

    def labelled(self, samples: int, what: str, augment: Sequence[str] = ()) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of `calibration` with their labels."""
        return calibration_images(self.train_images, samples, self.recipe.seed, self.shown(what), augment)

    def accuracy(self, amp: bool = False) -> float:
        """On the test images; what is reported in float32, an epoch's as it trained."""
        return evaluate(self.model, self.test_images, progress=self.shown("evaluating"), amp=amp)

    def shown(self, what: str) -> Progress:
        return lambda items, total: self.track(items, total, what)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds inside to those of a stage."""
        start = time.perf_counter()
        yield
        seconds = self.results.seconds
        setattr(seconds, stage, getattr(seconds, stage) + time.perf_counter() - start)

    def log(self, **event: Any) -> None:
        with self.events.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def read_events(self) -> list[dict[str, Any]]:
        return read_json_lines(self.events)

    def write_events(self, text: str) -> None:
        with atomic_write(self.events) as file:
            file.write(text)

    def save(self, trainer: Trainer | None = None) -> None:
        """Writes a checkpoint; within a training stage also what its trainer goes on from."""
        state = {
            "stage": self.stage,
            "epoch": self.epoch,
            "results": self.results.plain(),
            "events": self.events.read_text(),
            "architecture": self.architecture,
            "model": self.model.state_dict(),
            "histories": {name: history.state_dict() for name, history in self.histories.items()},
            "random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.device)
        if trainer is not None:
            state["optimizer"] = trainer.optimizer.state_dict()
            state["schedule"] = trainer.schedule.state_dict()
            if trainer.dynamics is not None:
                state["dynamics"] = trainer.dynamics.state_dict()
        save_checkpoint(state, self.folder)

    def restore(self) -> dict[str, Any] | None:
        """Goes back to the last checkpoint, and returns it; None where there is none."""
        state = load_checkpoint_state(self.folder)
        if state is None:
            return None
        try:
            self.stage, self.epoch, self.results = state["stage"], state["epoch"], Results.of_plain(state["results"])
            histories = state.get("histories", {})  # those of 0.1.0's first checkpoints are not there
            self.histories = {name: NeuronHistory.from_state_dict(past) for name, past in histories.items()}
            model: nn.Module = build(json.loads(state["architecture"]), fresh=copy.deepcopy(self.untouched))
            model.load_state_dict(state["model"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{self.folder}: expected the checkpoint of this run, found another: {first_line(error)}; delete the "
                "folder or name another, and run without --resume"
            ) from error
        self.model = to_device(model, self.device)
        return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Takes the global generators back to a checkpoint."""
    torch.set_rng_state(state["random"])
    if "random_cuda" in state:
        torch.cuda.set_rng_state(state["random_cuda"])
