r"""Least-squares repair: layers that lost inputs are fitted, in closed form, to give again what they gave before.

After neurons were removed, a layer reads fewer channels, which carry what upstream removals left of them. Layer by
layer, in the order in which they run, its weights and the constant behind them become

.. math:: \arg\min_{W, b} \; \sum_{n,p} \lVert y_{np} - W \tilde x_{np} - b \rVert^2 + \lambda \lVert W - W_0 \rVert^2

with :math:`\tilde x` its input in the pruned and already repaired network (for a convolution, the patch that a kernel
covers), :math:`y` the outputs of the dense network at the same place, and :math:`W_0` its weights as they are. No
labels and no gradients. What is fitted is what matters:

- outputs behind a BatchNorm, whose mean takes the constant up;
- where they are added to something, as in a residual block, the sum: the last layer to contribute makes up for what the
  others lost;
- where a ReLU follows, its result: outputs that both networks have below zero need not agree (Zhang et al.,
  *Accelerating Very Deep Convolutional Networks*, TPAMI 2016, section 2.2).

Source: He et al., *Channel Pruning for Accelerating Very Deep Neural Networks*, ICCV 2017, section 3, extended from one
layer at a time to patches with a damping :math:`\lambda` that held-out images choose. ``docs/criterion.md`` has what each part gained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import derive_seed
from .errors import RunError
from .flow import Calls, Site, trace_sites
from .graph import build_graph, kept_modes
from .inputs import call
from .observe import is_consumer, module_names
from .patches import channels_second, patches

_DAMPINGS = (1e-7, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # shares of the inputs' mean variance
_HELD_OUT = 0.25  # share of the images that chooses among them
_RECTIFIED = 5  # rounds in which outputs below zero are let go
_MAX_UNKNOWNS = 8192  # weights of one output: beyond, the moments of the inputs outgrow memory
_FLAT = 1e-6  # of a BatchNorm's scale
_SAME = 1e-12  # share of the variance that rounding explains
_CHUNK = 64  # images that are read at the same positions


@dataclass(frozen=True)
class LayerRepair:
    """What repair did to one layer.

    Attributes:
        layer: its name.
        error_before, error_after: mean square of what its outputs lack, behind a BatchNorm and together with what they
            are added to, relative to their variance in the dense network; on all images.
        damping: lambda, as a share of the mean variance of its inputs.
        left: why it was left as it was, or None.
    """

    layer: str
    error_before: float | None = None
    error_after: float | None = None
    damping: float | None = None
    left: str | None = None


@dataclass(frozen=True)
class Kept:
    """Which channels of a dense layer are left in the pruned one; bool, shapes [in] and [out]."""

    inputs: Tensor
    outputs: Tensor


def kept_channels(dense: nn.Module, example_inputs: Any, removals: Mapping[str, Sequence[int]]) -> dict[str, Kept]:
    """What is left of each consumer's channels once ``removals`` are taken from a dense model, which stays as it is.

    Args:
        dense: before the removal.
        example_inputs: as Torch-Pruning takes them.
        removals: root layer -> neurons, numbered as in the dense model.
    """
    graph = build_graph(dense, example_inputs)
    modules = dict(dense.named_modules())
    kept = {
        name: Kept(
            torch.ones(graph.get_in_channels(module), dtype=torch.bool),
            torch.ones(graph.get_out_channels(module), dtype=torch.bool),
        )
        for name, module in modules.items()
        if is_consumer(module)
    }
    names = module_names(dense)
    for root, neurons in removals.items():
        if not neurons:
            continue
        group = graph.get_pruning_group(modules[root], graph.get_pruner_of_module(modules[root]).prune_out_channels, [*neurons])
        for dep, channels in group:
            name = names.get(dep.target.module)
            if name in kept:
                side = kept[name].inputs if graph.is_in_channel_pruning_fn(dep.handler) else kept[name].outputs
                side[list(channels)] = False
    return kept


@torch.no_grad()
def repair_network(
    model: nn.Module,
    dense: nn.Module,
    example_inputs: Any,
    removals: Mapping[str, Sequence[int]],
    images: Tensor,
    *,
    rows: int = 16384,
    seed: int = 0,
) -> list[LayerRepair]:
    """Fits a pruned model, layer by layer in the order they run, to what the dense one gave on some images.

    Afterwards BatchNorm's statistics fit the dense network's outputs, so that there is no need to recalibrate them.

    Args:
        model: ``dense`` without ``removals``; changed in place.
        dense: the network before anything was removed, on the same device.
        example_inputs: as Torch-Pruning takes them.
        removals: root layer -> neurons that were removed, numbered as in ``dense``.
        images: inputs like those of training, shape [N, ...], on the device. The pruned model runs on all of them at once,
            so memory grows with N.
        rows: places, of all images together, at which a layer's outputs are compared.
        seed: draws the places.

    Returns:
        What was done to each layer, in the order they run.

    Raises:
        RunError: the two models do not run alike, or inputs of a layer are not finite.
    """
    sites = trace_sites(dense, example_inputs)
    kept = kept_channels(dense, example_inputs, removals)
    places = {name: _Places(derive_seed(seed, name), rows, len(images)) for name in sites}
    targets = _targets(dense, sites, places, images)
    done = {name: LayerRepair(name, left="it runs more than once, or not at all") for name in kept if name not in sites}
    modules = {name: module for module, name in module_names(model).items()}
    others: dict[int, Tensor] = {}
    wanted = {site.other: _keeper(others, site.other) for site in sites.values() if site.other is not None}
    calls = Calls(wanted)

    def fit(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            with calls.paused():
                site = sites[name]
                target = targets.pop(name)[:, kept[name].outputs.to(images.device)]
                other = None
                if site.other is not None:
                    other = places[name].pick(channels_second(module, others.pop(site.other)), 0)
                norm = modules[site.norm] if site.norm is not None else None
                done[name] = _fit_layer(name, module, norm, site.rectified, args[0], target, other, places[name])

        return hook

    handles = [modules[name].register_forward_pre_hook(fit(name)) for name in sites]
    try:
        with kept_modes(model), calls:
            model.eval()
            call(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return list(done.values())


def _keeper(results: dict[int, Tensor], number: int) -> Callable[[Tensor], None]:
    def keep(result: Tensor) -> None:
        results[number] = result

    return keep


class _Places:
    """Positions at which one layer is read: new ones for every few images, the same in both networks."""

    def __init__(self, seed: int, rows: int, images: int) -> None:
        self.seed, self.each = seed, max(1, rows // images)
        self.positions = 0

    def of_chunk(self, first: int) -> Tensor:
        """Flat positions of the outputs of the images from ``first`` on, shape [K]."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, first))
        return torch.randperm(self.positions, generator=generator)[: self.each]

    def pick(self, values: Tensor, first: int) -> Tensor:
        """Values of shape [N, C, P] of the images from ``first`` on, at the positions, as rows [R, C]."""
        found = []
        for start in range(0, len(values), _CHUNK):
            positions = self.of_chunk(first + start).to(values.device)
            found.append(values[start : start + _CHUNK][:, :, positions].transpose(1, 2).flatten(0, 1))
        return torch.cat(found)


def _targets(
    dense: nn.Module, sites: Mapping[str, Site], places: Mapping[str, _Places], images: Tensor
) -> dict[str, Tensor]:
    """What each layer should give, in the dense network: rows of all images, [R, out]."""
    modules = {name: module for module, name in module_names(dense).items()}
    found: dict[str, list[Tensor]] = {name: [] for name in sites}
    first = 0

    def read(name: str, output: Tensor) -> None:
        values = channels_second(modules[name], output)
        places[name].positions = values.shape[2]
        found[name].append(places[name].pick(values, first))

    wanted, handles = {}, []
    calls = Calls(wanted)

    def after(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            with calls.paused():
                read(name, output)

        return hook

    for name, site in sites.items():
        if site.sum is not None:
            wanted[site.sum] = lambda result, name=name: read(name, result)
        else:
            handles.append(modules[site.norm or name].register_forward_hook(after(name)))
    try:
        with kept_modes(dense):
            dense.eval()
            for first in range(0, len(images), 4 * _CHUNK):
                part = images[first : first + 4 * _CHUNK]
                calls.count = 0
                with calls:
                    call(dense, part)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(rows) for name, rows in found.items() if rows}


def _read(module: nn.Module, a: Tensor, places: _Places) -> Tensor:
    """What the weights of a layer's outputs are multiplied with, as rows [R, in * taps]."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return places.pick(channels_second(module, a), 0)
    chunks = range(0, len(a), _CHUNK)
    return torch.cat([patches(module, a[start : start + _CHUNK], places.of_chunk(start)) for start in chunks])


@dataclass
class _Task:
    """Least squares for the outputs that read the same inputs: all of a layer, or of one group of a grouped convolution.

    Attributes:
        x: inputs, shape [R, in].
        goal: what should come out once ``other`` is added, shape [R, out].
        other: what is added, shape [R, out].
        weights, constants: as they are, then as they were fitted; float64, shapes [out, in] and [out].
        constant: whether the constants may change.
        rectified: whether what is below zero counts as zero.
        damping: as chosen; None where held-out rows lose by every fit, so that all stays as it is.
    """

    x: Tensor
    goal: Tensor
    other: Tensor
    weights: Tensor
    constants: Tensor
    constant: bool
    rectified: bool
    damping: float | None = None

    def fit(self) -> None:
        """Chooses a damping on the last rows and fits to all of them."""
        share = max(1, round(len(self.x) * (1.0 - _HELD_OUT)))
        fitted, held = slice(None, share), slice(share, None)
        y = self.goal - self.other
        first, rest = _Moments.of(self.x[fitted], y[fitted]), _Moments.of(self.x[held], y[held])
        trial = _Solver(first, self.weights, self.constant)
        start = self.lacking(self.weights, self.constants, held)
        found = {d: self.lacking(*trial.solve(first, d, self.constants), held) for d in _DAMPINGS}
        damping = min(found, key=lambda d: found[d])
        if found[damping] >= start:
            return
        moments = first + rest
        solver = _Solver(moments, self.weights, self.constant)
        weights, constants = solver.solve(moments, damping, self.constants)
        for _ in range(_RECTIFIED if self.rectified else 0):
            # below zero the outputs need not agree, only stay below
            free = torch.minimum(self.x @ weights.T.to(self.x) + constants.to(self.x), -self.other)
            moments = moments.towards(self.x, torch.where(self.goal <= 0, free, y))
            weights, constants = solver.solve(moments, damping, self.constants)
        self.weights, self.constants, self.damping = weights, constants, damping

    def lacking(self, weights: Tensor, constants: Tensor, rows: slice = slice(None)) -> float:
        """Sum of squares of what some rows lack."""
        found = self.x[rows] @ weights.T.to(self.x) + constants.to(self.x) + self.other[rows]
        goal = self.goal[rows]
        if self.rectified:
            found, goal = found.relu(), goal.relu()
        return float((found - goal).double().square().sum())

    @property
    def variance(self) -> float:
        """Sum of squares of the goal around its mean."""
        goal = self.goal.relu() if self.rectified else self.goal
        return float((goal - goal.mean(0)).double().square().sum())


@dataclass
class _Moments:
    """Sums over rows of x and y, with a constant 1 appended to x: [in + 1, in + 1] and [out, in + 1]."""

    xx: Tensor
    yx: Tensor
    rows: int

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> _Moments:
        return cls(_product(x, x), _product(y, x)[:-1], len(x))

    def towards(self, x: Tensor, y: Tensor) -> _Moments:
        """The same inputs with other goals."""
        return _Moments(self.xx, _product(y, x)[:-1], self.rows)

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(self.xx + other.xx, self.yx + other.yx, self.rows + other.rows)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Sum over rows of the outer products of [a, 1] and [b, 1], float64."""
    total = a.new_zeros(a.shape[1] + 1, b.shape[1] + 1, dtype=torch.float64)
    for left, right in zip(a.split(1024), b.split(1024), strict=True):  # sums this short lose nothing in float32
        total += (F.pad(left, (0, 1), value=1.0).T @ F.pad(right, (0, 1), value=1.0)).double()
    return total


class _Solver:
    """Least squares with a pull towards the weights as they are, for several dampings and goals."""

    def __init__(self, moments: _Moments, start: Tensor, constant: bool) -> None:
        self.start, self.constant = start, constant
        self.mean = moments.xx[:-1, -1] / moments.rows * constant
        self.second = moments.xx[:-1, :-1] / moments.rows - torch.outer(self.mean, self.mean)
        self.factors: dict[float, Tensor] = {}

    def solve(self, moments: _Moments, damping: float, constants: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [out, in] and constants [out]: those given, where they may not change."""
        if damping not in self.factors:
            # dead or duplicated inputs make the moments singular: the smallest damping is above rounding
            ridge = damping * self.second.diagonal().mean() + 1e-30
            self.factors[damping] = torch.linalg.cholesky(self.second + ridge * torch.eye(len(self.mean)).to(self.mean))
        goal = moments.yx[:, -1] / moments.rows
        cross = moments.yx[:, :-1] / moments.rows
        if self.constant:
            cross = cross - torch.outer(goal, self.mean)
        else:
            cross = cross - torch.outer(constants, moments.xx[:-1, -1] / moments.rows)
        missing = cross - self.start @ self.second
        weights = self.start + torch.cholesky_solve(missing.T, self.factors[damping]).T
        return weights, goal - weights @ self.mean if self.constant else constants


def _fit_layer(
    name: str, module: nn.Module, norm: nn.Module | None, rectified: bool, a: Tensor, goal: Tensor,
    other: Tensor | None, places: _Places,
) -> LayerRepair:  # fmt: skip
    """Fits one layer in place.

    Args:
        name: of the layer.
        module: the layer.
        norm: the BatchNorm behind it, if any.
        rectified: whether a ReLU follows.
        a: the layer's input in the pruned network.
        goal: what should come out behind ``norm``, with ``other`` added, shape [R, out].
        other: what is added in the pruned network, shape [R, out].
        places: where.
    """
    if not isinstance(module, nn.Linear) and (not isinstance(module, nn.modules.conv._ConvNd) or module.transposed):
        return LayerRepair(name, left=f"{type(module).__name__} is not repaired")
    unknowns = module.weight[0].numel()
    if unknowns > _MAX_UNKNOWNS:
        return LayerRepair(name, left=f"its outputs read {unknowns} inputs each, more than {_MAX_UNKNOWNS}")
    wide = torch.promote_types(a.dtype, torch.float32)
    x, goal = _read(module, a, places).to(wide), goal.to(wide)
    other = torch.zeros_like(goal) if other is None else other.to(wide)
    if not x.isfinite().all():
        raise RunError(f"{name}: expected inputs that are finite, found others: nothing can be fitted to them")
    bias = module.bias if isinstance(module.bias, Tensor) else None
    weights = module.weight.detach().double().flatten(1)
    constants = weights.new_zeros(len(weights)) if bias is None else bias.detach().double()
    scale, shift = torch.ones_like(constants), torch.zeros_like(constants)
    if norm is not None:
        scale, shift = _affine(norm)
    groups = int(getattr(module, "groups", 1))
    columns = [value.chunk(groups, 1) for value in (x, goal, other)]
    outputs = [value.chunk(groups) for value in (weights * scale[:, None], constants * scale + shift)]
    movable = norm is not None or bias is not None
    tasks = [_Task(*part, movable, rectified) for part in zip(*columns, *outputs, strict=True)]
    variance = max(sum(task.variance for task in tasks), 1e-30)
    before = sum(task.lacking(task.weights, task.constants) for task in tasks) / variance
    if before < _SAME:
        return LayerRepair(name, before, before)
    for task in tasks:
        task.fit()
    after = sum(task.lacking(task.weights, task.constants) for task in tasks) / variance
    weights = torch.cat([task.weights for task in tasks]) / scale[:, None]
    constants = (torch.cat([task.constants for task in tasks]) - shift) / scale
    module.weight.copy_(weights.view_as(module.weight))
    if bias is not None:
        bias.copy_(constants)
    elif norm is not None:
        assert isinstance(norm.running_mean, Tensor)
        norm.running_mean.sub_(constants)
    return LayerRepair(name, before, after, max((t.damping for t in tasks if t.damping is not None), default=None))


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A BatchNorm in eval mode as ``scale * y + shift``, float64, shape [out] each; no scale is quite zero."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = torch.zeros_like(scale)
    if norm.affine:
        scale = scale * norm.weight.double()
        scale = torch.where(scale.abs() < _FLAT, _FLAT, scale)  # a channel switched off: whatever it is multiplied with
        shift = norm.bias.double()
    return scale, shift - scale * norm.running_mean.double()
