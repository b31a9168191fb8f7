"""What a group came to is remembered, and never beyond what it depends on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import pytest
import torch
from helpers.importance import groups, observed
from helpers.networks import images, make
from torch import nn

from dnr_plugin.scoring import redundancy
from dnr_plugin.scoring.brain_surgeon import Reader
from dnr_plugin.scoring.importance import DyingNeuronImportance

pytestmark = pytest.mark.filterwarnings("ignore:.*is left alone.*")


def _weights(model: nn.Module, importance: DyingNeuronImportance) -> None:
    for parameter in model.parameters():  # which counts no version
        parameter.data.mul_(1.0 + 0.5 * torch.rand_like(parameter))


def _norms(model: nn.Module, importance: DyingNeuronImportance) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.mul_(4.0 * torch.rand_like(module.running_var))


def _images(model: nn.Module, importance: DyingNeuronImportance) -> None:
    with importance.observer, torch.no_grad():
        model(images(seed=7))


def _anew(model: nn.Module, importance: DyingNeuronImportance) -> None:
    with importance.observe(model), torch.no_grad():
        model(images(seed=7))


def _normed() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize(
    ("network", "change"),
    [
        *itertools.product(("plain", "residual", "concat"), (_weights, _images, _anew)),
        (_normed, _norms),
    ],
)
def test_scores_are_remembered_while_nothing_changes(
    network: str | Callable[[], nn.Module], change: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = make(network) if isinstance(network, str) else network()
    importance, calls, damages = observed(model, score="redundancy"), [], redundancy.damages
    monkeypatch.setattr(redundancy, "damages", lambda *args: calls.append(1) or damages(*args))
    before = {root: importance(group) for root, group in groups(model)}
    first = len(calls)
    assert first > 0
    again = {root: importance(group) for root, group in groups(model)}
    assert len(calls) == first
    assert all(score is None or torch.equal(score, again[root]) for root, score in before.items())
    change(model, importance)
    changed = {root: importance(group) for root, group in groups(model)}
    fresh = DyingNeuronImportance()
    fresh.judge_by(importance.observer)
    expected = {root: fresh(group) for root, group in groups(model)}
    assert all(score is None or torch.equal(score, expected[root]) for root, score in changed.items())
    assert any(score is not None and not torch.equal(score, before[root]) for root, score in changed.items())


def test_a_score_is_the_callers_own() -> None:
    model = make("plain")
    importance = observed(model, score="redundancy")
    first = {root: importance(group) for root, group in groups(model)}
    for score in first.values():
        if score is not None:
            score.zero_()
    assert all(score is None or bool((score > 0).all()) for score in (importance(group) for _, group in groups(model)))


class _Branches(nn.Module):
    """Three layers read one tensor, one of them a part of it in each group, and a fourth another one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.q, self.k, self.g = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 5, 1), nn.Conv2d(8, 6, 1, groups=2)
        self.other = nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        outputs = [layer(x).mean((2, 3)) for layer in (self.q, self.k, self.g)]
        return torch.cat([*outputs, self.other(2 * x).mean((2, 3))], 1)


def test_readers_of_one_tensor_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And lose what they lose apart."""
    torch.manual_seed(0)
    model = _Branches().eval()
    made: list[list[int]] = []
    damages = redundancy.damages

    def noted(readers: Iterable[Reader], neurons: int) -> tuple[list[int], torch.Tensor]:
        every = [*readers]
        made.append([len(reader.weights) for reader in every])
        return damages(every, neurons)

    monkeypatch.setattr(redundancy, "damages", noted)
    scores = []
    for together in (True, False):
        if not together:
            monkeypatch.setattr(redundancy, "_by_tensor", lambda evidence: [[e] for e in evidence])
        importance = observed(model, score="redundancy")
        scores.append(next(importance(group) for root, group in groups(model) if root == "stem"))
    assert sorted(made[0]) == [3, 3, 3, 9]
    assert sorted(next(sizes for sizes in made[1:] if len(sizes) == 5)) == [3, 3, 3, 4, 5]
    torch.testing.assert_close(scores[0], scores[1])
