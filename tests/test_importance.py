"""Scores against NumPy, and the traps of Torch-Pruning's pruners, each set for a naive criterion first."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from helpers import NETS, Grouped, Plain, images, make
from test_activity import numpy_octave
from torch import Tensor, nn

from dnr_plugin.network import kinds
from dnr_plugin.network.dependencies import build_graph
from dnr_plugin.scoring.importance import DyingNeuronImportance
from dnr_plugin.scoring.scores import SCORES

pytestmark = pytest.mark.filterwarnings("ignore:.*is left alone.*")

EIGHT = [[k] for k in range(8)]
# root layers of a group -> consumer -> the input channels that carry neuron 0, 1, ...; by hand
USES: dict[str, dict[tuple[str, ...], dict[str, list[list[int]]]]] = {
    "plain": {
        ("a",): {"b": EIGHT},
        ("b",): {"c": EIGHT},
        ("c",): {"fc": [[4 * k, 4 * k + 1, 4 * k + 2, 4 * k + 3] for k in range(8)]},
    },
    "residual": {
        ("stem", "a2", "b2"): {"a1": EIGHT, "b1": EIGHT, "fc": EIGHT},
        ("a1",): {"a2": EIGHT},
        ("b1",): {"b2": EIGHT},
    },
    "concat": {
        ("stem",): {"d1": EIGHT[:6], "d2": EIGHT[:6], "fc": [[4 + k] for k in range(6)]},
        ("d1",): {"d2": [[6 + k] for k in range(4)], "fc": [[10 + k] for k in range(4)]},
        ("d2",): {"fc": EIGHT[:4]},
    },
    "grouped": {
        ("a",): {"g": [[k] for k in range(12)]},
        ("g",): {"b": [[k] for k in range(12)]},
        ("b",): {"fc": EIGHT},
    },
    "mobile": {
        ("expand", "depthwise"): {"project": [[k] for k in range(12)]},
        ("stem", "project"): {"expand": EIGHT[:6], "fc": EIGHT[:6]},
    },
}
BLOCKS = {("grouped", "a"): 3, ("grouped", "g"): 3}


def observed(model: nn.Module, x: Tensor | None = None, **settings: Any) -> DyingNeuronImportance:
    importance = DyingNeuronImportance(**{"score": "contribution", "share": 1.0, **settings})
    with torch.no_grad(), importance.observe(model):
        for batch in (images() if x is None else x).split(8):  # of which second moments read all positions
            model(batch)
    return importance


def pruner(
    model: nn.Module, importance: Any, ratio: float = 0.5, kind: Any = tp.pruner.BasePruner, **options: Any
) -> Any:
    """A pruner with dicts of its own, which Torch-Pruning would share between all pruners."""
    options = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}, **options}
    return kind(model, images(1), importance, pruning_ratio=ratio, **options)


def groups(model: nn.Module, x: Any = None) -> Iterator[tuple[str, tp.dependency.Group]]:
    names = {module: name for name, module in model.named_modules()}
    for group in build_graph(model, images(1) if x is None else x).get_all_groups():
        yield names[group[0].dep.target.module], group


def widths(model: nn.Module) -> dict[str, int]:
    return {
        name: m.out_channels if isinstance(m, nn.Conv2d) else m.out_features
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    }


def inputs(model: nn.Module, x: Tensor) -> dict[str, np.ndarray]:
    """What reaches each layer, float64, shape [N, C, P], by hooks of this test's own."""
    seen: dict[str, np.ndarray] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any) -> None:
            a = args[0].detach().clone().double()
            seen[name] = a.reshape(a.shape[0], a.shape[1], -1).numpy()

        return record

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in model.named_modules() if n in widths(model)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


def numpy_norms(module: nn.Module) -> np.ndarray:
    """Norm of all weights that multiply each input channel, one by one."""
    weight = module.weight.detach().double().numpy()
    if not isinstance(module, nn.Conv2d):
        return np.sqrt((weight**2).sum(0))
    found = []
    for channel in range(module.in_channels):
        inside = module.in_channels // module.groups
        outside = module.out_channels // module.groups
        group = channel // inside
        found.append(np.sqrt((weight[group * outside : (group + 1) * outside, channel % inside] ** 2).sum()))
    return np.array(found)


def numpy_score(score: str, a: np.ndarray, module: nn.Module) -> np.ndarray:
    """The formula of the docstring's table, per channel of one consumer."""
    flat = a.transpose(1, 0, 2).reshape(a.shape[1], -1)
    if score == "contribution":
        return np.abs(flat).mean(1) * numpy_norms(module)
    if score == "variation":
        return flat.std(1) * numpy_norms(module)
    if score == "magnitude":
        return np.abs(flat).mean(1)
    if score == "dormancy":
        return np.abs(flat).mean(1) / np.abs(flat).mean()
    if score == "firing_rate":
        return (flat > 0).mean(1)
    if score == "sample_activity":
        return (a.max(2) > 0).mean(0)
    bins = {"entropy": 16, "on_off_entropy": 2}[score]
    found = []
    for row in flat:
        p = np.bincount([numpy_octave(v, 0.0, bins) for v in row], minlength=bins) / len(row)
        found.append(-sum(q * np.log2(q) for q in p if q > 0))
    return np.array(found)


def numpy_readers(a: np.ndarray, module: nn.Module, shape: tuple[int, ...]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each group of a consumer, samples of what its kernel covers, and its weights in units of its own outputs."""
    weight = module.weight.detach().double().flatten(1).numpy()
    if isinstance(module, nn.Conv2d):
        x = torch.from_numpy(a).view(shape)
        x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        x = x.transpose(1, 2).flatten(0, 1).numpy()
    else:
        x = a.transpose(0, 2, 1).reshape(-1, a.shape[1])
    for part, own in zip(np.split(x, g := getattr(module, "groups", 1), 1), np.split(weight, g), strict=True):
        second, samples = (part**2).mean(), part - part.mean(0)
        damping = np.sqrt(len(part) * (1e-4 * samples.var(0).mean() + (1 + 1e-4) * 1e-6 * second))
        damped = np.concatenate([samples, damping * np.eye(part.shape[1])]) / np.sqrt(len(part))
        spread = np.sqrt(((samples @ own.T) ** 2).mean())
        yield np.linalg.qr(damped)[1], own / spread


def numpy_redundancy(name: str, root: str, model: nn.Module, seen: dict[str, np.ndarray]) -> np.ndarray:
    """The cheapest neuron goes, again and again; each cost is a least-squares residual computed from scratch."""
    consumers = next(found for roots, found in USES[name].items() if root in roots)
    readers = []
    for consumer, channels in consumers.items():
        module = model.get_submodule(consumer)
        each = module.kernel_size[0] ** 2 if isinstance(module, nn.Conv2d) else 1
        side = int(seen[consumer].shape[2] ** 0.5)
        shape = (*seen[consumer].shape[:2], side, side)
        parts = [*numpy_readers(seen[consumer], module, shape)]
        for number, (x, w) in enumerate(parts):
            first = number * x.shape[1]
            columns = [
                [c - first for k in own for c in range(k * each, (k + 1) * each) if 0 <= c - first < x.shape[1]]
                for own in channels
            ]
            readers.append((x, w, columns))
    n = len(next(iter(consumers.values())))

    def lost(gone: list[int]) -> float:
        total = 0.0
        for x, w, columns in readers:
            out = [c for k in gone for c in columns[k]]
            stays = np.setdiff1d(np.arange(x.shape[1]), out)
            missing = x[:, out] @ w[:, out].T
            total += ((missing - x[:, stays] @ np.linalg.lstsq(x[:, stays], missing, rcond=None)[0]) ** 2).sum()
        return total

    gone: list[int] = []
    found, before = np.zeros(n), 0.0
    while len(gone) < n:
        costs = {k: lost([*gone, k]) for k in range(n) if k not in gone}
        cheapest = min(costs, key=lambda k: costs[k])
        found[cheapest] = max([costs[cheapest] - before, *found[gone]])
        before = costs[cheapest]
        gone.append(cheapest)
    return found


def numpy_scores(score: str, name: str, root: str, model: nn.Module, seen: dict[str, np.ndarray]) -> np.ndarray:
    """One score per neuron of a group, over all its consumers."""
    if score == "redundancy":
        return numpy_redundancy(name, root, model, seen)
    consumers = next(found for roots, found in USES[name].items() if root in roots)
    per_consumer = []
    for consumer, channels in consumers.items():
        value = numpy_score(score, seen[consumer], model.get_submodule(consumer))
        inside = np.sum if score in ("contribution", "variation") else np.mean
        per_consumer.append([inside(value[c]) for c in channels])
    return np.sum(per_consumer, 0) if score in ("contribution", "variation") else np.max(per_consumer, 0)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("score", SCORES)
def test_every_score_equals_numpy(score: str, name: str) -> None:
    """Sum or maximum over consumers, sum or mean over a flatten; all but the one channel (per block) that must stay."""
    model, x = make(name), images(96 if score == "redundancy" else 16)
    importance, seen = observed(model, x, score=score, normalizer=None), inputs(model, x)
    scored = 0
    for root, group in groups(model):
        if root == "fc":
            assert importance(group) is None
            continue
        found, expected = importance(group), numpy_scores(score, name, root, model, seen)
        ours = found.numpy() < 1e29
        assert (~ours).sum() == BLOCKS.get((name, root), 1)
        rounding = {"rtol": 1e-5, "atol": 1e-12}
        if score == "redundancy":  # of float32 products, next to its damping; the dead are judged by themselves
            rounding, ours = {"rtol": 1e-2, "atol": 1e-3}, ours & (found.numpy() > 1e-29)
        np.testing.assert_allclose(found.numpy()[ours], expected[ours], **rounding)
        scored += 1
    assert scored == len(USES[name])


def test_a_score_by_hand() -> None:
    """Two units that can be followed by pencil: |a| is (1, 0), (3, 2), weights (3, 4) and (0, 2)."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.eye(2)
    model[2].weight.data = torch.tensor([[3.0, 0.0], [4.0, 2.0]])
    x = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    expected = {"contribution": [2 * 5, 1 * 2], "magnitude": [2, 1], "firing_rate": [1, 0.5], "variation": [5, 2]}
    # both vary alike: without the one that weighs less nothing is lost but by damping, a ten-thousandth, which both
    # have; outputs vary by 9 and 36
    expected["redundancy"] = [2, 2e-4 * 4 / 22.5]
    expected |= {"dormancy": [4 / 3, 2 / 3], "on_off_entropy": [0, 1], "sample_activity": [1, 0.5], "entropy": [1, 1]}
    for score in SCORES:
        importance = observed(model, x, score=score, normalizer=None, max_pruning_ratio=1.0)
        group = next(g for root, g in groups(model, x) if root == "0")
        found = importance(group)
        kept = int(np.argmax(expected[score])) if score != "entropy" else int(found.argmax())
        assert found[kept] > 1e29
        rel = 0.1 if score == "redundancy" else 1e-6
        assert float(found[1 - kept]) == pytest.approx(max(expected[score][1 - kept], 1e-20), rel=rel), score


def test_the_docstring_lists_every_score() -> None:
    table = DyingNeuronImportance.__doc__ or ""
    rows = {
        line.split()[0]: line.split()[-1]
        for line in table.splitlines()
        if line.split()[:1] and line.split()[-1] in ("sum", "max")
    }
    assert rows == {name: score.across for name, score in SCORES.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "contributon"}, "did you mean 'contribution'"),
        ({"normalizer": "median"}, "normalizer"),
        ({"score": "redundancy", "moments": False}, "moments: expected True for score 'redundancy'"),
        ({"max_pruning_ratio": 0.0}, "max_pruning_ratio"),
        ({"max_pruning_ratio": 1.5}, "max_pruning_ratio"),
        ({"min_channels": 0}, "min_channels"),
        ({"threshold": -1.0}, "threshold"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DyingNeuronImportance(**arguments)


def test_redundancy_compares_between_layers_as_it_is() -> None:
    for score, automatic in (("redundancy", None), ("variation", "mean")):
        model = make("plain")
        group = dict(groups(model))["b"]
        found, expected = (observed(model, score=score, normalizer=n)(group) for n in ("auto", automatic))
        assert torch.equal(found, expected)


def kill(module: nn.Module, channels: list[int]) -> None:
    """Makes ReLU units that never fire."""
    module.weight.data[channels] = 0.0
    module.bias.data[channels] = -1.0


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(6, 4, 3),
        nn.Conv2d(6, 4, 3, groups=2),
        nn.Conv1d(6, 4, 3),
        nn.ConvTranspose2d(6, 4, 3),
        nn.ConvTranspose2d(6, 4, 3, groups=2),
        nn.Linear(6, 4),
        nn.MultiheadAttention(6, 2),
        nn.Linear(6, 4).bfloat16(),
    ],
    ids=str,
)
def test_weight_norms_are_those_of_the_weights_that_read_a_channel(module: nn.Module) -> None:
    """Without looking at layouts: all weights that get a gradient when only this channel is not zero."""
    found = kinds.consumer(module).norms()
    attention = isinstance(module, nn.MultiheadAttention)
    weight = module.in_proj_weight if attention else module.weight
    shape = (6,) if isinstance(module, nn.Linear) else (6, *[5] * len(getattr(module, "kernel_size", "")))
    for channel in range(6):
        x = torch.zeros(shape, dtype=weight.dtype)
        x[channel] = 1.0
        out = F.linear(x, weight) if attention else module(x if x.dim() == 1 else x[None])
        out.sum().backward()  # not of magnitudes: an output of 0, as happens in 16 bits, has no gradient there
        read = weight.detach()[weight.grad != 0].double()
        weight.grad = None
        assert float(found[channel]) == pytest.approx(float(read.square().sum().sqrt()), rel=1e-5)


@pytest.mark.parametrize("normalizer", ["mean", "max", None])
@pytest.mark.parametrize("score", SCORES)
def test_dead_neurons_come_first(score: str, normalizer: str | None) -> None:
    model = make("plain")
    kill(model.b, [2, 5])
    kill(model.c, [1, 6, 7])
    importance = observed(model, score=score, normalizer=normalizer)
    found = {root: importance(group) for root, group in groups(model)}
    seen = inputs(model, images())
    never = {"a": seen["b"], "b": seen["c"], "c": seen["fc"].reshape(8, 8, 4)}
    dead = {root: set(np.flatnonzero(a.max((0, 2)) <= 0).tolist()) for root, a in never.items()}
    assert dead["b"] >= {2, 5}
    assert dead["c"] >= {1, 6, 7}
    highest_dead, lowest_live = 0.0, float("inf")
    for root, gone in dead.items():
        assert set(found[root].argsort()[: len(gone)].tolist()) == gone
        highest_dead = max([highest_dead, *found[root][list(gone)].tolist()])
        lowest_live = min([lowest_live, *found[root][[k for k in range(8) if k not in gone]].tolist()])
    assert highest_dead < lowest_live


def test_dead_at_one_consumer_only_is_not_dead() -> None:
    """A residual stream's neuron that is silent behind the stem, but not behind the first block."""
    model = make("residual")
    kill(model.stem, [3])
    importance = observed(model)
    group = next(g for _, g in groups(model) if len(g[0].idxs) == 8 and importance.evidence(g).__len__() == 3)
    verdict = importance.verdict(group)
    assert not importance.observer.activities["b1"].silent[3]
    assert importance.observer.activities["a1"].zero[3]
    assert not verdict.dead[3]
    kill(model.a2, [3])
    kill(model.b2, [3])
    verdict = observed(model).verdict(next(g for _, g in groups(model) if len(g) == len(group)))
    assert verdict.zero.tolist() == verdict.dead.tolist() == [k == 3 for k in range(8)]


def plant(importance: DyingNeuronImportance, magnitude: Callable[[str, int], Tensor] | float = 1.0) -> None:
    """Replaces what was observed: every channel fires, with a given mean magnitude, 0 for dead ones."""
    for name, activity in importance.observer.activities.items():
        n = activity.channels
        value = magnitude(name, n) if callable(magnitude) else torch.full((n,), magnitude)
        activity.total_magnitude = value.double() * activity.values
        activity.total = activity.total_magnitude.clone()
        activity.total_square = activity.total_magnitude * 2 * value.double()
        live = value > 0
        activity.fired_samples = live * activity.samples
        activity.fired = live * activity.values
        activity.highest, activity.lowest = 2.0 * value, torch.zeros(n)
        activity.histogram = torch.zeros_like(activity.histogram)
        activity.histogram[:, 5] = activity.fired
        activity.histogram[:, 0] = activity.values - activity.fired


@pytest.mark.parametrize("alive", ["tied", "dead", "half"])
@pytest.mark.parametrize("normalizer", ["mean", "max", None])
@pytest.mark.parametrize("name", NETS)
def test_scores_are_finite_positive_and_distinct(name: str, normalizer: str | None, alive: str) -> None:
    """Over the whole network, when everything is tied, everything dead, or half of it; the same each time."""
    model = make(name)
    for score in SCORES:
        importance = observed(model, score=score, normalizer=normalizer)
        for module in model.modules():  # ties in the weights as well
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.data.fill_(0.5)
        plant(
            importance,
            lambda _, n: {"tied": torch.ones(n), "dead": torch.zeros(n), "half": (torch.arange(n) % 2).float()}[alive],
        )
        found = [importance(group) for root, group in groups(model) if root != "fc"]
        again = [importance(group) for root, group in groups(model) if root != "fc"]
        together = torch.cat(found)
        assert torch.equal(together, torch.cat(again))
        assert together.dtype == torch.float64
        assert torch.isfinite(together).all()
        assert (together > 0).all()
        assert len(together.unique()) == len(together)


def test_a_normalizer_that_divides_by_zero_gives_no_nan() -> None:
    """A function of the caller's own, in a layer whose consumer has no weights left."""
    model = make("plain")
    importance = observed(model, normalizer=lambda score: score / score.mean())
    model.c.weight.data.zero_()
    found = importance(dict(groups(model))["b"])
    assert torch.isfinite(found).all()
    assert (found > 0).all()


def test_partial_groups_are_scored_by_their_own_indices() -> None:
    model = make("plain")
    importance = observed(model, normalizer=None)
    whole = importance(dict(groups(model))["c"])
    graph = build_graph(model, images(1))
    part = importance(graph.get_pruning_group(model.c, tp.prune_conv_out_channels, [6, 2, 3]))
    seen = inputs(model, images())
    expected = numpy_scores("contribution", "plain", "c", model, seen)
    assert len(whole) == 8
    np.testing.assert_allclose(part, expected[[6, 2, 3]], rtol=1e-5)


def test_a_live_neuron_of_score_zero_stays_above_the_dead() -> None:
    """One that fired only in samples that the share leaves out, against one that never fired."""
    model = make("plain")
    importance = observed(model, score="magnitude", normalizer=None)
    plant(importance, lambda _, n: (torch.arange(n) > 1).float())
    importance.observer.activities["c"].fired_samples[0] = 1
    found = importance(dict(groups(model))["b"])
    assert found[1] < 1e-6 * found[0] < 1e-6 * found[2:].min()


class Naive(tp.importance.Importance):
    """A criterion as one would write it first: a fixed value for each neuron, by root layer."""

    def __init__(self, model: nn.Module, values: dict[str, list[float]]) -> None:
        self.names, self.values = {m: n for n, m in model.named_modules()}, values

    def __call__(self, group: tp.dependency.Group) -> Tensor | None:
        value = self.values.get(self.names[group[0].dep.target.module])
        return None if value is None else torch.tensor(value)


def planted(model: nn.Module, values: dict[str, list[float]], **settings: Any) -> DyingNeuronImportance:
    """Ours, having seen just these magnitudes of the neurons of `Plain`."""
    importance = observed(model, score="magnitude", normalizer=settings.pop("normalizer", None), **settings)
    consumer = {"b": values["a"], "c": values["b"], "fc": np.repeat(values["c"], 4).tolist(), "a": [1.0] * 3}
    plant(importance, lambda name, n: torch.tensor(consumer[name]))
    return importance


def removed(model: nn.Module) -> dict[str, int]:
    return {name: 8 - width for name, width in widths(model).items() if name != "fc"}


RISING = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]


def test_trap_ties_in_global_mode_remove_exactly_what_was_asked() -> None:
    """7 of 24 tie at zero and 6 are asked: a naive criterion removes 7."""
    values = {"a": [0.0] * 7 + [1.0], "b": RISING, "c": RISING}
    naive, ours = make("plain"), make("plain")
    pruner(naive, Naive(naive, values), 0.25, global_pruning=True, ignored_layers=[naive.fc]).step()
    assert removed(naive) == {"a": 7, "b": 0, "c": 0}
    pruner(ours, planted(ours, values), 0.25, global_pruning=True, ignored_layers=[ours.fc]).step()
    assert removed(ours) == {"a": 6, "b": 0, "c": 0}


@pytest.mark.parametrize("quota", range(1, 21))
def test_trap_ties_everywhere(quota: int) -> None:
    """All 24 neurons alike: naive, all or nothing; ours, as many as asked, until each layer is at its last."""
    values = {"a": [1.0] * 8, "b": [1.0] * 8, "c": [1.0] * 8}
    model = make("plain")
    pruner(model, planted(model, values), quota / 24, global_pruning=True, ignored_layers=[model.fc]).step()
    assert sum(removed(model).values()) == 24 - int(24 * (1 - quota / 24))  # as Torch-Pruning rounds


def test_trap_a_layer_below_the_threshold_is_shrunk_and_not_kept_whole() -> None:
    """All of layer a is below the threshold: a naive criterion leaves it whole, in silence."""
    values = {"a": [0.01 * v for v in RISING], "b": RISING, "c": RISING}
    naive, ours = make("plain"), make("plain")
    pruner(naive, Naive(naive, values), 8 / 24, global_pruning=True, ignored_layers=[naive.fc]).step()
    assert removed(naive) == {"a": 0, "b": 0, "c": 0}
    pruner(ours, planted(ours, values), 8 / 24, global_pruning=True, ignored_layers=[ours.fc]).step()
    assert removed(ours)["a"] == 7
    assert sum(removed(ours).values()) == 8
    ours = make("plain")
    importance = planted(ours, values, min_channels=3)
    pruner(ours, importance, 8 / 24, global_pruning=True, ignored_layers=[ours.fc]).step()
    assert removed(ours)["a"] == 5


@pytest.mark.parametrize("steps", [1, 3])
def test_trap_max_pruning_ratio_is_held_within_a_step(steps: int) -> None:
    values = {"a": [0.01 * v for v in RISING], "b": RISING, "c": RISING}
    naive, ours = make("plain"), make("plain")
    options = {"global_pruning": True, "max_pruning_ratio": 0.5, "iterative_steps": steps}
    step = pruner(naive, Naive(naive, values), 7 / 24, ignored_layers=[naive.fc], **{**options, "iterative_steps": 1})
    step.step()
    assert removed(naive)["a"] == 7  # of at most 4
    step = pruner(ours, planted(ours, values, max_pruning_ratio=0.5), 7 / 24, ignored_layers=[ours.fc], **options)
    for _ in range(steps):
        step.step()
    assert removed(ours)["a"] == 4
    assert sum(removed(ours).values()) == 7


def test_asking_for_more_than_there_is() -> None:
    """No score can stop a pruner from taking what must stay then; a layer is still never emptied."""
    values = {"a": [0.01 * v for v in RISING], "b": RISING, "c": RISING}
    model = make("plain")
    importance = planted(model, values, max_pruning_ratio=0.5)
    pruner(model, importance, 12 / 24, global_pruning=True, ignored_layers=[model.fc]).step()
    assert removed(model) == {"a": 4, "b": 4, "c": 4}  # all there is
    model = make("plain")
    importance = planted(model, values, max_pruning_ratio=0.5)
    pruner(model, importance, 18 / 24, global_pruning=True, ignored_layers=[model.fc]).step()
    assert all(4 <= gone < 8 for gone in removed(model).values())
    assert sum(removed(model).values()) == 18


@pytest.mark.parametrize("normalizer", ["mean", "max"])
def test_trap_a_dead_layer_goes_before_live_ones(normalizer: str) -> None:
    """Torch-Pruning's own normaliser makes NaN of a dead layer, which protects it: live layers pay."""

    class Rate(tp.importance.MagnitudeImportance):
        def __call__(self, group: tp.dependency.Group) -> Tensor | None:
            return None if (value := naive_values(group)) is None else self._normalize(value, "mean")

    values = {"a": RISING, "b": [0.0] * 8, "c": RISING}
    naive, ours = make("plain"), make("plain")
    naive_values = Naive(naive, values)
    pruner(naive, Rate(), 7 / 24, global_pruning=True, ignored_layers=[naive.fc]).step()
    assert removed(naive)["b"] == 0
    assert sum(removed(naive).values()) > 0
    importance = planted(ours, values, normalizer=normalizer)
    assert torch.isfinite(importance(dict(groups(ours))["b"])).all()
    pruner(ours, importance, 7 / 24, global_pruning=True, ignored_layers=[ours.fc]).step()
    assert removed(ours) == {"a": 0, "b": 7, "c": 0}


def test_trap_state_is_not_shared_between_models() -> None:
    """One importance used for two models of the same names gives what a fresh one gives for the second."""

    def result(importance: DyingNeuronImportance, model: nn.Module) -> dict[str, int]:
        with torch.no_grad(), importance.observe(model):
            model(images())
        pruner(model, importance, 0.5, global_pruning=True, ignored_layers=[model.fc]).step()
        model(images())
        return widths(model)

    used = DyingNeuronImportance(max_pruning_ratio=0.5)
    for width, groups_ in ((12, 3), (24, 2), (6, 2)):
        torch.manual_seed(width)
        model = Grouped(width, groups_)
        assert result(used, copy.deepcopy(model)) == result(DyingNeuronImportance(max_pruning_ratio=0.5), model)


# ---- statistics that follow


def tag(model: nn.Module) -> None:
    """Writes the number of each input channel into the weights that read it."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data[:] = torch.arange(module.in_features).float()
        elif isinstance(module, nn.Conv2d):
            number = torch.arange(module.in_channels).view(module.groups, 1, -1, 1, 1).float()
            blocked = module.weight.data.view(module.groups, -1, *module.weight.shape[1:])
            blocked[:] = number


def tags(module: nn.Module) -> list[int]:
    """The original numbers of the input channels that are left."""
    weight = module.weight.data
    if isinstance(module, nn.Linear):
        return weight[0].long().tolist()
    return weight.view(module.groups, -1, *weight.shape[1:])[:, 0, :, 0, 0].flatten().long().tolist()


def in_steps(model: nn.Module, importance: Any, how: str, **options: Any) -> Iterator[None]:
    """Three steps down to half the channels, in different manners."""
    if how == "new pruner":
        for ratio in (1 / 6, 1 / 5, 1 / 4):
            pruner(model, importance, ratio, **options).step()
            yield
        return
    prune = pruner(model, importance, 0.5, iterative_steps=3, **options)
    for _ in range(3):
        if how == "step":
            prune.step()
        else:
            for group in prune.step(interactive=True):
                if how == "interactive":
                    group.prune()
                else:
                    group.prune(idxs=group[0].idxs)
        yield


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("how", ["step", "interactive", "idxs", "new pruner"])
@pytest.mark.parametrize("name", NETS)
def test_statistics_follow_through_three_steps(name: str, how: str, scope: str) -> None:
    """At each step the statistics are the original ones, re-sliced at the channels that the weights say are left.

    And those left at the end are, in local scope, exactly those with the highest planted values.
    """
    model = make(name)
    importance = observed(model, score="magnitude")
    generator = torch.Generator().manual_seed(7)
    plant(importance, lambda _, n: (torch.randperm(n, generator=generator) + 1.0) / n)
    original = copy.deepcopy(importance.observer.activities)
    tag(model)
    before = {n: m for n, m in model.named_modules() if n in original}
    for _ in in_steps(model, importance, how, global_pruning=scope == "global", ignored_layers=[model.fc]):
        for root, group in groups(model):  # scoring makes the statistics follow
            if root != "fc":
                importance(group)
        for consumer, activity in importance.observer.activities.items():
            left = tags(before[consumer])
            assert activity.channels == len(left)
            for statistic in activity.REDUCTIONS:
                assert torch.equal(getattr(activity, statistic), getattr(original[consumer], statistic)[left])
    assert sum(m.weight.shape[1] for m in before.values()) < sum(a.channels for a in original.values())
    model(images())
    if scope == "global" or how == "new pruner":
        return
    for roots, consumers in USES[name].items():
        value = np.max(
            [[float(original[c].mean_magnitude[k].mean()) for k in channels] for c, channels in consumers.items()], 0
        )
        blocks = BLOCKS.get((name, roots[0]), 1)
        size = len(value) // blocks
        best = np.argsort(value.reshape(blocks, size).mean(0), kind="stable")[-int(size * 0.5) :]
        survivors = sorted(b * size + k for b in range(blocks) for k in best)
        for consumer, channels in consumers.items():
            expected = {k for neuron in survivors for k in channels[neuron]}
            others = {k for other in USES[name].values() for c in other.get(consumer, []) for k in c}
            own = {k for c in channels for k in c}
            assert set(tags(before[consumer])) & own == expected
            assert own <= others


@pytest.mark.parametrize("name", NETS)
def test_scores_after_a_step_are_those_of_the_survivors(name: str) -> None:
    """Contribution after a step, without observing again, from the activations of the dense model in NumPy."""
    model, x = make(name), images(16)
    importance, seen = observed(model, x, normalizer=None), inputs(model, x)
    dense = copy.deepcopy(model)
    pruner(model, importance, 0.34, ignored_layers=[model.fc]).step()
    for root, group in groups(model):
        if root == "fc":
            continue
        found = importance(group).numpy()
        total = np.zeros(len(found))
        for use in importance.evidence(group):
            consumer = next(n for n, m in model.named_modules() if m is use.use.module)
            a, full = seen[consumer], dense.get_submodule(consumer)
            left = surviving_inputs(full, use.use.module)
            value = np.abs(a).mean((0, 2))[left] * numpy_norms(use.use.module)
            np.add.at(total, use.use.neurons.numpy(), value[use.use.channels.numpy()])
        ours = found < 1e29
        np.testing.assert_allclose(found[ours], total[ours], rtol=1e-5)


def surviving_inputs(dense: nn.Module, small: nn.Module) -> list[int]:
    """Input channels of the dense layer that the pruned one still has, found by its unique random weights."""
    kept = {round(float(v), 7) for v in small.weight.detach().flatten()}
    weight = dense.weight.detach()
    groups_ = getattr(dense, "groups", 1)
    outside, left = weight.shape[0] // groups_, []
    for channel in range(weight.shape[1] * groups_):
        group, inside = divmod(channel, weight.shape[1])
        block = weight[group * outside : (group + 1) * outside, inside].flatten()
        if any(round(float(v), 7) in kept for v in block):
            left.append(channel)
    return left


def test_a_step_in_which_not_every_group_is_pruned() -> None:
    model = make("concat")
    importance = observed(model)
    original = copy.deepcopy(importance.observer.activities)
    tag(model)
    prune = pruner(model, importance, 0.5, ignored_layers=[model.fc])
    for index, group in enumerate(prune.step(interactive=True)):
        if index == 1:
            group.prune()
    for root, group in groups(model):
        if root != "fc":
            importance(group)
    for consumer, activity in importance.observer.activities.items():
        assert torch.equal(activity.total, original[consumer].total[tags(model.get_submodule(consumer))])


@pytest.mark.parametrize("scored", [True, False])
def test_surgery_that_was_not_recorded_is_an_error(scored: bool) -> None:
    model = make("plain")
    importance = observed(model)
    if scored:
        for _, group in groups(model):
            importance(group)
    tp.prune_conv_out_channels(model.b, [1])
    tp.prune_conv_in_channels(model.c, [1])
    with pytest.raises(RuntimeError, match=r"statistics of c describe 8 input channels, but it has 7 now.*observe"):
        importance(dict(groups(model))["b"])
    with torch.no_grad(), importance.observe(model):
        model(images())
    assert len(importance(dict(groups(model))["b"])) == 7


def test_scoring_before_observing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="nothing was observed yet"):
        DyingNeuronImportance()(dict(groups(make("plain")))["b"])


def test_observing_again_between_steps() -> None:
    model = make("residual")
    importance = DyingNeuronImportance("contribution", share=1.0)
    prune = pruner(model, importance, 0.5, iterative_steps=2, ignored_layers=[model.fc])
    for _ in range(2):
        with torch.no_grad(), importance.observe(model):
            model(images())
        prune.step()
    assert widths(model) == {"stem": 4, "a1": 4, "a2": 4, "b1": 4, "b2": 4, "fc": 5}


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, copy.deepcopy], ids=["same", "wrapped", "copied"])
def test_a_model_is_known_by_its_names(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Observed as it is, then copied or wrapped, then pruned."""
    model = make("residual")
    importance = observed(model)
    other = wrap(model)
    pruner(other, importance, 0.5, ignored_layers=[m for n, m in other.named_modules() if n.endswith("fc")]).step()
    assert {name.removeprefix("module."): width for name, width in widths(other).items()} == {
        "stem": 4, "a1": 4, "a2": 4, "b1": 4, "b2": 4, "fc": 5,
    }  # fmt: skip
    other(images())


def test_a_model_with_a_part_called_module_works() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.module = nn.Conv2d(3, 8, 1), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.module(self.a(x))

    model = Outer()
    importance = observed(model)
    pruner(model, importance, 0.5, ignored_layers=[model.module]).step()
    assert model.a.out_channels == 4
    assert len(importance(dict(groups(model))["a"])) == 4


# ---- modes and pruners


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_pruning": True},
        {"global_pruning": True, "isomorphic": True},
        {"round_to": 2},
        {"global_pruning": True, "iterative_steps": 2},
    ],
    ids=["local", "global", "isomorphic", "round_to", "iterative"],
)
def test_every_mode_of_the_base_pruner(name: str, options: dict[str, Any]) -> None:
    model = make(name)
    importance = observed(model)
    prune = pruner(model, importance, 0.5, ignored_layers=[model.fc], **options)
    before = sum(widths(model).values())
    for _ in range(options.get("iterative_steps", 1)):
        prune.step()
    assert sum(widths(model).values()) < before
    assert model(images()).shape == (8, 5)


@pytest.mark.parametrize(
    "kind", [tp.pruner.BasePruner, tp.pruner.GroupNormPruner, tp.pruner.BNScalePruner, tp.pruner.GrowingRegPruner]
)
@pytest.mark.parametrize("global_pruning", [True, False])
def test_every_pruner_that_takes_an_importance(kind: Any, global_pruning: bool) -> None:
    """Including its regularisation, which scores groups as well, over two steps."""
    model = make("plain")
    importance = observed(model)
    prune = pruner(
        model, importance, 0.5, kind, iterative_steps=2, global_pruning=global_pruning, ignored_layers=[model.fc]
    )
    for _ in range(2):
        prune.update_regularizer()
        model.train()
        model(images()).sum().backward()
        if kind is not tp.pruner.BasePruner:  # which has none
            prune.regularize(model)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        prune.step()
        model.eval()
    assert sum(removed(model).values()) == 12
    assert model(images()).shape == (8, 5)


def test_growing_regularisation_updates() -> None:
    model = make("plain")
    prune = pruner(model, observed(model), 0.5, tp.pruner.GrowingRegPruner, ignored_layers=[model.fc])
    prune.update_reg()
    assert all(torch.isfinite(r).all() for r in prune.group_reg.values())


# ---- groups that get no score


@pytest.mark.filterwarnings("default:.*is left alone.*")
def test_outputs_are_skipped_by_name_with_one_warning() -> None:
    """Not scored zero, which would take them first."""
    model = make("plain")
    importance = observed(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prune = pruner(model, importance, 0.5, iterative_steps=2)
        prune.step()
        prune.step()
    told = [str(w.message) for w in caught if "left alone" in str(w.message)]
    assert told == [f"fc is left alone: {importance.skipped['fc']}"]
    assert "outputs of the model" in importance.skipped["fc"]
    assert model.fc.out_features == 5
    assert removed(model) == {"a": 4, "b": 4, "c": 4}


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux, self.c = (nn.Conv2d(i, 8, 1) for i in (3, 8, 8, 8))
        self.both = False

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.a(x))
        y = self.c(F.relu(self.b(x)))
        return (y, self.aux(x)) if self.both else y


def test_a_consumer_that_was_not_called_is_named() -> None:
    model = Auxiliary()
    importance = observed(model)
    model.both = True
    found = {root: importance(group) for root, group in groups(model)}
    assert importance.skipped["a"] == "aux, which reads its neurons, was not called while the model was observed"
    assert found["a"] is None
    assert len(found["b"]) == 8
    with torch.no_grad(), importance.observe(model):
        model(images())
    assert len(importance(dict(groups(model))["a"])) == 8
    assert "a" not in importance.skipped


def test_a_consumer_outside_the_observed_model_is_named() -> None:
    model = make("plain")
    importance = observed(nn.Sequential(model.a, nn.ReLU(), model.b))
    assert importance(dict(groups(model))["a"]) is None
    assert "not part of the observed model" in importance.skipped["a"]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(self.embed(x)).mean(1))


@pytest.mark.parametrize("heads", [True, False])
def test_attention(heads: bool) -> None:
    """Inner features are pruned; attention reads the residual stream too; every group is scored or named."""
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(16, 5, 4)
    importance = observed(model, x)
    found = {root: importance(group) for root, group in groups(model, x)}
    unscored = {root for root, value in found.items() if value is None}
    assert unscored == set(importance.skipped) == {"fc"}
    stream = next(g for root, g in groups(model, x) if len(found[root] if found[root] is not None else []) == 8)
    assert "layer.self_attn" in {
        importance._followed[stream._DG].names[e.use.module] for e in importance.evidence(stream)
    }
    prune = tp.pruner.BasePruner(
        model, x, importance, pruning_ratio=0.5, ignored_layers=[model.fc], in_channel_groups={},
        out_channel_groups={}, num_heads={model.layer.self_attn: 2} if heads else {},
    )  # fmt: skip
    prune.step()
    assert model.layer.linear1.out_features == 8
    assert model(x).shape == (16, 3)


def test_plain_is_what_the_tables_say() -> None:
    assert list(widths(Plain())) == ["a", "b", "c", "fc"]
    assert set(USES) == set(NETS)
