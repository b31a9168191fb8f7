"""Second moments of what layers read, against NumPy; they merge, follow and survive like every other statistic."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.activities import read
from helpers.networks import images, make
from torch import nn

from dnr_plugin.network.graph import build_graph
from dnr_plugin.network.kinds import consumer
from dnr_plugin.observation import moments as moments_module
from dnr_plugin.observation.moments import BLOCK, MAX_FEATURES, MAX_PATCH, BlockMoments, Moments, moments_of
from dnr_plugin.observation.observer import Observer
from dnr_plugin.scoring.importance import DyingNeuronImportance

ROUNDING = {"rtol": 1e-5, "atol": 1e-4}  # of sums of float32 products in another order
SHAPES: dict[str, Any] = {
    "patches": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (6, 3, 7, 5)),
    "pointwise": (nn.Conv2d(3, 4, 1), (6, 3, 4, 5)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3), (6, 3, 4, 5)),
    "linear": (nn.Linear(3, 4), (6, 3)),
    "tokens": (nn.Linear(3, 4), (6, 5, 3)),
    "no batch": (nn.Conv2d(3, 4, 3), (3, 6, 6)),
}


def rows_of(module: nn.Module, a: torch.Tensor) -> np.ndarray:
    """Everything that the layer reads, by positions of its outputs or its inputs."""
    if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
        a = a if a.dim() == 4 else a[None]
        return consumer(module).rows(a, torch.arange(int(np.prod(consumer(module).output_size(a))))).double().numpy()
    found = a.movedim(1, -1) if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) else a
    return found.reshape(-1, 3).double().numpy()


@pytest.mark.parametrize("name", ["patches", "pointwise", "linear", "tokens"])
def test_products_are_not_rounded_under_autocast(name: str) -> None:
    """What a layer reads in float32 goes into sums of at least that, whatever the layer itself computes in."""
    module, shape = SHAPES[name]
    a = torch.randn(64, *shape[1:], generator=torch.Generator().manual_seed(0))
    sums = []
    for enabled in (False, True):
        with (
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16, enabled=enabled),
            Observer(nn.Sequential(module), moments=True) as observer,
        ):
            for batch in a.split(16):
                observer.model(batch)
        moments = observer.activities["0"].moments
        assert moments is not None
        sums.append(moments.blocks[0].sums)
    assert torch.equal(*sums)


@pytest.mark.parametrize("name", SHAPES)
def test_moments_equal_numpy(name: str) -> None:
    """Of all positions where these are few; batches go into two halves in turn."""
    module, shape = SHAPES[name]
    moments = Moments(3, consumer(module).features(MAX_PATCH))
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(shape, generator=generator) + 0.5 for _ in range(3)]
    for a in batches:
        moments.update(module, a)
    read = [rows_of(module, a) for a in batches]
    for half, x in ((None, np.concatenate(read)), (0, np.concatenate(read[::2])), (1, read[1])):
        mean, covariance = moments.mean_and_covariance(half)
        assert mean.dtype == covariance.dtype == torch.float64
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(covariance, np.cov(x.T, bias=True), rtol=1e-4, atol=1e-5)
    assert moments.batches == 3
    assert moments.rows == sum(map(len, read))
    assert moments.channels == 3


def test_each_batch_adds_a_bounded_number_of_rows() -> None:
    """512 of a small one, 16 of each sample, 2048 of a large one, and then fewer samples; never none."""
    module = nn.Conv2d(1, 2, 3, padding=1)
    for shape, expected in (
        ((2, 1, 64, 64), 512), ((5000, 1, 3, 3), 1667), ((3, 1, 40, 40), 510), ((50, 1, 9, 9), 800),
        ((250, 1, 9, 9), 2000), ((1, 1, 1, 1), 1),
    ):  # fmt: skip
        moments = Moments(1, 9)
        moments.update(module, torch.randn(shape))
        assert moments.rows == expected
    linear = Moments(2, 1)
    linear.update(nn.Linear(2, 2), torch.randn(10000, 2))
    assert linear.rows == 2000


@pytest.mark.parametrize(("least", "full"), [(1, 2), (2000, 3)])
def test_where_many_rows_were_read_fewer_are_added(monkeypatch: pytest.MonkeyPatch, least: int, full: int) -> None:
    """An eighth, once there are 16 for each input and enough in all; also of sums that were saved or merged."""
    monkeypatch.setattr(moments_module, "_LEAST", least)
    module, moments, found = nn.Conv2d(80, 2, 1), Moments(80, 1), []
    batches = torch.randn(6, 50, 80, 6, 6, generator=torch.Generator().manual_seed(0))
    for a in batches:
        before = moments.rows
        moments.update(module, a)
        found.append(moments.rows - before)
    assert found == [*[800] * full, *[100] * (6 - full)]
    again, other = Moments(80, 1), Moments(80, 1)
    again.load_state_dict(moments.state_dict())
    other.update(module, batches[0])
    for later in (again, moments.merged(other), moments.kept(torch.arange(80))):
        before = later.rows
        later.update(module, batches[0])
        assert later.rows - before == 100
    mean, covariance = moments.mean_and_covariance()
    np.testing.assert_allclose(mean, np.zeros(80), atol=0.1)
    np.testing.assert_allclose(covariance, np.eye(80), atol=0.2)


def test_the_rows_read_are_a_fair_sample() -> None:
    """Large images give the moments of all their positions, up to chance."""
    module, moments = nn.Conv2d(2, 2, 3, padding=1), Moments(2, 9)
    generator = torch.Generator().manual_seed(0)
    row = torch.linspace(-1, 1, 40).expand(2, 40, 40)  # a gradient: a corner alone would give another mean
    read = []
    for _ in range(16):
        a = row + torch.randn(4, 2, 40, 40, generator=generator)
        moments.update(module, a)
        read.append(rows_of(module, a))
    x = np.concatenate(read)
    mean, covariance = moments.mean_and_covariance()
    assert moments.rows < len(x) / 3
    np.testing.assert_allclose(mean, x.mean(0), atol=0.05)
    np.testing.assert_allclose(covariance, np.cov(x.T, bias=True), atol=0.05)


def test_wide_moments_are_symmetric_whenever_they_are_read() -> None:
    """Between batches, too."""
    module, moments, x = nn.Linear(700, 2), Moments(700, 1), torch.zeros(0, 701)
    for number, a in enumerate(torch.randn(3, 40, 700, generator=torch.Generator().manual_seed(0))):
        moments.update(module, a)
        x = torch.cat([x, F.pad(a, (0, 1), value=1.0)])
        if number != 1:
            torch.testing.assert_close(moments.sums.sum(0), x.T.double() @ x.double(), **ROUNDING)


class _Branches(nn.Module):
    """Two layers read one tensor, a third another one; on some calls the second does, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.c = (nn.Linear(5, 5) for _ in range(4))
        self.apart = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return self.a(x) + self.b(x.flip(0) + 1.0 if self.apart else x) + self.c(2 * x)


@pytest.mark.parametrize("again", [False, True])
def test_layers_that_read_the_same_share_memory(again: bool) -> None:
    """And are told apart as soon as they read something else, also in a later context."""
    model, batches = _Branches(), torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    watching = Observer(model, moments=True)
    with torch.no_grad(), watching:
        model(batches[0])
    a, b, c = (watching.activities[name].moments for name in "abc")
    assert a.sums.data_ptr() == b.sums.data_ptr() != c.sums.data_ptr()
    if not again:
        return
    model.apart = True
    with torch.no_grad(), watching:
        model(batches[1])
    x = model.first(batches.detach()).relu()
    read = {"a": x, "b": torch.stack([x[0], x[1].flip(0) + 1.0]), "c": 2 * x}
    for name, values in read.items():
        rows = F.pad(values.detach().flatten(0, 1), (0, 1), value=1.0).double()
        torch.testing.assert_close(watching.activities[name].moments.sums.sum(0), rows.T @ rows, **ROUNDING)


def test_two_merged_are_as_one() -> None:
    one, other, both = read(0, 1), read(2, 3), read(0, 1, 2, 3)
    merged = one.merged(other)
    torch.testing.assert_close(merged.sums, both.sums, **ROUNDING)
    assert merged.batches == both.batches == 4
    assert (one.batches, one.rows, other.rows) == (2, 288, 288)


@pytest.mark.parametrize("each", [1, 9])
def test_kept_channels_are_as_if_the_others_had_never_been(each: int) -> None:
    kernel = 3 if each > 1 else 1
    module, small = nn.Conv2d(5, 4, kernel), nn.Conv2d(2, 4, kernel)
    whole, part = Moments(5, each), Moments(2, each)
    for a in torch.randn(3, 4, 5, 6, 6, generator=torch.Generator().manual_seed(0)):
        whole.update(module, a)
        part.update(small, a[:, [4, 1]])
    kept = whole.kept(torch.tensor([4, 1]))
    torch.testing.assert_close(kept.sums, part.sums, **ROUNDING)
    assert (kept.channels, kept.rows, whole.channels) == (2, part.rows, 5)


def test_a_state_is_taken_and_goes_on() -> None:
    """Also where reading goes on after it was taken, which must not change it."""
    module, first = nn.Conv2d(3, 4, 3), Moments(3, 9)
    batches = torch.randn(3, 4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    first.update(module, batches[0])
    state = first.state_dict()
    second = Moments(3, 9)
    taken = state["sums"].clone()
    for a in batches[1:]:
        first.update(module, a)
    assert torch.equal(state["sums"], taken)
    second.load_state_dict(state)
    for a in batches[1:]:
        second.update(module, a)
    assert torch.equal(first.sums, second.sums)
    assert (first.batches, second.batches) == (3, 3)


def test_observers_gather_moments_only_where_asked_and_affordable() -> None:
    model = make("plain")
    for wanted in (True, False):
        observer = Observer(model, moments=wanted)
        with torch.no_grad(), observer:
            model(images())
        assert all((a.moments is not None) == wanted for a in observer.activities.values())
    observer = Observer(model, moments=True)
    with torch.no_grad(), observer:
        model(images())
    assert {name: a.moments.features for name, a in observer.activities.items()} == {"a": 9, "b": 9, "c": 9, "fc": 1}
    wide = nn.Sequential(nn.Linear(2, MAX_FEATURES + 1), nn.ReLU(), nn.Linear(MAX_FEATURES + 1, 2))
    observer = Observer(wide, moments=True)
    with torch.no_grad(), observer:
        wide(torch.randn(4, 2))
    wider = observer.activities["2"].moments
    assert isinstance(wider, BlockMoments)
    sizes = [block.channels for block in wider.blocks]
    assert sum(sizes) == MAX_FEATURES + 1
    assert max(sizes) <= min(BLOCK, min(sizes) + 1)
    grouped = moments_of(nn.Conv2d(MAX_FEATURES + 2, 4, 1, groups=2), "cpu")
    assert [block.channels for block in grouped.blocks] == [MAX_FEATURES // 2 + 1] * 2
    assert moments_of(nn.Conv2d(2 * MAX_FEATURES + 2, 4, 1, groups=2), "cpu") is None
    assert consumer(nn.Conv2d(MAX_PATCH // 9, 2, 3)).features(MAX_PATCH) == 9
    assert consumer(nn.Conv2d(MAX_PATCH // 9 + 1, 2, 3)).features(MAX_PATCH) == 1
    assert consumer(nn.ConvTranspose2d(3, 2, 3)).features(MAX_PATCH) == 1


def _blocked(monkeypatch: pytest.MonkeyPatch, most: int, block: int) -> None:
    monkeypatch.setattr(moments_module, "MAX_FEATURES", most)
    monkeypatch.setattr(moments_module, "BLOCK", block)


def test_blocks_are_the_diagonal_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also merged, kept, and read from a state."""
    _blocked(monkeypatch, 10, 6)
    module, batches = nn.Linear(17, 2), torch.randn(4, 30, 17, generator=torch.Generator().manual_seed(0))
    whole, blocks, first, second = Moments(17, 1), *(moments_of(module, "cpu") for _ in range(3))
    for number, a in enumerate(batches):
        for moments in (whole, blocks, second if number % 2 else first):
            moments.update(module, a)
    assert isinstance(blocks, BlockMoments)
    assert [block.channels for block in blocks.blocks] == [5, 6, 6]
    again = moments_of(module, "cpu")
    again.load_state_dict(copy.deepcopy(blocks.state_dict()))
    kept, some = torch.tensor([0, 4, 11, 16]), whole.kept(torch.tensor([0, 4, 11, 16]))
    start = 0
    merged = first.merged(second)
    for block, other, both in zip(blocks.blocks, again.blocks, merged.blocks, strict=True):
        inside = slice(start, start + block.channels)
        _, covariance = whole.mean_and_covariance()
        torch.testing.assert_close(block.mean_and_covariance()[1], covariance[inside, inside], **ROUNDING)
        torch.testing.assert_close(both.sums.sum(0), block.sums.sum(0), **ROUNDING)
        assert torch.equal(other.sums, block.sums)
        assert block.rows == whole.rows
        start += block.channels
    parts = blocks.kept(kept).blocks
    assert [part.channels for part in parts] == [2, 2]
    for part, inside in zip(parts, (slice(0, 2), slice(2, 4)), strict=True):
        torch.testing.assert_close(part.sums[:, :-1, :-1], some.sums[:, inside, inside], **ROUNDING)


def _wide(monkeypatch: pytest.MonkeyPatch, model: nn.Module, x: torch.Tensor, block: int | None) -> torch.Tensor:
    """Scores of the neurons of layer 0, with blocks of so many inputs, or all as one."""
    with monkeypatch.context() as patch:
        if block is not None:
            _blocked(patch, block, block)
        importance = DyingNeuronImportance("redundancy", share=1.0)
        with torch.no_grad(), importance.observe(model):
            model(x)
        graph = build_graph(model, x)
        prune = graph.get_pruner_of_module(model[0]).prune_out_channels
        return importance(graph.get_pruning_group(model[0], prune, [*range(model[0].out_channels)]))


def test_wide_layers_are_scored_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neurons with channels in two blocks, too. A twin in its block costs next to nothing; one in another is not seen.

    Twelve neurons of nine channels each.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(108, 5)).eval()
    with torch.no_grad():
        for neuron, twin in ((1, 0), (11, 2)):
            model[0].weight[neuron], model[0].bias[neuron] = model[0].weight[twin], model[0].bias[twin]
    x = torch.randn(400, 2, 3, 3)
    whole, blocks = _wide(monkeypatch, model, x, None), _wide(monkeypatch, model, x, 40)
    assert torch.isfinite(blocks).all()
    for twins in ([0, 1], [2, 11]):
        assert whole[twins].min() < 1e-3 * whole.median()
    assert blocks[[0, 1]].min() < 1e-3 * blocks.median()
    assert blocks[[2, 11]].min() > 0.1 * blocks.median()
    rest = [3, 4, 5, 6, 7, 8, 9, 10]
    assert torch.corrcoef(torch.stack([whole[rest].log(), blocks[rest].log()]).float())[0, 1] > 0.5


def test_a_group_that_lies_in_one_block_of_a_concatenation_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the whole does where the blocks are the branches, which know nothing of each other."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = nn.Conv2d(2, 6, 1), nn.Conv2d(2, 6, 1), nn.Conv2d(12, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.cat([self.a(x[:, :2]).relu(), self.b(x[:, 2:]).relu()], 1))

    torch.manual_seed(0)
    model, x = Two().eval(), torch.randn(3000, 4, 2, 2)  # independent branches
    scores = {}
    for block in (None, 6):
        with monkeypatch.context() as patch:
            if block is not None:
                _blocked(patch, 8, block)
            importance = DyingNeuronImportance("redundancy", share=1.0)
            with torch.no_grad(), importance.observe(model):
                model(x)
            graph = build_graph(model, x[:2])
            prune = graph.get_pruner_of_module(model.b).prune_out_channels
            scores[block] = importance(graph.get_pruning_group(model.b, prune, [*range(6)]))
    torch.testing.assert_close(scores[6], scores[None], rtol=0.1, atol=1e-3)


def test_groups_of_a_wide_convolution_are_scored_as_those_of_a_narrow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their blocks are the groups, between which nothing is to be known."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 12, 3), nn.ReLU(), nn.Conv2d(12, 9, 1, groups=3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 4)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(64, 2, 3, 3)
    whole, blocks = _wide(monkeypatch, model, x, None), _wide(monkeypatch, model, x, 10)
    torch.testing.assert_close(blocks, whole)


def test_too_wide_layers_are_named_by_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    _blocked(monkeypatch, 10, 6)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 11), nn.ReLU(), nn.Linear(11, 2))
    importance, x = DyingNeuronImportance("redundancy", share=1.0), torch.randn(8, 3)
    with torch.no_grad(), importance.observe(model):
        model(x)
    graph = build_graph(model, x)
    prune = graph.get_pruner_of_module(model[2]).prune_out_channels
    before = model[4].weight.clone()
    group = graph.get_pruning_group(model[2], prune, [0, 5])
    assert importance.repair(group) == {"4": "it reads 11 channels, too many for second moments"}
    assert torch.equal(model[4].weight, before)


@pytest.mark.parametrize("score", ["redundancy", "variation"])
@pytest.mark.parametrize("spread", [1e-2, 0.0])
def test_means_that_are_large_against_variances_break_nothing(spread: float, score: str) -> None:
    """Rounding makes the covariance of such inputs indefinite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.mul_(spread)
        model[0].bias.fill_(1e3)
    importance = DyingNeuronImportance(score)
    x = torch.randn(4, 64, 6)
    with torch.no_grad(), importance.observe(model):
        for batch in x:
            model(batch)
    graph = build_graph(model, x[0])
    prune = graph.get_pruner_of_module(model[0]).prune_out_channels
    found = importance(graph.get_pruning_group(model[0], prune, [*range(8)]))
    assert torch.isfinite(found).all()
    before = copy.deepcopy(model)
    group = graph.get_pruning_group(model[0], prune, [1, 6])
    assert importance.repair(group) == {}
    group.prune()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    torch.testing.assert_close(model(x[0]), before(x[0]), rtol=1e-3, atol=0.1)


def test_the_inverse_is_of_what_was_read_so_far() -> None:
    """Remembered while nothing changes, and never of other sums than these."""
    module, moments = nn.Conv2d(3, 4, 1), Moments(3, 1)
    batches = torch.randn(3, 4, 3, 6, 6, generator=torch.Generator().manual_seed(0))

    def right(moments: Moments, damping: float = 1e-4) -> bool:
        covariance = moments.mean_and_covariance()[1]
        covariance.diagonal().add_(damping * covariance.diagonal().mean())
        return torch.allclose(moments.inverse(damping) @ covariance, torch.eye(len(covariance)).double(), atol=1e-6)

    moments.update(module, batches[0])
    assert right(moments)
    assert moments.inverse(1e-4) is moments.inverse(1e-4)
    assert right(moments, 1e-2)
    moments.update(module, batches[1])
    assert right(moments)
    assert right(moments.kept(torch.tensor([2, 0])))
    assert right(moments.merged(moments))
    other = Moments(3, 1)
    other.update(module, batches[2])
    other.inverse(1e-4)
    other.load_state_dict(moments.state_dict())
    assert right(other)
