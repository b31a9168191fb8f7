"""Which precision a training gets: by timings that are made up, since those of a processor are its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_two_ranks
from torch import Tensor, nn

from dnr_plugin.recipe.training_sections import TrainOptions
from dnr_plugin.training import precision
from dnr_plugin.training.precision import Precision, Timing, choose_precision, step_seconds

LARGE = {"flops": 10**9, "images": 10**6}
EXAMPLE = torch.zeros(1, 3, 8, 8)


def _options(**options: Any) -> TrainOptions:
    return TrainOptions(**{"epochs": 2, "batch_size": 16, **options})


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 5))


def _taking(monkeypatch: pytest.MonkeyPatch, float32: float, bfloat16: float) -> None:
    monkeypatch.setattr(precision, "step_seconds", lambda *_: (float32, bfloat16))


@pytest.mark.parametrize(
    ("float32", "bfloat16", "used"),
    [(0.4, 0.1, True), (1.1, 1.0, True), (1.09, 1.0, False), (1.0, 1.0, False), (0.1, 0.4, False)],
)
def test_bfloat16_is_taken_where_it_gains(
    monkeypatch: pytest.MonkeyPatch, float32: float, bfloat16: float, used: bool
) -> None:
    _taking(monkeypatch, float32, bfloat16)
    chosen = choose_precision(_model(), EXAMPLE, _options(), **LARGE)
    assert chosen == Precision("auto", used, None, 8, 1e3 * float32, 1e3 * bfloat16)


@pytest.mark.parametrize(
    ("asked", "flops", "images", "reason"),
    [
        (True, 10**9, 10**6, None),
        (False, 10**9, 10**6, None),
        ("auto", 10**6, 10**6, "its steps are too small to gain by bfloat16"),
        ("auto", 10**9, 500, "it is too short to be worth a measurement"),
    ],
)
def test_nothing_is_measured_where_that_decides_or_gains_nothing(
    monkeypatch: pytest.MonkeyPatch, asked: Any, flops: int, images: int, reason: str | None
) -> None:
    monkeypatch.setattr(precision, "step_seconds", None)
    chosen = choose_precision(_model(), EXAMPLE, _options(amp=asked), flops, images)
    assert chosen == Precision(asked, asked is True, reason)


@pytest.mark.parametrize(
    ("batch_size", "flops", "expected"),
    [
        (128, 4 * 10**7, Timing(125, 4)),  # ResNet-18 of width 16
        (16, 4 * 10**7, Timing(16, 9)),
        (128, 4 * 10**9, Timing(8, 3)),  # ResNet-50
        (4, 4 * 10**9, Timing(4, 3)),
    ],
)
def test_large_images_are_timed_in_small_steps(batch_size: int, flops: int, expected: Timing) -> None:
    assert precision._timing(torch.device("cpu"), batch_size, flops) == expected
    assert precision._timing(torch.device("cuda"), batch_size, flops).images == batch_size


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_measurement_changes_nothing(monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    """Weights, BatchNorm statistics, modes, gradients, layout and the generator, which dropout draws from."""
    monkeypatch.setattr(precision, "_LEAST_STEP", 0)
    model = _model().eval()
    model[0].train()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    chosen = choose_precision(model, EXAMPLE, _options(optimizer=optimizer, batch_size=4), 100, 10**6)
    assert chosen.float32_ms is not None and chosen.float32_ms > 0 and chosen.images == 4
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_a_cpu_is_measured_on_one_thread(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    threads: list[int] = []

    def seconds(*_: Any) -> tuple[float, float]:
        threads.append(torch.get_num_threads())
        if fails:
            raise RuntimeError
        return 2.0, 1.0

    monkeypatch.setattr(precision, "step_seconds", seconds)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert choose_precision(_model(), EXAMPLE, _options(), **LARGE).used is not fails
        assert (threads, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_both_are_timed_in_turns_and_the_fastest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[torch.dtype] = []
    model = _model()
    model[0].register_forward_hook(lambda module, args, output: kinds.append(output.dtype))
    # float32, bfloat16; the first round, which is slow, does not count
    taken = iter([9.0, 9.0, 5.0, 3.0, 4.0, 2.0, 6.0, 8.0])
    clock = [0.0]

    def now(device: torch.device) -> float:
        ends = len(kinds) > len(starts)
        if ends:
            clock[0] += next(taken)
            starts.append(clock[0])
        return clock[0]

    starts: list[float] = []
    monkeypatch.setattr(precision, "now", now)
    assert step_seconds(model, EXAMPLE, _options(), Timing(4, 3)) == (4.0, 2.0)
    assert kinds == [torch.float32, torch.bfloat16] * 4


def test_on_a_busy_machine_few_rounds_have_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_LONGEST", 0.0)
    calls: list[Tensor] = []
    model = _model()
    model[0].register_forward_hook(lambda module, args, output: calls.append(output))
    step_seconds(model, EXAMPLE, _options(), Timing(4, 9))
    assert len(calls) == 2 * (1 + 3)


def test_a_model_that_bfloat16_is_nothing_for_trains_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x.flatten(1))
            if out.dtype != torch.float32:
                raise RuntimeError("expected float\nin kernel 7")
            return out

    chosen = choose_precision(Strict(), EXAMPLE, _options(), **LARGE)
    assert chosen == Precision("auto", False, "the measurement failed: expected float")


RANK = """
import sys, torch, torch.distributed as dist
sys.path[:0] = sys.argv[3:]
torch.set_num_threads(1)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from dnr_plugin.recipe.training_sections import TrainOptions
from dnr_plugin.training import precision
rank, where = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{where}/init", rank=rank, world_size=2)
measured = precision.step_seconds
def seconds(*arguments):
    measured(*arguments)
    return (2.0, 1.0) if rank == 0 else (1.0, 2.0)
precision.step_seconds = seconds
model = DistributedDataParallel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)))
options = TrainOptions(epochs=1, batch_size=4)
chosen = precision.choose_precision(model, torch.zeros(1, 3, 8, 8), options, 10**9, 10**6)
open(f"{where}/{rank}.txt", "w").write(repr(chosen))
del model
dist.destroy_process_group()
"""


def test_ranks_do_what_the_first_has_measured(tmp_path: Path) -> None:
    run_two_ranks(RANK, tmp_path)
    zero, one = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert zero == one == repr(Precision("auto", True, None, 4, 2000.0, 1000.0))
