"""The package as others see it: light to import, typed, clean, and with the names of the contract."""

from __future__ import annotations

import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import requires

import grimp
import pytest
from helpers.common import ROOT

import dnr_plugin


def test_importing_the_package_stays_light() -> None:
    code = (
        "import sys, dnr_plugin; dnr_plugin.DyingNeuronImportance(); "
        "heavy = {'torchvision', 'fvcore', 'matplotlib', 'pydantic', 'rich'} & set(sys.modules); "
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


PUBLIC = [
    "DyingNeuronDynamics", "DyingNeuronImportance", "InputError", "Limits", "Observer", "TargetError", "Timetable",
    "flop_report", "follow_optimizer", "load_pruned", "load_recipe", "plan_removal", "prune_neurons",
    "recalibrate_batchnorm", "register_layer", "remove_dead_neurons", "repair_network", "run_recipe", "save_pruned",
    "split_attention",
]  # fmt: skip


def test_the_public_names_are_these() -> None:
    assert sorted(dnr_plugin.__all__) == PUBLIC
    assert all(callable(getattr(dnr_plugin, name)) for name in dnr_plugin.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dnr_plugin.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_rooms_import_only_from_rooms_below() -> None:
    done = subprocess.run(["lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = grimp.build_graph("dnr_plugin")
    # a package is imported with every module in it, and imports nothing itself
    modules = {m for m in graph.modules if m != "dnr_plugin"}
    TopologicalSorter({m: graph.find_modules_directly_imported_by(m) & modules for m in modules}).prepare()


def test_rooms_have_empty_doors_and_modules_of_a_size_to_read() -> None:
    for file in (ROOT / "dnr_plugin").rglob("*.py"):
        lines = file.read_text().splitlines()
        assert len(lines) <= 420, f"{file}: {len(lines)} lines"
        if file.name == "__init__.py" and file.parent.name != "dnr_plugin":
            assert not lines, file


@pytest.mark.longest
@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_the_code_is_clean(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_imported_is_declared() -> None:
    declared = {line.split(";")[0].strip().split(">")[0] for line in requires("dnr_plugin") or []}
    assert {"torch", "torchvision", "torch-pruning", "fvcore", "pyyaml", "pydantic", "rich", "safetensors"} <= declared
