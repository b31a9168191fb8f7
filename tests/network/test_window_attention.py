"""Attention within windows: Swin, Swin V2 with its cosine attention, and MaxViT."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.attention import spread, windowed, zeroed
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttentionV2

from dnr_plugin import (
    DyingNeuronImportance,
    InputError,
    flop_report,
    load_pruned,
    plan_removal,
    prune_neurons,
    remove_dead_neurons,
    repair_network,
    save_pruned,
    split_attention,
)
from dnr_plugin.network.attention import CosineScores, SplitAttention, split_modules
from dnr_plugin.network.calling import eval_outputs, output_difference

KINDS = ["swin", "swin_v2", "maxvit"]
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
COSINE = "features.3.0.attn"


def made(kind: str, **sizes: Any) -> nn.Module:
    return spread(windowed(kind, **sizes))


def mild(kind: str) -> nn.Module:
    """With scales of cosine attention as at the start of training: larger ones make much of small changes."""
    model = made(kind)
    for name, parameter in model.named_parameters():
        if "logit_scale" in name:
            nn.init.constant_(parameter, 2.3)
    return model


def split(kind: str, images: Any = None) -> nn.Module:
    model = made(kind)
    assert split_attention(model, IMAGES[:1], images) == {}
    return model


@pytest.mark.parametrize(
    ("kind", "images", "sizes"),
    [
        # windows that are padded, shifted in one direction and in both
        ("swin", torch.randn(2, 3, 40, 56), {"depths": [2, 2], "heads": [3, 6], "width": 12}),
        ("swin_v2", torch.randn(2, 3, 40, 56), {"depths": [2, 2], "heads": [3, 6], "width": 12}),
        ("maxvit", IMAGES[:2], {}),
    ],
)
@pytest.mark.parametrize("by_images", [False, True])
def test_split_attention_gives_the_same_outputs(
    kind: str, images: Tensor, sizes: dict[str, Any], by_images: bool
) -> None:
    model = made(kind, **sizes)
    before = eval_outputs(model, images)
    assert split_attention(model, images, [images] if by_images else None) == {}
    assert len(split_modules(model)) == (2 if kind == "maxvit" else 4)
    assert output_difference(before, eval_outputs(model, images))[1] < 1e-4
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_flops_stay(kind: str) -> None:
    model = made(kind)
    before = flop_report(model, IMAGES[:1]).flops
    split_attention(model, IMAGES[:1])
    assert flop_report(model, IMAGES[:1]).flops == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [("value",), ("query",), ("value", "query")])
def test_heads_and_channels_go_as_if_they_were_zero(kind: str, parts: tuple[str, ...], tmp_path: Any) -> None:
    model = split(kind, [IMAGES])
    name, attention = [*split_modules(model).items()][-1]
    heads, width = attention.core.heads.num_heads, attention.core.heads.width
    removals = {
        f"{name}.value": [*range(width)],  # the first head
        f"{name}.query": [width * head + channel for head in range(heads) for channel in (1, width - 1)],
    }
    removals = {layer: channels for layer, channels in removals.items() if layer.endswith(parts)}
    expected = eval_outputs(zeroed(model, removals), IMAGES)
    others = {key: parameter.clone() for key, parameter in attention.core.heads.named_parameters()}
    prune_neurons(model, IMAGES[:1], removals)
    assert output_difference(expected, eval_outputs(model, IMAGES))[1] < 1e-5
    core, gone = attention.core, int("value" in parts)
    assert core.scores.num_heads == core.heads.num_heads == heads - gone
    assert core.scores.channels == attention.query.out_features == attention.key.out_features
    assert core.scores.width == width - 2 * ("query" in parts)
    for key, parameter in core.heads.named_parameters():
        assert torch.equal(parameter, others[key][:, gone:] if key == "table" else others[key][gone:])
    save_pruned(model, tmp_path, {"name": "helpers.attention:windowed", "kwargs": {"kind": kind}})
    assert torch.equal(load_pruned(tmp_path, allow_import=True)(IMAGES), model(IMAGES))


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_is_removed_repaired_and_trained(kind: str) -> None:
    model = split(kind, [IMAGES])
    dense, importance = copy.deepcopy(model), DyingNeuronImportance()
    with importance.observe(model), torch.no_grad():
        model(IMAGES)
    plan = plan_removal(model, IMAGES[:1], importance, "flops", 0.7, scope="cost_aware")
    assert {"query", "value"} & {name.rpartition(".")[2] for name in plan.removals}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()

    step()
    before = flop_report(model, IMAGES[:1]).flops
    prune_neurons(model, IMAGES[:1], plan.removals, importance=importance, optimizer=optimizer)
    assert plan.achieved == pytest.approx(flop_report(model, IMAGES[:1]).flops / before)
    step()
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())
    pruned = copy.deepcopy(model)
    repairs = repair_network(pruned, dense, IMAGES[:1], plan.removals, IMAGES)
    repaired = {repair.layer for repair in repairs if repair.damping is not None}
    assert {f"{name}.out" for name in split_modules(model)} & repaired
    reference = eval_outputs(dense, IMAGES)
    errors = [output_difference(reference, eval_outputs(m, IMAGES))[1] for m in (model, pruned)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_useless_is_found(kind: str) -> None:
    model, importance = split(kind, [IMAGES]), DyingNeuronImportance()
    name, attention = [*split_modules(model).items()][-1]
    heads, width = attention.core.heads.num_heads, attention.core.heads.width
    gone = {f"{name}.value": [*range(width)], f"{name}.query": [width * head + 3 for head in range(heads)]}
    model = zeroed(model, gone)
    expected = eval_outputs(model, IMAGES)
    with importance.observe(model), torch.no_grad():
        model(IMAGES)
    removals = plan_removal(model, IMAGES[:1], importance, "dead").removals
    gone[f"{name}.query"] = sorted({*range(width), *gone[f"{name}.query"]})
    assert {layer: neurons for layer, neurons in removals.items() if layer in gone} == gone
    prune_neurons(model, IMAGES[:1], gone)
    assert output_difference(expected, eval_outputs(model, IMAGES))[1] < 1e-5


def test_a_zero_query_alone_is_not_without_effect_in_cosine_attention() -> None:
    """Its key still adds to the length that the others are divided by."""
    model = split("swin_v2", [IMAGES])
    query = split_modules(model)[COSINE].query
    with torch.no_grad():
        for parameter in query.parameters():
            parameter[[3, 19]] = 0.0
    before = eval_outputs(model, IMAGES)
    report = remove_dead_neurons(model, IMAGES[:1], [IMAGES], min_samples=8)
    assert query.out_features == 32
    assert output_difference(before, eval_outputs(model, IMAGES))[1] < 1e-5
    reasons = {name: reason for name, count, reason in report.left if count == 2}
    assert reasons[f"{COSINE}.query"].startswith("removal is not exact: cosine attention divides by the lengths")


def test_the_network_of_positions_is_left_and_named() -> None:
    model, importance = split("swin_v2"), DyingNeuronImportance()
    with importance.observe(model), torch.no_grad():
        model(IMAGES)
    skipped = dict(plan_removal(model, IMAGES[:1], importance, "neuron_sparsity", 0.05).skipped)
    assert "network of relative positions, which no image reaches" in skipped[f"{COSINE}.core"]
    assert importance.observer is not None and importance.observer.samples == 8  # of every layer that is observed


def _seen(model: nn.Module) -> dict[SplitAttention, tuple[Tensor, Tensor]]:
    """Query and key of each attention on the images, float64, shape [samples, positions, heads, width]."""
    seen: dict[SplitAttention, tuple[Tensor, Tensor]] = {}
    for attention in split_modules(model).values():

        def note(scores: Any, args: Any, attention: SplitAttention = attention) -> None:
            query, key = (a.detach().double().unflatten(2, (scores.num_heads, -1)) for a in args)
            seen[attention] = query, key

        attention.core.scores.register_forward_pre_hook(note)
    model(IMAGES)
    return seen


def test_the_basis_of_cosine_attention_is_orthogonal_and_puts_the_most_important_first() -> None:
    seen = _seen(split("swin_v2", [IMAGES]))
    assert len(seen) == 2
    for query, key in seen.values():
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        both = torch.einsum("nlhi,nlhj->hij", query, query) + torch.einsum("nlhi,nlhj->hij", key, key)
        diagonal = both.diagonal(dim1=1, dim2=2)
        assert (diagonal.diff() < 0).all()
        assert float((both - torch.diag_embed(diagonal)).abs().max() / diagonal.max()) < 1e-5
    original, model = made("swin_v2"), split("swin_v2", [IMAGES])
    query, key, _ = original.get_submodule(f"{COSINE}.qkv").weight.detach().view(3, 2, 16, -1).unbind()  # type: ignore[operator, union-attr]
    attention = split_modules(model)[COSINE]
    turned = [linear.weight.detach().view(2, 16, -1) for linear in (attention.query, attention.key)]
    change = [new @ torch.linalg.pinv(old) for new, old in zip(turned, (query, key), strict=True)]
    assert torch.allclose(change[0], change[1], atol=1e-4)
    assert torch.allclose(change[0] @ change[0].mT, torch.eye(16).expand(2, -1, -1), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_channels_of_a_head_say_most_of_its_scores(kind: str) -> None:
    for attention, (query, key) in _seen(split(kind, [IMAGES])).items():
        scores, half = attention.core.scores, attention.core.scores.width // 2

        def of(channels: slice, scores: Any = scores, query: Tensor = query, key: Tensor = key) -> Tensor:
            kept = torch.zeros(scores.width, dtype=query.dtype)
            kept[channels] = 1.0
            q, k = (
                a.unflatten(2, (scores.num_heads, -1))
                for a in scores((query * kept).flatten(2), (key * kept).flatten(2))
            )
            products = torch.einsum("nlhi,nshi->nhls", q, k)
            return products - products.mean(3, keepdim=True)  # of which softmax sees nothing

        first, last = (float((of(some) - of(slice(None))).square().sum()) for some in (slice(half), slice(half, None)))
        assert first < 0.5 * last


def test_channels_of_cosine_attention_are_judged_by_what_they_add_to_cosines() -> None:
    scores, (query, key) = CosineScores(8, 2), torch.randn(2, 3, 5, 8)
    products = scores.products(query, key)
    cosines = F.cosine_similarity(
        query.view(3, 5, 1, 2, 4), key.view(3, 1, 5, 2, 4), dim=-1
    )  # [samples, queries, keys, heads]
    centered = cosines - cosines.mean(2, keepdim=True)
    for place, product in enumerate(products.view(3, -1, 5, 2, 4).sum(-1).unbind(1)):
        distance = (centered - product[:, :, None]).abs().amax((0, 3))
        assert (distance.min(1).values < 1e-6).all(), place
    assert torch.allclose(scores.products(3 * query, key * torch.rand(3, 5, 1)), products, atol=1e-6)


def test_cosine_attention_trains_as_before() -> None:
    """Plain gradient steps do not depend on the basis; the bias of the key counts and learns nothing, as before."""
    one = made("swin_v2")
    other = copy.deepcopy(one)
    split_attention(other, IMAGES[:1], [IMAGES])
    assert all(attention.key.bias is None for attention in split_modules(other).values())
    start = eval_outputs(one, IMAGES)
    for model in (one, other):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(IMAGES).square().mean().backward()
            optimizer.step()
    after = eval_outputs(one, IMAGES)
    assert output_difference(start, after)[1] > 0.05
    assert output_difference(after, eval_outputs(other, IMAGES))[1] < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_16_bits(kind: str) -> None:
    model, images = mild(kind).bfloat16(), IMAGES.bfloat16()
    before = eval_outputs(model, images)
    assert split_attention(model, images[:1], [images]) == {}
    assert output_difference(before, eval_outputs(model, images))[1] < 0.1
    model = mild(kind)
    with torch.autocast("cpu", torch.bfloat16):
        before = eval_outputs(model, IMAGES)
        assert split_attention(model, IMAGES[:1]) == {}
        assert output_difference(before, eval_outputs(model, IMAGES))[1] < 0.1
        model(IMAGES).float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class _Twisted(ShiftedWindowAttentionV2):  # type: ignore[misc]
    """Whose biases of positions are others than they look like."""

    def get_relative_position_bias(self) -> Tensor:
        return -super().get_relative_position_bias()  # type: ignore[no-any-return]


class _WithTable(nn.Module):
    """Windows of another package, with biases by relative position."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.relative_position_bias_table = 2, nn.Parameter(torch.zeros(9, 2))
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.qkv(x)[..., :16])  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (_Twisted(16, [4, 4], [0, 0], 2), "it computes something else than"),
        (_WithTable(), "it has other weights than those of its projections and of relative positions"),
    ],
)
def test_other_windows_are_left_and_named(attention: nn.Module, reason: str) -> None:
    model, x = spread(nn.Sequential(nn.Linear(8, 16), attention, nn.Linear(16, 3))), torch.randn(2, 8, 8, 8)
    before = model(x)
    with pytest.raises(InputError, match=f"1: {reason}"):
        split_attention(model, x)
    assert torch.equal(model(x), before)
