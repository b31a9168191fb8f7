"""Two processes of one group, for tests of what several ranks do together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run_two_ranks(script: str, place: Path) -> None:
    """Runs a script as rank 0 and as rank 1; its arguments are the rank, ``place``, and what goes on ``sys.path``."""
    root = Path(__file__).resolve().parent.parent.parent
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(place), str(root), str(root / "tests")],
            cwd=root,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for process in ranks:
            _, error = process.communicate(timeout=120)
            assert process.returncode == 0, error
    finally:
        for process in ranks:
            process.kill()
