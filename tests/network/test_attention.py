"""Attention with a layer for each projection: the same outputs, and what can go from it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers.attention import spread, zeroed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer

from dnr_plugin import (
    DyingNeuronImportance,
    InputError,
    flop_report,
    load_pruned,
    plan_removal,
    prune_neurons,
    repair_network,
    save_pruned,
    split_attention,
)
from dnr_plugin.cli.main import main
from dnr_plugin.network.attention import AttentionScores, completed, split_modules
from dnr_plugin.network.calling import eval_outputs, output_difference

VIT = {
    "name": "torchvision.models:VisionTransformer",
    "kwargs": {
        "image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 48,
        "num_classes": 10,
    },
}  # fmt: skip


class Tokens(nn.Module):
    """Attention as DeiT and others write it."""

    def __init__(self, dim: int = 16, heads: int = 4, cosine: bool = False) -> None:
        super().__init__()
        self.num_heads, self.scale, self.cosine = heads, (dim // heads) ** -0.5, cosine
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.1), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.cosine:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = self.attn_drop((q @ k.transpose(2, 3) * self.scale).softmax(-1))
        mixed: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(n, length, width))
        return self.proj_drop(mixed)  # type: ignore[no-any-return]


def net(attention: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), attention, nn.Linear(16, 3))


class Encoder(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        return self.encoder(x, **masks)  # type: ignore[no-any-return]


def vit() -> nn.Module:
    return spread(VisionTransformer(**VIT["kwargs"]))  # type: ignore[arg-type]


IMAGES = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "example"),
    [
        (vit, IMAGES[:2]),
        (lambda: net(Tokens()), TOKENS),
        (lambda: Encoder(), torch.randn(2, 7, 16)),
        (lambda: Encoder(batch_first=False), torch.randn(7, 2, 16)),
    ],
)
@pytest.mark.parametrize("by_images", [False, True])
def test_split_attention_gives_the_same_outputs(
    make: Callable[[], nn.Module], example: Tensor, by_images: bool
) -> None:
    model = spread(make())
    before = eval_outputs(model, example)
    assert split_attention(model, example, [example] if by_images else None) == {}
    assert split_modules(model)
    assert output_difference(before, eval_outputs(model, example))[1] < 1e-4
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("batch_first", [True, False])
def test_masks_and_weights_are_those_of_torch(batch_first: bool) -> None:
    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first)
    holder = spread(nn.ModuleDict({"a": attention}))

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = holder["a"]

        def forward(self, x: Tensor, **masks: Any) -> Any:
            return self.a(x, x, x, **masks)

    model, x = Caller().eval(), torch.randn(2, 6, 16)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    inputs = x if batch_first else x.transpose(0, 1)
    calls: list[dict[str, Any]] = [
        {}, {"need_weights": False}, {"key_padding_mask": padding}, {"attn_mask": causal, "need_weights": False},
        {"attn_mask": causal, "is_causal": True}, {"key_padding_mask": padding, "attn_mask": causal},
        {"average_attn_weights": False}, {"attn_mask": torch.randn(8, 6, 6)},
    ]  # fmt: skip
    expected = [model(inputs, **masks) for masks in calls]
    one = model(x[0])
    split_attention(model, inputs)
    for masks, (outputs, weights) in zip(calls, expected, strict=True):
        given = model(inputs, **masks)
        assert torch.allclose(given[0], outputs, atol=1e-5), masks
        assert (weights is None) == (given[1] is None)
        assert weights is None or torch.allclose(given[1], weights, atol=1e-5), masks
    assert torch.allclose(model(x[0])[0], one[0], atol=1e-5)


def test_the_basis_makes_channels_of_a_head_independent_and_puts_the_most_important_first() -> None:
    model = vit()
    split_attention(model, IMAGES[:1], [IMAGES])
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    for attention in split_modules(model).values():
        attention.core.scores.register_forward_pre_hook(lambda module, args: seen.update({module: args}))
    model(IMAGES)
    assert len(seen) == 2
    for scores, (query, key) in seen.items():
        assert isinstance(scores, AttentionScores)
        for a in (query, key - key.mean(1, keepdim=True)):
            by_head = scores.by_head(a.detach()).transpose(0, 1).flatten(1, 2).double()
            moments = by_head.mT @ by_head
            diagonal = moments.diagonal(dim1=1, dim2=2)
            assert (diagonal.diff() < 1e-6 * diagonal[:, :1]).all()
            off = moments - torch.diag_embed(diagonal)
            assert float(off.abs().max() / diagonal.max()) < 1e-3


ATTENTION = "encoder.layers.encoder_layer_1.self_attention"


@pytest.mark.parametrize(
    "removals",
    [
        {f"{ATTENTION}.value": [*range(8, 16)]},  # a head of four
        {f"{ATTENTION}.query": [6, 7, 14, 15, 22, 23, 30, 31]},  # two channels of every head
        {f"{ATTENTION}.value": [*range(8), *range(24, 32)], f"{ATTENTION}.query": [0, 8, 16, 24]},
    ],
)
def test_heads_and_channels_go_as_if_they_were_zero(removals: dict[str, list[int]], tmp_path: Any) -> None:
    model = vit()
    split_attention(model, IMAGES[:1], [IMAGES])
    expected = eval_outputs(zeroed(model, removals), IMAGES)
    before = sum(p.numel() for p in model.parameters())
    prune_neurons(model, IMAGES[:1], removals)
    assert output_difference(expected, eval_outputs(model, IMAGES))[1] < 1e-5
    assert sum(p.numel() for p in model.parameters()) < before
    attention = split_modules(model)[ATTENTION]
    assert attention.core.scores.num_heads == attention.core.heads.num_heads
    save_pruned(model, tmp_path, VIT)
    assert torch.equal(load_pruned(tmp_path, allow_import=True)(IMAGES), model(IMAGES))


def test_what_leaves_heads_of_different_widths_is_refused_and_undone() -> None:
    model = vit()
    split_attention(model, IMAGES[:1])
    before = eval_outputs(model, IMAGES)
    for removals in ({f"{ATTENTION}.query": [0]}, {f"{ATTENTION}.value": [0, 1]}, {f"{ATTENTION}.query": [*range(8)]}):
        with pytest.raises(InputError, match="nothing was removed"):
            prune_neurons(model, IMAGES[:1], removals)
        assert output_difference(before, eval_outputs(model, IMAGES)) == (0.0, 0.0)


def test_query_and_key_of_a_head_go_with_its_values() -> None:
    model = vit()
    split_attention(model, IMAGES[:1])
    splits = split_modules(model)
    removals = {f"{ATTENTION}.value": [*range(8)], f"{ATTENTION}.query": [15]}
    assert completed(splits, removals) == {
        f"{ATTENTION}.value": [*range(8)], f"{ATTENTION}.query": [*range(8), 15]
    }  # fmt: skip
    assert completed(splits, {f"{ATTENTION}.value": [0, 1]}) == {f"{ATTENTION}.value": [0, 1]}
    assert removals[f"{ATTENTION}.query"] == [15]


def test_attention_that_computes_something_else_is_left_and_named() -> None:
    model = nn.Sequential(nn.Linear(8, 16), Tokens(), Tokens(cosine=True), nn.Linear(16, 3)).eval()
    before = model(TOKENS)
    left = split_attention(model, TOKENS)
    assert left == {"2": "it computes something else than scaled dot products of query and key"}
    assert [*split_modules(model)] == ["1"]
    assert torch.allclose(model(TOKENS), before, atol=1e-5)
    for none in (net(Tokens(cosine=True)).eval(), nn.Sequential(nn.Linear(8, 3))):
        with pytest.raises(InputError, match="expected attention that can be split"):
            split_attention(none, TOKENS)


def test_hooked_and_unequal_attention_is_named() -> None:
    hooked, wide = net(Tokens()).eval(), nn.MultiheadAttention(16, 4, kdim=8, vdim=8)
    hooked.get_submodule("1").register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="1: hooks hang on it"):
        split_attention(hooked, TOKENS)

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = wide

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.attention(x, y, y)[0]  # type: ignore[no-any-return]

    with pytest.raises(InputError, match="attention: its query, key and value are not of one width"):
        split_attention(Cross().eval(), (torch.randn(2, 5, 16), torch.randn(2, 5, 8)))


def test_attention_across_two_inputs_is_split_and_pruned() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.y = nn.Linear(8, 16), nn.Linear(8, 16)
            self.attention, self.end = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x, y = self.x(x), self.y(y)
            return self.end(self.attention(x, y, y)[0])  # type: ignore[no-any-return]

    model, inputs = spread(Cross()), (torch.randn(2, 5, 8), torch.randn(2, 7, 8))
    assert split_attention(model, inputs) == {}
    removals = {"attention.value": [*range(4)], "attention.query": [3, 7, 11, 15]}
    expected = eval_outputs(zeroed(model, removals), inputs)
    prune_neurons(model, inputs, removals)
    assert output_difference(expected, eval_outputs(model, inputs))[1] < 1e-5


def _observed(model: nn.Module) -> DyingNeuronImportance:
    importance = DyingNeuronImportance()
    with importance.observe(model), torch.no_grad():
        for images in torch.split(IMAGES, 8):
            model(images)
    return importance


def test_scores_put_what_is_useless_first() -> None:
    model = vit()
    split_attention(model, IMAGES[:1], [IMAGES])
    attention = split_modules(model)[ATTENTION]
    with torch.no_grad():
        for head in range(4):
            attention.query.weight[8 * head + 5] = 0.0  # a channel of no effect in each head
            attention.query.bias[8 * head + 5] = 0.0
        attention.value.weight[16:24] = 0.0
        attention.value.bias[16:24] = 0.0  # and a head
    expected = eval_outputs(model, IMAGES)
    plan = plan_removal(model, IMAGES[:1], _observed(model), "dead")
    assert plan.removals == {
        f"{ATTENTION}.value": [*range(16, 24)], f"{ATTENTION}.query": [5, 13, *range(16, 24), 29]
    }  # fmt: skip
    prune_neurons(model, IMAGES[:1], plan.removals)
    assert output_difference(expected, eval_outputs(model, IMAGES))[1] < 1e-5


@pytest.mark.parametrize(("kind", "value"), [("flops", 0.5), ("neuron_sparsity", 0.6), ("params", 0.4)])
def test_a_plan_is_what_is_then_removed(kind: str, value: float) -> None:
    model = vit()
    split_attention(model, IMAGES[:1], [IMAGES])
    dense = copy.deepcopy(model)
    plan = plan_removal(model, IMAGES[:1], _observed(model), kind, value, scope="cost_aware")
    before = flop_report(model, IMAGES[:1])
    sizes = {name: m.out_features for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    prune_neurons(model, IMAGES[:1], plan.removals)
    after = flop_report(model, IMAGES[:1])
    now = {name: m.out_features for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    gone = {name: sizes[name] - now[name] for name in plan.removals}
    assert gone == {name: len(neurons) for name, neurons in plan.removals.items()}
    achieved = {
        "flops": after.flops / before.flops, "params": after.params / before.params,
        "neuron_sparsity": sum(gone.values()) / plan.dense_neurons,
    }  # fmt: skip
    assert plan.achieved == pytest.approx(achieved[kind])
    repairs = repair_network(copy.deepcopy(model), dense, IMAGES[:1], plan.removals, IMAGES)
    assert {repair.layer for repair in repairs if repair.damping is not None}
    assert not [repair for repair in repairs if repair.left]


def test_statistics_follow_when_heads_go() -> None:
    model = vit()
    split_attention(model, IMAGES[:1], [IMAGES])
    importance = _observed(model)
    prune_neurons(model, IMAGES[:1], {f"{ATTENTION}.value": [*range(8)]}, importance=importance)
    assert importance.observer is not None and importance.histories == {}  # which carries removals over
    followed = importance.observer.activities[f"{ATTENTION}.core.scores"]
    again = _observed(model).observer
    assert again is not None
    assert torch.allclose(followed.mean, again.activities[f"{ATTENTION}.core.scores"].mean, atol=1e-4)
    plan_removal(model, IMAGES[:1], importance, "neuron_sparsity", 0.3)


def test_products_of_attention_are_counted() -> None:
    model = vit()
    split_attention(model, IMAGES[:1])
    report = flop_report(model, IMAGES[:1])
    assert "aten::scaled_dot_product_attention" not in report.unsupported_ops
    core = {layer.name: layer.flops for layer in report.layers}[f"{ATTENTION}.core"]
    assert core == 4 * 17 * 17 * (8 + 8)  # heads, positions, positions, widths
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(IMAGES[:1])
    matrices = counter.get_total_flops() / 2
    norms = 5 * 17 * 32 * 5  # LayerNorm, which fvcore counts and torch does not
    assert report.flops == pytest.approx(matrices + norms, rel=1e-3)


def test_shared_attention_is_left_and_named() -> None:
    first, second = Tokens(), Tokens()
    second.qkv.weight = first.qkv.weight
    model = nn.Sequential(nn.Linear(8, 16), first, second, Tokens(), nn.Linear(16, 3)).eval()
    left = split_attention(model, TOKENS)
    assert left == dict.fromkeys(("1", "2"), "it shares a parameter with another layer")
    assert [*split_modules(model)] == ["3"]


def test_images_that_do_not_fit_leave_the_model_as_it_was() -> None:
    model = vit()
    modules = [*model.modules()]
    for images in ([IMAGES * torch.nan], [IMAGES[:, :1]], []):
        with pytest.raises((InputError, RuntimeError)):
            split_attention(model, IMAGES[:1], images)
        assert [*model.modules()] == modules


def test_an_optimizer_follows_when_heads_and_channels_go() -> None:
    model = vit()
    split_attention(model, IMAGES[:1], [IMAGES])
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()

    step()
    removals = {f"{ATTENTION}.value": [*range(8)], f"{ATTENTION}.query": [7, 15, 23, 31]}
    prune_neurons(model, IMAGES[:1], removals, optimizer=optimizer)
    kept = zip(model.parameters(), optimizer.param_groups[0]["params"], strict=True)
    assert all(ours is theirs for ours, theirs in kept)
    step()
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())


def test_autocast_with_masks() -> None:
    model, x = Encoder().eval(), torch.randn(2, 7, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.train()(x, mask=mask)
        split_attention(model.eval(), x)
        given = model.train()(x, mask=mask)
    assert given.shape == expected.shape


def test_a_recipe_prunes_attention(tiny: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(tiny.read_text())
    recipe["model"] = {"name": VIT["name"], "kwargs": {k: v for k, v in VIT["kwargs"].items() if k != "num_classes"}}
    recipe["prune"] |= {"attention": True, "target": {"neuron_sparsity": 0.7}}
    tiny.write_text(yaml.safe_dump(recipe))
    assert main(["plan", str(tiny)]) == 0
    assert main(["run", str(tiny), "--output", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["sparsity"]["neuron"] >= 0.7 - 1e-9
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert any(layers[f"{ATTENTION}.{part}"]["channels_after"] < 32 for part in ("query", "value"))
    loaded = load_pruned(tmp_path / "run", allow_import=True)
    assert [*split_modules(loaded)] == [ATTENTION.replace("_1", "_0"), ATTENTION]
    assert main(["report", str(tmp_path / "run"), "--format", "json"]) == 0
