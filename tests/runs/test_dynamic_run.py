"""Runs that watch their neurons while they train: to the end, stopped and resumed, and in trouble."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.whole_runs import Killed, assert_same, events_of, lasting, stopping_after

from dnr_plugin.errors import InputError
from dnr_plugin.models.saved import load_pruned
from dnr_plugin.observation.observer import Observer
from dnr_plugin.recipe.load import load_recipe
from dnr_plugin.recipe.schema import Recipe
from dnr_plugin.runs.preview import plan_recipe
from dnr_plugin.runs.run import run_recipe, train_dense

# 6 steps an epoch, a check every third: candidates from the second check on, removal ends with epoch 3
DYNAMIC = [
    "train={epochs: 4, batch_size: 32, lr: 0.05, momentum: 0.9, pressure: {bn_l1: {strength: 0.01}}}",
    "finetune={epochs: 1, batch_size: 32, lr: 0.01}",
    "prune={mode: dynamic, target: {flops: 0.6}, observe: {samples: 64, min_samples: 64, share: 0.5}, "
    "dynamics: {check_every: 0.5, warmup_epochs: 1, patience: 1, until: 0.75}}",
]


def dynamic(tiny: Path, *overrides: str) -> Recipe:
    return load_recipe(tiny, [*DYNAMIC, *overrides])


def _sum(folder: Path, what: str, check: int | None = None) -> int:
    rows = [event for event in events_of(folder) if event["event"] == "check"]
    return sum(row[what] for row in rows if check is None or row["check"] == check)


@pytest.mark.parametrize(
    ("target", "scope"),
    [("flops: 0.6", "local"), ("params: 0.5", "global"), ("neuron_sparsity: 0.4", "isomorphic"),
     ("weight_sparsity: 0.6", "local")],
    ids=["flops", "params", "neurons", "weights"],
)  # fmt: skip
def test_a_dynamic_run_reaches_its_target_and_tells_what_happened(
    tiny: Path, tmp_path: Path, target: str, scope: str
) -> None:
    kind, value = target.split(": ")
    recipe = dynamic(tiny, f"prune.target={{{target}}}", f"prune.scope={scope}", "finetune.epochs=0")
    folder = tmp_path / "run"
    report = run_recipe(recipe, folder)
    assert report["mode"] == "dynamic"
    assert report["target"]["reached"]
    share = report["kept"].get(kind) or report["sparsity"][kind.partition("_")[0]]
    assert report["target"]["achieved"] == pytest.approx(share)
    assert abs(share - float(value)) < 0.05
    assert report["dense"]["accuracy"] is None
    assert report["pruned"]["accuracy"] == report["pruned"]["accuracy_before_finetune"]

    # the events add up to the report, and the checks to each other
    checks = max(event["check"] for event in events_of(folder) if event["event"] == "check")
    assert report["dynamics"]["checks"] == checks == 8
    for what in ("died", "reactivated", "restored", "removed"):
        assert report["dynamics"][what] == _sum(folder, what)
    assert _sum(folder, "removed") == round(report["sparsity"]["neuron"] * _sum(folder, "neurons", 1))
    assert all(_sum(folder, "removed", check) == 0 for check in (1, 2, 7, 8))  # warm-up and patience; until
    assert _sum(folder, "nominated", 1) == 0 < _sum(folder, "nominated", 2)
    candidates = neurons = 0
    for check in range(1, checks + 1):
        candidates += _sum(folder, "nominated", check) - _sum(folder, "restored", check)
        candidates -= _sum(folder, "removed", check)
        assert _sum(folder, "candidates", check) == candidates
        neurons = _sum(folder, "neurons", check)
    assert neurons == _sum(folder, "neurons", 1) - _sum(folder, "removed")

    # what waited was zero where it is used, so that its removal changes nothing
    assert 0 < report["exact_removal"]["neurons"] <= _sum(folder, "removed")
    assert report["exact_removal"]["max_abs_diff"] < 1e-4
    assert report["dynamics"]["wall_clock_ratio"] > 0
    assert load_pruned(folder)(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_a_watched_run_removes_nothing_and_counts(tiny: Path, tmp_path: Path) -> None:
    overrides = ["train.epochs=2", "finetune.epochs=0"]
    watch = "prune={mode: watch, observe: {samples: 64, min_samples: 64}, dynamics: {check_every: 0.5}}"
    recipe = load_recipe(tiny, [*overrides, watch])
    report = run_recipe(recipe, tmp_path / "run")
    assert report["kept"] == {"flops": 1.0, "params": 1.0}
    nothing = {"kind": None, "requested": None, "achieved": None, "reached": True, "predicted": None}
    assert report["target"] == nothing
    assert report["dynamics"]["checks"] == 4
    assert report["dynamics"]["removed"] == report["dynamics"]["restored"] == 0
    assert report["dead"]["of"] == _sum(tmp_path / "run", "neurons", 4)
    assert plan_recipe(recipe)[0] is None

    # every run watches; looking more often changes nothing of the training
    seldom = load_recipe(tiny, [*overrides, watch.replace("check_every: 0.5", "check_every: 2")])
    run_recipe(seldom, tmp_path / "seldom")
    found = [load_pruned(tmp_path / name).state_dict() for name in ("run", "seldom")]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_run_that_removes_after_training_watches_too(tiny: Path, tmp_path: Path) -> None:
    """Otherwise its pictures could not show which neurons died before."""
    report = run_recipe(load_recipe(tiny), tmp_path / "run")
    assert report["dynamics"]["checks"] == 2
    assert report["dynamics"]["removed"] == 0
    assert report["dynamics"]["wall_clock_ratio"] is None
    stages = [event["event"] for event in events_of(tmp_path / "run")]
    assert stages.index("removed") > max(k for k, stage in enumerate(stages) if stage == "check")


@pytest.mark.longest
@pytest.mark.parametrize("noise", ["all", "live"])
def test_a_dynamic_run_stopped_anywhere_and_resumed_is_the_same_run(tiny: Path, tmp_path: Path, noise: str) -> None:
    """While candidates wait, after the first removal, inside an observation, in the last epoch and in fine-tuning."""
    recipe = dynamic(
        tiny, f"train.pressure.noise={{std: 0.001, neurons: {noise}}}", "prune.dynamics.check_every=0.65",
        "prune.observe.samples=192",
    )  # fmt: skip
    run_recipe(recipe, tmp_path / "straight")
    removed = {event["epoch"] for event in events_of(tmp_path / "straight") if event.get("removed")}
    assert len(removed) >= 2
    for calls in (3, 10, 17, 24, 31):
        folder = tmp_path / f"stopped{calls}"
        with pytest.raises(Killed):
            run_recipe(recipe, folder, track=stopping_after(calls))
        run_recipe(recipe, folder, resume=True)
        assert_same(lasting(folder), lasting(tmp_path / "straight"), calls)


def test_what_a_dynamic_run_removes_cannot_be_changed_underway(tiny: Path, tmp_path: Path) -> None:
    """After training only it could: there, the removal has not begun."""
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        run_recipe(dynamic(tiny), folder, track=stopping_after(10))
    for changed, named in (
        ("prune.target={flops: 0.5}", "prune.target.flops: 0.6, 0.5"),
        ("prune={target: {flops: 0.6}}", 'prune.mode: "dynamic", "after_training"'),
        ("train.pressure.bn_l1.strength=0.02", "train.pressure.bn_l1.strength: 0.01, 0.02"),
    ):
        with pytest.raises(InputError, match=re.escape(named)):
            run_recipe(dynamic(tiny, changed), folder, resume=True)
    run_recipe(dynamic(tiny, "finetune.lr=0.02"), folder, resume=True)


def test_the_mode_of_a_run_cannot_be_changed_before_its_removal(tiny: Path, tmp_path: Path) -> None:
    """Trained and not yet pruned: the target may change, not what the training was."""
    recipe = load_recipe(tiny, ["finetune.epochs=0"])
    train_dense(recipe, tmp_path / "run")
    watch = load_recipe(tiny, ["finetune.epochs=0", "prune={mode: watch, observe: {samples: 128, min_samples: 64}}"])
    with pytest.raises(InputError, match=r'prune\.mode: "after_training", "watch"'):
        run_recipe(watch, tmp_path / "run", resume=True)
    changed = load_recipe(tiny, ["finetune.epochs=0", "prune.target={params: 0.5}"])
    assert run_recipe(changed, tmp_path / "run", resume=True)["target"]["kind"] == "params"


def test_a_run_that_never_sees_enough_says_so(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a layer is fed by a parameter: one sample a step, whatever the batch."""
    monkeypatch.setattr(Observer, "samples", property(lambda self: 1))
    report = run_recipe(dynamic(tiny, "finetune.epochs=0"), tmp_path / "run")
    assert report["dynamics"]["checks"] == report["dynamics"]["removed"] == 0
    assert report["dynamics"]["stopped"] == "no check saw min_samples images at every layer"
    assert report["target"]["reached"] is False


@pytest.mark.slow
def test_a_dynamic_run_killed_at_ten_random_moments_ends_the_same_ten_times(tiny: Path, tmp_path: Path) -> None:
    """SIGKILL, wherever it strikes: while importing, training, checking, removing or writing."""
    file = tmp_path / "dynamic.yaml"
    from dnr_plugin.recipe.load import write_recipe

    write_recipe(dynamic(tiny), file)
    command = [sys.executable, "-m", "dnr_plugin", "run", str(file), "--device", "cpu", "--output"]
    start = time.monotonic()
    subprocess.run([*command, str(tmp_path / "straight")], check=True, capture_output=True)
    whole = time.monotonic() - start
    draw = random.Random(0)
    struck = []
    for number in range(10):
        folder = tmp_path / f"killed{number}"
        process = subprocess.Popen([*command, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not folder.is_dir() and process.poll() is None:  # moments before it begins show nothing
            time.sleep(0.01)
        time.sleep(draw.random() * whole * 0.6)
        process.send_signal(signal.SIGKILL)
        struck.append(process.wait() == -signal.SIGKILL)
        resumed = subprocess.run([*command, str(folder), "--resume"], capture_output=True, text=True)
        assert resumed.returncode == 0, resumed.stderr
        assert_same(lasting(folder), lasting(tmp_path / "straight"), number)
    assert sum(struck) >= 5, struck


def test_when_everything_dies_removal_stops_and_the_model_stays_usable(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps so long that every ReLU of the last hidden layer ends below zero for all images."""
    from dnr_plugin.cli.main import main

    deadly = [
        "model={name: mlp, hidden: [16, 16]}",
        "train={epochs: 4, batch_size: 32, lr: 5.0, momentum: 0.0, clip_norm: 1.0, schedule: constant}",
    ]
    arguments = [part for override in (*DYNAMIC, *deadly) for part in ("--set", override)]
    assert main(["run", str(tiny), "--output", str(tmp_path / "run"), *arguments]) == 3
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["dynamics"]["stopped"] == "every neuron that the outputs depend on is dead"
    assert report["target"]["reached"] is False
    stopped = [event for event in events_of(tmp_path / "run") if event["event"] == "stopped"]
    assert len(stopped) == 1
    after = [e for e in events_of(tmp_path / "run") if e["event"] == "check" and e["epoch"] > stopped[0]["epoch"]]
    assert sum(event["removed"] for event in after) == 0
    assert all(row["channels_after"] >= 1 for row in report["layers"] if row["channels_before"])
    assert load_pruned(tmp_path / "run")(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    assert "every neuron that the outputs depend on is dead" in (tmp_path / "run" / "report.md").read_text()
    assert "removal stopped, since every neuron that the outputs depend on is dead" in capsys.readouterr().err


def test_a_loss_that_turns_nan_while_watching_names_the_step(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dnr_plugin.cli.main import main

    arguments = [part for override in (*DYNAMIC, "train.lr=1e20") for part in ("--set", override)]
    assert main(["run", str(tiny), "--output", str(tmp_path / "run"), *arguments]) == 1
    message = capsys.readouterr().err
    assert message.startswith("dnr: the loss became ")
    assert "epoch 1, step " in message
