"""The criterion in Torch-Pruning's pruners: what these take, and what is said where they cannot."""

import warnings

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from dnr_plugin import DyingNeuronImportance


def observed(model: nn.Module, x: Tensor, score: str = "redundancy") -> DyingNeuronImportance:
    importance = DyingNeuronImportance(score)
    with importance.observe(model), torch.no_grad():
        model.eval()(x)
    return importance


class Split(nn.Module):
    """Outputs that are split among three readers, of which the last has the least to say."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 32, 1)
        self.b, self.c, self.d = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1)
        self.fc = nn.Linear(24, 3)
        with torch.no_grad():
            self.a.weight[16:] *= 1e-3
            self.a.bias.view(-1)[16:] = 0.0  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        u, v, w = self.a(x).relu().split([8, 8, 16], 1)
        y = torch.cat([self.d(w), self.c(v), self.b(u)], 1)  # in this order Torch-Pruning knows which is which
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("score", ["redundancy", "contribution"])
def test_no_reader_of_a_split_runs_empty(score: str) -> None:
    """Else Torch-Pruning refuses the whole group, without a word."""
    torch.manual_seed(0)
    model, x = Split(), torch.randn(16, 3, 6, 6)
    importance = observed(model, x, score)
    tp.pruner.BasePruner(model, x[:1], importance, pruning_ratio=0.5, ignored_layers=[model.fc]).step()
    assert model.a.out_channels == 16
    assert [reader.in_channels >= 1 for reader in (model.b, model.c, model.d)] == [True] * 3


class Left(nn.Module):
    """Most of the parameters make outputs, which stay."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.end = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(8, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.b(self.a(x).relu()), self.end(x)


@pytest.mark.parametrize(("width", "ignored", "told"), [(400, False, True), (400, True, False), (4, False, False)])
def test_a_pruner_that_reaches_little_is_told(width: int, ignored: bool, told: bool) -> None:
    torch.manual_seed(0)
    model, x = Left(width), torch.randn(32, 8)
    importance = observed(model, x)
    pruner = tp.pruner.BasePruner(
        model, x[:1], importance, pruning_ratio=0.5, iterative_steps=2, ignored_layers=[model.end] if ignored else []
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        pruner.step()
        pruner.step()
    said = [str(warning.message) for warning in seen if "was asked" in str(warning.message)]
    assert len(said) == told
    if told:
        assert said[0].startswith(
            "Torch-Pruning was asked to remove 50% of the channels, and reaches layers with 6% of the parameters "
            "alone; left: end. "
        )
    assert model.a.out_features == 8


class Reused(nn.Module):
    """A layer that reads two parts of another one's outputs, which Torch-Pruning counts as twice as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = nn.Conv2d(3, 32, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        u, v, w = self.a(x).relu().split([8, 8, 16], 1)
        return self.fc(torch.cat([self.b(u), self.b(v), self.c(w)], 1).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("score", ["redundancy", "contribution"])
def test_a_group_that_cannot_be_scored_is_named_and_left(score: str) -> None:
    torch.manual_seed(0)
    model, x = Reused(), torch.randn(32, 3, 4, 4)
    importance = observed(model, x, score)
    pruner = tp.pruner.BasePruner(model, x[:1], importance, pruning_ratio=0.5, ignored_layers=[model.fc])
    with pytest.warns(UserWarning, match="a is left alone: Torch-Pruning takes channels from b that it does not have"):
        pruner.step()
    assert importance.skipped == {"a": "Torch-Pruning takes channels from b that it does not have"}
    assert (model.a.out_channels, model.b.in_channels) == (32, 8)
