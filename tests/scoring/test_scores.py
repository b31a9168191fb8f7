"""Every score against NumPy, and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.importance import BLOCKS, USES, groups, inputs, numpy_scores, observed
from helpers.networks import NETS, images, make
from torch import nn

from dnr_plugin.network import kinds
from dnr_plugin.scoring.importance import DyingNeuronImportance
from dnr_plugin.scoring.scores import SCORES

pytestmark = pytest.mark.filterwarnings("ignore:.*is left alone.*")


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("score", SCORES)
def test_every_score_equals_numpy(score: str, name: str) -> None:
    """Sum or maximum over consumers, sum or mean over a flatten; all but the one channel (per block) that must stay."""
    model, x = make(name), images(96 if score == "redundancy" else 16)
    importance, seen = observed(model, x, score=score, normalizer=None, max_pruning_ratio=1.0), inputs(model, x)
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
