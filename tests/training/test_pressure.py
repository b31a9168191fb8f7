"""Schedules, the L1 penalty, the noise and the weight decay by hand; what is refused; that pressure has its effect."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_plugin.cli.main import main
from dnr_plugin.data.images import Data
from dnr_plugin.data.registry import load_data
from dnr_plugin.errors import InputError
from dnr_plugin.recipe.load import load_recipe
from dnr_plugin.recipe.sections import DataOptions
from dnr_plugin.recipe.training_sections import TrainOptions
from dnr_plugin.seeds import derive_seed
from dnr_plugin.training.pressure import add_l1, add_noise, batchnorm_scales
from dnr_plugin.training.schedules import lr_factor, scheduled
from dnr_plugin.training.trainer import Trainer

SCHEDULES = ("constant", "linear", "cosine", "one_cycle")


@pytest.fixture(scope="module")
def data() -> Data:
    return load_data(DataOptions(name="shapes", train_size=64, test_size=20, image_size=8), 0)


def _options(**kwargs: Any) -> TrainOptions:
    """One epoch of plain gradient descent at a constant rate, with the pressure that is asked for."""
    plain = {"epochs": 1, "batch_size": 16, "lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    return TrainOptions.model_validate({**plain, **kwargs})


# --- schedules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("constant", {0.0: 1.0, 0.5: 1.0, 1.0: 1.0, 2.0: 1.0}),
        ("linear", {0.0: 1.0, 0.25: 0.75, 1.0: 0.0, 2.0: 0.0}),
        ("cosine", {0.0: 1.0, 1 / 3: 0.75, 0.5: 0.5, 2 / 3: 0.25, 1.0: 0.0, 2.0: 0.0}),
        # 0.04 + 0.96 / 2 halfway up, 1 at the peak, 1/2 halfway down
        ("one_cycle", {0.0: 0.04, 0.15: 0.52, 0.3: 1.0, 0.65: 0.5, 1.0: 0.0, 2.0: 0.0}),
    ],
)
def test_schedules_by_hand(schedule: Any, values: dict[float, float]) -> None:
    for share, expected in values.items():
        assert scheduled(schedule, share) == pytest.approx(expected, abs=1e-12), share


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_stay_between_zero_and_one_and_are_the_learning_rates(schedule: Any) -> None:
    values = [scheduled(schedule, step / 1000) for step in range(1001)]
    assert all(0.0 <= value <= 1.0 for value in values)
    assert max(values) == 1.0
    options = TrainOptions(epochs=2, schedule=schedule)
    assert [lr_factor(options, step, 1000) for step in range(1001)] == values


# --- L1 on BatchNorm scales ---------------------------------------------------------------------------------------


def _small() -> nn.Sequential:
    """A network whose BatchNorm scales have every sign."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -0.5, 0.0, 0.25]))
    return model


def test_a_step_with_l1_is_a_step_on_the_loss_with_the_penalty_in_it(data: Data) -> None:
    options = _options(batch_size=64, pressure={"bn_l1": {"strength": 0.1, "schedule": "one_cycle"}})
    model, reference = _small(), _small()
    Trainer(model, data.train, options, seed=3).epoch(0)

    images, labels = next(iter(data.train.batches(64, seed=derive_seed(3, 0))))
    strength = 0.04 * 0.1  # one_cycle begins at 4 %
    loss = F.cross_entropy(reference(images), labels) + strength * reference[1].weight.abs().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    for got, start in zip(model.parameters(), reference.parameters(), strict=True):
        assert start.grad is not None
        torch.testing.assert_close(got, start - 0.5 * start.grad, rtol=1e-5, atol=1e-7)


def test_l1_is_added_to_what_is_there() -> None:
    scale = nn.Parameter(torch.tensor([2.0, -3.0, 0.0]))
    unread = nn.Parameter(torch.ones(2))
    scale.grad = torch.tensor([1.0, 1.0, 1.0])
    add_l1([scale, unread], 0.25)
    assert scale.grad.tolist() == [1.25, 0.75, 1.0]
    assert unread.grad is None


def test_l1_is_clipped_as_part_of_the_loss(data: Data) -> None:
    model = _small()
    before = model[1].weight.detach().clone()
    options = _options(batch_size=64, lr=1.0, clip_norm=0.01, pressure={"bn_l1": {"strength": 100.0}})
    Trainer(model, data.train, options, seed=0).epoch(0)
    moved = before - model[1].weight.detach()
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-2)  # the penalty is nearly all of the gradient
    torch.testing.assert_close(moved, 0.01 * before.sign() / math.sqrt(3), rtol=0.1, atol=1e-4)


def test_scales_are_those_that_are_trained_each_once() -> None:
    bare, frozen, twice = nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3), nn.BatchNorm1d(3)
    frozen.weight.requires_grad_(False)
    again = nn.BatchNorm1d(3)
    again.weight = twice.weight
    model = nn.Sequential(nn.Linear(3, 3), nn.GroupNorm(1, 3), bare, frozen, twice, again, nn.SyncBatchNorm(3))
    assert [id(scale) for scale in batchnorm_scales(model)] == [id(twice.weight), id(model[6].weight)]


def test_more_l1_leaves_smaller_scales(data: Data) -> None:
    means = []
    for strength in (0.0, 0.01, 0.1):
        model = _small()
        options = _options(epochs=8, lr=0.05, momentum=0.9, pressure={"bn_l1": {"strength": strength}})
        trainer = Trainer(model, data.train, options, seed=0)
        losses = [trainer.epoch(number).loss for number in range(8)]
        assert losses[-1] < losses[0] - 0.5
        means.append(float(model[1].weight.detach().abs().mean()))
    assert means[0] > means[1] + 0.01
    assert means[1] > means[2] + 0.1


# --- gradient noise -----------------------------------------------------------------------------------------------

COUNT = 20_000


class Still(nn.Module):
    """A network without a gradient: what moves it is pressure alone."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((COUNT,), start))

    def forward(self, images: Tensor) -> Tensor:
        return images.new_zeros(len(images), 10) + 0.0 * self.weight.sum()


def _moved(data: Data, seed: int = 0, numbers: tuple[int, ...] = (0,), **kwargs: Any) -> Tensor:
    model = Still()
    trainer = Trainer(model, data.train, _options(**{"batch_size": 64, "lr": 1.0, **kwargs}), seed=seed)
    for number in numbers:
        trainer.epoch(number)
    return -model.weight.detach()


def test_noise_has_its_mean_and_its_deviation(data: Data) -> None:
    """Within five standard errors, which are std / sqrt(n) and std / sqrt(2 n)."""
    noise = _moved(data, pressure={"noise": {"std": 0.5}})
    assert abs(float(noise.mean())) < 5 * 0.5 / math.sqrt(COUNT)
    assert abs(float(noise.std()) - 0.5) < 5 * 0.5 / math.sqrt(2 * COUNT)


def test_noise_follows_its_schedule(data: Data) -> None:
    """Four epochs of one step each: 1, 3/4, 1/2 and 1/4 of the same draws as without a schedule."""
    options = {"epochs": 4, "pressure": {"noise": {"std": 0.5}}}
    falling = {"epochs": 4, "pressure": {"noise": {"std": 0.5, "schedule": "linear"}}}
    for number, factor in enumerate((1.0, 0.75, 0.5, 0.25)):
        torch.testing.assert_close(
            _moved(data, numbers=(number,), **falling), factor * _moved(data, numbers=(number,), **options)
        )


def test_noise_depends_on_seed_epoch_and_step_alone(data: Data) -> None:
    options = {"epochs": 2, "pressure": {"noise": {"std": 0.5}}}
    torch.manual_seed(1)
    first = _moved(data, **options)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(_moved(data, **options), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(_moved(data, seed=1, **options), first)
    second = _moved(data, numbers=(1,), **options)
    assert not torch.equal(second, first)
    torch.testing.assert_close(_moved(data, numbers=(0, 1), **options), first + second)
    # two steps of an epoch: were they the same draw, the sum would be twice as wide, not sqrt(2) times
    steps = _moved(data, batch_size=32, **options)
    assert float(steps.std()) == pytest.approx(0.5 * math.sqrt(2), rel=0.03)


def test_noise_on_several_gradients_is_independent_and_spares_what_has_none() -> None:
    parameters = [nn.Parameter(torch.zeros(COUNT)) for _ in range(3)]
    for parameter in parameters[:2]:
        parameter.grad = torch.ones(COUNT)
    add_noise(parameters, 0.1, seed=5)
    a, b, c = (parameter.grad for parameter in parameters)
    assert a is not None and b is not None and c is None
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / math.sqrt(COUNT)
    assert abs(float(a.mean()) - 1.0) < 5 * 0.1 / math.sqrt(COUNT)
    add_noise(parameters[2:], 0.1, seed=5)
    assert parameters[2].grad is None


def test_noise_spares_what_is_not_live() -> None:
    """Dead rows are untouched to the bit; all other numbers are those that come without factors."""
    parameters = [nn.Parameter(torch.zeros(4, 3, 2)), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(3, 4))]
    factors = {
        parameters[0]: torch.tensor([1.0, 0.0, 0.0, 1.0]).view(4, 1, 1),
        parameters[2]: torch.tensor([1.0, 1.0, 0.0, 1.0]),
    }

    def noised(live: Any) -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 0.1)
        add_noise(parameters, 0.5, 7, live)
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    everywhere, spared = noised(None), noised(factors.get)
    assert (spared[0][1:3] == 0.1).all() and (spared[2][:, 2] == 0.1).all()
    assert torch.equal(spared[0][[0, 3]], everywhere[0][[0, 3]])
    assert torch.equal(spared[1], everywhere[1])
    assert torch.equal(spared[2][:, [0, 1, 3]], everywhere[2][:, [0, 1, 3]])
    assert (everywhere[0] != 0.1).all() and (everywhere[2] != 0.1).all()


def test_clipping_bounds_noise_before_it_and_not_after(data: Data) -> None:
    """The noise alone has norm 0.5 * sqrt(20,000), about 71."""
    norms = {
        when: float(_moved(data, clip_norm=1.0, pressure={"noise": {"std": 0.5, "when": when}}).norm())
        for when in ("before_clipping", "after_clipping")
    }
    assert norms["before_clipping"] == pytest.approx(1.0, rel=1e-4)
    assert norms["after_clipping"] == pytest.approx(0.5 * math.sqrt(COUNT), rel=0.03)
    without = [_moved(data, pressure={"noise": {"std": 0.5, "when": when}}) for when in norms]
    assert torch.equal(*without)


# --- weight decay -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [("constant", [1.0, 1.0, 1.0, 1.0]), ("linear", [1.0, 0.75, 0.5, 0.25]),
     ("cosine", [1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
     ("one_cycle", [0.04, 1 - 0.48 * (1 - math.cos(math.pi / 6)), 0.5 + 0.5 * math.cos(math.pi * 2 / 7),
                    0.5 + 0.5 * math.cos(math.pi * 4.5 / 7)])],
)  # fmt: skip
def test_weight_decay_per_step_by_hand(data: Data, schedule: str, factors: list[float]) -> None:
    """Two epochs of two steps; without a gradient each step takes off lr * weight_decay * factor."""
    model = Still(start=1.0)
    options = _options(epochs=2, batch_size=32, weight_decay=0.2, pressure={"weight_decay_schedule": schedule})
    trainer = Trainer(model, data.train, options, seed=0)
    seen: list[float] = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append(optimizer.param_groups[0]["weight_decay"])
    )
    for number in range(2):
        trainer.epoch(number)
    assert seen == pytest.approx([0.2 * factor for factor in factors], abs=1e-12)
    left = math.prod(1 - 0.5 * 0.2 * factor for factor in factors)
    torch.testing.assert_close(model.weight.detach(), torch.full((COUNT,), left))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_training_without_pressure_is_as_ever(data: Data, optimizer: str) -> None:
    """Zero strengths and constant weight decay leave every weight as it is without them."""

    def trained(pressure: dict[str, Any]) -> Tensor:
        model = _small()
        options = _options(optimizer=optimizer, momentum=None, lr=0.01, weight_decay=0.1, pressure=pressure)
        Trainer(model, data.train, options, seed=0).epoch(0)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.equal(trained({}), trained({"bn_l1": {"strength": 0.0}, "noise": {"std": 0.0}}))
    assert not torch.equal(trained({}), trained({"bn_l1": {"strength": 0.1}}))
    assert not torch.equal(trained({}), trained({"noise": {"std": 0.1}}))
    assert not torch.equal(trained({}), trained({"weight_decay_schedule": "linear"}))


# --- what is refused ----------------------------------------------------------------------------------------------

NAMES = ", ".join(SCHEDULES[i] for i in (0, 2, 1, 3))


@pytest.mark.parametrize("stage", ["train", "finetune"])
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("bn_l1.strength=-1", "bn_l1.strength: expected a number of at least 0, found -1"),
        ("bn_l1.strength=.nan", "bn_l1.strength: expected a finite number, found .nan"),
        ("bn_l1={schedule: linear}", "bn_l1.strength: expected a number of at least 0, found nothing"),
        ("bn_l1=0.1", "bn_l1: expected a mapping of strength, schedule, found 0.1"),
        (
            "bn_l1={strength: 1, schedul: linear}",
            "bn_l1.schedul: expected an option of {}.bn_l1, found unknown 'schedul'; did you mean 'schedule'?",
        ),
        ("noise.std=-0.5", "noise.std: expected a number of at least 0, found -0.5"),
        ("noise.std=.nan", "noise.std: expected a finite number, found .nan"),
        ("noise.std=.inf", "noise.std: expected a finite number, found .inf"),
        (
            "noise={std: 1, when: after}",
            "noise.when: expected one of before_clipping, after_clipping, found 'after'",
        ),
        (
            "noise={std: 1, only: live}",
            "noise.only: expected an option of {}.noise, found unknown 'only'; known are std, schedule, when",
        ),
        (
            "weight_decay_schedule=one-cycle",
            f"weight_decay_schedule: expected one of {NAMES}, found 'one-cycle'; did you mean 'one_cycle'?",
        ),
        (
            "dropout=1",
            "dropout: expected an option of {}, found unknown 'dropout'; known are weight_decay_schedule, bn_l1, noise",
        ),
    ],
)
def test_bad_options_have_their_line(tiny: Path, stage: str, override: str, expected: str) -> None:
    where = f"{stage}.pressure"
    with pytest.raises(InputError) as caught:
        load_recipe(tiny, [f"{where}.{override}"])
    (problem,) = caught.value.problems
    assert problem.startswith(f"--set {where}.{override}: {where}.{expected.format(where)}")


@pytest.mark.parametrize("command", [["check"], ["run", "--output", "out"]], ids=lambda command: command[0])
def test_a_model_without_batchnorm_scales_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["model={name: mlp, hidden: [16]}", "train.pressure.bn_l1.strength=0.1"]
    line = "--set {0}: {1}.pressure.bn_l1: expected a model with BatchNorm scales, found none in mlp"
    sets = [word for override in overrides for word in ("--set", override)]
    assert main([command[0], str(tiny), *command[1:], *sets]) == 2
    assert capsys.readouterr().err == f"dnr: {line.format(overrides[1], 'train')}\n"
    assert not (tmp_path / "out").exists()

    both = "finetune.pressure.bn_l1={strength: 0.1}"
    assert main([command[0], str(tiny), *command[1:], *sets, "--set", both]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize("pressure", ["noise.std=0.1", "weight_decay_schedule=linear"])
def test_other_pressure_needs_no_batchnorm(tiny: Path, pressure: str) -> None:
    from dnr_plugin.runs.checks import check_recipe

    check_recipe(load_recipe(tiny, ["model={name: mlp, hidden: [16]}", f"train.pressure.{pressure}"]))
