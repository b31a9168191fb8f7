"""Criteria by name: each scores every layer, has really looked at what it says, and can be planned to any level."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from helpers.common import assume
from helpers.networks import images, make
from torch import Tensor, nn

from dnr_plugin.benchmarks.criteria.contenders import (
    CRITERIA,
    OURS,
    THEIRS,
    Calibration,
    Criterion,
    build_criterion,
    check_scores,
)
from dnr_plugin.pruning.groups import prunable_layers
from dnr_plugin.pruning.layers import Limits
from dnr_plugin.pruning.plan import plan_removal
from dnr_plugin.recipe.sections import ObserveOptions
from dnr_plugin.scoring.scores import SCORES

LEARNT = ("taylor", "hessian", "hessian_mean", "obdc")


def _calibration(count: int = 12, seed: int = 1, size: int = 8) -> Calibration:
    labels = torch.randint(0, 10, (count,), generator=torch.Generator().manual_seed(seed))
    found = images(count, seed, size)
    return Calibration(found, labels, found[:1], 10, ObserveOptions(share=1.0))


class SmallResNet(nn.Module):
    """A stem and two residual blocks, the second of twice the width, with BatchNorm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Module:
            layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(outputs))

        self.stem, self.a1, self.a2 = conv(3, width), conv(width, width), conv(width, width)
        self.b1, self.b2 = conv(width, 2 * width), conv(2 * width, 2 * width)
        self.shortcut = conv(width, 2 * width, 1)
        self.linear = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.a2(F.relu(self.a1(x))) + x)
        x = F.relu(self.b2(F.relu(self.b1(x))) + self.shortcut(x))
        return self.linear(x.mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """In train mode, with uneven BatchNorm; nothing may change it."""
    torch.manual_seed(0)
    model = SmallResNet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.train()


def _built(name: str, net: nn.Module, data: Calibration, seed: int = 0) -> tuple[Criterion, nn.Module]:
    model = copy.deepcopy(net)
    return build_criterion(name, model, data, seed), model


def _scores(name: str, net: nn.Module, data: Calibration, seed: int = 0) -> Tensor:
    """Logarithms of those of all layers, each layer's divided by their mean."""
    criterion, model = _built(name, net, data, seed)
    torch.manual_seed(seed)
    found = [criterion(layer.group) for layer in prunable_layers(model, data.example, Limits(), {}).layers]
    known = [score.detach().double() for score in found if score is not None]
    return torch.cat([(score / score.mean()).log() for score in known])


@pytest.fixture(scope="module")
def l1(net: nn.Module) -> Tensor:
    return _scores("l1", net, _calibration())


def test_every_score_and_every_criterion_is_there() -> None:
    assert tuple(SCORES) == OURS
    assert list(CRITERIA) == [*THEIRS, *OURS]


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_scores_every_layer_and_is_planned_to_the_level(name: str, net: nn.Module) -> None:
    data = _calibration()
    criterion, model = _built(name, net, data)
    check_scores(criterion, model, data.example, Limits())
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), net.state_dict().values(), strict=True))
    plan = plan_removal(model, data.example, criterion, "flops", 0.4, scope="global")
    assert 0.3 < plan.achieved <= 0.4
    assert [name for name, _ in plan.skipped] == ["linear"]


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.parametrize("name", [*LEARNT, "activation", *OURS])
def test_what_looks_at_images_depends_on_them_and_on_nothing_else(name: str, net: nn.Module, l1: Tensor) -> None:
    found, again = (_scores(name, net, _calibration()) for _ in range(2))
    assert torch.equal(found, again)
    other = _scores(name, net, _calibration(seed=2))
    assume(not torch.allclose(found, other), "every neuron fires in every image")
    assert not torch.allclose(found, l1, rtol=1e-2)


@pytest.mark.parametrize("name", ["l1", "l2", "bn_scale", "lamp", "fpgm"])
def test_what_looks_at_weights_does_not_depend_on_images(name: str, net: nn.Module) -> None:
    assert torch.equal(_scores(name, net, _calibration()), _scores(name, net, _calibration(seed=2)))


def test_random_is_reproducible(net: nn.Module) -> None:
    first, again, other = (_scores("random", net, _calibration(), seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def _gradients(net: nn.Module, data: Calibration) -> list[Tensor]:
    """Of each image's loss with respect to the first weight, in eval mode."""
    model = copy.deepcopy(net).eval()
    weight = next(model.parameters())
    losses = (F.cross_entropy(model(x[None]), y[None]) for x, y in zip(data.images, data.labels, strict=True))
    return [torch.autograd.grad(loss, weight)[0] for loss in losses]


def test_taylor_sees_the_gradient_of_the_mean_loss(net: nn.Module) -> None:
    data = _calibration(60)  # more than one batch
    _, model = _built("taylor", net, data)
    found = next(model.parameters()).grad
    assert found is not None
    torch.testing.assert_close(found, torch.stack(_gradients(net, data)).mean(0), rtol=1e-3, atol=1e-6)


def test_hessian_of_torch_pruning_keeps_the_last_image_alone_and_ours_all(net: nn.Module) -> None:
    """So the plain one is as good as a single image; should this fail, Torch-Pruning has been mended."""
    data = _calibration()
    last = Calibration(data.images[-1:], data.labels[-1:], data.example, 10)
    torch.testing.assert_close(_scores("hessian", net, data), _scores("hessian", net, last))
    assert not torch.allclose(_scores("hessian_mean", net, data), _scores("hessian_mean", net, last))
    criterion, model = _built("hessian_mean", net, data)
    check_scores(criterion, model, data.example, Limits())  # the first call hands the means over to .grad
    found = next(model.parameters()).grad
    assert found is not None
    mean = torch.stack(_gradients(net, data)).square().mean(0)
    torch.testing.assert_close(found, mean, rtol=1e-3, atol=1e-8)


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
def test_obdc_sums_the_squared_gradients_of_every_image(net: nn.Module) -> None:
    """With labels drawn from the model's own predictions."""
    data = _calibration(60)
    criterion, model = _built("obdc", net, data, seed=3)
    torch.manual_seed(3)
    with torch.no_grad():
        parts = [copy.deepcopy(net).eval()(x).softmax(1) for x, _ in data.batches(50)]
    drawn = torch.cat([torch.multinomial(part, 1).flatten() for part in parts])
    own = Calibration(data.images, drawn, data.example, 10)
    root = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    steps, fisher = criterion.steps, criterion.Fisher[root]  # type: ignore[attr-defined]
    squares = torch.stack(_gradients(net, own)).square().sum(0).flatten(1)
    assert steps == 2
    torch.testing.assert_close(fisher, squares, rtol=1e-3, atol=1e-6)


class _Fixed(tp.importance.Importance):  # type: ignore[misc]
    def __init__(self, scores: Tensor | None) -> None:
        self.scores = scores

    def __call__(self, group: tp.dependency.Group) -> Tensor | None:
        return self.scores


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (None, "c: the criterion gives no scores"),
        (torch.ones(3), r"c: expected 8 scores, found shape \[3\]"),
        (torch.full((8,), torch.nan), "c: 8 of 8 scores are NaN or infinite"),
        (torch.tensor([1.0] * 7 + [torch.inf]), "c: 1 of 8 scores are NaN or infinite"),
    ],
)
def test_scores_that_rank_nothing_are_refused(scores: Tensor | None, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_scores(_Fixed(scores), make("plain"), images(1), Limits())
