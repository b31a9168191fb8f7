"""The plots of a run, by what they draw: every mode, old reports, and the page they are embedded in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.made_up import LAYERS, check_events, epoch_events, report_of

from dnr_plugin.recipe.load import load_recipe
from dnr_plugin.reports import html as page
from dnr_plugin.reports.figures import run as plots
from dnr_plugin.reports.run_report import facts, markdown, summary_rows, write_report
from dnr_plugin.reports.slow_layers import slow_layers
from dnr_plugin.runs.run import run_recipe

RECIPE = {"name": "made-up"}


def _run(**options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    events = [*check_events(**options), *epoch_events(options.get("epochs", 20))]
    return report_of(RECIPE, events), events


def _lines(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """Points of each line with a label, by the first line of the label."""
    drawn = {}
    for line in axes.get_lines():
        points = zip(*(map(float, values) for values in line.get_data()), strict=True)
        drawn[str(line.get_label()).splitlines()[0]] = list(points)
    return drawn


def _sums(events: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """Written apart from the code: a count summed over the layers of each check."""
    checks = sorted({event["epoch"] for event in events if event["event"] == "check"})
    return [(t, sum(e[name] for e in events if e["event"] == "check" and e["epoch"] == t)) for t in checks]


def test_each_kind_of_run_has_its_plots() -> None:
    report, events = _run()
    assert list(plots.run_figures(report, events)) == ["channels", "accuracy", "neurons", "layers", "entropy"]
    epochs = epoch_events()
    assert list(plots.run_figures(report_of(RECIPE, epochs), epochs)) == ["channels", "accuracy"]
    assert list(plots.run_figures(report_of(RECIPE, []), [])) == ["channels"]
    assert set(plots.run_figures(report, events)) == set(plots.RUN_CAPTIONS)


def test_neurons_are_the_sums_over_the_layers() -> None:
    report, events = _run()
    above, below = plots.neurons_figure(report, events).axes
    drawn = _lines(above) | _lines(below)
    for label, name in (
        ("dead", "dead"), ("candidates", "candidates"), ("died", "died"), ("reactivated", "reactivated"),
        ("became candidates", "nominated"), ("candidates given back", "restored"),
    ):  # fmt: skip
        assert drawn[label] == _sums(events, name), label
    removed = _sums(events, "removed")
    assert drawn["removed so far"] == [(t, sum(n for s, n in removed if s <= t)) for t, _ in removed]
    assert drawn["removed so far"][-1][1] > 0
    assert above.get_ylabel() == f"neurons, of {_sums(events, 'neurons')[0][1]:,}"
    total = sum(n for _, n in _sums(events, "reactivated"))
    assert f"reactivated\n({total:,} in all)" in [line.get_label() for line in below.get_lines()]


def test_a_run_that_only_watched_has_no_lines_for_removal() -> None:
    report, events = _run(removes=False)
    above, below = plots.neurons_figure(report, events).axes
    assert set(_lines(above)) == {"dead"}
    assert set(_lines(below)) == {"died", "reactivated"}


def test_an_early_stop_is_marked() -> None:
    report, events = _run()
    events.append({"event": "stopped", "epoch": 12.0, "reason": "nothing is left to remove"})
    for figure in (plots.neurons_figure(report, events), plots.accuracy_figure(report, events)):
        assert [x for x, _ in _lines(figure.axes[0])["removal stopped early"]] == [12.0, 12.0]


@pytest.mark.parametrize("removes", [True, False])
def test_layers_are_in_the_order_of_the_model(removes: bool) -> None:
    report, events = _run(removes=removes)
    checks = [event for event in events if event["event"] == "check"]
    backwards = sorted(checks, key=lambda event: (event["check"], -LAYERS.index(event["layer"])))
    left, right = plots.layers_figure(report, backwards).axes[:2]
    assert [tick.get_text() for tick in left.get_yticklabels()] == list(LAYERS)
    for axes, share in (
        (left, lambda e, first: e["dead"] / e["neurons"]),
        (right, lambda e, first: (e["neurons"] if removes else e["reactivated"]) / first),
    ):
        found = np.asarray(axes.collections[0].get_array()).reshape(len(LAYERS), -1)
        for event in checks:
            first = next(e["neurons"] for e in checks if e["layer"] == event["layer"])
            place = LAYERS.index(event["layer"]), event["check"] - 1
            assert found[place] == pytest.approx(100 * share(event, first)), event


def test_a_layer_that_a_check_did_not_see_stays_blank() -> None:
    report, events = _run(epochs=3)
    kept = [event for event in events if (event.get("check"), event.get("layer")) != (2, "conv1")]
    found = plots.layers_figure(report, kept).axes[0].collections[0].get_array()
    assert np.argwhere(np.ma.getmaskarray(np.ma.masked_invalid(found)).reshape(len(LAYERS), -1)).tolist() == [[0, 1]]


def test_entropy_of_the_network_is_weighted_by_neurons() -> None:
    report, events = _run()
    figure = plots.entropy_figure(report, events)
    for axes, name, first in zip(figure.axes[:2], ("entropy", "drift"), (1, 2), strict=True):
        assert len(axes.get_lines()) == len(LAYERS) + 1
        drawn = _lines(axes)["mean over all neurons"]
        assert drawn[0][0] == first  # the first check has no drift
        for epoch, value in drawn:
            now = [e for e in events if e["event"] == "check" and e["epoch"] == epoch]
            weights = [e["neurons"] for e in now]
            assert value == pytest.approx(float(np.average([e[name] for e in now], weights=weights)))
    assert figure.axes[2].get_ylabel() == "layer, from input to output"


def test_one_check_is_enough() -> None:
    report, events = _run(epochs=1)
    assert len(plots.entropy_figure(report, events).axes) == 2  # entropy and its colour bar, no drift
    for figure in plots.run_figures(report, events).values():
        assert figure.axes


def test_many_layers_are_all_named() -> None:
    report, events = _run(layers=tuple(f"block{n}.conv" for n in range(60)), epochs=4)
    labels = plots.layers_figure(report, events).axes[0].get_yticklabels()
    assert len(labels) == 60
    ticks = plots.entropy_figure(report, events).axes[-1].get_yticklabels()
    assert [tick.get_text() for tick in (ticks[0], ticks[-1])] == ["block0.conv", "block59.conv"]
    assert len(ticks) <= 8


def test_accuracy_of_a_run_that_removes_while_it_trains() -> None:
    report, events = _run()
    events += epoch_events(3, "finetune")
    axes, right = plots.accuracy_figure(report, events).axes
    drawn = _lines(axes)
    assert set(drawn) == {"training", "fine-tuning"}
    assert drawn["fine-tuning"][0] == drawn["training"][-1]
    assert drawn["fine-tuning"][-1][0] == 23
    shaded = right.collections[0].get_datalim(right.transData)
    share = 100 * sum(n for _, n in _sums(events, "removed")) / _sums(events, "neurons")[0][1]
    assert shaded.y1 == pytest.approx(share)
    assert shaded.x1 == 23


def test_accuracy_of_a_run_that_removes_after_training() -> None:
    events = [*epoch_events(4), *epoch_events(2, "finetune")]
    (axes,) = plots.accuracy_figure(report_of(RECIPE, events), events).axes
    drawn = _lines(axes)
    assert drawn["after removal"] == drawn["fine-tuning"][:1] == [(4, 50)]
    assert [x for x, _ in drawn["fine-tuning"]] == [4, 5, 6]


@pytest.mark.parametrize("removes", [True, False])
def test_reports_without_a_dense_network_can_be_read(removes: bool) -> None:
    report, _ = _run(removes=removes)
    accuracy, *rest = summary_rows(report)
    assert accuracy == ("accuracy", "-", "90.00 %", "-")
    assert "accuracy before fine-tuning" not in [row[0] for row in rest]
    counts = report["dynamics"]
    told = (
        f"In 20 checks while training, neurons died {counts['died']} times, dead ones were reactivated "
        f"{counts['reactivated']} times"
    )
    told += (
        f", candidates were restored {counts['restored']} times, and {counts['removed']} were removed."
        if removes
        else "."
    )
    assert told in facts(report)
    assert any(fact.startswith("Training took 0.71 times what") for fact in facts(report))
    assert facts(report)[0].startswith("Target flops" if removes else "The run watched its neurons and removed none.")
    assert told in markdown(report)
    report["dynamics"] |= {"stopped": "no layer has a neuron to give", "wall_clock_ratio": None}
    assert "Removal stopped early: no layer has a neuron to give." in facts(report)
    assert not any(fact.startswith("Training took") for fact in facts(report))


def test_exact_removal_is_told_whenever_it_happened() -> None:
    report, _ = _run()
    report["exact_removal"] = {"neurons": 5, "max_abs_diff": 1.5e-7}
    told = "; removing 5 that were exactly zero changed the outputs by at most 1.5e-07."
    assert f"7 of 900 neurons were dead at the last check{told}" in facts(report)
    assert f"7 of 900 neurons were dead before the removal{told}" in facts(report | {"mode": "after_training"})


@pytest.mark.parametrize("mode", ["watch", "dynamic"])
def test_a_real_run_is_drawn(tiny: Path, tmp_path: Path, mode: str) -> None:
    """The made-up events above have the format of real ones."""
    observe = "observe: {samples: 96, min_samples: 64, share: 0.5}"
    target = ", target: {flops: 0.7}, dynamics: {warmup_epochs: 0, patience: 0}" if mode == "dynamic" else ""
    short = ["train.epochs=2", "finetune.epochs=0", "data.train_size=96"]
    report = run_recipe(load_recipe(tiny, [*short, f"prune={{mode: {mode}, {observe}{target}}}"]), tmp_path / "run")
    assert {path.stem for path in (tmp_path / "run" / "plots").iterdir()} == set(plots.RUN_CAPTIONS)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    real, made_up = (next(e for e in found if e["event"] == "check") for found in (events, check_events()))
    assert set(made_up) <= set(real)
    drawn = _lines(plots.neurons_figure(report, events).axes[0])
    assert drawn["dead"][-1][1] == report["dead"]["neurons"]
    assert ("removed so far" in drawn) == (mode == "dynamic")
    if mode == "dynamic":
        assert drawn["removed so far"][-1][1] == report["dynamics"]["removed"] > 0


def test_old_reports_read_as_before() -> None:
    events = epoch_events(3)
    report = report_of(RECIPE, events)
    assert "mode" not in report
    assert "dynamics" not in report
    assert summary_rows(report)[0] == ("accuracy", "91.00 %", "90.00 %", "-1.00 points")
    assert facts(report)[2] == "7 of 900 neurons were dead before the removal; no removed neuron was exactly zero."
    assert facts(report | {"mode": "after_training", "dynamics": None}) == facts(report)


def test_the_page_holds_every_plot_with_its_caption(tmp_path: Path) -> None:
    report, events = _run(epochs=4)
    write_report(tmp_path, report, events)
    files = {path.stem: path for path in (tmp_path / "plots").iterdir()}
    assert set(files) == set(plots.RUN_CAPTIONS)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files.values())
    text = (tmp_path / "report.html").read_text()
    assert text.count("data:image/png;base64,") == len(files)
    assert "http" not in text
    assert all(page.html.escape(caption) in text for caption in plots.RUN_CAPTIONS.values())
    assert "candidates were restored" in text
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_latency_is_told_as_predicted_and_measured() -> None:
    """By batch with its spread, the multiple that was measured, and where time did not follow FLOPs; reports of earlier
    versions have one latency, or none."""
    report = report_of({"name": "a", "prune": {"round_to": "auto"}}, [], kept=0.5)
    assert not any("predicted" in fact or "Multiples" in fact or "time to no less" in fact for fact in facts(report))
    one = {"batch": 8, "dense_ms": 4.0, "pruned_ms": 2.0, "ratio": 0.5}
    assert ("latency, batch 8", "4.00 ms", "2.00 ms", "50.00 %") in summary_rows(report | {"latency": one})
    timed = report | {
        "target": {"kind": "latency", "requested": 0.6, "achieved": 0.59, "reached": True, "predicted": 0.57},
        "latency": one, "latencies": [{**one, "batch": 1, "ratio": 0.9, "spread": 0.04}, one], "round_to": 16,
    }  # fmt: skip
    told = facts(timed)
    assert told[0] == "Target latency: 0.6 requested, 0.59 achieved; 0.57 was predicted from times of layers."
    assert "Multiples of 16 channels were kept: as measured on layers, smaller steps save no time here." in told
    assert any("FLOPs fell to 50.00 %, but time to no less than 90.00 % at batch 1: " in fact for fact in told)
    assert [row[3] for row in summary_rows(timed) if row[0].startswith("latency")] == ["90.00 % ± 2.0", "50.00 %"]
    assert any(fact.startswith("Any number of channels") for fact in facts(timed | {"round_to": 1}))
    given = timed | {"recipe": {"name": "a", "prune": {"round_to": 16, "scope": "latency_aware"}}}
    assert not any(fact.startswith("Multiples") for fact in facts(given))


def test_latency_is_told_by_runtime() -> None:
    report = report_of({"name": "a"}, [], kept=0.5)
    one = {"batch": 1, "dense_ms": 4.0, "pruned_ms": 2.0, "ratio": 0.5, "spread": 0.02}
    slow = {**one, "runtime": "compiled", "batch": 32, "ratio": 0.9}
    timed = report | {
        "latencies": [{**one, "runtime": "eager"}, slow], "unmeasured": {"onnxruntime": "ONNX is not of that opinion"},
    }  # fmt: skip
    names = [row[0] for row in summary_rows(timed) if row[0].startswith("latency")]
    assert names == ["latency, batch 1", "latency, batch 32, compiled"]
    assert "Latency in onnxruntime was not measured: ONNX is not of that opinion." in facts(timed)
    assert any("time to no less than 90.00 % at batch 32 in compiled: " in fact for fact in facts(timed))


def test_layers_whose_time_did_not_fall_are_named_with_the_reason() -> None:
    """By how much of the network's time they lack; what lacks little is not named."""
    report = report_of({"name": "a", "prune": {"runtime": "onnxruntime"}}, [], kept=0.5)
    flops = {"stairs": 40, "call": 20, "slow": 50, "fine": 50, "small": 50, "fourth": 90}
    rows = [{**report["layers"][0], "name": name, "flops_before": 100, "flops_after": of} for name, of in flops.items()]

    def time(name: str, after: float, least: float = 0.0, before: float = 10.0) -> dict[str, Any]:
        kept, rounded = [16.0, 20.0 if name == "stairs" else 32.0], 32
        narrowest = 32 if name == "slow" else 8
        return {
            "name": name, "before": before, "after": after, "least": least, "narrowest": [16, narrowest],
            "kept": kept, "rounded": [16, rounded],
        }  # fmt: skip

    times = [
        time("fine", 5.05), time("small", 0.09, before=0.1), time("slow", 6.5, 6.5), time("call", 6.0, 5.0),
        time("stairs", 9.0, 1.0), time("fourth", 9.9), time("gone", 10.0),
    ]  # fmt: skip
    (line,) = slow_layers(report | {"layers": rows, "layer_times": times})
    assert line == (
        "Layers whose FLOPs fell most beyond their time, by times of single layers in onnxruntime: "
        "stairs (FLOPs to 40 %, time to 90 %: 16 to 20 channels take as long as 16 to 32); "
        "call (FLOPs to 20 %, time to 60 %: 50 % stay with 16 to 8 channels, for memory and the call); "
        "slow (FLOPs to 50 %, time to 65 %: narrower, it takes longer for each FLOP)."
    )
    assert slow_layers(report) == slow_layers(report | {"layers": rows, "layer_times": times[:2]}) == []
    assert line in facts(report | {"layers": rows, "layer_times": times})
    compiled = report | {"recipe": {"name": "a", "prune": {"runtime": "compiled"}}, "layers": rows}
    assert "single layers in eager mode: stairs" in slow_layers(compiled | {"layer_times": times})[0]
