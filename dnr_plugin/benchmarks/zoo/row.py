"""One network of the zoo, from its builder to the reloaded file."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.benchmarks.zoo.networks import Entry
from dnr_plugin.errors import InputError, RunError, TargetError
from dnr_plugin.models.build import rebuild
from dnr_plugin.models.saved import load_pruned, save_pruned
from dnr_plugin.network.attention import split_modules
from dnr_plugin.network.calling import call, copied, eval_outputs, kept_modes, output_difference, tensors
from dnr_plugin.network.cost import flop_report
from dnr_plugin.network.splitting import split_attention
from dnr_plugin.pruning.plan import plan_removal
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.repair.network import repair_network
from dnr_plugin.scoring.importance import DyingNeuronImportance

_IMAGES = 8


def try_network(entry: Entry, flops: float, tell: Callable[[str, Any], None]) -> None:
    """Observes a network on random images, prunes it to a share of its FLOPs, repairs it, trains it for one step, saves
    it and loads it again.

    Args:
        entry: the network.
        flops: share that is to remain.
        tell: takes what came out as it comes, as (name, value).

    Raises:
        InputError, RunError: it cannot be done, with the reason.
    """
    started = time.perf_counter()
    images = [_images(entry, 2, seed) for seed in range(_IMAGES // 2)]
    example = images[0]
    model, attention = _built(entry, example, images)
    if attention is not None:
        tell("attention", {"split": len(split_modules(model)), "left": attention})
    reference = eval_outputs(model, example)
    importance = DyingNeuronImportance()
    with importance.observe(model), kept_modes(model), torch.no_grad():
        model.eval()
        for batch in images:
            call(model, batch)
    before = flop_report(model, example)
    tell("dense", {"flops": before.flops, "params": before.params})
    tell("observed", time.perf_counter() - started)
    try:
        plan = plan_removal(model, example, importance, "flops", flops)
    except TargetError as error:
        if error.plan is None:
            raise
        plan = error.plan
        tell("short", str(error))
    tell("planned", time.perf_counter() - started)
    tell("neurons", plan.dense_neurons)
    tell("left", [list(pair) for pair in plan.skipped])
    prune_neurons(model, example, plan.removals, importance=importance)
    del importance  # whose second moments take more memory than the largest networks
    after = flop_report(model, example)
    tell("pruned", {"flops": after.flops, "params": after.params})
    tell("neurons_removed", plan.removed)
    if entry.trains:
        _step(model, example)
    dense, _ = _built(entry, example, images)  # a copy that is kept from the start fills the memory
    if not all(torch.equal(a, b) for a, b in zip(reference, eval_outputs(dense, example), strict=True)):
        raise RunError("its builder was expected to make the same weights from the same seed, found others")
    pruned = copied(model)
    repairs = repair_network(pruned, dense, example, plan.removals, images)
    errors = [output_difference(reference, eval_outputs(m, example))[1] for m in (model, pruned)]
    tell("error", [error if math.isfinite(error) else None for error in errors])  # detectors give what boxes they find
    tell("repaired", sum(repair.damping is not None for repair in repairs))
    with tempfile.TemporaryDirectory() as folder:
        save_pruned(model, folder, entry.builder)
        reloaded = load_pruned(folder, allow_import=True)
    same = [
        torch.equal(a, b) for a, b in zip(eval_outputs(model, example), eval_outputs(reloaded, example), strict=True)
    ]
    if not all(same):
        raise RunError("the reloaded model gives other outputs")
    tell("seconds", time.perf_counter() - started)


def _built(entry: Entry, example: Any, images: Sequence[Tensor]) -> tuple[nn.Module, dict[str, str] | None]:
    """The network with its attention split, always of the same weights; and attention that was left, if it has any."""
    torch.manual_seed(0)
    model = rebuild(entry.builder, allow_import=True)
    _spread(model)
    with contextlib.suppress(InputError):  # none that can be split
        return model, split_attention(model, example, images)
    return model, None


def _images(entry: Entry, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *entry.shape, generator=generator)


def _spread(model: nn.Module) -> None:
    """Norms that differ from channel to channel, as in a trained network."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.1)


def _step(model: nn.Module, example: Any) -> None:
    """One step of training."""
    trained = copied(model).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-4)
    outputs = [out for out in tensors(call(trained, example)) if out.is_floating_point() and out.grad_fn is not None]
    torch.stack([out.double().square().mean() for out in outputs]).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
