"""Latency is predicted from times of layers, and planned for; times are made up, so that nothing hangs on the clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from helpers.every_group import Net, X, conv, images
from helpers.layer_times import Clock, Measured, network_seconds, stairs
from torch import nn

from dnr_plugin.errors import TargetError
from dnr_plugin.network.calling import copied
from dnr_plugin.network.cost import count_params, flop_report
from dnr_plugin.network.runtimes import Compiled, OnnxRuntime
from dnr_plugin.pruning import plan as planning
from dnr_plugin.pruning.groups import Survey
from dnr_plugin.pruning.latency import LatencyModel, layer_shapes
from dnr_plugin.pruning.latency_table import LatencyTable
from dnr_plugin.pruning.layers import Limits
from dnr_plugin.pruning.plan import Plan, plan_removal, reachable
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.pruning.targets import baseline

CPU = torch.device("cpu")
DATA = images(4)


class Fork(nn.Module):
    """Two branches of the same widths and FLOPs: 1x1 kernels on sixteen times the positions of the 4x4 kernels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 32, 1))
        self.second = nn.Sequential(
            nn.AvgPool2d(4), nn.Conv2d(3, 64, 4, padding="same"), nn.ReLU(), nn.Conv2d(64, 32, 4, padding="same")
        )
        self.fc = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.cat([self.first(x).mean((2, 3)), self.second(x).mean((2, 3))], 1))


def _wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(conv(3, 64), conv(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))


def _model(model: nn.Module, clock: Clock, inputs: Any = DATA) -> LatencyModel:
    layers = Survey(model, inputs).within(Limits(max_pruning_ratio=0.9), {}).layers
    return LatencyModel(model, inputs, layers, flop_report(model, inputs), _table(clock))


def _table(clock: Clock) -> LatencyTable:
    return LatencyTable(CPU, None, measure=Measured(clock))


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Networks take what their layers do by a clock that the test sets, and ``rest`` beside."""
    settings: dict[str, Any] = {"clock": stairs(4), "rest": 0.0, "factor": 1.0, "calls": 0}

    def latencies(models: list[nn.Module], inputs: Any) -> list[float]:
        settings["calls"] += 1
        dense, *others = (network_seconds(model, inputs, settings["clock"], settings["rest"]) for model in models)
        return [dense, *(seconds * settings["factor"] for seconds in others)]

    monkeypatch.setattr(planning, "latencies", latencies)
    return settings


def _plan(model: nn.Module, clock: Clock, value: float, scope: str = "global", **options: Any) -> Plan:
    return plan_removal(
        model, DATA, tp.importance.MagnitudeImportance(), "latency", value,
        scope=scope, table=_table(clock), **options,
    )  # fmt: skip


@pytest.mark.parametrize("step", [1, 4, 8, 16, 32])
def test_stairs_are_found(step: int) -> None:
    assert _model(_wide(), stairs(step)).multiple == step


@pytest.mark.parametrize("step", [1, 8, 16])
def test_prediction_is_what_is_measured(step: int) -> None:
    """At widths between those in the table: time is bilinear from stair to stair."""
    clock, model = stairs(step), Net()
    predicted, before = _model(model, clock), network_seconds(model, DATA, clock)
    removals = {"a.0": [*range(9)], "hidden": [*range(13)], "b.0": [0, 4, 8, 12, 1, 5, 9, 13]}
    layers = {layer.name: layer for layer in Survey(model, X).within(Limits(), {}).layers}
    saved = 0.0
    for name, neurons in removals.items():
        layer = layers[name]
        units = len(neurons) * layer.units / layer.size
        saved += predicted.remove({key: count * units for key, count in layer.parts[0].effect.items()})
    pruned = Net()
    prune_neurons(pruned, X, removals)
    after = network_seconds(pruned, DATA, clock)
    assert predicted.share == pytest.approx(1 - saved) == pytest.approx(after / before, abs=0.02)


def test_what_multiplies_matrices_outside_of_layers_stays() -> None:
    """A share of the latency as of the FLOPs."""

    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = (x @ x.transpose(1, 2)) @ x
            return self.second(self.first(x).relu()).mean(1)

    model, x = Scored(), torch.randn(2, 16, 16)
    predicted = _model(model, stairs(1, base=0.0), x)
    assert predicted.rest == pytest.approx(2 * 16**3 / (2 * 16**3 + 16 * 64 * (16 + 5)))
    predicted.remove({("first", "out"): 32.0, ("second", "in"): 32.0})
    assert predicted.share == pytest.approx(predicted.rest + (1 - predicted.rest) / 2)


def test_what_is_given_back_changes_nothing() -> None:
    predicted = _model(Net(), stairs(4))
    effect = {("hidden", "out"): 5.0, ("fc", "in"): 5.0}
    saved = predicted.remove(effect)
    assert saved > 0
    assert predicted.remove({key: -count for key, count in effect.items()}) == pytest.approx(-saved)
    assert predicted.share == pytest.approx(1.0)


@pytest.mark.parametrize("scope", ["local", "global", "cost_aware", "latency_aware"])
def test_the_target_is_met_and_not_far_exceeded(scope: str, clocked: dict[str, Any]) -> None:
    clocked["clock"] = clock = stairs(1, base=1e-8)
    plan = _plan(Net(), clock, 0.7, scope)
    assert 0.5 < plan.achieved <= 0.7
    assert plan.predicted == pytest.approx(plan.achieved, abs=0.03)
    assert plan.removals == _plan(Net(), clock, 0.7, scope).removals
    pruned = Net()
    prune_neurons(pruned, X, plan.removals)
    ratio = network_seconds(pruned, DATA, clock) / network_seconds(Net(), DATA, clock)
    assert ratio == pytest.approx(plan.achieved)


def test_a_network_that_runs_slower_than_predicted_is_corrected(clocked: dict[str, Any]) -> None:
    clocked["clock"], clocked["factor"] = stairs(1, base=1e-8), 1.2
    plan = _plan(Net(), clocked["clock"], 0.7)
    assert 0.6 < plan.achieved <= 0.7
    assert plan.predicted is not None
    assert plan.predicted == pytest.approx(plan.achieved / 1.2, abs=0.03)
    assert clocked["calls"] <= 2 * planning._TRIES


def test_a_latency_out_of_reach_names_the_nearest(clocked: dict[str, Any]) -> None:
    model = Net()
    clocked["rest"] = network_seconds(model, DATA, clocked["clock"])
    with pytest.raises(
        TargetError, match=r"latency: 0\.3 was asked, 0\.\d+ is the closest that can be reached"
    ) as error:
        _plan(model, clocked["clock"], 0.3)
    assert 0.5 < error.value.closest < 1.0
    assert error.value.plan.achieved == error.value.closest
    assert error.value.plan.removed > 0


def test_latency_aware_takes_what_saves_time(clocked: dict[str, Any]) -> None:
    """Of two branches whose neurons have like scores, the one that is slow for its FLOPs."""

    def clock(shape: Any) -> float:
        return stairs(16)(shape) * (20.0 if dict(shape.options).get("kernel_size") == (1, 1) else 1.0)

    clocked["clock"] = clock
    model = Fork()
    gone = {}
    for scope in ("cost_aware", "latency_aware"):
        plan = _plan(model, clock, 0.75, scope)
        assert plan.achieved <= 0.75
        gone[scope] = {name: len(neurons) for name, neurons in plan.removals.items()}
    assert sum(gone["latency_aware"].values()) < sum(gone["cost_aware"].values())
    assert gone["latency_aware"]["first.0"] > gone["latency_aware"].get("second.1", 0)


def test_latency_aware_takes_whole_stairs(clocked: dict[str, Any]) -> None:
    clocked["clock"] = stairs(8)
    model = _wide()
    plan = _plan(model, clocked["clock"], 0.6, "latency_aware")
    assert plan.round_to == 8
    assert all(len(neurons) % 8 == 0 for neurons in plan.removals.values())
    given = _plan(model, clocked["clock"], 0.6, "latency_aware", limits=Limits(round_to=2))
    assert given.round_to == 2


def test_round_to_auto_holds_for_other_targets() -> None:
    model = _wide()
    measured = Measured(stairs(16))
    plan = plan_removal(
        model, DATA, tp.importance.MagnitudeImportance(), "flops", 0.6,
        limits=Limits(round_to="auto"), table=LatencyTable(CPU, None, measure=measured),
    )  # fmt: skip
    assert (plan.round_to, plan.predicted) == (16, None)
    assert all(len(neurons) % 16 == 0 for neurons in plan.removals.values())
    assert len(measured.asked) < 40  # what tells stairs, and not all widths
    assert reachable(model, X, "flops", Limits(round_to="auto")) == reachable(model, X, "flops")


def test_a_network_pruned_before_is_measured_against_the_dense_one(clocked: dict[str, Any]) -> None:
    clock = clocked["clock"] = stairs(1, base=1e-8)
    model = Net()
    dense = baseline(model, X, keep_model=True)
    prune_neurons(model, X, _plan(model, clock, 0.8, dense=dense).removals)
    plan = _plan(model, clock, 0.6, dense=dense)
    assert 0.5 < plan.achieved <= 0.6
    assert plan.predicted == pytest.approx(plan.achieved, abs=0.03)


def test_a_network_that_no_table_knows_is_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with a forward of their own are not timed: nothing is predicted, and halving leads to the target."""

    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    model = nn.Sequential(nn.Flatten(), Own(192, 64), nn.ReLU(), Own(64, 5))
    monkeypatch.setattr(planning, "latencies", lambda models, inputs: [float(count_params(model)) for model in models])
    plan = _plan(model, stairs(4), 0.5)
    assert 0.4 < plan.achieved <= 0.5


def test_limits_refuse_other_words() -> None:
    with pytest.raises(ValueError, match="round_to: expected a number, auto or None, found 'automatic'"):
        Limits(round_to="automatic")  # type: ignore[arg-type]


def test_latency_aware_needs_a_target_of_latency() -> None:
    with pytest.raises(ValueError, match="scope: expected another than latency_aware with flops, which does not count"):
        plan_removal(Net(), X, tp.importance.MagnitudeImportance(), "flops", 0.5, scope="latency_aware")


def test_by_default_the_table_is_that_of_the_machine(
    clocked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan_removal(Net(), DATA, tp.importance.MagnitudeImportance(), "latency", 0.8, scope="global")
    assert [path.suffix for path in (tmp_path / "dnr_plugin").iterdir()] == [".json"]
    empty = LatencyTable(CPU, tmp_path / "given.json", measure=Measured(stairs(4)))
    plan_removal(Net(), DATA, tp.importance.MagnitudeImportance(), "latency", 0.8, scope="global", table=empty)
    assert (tmp_path / "given.json").is_file()


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Networks that were prepared for another runtime than eager mode, which runs them as they are."""
    noted = list[nn.Module]()

    def prepare(self: Any, model: nn.Module, inputs: Any) -> nn.Module:
        noted.append(model)
        return model

    for kind in (Compiled, OnnxRuntime):
        monkeypatch.setattr(kind, "prepared", prepare)
        monkeypatch.setattr(kind, "problem", lambda self: None)
    monkeypatch.setattr(OnnxRuntime, "version", "onnxruntime 1.0")
    return noted


@pytest.mark.parametrize(("runtime", "timed"), [("compiled", "eager"), ("onnxruntime", "onnxruntime")])
def test_latency_is_meant_in_a_runtime(
    runtime: str, timed: str, clocked: dict[str, Any], prepared: list[nn.Module]
) -> None:
    """The dense network is prepared once, each trial once; layers are timed in the runtime, or in eager mode."""
    clocked["clock"], clocked["factor"], dense = stairs(1, base=1e-8), 1.2, baseline(Net(), X, keep_model=True)
    measured = Measured(clocked["clock"])
    plan = plan_removal(
        Net(), DATA, tp.importance.MagnitudeImportance(), "latency", 0.7,
        scope="global", dense=dense, table=LatencyTable(CPU, None, measure=measured), runtime=runtime,
    )  # fmt: skip
    assert 0.6 < plan.achieved <= 0.7
    assert {shape.runtime for shape in measured.asked} == {timed}
    assert sum(model is dense.model for model in prepared) == 1
    assert 2 < len(prepared) <= 11
    assert clocked["calls"] == 2 * (len(prepared) - 1)  # until two measurements agree


def test_round_to_auto_is_measured_in_a_runtime(prepared: list[nn.Module]) -> None:
    measured = Measured(stairs(16))
    plan = plan_removal(
        _wide(), DATA, tp.importance.MagnitudeImportance(), "flops", 0.6, limits=Limits(round_to="auto"),
        table=LatencyTable(CPU, None, measure=measured), runtime="onnxruntime",
    )  # fmt: skip
    assert (plan.round_to, prepared) == (16, [])
    assert {shape.runtime for shape in measured.asked} == {"onnxruntime"}


def test_a_runtime_is_refused_where_nothing_is_timed() -> None:
    magnitude = tp.importance.MagnitudeImportance()
    with pytest.raises(
        ValueError, match="runtime: expected eager with flops, for which nothing is timed, found compiled"
    ):
        plan_removal(Net(), X, magnitude, "flops", 0.5, runtime="compiled")
    with pytest.raises(ValueError, match="runtime: expected one of eager, compiled, onnxruntime, found 'onnx'"):
        plan_removal(Net(), X, magnitude, "latency", 0.5, runtime="onnx")


def test_onnx_runtime_folds_batchnorm_into_convolutions() -> None:
    """Right behind one; elsewhere it takes time of its own."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1),
        nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    )  # fmt: skip
    timed = {name: sum(called.values()) for name, called in layer_shapes(model, X, "onnxruntime").items()}
    assert timed == {"0": 1, "1": 0, "3": 1, "4": 1, "6": 1}
    assert {name: sum(called.values()) for name, called in layer_shapes(model, X).items()} == {
        "0": 1, "1": 1, "3": 1, "4": 1, "6": 1, "7": 1,
    }  # fmt: skip
    assert layer_shapes(model.double(), X.double(), "onnxruntime") == {}


def test_what_is_folded_takes_no_time() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)
    )
    layers, measured = Survey(model, DATA).within(Limits(), {}).layers, Measured(stairs(1, base=0.0))
    predicted = LatencyModel(
        model, DATA, layers, flop_report(model, DATA), LatencyTable(CPU, None, measure=measured), runtime="onnxruntime"
    )
    saved = predicted.remove({("0", "out"): 32.0, ("1", "out"): 32.0, ("5", "in"): 32.0})
    assert saved == pytest.approx((1.0 - predicted.rest) / 2)


def test_a_plan_says_what_its_layers_take(clocked: dict[str, Any]) -> None:
    """With the channels that stay, and not those of the furthest removal that was looked at."""
    clock = clocked["clock"] = stairs(8)
    model = _wide()
    plan = _plan(model, clock, 0.6, "latency_aware")
    pruned = copied(model)
    prune_neurons(pruned, X, plan.removals)
    now = {name: next(iter(called)) for name, called in layer_shapes(pruned, DATA).items()}
    full = {name: next(iter(called)) for name, called in layer_shapes(model, DATA).items()}
    assert {"0.0", "1.0"} <= set(plan.layer_times)
    for name, time in plan.layer_times.items():
        assert time.before == pytest.approx(clock(full[name]))
        assert time.after == pytest.approx(clock(now[name]), rel=0.05)
        assert time.least <= time.after <= time.before
        assert time.least == pytest.approx(clock(full[name].with_channels(*time.narrowest)))
        assert time.kept == pytest.approx(now[name].channels)
        assert time.rounded == tuple(now[name].channels)  # latency_aware takes whole steps
    predicted = _model(model, clock)
    predicted.remove({("0.0", "out"): 5.0, ("0.1", "out"): 5.0, ("1.0", "in"): 5.0})
    rounded = {name: (time.kept, time.rounded) for name, time in predicted.times().items()}
    assert rounded["1.0"] == ((59.0, 64.0), (64, 64))
    assert rounded["0.1"] == ((59.0, 59.0), (64, 64))
    flops = plan_removal(model, X, tp.importance.MagnitudeImportance(), "flops", 0.6)
    assert flops.layer_times == {}
