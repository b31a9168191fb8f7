"""The benchmark of criteria: complete, resumed with more, killed, and refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benchmarks import NARROW, SET, SMALL
from helpers.commands import refused
from helpers.whole_runs import Killed

from dnr_plugin.benchmarks.criteria import grid as grid_module
from dnr_plugin.benchmarks.criteria.contenders import CRITERIA
from dnr_plugin.benchmarks.criteria.grid import Grid, grid_of
from dnr_plugin.benchmarks.criteria.plot import best_lines, criteria_figure
from dnr_plugin.benchmarks.criteria.run import run_criteria
from dnr_plugin.benchmarks.criteria.tables import FIGURES, markdown, summary, tables
from dnr_plugin.cli.main import main
from dnr_plugin.recipe.load import load_recipe
from dnr_plugin.reports.table import bold
from dnr_plugin.runs.run import run_recipe


def _cells(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def _timeless(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in cell.items() if key != "seconds"} for cell in cells]


def test_a_benchmark_that_is_resumed_with_more_and_after_a_kill(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bench"
    common = ["bench", "criteria", str(tiny), *SET, "--output", str(folder), *NARROW]
    assert main([*common, "--criteria", "random,variation", "--finetune"]) == 0
    captured = capsys.readouterr()
    assert f"Written to {folder}" in captured.out and "Best at each level" in captured.out
    names = {"cells.jsonl", "criteria.json", "criteria.md", "criteria.png", "dense", "recipe.yaml"}
    assert {path.name for path in folder.iterdir()} == names
    result = json.loads((folder / "criteria.json").read_text())
    assert [(row["criterion"], row["level"]) for row in result["rows"]] == [
        ("random", 0.7), ("random", 0.5), ("variation", 0.7), ("variation", 0.5),
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["ours"] == (row["criterion"] == "variation")
        assert row["level"] - 0.1 < row["kept_flops"]["mean"] <= row["level"]
        assert all(0 <= row["accuracy"][name]["mean"] <= 1 for name in FIGURES) and not row["reasons"]
    lines = (folder / "cells.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 4

    # one more criterion, after a kill in the middle of a line
    (folder / "cells.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:40])
    checkpoint = (folder / "dense" / "seed=0" / "checkpoint.pt").stat().st_mtime_ns
    assert main([*common, "--criteria", "random,variation,l1", "--finetune", "--resume"]) == 0
    again = (folder / "cells.jsonl").read_bytes().splitlines(keepends=True)
    assert again[:3] == lines[:3] and len(again) == 6
    assert [(cell["criterion"], cell["level"]) for cell in _cells(folder)[3:]] == [
        ("variation", 0.5), ("l1", 0.7), ("l1", 0.5),
    ]  # fmt: skip
    assert _timeless([json.loads(lines[3])]) == _timeless(_cells(folder)[3:4])  # as if it had not been killed
    assert (folder / "dense" / "seed=0" / "checkpoint.pt").stat().st_mtime_ns == checkpoint

    # nothing left to do: the results are written anew
    (folder / "criteria.md").unlink()
    assert main([*common, "--criteria", "l1", "--resume"]) == 0
    assert (folder / "cells.jsonl").read_bytes().splitlines(keepends=True) == again
    assert "| variation |" in (folder / "criteria.md").read_text()

    capsys.readouterr()
    message = refused(capsys, *common)
    assert "holds a benchmark already: add --resume" in message
    message = refused(capsys, *common, "--resume", "--set", "finetune.lr=0.5", "--set", "prune.target.flops=0.6")
    assert "holds a benchmark of another recipe (there, here): finetune.lr: 0.01, 0.5" in message
    (folder / "cells.jsonl").write_bytes(b"{}\n" + again[1])
    assert "cells.jsonl:1: expected a cell, found damage: KeyError: 'seed'" in refused(capsys, *common, "--resume")


def test_two_processes_may_fill_one_folder(tiny: Path, tmp_path: Path) -> None:
    """A run of another seed, which starts and ends while this one runs, neither loses cells nor has them forgotten."""
    recipe, folder = load_recipe(tiny, SMALL), tmp_path / "bench"

    def together(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
        for number, item in enumerate(items):
            if what == "seed 0, random" and number == 1:
                run_criteria(recipe, folder, Grid([1], ["random"], ["local"], [0.5]), resume=True)
            yield item

    result = run_criteria(recipe, folder, Grid([0], ["random"], ["local"], [0.7, 0.5]), track=together)
    assert [(cell["seed"], cell["level"]) for cell in _cells(folder)] == [(0, 0.7), (1, 0.5), (0, 0.5)]
    assert list(result["dense"]["by_seed"]) == ["0", "1"]


def test_a_kill_costs_one_cell_and_every_seed_has_its_network(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny, SMALL)
    grid = Grid([0, 1], ["random"], ["global"], [0.7, 0.5])

    def killing(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
        for number, item in enumerate(items):
            if what == "seed 1, random" and number == 1:
                raise Killed(what)
            yield item

    with pytest.raises(Killed):
        run_criteria(recipe, tmp_path / "bench", grid, track=killing)
    assert [(cell["seed"], cell["level"]) for cell in _cells(tmp_path / "bench")] == [(0, 0.7), (0, 0.5), (1, 0.7)]
    result = run_criteria(recipe, tmp_path / "bench", grid, resume=True)
    whole = run_criteria(recipe, tmp_path / "whole", grid)
    assert result == whole
    assert _timeless(_cells(tmp_path / "bench")) == _timeless(_cells(tmp_path / "whole"))
    assert list(result["dense"]["by_seed"]) == ["0", "1"]
    assert result["rows"][0]["accuracy"]["recalibrated"]["n"] == 2
    assert result["rows"][0]["accuracy"]["repaired_finetuned"] is None


@pytest.mark.parametrize(
    ("options", "way"),
    [(["prune.repair=false"], "recalibrated"), (["prune.repair=true", "prune.recalibrate=0"], "repaired")],
)
def test_every_way_is_that_of_a_run(tiny: Path, tmp_path: Path, options: list[str], way: str) -> None:
    """The same removal in a run of the recipe leads to the same accuracies."""
    overrides = [*SMALL, "prune.fold=false", "prune.observe={samples: 96, min_samples: 64, share: 1.0}"]
    recipe = load_recipe(tiny, overrides)
    grid = Grid([recipe.seed], ["contribution"], ["local"], [0.5])
    row = run_criteria(recipe, tmp_path / "bench", grid, finetune=True)["rows"][0]
    run = load_recipe(tiny, [*overrides, "prune.score=contribution", *options])
    report = run_recipe(run, tmp_path / "run")
    assert row["accuracy"][way]["mean"] == report["pruned"]["accuracy_before_finetune"]
    assert row["accuracy"][f"{way}_finetuned"]["mean"] == report["pruned"]["accuracy"]
    assert row["kept_flops"]["mean"] == report["kept"]["flops"]


def test_what_fails_is_noted_and_the_rest_goes_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("nothing to divide by\nat all")

    monkeypatch.setitem(CRITERIA, "l2", broken)
    monkeypatch.setitem(CRITERIA, "lamp", lambda *_: lambda group: torch.full((len(group[0].idxs),), torch.nan))
    monkeypatch.setattr(grid_module, "COUNTED_SCOPES", ("local", "odd"))  # one that the planner does not know
    folder = tmp_path / "bench"
    arguments = ["--levels", "0.5", "--seeds", "0", "--scopes", "local,odd", "--criteria", "l2,lamp,l1"]
    for module in ("run", "tables"):
        monkeypatch.setattr(f"dnr_plugin.benchmarks.criteria.{module}.SCOPES", ("local", "odd"))
    assert main(["bench", "criteria", str(tiny), *SET, "--output", str(folder), *arguments]) == 0
    reasons = {(cell["criterion"], cell["scope"]): cell["reason"] for cell in _cells(folder)}
    assert reasons["l2", "local"] == reasons["l2", "odd"] == "ZeroDivisionError: nothing to divide by"
    assert re.fullmatch(r"ValueError: \S+: \d+ of \d+ scores are NaN or infinite", reasons["lamp", "local"])
    assert reasons["l1", "local"] is None
    assert reasons["l1", "odd"].startswith("ValueError: scope: expected one of local, ")
    assert all(bool(cell["accuracy"]) == (cell["reason"] is None) for cell in _cells(folder))
    text = (folder / "criteria.md").read_text()
    assert "| l2 | Torch-Pruning | - / - |" in text and "l2, local, 50 %: ZeroDivisionError" in text
    assert "- / -" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--criteria", "l1,talyor"], "--criteria: expected any of random, l1, "),
        (["--criteria", "talyor"], "found 'talyor'; did you mean 'taylor'?"),
        (["--criteria", "l1,l1"], "--criteria: expected each once, found l1 again"),
        (["--scopes", "lokal"], "found 'lokal'; did you mean 'local'?"),
        (["--levels", "0.5,1"], "--levels: expected shares of the FLOPs above 0 and below 1, found '1'"),
        (["--levels", "nan"], "--levels: expected shares of the FLOPs above 0 and below 1, found 'nan'"),
        (["--levels", "0.5,"], "--levels: expected shares of the FLOPs above 0 and below 1, found ''"),
        (["--levels", "0.001"], "--levels: expected at least 0.0"),
        (["--seeds", "0,-1"], "--seeds: expected whole numbers of at least 0, found '-1'"),
        (["--finetune", "--set", "finetune.epochs=0"], "finetune.epochs: expected at least 1 with --finetune, found 0"),
        (["--set", "prune.recalibrate=0"], "prune.recalibrate: expected above 0 for this benchmark, found 0"),
        (["--set", "prune={mode: watch}"], "prune.mode: expected after_training for this benchmark, found watch"),
        (["--set", "train.batch_size=1000"], "train.batch_size: expected at most 192"),
    ],
)
def test_a_bad_argument_gets_its_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert expected in refused(capsys, "bench", "criteria", str(tiny), "--output", str(tmp_path / "b"), *arguments)
    assert not (tmp_path / "b").exists()


def test_a_folder_with_other_files_isrefused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "recipe.yaml").write_text("of a run")
    message = refused(capsys, "bench", "criteria", str(tiny), "--output", str(tmp_path / "b"), "--resume")
    assert "expected an empty folder or that of a benchmark of criteria" in message


def test_all_bad_items_come_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    bad = ["--levels", "2", "--seeds", "x", "--criteria", "y", "--scopes", "z"]
    assert len(refused(capsys, "bench", "criteria", "quickstart", "--output", "o", *bad).splitlines()) == 4


def test_the_grid_by_default() -> None:
    grid = grid_of()
    assert list(grid.criteria) == list(CRITERIA)
    assert len(grid.cells) == 3 * len(CRITERIA) * 3 * 5


def _made_up(accuracies: dict[tuple[str, str, float], list[float]]) -> list[dict[str, Any]]:
    return [
        {
            "seed": seed, "criterion": criterion, "scope": scope, "level": level, "dense_accuracy": 0.9, "kept": level,
            "accuracy": {"recalibrated": value, "repaired": value + 0.1}, "reason": None, "seconds": 1.0, "device": "x",
        }
        for (criterion, scope, level), values in accuracies.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip


def test_tables_and_plot_show_the_best(tiny: Path) -> None:
    cells = _made_up(
        {
            ("l1", "local", 0.5): [0.5, 0.7],
            ("l1", "local", 0.25): [0.3, 0.3],
            ("l1", "global", 0.5): [0.8],  # a level and a seed fewer
            ("variation", "local", 0.5): [0.6, 0.8],
            ("variation", "local", 0.25): [0.1, 0.1],
            ("variation", "global", 0.5): [0.65, 0.65],
            ("variation", "global", 0.25): [0.2, 0.2],
        }
    )
    result = summary(load_recipe(tiny), 64, cells)
    titled = {table.title.partition(":")[0]: (table.head, table.rows) for table in tables(result)}
    head, body = titled["Best at each level"]
    assert head == ["test accuracy, %", "50 % of FLOPs", "25 % of FLOPs"]
    assert body == [
        ["BatchNorm recalibrated", "l1, global: 80.0 (n = 1)", "l1, local: 30.0 ± 0.0"],
        ["repaired", "l1, global: 90.0 (n = 1)", "l1, local: 40.0 ± 0.0"],
    ]
    assert titled["Scope local"][1] == [
        ["l1", "Torch-Pruning", "60.0 ± 14.1 / 70.0 ± 14.1", f"{bold('30.0 ± 0.0')} / {bold('40.0 ± 0.0')}"],
        ["variation", "dnr_plugin", f"{bold('70.0 ± 14.1')} / {bold('80.0 ± 14.1')}", "10.0 ± 0.0 / 20.0 ± 0.0"],
    ]
    assert titled["Scope global"][1][1] == [
        "l1",
        "Torch-Pruning",
        f"{bold('80.0 (n = 1)')} / {bold('90.0 (n = 1)')}",
        "- / -",
    ]
    assert markdown(result).count("\n## ") == 3
    best = best_lines(result, "recalibrated")
    assert {criterion: line[0]["scope"] for criterion, line in best.items()} == {"l1": "local", "variation": "global"}
    panels = criteria_figure(result).axes
    assert [axes.get_title() for axes in panels] == ["BatchNorm recalibrated", "repaired"]
    labels = [text.get_text() for text in panels[0].get_legend().get_texts()]  # type: ignore[union-attr]
    assert set(labels) == {"dense", "l1 (local)", "variation (global)"}


def test_every_criterion_has_a_style_of_its_own(tiny: Path) -> None:
    cells = _made_up({(criterion, "local", 0.5): [0.5] for criterion in CRITERIA})
    lines = [bar.lines[0] for bar in criteria_figure(summary(load_recipe(tiny), 64, cells)).axes[0].containers]
    assert len({(str(line.get_color()), line.get_marker(), line.get_linestyle()) for line in lines}) == len(CRITERIA)
