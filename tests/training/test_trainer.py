"""Learning-rate schedules by hand, training that learns, and a loss that turns NaN."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dnr_plugin.data.registry import load_data
from dnr_plugin.recipe.sections import DataOptions
from dnr_plugin.recipe.training_sections import TrainOptions
from dnr_plugin.training.evaluation import evaluate
from dnr_plugin.training.schedules import lr_factor
from dnr_plugin.training.trainer import DivergedError, Trainer


def _options(**kwargs: object) -> TrainOptions:
    return TrainOptions(**{"epochs": 2, "batch_size": 16, **kwargs})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "step", "expected"),
    [
        ({"schedule": "constant"}, 7, 1.0),
        ({"schedule": "linear"}, 5, 0.5),
        ({"schedule": "cosine"}, 0, 1.0),
        ({"schedule": "cosine"}, 5, 0.5),
        ({"schedule": "cosine"}, 10, 0.0),
        ({"schedule": "cosine", "warmup_epochs": 1.0}, 0, 1 / 5),
        ({"schedule": "cosine", "warmup_epochs": 1.0}, 4, 1.0),
        ({"schedule": "constant", "warmup_epochs": 1.0}, 1, 2 / 5),
        ({"schedule": "one_cycle"}, 0, 0.04),
        ({"schedule": "one_cycle"}, 3, 1.0),
        ({"schedule": "one_cycle"}, 10, 0.0),
    ],
)
def test_the_learning_rate_follows_its_schedule(options: dict[str, object], step: int, expected: float) -> None:
    """2 epochs of 5 steps."""
    assert lr_factor(_options(**options), step, 10) == pytest.approx(expected, abs=1e-12)


def _data(count: int = 64) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    data = load_data(DataOptions(name="shapes", train_size=count, test_size=20, image_size=8), 0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), data


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_training_lowers_the_loss_and_reports_its_figures(optimizer: str) -> None:
    model, data = _data()
    trainer = Trainer(model, data.train, _options(optimizer=optimizer, lr=0.01, schedule="constant"), seed=0)  # type: ignore[attr-defined]
    losses = [trainer.epoch(number).loss for number in range(8)]
    assert losses[-1] < losses[0] - 0.1
    assert trainer.epoch(9).images == 64
    assert trainer.epoch(9).lr == pytest.approx(0.01)


def test_an_epoch_depends_on_its_number_and_nothing_before() -> None:
    def trained(numbers: list[int]) -> torch.Tensor:
        model, data = _data()
        trainer = Trainer(model, data.train, _options(momentum=0.0, schedule="constant"), 0, ["flip", "crop"])  # type: ignore[attr-defined]
        for number in numbers:
            trainer.epoch(number)
        return model[1].weight.detach().clone()  # type: ignore[index, return-value]

    assert torch.equal(trained([1]), trained([1]))
    assert not torch.equal(trained([0]), trained([1]))


@pytest.mark.parametrize("bad_step", [0, 2, 49, 50, 61])
def test_a_loss_that_turns_nan_names_epoch_and_step(bad_step: int) -> None:
    """Losses are looked at in blocks of 50 steps; the step named must be the right one in every block."""
    _, data = _data(62 * 16)
    calls = iter(range(1000))

    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(10))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            here = math.nan if next(calls) == bad_step else 1.0
            return self.weight.expand(len(x), -1) * here

    trainer = Trainer(Breaks(), data.train, _options(lr=1e-9), seed=0)  # type: ignore[attr-defined]
    with pytest.raises(DivergedError, match=rf"became nan at epoch 4, step {bad_step + 1} \(learning rate"):
        trainer.epoch(3)


def test_clipping_bounds_the_update() -> None:
    model, data = _data()
    before = model[1].weight.detach().clone()  # type: ignore[index]
    options = _options(clip_norm=1e-3, lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant", epochs=1)
    Trainer(model, data.train, options, seed=0).epoch(0)  # type: ignore[attr-defined]
    moved = float((model[1].weight - before).norm())  # type: ignore[index]
    assert 0 < moved <= 4 * 1e-3 + 1e-7


def test_evaluation_counts_right_answers_and_keeps_the_mode() -> None:
    _, data = _data()
    labels = data.test.labels  # type: ignore[attr-defined]

    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(torch.full((len(x),), 3), 10).float()

    model = Constant().train()
    assert evaluate(model, data.test, batch_size=7) == pytest.approx(float((labels == 3).float().mean()))  # type: ignore[attr-defined]
    assert model.training


def test_bfloat16_autocast_trains() -> None:
    model, data = _data()
    trainer = Trainer(model, data.train, _options(amp=True, lr=0.01), seed=0)  # type: ignore[attr-defined]
    assert trainer.epoch(1).loss < trainer.epoch(0).loss + 1
    assert model[1].weight.dtype is torch.float32  # type: ignore[index]


def test_evaluation_restores_the_mode_of_every_part() -> None:
    model, data = _data()
    model.train()
    model[0].eval()  # type: ignore[index]
    evaluate(model, data.test)  # type: ignore[attr-defined]
    assert [module.training for module in model.modules()] == [True, False, True]


def test_evaluation_in_16_bits_is_a_choice() -> None:
    model, data = _data()
    kinds: list[torch.dtype] = []
    model[1].register_forward_hook(lambda module, args, output: kinds.append(output.dtype))  # type: ignore[index]
    plain, rounded = evaluate(model, data.test), evaluate(model, data.test, amp=True)  # type: ignore[attr-defined]
    assert {kinds[0], kinds[-1]} == {torch.float32, torch.bfloat16}
    assert abs(plain - rounded) < 0.1
