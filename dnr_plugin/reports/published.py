"""Results of papers, to be drawn beside one's own; accuracy on the CIFAR-10 test set, in percent.

All are of full-width networks trained on all 50,000 images. Sources:

- DNR, EarlyCroP-S: Wang & Jiang, *DNR-Pruning: Sparsity-Aware Pruning via Dying Neuron Reactivation in Convolutional
  Neural Networks*, TMLR 2025 (OpenReview ymUjGCNPYa); read off its plots, so exact to about 0.1.
- OTO: Chen et al., *Only Train Once*, NeurIPS 2021; about 20 % of the FLOPs.
- DepGraph: Fang et al., *DepGraph: Towards Any Structural Pruning*, CVPR 2023; speed-ups of 2.13 and 2.57.
- CHIP: Sui et al., *CHIP: CHannel Independence-based Pruning for Compact Neural Networks*, NeurIPS 2021.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One method's results on one network.

    Attributes:
        method: its name.
        model: as in ``model.name``; all are on ``cifar10``.
        activation: as in ``model.activation``.
        measure: "neuron_sparsity", "weight_sparsity" or "flops" (share kept), what `points` are over.
        points: (measure in percent, accuracy in percent).
    """

    method: str
    model: str
    activation: str
    measure: str
    points: tuple[tuple[float, float], ...]


def _over(shares: tuple[float, ...], *accuracies: float) -> tuple[tuple[float, float], ...]:
    return tuple(zip(shares, accuracies, strict=True))


_NEURONS = (50.0, 60.0, 70.0, 75.0, 80.0, 85.0, 90.0)
_WEIGHTS = (75.0, 80.0, 85.0, 90.0, 95.0, 97.0, 98.0)
PUBLISHED = (
    Published("DNR", "resnet18", "relu", "neuron_sparsity", _over(_NEURONS, 92.8, 92.5, 91.8, 91.4, 90.8, 89.1, 86.3)),
    Published(
        "EarlyCroP-S", "resnet18", "relu", "neuron_sparsity", _over(_NEURONS, 92.3, 92.2, 91.7, 91.4, 90.8, 87.9, 84.2)
    ),
    Published("DNR", "resnet18", "relu", "weight_sparsity", _over(_WEIGHTS, 93.0, 92.6, 92.1, 91.6, 91.4, 90.7, 88.5)),
    Published(
        "EarlyCroP-S", "resnet18", "relu", "weight_sparsity", _over(_WEIGHTS, 92.6, 92.4, 92.3, 92.2, 91.3, 90.5, 88.6)
    ),
    Published(
        "DNR", "resnet18", "leaky_relu", "neuron_sparsity", _over(_NEURONS, 90.7, 90.0, 88.5, 88.0, 86.5, 83.8, 82.0)
    ),
    Published(
        "DNR", "resnet18", "leaky_relu", "weight_sparsity", _over(_WEIGHTS, 91.4, 90.9, 90.2, 91.0, 88.9, 86.3, 84.9)
    ),
    Published("OTO", "resnet18", "relu", "flops", _over((20.0,), 92.86)),
    Published("DepGraph", "resnet56", "relu", "flops", _over((100 / 2.13, 100 / 2.57), 93.77, 93.64)),
    Published("CHIP", "resnet56", "relu", "flops", _over((52.6,), 94.16)),
    Published("CHIP", "vgg16_bn", "relu", "flops", _over((41.9, 21.4), 93.86, 93.18)),
)
# model.width of the networks above, where a recipe names none.
FULL_WIDTH = {"resnet18": 64, "resnet20": 16, "resnet56": 16, "vgg16_bn": 64}
TRAINING_IMAGES = 50_000


def published(measure: str, model: str, activation: str, data: str) -> list[Published]:
    """What was published on a measure for this network and data; nothing for most."""
    return [
        curve
        for curve in PUBLISHED
        if data == "cifar10" and (curve.measure, curve.model, curve.activation) == (measure, model, activation)
    ]
