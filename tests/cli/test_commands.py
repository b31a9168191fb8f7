"""The command line: each command works, and each bad input gets its line, exit code 2 and nothing written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers.commands import refused
from helpers.common import ROOT, TINY

from dnr_plugin.cli.main import main
from dnr_plugin.models.build import build_model
from dnr_plugin.models.saved import save_pruned
from dnr_plugin.pruning import plan as planning
from dnr_plugin.recipe.load import shipped_recipes
from dnr_plugin.recipe.sections import ModelOptions
from dnr_plugin.scoring.scores import SCORES


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.name=resnet19", "--set model.name=resnet19: model.name: expected one of resnet18, "),
        ("data.name=cifar11", "data.name: expected one of shapes, cifar10, "),
        ("prune.score=contributoin", "prune.score: expected one of redundancy, contribution, "),
        ("prune.target.params=0.5", "expected exactly one of flops, params, latency, "),
        ("prune.target={flops: 0.001}", "prune.target.flops: expected at least 0."),
        ("prune.ignored=['layer*', conv1, bn1]", "expected at least one layer whose channels may be removed"),
        ("prune.ignored=[layer5.*]", "prune.ignored: expected the name of a layer or a pattern that fits one"),
        ("train.epochz=3", "train.epochz: "),
        ("train.lr=fast", "train.lr: expected a number above 0, found 'fast'"),
        ("train.lr=.nan", "train.lr: expected a finite number, found .nan"),
        ("data={name: cifar10, root: nowhere}", "data.root: expected the folder that holds cifar-10-batches-py"),
        (
            "model.stem=imagenet2",
            "model.stem: expected one of cifar, imagenet, found 'imagenet2'; did you mean 'imagenet'?",
        ),
        ("nothing.here=1", "nothing: "),
        ("prune.ignored=[conv1, layer1, layer2, layer3]", "prune.target.flops: expected at least 0."),
        ("train={epochs: 1, optimizer: adam, momentum: 0.5}", "train.momentum: expected nothing for adam, found 0.5"),
        (
            "prune={target: {flops: 0.5}, steps: 2, recalibrate: 0, repair: false}",
            "prune.recalibrate: expected above 0, or repair, with several",
        ),
        ("prune={target: {dead: true}, steps: 2}", "prune.steps: expected 1 with target dead"),
        ("model={name: torch.nn:Identity}", "model: expected scores of shape [N, 10], found [1, 3, 16, 16]"),
        ("model={name: 'torch.nn:Nowhere'}", "model.name: expected a function 'Nowhere' in torch.nn"),
    ],
)
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_bad_option_gets_its_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str,
    override: str, expected: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, command, str(tiny), "--set", override)
    assert expected in message
    assert f"--set {override}: " in message or f"{tiny}:" in message or message.startswith("dnr: model: ")
    assert not (tmp_path / "runs").exists()


def test_all_problems_come_at_once_with_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.yaml"
    recipe = yaml.safe_load(yaml.safe_dump(TINY))
    recipe["data"] = {"name": "cifar10", "root": str(tmp_path / "absent")}
    recipe["prune"]["score"] = "firing_rat"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    lines = refused(capsys, "check", str(file)).splitlines()
    text = file.read_text().splitlines()
    where = {
        key: 1 + next(n for n, line in enumerate(text) if line.strip().startswith(key)) for key in ("root", "score")
    }
    assert lines[0].startswith(
        f"dnr: {file}:{where['root']}: data.root: expected the folder that holds cifar-10-batches-py"
    )
    assert lines[1].startswith(f"dnr: {file}:{where['score']}: prune.score: expected one of ")
    assert lines[1].endswith("found 'firing_rat'; did you mean 'firing_rate'?")


def test_batches_larger_than_the_data(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = ["--set", "train.batch_size=193", "--set", "prune.observe={samples: 300, min_samples: 193}"]
    for command in (["run", "--output", str(tmp_path / "run")], ["check"]):
        message = refused(capsys, *command, str(tiny), *bad)
        assert "train.batch_size: expected at most 192, the number of training images, found 193" in message
        assert "prune.observe.min_samples: expected at most 192" in message
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_architecture(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = build_model(ModelOptions(name="resnet20", width=8), 10)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    message = refused(capsys, "check", str(tiny), "--set", f"model.checkpoint={tmp_path / 'other.pt'}")
    assert "keys of the model are missing" in message
    assert "unexpected" in message


def test_models_that_return_no_tensor_or_cannot_be_pruned(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd.py").write_text(
        "from torch import nn\n"
        "class Dict(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(768, 10)\n"
        "    def forward(self, x):\n"
        "        return {'logits': self.fc(x.flatten(1))}\n"
        "def flat(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 10))\n"
        "def wrong(): return nn.Linear(5, 10)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert "it returns dict" in refused(capsys, "check", str(tiny), "--set", "model={name: 'odd:Dict'}")
    message = refused(capsys, "check", str(tiny), "--set", "model={name: 'odd:flat'}")
    assert "expected at least one layer whose channels may be removed" in message
    message = refused(capsys, "check", str(tiny), "--set", "model={name: 'odd:wrong'}")
    assert "expected a network that takes images of 1x3x16x16" in message


@pytest.mark.parametrize("name", [None, *shipped_recipes()])
def test_recipes_are_listed_and_printed(name: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", name] if name else ["recipes"]) == 0
    out = capsys.readouterr().out
    if name is None:
        assert all(known in out for known in shipped_recipes())
    else:
        assert out == shipped_recipes()[name].read_text()


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "options"]) == 0
    out = capsys.readouterr().out
    assert all(score in out for score in SCORES)
    for option in ("model.stem", "data.augment", "train.clip_norm", "prune.target.latency", "prune.observe.bins"):
        assert f"`{option}` [" in out
    assert "did you mean 'quickstart'?" in refused(capsys, "recipes", "quickstrat")


def test_plan_shows_layers_and_writes_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["plan", str(tiny), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "layer1.0.conv1" in out
    assert "8 → " in out
    assert "Target flops: 0.5 requested, 0.4" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_reports_of_runs_and_of_models(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "run")
    short = ["--set", "train.epochs=0", "--set", "finetune.epochs=0"]
    assert main(["run", str(tiny), "--output", folder, *short]) == 0
    assert "pruned / dense" in capsys.readouterr().out
    assert main(["report", folder, "--format", "json"]) == 0
    of_run = json.loads(capsys.readouterr().out)
    for path in ("report.json", "report.md"):
        (tmp_path / "run" / path).unlink()
    assert main(["report", folder, "--format", "json"]) == 0
    of_model = json.loads(capsys.readouterr().out)
    assert of_model["layers"] == of_run["layers"]
    assert main(["report", folder, "--format", "markdown"]) == 0
    assert "| layer1.0.conv1 | Conv2d | 8 → " in capsys.readouterr().out
    assert main(["report", folder]) == 0
    assert "layer1.0.conv1" in capsys.readouterr().out
    assert "expected CxHxW" in refused(capsys, "report", folder, "--input", "3x32")
    assert "found no architecture.json" in refused(capsys, "report", str(tmp_path))
    (tmp_path / "run" / "report.json").write_text("{}")
    assert "expected the report of a run, found damage" in refused(capsys, "report", folder)


def test_the_report_of_an_imported_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pruned(build_model(ModelOptions(name="torchvision.squeezenet1_1"), 10), tmp_path)
    assert main(["report", str(tmp_path), "--input", "3x64x64"]) == 0
    assert "100.00 % of the FLOPs" in capsys.readouterr().out


def test_help_names_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    commands = ("run", "sweep", "check", "plan", "report", "export", "compare", "recipes", "bench")
    assert all(word in out for word in (*commands, "Exit codes: 0 done; 2"))
    with pytest.raises(SystemExit) as left:
        main(["run"])
    assert left.value.code == 2


def test_a_pipe_that_closes_early_is_no_error() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    for command in ("recipes options", "plan recipes/quickstart.yaml --set data.train_size=1600 --device cpu"):
        line = f"{sys.executable} -m dnr_plugin {command} | true; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, env=environment)
        assert (done.returncode, done.stderr) == (0, ""), command


def test_whole_numbers_of_the_benchmark_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["bench", "overhead", "--rounds", "0"])
    assert left.value.code == 2
    assert "expected a whole number of at least 1, found '0'" in capsys.readouterr().err


def test_a_plan_that_misses_its_target_shows_the_closest(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latency is known only when it is measured: here removal makes nothing faster."""
    monkeypatch.setattr(planning, "latencies", lambda models, inputs: [1.0, 1.0])
    assert main(["plan", str(tiny), "--set", "prune.target={latency: 0.5}", "--device", "cpu"]) == 3
    captured = capsys.readouterr()
    assert "layer1.0.conv1" in captured.out
    assert captured.err == "dnr: latency: 0.5 was asked, 1.0000 is the closest that can be reached\n"


def test_a_plan_tells_what_was_predicted_and_measured(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "latencies", lambda models, inputs: [1.0, 0.89])
    options = ["prune.target={latency: 0.9}", "prune.scope=latency_aware"]
    assert (
        main(["plan", str(tiny), *(part for option in options for part in ("--set", option)), "--device", "cpu"]) == 0
    )
    out = capsys.readouterr().out
    assert "Target latency: 0.9 requested, 0.8900 achieved." in out
    assert "Layers keep multiples of 4 channels, as measured." in out
    assert "Times of layers predict 0." in out


def test_overhead_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The benchmark runs and counts; what it says of speed is no test's business."""
    small = ["--width", "8", "--batch", "4", "--rounds", "1", "--images", "8", "--side", "32", "--device", "cpu"]
    assert main(["bench", "overhead", "torchvision.mobilenet_v3_small", *small, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["setting"]["network"] == "torchvision.mobilenet_v3_small"
    costs = {cost["name"]: cost for cost in result["calibration"]}
    assert {f"scoring all groups: {name}" for name in SCORES} - {*costs} == {"scoring all groups: redundancy"}
    for row in ("forward passes", "scoring all groups: redundancy, the default", "repair_network"):
        assert costs[row]["ratio"] == pytest.approx(costs[row]["seconds"] / costs["forward passes"]["seconds"])
    assert all(cost["seconds"] > 0 for cost in (*result["calibration"], *result["training"]))
    assert result["training"][0]["ratio"] == 1.0
    assert all(figure > 0 for figure in result["products"])
    folder = tmp_path / "growth"
    assert main(["bench", "overhead", *small, "--output", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "8 images of 32x32" in shown
    assert "training steps of 4 images" in shown
    assert sorted(file.name for file in folder.iterdir()) == ["overhead.json", "overhead.md", "overhead.png"]
    assert main(["bench", "overhead", *small, "--output", str(folder)]) == 2
    assert "expected a folder without overhead.json" in capsys.readouterr().err


def test_overhead_of_an_unknown_network_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "overhead", "resnet19"]) == 2
    assert "resnet18" in capsys.readouterr().err


IN_A_FINALISER = """
import argparse, sys, time, weakref
from dnr_plugin.cli import main as module

class Kept:
    pass

def wait(*_):
    end = time.monotonic() + 0.15
    while time.monotonic() < end:
        pass

def run(arguments):
    print("begun", flush=True)
    while True:
        kept = Kept()
        reference = weakref.ref(kept, wait)
        del kept
        wait()

class Parser:
    def parse_args(self, argv):
        return argparse.Namespace(command=run)

module._parser = Parser
sys.exit(module.main([]))
"""


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 1, "interrupted")]
)
def test_signals_are_heeded_wherever_they_arrive(number: int, code: int, said: str) -> None:
    """Python forgets what is raised inside a finaliser, where this command is half of the time."""
    for wait in (0.05, 0.2):
        process = subprocess.Popen(
            [sys.executable, "-c", IN_A_FINALISER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        time.sleep(wait)
        process.send_signal(number)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert (process.returncode, err) == (code, f"dnr: {said}\n")
