"""A finished run's network in 8-bit integers: calibrated on its training images, checked on its test images."""

from __future__ import annotations

import importlib
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dnr_plugin.data.images import Data
from dnr_plugin.data.registry import load_data
from dnr_plugin.devices import device_name
from dnr_plugin.errors import InputError, RunError
from dnr_plugin.models.build import rebuild
from dnr_plugin.models.export import OnnxModel, appearing, check_file, check_packages, write_checked, write_model
from dnr_plugin.models.int8 import counted, quantise
from dnr_plugin.models.saved import saved_model
from dnr_plugin.network.cost import timed_in_turn
from dnr_plugin.recipe.load import load_recipe, located
from dnr_plugin.reports.stored import stored_report
from dnr_plugin.reports.table import Table
from dnr_plugin.runs.state import Track, calibration_images, quiet
from dnr_plugin.training.evaluation import Progress, evaluate

# Accuracy that 8 bits may cost, as a share of the test images. Rounding costs networks that suit it a fraction of a
# point; where more than two go, it is the network's ranges that do not fit 8 bits, and the file is not worth having.
LIMIT = 0.02
ONE, MANY = 1, 32  # images in a batch: for latency, and for images a second
_CALIBRATED = 64  # images at once while calibrating


@dataclass(frozen=True)
class Exported:
    """One network as an ONNX file in ONNX Runtime.

    Attributes:
        name: of the network.
        size: of the file, bytes.
        accuracy: on the test images, in [0, 1]; None: not known.
        one, many: seconds of each pass over a batch of `ONE` and of `MANY`.
    """

    name: str
    size: int
    accuracy: float | None
    one: Sequence[float]
    many: Sequence[float]


@dataclass(frozen=True)
class Int8Export:
    """What came of an export in 8 bits.

    Attributes:
        title: of the run.
        networks: dense, pruned, pruned in 8 bits.
        calibrated, tested: numbers of images.
        floats: operators that still compute in floats, by type.
    """

    title: str
    networks: Sequence[Exported]
    calibrated: int
    tested: int
    floats: dict[str, int]

    def table(self) -> Table:
        """One row a network."""
        head = ["network", "file", "accuracy", f"latency, batch {ONE}", f"images/s, batch {MANY}"]
        rows = []
        for network in self.networks:
            accuracy = "-" if network.accuracy is None else f"{100 * network.accuracy:.2f} %"
            latency = _with_spread([1e3 * seconds for seconds in network.one], ".3f", " ms")
            rate = _with_spread([MANY / seconds for seconds in network.many], ",.0f")
            rows.append([network.name, f"{network.size:,} bytes", accuracy, latency, rate])
        return Table(self.title, head, rows)

    def notes(self) -> list[str]:
        """What a reader should know beside the table, one sentence a line."""
        runtime = importlib.import_module("onnxruntime").__version__
        dense, pruned = (statistics.median(network.one) for network in self.networks[:2])
        left = f"{counted(self.floats)} in float32, the other operators" if self.floats else "all operators"
        lines = [
            f"In the 8-bit file: {left} in 8 bits; calibrated on {self.calibrated} training images of the run.",
            f"Accuracy on its {self.tested} test images: pruned ones in ONNX Runtime, dense as the run measured it.",
            "A run keeps no dense weights: file and times of the dense network are those of a new one of its sizes.",
            f"Times are medians (quartiles), measured in turn in ONNX Runtime {runtime}, "
            f"{device_name(torch.device('cpu'))}.",
        ]
        if pruned > dense:
            lines.append(
                "The pruned network is slower than the dense one: float convolutions of ONNX Runtime want channels in "
                "multiples of 8 or 16, which prune.round_to keeps."
            )
        return lines


def export_int8(
    folder: str | os.PathLike[str], file: str | os.PathLike[str], *, allow_import: bool = False, track: Track = quiet
) -> Int8Export:
    """Writes a run's pruned network as an ONNX file in 8-bit integers, with a free batch size.

    Calibrated on the training images that the recipe observes neurons on after training (``prune.observe.samples``, not
    augmented), and compared with the float file on all test images before it appears.

    Args:
        folder: of a finished run.
        file: to be written; there is none yet.
        allow_import: see `saved.load_pruned`.
        track: wraps an iterable for display.

    Raises:
        InputError: folder, file, data or the packages at hand cannot be used; nothing was written.
        RunError: the network cannot be exported or quantised, or loses more accuracy than `LIMIT`; no file remains.
    """
    folder, file = Path(folder), Path(file)
    check_packages()
    check_file(file)
    saved_recipe = folder / "recipe.yaml"
    if not saved_recipe.is_file():
        raise InputError(
            "--int8: expected a run's folder, whose recipe says what images to calibrate with, found no recipe.yaml in "
            f"{folder}"
        )
    recipe = load_recipe(saved_recipe)
    try:
        data = load_data(recipe.data, recipe.seed)
    except InputError as error:
        raise located(error, saved_recipe) from None
    shape = f"{data.in_channels}x{data.image_size}x{data.image_size}"
    model, builder, example = saved_model(folder, shape, allow_import)
    report = stored_report(folder / "report.json")
    samples = min(recipe.prune.observe.samples, len(data.train))

    def shown(what: str) -> Progress:
        return lambda items, total: track(items, total, what)

    with appearing(file) as written:
        dense, pruned = (written.with_name(f"{written.name}.{name}") for name in ("dense", "pruned"))
        write_checked(model, example, pruned, "onnx", str(folder))
        write_model(_of_the_size(rebuild(builder, allow_import)), example, dense, "onnx", f"{folder}, dense")
        images = calibration_images(data.train, samples, recipe.seed, shown("calibrating"), batch=_CALIBRATED)
        floats = quantise(pruned, written, (batch for batch, _ in images))
        before = evaluate(OnnxModel(pruned), data.test, progress=shown("evaluating"))
        after = evaluate(OnnxModel(written), data.test, progress=shown("evaluating in 8 bits"))
        lost = round((before - after) * len(data.test))  # images: whole numbers, of which two points are two points
        if lost > LIMIT * len(data.test):
            raise RunError(
                f"int8: expected at most {100 * LIMIT:g} points of accuracy lost on the {len(data.test)} test images, "
                f"found {100 * before:.2f} % before and {100 * after:.2f} % in 8 bits; nothing was written"
            )
        files = {"dense": dense, "pruned": pruned, "pruned, int8": written}
        accuracies = (report["dense"]["accuracy"], before, after)
        one, many = (_times([*files.values()], batch) for batch in _batches(data))
        networks = [
            Exported(name, path.stat().st_size, *figures)
            for (name, path), *figures in zip(files.items(), accuracies, one, many, strict=True)
        ]
    return Int8Export(recipe.name, networks, samples, len(data.test), floats)


def _of_the_size(fresh: nn.Module) -> nn.Module:
    """A new network, in eval mode, that takes as much room as a trained one.

    New ones have many tensors of nothing but zeros or ones, which an ONNX file holds once.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*fresh.parameters(), *fresh.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=1e-3)
    return fresh.eval()


def _batches(data: Data) -> list[Tensor]:
    """Test images in batches of `ONE` and `MANY`, again and again where there are fewer."""
    images = next(iter(data.test.batches(MANY)))[0]
    return [images[[row % len(images) for row in range(size)]] for size in (ONE, MANY)]


def _times(files: Sequence[Path], images: Tensor) -> list[list[float]]:
    return timed_in_turn([partial(OnnxModel(file), images) for file in files])


def _with_spread(values: Sequence[float], form: str, unit: str = "") -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:{form}}{unit} ({low:{form}}-{high:{form}})"
