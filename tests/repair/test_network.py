"""Layers that lost redundant neurons give again what they gave; others come as close as least squares can."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from helpers.common import assume
from helpers.networks import Dense, Grouped, Mobile, Residual, images, make, rounding
from torch import Tensor, nn

from dnr_plugin.errors import InputError, RunError
from dnr_plugin.models.build import build_model
from dnr_plugin.network.batchnorm import recalibrate_batchnorm
from dnr_plugin.network.calling import eval_outputs
from dnr_plugin.network.graph import build_graph
from dnr_plugin.observation import moments
from dnr_plugin.pruning.plan import plan_removal
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.recipe.sections import ModelOptions
from dnr_plugin.repair import least_squares
from dnr_plugin.repair import network as repair_module
from dnr_plugin.repair import reference as reference_module
from dnr_plugin.repair.network import kept_channels, repair_network, repair_towards
from dnr_plugin.repair.reference import Reference
from dnr_plugin.scoring import brain_surgeon
from dnr_plugin.scoring.importance import DyingNeuronImportance

pytestmark = pytest.mark.filterwarnings("ignore:.*is left alone.*")

Mix = Mapping[int, Mapping[int, float]]  # neuron -> which others it is a combination of


def tokens(n: int, seed: int) -> Tensor:
    return torch.randn(n, 5, 6, generator=torch.Generator().manual_seed(seed))


def vectors(n: int, seed: int) -> Tensor:
    return tokens(n, seed).flatten(1)[:, :10]


class Attention(nn.Module):
    """Queries, keys and values by linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 12)
        self.q, self.k, self.v, self.out = (nn.Linear(i, 8) for i in (12, 12, 12, 8))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.fc(F.relu(self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))).mean(1))


class Multihead(nn.Module):
    """PyTorch's own attention. Torch-Pruning takes its inner features along with those that it reads.

    These are planted to be zero, and its keys as well: logits are scaled by the square root of the width of a head,
    which is another once it is pruned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.fc = nn.Linear(6, 12), nn.MultiheadAttention(12, 3, batch_first=True), None
        self.fc = nn.Linear(12, 4)
        with torch.no_grad():
            self.attention.in_proj_weight[12:24] = 0.0
            self.attention.in_proj_weight[[24 + k for k in (1, 5, 9)]] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.fc(self.attention(x, x, x, need_weights=False)[0])


class Normed(nn.Module):
    """A residual stream with BatchNorm behind every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a1, self.a2 = (nn.Conv2d(i, 8, 3, padding=1, bias=False) for i in (3, 8, 8))
        self.b1, self.b2 = (nn.Conv2d(8, 8, k, padding=k // 2, bias=False) for k in (1, 3))
        self.n0, self.n1, self.n2, self.n3, self.n4 = (nn.BatchNorm2d(8) for _ in range(5))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.n0(self.stem(x)))
        x = F.relu(self.n2(self.a2(F.relu(self.n1(self.a1(x))))) + x)
        x = F.relu(self.n4(self.b2(F.relu(self.n3(self.b1(x))))) + x)
        return self.fc(x.mean((2, 3)))


def behind(consumer: nn.Module, act: nn.Module | None = None, *rest: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), act or nn.ReLU(), consumer, *rest)


SAME: Mix = {1: {0: 1.0}, 5: {3: 1.0}, 10: {3: 1.0}}
SCALED: Mix = {1: {0: 2.0}, 5: {3: 0.5}}  # through a ReLU
LINEAR: Mix = {1: {0: 1.0}, 4: {0: 0.5, 2: -1.0, 3: 0.7}, 7: {8: 1.2, 9: 0.4}}
EVERY_FOURTH: Mix = {1: {0: 1.0}, 5: {4: 1.0}, 9: {8: 1.0}}
FEW: Mix = {1: {0: 1.0}, 6: {3: 1.0}}
BLIND = ("grouped", "attention by PyTorch")  # redundancy does not know that channel groups lose equally many

CASES: dict[str, tuple[Callable[[], nn.Module], str, Mix, Callable[[int, int], Tensor]]] = {
    "conv 3x3": (lambda: behind(nn.Conv2d(12, 6, 3, padding=1)), "0", SCALED, images),
    "conv 3x3, linear": (lambda: behind(nn.Conv2d(12, 6, 3, padding=1), nn.Identity()), "0", LINEAR, images),
    "conv 1x1": (lambda: behind(nn.Conv2d(12, 6, 1), nn.Identity()), "0", LINEAR, images),
    "conv 5x5, stride 2": (
        lambda: behind(nn.Conv2d(12, 6, 5, stride=2, padding=2), nn.Identity()), "0", LINEAR, images),
    "reflect": (
        lambda: behind(nn.Conv2d(12, 6, 3, padding=1, padding_mode="reflect"), nn.Identity()), "0", LINEAR, images),
    "no bias": (lambda: behind(nn.Conv2d(12, 6, 3, padding=1, bias=False), nn.SiLU()), "0", SAME, images),
    "grouped": (lambda: behind(nn.Conv2d(12, 6, 3, padding=1, groups=3)), "0", EVERY_FOURTH, images),
    "depthwise": (
        lambda: behind(nn.Conv2d(12, 12, 3, padding=1, groups=12), None, nn.BatchNorm2d(12), nn.ReLU(),
                       nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)), "0", SAME, images),
    "transposed": (lambda: behind(nn.ConvTranspose2d(12, 6, 3, padding=1)), "0", SCALED, images),
    "flatten": (
        lambda: behind(nn.AdaptiveAvgPool2d(2), None, nn.Flatten(), nn.Linear(48, 5)), "0", SCALED, images),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)),
        "2", SCALED, vectors),
    "attention": (Attention, "embed", LINEAR, tokens),
    "attention by PyTorch": (Multihead, "embed", EVERY_FOURTH, tokens),
    "residual": (Residual, "stem", FEW, images),
    "residual, BatchNorm": (Normed, "stem", FEW, images),
    "inverted bottleneck": (Mobile, "expand", SAME, images),
    "concatenation": (Dense, "stem", {1: {0: 1.0}, 4: {3: 1.5}}, images),
}  # fmt: skip


def group_of(model: nn.Module, example: Tensor, root: str, neurons: list[int]) -> tp.dependency.Group:
    graph = build_graph(model, example)
    module = model.get_submodule(root)
    return graph.get_pruning_group(module, graph.get_pruner_of_module(module).prune_out_channels, neurons)


@torch.no_grad()
def plant(model: nn.Module, example: Tensor, root: str, mix: Mix) -> None:
    """Makes neurons combinations of others, at everything that makes them."""
    count = model.get_submodule(root).weight.shape[0]
    group = group_of(model, example, root, [*range(count)])
    for item in group.items:
        module = item.dep.target.module
        if not group._DG.is_out_channel_pruning_fn(item.dep.handler):
            continue
        if isinstance(module, nn.MultiheadAttention):
            module = module.out_proj
        if not isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            continue
        found = [module.weight, module.bias]
        if isinstance(module, nn.BatchNorm2d):
            found += [module.running_mean, module.running_var]
        place = dict(zip(item.root_idxs, item.idxs, strict=True))
        for values in found:
            for neuron, others in mix.items() if values is not None else ():
                values[place[neuron]] = sum(share * values[place[other]] for other, share in others.items())


def planted(name: str, seed: int = 0) -> tuple[nn.Module, str, list[int], Callable[[int, int], Tensor]]:
    build, root, mix, data = CASES[name]
    torch.manual_seed(seed)
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # of a network that was trained
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        recalibrate_batchnorm(model, [data(64, 9)])
    plant(model, data(2, 0), root, mix)
    return model, root, sorted(mix), data


def observed(model: nn.Module, data: Callable[[int, int], Tensor], **settings: Any) -> DyingNeuronImportance:
    importance = DyingNeuronImportance(**{"score": "redundancy", **settings})
    with torch.no_grad(), importance.observe(model):
        for seed in range(4):
            model(data(64, seed))
    return importance


def unrecovered(mix: Mix) -> float:
    r"""What damping may leave of combinations that the other neurons carry, relative to the outputs.

    With damping :math:`\lambda` (of the mean variance) a ridge regression misses :math:`\lambda / (\sigma + \lambda)`
    of each direction of variance :math:`\sigma`, so that its error is at most
    :math:`\max_\sigma \sqrt\sigma \lambda / (\sigma + \lambda) = \sqrt\lambda / 2` for a coefficient of one, however
    the inputs are conditioned. The moments' rounding is part of :math:`\lambda`, which is chosen to exceed it.
    """
    weights = [share for others in mix.values() for share in others.values()]
    damping = moments._ROUNDING + min(brain_surgeon._DAMPINGS)
    return 0.5 * damping**0.5 * sum(share**2 for share in weights) ** 0.5


def lost(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    """Difference of the outputs, relative to their size."""
    (found,), (expected,) = eval_outputs(model, x), eval_outputs(dense, x)
    return float((found - expected).norm() / expected.norm())


def difference(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    """Difference of the outputs, relative to how they vary from image to image."""
    (found,), (expected,) = eval_outputs(model, x), eval_outputs(dense, x)
    return float((found - expected).norm() / (expected - expected.mean(0)).norm())


@pytest.mark.parametrize("how", ["pruner", "graph", "network"])
@pytest.mark.parametrize("name", CASES)
def test_without_redundant_neurons_outputs_stay(name: str, how: str) -> None:
    """On images that nothing was fitted to."""
    model, root, gone, data = planted(name)
    dense, example, held_out = copy.deepcopy(model), data(2, 0), data(32, 99)
    width = model.get_submodule(root).weight.shape[0]
    if how == "network":
        prune_neurons(model, example, {root: gone})
        bare = lost(model, dense, held_out)
        layers = repair_network(model, dense, example, {root: gone}, [data(64, seed) for seed in range(4)])
        if name in ("transposed", "attention by PyTorch"):
            left = {"transposed": ("2", "ConvTranspose2d"), "attention by PyTorch": ("attention", "MultiheadAttention")}
            layer, kind = left[name]
            assert {row.layer: row.left for row in layers}[layer] == f"{kind} is not repaired"
            return
    elif how == "graph":
        importance = observed(model, data)
        unrepaired = copy.deepcopy(model)
        prune_neurons(unrepaired, example, {root: gone})
        bare = lost(unrepaired, dense, held_out)
        group = group_of(model, example, root, gone)
        assert importance.repair(group) == {}
        group.prune()
    else:
        if name in BLIND:
            return
        importance, bare = observed(model, data), 1.0
        pruner = tp.pruner.BasePruner(
            model, example, importance, pruning_ratio=0.0, in_channel_groups={}, out_channel_groups={}, num_heads={},
            pruning_ratio_dict={model.get_submodule(root): (len(gone) - 0.5) / width},
        )  # fmt: skip
        for group in pruner.step(interactive=True):
            importance.repair(group)
            group.prune()
    assert model.get_submodule(root).weight.shape[0] == width - len(gone)
    assume(bare > 4 * unrecovered(CASES[name][2]), "removal alone was expected to show")
    assert lost(model, dense, held_out) < unrecovered(CASES[name][2])


@pytest.mark.parametrize("name", ["conv 3x3", "conv 3x3, linear", "flatten", "mlp", "residual, BatchNorm"])
def test_redundancy_takes_what_others_reproduce(name: str) -> None:
    """As many as were planted, of all layers: nothing is lost; and of each duplicated pair not both."""
    model, _, gone, data = planted(name)
    importance, example = observed(model, data), data(1, 0)
    hidden = plan_removal(model, example, importance, "neuron_sparsity", 0.0).neurons
    plan = plan_removal(model, example, importance, "neuron_sparsity", len(gone) / hidden, scope="global")
    assert {name: len(found) for name, found in plan.removals.items()} == {
        next(iter(plan.removals)): len(gone)
    }  # one layer, whatever Torch-Pruning calls its root
    mix = CASES[name][2]
    (found,) = plan.removals.values()
    for neuron, others in mix.items():
        if len(others) == 1:
            assert set(found) & {neuron, *others}
            assert not {neuron, *others} <= set(found)
    dense = copy.deepcopy(model)
    prune_neurons(model, example, plan.removals)
    repair_network(model, dense, example, plan.removals, [data(64, seed) for seed in range(4)])
    assert lost(model, dense, data(32, 99)) < unrecovered(mix)


# ---- what could go wrong


def test_nothing_removed_changes_nothing() -> None:
    for name in ("residual, BatchNorm", "depthwise", "mlp", "attention", "grouped"):
        model, _, _, data = planted(name)
        before = copy.deepcopy(model.state_dict())
        layers = repair_network(model, copy.deepcopy(model), data(2, 0), {}, [data(64, 0)])
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), name
        assert all(row.damping is None for row in layers)
        assert max(row.error_after for row in layers) < rounding(72, 5) ** 2  # a mean of squares


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model(ModelOptions(name="resnet20", width=8), 5, image_size=8).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    recalibrate_batchnorm(model, [images(128, 9)])
    return model


REMOVED = {"layer1.1.conv1": [1], "layer2.0.conv1": [0], "layer3.1.conv1": [0, 1]}


def test_it_comes_closer_than_recalibration() -> None:
    model = resnet()
    dense, batches = copy.deepcopy(model), [images(64, seed) for seed in range(4)]
    prune_neurons(model, images(1), REMOVED)
    recalibrated = copy.deepcopy(model)
    recalibrate_batchnorm(recalibrated, batches)
    held_out = images(64, 99)
    bare, recalibration = difference(model, dense, held_out), difference(recalibrated, dense, held_out)
    layers = repair_network(model, dense, images(1), REMOVED, batches)
    found = difference(model, dense, held_out)
    assert found < bare
    assert found < recalibration
    fitted = [row for row in layers if row.damping is not None]
    assert len(fitted) >= 6
    assert all(row.error_after < row.error_before for row in fitted)
    assert [row.layer for row in layers][:2] == ["conv1", "layer1.0.conv1"]
    assert all(row.damping is None and row.left is None for row in layers[:4])  # of what nothing upstream was taken


def test_recalibration_and_training_take_up_where_repair_ends() -> None:
    """BatchNorm's statistics are those of the repaired network: taken anew, or from a batch, they change little."""
    model, batches = resnet(), [images(64, seed) for seed in range(8)]
    dense = copy.deepcopy(model)
    prune_neurons(model, images(1), REMOVED)
    repair_network(model, dense, images(1), REMOVED, batches)
    repaired, recalibrated, held_out = copy.deepcopy(model), copy.deepcopy(model), images(256, 99)
    recalibrate_batchnorm(recalibrated, batches)
    lost = difference(repaired, dense, held_out)
    assert difference(recalibrated, repaired, held_out) < 0.5 * lost
    assert difference(recalibrated, dense, held_out) < 1.04 * lost
    with torch.no_grad():
        trained, (wanted,) = model.train()(held_out), eval_outputs(repaired, held_out)
    assert float((trained - wanted).norm() / wanted.norm()) < 0.14


def test_the_same_seed_gives_the_same_weights() -> None:
    states = []
    for seed in (0, 0, 1):
        model = make("residual")
        dense = copy.deepcopy(model)
        prune_neurons(model, images(1), {"a1": [0, 3]})
        repair_network(model, dense, images(1), {"a1": [0, 3]}, [images(64)], rows=256, seed=seed)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert not all(torch.equal(value, states[2][key]) for key, value in states[0].items())


def test_one_reference_serves_many_networks() -> None:
    """Each is repaired as by itself, and what one was pruned of is nothing to the next."""
    dense, found = make("residual"), []
    reference = Reference(dense, images(1), images(64), seed=3)
    for removals in ({"a1": [0, 3]}, {"b1": [1]}, {"a1": [0, 3]}):
        model = copy.deepcopy(dense)
        prune_neurons(model, images(1), removals)
        alone = copy.deepcopy(model)
        rows = repair_towards(model, reference, removals)
        assert rows == repair_network(alone, dense, images(1), removals, images(64), seed=3)
        assert all(torch.equal(value, alone.state_dict()[key]) for key, value in model.state_dict().items())
        found.append(rows)
    assert found[0] == found[2] != found[1]


def test_rows_are_bounded_by_memory() -> None:
    """Sixteen of each image, fewer where that would be too much, never fewer than one and a half for each weight."""
    for memory, rows in ((2**29, 64 * 16), (4 * 72 * 640, 640), (4, 108)):
        reference = Reference(make("residual"), images(1), images(64), memory=memory)
        assert len(reference.targets["a1"]) == 64 * max(rows // 64, 1)


def broken(how: str) -> tuple[nn.Module, Tensor]:
    model, x = Normed().eval(), images(64)
    recalibrate_batchnorm(model, [x])
    with torch.no_grad():
        if how == "dead layer":
            model.n1.weight.zero_()
            model.n1.bias.fill_(-1.0)
        elif how == "zero scales":
            model.n1.weight[:3] = 0.0
            model.n2.weight.zero_()
            model.n4.weight[[0, 5]] = 0.0
        elif how == "zero weights":
            model.b1.weight.zero_()
            model.fc.weight.zero_()
        elif how == "constant inputs":
            x = torch.full_like(x, 0.7)
        elif how == "zero inputs":
            x = torch.zeros_like(x)
        elif how == "large means":
            x = x * 1e-2 + 1e3
            recalibrate_batchnorm(model, [x])
        elif how == "constant neurons":
            model.n1.weight[:4] = 0.0
            model.n1.bias[:4] = 2.0
    return model, x


@pytest.mark.parametrize(
    "how",
    ["dead layer", "zero scales", "zero weights", "constant inputs", "zero inputs", "large means", "constant neurons"],
)
@pytest.mark.parametrize("way", ["network", "pairs", "group by group"])
def test_degenerate_networks_come_no_further_from_the_dense_one(how: str, way: str) -> None:
    torch.manual_seed(0)
    model, x = broken(how)
    dense, example, removals = copy.deepcopy(model), images(1), {"a1": [0, 5], "b1": [2]}
    if way != "group by group":
        prune_neurons(model, example, removals)
        bare = copy.deepcopy(model)
        layers = repair_network(model, dense, example, removals, [x], pairs=way == "pairs")
        assert all(0.0 <= row.error_after <= row.error_before < float("inf") for row in layers)
        if way == "network":  # the second of a pair also changes by what it reads
            assert all(row.error_after == row.error_before for row in layers if row.damping is None)
    else:
        importance = DyingNeuronImportance("redundancy")
        with torch.no_grad(), importance.observe(model):
            for part in x.split(16):
                model(part)
        bare = copy.deepcopy(model)
        prune_neurons(bare, example, removals)
        for root, gone in removals.items():
            assert torch.isfinite(importance(group_of(model, example, root, [*range(8)]))).all()
            group = group_of(model, example, root, gone)
            importance.repair(group)
            group.prune()
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    (expected,), (found,), (without,) = (eval_outputs(m, x) for m in (dense, model, bare))
    assert torch.isfinite(found).all()
    scale = float(max(part.abs().max() for part in (x, expected)))  # large means come into every sum
    assert (found - expected).norm() <= (without - expected).norm() + rounding(72, 6) * scale * expected.numel() ** 0.5


def test_images_that_are_all_alike_are_no_evidence() -> None:
    """They tell one value for each position; what fits all positions seen must not be wrong at the others, or on
    other images worse than no repair."""
    for seed in range(6):
        torch.manual_seed(seed)
        dense = Normed().eval()
        recalibrate_batchnorm(dense, [images(64)])
        model = copy.deepcopy(dense)
        prune_neurons(model, images(1), {"a1": [0, 5], "b1": [2]})
        bare = copy.deepcopy(model)
        alike, others = images(1, seed).expand(64, -1, -1, -1), images(64, 100 + seed)
        repair_network(model, dense, images(1), {"a1": [0, 5], "b1": [2]}, [alike])
        assert lost(model, dense, alike) < lost(bare, dense, alike)
        assert lost(model, dense, others) < 1.5 * lost(bare, dense, others)


def test_inputs_that_are_not_finite_are_an_error() -> None:
    model = make("residual").train()
    dense = copy.deepcopy(model)
    prune_neurons(model, images(1), {"a1": [0]})
    model.a1.eval()
    before = [m.training for m in model.modules()]
    with pytest.raises(RunError, match="stem: expected inputs that are finite"):
        repair_network(model, dense, images(1), {"a1": [0]}, [images(8) * float("nan")])
    for module in (model, dense):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert [m.training for m in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in dense.modules())


def test_no_images_are_an_error() -> None:
    model = make("residual")
    with pytest.raises(InputError, match="images: expected at least one batch"):
        repair_network(model, model, images(1), {}, [])


def test_models_that_do_not_run_alike_are_an_error() -> None:
    class Changing(Residual):
        short = False

        def forward(self, x: Tensor) -> Tensor:
            if self.short:
                return self.fc(self.a2(self.relu(self.stem(x))).mean((2, 3)) + self.b1(x[:, [0] * 8]).mean())
            return super().forward(x)

    model = Changing().eval()
    dense = copy.deepcopy(model)
    model.short = True
    with pytest.raises(RunError, match="expected to run like the dense one"):
        repair_network(model, dense, images(1), {}, [images(8)])


def test_everything_but_weights_is_left_as_it_was() -> None:
    model = resnet().train()
    model.layer1.eval()
    model.conv1.weight.requires_grad_(False)
    removals = REMOVED
    dense = copy.deepcopy(model)
    prune_neurons(model, images(1), removals)
    calls: list[int] = []
    handle = model.fc.register_forward_hook(lambda *_: calls.append(1))
    modes = [m.training for m in model.modules()], [m.training for m in dense.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    states = copy.deepcopy(dense.state_dict())
    counts = {key: value.clone() for key, value in model.state_dict().items() if "num_batches" in key}
    repair_network(model, dense, images(1), removals, [images(64)])
    assert modes == ([m.training for m in model.modules()], [m.training for m in dense.modules()])
    assert grads == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None and p.is_leaf for p in model.parameters())
    assert all(torch.equal(value, states[key]) for key, value in dense.state_dict().items())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in counts.items())
    assert calls
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*model.modules(), *dense.modules()])


def test_a_stream_that_two_layers_are_added_to() -> None:
    """Parallel branches: both sums read what was there before."""

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.hidden, self.a, self.b = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8, 8))
            self.fc = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            y = F.relu(self.hidden(x))
            return self.fc((F.relu(self.a(y) + x) * torch.sigmoid(self.b(y) + x)).mean((2, 3)))

    torch.manual_seed(0)
    model = Parallel().eval()
    plant(model, images(1), "hidden", {2: {1: 1.0}})
    dense = copy.deepcopy(model)
    prune_neurons(model, images(1), {"hidden": [2]})
    layers = repair_network(model, dense, images(1), {"hidden": [2]}, [images(64, seed) for seed in range(2)])
    assert lost(model, dense, images(16, 99)) < unrecovered({2: {1: 1.0}})
    assert {row.layer for row in layers if row.damping is not None} == {"a", "b"}


def test_layers_that_run_twice_or_not_at_all_are_named() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = (nn.Linear(i, 10) for i in (10, 10, 10))
            self.c = nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.b(F.relu(self.a(x))))
            return self.c(F.relu(self.b(x)))

    model = Twice().eval()
    layers = repair_network(model, copy.deepcopy(model), vectors(2, 0), {}, [vectors(64, 1)])
    assert {row.layer: row.left for row in layers if row.left} == dict.fromkeys(
        ("b", "unused"), "it runs more than once, or not at all"
    )


def test_layers_that_read_very_much_are_fitted_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a matrix of their inputs, however many places there are, and without the advice to take more images."""
    monkeypatch.setattr(reference_module, "MAX_UNKNOWNS", 50)
    monkeypatch.setattr(repair_module, "MAX_UNKNOWNS", 50)
    monkeypatch.setattr(reference_module, "_MOST_ROWS", 40)
    sizes, products = [], least_squares.outer_products
    monkeypatch.setattr(least_squares, "outer_products", lambda a, b: sizes.append(b.shape[1]) or products(a, b))
    model = make("residual")
    dense, removals = copy.deepcopy(model), {"a1": [0, 1, 2]}  # so many that a fit serves, whatever weights are drawn
    prune_neurons(model, images(1), removals)
    layers = {row.layer: row for row in repair_network(model, dense, images(1), removals, [images(40)])}
    assert layers["b1"].few
    assert layers["b1"].error_after <= layers["b1"].error_before
    assert sizes and max(sizes) <= 50
    assert not layers["stem"].few


def test_kept_channels_by_hand() -> None:
    kept = kept_channels(make("concat"), images(1), {"stem": [1], "d1": [0, 3], "d2": []})
    assert (~kept["d2"].inputs).nonzero().flatten().tolist() == [1, 6, 9]
    assert (~kept["fc"].inputs).nonzero().flatten().tolist() == [5, 10, 13]
    assert (~kept["d1"].outputs).nonzero().flatten().tolist() == [0, 3]
    assert kept["d2"].outputs.all()
    grouped = kept_channels(Grouped(), images(1), {"a": [1, 5, 9]})
    assert (~grouped["g"].inputs).nonzero().flatten().tolist() == [1, 5, 9]


# ---- a group at a time


def test_repair_needs_moments() -> None:
    model = make("plain")
    importance = observed(model, images, score="variation", moments=False)
    with pytest.raises(RuntimeError, match="moments=True"):
        importance.repair(group_of(model, images(1), "b", [1]))


def in_two_steps(model: nn.Module, importance: DyingNeuronImportance) -> Iterator[tp.dependency.Group]:
    pruner = tp.pruner.BasePruner(
        model, images(1), importance, pruning_ratio=0.5, iterative_steps=2, ignored_layers=[model.fc],
        in_channel_groups={}, out_channel_groups={}, num_heads={},
    )  # fmt: skip
    for _ in range(2):
        yield from pruner.step(interactive=True)


@pytest.mark.parametrize("name", ["plain", "residual", "concat", "mobile"])
def test_moments_follow_through_two_steps(name: str) -> None:
    """Repaired group by group without observing anew, a network stays closer than without repair."""
    found = []
    for repaired in (True, False):
        model = make(name)
        dense, importance = copy.deepcopy(model), observed(model, images)
        for group in in_two_steps(model, importance):
            if repaired:
                assert importance.repair(group) == {}
            group.prune()
        importance(group_of(model, images(1), "stem" if hasattr(model, "stem") else "a", [0]))
        for consumer, activity in importance.observer.activities.items():
            weight = model.get_submodule(consumer).weight
            assert activity.moments.channels == activity.channels == weight.shape[1], consumer
        found.append(difference(model, dense, images(64, 99)))
    assert found[0] < found[1]


def test_a_constant_neuron_goes_into_the_bias() -> None:
    """Behind reflection padding, where it is constant at every position."""
    model = behind(nn.Conv2d(12, 6, 3, padding=1, padding_mode="reflect"))
    with torch.no_grad():
        model[0].weight[4] = 0.0
        model[0].bias[4] = 2.0
    dense, importance = copy.deepcopy(model), observed(model, images)
    group = group_of(model, images(1), "0", [4])
    importance.repair(group)
    group.prune()
    assert lost(model, dense, images(16, 99)) < rounding(108, 2)
