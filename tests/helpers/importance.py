"""Scores by NumPy, and pruners of Torch-Pruning, for the tests of the criterion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from dnr_plugin.network.graph import build_graph
from dnr_plugin.scoring.importance import DyingNeuronImportance
from helpers.activities import numpy_octave
from helpers.networks import images

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


def kill(module: nn.Module, channels: list[int]) -> None:
    """Makes ReLU units that never fire."""
    module.weight.data[channels] = 0.0
    module.bias.data[channels] = -1.0


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
