"""Whether a training computes in bfloat16: as it was asked to, or where a short measurement finds that faster."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dnr_plugin.devices import fast_layout, now, ranks
from dnr_plugin.errors import first_line
from dnr_plugin.network.calling import copied
from dnr_plugin.recipe.training_sections import TrainOptions
from dnr_plugin.training.trainer import make_optimizer

GAIN = 1.1  # bfloat16 is taken from this many times the speed of float32 on
# FLOPs of the forward pass of one step, below which overhead decides and a measurement would be a toss-up.
_LEAST_STEP = 5e8
# The same at which a step on a CPU is long enough to be timed, and of all timed steps: seconds on one core.
_TIMED_STEP, _TIMED_STEPS = 5e9, 2e10
_LEAST_IMAGES = 8  # of a timed step on a CPU, whatever they cost
_LONGEST, _LEAST_ROUNDS = 4.0, 3  # seconds after which it ends early, but not before so many rounds
_SHARE = 20  # a training is this many times as long as the measurement, or does without


@dataclass(frozen=True)
class Precision:
    """In what a training computes, and why.

    Attributes:
        asked: ``amp`` of the recipe.
        used: bfloat16 autocast in `devices.fast_layout`; else float32.
        reason: in words, where ``asked`` is "auto" and nothing was measured.
        images: of a timed step; 0 where nothing was measured.
        float32_ms, bfloat16_ms: milliseconds of a training step of so many images, the fastest of several; of a CPU, on
            one thread.
    """

    asked: Literal["auto", True, False]
    used: bool
    reason: str | None = None
    images: int = 0
    float32_ms: float | None = None
    bfloat16_ms: float | None = None


@dataclass(frozen=True)
class Timing:
    """What is timed: steps of so many images, so often after the first, which is not counted."""

    images: int
    rounds: int


def choose_precision(model: nn.Module, example: Tensor, options: TrainOptions, flops: int, images: int) -> Precision:
    """The precision that a training is to compute in; nothing is changed: weights, statistics and generators are as
    before. Of several ranks all measure, so that each works under the same load, and what rank 0 found is done.

    Args:
        model: on its device, in the layout that float32 is trained in.
        example: an input on that device, [1, ...].
        options: of the training.
        flops: of a forward pass of one image.
        images: that the training reads, all epochs together.

    Returns:
        For ``amp: auto`` bfloat16 where its steps are at least `GAIN` times as fast, on a copy of the model; float32
        without a measurement where steps or training are too short for one, or where it fails.
    """
    if options.amp != "auto":
        return Precision(options.amp, used=options.amp)
    if flops * options.batch_size < _LEAST_STEP:
        return Precision("auto", used=False, reason="its steps are too small to gain by bfloat16")
    timing = _timing(example.device, options.batch_size, flops)
    if images < _SHARE * (timing.rounds + 1) * timing.images:
        return Precision("auto", used=False, reason="it is too short to be worth a measurement")
    chosen = [_measured(model, example, options, timing)]
    if ranks() > 1:
        torch.distributed.broadcast_object_list(chosen, src=0)
    return chosen[0]


def _timing(device: torch.device, batch_size: int, flops: int) -> Timing:
    """As many images as a step has; on a CPU fewer, where they are large: there few keep all units busy."""
    if device.type != "cpu":
        return Timing(batch_size, rounds=10)
    images = min(batch_size, max(_LEAST_IMAGES, int(_TIMED_STEP // flops)))
    return Timing(images, rounds=max(3, min(9, int(_TIMED_STEPS // (images * flops)))))


def _measured(model: nn.Module, example: Tensor, options: TrainOptions, timing: Timing) -> Precision:
    devices = [example.device] if example.is_cuda else []
    try:
        with torch.random.fork_rng(devices=devices), _one_thread():
            plain, rounded = step_seconds(model, example, options, timing)
    except Exception as error:  # of any network: what cannot train in float32 either says so itself
        return Precision("auto", used=False, reason=f"the measurement failed: {first_line(error)}")
    return Precision("auto", plain >= GAIN * rounded, None, timing.images, 1e3 * plain, 1e3 * rounded)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine take ten times as long, at random; one alone is only slowed.

    How much faster bfloat16 is depends on a core's instructions, and so hardly on the number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def step_seconds(model: nn.Module, example: Tensor, options: TrainOptions, timing: Timing) -> tuple[float, float]:
    """Seconds of a training step, in float32 and in bfloat16 in turns, on noise and on copies of the model.

    The fastest of each: what else runs on the machine only ever adds to them.
    """
    if isinstance(model, DistributedDataParallel):  # a copy of it would wait for the other ranks' gradients
        model = model.module
    noise = torch.Generator().manual_seed(0)
    images = torch.randn(timing.images, *example.shape[1:], generator=noise).to(example)
    steps = [_step(copied(model), images, options, amp) for amp in (False, True)]
    seconds: list[list[float]] = [[], []]
    begun = time.perf_counter()
    for done in range(1 + timing.rounds):
        if done > _LEAST_ROUNDS and ranks() == 1 and time.perf_counter() - begun > _LONGEST:
            break  # a busy machine; several ranks, whose layers may wait for each other, do the same steps
        for step, taken in zip(steps, seconds, strict=True):
            start = now(example.device)
            step()
            taken.append(now(example.device) - start)
    plain, rounded = (min(taken[1:]) for taken in seconds)
    return plain, rounded


def _step(model: nn.Module, images: Tensor, options: TrainOptions, amp: bool) -> Callable[[], None]:
    """A step as `Trainer` does it, at a learning rate of zero: weights should not overflow on noise."""
    if amp:
        model.to(memory_format=fast_layout(images.device))  # type: ignore[call-overload]
    optimizer = make_optimizer(model.train(), options.model_copy(update={"lr": 0.0}))
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step
