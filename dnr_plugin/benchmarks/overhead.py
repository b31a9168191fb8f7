"""Benchmarks that anyone can run: each compares things side by side in one process, and reports ratios."""

from __future__ import annotations

import copy
import gc
import mmap
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor

from dnr_plugin.devices import device_name, fast_layout, pick_device, to_device, versions
from dnr_plugin.models.build import build_model
from dnr_plugin.observation.observer import Observer
from dnr_plugin.pruning.plan import plan_removal
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.recipe.sections import ModelOptions
from dnr_plugin.repair.network import repair_network
from dnr_plugin.scoring.importance import DyingNeuronImportance


def overhead(
    *, width: int = 64, batch: int = 64, rounds: int = 15, device: str = "auto", seed: int = 0
) -> dict[str, Any]:
    """What observing adds to a training step and scoring to a pruning step, on ResNet-18 at 32x32.

    Training steps with and without an open observer alternate, and so do the criteria, so that a drift of the
    machine's speed hits both alike; ratios are medians of the pairs' ratios.

    Args:
        width: channels of ResNet-18's first stage.
        batch: images per training step.
        rounds: timed pairs.
        device: "auto", "cpu" or "cuda".
        seed: of weights and images.

    Returns:
        Figures, and ``lines`` that say the same in words.
    """
    chosen = pick_device(device)
    torch.manual_seed(seed)
    model = to_device(build_model(ModelOptions(name="resnet18", width=width), 10), chosen)
    images, labels = torch.randn(batch, 3, 32, 32, device=chosen), torch.randint(0, 10, (batch,), device=chosen)

    def clock(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        if chosen.type == "cuda":
            torch.cuda.synchronize(chosen)
        return time.perf_counter() - start

    def pairs(first: Callable[[], float], second: Callable[[], float]) -> tuple[list[float], list[float]]:
        for _ in range(2):
            first(), second()
        timed = [(first(), second()) for _ in range(rounds)]
        return [a for a, _ in timed], [b for _, b in timed]

    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    observer = Observer(model)
    sizes: list[int] = []

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def observed_step() -> float:
        with observer:  # opened and closed once for many steps in practice, so not timed
            seconds = clock(step)
        sizes.append(_bytes(observer))
        return seconds

    plain, observed = pairs(lambda: clock(step), observed_step)

    importance = DyingNeuronImportance("variation", moments=False)
    with importance.observe(model), torch.no_grad():
        model(images)
    magnitude = tp.importance.MagnitudeImportance()
    graph = tp.DependencyGraph().build_dependency(copy.deepcopy(model), images[:1])
    groups = list(graph.get_all_groups())
    theirs, ours = pairs(
        lambda: clock(lambda: [magnitude(group) for group in groups]),
        lambda: clock(lambda: [importance(group) for group in groups]),
    )

    step_ratio, score_ratio = _ratio(observed, plain), _ratio(ours, theirs)
    where = f"{device_name(chosen)}, torch {versions()['torch']}, seed {seed}, n = {rounds} pairs"
    return {
        "width": width,
        "batch": batch,
        "training_step_ms": {"plain": 1e3 * statistics.median(plain), "observed": 1e3 * statistics.median(observed)},
        "observing_ratio": step_ratio,
        "scoring_ms": {
            "MagnitudeImportance": 1e3 * statistics.median(theirs),
            "DyingNeuronImportance": 1e3 * statistics.median(ours),
        },
        "scoring_ratio": score_ratio,
        "statistics_bytes": {"after_one_batch": sizes[0], f"after_{len(sizes)}_batches": sizes[-1]},
        "where": where,
        "lines": [
            f"ResNet-18, width {width}, batch {batch}, 32x32; {where}",
            f"training step: {1e3 * statistics.median(plain):.1f} ms plain, {1e3 * statistics.median(observed):.1f} ms "
            f"with every batch observed: x{step_ratio:.3f} (median of pairs)",
            f"scoring all {len(groups)} groups: MagnitudeImportance {1e3 * statistics.median(theirs):.1f} ms, "
            f"DyingNeuronImportance {1e3 * statistics.median(ours):.1f} ms: x{score_ratio:.2f}",
            f"statistics: {sizes[0] / 2**10:.0f} KiB after one batch, {sizes[-1] / 2**10:.0f} KiB after {len(sizes)}",
        ],
    }


def costs(*, width: int = 64, images: int = 256, side: int = 32, device: str = "auto", seed: int = 0) -> dict[str, Any]:
    """What criteria cost from a trained network to scores, and repair on top, one after another: seconds, peak memory.

    Magnitude needs nothing but weights, Taylor a gradient of all images, redundancy their second moments. Repair is of
    the network at half of its FLOPs.

    Args:
        width: channels of ResNet-18's first stage.
        images: that Taylor and redundancy see, and repair as far as its memory goes.
        side: of an image, in pixels; above 64 the network has the stem for large images.
        device: "auto", "cpu" or "cuda".
        seed: of weights and images.

    Returns:
        Figures, and ``lines`` that say the same in words. Peak memory, beyond what was held before, is None where it
        cannot be told (outside of Linux, without a GPU).
    """
    chosen = pick_device(device)
    torch.manual_seed(seed)
    stem: Any = "imagenet" if side > 64 else "cifar"
    model = to_device(build_model(ModelOptions(name="resnet18", width=width, stem=stem), 10), chosen).eval()
    model.to(memory_format=fast_layout(chosen))
    batches = [torch.randn(min(32, images - k), 3, side, side, device=chosen) for k in range(0, images, 32)]
    example = batches[0][:1]
    graph = tp.DependencyGraph().build_dependency(copy.deepcopy(model), example)
    groups = [group for group in graph.get_all_groups() if not isinstance(group[0].dep.target.module, torch.nn.Linear)]
    measured: dict[str, Any] = {}

    def noted(name: str, work: Callable[[], object]) -> Any:
        with _Peak(chosen) as peak:
            start = time.perf_counter()
            result = work()
            if chosen.type == "cuda":
                torch.cuda.synchronize(chosen)
            measured[name] = {"seconds": time.perf_counter() - start, "peak_bytes": None}
        measured[name]["peak_bytes"] = peak.bytes
        return result

    def magnitude() -> None:
        importance = tp.importance.MagnitudeImportance()
        for group in groups:
            importance(group)

    def taylor() -> None:
        for batch in batches:
            labels = torch.randint(0, 10, (len(batch),), device=chosen)
            F.cross_entropy(graph.model(batch), labels).backward()  # type: ignore[no-untyped-call]
        importance = tp.importance.TaylorImportance()
        for group in groups:
            importance(group)

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model(batch)

    def redundancy() -> DyingNeuronImportance:
        importance = DyingNeuronImportance()
        with importance.observe(model):
            forward()
        for group in groups:
            importance(group)
        return importance

    noted("forward passes alone", forward)
    noted("MagnitudeImportance", magnitude)
    noted("TaylorImportance", taylor)
    importance = noted("DyingNeuronImportance", redundancy)
    plan = plan_removal(model, example, importance, "flops", 0.5)
    pruned = copy.deepcopy(model)
    prune_neurons(pruned, example, plan.removals)
    noted("repair_network", lambda: repair_network(pruned, model, example, plan.removals, batches))

    where = f"{device_name(chosen)}, torch {versions()['torch']}, seed {seed}, n = 1"
    lines = [f"from a trained ResNet-18, width {width}, and {images} images of {side}x{side}; {where}"]
    for name, cost in measured.items():
        beyond = "unknown" if cost["peak_bytes"] is None else f"{cost['peak_bytes'] / 2**20:.0f} MiB"
        lines.append(f"{name}: {cost['seconds']:.1f} s, peak memory {beyond} beyond what was held before")
    return {"width": width, "images": images, "side": side, "costs": measured, "where": where, "lines": lines}


class _Peak:
    """Highest memory inside the context beyond that at its start: of the GPU, or of the process as Linux tells it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> _Peak:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif _STATM.exists():
            self._before = self._highest = _resident()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._highest = max(self._highest, _resident())

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        elif self._thread is not None:
            self._done.set()
            self._thread.join()
            self.bytes = self._highest - self._before


_STATM = Path("/proc/self/statm")


def _resident() -> int:
    return int(_STATM.read_text().split()[1]) * mmap.PAGESIZE


def _ratio(first: list[float], second: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def _bytes(observer: Observer) -> int:
    """Memory of the statistics: all tensors of all activities."""
    held = [value for activity in observer.activities.values() for value in vars(activity).values()]
    return sum(value.numel() * value.element_size() for value in held if isinstance(value, Tensor))
