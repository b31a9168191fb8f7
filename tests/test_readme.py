"""Every command and every snippet of the README runs as it stands there, small where it would take long."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from dnr_plugin.recipe import load_recipe

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
# What makes a long command short; later overrides win. Folders are replaced by the test's own.
SMALL = [
    "model.width=4",
    "data.train_size=300",
    "data.test_size=100",
    "train.epochs=1",
    "train.batch_size=50",
    "train.warmup_epochs=0",
    "prune.observe.samples=100",
    "prune.observe.min_samples=50",
]
SMALL_BY_MODE = {
    "after_training": ["finetune.epochs=1", "finetune.batch_size=50", "prune.recalibrate=100"],
    "dynamic": ["prune.dynamics={patience: 0, warmup_epochs: 0, check_every: 0.5}"],
    "watch": [],
}


def _small(recipe: str) -> list[str]:
    mode = load_recipe(ROOT / recipe).prune.mode
    return [part for override in SMALL + SMALL_BY_MODE[mode] for part in ("--set", override)]


def test_the_readme_starts_with_the_two_commands() -> None:
    assert COMMANDS[0] == "pip install . && dnr run recipes/quickstart.yaml"
    assert COMMANDS[1] == 'pip install -e ".[test]" && pytest'


def test_the_quickstart_keeps_its_promise(tmp_path: Path) -> None:
    """The first command after its `pip install`: half of the FLOPs, within a point of the dense accuracy."""
    done = _dnr(["run", "recipes/quickstart.yaml", "--output", str(tmp_path / "run"), "--device", "cpu"])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar where there is no terminal
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["kept"]["flops"] <= 0.5
    assert report["pruned"]["accuracy"] >= report["dense"]["accuracy"] - 0.01
    assert report["dense"]["accuracy"] > 0.9


def _dnr(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dnr_plugin", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("dnr ")])
def test_a_command_of_the_readme_runs(command: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    arguments = shlex.split(command, comments=True)[1:]
    if "data.root=data" in arguments:
        arguments[arguments.index("data.root=data")] = f"data.root={request.getfixturevalue('cifar10')}"
    if arguments[0] in ("run", "sweep", "export") or arguments[:2] == ["bench", "criteria"]:
        while "--output" in arguments:
            place = arguments.index("--output")
            del arguments[place : place + 2]
        arguments += ["--output", str(tmp_path / "result")]
    if arguments[0] in ("run", "sweep", "plan"):
        arguments += _small(arguments[1])
    if arguments[0] in ("report", "export", "compare"):
        if "onnx" in arguments:
            pytest.importorskip("onnxscript")
        made = _dnr(
            ["run", "recipes/quickstart.yaml", "--output", str(tmp_path / "run"), *_small("recipes/quickstart.yaml")]
        )
        assert made.returncode == 0, made.stderr
        runs = [place for place, word in enumerate(arguments) if word.startswith(("runs/", "sweeps/"))]
        for place in runs:
            arguments[place] = str(shutil.copytree(tmp_path / "run", tmp_path / arguments[place]))
    if arguments[:2] == ["bench", "overhead"]:
        arguments += ["--width", "8", "--batch", "4", "--rounds", "2", "--images", "32"]
        arguments += ["--side", "32"]
    if arguments[:2] == ["bench", "criteria"]:
        arguments += [*_small(arguments[2]), "--seeds", "0", "--levels", "0.5", "--criteria", "redundancy,l1"]
    done = _dnr(arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.splitlines()[0])
def test_a_snippet_of_the_readme_runs(snippet: str, tmp_path: Path) -> None:
    """With a small network and random images standing in for the reader's own."""
    prelude = (
        "import torch, torch_pruning as tp, torchvision\n"
        "torch.manual_seed(0)\n"
        "torch.set_num_threads(2)\n"
        "model = torchvision.models.resnet18(num_classes=10)\n"
        "example_inputs = torch.randn(1, 3, 32, 32)\n"
        "calibration = [(torch.randn(64, 3, 32, 32), torch.zeros(64).long()) for _ in range(24)]\n"
        "optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)\n"
        "loader = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(60)]\n"
    )
    check = "\nassert sum(p.numel() for p in model.parameters()) < 11181642\nmodel(torch.randn(2, 3, 32, 32))\n"
    file = tmp_path / "snippet.py"
    file.write_text(prelude + snippet + check)
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, str(file)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in README


def test_the_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
