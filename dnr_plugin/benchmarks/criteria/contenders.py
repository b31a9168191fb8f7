"""Torch-Pruning's criteria and our scores by name, each built for a model from the same calibration images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.pruner.importance import ActivationImportance, FPGMImportance, OBDCImportance

from dnr_plugin.network.calling import kept_modes
from dnr_plugin.network.graph import build_graph
from dnr_plugin.observation.history import NeuronHistory
from dnr_plugin.pruning.groups import prunable_layers
from dnr_plugin.pruning.layers import Limits
from dnr_plugin.recipe.sections import ObserveOptions
from dnr_plugin.scoring.importance import DyingNeuronImportance
from dnr_plugin.scoring.scores import SCORES

Criterion = Callable[[tp.dependency.Group], Tensor | None]
_OBSERVED = 250  # images per forward pass where only activations are read
_LEARNT = 50  # images per backward pass: obdc keeps a matrix of gradients for every image of a batch


@dataclass(frozen=True)
class Calibration:
    """What every criterion may look at.

    Attributes:
        images: normalised training images, not augmented, on the model's device, float32 [N, C, H, W].
        labels: int64 [N].
        example: one image, as Torch-Pruning takes it.
        classes: how many the model tells apart.
        observe: how our scores read activations.
        histories: of the neurons while the model trained, for our scores.
        prior: exponent by which these count.
    """

    images: Tensor
    labels: Tensor
    example: Tensor
    classes: int
    observe: ObserveOptions = field(default_factory=ObserveOptions)
    histories: Mapping[str, NeuronHistory] = field(default_factory=dict)
    prior: float = 0.0

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels in parts of at most ``size``."""
        return zip(torch.split(self.images, size), torch.split(self.labels, size), strict=True)


class HessianMeanImportance(tp.importance.HessianImportance):  # type: ignore[misc]
    """``hessian`` with squared gradients averaged over the images, as Torch-Pruning documents it.

    `accumulate_grad` of Torch-Pruning 1.6.1 looks parameters up by name in a dictionary that it fills by parameter, so
    it finds none, and only the last image's gradients remain.
    """

    def accumulate_grad(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                self._accu_grad[parameter] = self._accu_grad.get(parameter, 0.0) + parameter.grad.detach().square()
                self._counter[parameter] = self._counter.get(parameter, 0) + 1


def _weights(make: Callable[[], Criterion]) -> Callable[[nn.Module, Calibration], Criterion]:
    """A criterion that looks at weights alone, or at nothing."""
    return lambda model, data: make()


def _taylor(model: nn.Module, data: Calibration) -> Criterion:
    """Needs the gradient of the mean loss in ``weight.grad``."""
    model.zero_grad()
    for images, labels in data.batches(_LEARNT):
        loss = F.cross_entropy(model(images), labels, reduction="sum") / len(data.images)
        loss.backward()  # type: ignore[no-untyped-call]
    return tp.importance.TaylorImportance()  # type: ignore[no-any-return]


def _hessian(model: nn.Module, data: Calibration, *, make: Callable[[], Any]) -> Criterion:
    """Takes the gradient of each image's own loss."""
    importance = make()
    importance.zero_grad()
    for images, labels in data.batches(1):
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        importance.accumulate_grad(model)
    return importance  # type: ignore[no-any-return]


def _obdc(model: nn.Module, data: Calibration) -> Criterion:
    """Fisher information: labels are drawn from the model's own predictions, as in Torch-Pruning's benchmarks."""
    importance = OBDCImportance(num_classes=data.classes)
    # _prepare_model fails with the BasePruner of 1.6.1, which answers None where a group has no attention
    pruner = SimpleNamespace(
        DG=build_graph(model, data.example),
        ignored_layers=[],
        root_module_types=[nn.modules.conv._ConvNd, nn.Linear],
        _downstream_node_as_root_if_attention=lambda group: group,
    )
    importance._prepare_model(model, pruner)
    for images, _ in data.batches(_LEARNT):
        model.zero_grad()
        logits = model(images)
        drawn = torch.multinomial(logits.detach().softmax(1).cpu(), 1).flatten().to(logits.device)
        F.cross_entropy(logits, drawn).backward()  # type: ignore[no-untyped-call]
        importance.step()
    importance._rm_hooks(model)
    return importance  # type: ignore[no-any-return]


def _activation(model: nn.Module, data: Calibration) -> Criterion:
    """Keeps the last batch alone, so all images are one batch."""
    importance = ActivationImportance()
    with importance.compute_importance(model), torch.no_grad():
        model(data.images)
    return importance  # type: ignore[no-any-return]


def _ours(model: nn.Module, data: Calibration, *, score: str) -> Criterion:
    read = data.observe
    importance = DyingNeuronImportance(
        score, threshold=read.threshold, share=read.share, bins=read.bins, moments=score == "redundancy",
        histories=data.histories, prior=data.prior,
    )  # fmt: skip
    with importance.observe(model), torch.no_grad():
        for images, _ in data.batches(_OBSERVED):
            model(images)
    return importance


THEIRS: dict[str, Callable[[nn.Module, Calibration], Criterion]] = {
    "random": _weights(tp.importance.RandomImportance),
    "l1": _weights(partial(tp.importance.MagnitudeImportance, p=1)),
    "l2": _weights(partial(tp.importance.MagnitudeImportance, p=2)),
    "bn_scale": _weights(tp.importance.BNScaleImportance),
    "lamp": _weights(tp.importance.LAMPImportance),
    "fpgm": _weights(FPGMImportance),
    "taylor": _taylor,
    "hessian": partial(_hessian, make=tp.importance.HessianImportance),
    "hessian_mean": partial(_hessian, make=HessianMeanImportance),
    "obdc": _obdc,
    "activation": _activation,
}
MENDED = ("hessian_mean",)  # of these, what Torch-Pruning 1.6.1 documents but does not do
OURS = tuple(SCORES)
CRITERIA: dict[str, Callable[[nn.Module, Calibration], Criterion]] = {
    **THEIRS,
    **{name: partial(_ours, score=name) for name in OURS},
}


def build_criterion(name: str, model: nn.Module, data: Calibration, seed: int = 0) -> Criterion:
    """A criterion that has seen the calibration images, each class by the procedure that it documents.

    Args:
        name: a key of `CRITERIA`.
        model: the network that the groups to score belong to, in eval mode meanwhile. A copy: gradients and attributes
            that a criterion leaves there are what it scores by.
        data: what it may look at.
        seed: of labels that are drawn.

    Returns:
        A function of a dependency group; "random" draws from torch's generator at each call.

    Raises:
        Exception: whatever a criterion of Torch-Pruning fails with.
    """
    with kept_modes(model, attributes=False):
        model.eval()
        torch.manual_seed(seed)
        return CRITERIA[name](model, data)


def check_scores(criterion: Criterion, model: nn.Module, example_inputs: Any, limits: Limits) -> None:
    """Refuses a criterion that cannot rank every layer that may shrink.

    Raises:
        ValueError: a layer without scores, with a wrong number of them, or with scores that are not finite.
    """
    for layer in prunable_layers(model, example_inputs, limits, {}).layers:
        scores = criterion(layer.group)
        if scores is None:
            raise ValueError(f"{layer.name}: the criterion gives no scores")
        if scores.shape != (layer.size,):
            raise ValueError(f"{layer.name}: expected {layer.size} scores, found shape {list(scores.shape)}")
        wrong = int((~scores.isfinite()).sum())
        if wrong:
            raise ValueError(f"{layer.name}: {wrong} of {layer.size} scores are NaN or infinite")
