"""The whole run: its folder, its report, its target, and that a killed run resumed is the run that was not killed."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.layer_times import network_seconds, stairs
from helpers.whole_runs import Killed, assert_same, events_of, lasting, stopping_after
from torch import Tensor, nn

from dnr_plugin import load_pruned
from dnr_plugin.errors import InputError, RunError
from dnr_plugin.models import build as models
from dnr_plugin.network.cost import flop_report
from dnr_plugin.network.runtimes import OnnxRuntime
from dnr_plugin.pruning import groups
from dnr_plugin.pruning import plan as planning
from dnr_plugin.pruning.latency import layer_shapes
from dnr_plugin.pruning.latency_table import LayerShape
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.recipe.load import load_recipe
from dnr_plugin.repair.network import repair_network
from dnr_plugin.reports.figures.run import RUN_CAPTIONS as CAPTIONS
from dnr_plugin.reports.run_report import facts
from dnr_plugin.reports.stored import stored_report
from dnr_plugin.runs import checks, removal_stage, run_folder
from dnr_plugin.runs.run import run_recipe

CONTRACT = {
    "": {"name", "seed", "recipe", "device", "versions", "seconds", "dense", "pruned", "sparsity", "kept", "target",
         "dead", "reactivated", "exact_removal", "repair", "layers", "skipped", "unsupported_ops"},
    "seconds": {"train", "prune", "finetune", "total"},
    "dense": {"params", "flops", "accuracy"},
    "pruned": {"params", "flops", "accuracy", "accuracy_before_finetune"},
    "sparsity": {"neuron", "weight"},
    "kept": {"params", "flops"},
    "target": {"kind", "requested", "achieved"},
    "dead": {"neurons", "of"},
    "exact_removal": {"neurons", "max_abs_diff"},
}  # fmt: skip
LAYER = {"name", "type", "channels_before", "channels_after", "params_before", "params_after", "flops_before",
         "flops_after"}  # fmt: skip


def test_a_run_leaves_what_the_contract_says(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    report = run_recipe(load_recipe(tiny), folder)
    assert json.loads((folder / "report.json").read_text()) == report
    assert {path.name for path in folder.iterdir()} == {
        "recipe.yaml", "report.json", "report.md", "report.html", "events.jsonl", "model.safetensors",
        "architecture.json", "plots",
    }  # fmt: skip
    for section, keys in CONTRACT.items():
        assert keys <= set(report[section] if section else report), section
    assert all(set(layer) == LAYER for layer in report["layers"])
    assert load_recipe(folder / "recipe.yaml") == load_recipe(tiny)

    # the figures, computed again from what was saved
    model = load_pruned(folder)
    counted = flop_report(model, torch.randn(1, 3, 16, 16))
    assert report["pruned"]["flops"] == counted.flops == sum(layer["flops_after"] for layer in report["layers"])
    assert report["pruned"]["params"] == counted.params == sum(layer["params_after"] for layer in report["layers"])
    assert report["dense"]["flops"] == sum(layer["flops_before"] for layer in report["layers"])
    assert report["kept"]["flops"] == counted.flops / report["dense"]["flops"]
    assert report["target"]["achieved"] == pytest.approx(report["kept"]["flops"])
    assert 0.47 < report["kept"]["flops"] <= 0.5
    roots = {"conv1", "layer1.0.conv1", "layer1.1.conv1"}
    assert roots & {event["layer"] for event in events_of(folder) if event["event"] == "removed"}
    assert report["skipped"] == [{"layer": "fc", "reason": "its outputs are the model's outputs"}]
    assert report["activation"] == {"name": "relu", "places": 17, "left": []}
    html = (folder / "report.html").read_text()
    assert {path.stem for path in (folder / "plots").iterdir()} == set(CAPTIONS)
    assert html.count("data:image/png;base64,") == len(CAPTIONS)
    assert "http" not in html.split("base64")[0]


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (["prune.target={params: 0.5}"], "params"),
        (["prune.target={neuron_sparsity: 0.3}", "prune.steps=3"], "neuron_sparsity"),
        (["prune.target={weight_sparsity: 0.6}", "prune.scope=global"], "weight_sparsity"),
        (["prune.target={flops: 0.5}", "prune.scope=isomorphic", "prune.round_to=2"], "flops"),
        (["prune.target={dead: true}", "prune.observe.threshold=0.5"], "dead"),
        (["prune.target={latency: 0.95}", "prune.max_pruning_ratio=0.95"], "latency"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_target_runs_to_the_end(tiny: Path, tmp_path: Path, overrides: list[str], kind: str) -> None:
    short = ["train.epochs=1", "finetune.epochs=0", "data.train_size=96", "model.width=6"]
    report = run_recipe(load_recipe(tiny, [*short, *overrides]), tmp_path / "run")
    target = report["target"]
    assert target["kind"] == kind
    if kind in ("params", "flops"):
        assert target["achieved"] == pytest.approx(report["kept"][kind])
        assert target["achieved"] <= target["requested"]
    elif kind != "latency":
        share = report["sparsity"]["weight" if kind == "weight_sparsity" else "neuron"]
        assert target["achieved"] == pytest.approx(share)
    if kind == "latency":
        assert target["reached"] == (target["achieved"] <= 0.95)
        assert report["latency"]["batch"] == 8
        assert report["latency"]["ratio"] == report["latency"]["pruned_ms"] / report["latency"]["dense_ms"]
    if kind == "dead":
        assert target["requested"] is True
    elif kind != "latency":
        assert target["reached"]
    assert report["pruned"]["accuracy"] == report["pruned"]["accuracy_before_finetune"]


@pytest.mark.longest
def test_a_run_stopped_anywhere_and_resumed_is_the_same_run(tiny: Path, tmp_path: Path) -> None:
    """In the first step, the second epoch, the dense evaluation, right after the removal, and while fine-tuning."""
    recipe = load_recipe(tiny)
    run_recipe(recipe, tmp_path / "straight")
    expected = lasting(tmp_path / "straight")
    for calls in (0, 8, 14, 17, 21):
        folder = tmp_path / f"stopped{calls}"
        with pytest.raises(Killed):
            run_recipe(recipe, folder, track=stopping_after(calls))
        run_recipe(recipe, folder, resume=True)
        assert_same(lasting(folder), expected, calls)


def test_the_model_is_built_once_and_little_is_traced_before_the_first_epoch(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, surveyed = [], []
    build, survey = checks.build_model, groups.Survey.__init__
    monkeypatch.setattr(checks, "build_model", lambda *args: built.append(args) or build(*args))
    monkeypatch.setattr(models, "rebuild", lambda *args: built.append(args))
    monkeypatch.setattr(groups.Survey, "__init__", lambda self, *args: surveyed.append(args) or survey(self, *args))
    before: list[int] = []

    def track(items: Any, total: int, what: str) -> Any:
        before.append(len(surveyed))
        return items

    run_recipe(load_recipe(tiny, ["train.epochs=1", "finetune.epochs=0"]), tmp_path / "run", track=track)
    assert len(built) == 1
    assert before[0] == 2  # when the recipe is checked, and when watching begins


def test_repair_in_two_steps_knows_neurons_by_their_first_numbers(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step hands on all that is gone so far as numbered in the dense network, whose BatchNorm weights tell."""
    seen: list[dict[str, list[int]]] = []

    def checked(model: Any, dense: Any, example: Any, removals: Any, images: Any, **options: Any) -> Any:
        trial = copy.deepcopy(dense)
        prune_neurons(trial, example, removals)
        weights = {name: p for name, p in trial.named_parameters() if "bn" in name or "downsample.1" in name}
        assert all(torch.equal(model.get_parameter(name), p) for name, p in weights.items())
        assert len({float(v) for v in dense.bn1.weight}) == len(dense.bn1.weight)
        seen.append(copy.deepcopy(removals))
        # of a copy, since repair changes the weights that tell
        return repair_network(copy.deepcopy(model), dense, example, removals, images, **options)

    monkeypatch.setattr(removal_stage, "repair_network", checked)
    short = ["train.epochs=1", "finetune.epochs=0", "data.train_size=96", "model.width=6", "prune.recalibrate=null"]
    steps = ["prune.target={neuron_sparsity: 0.4}", "prune.steps=2", "prune.scope=global"]
    report = run_recipe(load_recipe(tiny, [*short, *steps]), tmp_path / "run")
    first, second = seen
    assert all(set(gone) <= set(second[name]) for name, gone in first.items())
    removed = dict.fromkeys(second, 0)
    for event in events_of(tmp_path / "run"):
        if event["event"] == "removed":
            removed[event["layer"]] += event["removed"]
    assert {name: len(gone) for name, gone in second.items()} == removed
    assert sum(removed.values()) > sum(map(len, first.values())) > 0

    repair = report["repair"]
    assert repair.keys() == {"layers", "error_before", "error_after", "left", "narrow"}
    assert repair["layers"] > 10
    assert repair["error_after"] < repair["error_before"]
    assert repair["left"] == []
    assert repair["narrow"] is False  # so small a network
    (line,) = [line for line in facts(report) if line.startswith("Repair fitted")]
    assert f"{repair['layers']} layers to the dense network's" in line
    named = facts({**report, "repair": {**repair, "left": [["up", "ConvTranspose2d is not repaired"]]}})
    assert "Repair left up as it was: ConvTranspose2d is not repaired." in named
    assert not any("Repair" in line for line in facts({**report, "repair": None}))


def test_pairs_of_layers_come_closer(tiny: Path, tmp_path: Path) -> None:
    short = ["train.epochs=1", "finetune.epochs=0", "data.train_size=96", "model.width=6", "prune.recalibrate=null"]
    errors = {
        pairs: run_recipe(load_recipe(tiny, [*short, f"prune.repair_pairs={pairs}"]), tmp_path / pairs)["repair"]
        for pairs in ("false", "true")
    }
    assert errors["true"]["error_after"] < errors["false"]["error_after"]
    assert errors["true"]["layers"] > 10


PRESSURE = """{epochs: 2, batch_size: 32, lr: 0.05, clip_norm: 1.0, pressure: {weight_decay_schedule: linear,
    bn_l1: {strength: 0.01}, noise: {std: 0.001, schedule: cosine, when: %s}}}"""


@pytest.mark.longest
def test_a_run_under_pressure_stopped_and_resumed_is_the_same_run(tiny: Path, tmp_path: Path) -> None:
    """In the second epoch of training and of fine-tuning; noise on either side of clipping."""
    pressure = [f"train={PRESSURE % 'before_clipping'}", f"finetune={PRESSURE % 'after_clipping'}"]
    recipe = load_recipe(tiny, pressure)
    run_recipe(recipe, tmp_path / "straight")
    expected = lasting(tmp_path / "straight")
    for stage, calls in (("train", 8), ("finetune", 28)):
        folder = tmp_path / f"stopped{calls}"
        with pytest.raises(Killed, match=f"{stage} epoch 2/2"):
            run_recipe(recipe, folder, track=stopping_after(calls))
        run_recipe(recipe, folder, resume=True)
        assert_same(lasting(folder), expected, calls)


@pytest.mark.longest
def test_a_run_killed_for_real_loses_nothing(tiny: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of fine-tuning, then --resume from the command line."""
    common = [sys.executable, "-m", "dnr_plugin", "run", str(tiny), "--device", "cpu", "--output"]
    subprocess.run([*common, str(tmp_path / "straight")], check=True, capture_output=True)
    folder = tmp_path / "killed"
    process = subprocess.Popen([*common, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    events = folder / "events.jsonl"
    end = time.time() + 120
    while not (events.is_file() and '"finetune"' in events.read_text()) and process.poll() is None:
        assert time.time() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run([*common, str(folder), "--resume"], check=True, capture_output=True)
    straight, resumed = lasting(tmp_path / "straight"), lasting(folder)
    assert resumed[:2] == straight[:2]
    assert all(torch.equal(resumed[2][name], straight[2][name]) for name in straight[2])


def test_a_finished_run_is_only_read_again(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny, ["train.epochs=0", "finetune.epochs=0"])
    report = run_recipe(recipe, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert run_recipe(recipe, tmp_path / "run", resume=True) == report
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_folders_that_are_not_this_runs_are_refused(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(tiny, ["train.epochs=0", "finetune.epochs=0"])
    folder = tmp_path / "run"
    run_recipe(recipe, folder)
    with pytest.raises(InputError, match="holds a run of this recipe already: add --resume"):
        run_recipe(recipe, folder)
    other = load_recipe(tiny, ["train.epochs=0", "finetune.epochs=0", "seed=1", "model.width=4"])
    with pytest.raises(InputError, match=r"another recipe \(there, here\): .*seed: 0, 1; model.width: 8, 4"):
        run_recipe(other, folder, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="with other files in it"):
        run_recipe(recipe, tmp_path / "mine")
    with pytest.raises(InputError, match="expected a folder, found the file"):
        run_recipe(recipe, tiny)


def test_several_ranks_are_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"torchrun: expected one process, .* found 2"):
        run_recipe(load_recipe(tiny), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Access rights do not bind root, so the answer of the system is replaced."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="expected a folder that can be written to"):
        run_recipe(load_recipe(tiny), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_full_is_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20})())
    with pytest.raises(InputError, match=r"expected \d+ MiB free for .*, found 1 MiB"):
        run_recipe(load_recipe(tiny), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.longest
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_loses_nothing(tiny: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk; lifted, the run goes on."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "dnr_plugin", "run", str(tiny), "--output", str(folder)]
    size = 100 * 1024

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    failed = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert "File too large" in failed.stderr
    assert "--resume" in failed.stderr
    assert not list(folder.glob(".checkpoint*"))
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr


def test_a_target_missed_is_saved_and_told(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only shows at the step itself: here every layer but one turns out to have no observed consumer."""
    from dnr_plugin.cli.main import main
    from dnr_plugin.network.dependencies import Unscored
    from dnr_plugin.scoring.importance import DyingNeuronImportance

    whole = DyingNeuronImportance._look_up

    def partly(self: Any, group: Any) -> Any:
        if self._root(group) != "layer4.1.conv1":
            raise Unscored("not observed")
        return whole(self, group)

    monkeypatch.setattr(DyingNeuronImportance, "_look_up", partly)
    code = main(
        ["run", str(tiny), "--output", str(tmp_path / "run"), "--set", "train.epochs=0", "--set", "finetune.epochs=0"]
    )
    assert code == 3
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["target"]["reached"] is False
    assert 0.8 < report["target"]["achieved"] == pytest.approx(report["kept"]["flops"])
    message = capsys.readouterr().err
    assert message.startswith("dnr: flops: 0.5 was asked, 0.")
    assert load_pruned(tmp_path / "run")(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_a_loss_that_turns_nan_stops_the_run_and_keeps_the_last_checkpoint(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dnr_plugin.cli.main import main

    command = [
        "run",
        str(tiny),
        "--output",
        str(tmp_path / "run"),
        "--set",
        "finetune.lr=1000",
        "--set",
        "finetune.weight_decay=1000",
    ]
    assert main([*command, "--set", "finetune.schedule=constant"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("dnr: the loss became ")
    assert "epoch 1, step " in message
    assert (tmp_path / "run" / "checkpoint.pt").is_file()

    # what the run has not come to may be mended, what it has may not
    assert main([*command, "--resume", "--set", "seed=3"]) == 2
    assert "holds a run of another recipe" in capsys.readouterr().err
    assert main([*command, "--resume", "--set", "prune.target.flops=0.4"]) == 2
    assert main([*command, "--resume", "--set", "finetune.lr=0.01", "--set", "finetune.weight_decay=0.0"]) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["recipe"]["finetune"]["lr"] == 0.01


def test_a_disk_that_fills_while_resuming_keeps_the_recipe(tiny: Path, tmp_path: Path) -> None:
    """The folder of a stopped run is whole whatever happens to the next attempt."""
    recipe = load_recipe(tiny)
    with pytest.raises(Killed):
        run_recipe(recipe, tmp_path / "run", track=stopping_after(8))
    before = (tmp_path / "run" / "recipe.yaml").read_text()
    (tmp_path / "run" / "events.jsonl").unlink()
    with pytest.raises(Killed):
        run_recipe(recipe, tmp_path / "run", resume=True, track=stopping_after(0))
    assert (tmp_path / "run" / "recipe.yaml").read_text() == before
    assert [event["epoch"] for event in events_of(tmp_path / "run") if event["event"] == "epoch"] == [1]


def test_an_image_that_cannot_be_read_underway_is_a_failure_not_bad_input(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2 promises that nothing was written."""
    from dnr_plugin.cli.main import main
    from dnr_plugin.training.trainer import Trainer

    def unreadable(*_: Any) -> None:
        raise InputError("data.root: expected an image, found rubbish")

    monkeypatch.setattr(Trainer, "epoch", unreadable)
    assert main(["run", str(tiny), "--output", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "dnr: data.root: expected an image, found rubbish\n"


@pytest.mark.slow
def test_cifar10_from_the_recipe_reaches_half_the_flops(cifar10: Path, tmp_path: Path) -> None:
    """The shipped recipe, small: learns something and loses little by the removal."""
    from dnr_plugin.recipe.load import shipped_recipes

    small = ["model.width=8", "data.train_size=5000", "data.test_size=1000", "train.epochs=4", "finetune.epochs=3"]
    overrides = [f"data.root={cifar10}", "train.amp=false", "finetune.amp=false", *small]
    report = run_recipe(load_recipe(shipped_recipes()["cifar10/resnet18-flops50"], overrides), tmp_path / "run")
    assert report["kept"]["flops"] <= 0.5
    assert report["dense"]["accuracy"] > 0.35
    assert report["pruned"]["accuracy"] > report["dense"]["accuracy"] - 0.05


@pytest.mark.gpu
def test_a_run_on_cuda(tiny: Path, tmp_path: Path) -> None:
    report = run_recipe(load_recipe(tiny, ["train.amp=true"]), tmp_path / "run", device="cuda")
    assert report["kept"]["flops"] <= 0.5
    assert load_pruned(tmp_path / "run")(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_latency_is_planned_from_a_table_and_told(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two steps that keep the multiple which the first one measured; times are made up."""
    clock = stairs(4)

    first = list[LayerShape]()  # of a layer in the dense network

    def latencies(models: list[nn.Module], inputs: Tensor) -> list[float]:
        first.extend(layer_shapes(models[0], inputs)["layer4.0.conv1"])
        return [network_seconds(model, inputs, clock) for model in models]

    monkeypatch.setattr(planning, "latencies", latencies)
    short = ["train.epochs=1", "finetune.epochs=0", "data.train_size=96", "model.width=8", "prune.steps=2"]
    timed = ["prune.target={latency: 0.7}", "prune.scope=latency_aware", "prune.round_to=auto"]
    report = run_recipe(load_recipe(tiny, [*short, *timed]), tmp_path / "run")
    target = report["target"]
    assert target["reached"]
    assert 0.0 < target["achieved"] <= 0.7
    assert target["predicted"] == pytest.approx(target["achieved"], abs=0.05)
    assert report["round_to"] == 4
    assert all(row["channels_after"] % 4 == 0 for row in report["layers"] if row["type"] == "Conv2d")
    assert [row["batch"] for row in report["latencies"]] == [1, 8, 32]
    assert report["latency"] == report["latencies"][1]
    conv = next(time for time in report["layer_times"] if time["name"] == "layer4.0.conv1")
    assert conv["after"] < conv["before"]
    row = next(row for row in report["layers"] if row["name"] == "layer4.0.conv1")
    assert conv["kept"][1] == pytest.approx(row["channels_after"])
    assert conv["before"] == pytest.approx(clock(first[0]))  # of the dense network, not of the one after the first step
    assert "was predicted from times of layers" in (tmp_path / "run" / "report.md").read_text()
    assert stored_report(tmp_path / "run" / "report.json") == report


def test_latency_is_reported_by_runtime(tiny: Path, tmp_path: Path) -> None:
    """In batches of one and of many beside eager mode; where a network cannot be run, the report says why."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    short = ["train.epochs=1", "finetune.epochs=0", "data.train_size=96", "model={name: mlp, hidden: [16]}"]
    recipe = load_recipe(tiny, [*short, "report.runtimes=[onnxruntime]"])
    report = run_recipe(recipe, tmp_path / "run")
    measured = [(row["runtime"], row["batch"]) for row in report["latencies"]]
    assert measured == [("eager", 1), ("eager", 8), ("eager", 32), ("onnxruntime", 1), ("onnxruntime", 32)]
    assert all(row["dense_ms"] > 0 and row["pruned_ms"] > 0 and row["spread"] >= 0 for row in report["latencies"])
    assert (report["latency"], report["unmeasured"]) == (report["latencies"][1], {})
    assert "| latency, batch 32, onnxruntime |" in (tmp_path / "run" / "report.md").read_text()
    assert stored_report(tmp_path / "run" / "report.json") == report


def test_a_target_is_met_in_its_runtime(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is tried in it before training, planned with times of layers in it, and reported in it; where it can
    no longer be run at the end, the report says so."""
    prepared, clock = list[nn.Module](), stairs(4)

    def prepare(self: OnnxRuntime, model: nn.Module, inputs: Tensor) -> nn.Module:
        prepared.append(model)
        if len(inputs) == removal_stage.MANY:
            raise RunError("ONNX cannot express this model: it is too large")
        return model

    def latencies(models: list[nn.Module], inputs: Tensor) -> list[float]:
        assert len(inputs) == removal_stage.TIMED
        return [network_seconds(model, inputs, clock) for model in models]

    monkeypatch.setattr(OnnxRuntime, "prepared", prepare)
    monkeypatch.setattr(OnnxRuntime, "problem", lambda self: None)
    monkeypatch.setattr(OnnxRuntime, "version", "onnxruntime 1.0")
    monkeypatch.setattr(planning, "latencies", latencies)
    short = ["train.epochs=1", "finetune.epochs=0", "data.train_size=96", "model.width=8"]
    timed = ["prune.target={latency: 0.7}", "prune.scope=latency_aware", "prune.runtime=onnxruntime"]
    report = run_recipe(load_recipe(tiny, [*short, *timed]), tmp_path / "run")
    assert prepared[0] is not prepared[1]  # the one that is tried, and the dense one of the plan
    assert report["target"]["reached"]
    assert report["target"]["achieved"] <= 0.7
    measured = [(row["runtime"], row["batch"]) for row in report["latencies"]]
    assert measured == [*(("eager", batch) for batch in (1, 8, 32)), ("onnxruntime", 1), ("onnxruntime", 8)]
    told = facts(report)
    assert told[0].startswith("Target latency in onnxruntime: 0.7 requested, ")
    assert "Latency in onnxruntime was not measured: ONNX cannot express this model: it is too large." in told
    assert stored_report(tmp_path / "run" / "report.json") == report


def test_a_network_that_its_runtime_cannot_run_is_refused_before_training(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(self: OnnxRuntime, model: nn.Module, inputs: Tensor) -> nn.Module:
        raise RunError("ONNX cannot express this model: sorry")

    monkeypatch.setattr(OnnxRuntime, "prepared", prepare)
    monkeypatch.setattr(OnnxRuntime, "problem", lambda self: None)
    recipe = load_recipe(tiny, ["prune.target={latency: 0.7}", "prune.runtime=onnxruntime"])
    with pytest.raises(
        InputError, match=r"^prune\.runtime: expected one that can run the network, found onnxruntime: ONNX cannot"
    ):
        run_recipe(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_reported_may_change_until_the_end(tiny: Path, tmp_path: Path) -> None:
    """An interrupted run takes other runtimes to report, a finished one does not."""
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        run_recipe(load_recipe(tiny), folder, track=stopping_after(12))
    other = load_recipe(tiny, ["report.runtimes=[compiled]"])
    assert run_folder.check_folder(folder, other, resume=True) is None
    report = run_recipe(load_recipe(tiny), folder, resume=True)
    assert [row["runtime"] for row in report["latencies"]] == ["eager"] * 3
    with pytest.raises(InputError, match=r"report\.runtimes: \[\], \[\"compiled\"\]"):
        run_recipe(other, folder, resume=True)
