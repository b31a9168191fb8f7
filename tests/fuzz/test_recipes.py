"""Mutated recipes and overrides: either they are fine, or each problem is one line; nothing is written."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.common import TINY

from dnr_plugin.cli.main import main

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 10**6, 10**9, 10**12, 2**63, 10**40, -(10**40), 0.0, -0.5, 0.5, 1e-300, 1e-9,
    1e6, 1e300, float("inf"), float("-inf"), float("nan"), "", " ", "a", "x" * 5000, "../..", "/etc/passwd",
    "resnet18", "torchvision.resnet50", "torchvision.nope", "os:system", "sys:exit", "json:loads", "run[/a]", ":boom:",
    "<b>", "a|b", "\x1b[31m", "é", "1e5", "0x10", "no", [], [1], ["flip", "flip"], [None], {}, {"a": 1},
    {"flops": 0.5, "params": 0.5}, [[[]]], {"x": {"y": {"z": []}}},
]  # fmt: skip
WORDS = [
    "model",
    "name",
    "width",
    "epochs",
    "lr",
    "target",
    "flops",
    "observe",
    "kwargs",
    "oops",
    "train",
    "prune",
    "seed",
]
BROKEN = ["\t", "{", "&a *a", "!!python/object:os.system {}", "\0", ": :", "\n---\n", "'"]  # what is no YAML any more


def paths(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [p for key, value in items for p in ((*path, key), *paths(value, (*path, key)))]


def mutated(draw: random.Random) -> str:
    """A recipe's text with one to three things wrong, or not."""
    recipe = copy.deepcopy(TINY)
    for _ in range(draw.randint(1, 3)):
        *parents, last = draw.choice(paths(recipe))
        node: Any = recipe
        for key in parents:
            node = node[key]
        what = draw.random()
        if what < 0.6:
            node[last] = copy.deepcopy(draw.choice(NASTY))
        elif what < 0.75:
            del node[last]
        elif isinstance(node, dict):
            node[draw.choice([*WORDS, f"{last}s"])] = copy.deepcopy(draw.choice([node.get(last), draw.choice(NASTY)]))
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    if draw.random() < 0.15:  # what is no YAML any more, or another document
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice(BROKEN) + text[at:]
    return text


def override(draw: random.Random) -> list[str]:
    if draw.random() < 0.5:
        return []
    path = ".".join(map(str, draw.choice(paths(TINY))))
    value = draw.choice([*map(str, NASTY), "[1,", "{a: 1", "", "a: b: c", "&x", "1 2"])
    return ["--set", f"{draw.choice([path, path + '.x', 'oops', '', '.'])}={value}"]


def check(numbers: range, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[int, int]:
    codes = dict[int, int]()
    file = tmp_path / "recipe.yaml"
    for number in numbers:
        draw = random.Random(number)
        file.write_bytes(mutated(draw).encode("utf-8", "surrogatepass"))
        code = main(["check", str(file), *override(draw)])
        said = capsys.readouterr()
        codes[code] = codes.get(code, 0) + 1
        assert code in (0, 2), number
        assert (code == 2) == bool(said.err), number
        assert all(line.startswith("dnr: ") for line in said.err.splitlines()), (number, said.err)
        assert "Traceback" not in said.err, number
        assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"], number
    return codes


def test_mutated_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check(range(300), tmp_path, capsys)[2] > 150


@pytest.mark.slow
def test_ten_thousand_mutated_recipes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    print(check(range(300, 10_300), tmp_path, capsys))
