"""Repair where networks run in bfloat16: asked for, chosen where it is worth it, or under a caller's autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.networks import images
from torch import Tensor, nn

from dnr_plugin import prune_neurons, repair_network
from dnr_plugin.network.calling import eval_outputs
from dnr_plugin.repair import reference
from dnr_plugin.repair.reference import Reference

REMOVED = {"0": [0, 1], "3": [2, 5]}


def network(*last: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4), *last).eval()


def pruned(dense: nn.Module, x: Tensor) -> nn.Module:
    model = copy.deepcopy(dense)
    prune_neurons(model, x[:1], REMOVED)
    return model


def lacks(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    (given,), (wanted,) = eval_outputs(model, x), eval_outputs(dense, x)
    return float((given - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("pairs", [False, True])
def test_bfloat16_repairs_like_float32(pairs: bool) -> None:
    dense, x, other = network(), images(256, 0), images(128, 1)
    lacking = {}
    for amp in (False, True):
        model = pruned(dense, x)
        assert lacks(model, dense, other) > 0.1
        repair_network(model, dense, x[:1], REMOVED, x, pairs=pairs, amp=amp)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        lacking[amp] = lacks(model, dense, other)
    assert lacking[False] != lacking[True]
    assert lacking[True] == pytest.approx(lacking[False], rel=0.05)


def test_what_lost_nothing_stays_as_it_is() -> None:
    """Rounding of 16 bits is nothing to fit."""
    dense, x = network(), images(128, 0)
    model = copy.deepcopy(dense)
    rows = repair_network(model, dense, x[:1], {}, x, amp=True)
    assert max(row.error_before for row in rows) > 0
    assert all(row.damping is None for row in rows)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize("pairs", [False, True])
def test_callers_autocast_rounds_activations_alone(pairs: bool) -> None:
    """The fit itself is that of ``amp=True``; weights in the caller's cache are not those of before."""
    dense, x = network(), images(128, 0)
    asked, under = pruned(dense, x), pruned(dense, x)
    repair_network(asked, dense, x[:1], REMOVED, x, pairs=pairs, amp=True)
    for parameter in under.parameters():
        assert parameter.requires_grad  # else nothing is kept in the cache
    with autocast():
        before = under(x).detach()
        repair_network(under, dense, x[:1], REMOVED, x, pairs=pairs)
        within = under(x).detach()
    assert all(torch.equal(a, b) for a, b in zip(asked.parameters(), under.parameters(), strict=True))
    with autocast():
        assert torch.equal(within, under(x))
    assert not torch.equal(within, before)


class Fragile(nn.Module):
    """Lives on differences that 8 bits of mantissa do not show."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1000.0) - 1000.0


class Mixed(nn.Module):
    """Writes into a tensor of float32."""

    def forward(self, x: Tensor) -> Tensor:
        result = torch.zeros(len(x), 4)
        result.index_copy_(0, torch.arange(len(x)), x)
        return result


@pytest.mark.parametrize(
    ("last", "fast", "work", "chosen"),
    [
        ((), True, 0, torch.bfloat16),
        ((), False, 0, None),  # no instructions for it
        ((), True, 2**40, None),  # not worth it
        ((Fragile(),), True, 0, None),
        ((Mixed(),), True, 0, None),
    ],
)
def test_auto_takes_bfloat16_where_it_serves(
    last: tuple[nn.Module, ...], fast: bool, work: int, chosen: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "has_bfloat16", lambda device: fast)
    monkeypatch.setattr(reference, "_LONG", work)
    dense, x = network(*last), images(64, 0)
    assert Reference(dense, x[:1], x).autocast is chosen
    if last:
        model = pruned(dense, x)
        before = lacks(model, dense, x)
        repair_network(model, dense, x[:1], REMOVED, x)
        assert lacks(model, dense, x) < before


def test_work_is_counted_in_multiply_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 16 images of 8 x 8."""
    dense, x = network(), images(16, 0)
    assert x.shape[2:] == (8, 8)
    work = 16 * (64 * 8 * 27 + 36 * 8 * 72 + 4 * 8)
    monkeypatch.setattr(reference, "has_bfloat16", lambda device: True)
    for least, chosen in ((work, torch.bfloat16), (work + 1, None)):
        monkeypatch.setattr(reference, "_LONG", least)
        assert Reference(dense, x[:1], x).autocast is chosen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_of_other_precision_stay_in_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(reference, "_LONG", 0)
    dense, x = network().to(dtype), images(64, 0).to(dtype)
    assert Reference(dense, x[:1], x).autocast is None
    model = copy.deepcopy(dense)
    rows = repair_network(model, dense, x[:1], {}, x)
    assert all(row.damping is None for row in rows)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))
