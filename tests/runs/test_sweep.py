"""Sweeps: every run ends as it would alone, trains once where it can, and survives a kill."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from helpers.whole_runs import Killed, assert_same, lasting

from dnr_plugin.cli.main import main
from dnr_plugin.errors import InputError, RunError
from dnr_plugin.recipe.load import load_recipe
from dnr_plugin.reports.comparison import compare_runs
from dnr_plugin.runs import combinations, sweep
from dnr_plugin.runs.combinations import combine
from dnr_plugin.runs.run import run_recipe
from dnr_plugin.runs.state import Track
from dnr_plugin.runs.sweep import Outcome, run_sweep

FLOPS = "prune.target.flops=0.5,0.7"
SMALL = ["model.width=4", "train.epochs=1", "finetune.epochs=1", "prune.recalibrate=64"]
# Where only folders and exit codes matter.
SHORT = ["model={name: mlp, hidden: [16, 16]}", "train.epochs=1", "finetune.epochs=1"]


def _assert_alone(folder: Path, tiny: Path, alone: Path, *overrides: str) -> None:
    """The run in the folder is the one that the recipe alone makes."""
    run_recipe(load_recipe(tiny, overrides), alone)
    assert_same(lasting(folder), lasting(alone), 0)
    kept = ("recipe.yaml", "architecture.json")
    assert all((folder / name).read_text() == (alone / name).read_text() for name in kept)
    assert {path.name for path in folder.iterdir()} == {path.name for path in alone.iterdir()}


def _killing(what: str, times: int) -> Track:
    """Stops a sweep in the third step of what is shown under this name for the n-th time."""
    left = [times]

    def track(items: Iterable[Any], total: int, shown: str) -> Iterable[Any]:
        left[0] -= shown == what
        for number, item in enumerate(items):
            if left[0] == 0 and shown == what and number == 2:
                raise Killed(what)
            yield item

    return track


def _listing(shown: list[str]) -> Track:
    def track(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
        shown.append(what)
        return items

    return track


@pytest.mark.longest
def test_runs_that_share_their_training_end_as_they_would_alone(tiny: Path, tmp_path: Path) -> None:
    shown: list[str] = []
    said: list[str] = []
    folder = tmp_path / "sweep"
    vary = ["seed=0,1", FLOPS]
    outcome = run_sweep(tiny, SMALL, vary, folder, track=_listing(shown), say=said.append)
    names = ["seed=0,flops=0.5", "seed=0,flops=0.7", "seed=1,flops=0.5", "seed=1,flops=0.7"]
    assert list(outcome.reports) == names
    assert said == [f"run {n} of 4: {folder / name}" for n, name in enumerate(names, 1)]
    assert shown.count("train epoch 1/1") == 2
    assert {path.name for path in folder.iterdir()} >= {*names, "dense-1", "dense-2", "sweep.json"}
    compared = compare_runs([folder])  # a sweep stands for its runs
    assert [run.folder for run in compared.runs] == [str(folder / name) for name in names]
    for name in (names[1], names[2]):
        seed, flops = re.findall(r"=([\d.]+)", name)
        _assert_alone(folder / name, tiny, tmp_path / name, *SMALL, f"seed={seed}", f"prune.target.flops={flops}")


@pytest.mark.longest
def test_a_sweep_killed_in_training_and_in_its_second_run_goes_on(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    noise = ["model.width=4", "train.pressure.noise={std: 0.001}"]
    with pytest.raises(Killed):
        run_sweep(tiny, noise, [FLOPS], folder, track=_killing("train epoch 2/2", 1))
    assert not (folder / "flops=0.5").exists()
    shown: list[str] = []
    with pytest.raises(Killed):
        run_sweep(tiny, noise, [FLOPS], folder, resume=True, track=_killing("finetune epoch 2/2", 2))
    first = folder / "flops=0.5"
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert (first / "report.json").is_file() and not (folder / "flops=0.7" / "report.json").exists()
    outcome = run_sweep(tiny, noise, [FLOPS], folder, resume=True, track=_listing(shown))
    assert list(outcome.reports) == ["flops=0.5", "flops=0.7"]
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    assert [what for what in shown if "epoch" in what] == ["finetune epoch 2/2"]
    for flops in ("0.5", "0.7"):
        _assert_alone(folder / f"flops={flops}", tiny, tmp_path / flops, *noise, f"prune.target.flops={flops}")


def test_a_run_killed_before_it_has_begun_is_begun_again(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder then holds the copied checkpoint and no recipe yet."""
    write = sweep.write_recipe

    def killed(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(sweep, "write_recipe", killed)
    with pytest.raises(Killed):
        run_sweep(tiny, SHORT, ["prune.target.flops=0.5"], tmp_path / "sweep")
    assert [path.name for path in (tmp_path / "sweep" / "flops=0.5").iterdir()] == ["checkpoint.pt"]
    monkeypatch.setattr(sweep, "write_recipe", write)
    shown: list[str] = []
    run_sweep(tiny, SHORT, ["prune.target.flops=0.5"], tmp_path / "sweep", resume=True, track=_listing(shown))
    assert "train epoch 1/1" not in shown


def test_values_can_be_added_but_not_exchanged(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sweep"
    common = ["sweep", str(tiny), "--output", str(folder)]
    common += [part for override in SHORT for part in ("--set", override)]
    assert main([*common, "--vary", "prune.target.flops=0.5"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Written to {folder}: flops=0.5"
    before = {path: path.stat().st_mtime_ns for path in (folder / "flops=0.5").rglob("*")}
    index = (folder / "sweep.json").read_text()
    for arguments, expected in (
        (["--vary", "prune.target.flops=0.5"], f"--output: {folder} holds a sweep already: add --resume to go on"),
        (["--vary", "prune.target.flops=0.6", "--resume"], "and perhaps more, found none that make flops=0.5"),
        (["--vary", FLOPS, "--set", "seed=3", "--resume"], "and perhaps more, found none that make flops=0.5"),
    ):
        assert main([*common, *arguments]) == 2
        message = capsys.readouterr().err
        assert message.startswith("dnr: --output: ") and expected in message and message.count("\n") == 1
    assert (folder / "sweep.json").read_text() == index

    shown: list[str] = []
    vary = ["prune.target.flops=0.6,0.5", "seed=0,1"]
    outcome = run_sweep(tiny, SHORT, vary, folder, resume=True, track=_listing(shown))
    assert list(outcome.reports) == ["flops=0.6,seed=0", "flops=0.6,seed=1", "flops=0.5", "flops=0.5,seed=1"]
    assert shown.count("train epoch 1/1") == 1  # of seed 1; that of seed 0 was kept
    assert {path: path.stat().st_mtime_ns for path in (folder / "flops=0.5").rglob("*")} == before
    listed = json.loads((folder / "sweep.json").read_text())["runs"]
    assert [item["dense"] for item in listed] == ["dense-1", "dense-2", "dense-1", "dense-2"]

    (folder / "flops=0.5" / "recipe.yaml").write_text(
        (folder / "flops=0.5" / "recipe.yaml").read_text().replace("seed: 0", "seed: 7")
    )
    assert main([*common, "--vary", vary[0], "--vary", vary[1], "--resume"]) == 2
    assert "flops=0.5 holds a run of another recipe (there, here): seed: 7, 0 (with --vary" in capsys.readouterr().err
    (folder / "sweep.json").write_text('{"runs": [{}]}')
    assert main([*common, "--vary", FLOPS, "--resume"]) == 2
    assert "expected the list of a sweep's runs, found damage" in capsys.readouterr().err


def test_folders_that_are_no_sweeps_are_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    for resume in (False, True):
        with pytest.raises(InputError, match="with other files in it"):
            run_sweep(tiny, [], [FLOPS], tmp_path / "mine", resume=resume)
        with pytest.raises(InputError, match="expected a folder, found the file"):
            run_sweep(tiny, [], [FLOPS], tiny, resume=resume)


def test_values_of_every_kind_become_overrides(tiny: Path) -> None:
    found = combine(
        tiny, [], ["prune.target={flops: 0.5},{params: 0.25}", "train.pressure.bn_l1={strength: 0.01},null"]
    )
    assert [(one.recipe.prune.target, one.recipe.train.pressure.bn_l1) for one in found] == [
        (load_recipe(tiny, overrides).prune.target, load_recipe(tiny, overrides).train.pressure.bn_l1)
        for overrides in (
            ["prune.target={flops: 0.5}", "train.pressure.bn_l1={strength: 0.01}"],
            ["prune.target={flops: 0.5}"],
            ["prune.target={params: 0.25}", "train.pressure.bn_l1={strength: 0.01}"],
            ["prune.target={params: 0.25}"],
        )
    ]
    (lists,) = zip(*(one.values for one in combine(tiny, [], ["prune.ignored= [conv1, fc], [] ,['a,b']"])), strict=True)
    assert lists == ("prune.ignored=[conv1, fc]", "prune.ignored=[]", "prune.ignored=['a,b']")
    lrs = combine(tiny, ["train.lr=1"], ["train.lr=5e-4,1e-3"])
    assert [one.recipe.train.lr for one in lrs] == [5e-4, 1e-3]  # YAML 1.2, and after --set


@pytest.mark.parametrize(
    ("vary", "expected"),
    [
        (["seed=0,1", "prune.target.flops=0.5,0.25"], ["seed=0,flops=0.5", "seed=0,flops=0.25", "seed=1,flops=0.5"]),
        (["train.lr=0.1", "finetune.lr=0.1,0.2"], ["train.lr=0.1,finetune.lr=0.1", "train.lr=0.1,finetune.lr=0.2"]),
        (["seed=0", "model.kwargs.seed=1"], ["seed=0,kwargs.seed=1"]),
        (["prune.target={flops: 0.5},{params: 0.5}"], ["target=flops-0.5", "target=params-0.5"]),
        (["prune.ignored=['layer1.*'],['LAYER1.*'],[a/b]"],
         ["ignored=layer1.-", "ignored=LAYER1.--2", "ignored=a-b"]),
        (["description='../../x','..'"], ["description=..-..-x", "description=.."]),
        ([f"description={'x' * 300},{'x' * 301}"], ["description=" + 88 * "x", "description=" + 88 * "x" + "-2"]),
    ],
)  # fmt: skip
def test_folders_are_named_by_their_values(tiny: Path, tmp_path: Path, vary: list[str], expected: list[str]) -> None:
    runs = combinations.with_folders(combine(tiny, [], vary), [], tmp_path)
    assert [planned.folder for planned in runs][: len(expected)] == expected
    assert len({planned.folder.casefold() for planned in runs}) == len(runs)


def test_only_recipes_that_train_alike_share(tiny: Path, tmp_path: Path) -> None:
    vary = ["train.lr=0.05,0.1", "finetune.epochs=1,2", "name=a,b"]
    runs = combinations.with_folders(combine(tiny, [], vary), [], tmp_path)
    assert [planned.dense for planned in runs] == ["dense-1"] * 4 + ["dense-2"] * 4
    runs = combinations.with_folders(combine(tiny, ["train.epochs=0"], [FLOPS]), [], tmp_path)
    assert [planned.dense for planned in runs] == [None, None]
    target = ["prune={mode: dynamic, target: {flops: 0.5}},{target: {flops: 0.5}}"]
    runs = combinations.with_folders(combine(tiny, [], target), [], tmp_path)
    assert [planned.dense for planned in runs] == [None, "dense-1"]


BAD: list[tuple[list[str], list[str]]] = [
    (["prune.target.flops"], ["--vary prune.target.flops: expected option.name=value,value,..., found "]),
    (["=1,2"], ["--vary =1,2: expected option.name=value,value,..., found '=1,2'"]),
    (["prune.target.flops="], ["--vary prune.target.flops=: expected at least one value, found none"]),
    (["seed=1,,2"], ["--vary seed=1,,2: not YAML: "]),
    (["seed=1] # "], ["--vary seed=1] # : expected values with commas between them, found '1] # '"]),
    (["seed=[1"], ["--vary seed=[1: not YAML: "]),
    (["seed=&a 1,*a"], ["--vary seed=&a 1,*a: expected no YAML anchors or aliases, found 'a'"]),
    (["seed=1,2,1"], ["--vary seed: expected each value once, found 1 again"]),
    (["seed=1,2", "seed=3"], ["--vary seed: expected each option once, found it again"]),
    (
        ["train.lr=0.1,1e-1"],
        ["--vary: expected combinations that differ, found the same recipe for train.lr=0.1 and for train.lr=1e-1"],
    ),
    (
        ["prune.target.flopz=0.5,0.25"],
        [
            "--vary prune.target.flopz=0.5: prune.target.flopz: expected an option of prune.target, found unknown "
            "'flopz'; did you mean 'flops'?"
        ],
    ),
    (
        ["prune.target.flops=0.5,2,fast", "seed=0,-1"],
        [
            "--vary seed=-1: seed: expected an integer of at least 0 and below 4294967296, found -1",
            "--vary prune.target.flops=2: prune.target.flops: expected a number above 0 and below 1, found 2",
            "--vary prune.target.flops=fast: prune.target.flops: expected a number above 0 and below 1, found 'fast'",
        ],
    ),
    (
        ["train.epochs=1,3", "train.warmup_epochs=0,2"],
        ["--vary train.warmup_epochs=2: train.warmup_epochs: expected less than epochs (1), found 2 (with "],
    ),
    (
        ["prune.target.flops=0.5,0.001"],
        ["--vary prune.target.flops=0.001: prune.target.flops: expected at least 0."],
    ),
    (["data.train_size=16,192"], ["train.batch_size: expected at most 16, the number of training images, found 32 ("]),
    (["seed=" + ",".join(map(str, range(1001)))], ["--vary: expected at most 1000 combinations, found more"]),
]  # fmt: skip


@pytest.mark.parametrize(("vary", "expected"), BAD, ids=lambda value: value[0][:30])
def test_every_problem_is_told_before_anything_runs(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    vary: list[str], expected: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", str(tiny), *(part for text in vary for part in ("--vary", text))]) == 2
    lines = capsys.readouterr().err.splitlines()
    for line in expected:
        assert any(line in found for found in lines), lines
    if "train_size" not in vary[0]:  # where fewer images make several problems
        assert len(lines) == len(expected), lines
    assert all(line.startswith("dnr: ") and "--vary" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_a_problem_of_the_recipe_is_told_once(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(tiny), "--vary", FLOPS, "--set", "train.lr=-1"]) == 2
    assert capsys.readouterr().err == ("dnr: --set train.lr=-1: train.lr: expected a number above 0, found -1\n")
    assert main(["sweep", "nowhere.yaml", "--vary", FLOPS]) == 2
    assert capsys.readouterr().err == "dnr: nowhere.yaml: expected a recipe file, found no such file\n"


def test_a_run_that_diverges_does_not_stop_the_others(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In training that two runs share, which is tried once, and in fine-tuning."""
    command = ["sweep", str(tiny), "--output", str(tmp_path / "sweep"), "--vary", "finetune.lr=0.01,1e30"]
    for override in (*SHORT, "finetune.schedule=constant", "train.schedule=constant"):
        command += ["--set", override]
    assert main([*command, "--vary", "train.lr=0.05,1e30"]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].endswith(": finetune.lr=0.01,train.lr=0.05")
    assert captured.err.startswith("dnr: 3 of 4 runs failed: finetune.lr=0.01,train.lr=1e30: the loss became ")
    assert captured.err.count("the loss became ") == 3
    assert captured.err.count("\n") == 1


def test_targets_missed_and_failures_decide_the_exit_code(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[list[str]] = []
    monkeypatch.setattr(sweep, "compare_runs", lambda folders: [path.name for path in folders])
    monkeypatch.setattr(sweep, "write_comparison", lambda folder, names: compared.append(names))

    def command(name: str, *reached: bool | None) -> tuple[int, str]:
        results = iter(reached)

        def fake(*_: Any, **__: Any) -> dict[str, Any]:
            found = next(results)
            if found is None:
                raise RunError("no power\nno light")
            return {"target": {"reached": found, "achieved": 0.6}}

        monkeypatch.setattr(sweep, "run_recipe", fake)
        monkeypatch.setattr(combinations, "_training", lambda recipe: None)
        arguments = ["--set", SHORT[0], "--vary", "seed=0,1,2", "--output", str(tmp_path / name)]
        return main(["sweep", str(tiny), *arguments]), capsys.readouterr().err

    assert command("fine", True, True, True) == (0, "")
    assert command("missed", True, False, False) == (
        3, f"dnr: 2 of 3 runs missed their target, see seed=1, seed=2 in {tmp_path / 'missed'}\n"
    )  # fmt: skip
    assert command("failed", None, True, True) == (1, "dnr: 1 of 3 runs failed: seed=0: no power; no light\n")
    code, message = command("both", None, True, False)
    assert code == 1 and message.startswith("dnr: 1 of 3 runs failed: seed=0: no power; no light; 1 of 3 runs missed")
    assert command("none", None, None, None)[0] == 1
    runs = ["seed=0", "seed=1", "seed=2"]
    assert compared == [runs, runs, runs[1:], runs[1:]]


def test_nothing_is_raised_where_all_is_well(tmp_path: Path) -> None:
    Outcome(tmp_path, {"a": {"target": {"reached": True}}}).raise_problems()


def test_a_sweep_without_options_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--vary: expected at least one option, found none"):
        run_sweep(tiny, [], [], tmp_path / "sweep")


def test_several_ranks_are_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="torchrun"):
        run_sweep(tiny, [], [FLOPS], tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
