"""The package as others see it: light to import, typed, clean, and with the names of the contract."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires

import pytest
from conftest import ROOT

import dnr_plugin


def test_importing_the_package_stays_light() -> None:
    code = (
        "import sys, dnr_plugin; dnr_plugin.DyingNeuronImportance(); "
        "heavy = {'torchvision', 'fvcore', 'matplotlib', 'pydantic', 'rich'} & set(sys.modules); "
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_names_of_the_contract_are_public() -> None:
    names = {
        "DyingNeuronImportance", "remove_dead_neurons", "flop_report", "save_pruned", "load_pruned", "follow_optimizer",
        "recalibrate_batchnorm", "load_recipe", "run_recipe",
    }  # fmt: skip
    assert names <= set(dnr_plugin.__all__)
    assert all(callable(getattr(dnr_plugin, name)) for name in dnr_plugin.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dnr_plugin.nothing  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.longest
@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_the_code_is_clean(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_imported_is_declared() -> None:
    declared = {line.split(";")[0].strip().split(">")[0] for line in requires("dnr_plugin") or []}
    assert {"torch", "torchvision", "torch-pruning", "fvcore", "pyyaml", "pydantic", "rich", "safetensors"} <= declared
