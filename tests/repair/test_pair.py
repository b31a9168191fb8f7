"""Two layers with a ReLU between them: the first is fitted by what the second makes of it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import images
from torch import Tensor, nn

from dnr_plugin.models.build import build_model
from dnr_plugin.network.calling import eval_outputs
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.recipe.sections import ModelOptions
from dnr_plugin.repair.layer import Affine, LayerRepair
from dnr_plugin.repair.network import repair_network
from dnr_plugin.repair.pair import _conjugate_gradients


class Two(nn.Module):
    """Linear layers whose hidden neurons are never below zero on inputs of the usual size, so that all is linear."""

    def __init__(self, hidden: int = 6, norm: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, hidden, bias=bias), nn.Linear(hidden, 2)
        self.norm = nn.BatchNorm1d(hidden) if norm else nn.Identity()
        with torch.no_grad():
            if norm:
                self.norm.bias.fill_(20.0)
            elif bias:
                self.a.bias.fill_(20.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x))))


def vectors(n: int, seed: int) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def lacks(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    """Share of the variance of the dense network's outputs that is lost."""
    [found], [y] = eval_outputs(model, x), eval_outputs(dense, x)
    return float((found - y).square().sum() / (y - y.mean(0)).square().sum())


def both(
    dense: nn.Module, x: Tensor, removals: dict[str, list[int]]
) -> dict[bool, tuple[nn.Module, list[LayerRepair]]]:
    """Pruned and repaired without and with pairs."""
    found = {}
    for pairs in (False, True):
        model = copy.deepcopy(dense)
        prune_neurons(model, x[:1], removals)
        found[pairs] = model, repair_network(model, dense, x[:1], removals, x, pairs=pairs)
    return found


@pytest.mark.parametrize("norm", [False, True])
def test_two_neurons_do_the_work_of_six(norm: bool) -> None:
    """What the two outputs need is two features, which the neurons that are left can become, but are not."""
    torch.manual_seed(0)
    dense = Two(norm=norm).eval()
    x, fresh = vectors(512, 1), vectors(512, 2)
    lost = {}
    for pairs, (model, rows) in both(dense, x, {"a": [0, 1, 2, 3]}).items():
        lost[pairs] = lacks(model, dense, fresh)
        assert rows[-1].error_after == pytest.approx(lacks(model, dense, x), rel=0.3, abs=1e-6)
        if norm:  # statistics of what it reads now, so that recalibration changes nothing
            with torch.no_grad():
                torch.testing.assert_close(model.norm.running_mean, model.a(x).mean(0), rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(model.norm.running_var, model.a(x).var(0), rtol=1e-2, atol=1e-3)
    assert lost[False] > 0.1
    assert lost[True] < 0.2 * lost[False]


def test_without_a_place_for_constants_weights_alone_change() -> None:
    torch.manual_seed(0)
    dense = Two(bias=False).eval()
    x, fresh = vectors(512, 1), vectors(512, 2)
    found = both(dense, x, {"a": [0, 1]})
    assert all(model.a.bias is None for model, _ in found.values())
    assert lacks(found[True][0], dense, fresh) < lacks(found[False][0], dense, fresh)


class Chain(nn.Module):
    """Three convolutions in a row, with and without a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 16, 3, padding=1) for i in (3, 16, 16))
        self.bn = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c(F.relu(self.bn(self.b(F.relu(self.a(x)))))))
        return self.fc(x.mean((2, 3)))


def own_resnet() -> nn.Module:
    return build_model(ModelOptions(name="resnet20", width=8), 5, image_size=8)


def test_a_chain_comes_closer() -> None:
    """On images that took no part. The middle layer is the second of one pair and the first of the next."""
    torch.manual_seed(0)
    dense, x, fresh = Chain().train(), images(256, 3), images(128, 4)
    with torch.no_grad():
        for _ in range(20):
            dense(x)  # BatchNorm's statistics
    dense.eval()
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    (without, _), (model, _) = both(dense, x, {"a": [0, 1], "b": [2, 3]}).values()
    assert lacks(model, dense, fresh) < lacks(without, dense, fresh)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


def test_blocks_of_a_resnet_come_closer() -> None:
    """To the sums that they end with, on the images that they are fitted to."""
    torch.manual_seed(0)
    dense, x = own_resnet().eval(), images(128, 3)
    removals = {f"layer{i}.{k}.conv1": [0, 1] for i in (1, 2, 3) for k in (0, 1, 2)}
    without, with_pairs = (
        sum(row.error_after for row in rows if row.layer.endswith("conv2"))
        for _, rows in both(dense, x, removals).values()
    )
    assert with_pairs < 0.95 * without


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_of_other_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense, x = Chain().eval().to(dtype), images(64, 3).to(dtype)
    model, rows = both(dense, x, {"a": [0, 1], "b": [2, 3]})[True]
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {"b", "c"} <= {row.layer for row in rows if row.damping is not None}
    bare = copy.deepcopy(dense)
    prune_neurons(bare, x[:1], {"a": [0, 1], "b": [2, 3]})
    assert lacks(model, dense, x) < lacks(bare, dense, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_can_be_fitted_twice(dtype: torch.dtype) -> None:
    module = nn.Linear(3, 2).to(dtype)
    layer = Affine(module, None)
    with torch.no_grad():
        for value in (1.0, 5.0):
            layer.assign(layer.weights, torch.full_like(layer.constants, value), torch.zeros(1, 2))
            assert module.bias.tolist() == [value, value]


class Shared(nn.Module):
    """The first layer's result is also read by something else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.b(x) * self.c(x)


def test_what_others_read_stays_as_it_is() -> None:
    torch.manual_seed(0)
    dense = Shared().eval()
    x = vectors(128, 1)
    without, found = (model.state_dict() for model, _ in both(dense, x, {"a": [0]}).values())
    assert all(torch.equal(without[key], found[key]) for key in found)


def test_nothing_removed_changes_nothing() -> None:
    dense, x = own_resnet().eval(), images(64, 3)
    model, _ = both(dense, x, {})[True]
    assert lacks(model, dense, x) < 1e-6


def test_conjugate_gradients_solve() -> None:
    """Five iterations for five unknowns; a preconditioner changes the way, not the end."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    matrix, right = root @ root.T + torch.eye(5), torch.randn(5, generator=generator, dtype=torch.float64)
    wanted = torch.linalg.solve(matrix, right)

    def product(way: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        found = matrix @ torch.cat([way[0].flatten(), way[1]])
        return found[:4].view(2, 2), found[4:]

    parts = right[:4].view(2, 2), right[4:]
    scales = torch.tensor([[1.0, 3.0], [0.5, 2.0]], dtype=torch.float64)
    for solve in (lambda way: way, lambda way: (way[0] * scales, way[1])):
        w, b = _conjugate_gradients(parts, product, solve, 5)
        torch.testing.assert_close(torch.cat([w.flatten(), b]), wanted)
    zero = torch.zeros(2, 2), torch.zeros(1)
    assert all((part == 0).all() for part in _conjugate_gradients(zero, product, lambda way: way))
