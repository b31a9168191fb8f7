"""Damaged files of every kind that is read back: they are refused in one line, or read as what they are."""

from __future__ import annotations

import copy
import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.common import TINY
from helpers.whole_runs import Killed, assert_same, lasting, stopping_at

from dnr_plugin import load_pruned, load_recipe, run_recipe
from dnr_plugin.benchmarks.criteria.run import _earlier
from dnr_plugin.benchmarks.zoo.run import _rows_of, zoo_table
from dnr_plugin.cli.main import main
from dnr_plugin.errors import InputError
from dnr_plugin.recipe.schema import Recipe
from dnr_plugin.reports.comparison import compare_runs
from dnr_plugin.reports.run_report import facts, markdown, write_report
from dnr_plugin.reports.stored import stored_events, stored_report
from dnr_plugin.runs.run_folder import load_checkpoint_state
from dnr_plugin.runs.sweep import _earlier as earlier_sweep

NASTY: list[Any] = [
    None, True, False, 0, -1, 3, 10**30, -0.5, 1e308, float("nan"), float("inf"), "", "x", "../..", "/etc", "a" * 3000,
    [], [0], {}, {"a": []}, [[]] * 3, {"name": "os:system", "kwargs": {}},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, an interrupted one, a sweep of the first, and a benchmark with two cells."""
    root = tmp_path_factory.mktemp("whole")
    recipe = Recipe.model_validate(TINY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_recipe(recipe, root / "run")
        with pytest.raises(Killed):
            run_recipe(recipe, root / "killed", track=stopping_at("finetune"))
    assert (root / "killed" / "checkpoint.pt").is_file()
    listed = [{"folder": "run", "dense": None, "values": ["1"], "recipe": recipe.model_dump(mode="json")}]
    (root / "sweep.json").write_text(json.dumps({"runs": listed}))
    cell = {
        "seed": 0, "criterion": "l1", "scope": "local", "level": 0.5, "dense_accuracy": 0.9, "kept": 0.5,
        "accuracy": {"removed": 0.1, "recalibrated": 0.2, "repaired": 0.3}, "reason": None, "seconds": 1.0,
        "device": "x",
    }  # fmt: skip
    (root / "bench").mkdir()
    (root / "bench" / "cells.jsonl").write_text(json.dumps(cell) + "\n" + json.dumps({**cell, "seed": 1}) + "\n")
    row = {
        "outcome": "pruned", "dense": {"flops": 2, "params": 2}, "pruned": {"flops": 1, "params": 1}, "neurons": 2,
        "neurons_removed": 1, "error": [0.1, 0.0], "left": [["a", "b"]], "seconds": 1.0, "reason": None,
    }  # fmt: skip
    (root / "zoo.json").write_text(json.dumps({"networks": {"torchvision.resnet18": row}}))
    return root


def damaged(draw: random.Random, content: bytes, lines: bool) -> bytes:
    """A text of JSON, or of lines of it, with something wrong."""
    if draw.random() < 0.25:
        return damaged_bytes(draw, content)
    texts = content.decode().splitlines() if lines else [content.decode()]
    at = draw.randrange(len(texts))
    value = json.loads(texts[at])
    node, parent, key = value, None, None
    while isinstance(node, dict | list) and node and (parent is None or draw.random() < 0.8):
        parent, key = node, draw.choice([*node] if isinstance(node, dict) else range(len(node)))
        node = node[key]
    if parent is None or draw.random() < 0.05:
        value = draw.choice(NASTY)
    elif draw.random() < 0.3:
        del parent[key]
    else:
        parent[key] = copy.deepcopy(draw.choice(NASTY))
    texts[at] = json.dumps(value) if draw.random() < 0.97 else "[" * 50_000
    return ("\n".join(texts) + "\n").encode()


def damaged_bytes(draw: random.Random, content: bytes) -> bytes:
    """A file that was cut off, or of which some bits are others."""
    changed = bytearray(content)
    what = draw.random()
    if what < 0.2:
        return bytes(changed[: draw.randrange(len(changed))])
    for _ in range(draw.choice([1, 1, 1, 8])):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def read_report(root: Path) -> None:
    report = stored_report(root / "run" / "report.json")
    assert markdown(report) and facts(report)


def read_events(root: Path) -> None:
    events = stored_events(root / "run" / "events.jsonl")
    (root / "drawn").mkdir(exist_ok=True)
    write_report(root / "drawn", stored_report(root / "run" / "report.json"), events)


def read_comparison(root: Path) -> None:
    compare_runs([root])


def read_sweep(root: Path) -> None:
    earlier_sweep(root, resume=True)
    compare_runs([root])


def read_model(root: Path) -> None:
    model = load_pruned(root / "run")
    model(torch.zeros(1, 3, 16, 16))


def read_cells(root: Path) -> None:
    _earlier(root / "bench", Recipe.model_validate(TINY), resume=True)


def read_zoo(root: Path) -> None:
    rows = _rows_of(root / "zoo.json", resume=True)
    zoo_table({"flops": 0.5, "networks": rows}).markdown()


KINDS: dict[str, tuple[str, bool, Callable[[Path], None]]] = {
    "report": ("run/report.json", False, read_report),
    "compared report": ("run/report.json", False, read_comparison),
    "events": ("run/events.jsonl", True, read_events),
    "sweep": ("sweep.json", False, read_sweep),
    "architecture": ("run/architecture.json", False, read_model),
    "cells": ("bench/cells.jsonl", True, read_cells),
    "zoo": ("zoo.json", False, read_zoo),
    "recipe of a run": ("run/recipe.yaml", False, lambda root: (load_recipe(root / "run" / "recipe.yaml"), None)[1]),
}


def damage_all(kind: str, numbers: range, folder: Path, tmp_path: Path) -> dict[str, int]:
    name, lines, read = KINDS[kind]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    content = (folder / name).read_bytes()
    counts, problems = {"refused": 0, "read": 0}, list[str]()
    for number in numbers:
        draw = random.Random(f"{kind} {number}")
        binary = name.endswith(".yaml")
        (tmp_path / name).write_bytes(damaged_bytes(draw, content) if binary else damaged(draw, content, lines))
        try:
            read(tmp_path)
            counts["read"] += 1
        except InputError as error:
            counts["refused"] += 1
            problems += error.problems
    assert not [problem for problem in problems if "\n" in problem or len(problem) >= 1000]
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind: str, folder: Path, tmp_path: Path) -> None:
    assert damage_all(kind, range(60), folder, tmp_path)["refused"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_thousand_damaged_files_of_each_kind(kind: str, folder: Path, tmp_path: Path) -> None:
    print(kind, damage_all(kind, range(60, 2060), folder, tmp_path))


def flip_all(name: str, numbers: range, folder: Path, tmp_path: Path, state: Callable[[Path], Any]) -> dict[str, int]:
    """Whatever is read of a binary file with other bits is what was written."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    content, expected = (folder / name).read_bytes(), state(folder)
    counts = {"refused": 0, "read, and the same": 0}
    for number in numbers:
        (tmp_path / name).write_bytes(damaged_bytes(random.Random(f"{name} {number}"), content))
        try:
            found = state(tmp_path)
        except InputError:
            counts["refused"] += 1
            continue
        counts["read, and the same"] += 1
        assert same(found, expected), number
    return counts


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


BINARY: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "checkpoint": ("killed/checkpoint.pt", lambda root: load_checkpoint_state(root / "killed")),
    "weights": ("run/model.safetensors", lambda root: load_pruned(root / "run").state_dict()),
}


@pytest.mark.parametrize("kind", BINARY)
def test_flipped_bits(kind: str, folder: Path, tmp_path: Path) -> None:
    (folder / "killed" / "checkpoint.previous.pt").unlink(missing_ok=True)
    assert flip_all(BINARY[kind][0], range(60), folder, tmp_path, BINARY[kind][1])["refused"] > 40


@pytest.mark.slow
@pytest.mark.parametrize("kind", BINARY)
def test_two_thousand_flipped_files_of_each_kind(kind: str, folder: Path, tmp_path: Path) -> None:
    (folder / "killed" / "checkpoint.previous.pt").unlink(missing_ok=True)
    print(kind, flip_all(BINARY[kind][0], range(60, 2060), folder, tmp_path, BINARY[kind][1]))


def test_a_damaged_checkpoint_falls_back_on_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the run ends as if nothing had been."""
    recipe = {**TINY, "train": {**TINY["train"], "epochs": 3}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    command = ["run", str(tmp_path / "tiny.yaml"), "--output"]
    assert main([*command, str(tmp_path / "straight")]) == 0
    with pytest.raises(Killed):
        run_recipe(load_recipe(tmp_path / "tiny.yaml"), tmp_path / "run", track=stopping_at("finetune"))
    file = tmp_path / "run" / "checkpoint.pt"
    assert (tmp_path / "run" / "checkpoint.previous.pt").is_file()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert main([*command, str(tmp_path / "run"), "--resume"]) == 0
    said = capsys.readouterr().err
    assert "checkpoint.pt: expected the checkpoint of a run, found a damaged file" in said
    assert "going on from the one before it" in said
    assert_same(lasting(tmp_path / "run"), lasting(tmp_path / "straight"), 0)

    # and where both are damaged, one line says so and nothing is written
    with pytest.raises(Killed):
        run_recipe(load_recipe(tmp_path / "tiny.yaml"), tmp_path / "two", track=stopping_at("finetune"))
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (tmp_path / "two" / name).write_bytes(b"PK")
    before = {path: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert main([*command, str(tmp_path / "two"), "--resume"]) == 2
    assert "run without --resume" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "two").iterdir()} == before
