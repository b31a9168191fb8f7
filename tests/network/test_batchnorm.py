"""Statistics taken anew and means folded, against sums over the whole data and against the unpruned network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dnr_plugin.network.batchnorm import affine, assign_affine, recalibrate_batchnorm
from dnr_plugin.network.calling import batch_inputs, kept_modes
from dnr_plugin.network.graph import build_graph
from dnr_plugin.pruning.folding import fold_means
from dnr_plugin.scoring.importance import DyingNeuronImportance


def _batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, 6, 6, generator=generator) * (n % 3 + 1) + n / 7 for n in sizes]


@pytest.mark.parametrize("pairs", [True, False])
def test_statistics_are_those_of_the_population(pairs: bool) -> None:
    """Batches of unequal sizes count by their samples; the variance is that of all values, not divided by n - 1."""
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3), nn.Dropout(0.5), nn.Flatten(), nn.BatchNorm1d(108))
    data = _batches(4, 7, 16)
    loader = [(batch, torch.zeros(len(batch))) for batch in data] if pairs else data
    model.train()
    model[1].eval()
    assert recalibrate_batchnorm(model, loader) == 3
    everything = torch.cat(data).double()
    torch.testing.assert_close(model[0].running_mean.double(), everything.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        model[0].running_var.double(), everything.var((0, 2, 3), correction=0), rtol=1e-5, atol=0
    )
    # the second layer sees batches that the first normalised each by its own statistics, and no dropout
    normal = [
        (batch - batch.mean((0, 2, 3), keepdim=True)) / (batch.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        for batch in data
    ]
    flat = torch.cat(normal).flatten(1).double()
    torch.testing.assert_close(model[3].running_mean.double(), flat.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(model[3].running_var.double(), flat.var(0, correction=0), rtol=1e-4, atol=0)
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert (model[0].momentum, model[3].momentum) == (0.3, 0.1)


def test_everything_else_stays() -> None:
    """Weights, gradients, hooks and layers without running statistics."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True),
        nn.BatchNorm2d(4, track_running_stats=False),
    ).eval()  # fmt: skip
    before = copy.deepcopy(model.state_dict())
    recalibrate_batchnorm(model, _batches(4, 4))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert not any(module.training or module._forward_pre_hooks for module in model.modules())


def test_number_of_batches() -> None:
    """Only so many batches are drawn from the loader."""
    model = nn.Sequential(nn.BatchNorm2d(3))
    data = _batches(4, 5, 6)
    stream = iter(data)
    assert recalibrate_batchnorm(model, stream, 2) == 2
    assert next(stream) is data[2]
    torch.testing.assert_close(model[0].running_mean, torch.cat(data[:2]).mean((0, 2, 3)))


def test_no_batch_and_no_batchnorm() -> None:
    """An empty loader is an error, a model without BatchNorm is not."""
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate_batchnorm(nn.Sequential(nn.BatchNorm2d(3)), [])
    assert recalibrate_batchnorm(nn.Sequential(nn.Conv2d(3, 3, 1)), _batches(2)) == 0


class Auxiliary(nn.Module):
    """A head that only training calls, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.head = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        return x + self.head(x) if self.training else x


def test_layers_that_the_data_do_not_reach_keep_their_statistics() -> None:
    """fvcore would leave them mean 0 and variance 0."""
    model = Auxiliary()
    model(_batches(8)[0])
    before = copy.deepcopy(model.head.state_dict())
    recalibrate_batchnorm(model, _batches(4, 4))
    assert all(torch.equal(value, before[key]) for key, value in model.head.state_dict().items())
    torch.testing.assert_close(model.bn.running_mean, torch.cat(_batches(4, 4)).mean((0, 2, 3)))


def test_a_failing_model_is_restored() -> None:
    """Statistics, momentum, modes and hooks; otherwise no later call would work."""
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3), nn.Conv2d(3, 4, 7)).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        recalibrate_batchnorm(model, _batches(4))  # 7x7 kernels do not fit 6x6 images
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model[0].momentum == 0.3
    assert not model[0].training
    assert not model[0]._forward_pre_hooks


def test_large_constants_have_no_negative_variance() -> None:
    """E[x^2] - E[x]^2 of a constant can come out below zero in float32, and its root as NaN."""
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    data = [torch.full((n, 3, 5, 5), 1234.567) for n in (3, 5, 7)]
    recalibrate_batchnorm(model, data)
    assert (model[0].running_var >= 0).all()
    assert torch.isfinite(model(data[0])).all()


def test_batch_inputs() -> None:
    """Pairs give their first element; tensors and dicts are inputs themselves."""
    x = torch.ones(2)
    assert batch_inputs((x, 1)) is x
    assert batch_inputs([x, 1]) is x
    assert batch_inputs(x) is x
    assert batch_inputs({"a": x})["a"] is x


# --- folding ---------------------------------------------------------------------------------------------------------

GONE = [0, 3, 5]


def _constant_channels(model: nn.Sequential, value: float) -> None:
    """Makes the channels in `GONE` of BatchNorm ``model[1]`` constant, behind the ReLU ``value``."""
    torch.manual_seed(3)
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2.0)
        model[1].weight.uniform_(0.5, 1.5)
        model[1].bias.normal_()
        model[1].weight[GONE] = 0.0
        model[1].bias[GONE] = value
        for module in list(model)[3:]:
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)


def _head(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *layers).eval()


CONSUMERS = {
    "linear": lambda: _head(nn.AvgPool2d(6), nn.Flatten(), nn.Linear(8, 5)),
    "flatten": lambda: _head(nn.Flatten(), nn.Linear(8 * 36, 5)),
    "1x1": lambda: _head(nn.Conv2d(8, 5, 1)),
    "valid": lambda: _head(nn.Conv2d(8, 5, 3, padding="valid")),
    "valid, strided and dilated": lambda: _head(nn.Conv2d(8, 5, 2, stride=2, dilation=2)),
    "reflect": lambda: _head(nn.Conv2d(8, 5, 3, padding=1, padding_mode="reflect")),
    "circular": lambda: _head(nn.Conv2d(8, 5, 3, padding="same", padding_mode="circular")),
    "replicate": lambda: _head(nn.Conv2d(8, 5, 3, padding=1, padding_mode="replicate")),
    "BatchNorm behind": lambda: _head(nn.Conv2d(8, 5, 3, bias=False), nn.BatchNorm2d(5)),
    "bias and BatchNorm": lambda: _head(nn.Conv2d(8, 5, 3), nn.BatchNorm2d(5)),
    "1x1 with BatchNorm": lambda: _head(nn.Conv2d(8, 5, 1, bias=False), nn.BatchNorm2d(5), nn.ReLU()),
}


def _fold_and_prune(
    model: nn.Module, x: Tensor, gone: list[int], fold: bool = True
) -> tuple[Tensor, Tensor, list[tuple[str, str, bool]]]:
    importance = DyingNeuronImportance()
    with kept_modes(model), torch.no_grad():
        model.eval()
        before = model(x)
        with importance.observe(model):
            model(x)
        graph = build_graph(model, x[:1])
        group = graph.get_pruning_group(model[0], graph.get_pruner_of_module(model[0]).prune_out_channels, gone)
        done = fold_means(graph, importance.evidence(group)) if fold else []
        group.prune()
        return before, model(x), done


# activities keep extremes in float32, so that in float64 only constants that float32 can hold are folded to 1e-12
@pytest.mark.parametrize(
    ("dtype", "value", "tolerance"),
    [(torch.float32, 0.7, 1e-6), (torch.float64, 0.7, 1e-7), (torch.float64, 0.75, 1e-12)],
)
@pytest.mark.parametrize("name", CONSUMERS)
def test_constants_are_folded_exactly(name: str, dtype: torch.dtype, value: float, tolerance: float) -> None:
    """Outputs do not change at any position; without folding they do."""
    model = CONSUMERS[name]().to(dtype)
    _constant_channels(model, value)
    x = torch.randn(16, 3, 6, 6, dtype=dtype)
    _, unfolded, _ = _fold_and_prune(copy.deepcopy(model), x, GONE, fold=False)
    before, after, done = _fold_and_prune(model, x, GONE)
    scale = before.abs().max()
    assert (before - unfolded).abs().max() > 1e-2 * scale
    assert (before - after).abs().max() <= tolerance * scale
    place = "BatchNorm" if "BatchNorm" in name and "bias" not in name else "bias"
    assert [(what, exact) for _, what, exact in done] == [(place, True)]


@pytest.mark.parametrize("batchnorm", [True, False])
def test_grouped_convolutions(batchnorm: bool) -> None:
    """Whole offsets in each of two channel groups: each filter takes what its own group loses."""
    model = _head(nn.Conv2d(8, 6, 3, groups=2, bias=not batchnorm), *([nn.BatchNorm2d(6)] if batchnorm else []))
    _constant_channels(model, 0.7)
    gone = [0, 3, 4, 7]
    with torch.no_grad():
        model[1].weight[gone] = 0.0
        model[1].bias[gone] = torch.tensor([0.2, 0.9, 1.7, 0.4])
        model[1].weight[5], model[1].bias[5] = 1.0, 0.3
    before, after, done = _fold_and_prune(model, torch.randn(16, 3, 6, 6), gone)
    assert model[3].in_channels == 4
    assert (before - after).abs().max() <= 1e-6 * before.abs().max()
    assert done == [("Conv2d", "BatchNorm" if batchnorm else "bias", True)]


@pytest.mark.parametrize("bias", [True, False])
def test_zero_padding_is_exact_inside_and_not_at_the_borders(bias: bool) -> None:
    """And is reported as not exact."""
    model = _head(nn.Conv2d(8, 5, 3, padding=1, bias=bias), *([] if bias else [nn.BatchNorm2d(5)]))
    _constant_channels(model, 0.7)
    before, after, done = _fold_and_prune(model, torch.randn(16, 3, 6, 6), GONE)
    wrong = (before - after).abs() / before.abs().max()
    assert wrong[:, :, 1:-1, 1:-1].max() <= 1e-6
    border = torch.ones(6, 6, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert wrong[:, :, border].amax((0, 1)).min() > 1e-3
    assert [exact for _, _, exact in done] == [False]


def test_varying_neurons_leave_their_mean() -> None:
    """The mean of the outputs over samples and positions stays, whatever else changes."""
    model = _head(nn.Conv2d(8, 5, 3))
    importance = DyingNeuronImportance(share=1.0)
    x = torch.randn(32, 3, 6, 6)
    with torch.no_grad(), importance.observe(model):
        model(x)
    with torch.no_grad():
        before = model[:3](x)
        reference = model[3](
            torch.where(
                torch.isin(torch.arange(8), torch.tensor(GONE)).view(1, 8, 1, 1), before.mean((0, 2, 3), True), before
            )
        )  # the removed channels replaced by their means
        graph = build_graph(model, x[:1])
        group = graph.get_pruning_group(model[0], graph.get_pruner_of_module(model[0]).prune_out_channels, GONE)
        fold_means(graph, importance.evidence(group))
        group.prune()
        torch.testing.assert_close(model(x), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ([nn.Conv2d(8, 5, 3, bias=False)], "neither a bias nor a BatchNorm"),
        ([nn.Conv2d(8, 5, 3, bias=False), nn.ReLU(), nn.BatchNorm2d(5)], "neither a bias nor a BatchNorm"),
        (
            [nn.Conv2d(8, 5, 3, bias=False), nn.BatchNorm2d(5, track_running_stats=False)],
            "neither a bias nor a BatchNorm",
        ),
        ([nn.ConvTranspose2d(8, 5, 3, stride=2)], "strided transposed"),
    ],
)
def test_no_place_for_a_mean_is_told(layers: list[nn.Module], why: str) -> None:
    """And nothing changes."""
    model = _head(*layers)
    importance = DyingNeuronImportance()
    with torch.no_grad(), importance.observe(model):
        model(torch.randn(4, 3, 6, 6))
    before = copy.deepcopy(model.state_dict())
    graph = build_graph(model, torch.randn(1, 3, 6, 6))
    group = graph.get_pruning_group(model[0], graph.get_pruner_of_module(model[0]).prune_out_channels, GONE)
    done = fold_means(graph, importance.evidence(group))
    assert [exact for _, _, exact in done] == [False]
    assert why in done[0][1]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_transposed_convolution_inside() -> None:
    """Stride 1: exact inside, as each output position sums all taps there; reported as not exact."""
    model = _head(nn.ConvTranspose2d(8, 6, 3, groups=1, padding=1))
    _constant_channels(model, 0.7)
    before, after, done = _fold_and_prune(model, torch.randn(8, 3, 6, 6), GONE)
    assert (before - after)[:, :, 1:-1, 1:-1].abs().max() <= 1e-6 * before.abs().max()
    assert done == [("ConvTranspose2d", "bias", False)]


@pytest.mark.parametrize("weights", [True, False])
def test_a_batchnorm_given_other_statistics_does_as_told(weights: bool) -> None:
    """Its own statistics where it has weights to make good for them; else a mean that gives the shift."""
    generator = torch.Generator().manual_seed(0)
    mean, variance, shift, scale = (torch.rand(4, generator=generator).double() + 0.5 for _ in range(4))
    norm, y = nn.BatchNorm2d(4, affine=weights).eval(), torch.randn(8, 4, 5, 5, generator=generator)
    variance[2] = 0.0
    if not weights:
        scale = affine(norm)[0]
    with torch.no_grad():
        assign_affine(norm, scale, shift, mean, variance)
    expected = scale[:, None, None] * y.double() + shift[:, None, None]
    torch.testing.assert_close(norm(y).double(), expected, rtol=1e-5, atol=1e-5)
    if weights:
        torch.testing.assert_close(norm.running_mean.double(), mean)
        torch.testing.assert_close(norm.running_var.double(), variance)
    else:
        assert torch.equal(norm.running_var, torch.ones(4))
