"""Benchmarks that anyone can run: each compares things side by side in one process, and reports ratios."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor

from .environment import device_name, pick_device, placed, versions
from .importance import DyingNeuronImportance
from .models import build_model
from .observe import Observer
from .schema import ModelOptions


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
    place = pick_device(device)
    torch.manual_seed(seed)
    model = placed(build_model(ModelOptions(name="resnet18", width=width), 10), place)
    images, labels = torch.randn(batch, 3, 32, 32, device=place), torch.randint(0, 10, (batch,), device=place)

    def clock(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
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

    importance = DyingNeuronImportance()
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
    where = f"{device_name(place)}, torch {versions()['torch']}, seed {seed}, n = {rounds} pairs"
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


def _ratio(first: list[float], second: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def _bytes(observer: Observer) -> int:
    """Memory of the statistics: all tensors of all activities."""
    held = [value for activity in observer.activities.values() for value in vars(activity).values()]
    return sum(value.numel() * value.element_size() for value in held if isinstance(value, Tensor))
