"""Every network of the zoo in a process of its own, so that none that fails or finds no end stops the others."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dnr_plugin.benchmarks.zoo.networks import Entry, chosen
from dnr_plugin.benchmarks.zoo.row import try_network
from dnr_plugin.devices import device_name, versions
from dnr_plugin.errors import InputError, RunError, first_line, one_line
from dnr_plugin.files import atomic_write, check_writable, locked, read_json
from dnr_plugin.reports.table import Table
from dnr_plugin.runs.state import Track

_FILE = "zoo.json"
_MEMORY = 0.85  # of the machine's memory, that one network may take


def run_zoo(
    patterns: Sequence[str],
    *,
    flops: float = 0.5,
    seconds: float = 120.0,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    track: Track = lambda items, total, what: items,
) -> dict[str, Any]:
    """Prunes networks as their packages build them, untrained, on random images: does it work, and what is left?

    Args:
        patterns: names or shell patterns (`networks.chosen`).
        flops: share that is to remain, in (0, 1).
        seconds: that a network may take, its imports included.
        output: folder for ``zoo.json`` and ``zoo.md``, written after every network; None for none.
        resume: keep the rows that are there.
        track: see `run.run_recipe`.

    Returns:
        What ``zoo.json`` holds: for each network its ``outcome`` ("pruned", "short" of the target, "refused" with the
        reason, "failed", "no end", "killed", "not installed") and what `row.try_network` told.

    Raises:
        InputError: a pattern fits no network, a number is out of range, or the folder cannot be used.
    """
    if not 0.0 < flops < 1.0:
        raise InputError(f"--flops: expected a share above 0 and below 1, found {flops:g}")
    if not seconds > 0.0:
        raise InputError(f"--seconds: expected a number above 0, found {seconds:g}")
    networks = chosen(patterns)
    rows: dict[str, dict[str, Any]] = {}
    folder = None if output is None else Path(output)
    if folder is not None:
        check_writable(folder)
        rows = _rows_of(folder / _FILE, resume)
    result: dict[str, Any] = {
        "flops": flops, "seconds": seconds, "device": device_name(torch.device("cpu")), "versions": versions(),
        "networks": rows,
    }  # fmt: skip
    with locked(folder) if folder is not None else contextlib.nullcontext():
        _fill(result, networks, folder, track)
    return result


def _fill(result: dict[str, Any], networks: Sequence[Entry], folder: Path | None, track: Track) -> None:
    """Adds the rows that are missing, and writes the table after each."""
    rows = result["networks"]
    for entry in track(networks, len(networks), "networks"):
        if entry.name not in rows:
            rows[entry.name] = _row(entry, result["flops"], result["seconds"])
        if folder is not None:
            with atomic_write(folder / _FILE) as file:
                json.dump(result, file, indent=1)
            with atomic_write(folder / "zoo.md") as file:
                file.write("\n".join([*zoo_table(result).markdown(), ""]))


def _rows_of(file: Path, resume: bool) -> dict[str, dict[str, Any]]:
    if not file.exists():
        return {}
    if not resume:
        raise InputError(f"--output: expected a folder without {_FILE}, or --resume, found {file}")
    content = read_json(file)
    try:
        rows = {str(name): {**row, "outcome": str(row["outcome"])} for name, row in content["networks"].items()}
        zoo_table({"flops": 1.0, "networks": rows}).markdown()
        return rows
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{file}: expected the rows of a zoo, found damage: {one_line(error)}") from error


def _row(entry: Entry, flops: float, seconds: float) -> dict[str, Any]:
    if importlib.util.find_spec(entry.package) is None:
        return {"outcome": "not installed", "reason": f"pip install {entry.package}"}
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(entry, flops, there), daemon=True)
    row: dict[str, Any] = {}
    process.start()
    there.close()
    end = time.monotonic() + seconds
    try:
        while "outcome" not in row and here.poll(max(0.0, end - time.monotonic())):
            name, value = here.recv()
            row[name] = value
        if "outcome" not in row:
            row |= {"outcome": "no end", "reason": f"it takes more than {seconds:g} s"}
    except EOFError:
        process.join(10)
        row |= {"outcome": "killed", "reason": f"exit code {process.exitcode}, as for want of memory"}
    finally:
        process.kill()
        process.join()
    return row


def _child(entry: Entry, flops: float, pipe: Any) -> None:
    warnings.simplefilter("ignore")
    _limit_memory()
    told: dict[str, Any] = {}

    def tell(name: str, value: Any) -> None:
        told[name] = value
        pipe.send((name, value))

    try:
        try_network(entry, flops, tell)
        tell("reason", told.get("short"))
        tell("outcome", "short" if "short" in told else "pruned")
    except (InputError, RunError) as error:
        tell("reason", first_line(error))
        tell("outcome", "refused")
    except Exception as error:  # whatever a network of someone's leads to
        tell("reason", f"{type(error).__name__}: {first_line(error)}")
        tell("outcome", "failed")


def _limit_memory() -> None:
    """An allocation beyond what there is fails, where the machine would kill some process or other."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    pages: Callable[[str], int] = os.sysconf
    most = int(_MEMORY * pages("SC_PAGE_SIZE") * pages("SC_PHYS_PAGES"))
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def zoo_table(result: dict[str, Any]) -> Table:
    """One row a network."""
    rows = []
    for name, row in result["networks"].items():
        before, after = row.get("dense"), row.get("pruned")
        kept = [f"{after[key] / before[key]:.3f}" for key in ("flops", "params")] if after else ["", ""]
        errors = ["-" if error is None else f"{error:.2g}" for error in row.get("error", [])]
        rows.append(
            [
                name, row["outcome"], f"{row['neurons_removed']} of {row['neurons']}" if after else "", *kept,
                " -> ".join(errors), str(len(row.get("left", []))),
                f"{row['seconds']:.0f}" if "seconds" in row else "", row.get("reason") or "",
            ]
        )  # fmt: skip
    head = ["network", "outcome", "neurons removed", "FLOPs kept", "parameters kept", "outputs off, repaired",
            "layers left", "seconds", "reason"]  # fmt: skip
    counts = ", ".join(f"{sum(row[1] == kind for row in rows)} {kind}" for kind in sorted({row[1] for row in rows}))
    return Table(f"{len(rows)} networks to {result['flops']:g} of the FLOPs: {counts}", head, rows, words=2)
