"""Numerical tests as they run on other processors, imitated: other vector units, numbers of threads, and seeds.

``pytest -m slow tests/test_processors.py`` shows that no bound holds on one machine alone.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
SSE = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
CONDITIONS = {
    **{
        f"{units}, {threads} thread(s)": {**variables, "DNR_TEST_THREADS": threads}
        for units, variables in (("as it is", {}), ("AVX2", AVX2), ("SSE", SSE))
        for threads in ("1", "2")
    },
    **{f"as it is, seed {seed}": {"DNR_TEST_SEED": seed} for seed in ("1", "2", "3")},
}
# What computes with float numbers; the others read, write, refuse or draw.
NUMERICAL = (
    "activations", "activity", "batchnorm", "costs", "criteria", "dynamics", "export", "flow", "graph", "history",
    "importance", "measure", "moments", "neurons", "observe", "optimizer", "pairs", "patches", "planning", "pressure",
    "prior", "redundancy", "removal", "repair", "train", "zeroing",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("condition", CONDITIONS)
def test_bounds_hold_on(condition: str) -> None:
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in NUMERICAL]
    workers = "1" if CONDITIONS[condition].get("DNR_TEST_THREADS") == "2" else "auto"  # else they wait for each other
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-n", workers, *files],
        cwd=ROOT, env={**os.environ, **CONDITIONS[condition]}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    print(f"{condition}: {done.stdout.splitlines()[-1]}")
