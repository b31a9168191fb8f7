"""Every command and every snippet of README and docs runs as it stands there, small where it would take long.

Commands that share a process share what they read; the first two also run as a stranger would, in one clone, in order.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch_pruning
import torchvision
from helpers.common import ROOT

from dnr_plugin.cli.main import main
from dnr_plugin.network.cost import count_params
from dnr_plugin.recipe.load import load_recipe
from dnr_plugin.runs import int8_export

README = (ROOT / "README.md").read_text()
PAGES = README + "\n".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))


def _blocks(language: str, text: str) -> list[str]:
    """Code of one language, each block once."""
    return list(dict.fromkeys(re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)))


def _commands(text: str) -> list[str]:
    lines = [line for block in _blocks("bash", text) for line in block.replace("\\\n", " ").splitlines()]
    return list(dict.fromkeys(line for line in lines if line.strip() and not line.startswith("#")))


COMMANDS, SNIPPETS = _commands(PAGES), _blocks("python", PAGES)
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
    assert _commands(README)[0] == "pip install . && dnr run recipes/quickstart.yaml"
    assert _commands(README)[1] == 'pip install -e ".[test]" && pytest'


@pytest.mark.slow
def test_the_two_commands_run_in_one_clone_in_order(tmp_path: Path) -> None:
    """In a fresh environment, with what lies about in a folder that is worked in."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "clone" / name)
    if (shared := ROOT.parent / "shared").is_dir():
        (tmp_path / "shared").symlink_to(shared)
    for name in ("data/helpers.py", "build/lib/odd.py", "dist/x.py", "Untitled.ipynb", "scratch.py"):
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).write_text("import sys,os\nx= 1")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "DNR_", "PYTEST_"))}
    environment |= {
        "PATH": f"{tmp_path / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(tmp_path / "venv"),
    }
    for command in COMMANDS[:2]:
        start = time.perf_counter()
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=tmp_path / "clone", env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        print(f"{command}: {time.perf_counter() - start:.0f} s", *done.stdout.splitlines()[-1:])
    assert (tmp_path / "clone" / "runs" / "quickstart" / "report.html").is_file()


@pytest.mark.longest
def test_the_quickstart_keeps_its_promise(tmp_path: Path) -> None:
    """The first command after its `pip install`: half of the FLOPs, within a point of the dense accuracy."""
    run = ["run", "recipes/quickstart.yaml", "--output", str(tmp_path / "run"), "--device", "cpu"]
    done = subprocess.run([sys.executable, "-m", "dnr_plugin", *run], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar where there is no terminal
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["kept"]["flops"] <= 0.5
    assert report["pruned"]["accuracy"] >= report["dense"]["accuracy"] - 0.01
    assert report["dense"]["accuracy"] > 0.9


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the quickstart, run small."""
    folder = tmp_path_factory.mktemp("small") / "run"
    recipe = str(ROOT / "recipes" / "quickstart.yaml")
    assert main(["run", recipe, "--output", str(folder), *_small("recipes/quickstart.yaml")]) == 0
    return folder


@pytest.mark.usefixtures("read_once")
@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("dnr ")])
def test_a_command_runs(
    command: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command, comments=True)[1:]
    if "data.root=data" in arguments:
        arguments[arguments.index("data.root=data")] = f"data.root={request.getfixturevalue('cifar10')}"
    if "--output" in arguments or arguments[0] in ("run", "sweep"):  # nothing is written into the repository
        while "--output" in arguments:
            place = arguments.index("--output")
            del arguments[place : place + 2]
        arguments += ["--output", str(tmp_path / "result")]
    if arguments[0] in ("run", "sweep", "plan"):
        arguments += _small(arguments[1])
    if arguments[0] in ("report", "export", "compare"):
        if "onnx" in arguments:
            pytest.importorskip("onnxscript")
        monkeypatch.setattr(int8_export, "LIMIT", 1.0)  # a network that has hardly learnt is torn between classes
        run = request.getfixturevalue("small_run")
        for place, word in enumerate(arguments):
            if word.startswith(("runs/", "sweeps/")):
                arguments[place] = str(shutil.copytree(run, tmp_path / word))
    if arguments[:2] == ["bench", "overhead"]:
        arguments += ["--width", "8", "--batch", "4", "--rounds", "2", "--images", "32"]
        arguments += ["--side", "32"]
    if arguments[:2] == ["bench", "latency"]:
        arguments += ["--width", "4", "--side", "8", "--batch", "1", "--levels", "0.9", "--runtimes", "eager"]
    if arguments[:2] == ["bench", "criteria"]:
        arguments += [*_small(arguments[2]), "--seeds", "0", "--levels", "0.5", "--criteria", "redundancy,l1"]
    capsys.readouterr()
    code = main(arguments)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert captured.out


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.splitlines()[0])
def test_a_snippet_runs(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small network and random images standing in for the reader's own."""
    monkeypatch.chdir(tmp_path)
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
    before = count_params(model)
    names = {
        "__name__": "snippet",
        "torch": torch,
        "tp": torch_pruning,
        "model": model,
        "example_inputs": torch.randn(1, 3, 16, 16),
        "calibration": [(torch.randn(64, 3, 16, 16), torch.zeros(64).long()) for _ in range(24)],
        "optimizer": torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        "loader": [(torch.randn(8, 3, 16, 16), torch.randint(10, (8,))) for _ in range(60)],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(snippet, "README.md", "exec"), names)
    assert count_params(model) < before
    model(torch.randn(2, 3, 16, 16))


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in README
