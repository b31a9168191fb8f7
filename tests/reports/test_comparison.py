"""Runs side by side: what tells them apart, the spread between seeds, the plots, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.common import TINY
from helpers.made_up import check_events, epoch_events, report_of

from dnr_plugin.cli.main import main
from dnr_plugin.recipe.load import load_recipe
from dnr_plugin.reports.comparison import Run, compare_runs
from dnr_plugin.reports.comparison_report import markdown, rows, write_comparison
from dnr_plugin.reports.figures import comparison as compare_plots
from dnr_plugin.reports.published import PUBLISHED, published
from dnr_plugin.runs.run import run_recipe

CIFAR: dict[str, Any] = {
    "name": "made-up",
    "model": {"name": "resnet18"},
    "data": {"name": "cifar10", "root": "data"},
    "train": {"epochs": 20},
    "prune": {"target": {"neuron_sparsity": 0.5}},
}


def _recipe(**changes: Any) -> dict[str, Any]:
    """`CIFAR` with options replaced: dotted names, dots written as two underscores."""
    recipe = copy.deepcopy(CIFAR)
    for name, value in changes.items():
        *sections, last = name.split("__")
        place = recipe
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return recipe


def _save(folder: Path, report: dict[str, Any], events: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def _watched(folder: Path, died: float = 0.05, seed: int = 0, **changes: Any) -> Path:
    """A run that watched its neurons."""
    events = [*check_events(removes=False, died=died, seed=seed), *epoch_events()]
    recipe = _recipe(seed=seed, prune={"mode": "watch"}, **changes)
    return _save(folder, report_of(recipe, events, kept=1.0), events)


def _pruned(folder: Path, accuracy: float = 0.9, sparsity: float = 0.5, **changes: Any) -> Path:
    """A run that pruned after training."""
    report = report_of(_recipe(prune={"target": {"neuron_sparsity": sparsity}}, **changes), [], accuracy=accuracy)
    report["sparsity"]["neuron"] = sparsity
    report["target"]["kind"] = "neuron_sparsity"
    return _save(folder, report, [])


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three real runs: two seeds of one recipe, and another width."""
    folder = tmp_path_factory.mktemp("runs")
    file = folder / "tiny.yaml"
    file.write_text(json.dumps(TINY))
    short = ["train.epochs=1", "finetune.epochs=0", "data.train_size=96", "data.test_size=30"]
    runs = []
    for name, overrides in (("a", ["seed=0"]), ("b", ["seed=1"]), ("c", ["model.width=4"])):
        run_recipe(load_recipe(file, [*short, *overrides]), folder / name)
        runs.append(folder / name)
    return runs


def test_real_runs_are_told_apart_and_grouped(real: list[Path]) -> None:
    found = compare_runs(real)
    assert found.options == ["seed", "model.width"]
    assert [[run.name for run in group.runs] for group in found.groups] == [["a", "b"], ["c"]]
    reports = [json.loads((folder / "report.json").read_text()) for folder in real]
    for run, report in zip(found.runs, reports, strict=True):
        assert run.values["accuracy"] == report["pruned"]["accuracy"]
        assert run.values["dense_accuracy"] == report["dense"]["accuracy"]
        assert run.values["flops"] == report["kept"]["flops"]
        assert run.values["neuron_sparsity"] == report["sparsity"]["neuron"]
        assert run.values["dead"] == report["dead"]["neurons"]
        assert run.values["train_seconds"] == report["seconds"]["train"]
        assert run.values["wall_clock_ratio"] is None
    both = [report["pruned"]["accuracy"] for report in reports[:2]]
    assert found.groups[0].mean["accuracy"] == pytest.approx(float(np.mean(both)))
    assert found.groups[0].sd["accuracy"] == pytest.approx(float(np.std(both, ddof=1)))
    assert found.groups[1].sd["accuracy"] is None


def test_the_command_writes_tables_and_plots(
    real: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "compared"
    command = ["compare", *map(str, real), "--output", str(output)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "3 runs compared" in out
    assert "mean ± sd, n = 2" in out
    assert {path.name for path in output.iterdir()} == {"compare.json", "compare.md", "compare.html", "plots"}
    drawn = {path.name for path in (output / "plots").iterdir()}
    assert drawn == {"neuron_sparsity.png", "weight_sparsity.png", "flops.png", "dead.png", "dead_against.png"}
    text = (output / "compare.html").read_text()
    assert text.count("data:image/png;base64,") == 5
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    data = json.loads((output / "compare.json").read_text())
    assert data["options"] == ["seed", "model.width"]
    assert [run["options"]["model.width"] for run in data["runs"]] == [8, 8, 4]
    assert [(group["runs"], group["n"]) for group in data["groups"]] == [(["a", "b"], 2), (["c"], 1)]
    table = [line for line in (output / "compare.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3 + 1
    assert len({line.count("|") for line in table}) == 1

    # again over itself, with fewer plots to show: what is not drawn any more is gone
    assert main(["compare", *map(str, real[:2]), "--output", str(output)]) == 0
    assert {path.name for path in (output / "plots").iterdir()} == drawn - {"dead_against.png"}


def test_without_output_nothing_is_written(
    real: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in real[0].parent.rglob("*")}
    assert main(["compare", *map(str, real)]) == 0
    assert "model." in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in real[0].parent.rglob("*")} == before
    assert not list(tmp_path.iterdir())


def test_folders_without_a_finished_run_are_refused(
    real: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "report.json").write_text('{"recipe": {}}')
    bad = [str(tmp_path / name) for name in ("empty", "absent", "damaged")]
    output = tmp_path / "compared"
    assert main(["compare", str(real[0]), *bad, str(real[0]), "--output", str(output)]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    finished = "dnr: compare: expected the folder of a finished run, found"
    assert lines[0] == f"{finished} {bad[0]} with no report.json in it"
    assert lines[1] == f"{finished} {bad[1]} with no such folder"
    assert lines[2].startswith(
        f"dnr: {bad[2]}/report.json: expected the report of a run, found damage: name: Field required"
    )
    assert lines[3] == f"dnr: compare: expected each run once, found {real[0]} again"
    assert len(lines) == 4
    assert captured.out == ""
    assert not output.exists()


def test_folders_with_other_things_in_them_are_left_alone(
    real: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    (tmp_path / "drawn" / "plots").mkdir(parents=True)
    (tmp_path / "drawn" / "plots" / "mine.png").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name, found in (("mine", "thesis.tex in it"), ("drawn", "mine.png in it"), ("file", "found the file")):
        assert main(["compare", str(real[0]), "--output", str(tmp_path / name)]) == 2
        message = capsys.readouterr().err
        assert message.startswith("dnr: --output: expected ")
        assert found in message
    assert main(["compare", str(real[0]), "--output", str(real[1])]) == 2  # a run is no place for a comparison
    precious = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(precious) == 3
    assert all(path.read_text() == "precious" for path in precious)


def test_what_decides_no_result_does_not_tell_runs_apart(tmp_path: Path) -> None:
    """Names and places; and defaults that an older report does not spell out."""
    old = _pruned(tmp_path / "old")
    spelt = _pruned(tmp_path / "new", name="renamed", data__root="elsewhere", train__batch_size=128)
    found = compare_runs([old, spelt])
    assert found.options == []
    assert len(found.groups) == 1


def test_a_recipe_of_another_version_is_compared_as_it_is(tmp_path: Path) -> None:
    found = compare_runs([_pruned(tmp_path / "a", train__gone=1), _pruned(tmp_path / "b", train__gone=2)])
    assert found.options == ["train.gone"]


def test_a_penalty_is_told_by_its_strength_alone(tmp_path: Path) -> None:
    """The schedule comes and goes with it; where it differs on its own it is told too."""
    one = {"bn_l1": {"strength": 1e-5}}
    other = {"bn_l1": {"strength": 1e-4, "schedule": "constant"}}
    none, weak = _watched(tmp_path / "none"), _watched(tmp_path / "weak", train__pressure=one)
    assert compare_runs([none, weak]).options == ["train.pressure.bn_l1.strength"]
    strong = _watched(tmp_path / "strong", train__pressure=other)
    assert compare_runs([none, weak, strong]).options == [
        "train.pressure.bn_l1.strength",
        "train.pressure.bn_l1.schedule",
    ]


def test_runs_of_every_kind_in_one_table(tmp_path: Path) -> None:
    """A watching run has no target and no dense accuracy, an old one neither mode nor dynamics."""
    events = [*check_events(), *epoch_events()]
    dynamic = report_of(_recipe(prune={"mode": "dynamic", "target": {"flops": 0.3}}), events)
    folders = [
        _watched(tmp_path / "watch"),
        _save(tmp_path / "dynamic", dynamic, events),
        _pruned(tmp_path / "old"),
    ]
    found = compare_runs(folders)
    head, cells = rows(found)
    table = {row[0]: dict(zip(head, row, strict=True)) for row in cells}
    assert table["watch"]["dense accuracy, %"] == table["dynamic"]["dense accuracy, %"] == "-"
    assert table["old"]["dense accuracy, %"] == "91.00"
    assert table["dynamic"]["training time / dense"] == "0.71"
    assert table["old"]["training time / dense"] == "-"
    assert [table[name]["prune.mode"] for name in ("watch", "dynamic", "old")] == ["watch", "dynamic", "after_training"]
    assert table["watch"]["prune.target.flops"] == "none"
    assert int(table["dynamic"]["reactivated"]) == dynamic["reactivated"] > 0
    assert "| watch |" in markdown(found)
    write_comparison(tmp_path / "out", found)
    assert {path.stem for path in (tmp_path / "out" / "plots").iterdir()} == {
        "neuron_sparsity", "weight_sparsity", "flops", "dead",
    }  # fmt: skip


def _curves(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """x and y of what has a label: error bars and plain lines."""
    bars = {c.get_label(): c.lines[0] for c in axes.containers}
    lines = {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}
    return {label: tuple(list(map(float, v)) for v in line.get_data()) for label, line in (lines | bars).items()}


def test_accuracy_is_drawn_over_seeds_beside_what_was_published(tmp_path: Path) -> None:
    accuracies = {(0.5, 0): 0.90, (0.5, 1): 0.92, (0.9, 0): 0.84, (0.9, 1): 0.86}
    folders = [
        _pruned(tmp_path / f"{activation}{sparsity}{seed}", accuracy, sparsity, seed=seed, model__activation=activation)
        for activation in ("relu", "silu")
        for (sparsity, seed), accuracy in reversed(accuracies.items())
    ]
    figure = compare_plots.accuracy_figure(compare_runs(folders), "neuron_sparsity")
    (axes,) = figure.axes
    drawn = _curves(axes)
    ours = ["model.activation relu", "model.activation silu"]
    for label in ours:
        x, y = drawn[label]
        assert x == [50, 90]
        assert y == pytest.approx([91, 85])
    bars = axes.containers[0].lines[2][-1].get_segments()
    assert [(top - bottom) / 2 for (_, bottom), (_, top) in bars] == pytest.approx([2**0.5, 2**0.5])
    theirs = [f"{name}, ResNet-18, ReLU (published, full size)" for name in ("DNR", "EarlyCroP-S")]
    assert set(drawn) == {*ours, *theirs, "dense, mean of these runs"}
    assert drawn[theirs[0]] == ([50, 60, 70, 75, 80, 85, 90], [92.8, 92.5, 91.8, 91.4, 90.8, 89.1, 86.3])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*ours, "dense, mean of these runs", *theirs]
    assert legend.get_title().get_text() == ""


def test_targets_of_other_kinds_are_not_joined(tmp_path: Path) -> None:
    flops = _pruned(tmp_path / "flops")
    report = json.loads((flops / "report.json").read_text())
    report["target"]["kind"] = "flops"
    report["recipe"]["prune"]["target"] = {"flops": 0.3}
    (flops / "report.json").write_text(json.dumps(report))
    (axes,) = compare_plots.accuracy_figure(compare_runs([flops, _pruned(tmp_path / "neurons")]), "flops").axes
    names = [f"this comparison (target {kind})" for kind in ("flops", "neuron_sparsity")]
    assert [container.get_label() for container in axes.containers] == names


def test_smaller_networks_and_fewer_images_are_told(tmp_path: Path) -> None:
    small = compare_runs([_pruned(tmp_path / "small", model__width=16, data__train_size=20_000)])
    (legend,) = compare_plots.accuracy_figure(small, "flops").legends
    told = "width 16 instead of 64, 20,000 of 50,000 training images"
    assert legend.get_title().get_text() == f"these runs are smaller than the published: {told}"
    assert "OTO, ResNet-18, ReLU (published, full size)" in [text.get_text() for text in legend.get_texts()]


def test_only_what_fits_is_drawn(tmp_path: Path) -> None:
    for change in ({"model__name": "resnet20"}, {"model__activation": "silu"}, {"data__name": "cifar100"}):
        found = compare_runs([_pruned(tmp_path / "-".join(change.values()), model__width=4, **change)])
        for measure in ("neuron_sparsity", "weight_sparsity", "flops"):
            figure = compare_plots.accuracy_figure(found, measure)
            assert not any("published" in label for label in _curves(figure.axes[0])), change
            assert figure.legends[0].get_title().get_text() == ""
    assert [curve.method for curve in published("flops", "vgg16_bn", "relu", "cifar10")] == ["CHIP"]
    assert [c.method for c in published("weight_sparsity", "resnet18", "leaky_relu", "cifar10")] == ["DNR"]
    assert all(50 < accuracy < 100 and 0 < x < 100 for curve in PUBLISHED for x, accuracy in curve.points)


def test_dead_neurons_over_epochs(tmp_path: Path) -> None:
    folders = [
        _watched(tmp_path / f"{batch}-{seed}", 1 / batch, seed, train__batch_size=batch)
        for batch in (64, 16)
        for seed in (0, 1)
    ]
    found = compare_runs([*folders, _pruned(tmp_path / "unwatched")])
    watched = [run for run in found.runs if compare_plots.dead_shares(run)]
    assert len(watched) == 4
    (axes,) = compare_plots.dead_figure(found, watched).axes
    first, again, *others = axes.get_lines()
    assert len(others) == 2
    assert first.get_color() == again.get_color() != others[0].get_color()
    assert "train.batch_size 16" in first.get_label()
    assert first.get_label().endswith("(2 seeds)")
    x, y = first.get_data()
    checks = [event for event in _run_named(watched, "16-0").events if event["event"] == "check"]
    for epoch, share in zip(x, y, strict=True):
        now = [event for event in checks if event["epoch"] == epoch]
        assert share == pytest.approx(100 * sum(e["dead"] for e in now) / sum(e["neurons"] for e in now))


def _run_named(runs: list[Run], name: str) -> Run:
    return next(run for run in runs if run.name == name)


@pytest.mark.parametrize(
    ("values", "scale"),
    [((16, 64), "linear"), ((16, 256), "log"), ((None, 9e-8, 9e-5), "symlog"), ((0.0, 0.1, 0.2), "linear")],
)
def test_dead_neurons_against_the_option_that_differs(tmp_path: Path, values: tuple[Any, ...], scale: str) -> None:
    """Without a penalty its strength is zero."""
    option = "train.batch_size" if 16 in values else "train.pressure.bn_l1.strength"
    folders = []
    for n, value in enumerate(values):
        change = {"train__batch_size": value} if 16 in values else {}
        if 16 not in values and value is not None:
            change = {"train__pressure": {"bn_l1": {"strength": value}}}
        folders += [_watched(tmp_path / f"{n}-{seed}", 0.02 * (n + 1), seed, **change) for seed in (0, 1)]
    found = compare_runs(folders)
    assert compare_plots.varied_number(found, found.runs) == option
    (axes,) = compare_plots.dead_against_figure(found, found.runs, option).axes
    (container,) = axes.containers
    x, y = container.lines[0].get_data()
    assert list(x) == [value or 0.0 for value in values]
    ends = [
        [compare_plots.dead_shares(run)[-1][1] for run in found.runs[2 * n : 2 * n + 2]] for n in range(len(values))
    ]
    assert list(y) == pytest.approx([100 * np.mean(pair) for pair in ends])
    assert axes.get_xscale() == scale
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [f"{value or 0:g}" for value in values]
    assert axes.get_xlabel() == option


def test_with_two_numbers_that_differ_there_is_no_axis_for_either(tmp_path: Path) -> None:
    folders = [_watched(tmp_path / "a"), _watched(tmp_path / "b", train__batch_size=16, train__lr=0.01)]
    found = compare_runs(folders)
    assert set(compare_plots.comparison_figures(found)) == {"dead"}
    names = [_watched(tmp_path / "c", model__activation="silu"), folders[0]]
    assert set(compare_plots.comparison_figures(compare_runs(names))) == {"dead"}


def test_many_runs_have_colours_of_their_own(tmp_path: Path) -> None:
    folders = [_watched(tmp_path / str(n), train__batch_size=16 + n) for n in range(14)]
    found = compare_runs(folders)
    (axes,) = compare_plots.dead_figure(found, found.runs).axes
    assert len({line.get_color() for line in axes.get_lines()}) == 14
