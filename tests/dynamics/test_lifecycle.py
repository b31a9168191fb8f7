"""What a training with dying neurons leaves as it was: hooks, optimizer, state; resumed, and on two ranks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.networks import Plain, images, make
from helpers.ranks import run_two_ranks
from helpers.training import (
    RANKED,
    batch,
    half_dead,
    hooks,
    kill,
    learn,
    lively,
    of_rank,
    ranks_report,
    run,
    sgd,
    watching,
)
from torch import Tensor, nn

from dnr_plugin.dynamics.dynamics import DyingNeuronDynamics
from dnr_plugin.dynamics.timetable import Timetable
from dnr_plugin.errors import InputError
from dnr_plugin.models.build import build_model
from dnr_plugin.models.saved import build, describe
from dnr_plugin.pruning.layers import Limits
from dnr_plugin.pruning.targets import baseline
from dnr_plugin.recipe.sections import ModelOptions


def test_activations_that_are_not_finite_are_an_error() -> None:
    model = lively(make("plain"))
    optimizer = sgd(model)
    dynamics = watching(model, Timetable(2, until=10), optimizer=optimizer)
    with torch.no_grad():
        model.b.bias[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"), dynamics:
        run(model, dynamics, optimizer, range(4))
    assert hooks(model) == 0


def test_steps_are_counted_inside_the_context_alone() -> None:
    model = lively(make("plain"))
    dynamics = watching(model, Timetable(2, until=10))
    with pytest.raises(RuntimeError, match="outside of"):
        dynamics.step()
    with dynamics:
        pass
    with pytest.raises(RuntimeError, match="outside of"):
        dynamics.step()


def test_no_hooks_stay_behind() -> None:
    """Neither the observer's nor those that zero, also after an error."""
    model = lively(make("plain"))
    kill(model.bn, [1, 4])
    optimizer = sgd(model)
    dynamics = watching(model, Timetable(2, until=20), optimizer=optimizer, patience=4)

    def fail() -> None:
        with dynamics:
            run(model, dynamics, optimizer, range(3))
            assert hooks(model) == 5
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert hooks(model) == 0


def test_a_second_context_goes_on() -> None:
    """Candidates are zeroed again, and their patience is not lost."""
    model = lively(make("plain"))
    kill(model.bn, [1, 4])
    optimizer = sgd(model)
    dynamics = watching(model, Timetable(2, until=20), optimizer=optimizer, patience=2)
    with dynamics:
        run(model, dynamics, optimizer, range(2))
    learn(model, optimizer, 99)
    with dynamics:
        assert hooks(model) == 5
        found = run(model, dynamics, optimizer, range(2, 6))
    assert [check.removed for check in found] == [{}, {"a": [1, 4]}]
    assert hooks(model) == 0


def test_a_state_of_other_widths_leaves_no_hooks() -> None:
    dynamics = watching(lively(make("plain")), Timetable(2), kind=None)
    with dynamics:
        dynamics.model.train()(batch(0)[0])
        dynamics.step()
        state = dynamics.state_dict()
    other = Plain(6)
    fresh = watching(other, Timetable(2), kind=None)
    fresh.load_state_dict(state)
    with pytest.raises(ValueError, match="expected shape"), fresh:
        pass
    assert hooks(other) == 0


WHEN = Timetable(2, until=20)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "latency"}, "kind"),
        ({"scope": "latency_aware"}, "scope"),
        ({"limits": Limits(round_to="auto")}, "limits"),
        ({"kind": "flop"}, "kind"),
        ({"when": Timetable(0, until=20)}, "when"),
        ({"when": Timetable(2, until=20, watched=3)}, "when"),
        ({"when": Timetable(2, until=20, watched=0)}, "when"),
        ({"when": Timetable(2, until=20, warmup=21)}, "when"),
        ({"when": Timetable(2, until=20, remove_at=(21,))}, "when"),
        ({"when": Timetable(2, until=20, warmup=18), "patience": 2}, "when"),
        ({"patience": -1}, "patience"),
        ({"value": 0.0, "kind": "flops"}, "value"),
        ({"value": 1.0, "kind": "weight_sparsity"}, "value"),
        ({"ramp": "square"}, "ramp"),
        ({"max_share": 0.0}, "max_share"),
        ({"max_share": 1.1}, "max_share"),
        ({"dying_entropy": 0.0}, "dying_entropy"),
        ({"min_samples": 0}, "min_samples"),
        ({"scope": "locl"}, "scope"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=f"^{match}: expected"):
        watching(make("plain"), **{"when": WHEN, **options})


def test_limits_that_name_nothing() -> None:
    with pytest.raises(InputError, match=r"prune\.ignored"):
        watching(make("plain"), WHEN, limits=Limits(ignored=["layr*"]))


def test_everything_follows_a_removal() -> None:
    """Parameter groups, momentum, schedule, modes, frozen parameters, gradients and memory format."""
    model = lively(make("plain")).to(memory_format=torch.channels_last)
    kill(model.bn, [1, 4])
    model.c.bias.requires_grad_(False)
    convs = [p for p in model.parameters() if p.dim() == 4]
    rest = [p for p in model.parameters() if p.dim() != 4]
    optimizer = torch.optim.SGD([{"params": convs, "weight_decay": 0.0}, {"params": rest, "lr": 0.02}], 0.01, 0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    kept = [0, 2, 3, 5, 6, 7]
    with watching(model, Timetable(2, until=20), optimizer=optimizer, patience=1) as dynamics:
        for step in range(4):
            model.train()
            model.bn.eval()
            learn(model, optimizer, step)
            schedule.step()
            momentum = {n: optimizer.state[p].get("momentum_buffer") for n, p in model.named_parameters()}
            gradients = {n: p.grad for n, p in model.named_parameters()}
            check = dynamics.step()
        assert check is not None and check.removed == {"a": [1, 4]}
        parameters = dict(model.named_parameters())
        groups = [
            [n for n, p in parameters.items() if any(p is q for q in g["params"])] for g in optimizer.param_groups
        ]
        assert groups == [[n for n in parameters if (n[-6:] == "weight" and n[0] in "abc" and n[1] == ".") == conv]
                          for conv in (True, False)]  # fmt: skip
        for name, parameter in parameters.items():
            part: Any = kept if name in ("a.weight", "a.bias", "bn.weight", "bn.bias") else slice(None)
            part = (slice(None), kept) if name == "b.weight" else part
            if name == "c.bias":
                assert not parameter.requires_grad and parameter.grad is None
                continue
            assert parameter.requires_grad
            assert torch.equal(optimizer.state[parameter]["momentum_buffer"], momentum[name][part]), name
            assert torch.equal(parameter.grad, gradients[name][part]), name
        assert model.training and not model.bn.training
        assert model.b.weight.is_contiguous(memory_format=torch.channels_last)
        rates = [g["lr"] for g in optimizer.param_groups]
        before = {n: p.detach().clone() for n, p in parameters.items()}
        learn(model, optimizer, 5)
        schedule.step()
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([rate / 2 for rate in rates])
        assert all(torch.equal(p, before[n]) == (n == "c.bias") for n, p in model.named_parameters())


class Parts(nn.Module):
    """A concatenation behind one BatchNorm, a scalar PReLU, a transposed and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1)
        self.bn, self.act = nn.BatchNorm2d(9), nn.PReLU(init=0.0)
        self.up = nn.ConvTranspose2d(9, 6, 3, padding=1)
        self.hidden, self.fc = nn.Linear(6, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(torch.cat([self.a(x), self.b(x)], 1)))
        x = self.up(x).relu().mean((2, 3))
        return self.fc(self.hidden(x).relu())


def test_live_is_zero_exactly_for_what_makes_dead_neurons() -> None:
    torch.manual_seed(0)
    model = Parts()
    dead = {"bn": [1, 3, 4, 8], "up": [2], "hidden": [0, 6]}  # of bn: a's 1 and 3, b's 0 and 4
    with torch.no_grad():
        model.bn.bias.fill_(1.0)
        model.up.bias.fill_(2.0)
        model.hidden.bias.fill_(2.0)
        model.act.weight.requires_grad_(False)  # or what is dead would leak
        kill(model.bn, dead["bn"])
        for layer, channels in ((model.up, dead["up"]), (model.hidden, dead["hidden"])):
            layer.bias[channels] = -50.0
    optimizer = torch.optim.SGD(model.parameters(), 1e-5)

    def expected(name: str) -> list[int]:
        layer = name.split(".")[0]
        return {"a": [1, 3], "b": [0, 4], **dead}.get(layer, [])

    with watching(model, Timetable(2, until=20), optimizer=optimizer, patience=1, max_share=1.0) as dynamics:
        assert all(dynamics.live(p) is None for p in model.parameters())
        run(model, dynamics, optimizer, range(2))
        for name, parameter in model.named_parameters():
            factor, gone = dynamics.live(parameter), expected(name)
            if not gone:
                assert factor is None or (factor == 1).all(), name
                continue
            assert factor is not None, name
            full = factor.expand_as(parameter)
            along = full.movedim(1, 0) if name == "up.weight" else full
            rows = along.flatten(1) if along.dim() > 1 else along[:, None]
            assert (rows[gone] == 0).all(), name
            assert int((rows == 0).any(1).sum()) == len(gone), name
        (check,) = run(model, dynamics, optimizer, range(2, 4))
        assert check.removed == {"a": [1, 3], "b": [0, 4], "up": [2], "hidden": [0, 6]}
        for parameter in model.parameters():  # what is dead is judged anew, on parameters that exist
            factor = dynamics.live(parameter)
            assert factor is None or (factor.expand_as(parameter) == 1).all()


def test_groups_left_alone_are_named_with_the_reason() -> None:
    """Also those without evidence, also after a removal."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.unused, self.out = Plain(), nn.Conv2d(3, 4, 1), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            return y if self.training else y + 0.0 * self.out(self.unused(x).mean((2, 3)))

    torch.manual_seed(0)
    model = Branch()
    lively(model)
    kill(model.net.bn, [1])
    optimizer = sgd(model)
    with watching(model, Timetable(2, until=20), optimizer=optimizer, patience=0) as dynamics:
        with pytest.warns(UserWarning, match="unused is left alone"):
            (check,) = run(model, dynamics, optimizer, range(2))
        assert check.removed == {"net.a": [1]}
        assert any(name == "unused" and "was not called" in reason for name, reason in dynamics.skipped)


def saved(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize(("name", "cut"), [("resnet18", 5), ("mlp", 5), ("mlp", 6), ("mlp", 13)])
def test_a_resumed_training_is_the_uninterrupted_one(name: str, cut: int) -> None:
    """To the bit: weights, optimizer, histories and checks; cut inside a window and between, with candidates."""
    options = {"width": 4} if name == "resnet18" else {"hidden": [24, 16]}
    size, steps, until = (8, 10, 9) if name == "resnet18" else (16, 17, 15)

    def fresh(model: nn.Module, **more: Any) -> tuple[nn.Module, torch.optim.Optimizer, DyingNeuronDynamics]:
        optimizer = sgd(model, 0.05)
        return model, optimizer, watching(
            model, Timetable(3, until=until, watched=2), size, optimizer=optimizer, kind="params", value=0.5,
            patience=1, max_share=0.5, **more,
        )  # fmt: skip

    def dense_model() -> nn.Module:
        torch.manual_seed(0)
        return build_model(ModelOptions(name=name, **options), 5, 3, size)

    model, optimizer, dynamics = fresh(dense_model())
    with dynamics:
        first = run(model, dynamics, optimizer, range(cut), size)
        state = saved({
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "dynamics": dynamics.state_dict(),
            "architecture": describe(model),
        })  # fmt: skip
        waiting = sum(int(history.candidates.sum()) for history in dynamics.histories.values())
        second = run(model, dynamics, optimizer, range(cut, steps), size)
    assert any(check.removed for check in first + second)
    assert waiting > 0 or cut == 13

    again = build(state["architecture"])
    again.load_state_dict(state["model"])
    again, resumed, other = fresh(again, dense=baseline(dense_model(), images(1, size=size)))
    resumed.load_state_dict(state["optimizer"])
    other.load_state_dict(state["dynamics"])
    with other:
        found = run(again, other, resumed, range(cut, steps), size)
    assert [(c.number, c.step, c.layers, c.removed, c.max_abs_diff) for c in found] == [
        (c.number, c.step, c.layers, c.removed, c.max_abs_diff) for c in second
    ]
    assert len(found) > 0
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(optimizer.state[a]["momentum_buffer"], resumed.state[b]["momentum_buffer"])
    for key, history in dynamics.histories.items():
        for field, value in history.state_dict().items():
            np.testing.assert_array_equal(other.histories[key].state_dict()[field], value, err_msg=f"{key}.{field}")
    assert (dynamics.checks, dynamics.finished, dynamics.stopped) == (other.checks, other.finished, other.stopped)


RANK = """
import gc, sys, torch, torch.distributed as dist, torch.nn.functional as F
sys.path[:0] = sys.argv[3:]
torch.set_num_threads(1)
from torch.nn.parallel import DistributedDataParallel
from helpers.training import RANKED, half_dead, of_rank, ranks_report, sgd, watching
rank, where = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{where}/init", rank=rank, world_size=2)
model = half_dead()
optimizer = sgd(model, 1e-3)
found, wrapped = [], DistributedDataParallel(model)
with watching(model, RANKED, optimizer=optimizer, patience=1, min_samples=64) as dynamics:
    for step in range(8):
        x, y = of_rank(step, rank)
        optimizer.zero_grad()
        F.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        check = dynamics.step()
        if check is not None:
            found.append(check)
            if check.removed:
                wrapped = DistributedDataParallel(model)
torch.save(ranks_report(dynamics, found, model), f"{where}/{rank}.pt")
# an activation that is not finite on one rank alone ends the training of both
error = ""
with torch.no_grad():
    try:
        with watching(model, RANKED, kind=None) as dynamics:
            for step in range(4):
                x, _ = of_rank(step, rank)
                model(x * float("inf") if rank == 1 else x)
                dynamics.step()
    except ValueError as caught:
        error = str(caught)
open(f"{where}/{rank}.txt", "w").write(error)
del wrapped  # DDP, in a cycle of references, holds the group, whose threads may else abort an interpreter that ends
gc.collect()
dist.destroy_process_group()
"""


def test_two_ranks_remove_what_one_process_would(tmp_path: Path) -> None:
    run_two_ranks(RANK, tmp_path)
    zero, one = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert zero["removed"] == one["removed"]
    assert all(torch.equal(a, b) for a, b in zip(zero["weights"], one["weights"], strict=True))

    model = half_dead()
    optimizer = sgd(model, 1e-3)
    found = []
    with watching(model, RANKED, optimizer=optimizer, patience=1) as dynamics:
        for step in range(8):
            (x, y), (other, labels) = of_rank(step, 0), of_rank(step, 1)
            optimizer.zero_grad()
            F.cross_entropy(model(torch.cat([x, other])), torch.cat([y, labels])).backward()
            optimizer.step()
            check = dynamics.step()
            if check is not None:
                found.append(check)
    single = ranks_report(dynamics, found, model)
    assert zero["removed"] == single["removed"]
    assert [gone.get("a1") for gone in single["removed"]] == [None, [3], None, None]  # not 5, which rank 1 sees fire
    for name, dead in single["dead"].items():
        assert torch.equal(zero["dead"][name], dead)
        assert zero["histograms"][name] == single["histograms"][name]
    for ours, theirs in zip(zero["weights"], single["weights"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    for rank in (0, 1):
        assert "not finite" in (tmp_path / f"{rank}.txt").read_text()
