"""Runs that are killed at any moment, also while a file is written, go on and end as if they had not been."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers.common import TINY
from helpers.whole_runs import assert_same, lasting

from dnr_plugin.cli.main import main
from dnr_plugin.files import locked

# Runs a command that sends itself a signal at some file that it writes: before it lies on the disk, or before it
# replaces the one that was there.
IN_WRITE = """
import os, sys
number, at = int(sys.argv[1]), int(sys.argv[2])
calls = 0
def counted(real):
    def call(*args):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), number)
        return real(*args)
    return call
os.fsync, os.replace = counted(os.fsync), counted(os.replace)
from dnr_plugin.cli.main import main
sys.exit(main(sys.argv[3:]))
"""
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 1}
DYNAMIC = {"mode": "dynamic", "dynamics": {"check_every": 0.5, "warmup_epochs": 0.5, "patience": 1}}


def recipe_of(kind: str, folder: Path) -> Path:
    recipe = {**TINY, "train": {**TINY["train"], "epochs": 3}}
    if kind == "dynamic":
        recipe["prune"] = {"target": TINY["prune"]["target"], "observe": TINY["prune"]["observe"], **DYNAMIC}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def command_of(kind: str, recipe: Path, output: Path) -> list[str]:
    if kind == "sweep":
        return ["sweep", str(recipe), "--vary", "prune.target.flops=0.5,0.7", "--output", str(output)]
    return ["run", str(recipe), "--output", str(output)]


def folders_of(kind: str, output: Path) -> list[Path]:
    return [output / "flops=0.5", output / "flops=0.7"] if kind == "sweep" else [output]


def killed(arguments: list[str], number: int, draw: random.Random, seconds: float) -> int:
    """Starts a command, and stops it at some moment or inside some write; returns its exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if draw.random() < 0.4:
        at = str(draw.randint(1, 40))
        done = subprocess.run(
            [sys.executable, "-c", IN_WRITE, str(number), at, *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )
        said, code = done.stderr, done.returncode
    else:
        process = subprocess.Popen(
            [sys.executable, "-m", "dnr_plugin", *arguments], env=environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        time.sleep(draw.uniform(0.3, seconds))
        process.send_signal(number)
        said, code = process.communicate()[1], process.returncode
    assert "Traceback" not in said, said
    return code


def check(kind: str, numbers: range, folder: Path) -> dict[int, int]:
    recipe = recipe_of(kind, folder)
    start = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "dnr_plugin", *command_of(kind, recipe, folder / "straight")], check=True,
        capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    seconds = time.monotonic() - start
    expected = [lasting(each) for each in folders_of(kind, folder / "straight")]
    codes = dict[int, int]()
    for number in numbers:
        draw, output = random.Random(f"{kind} {number}"), folder / str(number)
        sent = draw.choice(SIGNALS)
        code = killed(command_of(kind, recipe, output), sent, draw, seconds)
        codes[code] = codes.get(code, 0) + 1
        assert code in (0, CODES[sent], -int(sent)), (number, code)  # by the signal itself before Python has begun
        again = subprocess.run(
            [sys.executable, "-m", "dnr_plugin", *command_of(kind, recipe, output), "--resume"], capture_output=True,
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert again.returncode == 0, (number, again.stderr)
        for each, there in zip(folders_of(kind, output), expected, strict=True):
            assert_same(lasting(each), there, number)
            assert not [path.name for path in each.iterdir() if path.name.startswith((".", "checkpoint"))], number
    return codes


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("run", 20), ("dynamic", 15), ("sweep", 15)])
def test_fifty_kills(kind: str, count: int, tmp_path: Path) -> None:
    print(kind, check(kind, range(count), tmp_path))


def test_terminated_while_writing(tmp_path: Path) -> None:
    """The second file is that of the events; what is there is complete, and the next start goes on."""
    recipe = recipe_of("run", tmp_path)
    command = command_of("run", recipe, tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", IN_WRITE, str(int(signal.SIGTERM)), "5", *command], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        143,
        "dnr: terminated; add --resume to go on after the last finished epoch\n",
    )
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    assert main([*command, "--resume"]) == 0
    assert main(command_of("run", recipe, tmp_path / "straight")) == 0
    assert_same(lasting(tmp_path / "run"), lasting(tmp_path / "straight"), 0)


def test_a_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By another process: this one may go into its own folders, as a sweep into those of its runs."""
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time\nfrom pathlib import Path\nfrom dnr_plugin.files import locked\n"
         "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)", str(tmp_path / "run")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        for kind in ("run", "sweep"):
            assert main(command_of(kind, recipe_of(kind, tmp_path), tmp_path / "run")) == 2
            assert (
                capsys.readouterr().err
                == f"dnr: --output: {tmp_path / 'run'} is in use: another process is writing to it\n"
            )
        assert [*(tmp_path / "run").iterdir()] == []
    finally:
        holder.kill()
        holder.wait()
    with locked(tmp_path / "run"), locked(tmp_path / "run"):  # nothing is left of the one that was killed
        pass
