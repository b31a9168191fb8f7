"""Histograms of neurons, summed over everything that carries them, against a count of the activations themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import images, make
from torch import Tensor, nn

from dnr_plugin.network.graph import build_graph
from dnr_plugin.observation.entropy import octaves
from dnr_plugin.scoring.evidence import histograms
from dnr_plugin.scoring.importance import DyingNeuronImportance

BINS = 6


def counted(*readings: Tensor) -> list[list[int]]:
    """Of neurons along the first dimension of each reading: how many of its values fall into each bin."""
    rows = []
    for k in range(len(readings[0])):
        bins = torch.cat([octaves(a[k].flatten(), 0.0, BINS) for a in readings]).tolist()
        rows.append([bins.count(b) for b in range(BINS)])
    return rows


def readings(name: str, model: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """Root layer -> its neurons' values at each consumer, [neurons, ...], written out by hand."""
    if name == "plain":
        a = F.relu(model.bn(model.a(x)))
        b = F.relu(model.b(a))
        c = F.adaptive_avg_pool2d(F.relu(model.c(b)), 2)
        return {"a": [a.transpose(0, 1)], "b": [b.transpose(0, 1)], "c": [c.transpose(0, 1)]}
    if name == "residual":
        stem = model.stem(x).relu()
        a1 = model.a1(stem).relu()
        mid = (model.a2(a1) + stem).relu()
        b1 = model.b1(mid).relu()
        end = (model.b2(b1) + mid).relu().mean((2, 3))
        # the stream is read by both blocks and by the classifier
        stream = [value.transpose(0, 1) for value in (stem, mid, end)]
        return {"a1": [a1.transpose(0, 1)], "b1": [b1.transpose(0, 1)], "b2": stream}
    if name == "concat":
        stem = model.stem(x).relu()
        d1 = model.d1(stem).relu()
        d2 = model.d2(torch.cat([stem, d1], 1)).relu()

        def pooled(a: Tensor) -> Tensor:
            return a.mean((2, 3)).transpose(0, 1)

        return {
            "stem": [stem.transpose(0, 1), stem.transpose(0, 1), pooled(stem)],
            "d1": [d1.transpose(0, 1), pooled(d1)],
            "d2": [pooled(d2)],
        }
    a = F.relu(model.a(x))
    g = F.relu(model.g(a))
    b = F.relu(model.b(g)).mean((2, 3))
    return {"a": [a.transpose(0, 1)], "g": [g.transpose(0, 1)], "b": [b.transpose(0, 1)]}


@pytest.mark.parametrize("name", ["plain", "residual", "concat", "grouped"])
def test_histograms_count_every_value_of_a_neuron(name: str) -> None:
    model, x = make(name), images()
    importance = DyingNeuronImportance(share=1.0, bins=BINS)
    with torch.no_grad():
        with importance.observe(model):
            model(x)
        expected = readings(name, model, x)
    names = {module: key for key, module in model.named_modules()}
    found = {}
    for group in build_graph(model, x[:1]).get_all_groups():
        root = names[group[0].dep.target.module]
        if root == "fc":
            continue
        evidence = importance.evidence(group)
        found[root] = histograms(evidence, len(group[0].idxs)).tolist()
    for root, values in expected.items():
        assert found[root] == counted(*values), root
    assert len(found) == len(expected)
