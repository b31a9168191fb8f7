"""FLOPs and parameters of each layer, dense against pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dnr_plugin.models.saved import saved_model
from dnr_plugin.network.attention import split_modules
from dnr_plugin.network.cost import FlopReport, flop_report
from dnr_plugin.network.flop_handles import multiplies_matrices
from dnr_plugin.network.splitting import split_named
from dnr_plugin.reports.table import Table

NOTE = "FLOPs as fvcore counts them: one multiply-add is one FLOP; for one sample."


def layer_rows(dense: FlopReport, pruned: FlopReport) -> list[dict[str, Any]]:
    """One row per layer, dense against pruned, in the model's order."""
    after = {layer.name: layer for layer in pruned.layers}
    rows = []
    for before in dense.layers:
        now = after.get(before.name)
        rows.append(
            {
                "name": before.name,
                "type": before.type,
                "channels_before": before.out_channels,
                "channels_after": now.out_channels if now else 0,
                "params_before": before.params,
                "params_after": now.params if now else 0,
                "flops_before": before.flops,
                "flops_after": now.flops if now else 0,
            }
        )
    return rows


def report_model(folder: Path, shape: str | None, allow_import: bool) -> tuple[dict[str, Any], list[str]]:
    """FLOPs and parameters per layer of a saved model against the dense model it came from, with notes.

    Args:
        folder: see `saved_model`, as the others.
        shape: of one image.
        allow_import: let the model's builder be imported.

    Raises:
        InputError: see `saved_model`.
    """
    from dnr_plugin.models.build import rebuild

    model, builder, example = saved_model(folder, shape, allow_import)
    whole = rebuild(builder, allow_import)
    split_named(whole, list(split_modules(model)))
    dense, pruned = flop_report(whole, example), flop_report(model, example)
    report: dict[str, Any] = {
        "builder": builder,
        "dense": {"params": dense.params, "flops": dense.flops},
        "pruned": {"params": pruned.params, "flops": pruned.flops},
        "kept": {"params": pruned.params / dense.params, "flops": pruned.flops / dense.flops},
        "layers": layer_rows(dense, pruned),
        "unsupported_ops": pruned.unsupported_ops,
    }
    notes = [
        *count_warnings(pruned.unsupported_ops),
        f"Kept {100 * report['kept']['params']:.2f} % of the parameters and {100 * report['kept']['flops']:.2f} % of "
        f"the FLOPs for an image of {'x'.join(map(str, example.shape[1:]))}.",
        *count_footnotes(pruned.unsupported_ops),
        NOTE,
    ]
    return report, notes


def count_warnings(operators: Mapping[str, int]) -> list[str]:
    """That the FLOPs lack products of matrices, where they do: a line, or none.

    Args:
        operators: that were not counted, with how often each ran, as ``unsupported_ops`` of a report has them.
    """
    named = _named(operators, [name for name in operators if multiplies_matrices(name)])
    return [f"Warning: the FLOPs are too low: they lack {named}, which multiply matrices, or may."] if named else []


def count_footnotes(operators: Mapping[str, int]) -> list[str]:
    """What else is not in the FLOPs: a line, or none; see `count_warnings`."""
    named = _named(operators, [name for name in operators if not multiplies_matrices(name)])
    return [f"Not in the FLOPs, as they work element by element: {named}."] if named else []


def _named(operators: Mapping[str, int], names: Sequence[str]) -> str:
    return ", ".join(f"{name} ({operators[name]}x)" for name in names)


def layer_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """The rows of `layer_rows`, with a line of sums."""
    sums = {
        f"{what}_{when}": sum(row[f"{what}_{when}"] for row in rows)
        for what in ("params", "flops")
        for when in ("before", "after")
    }

    def pair(values: Mapping[str, Any], what: str) -> str:
        before, after = values[f"{what}_before"], values[f"{what}_after"]
        return f"{before:,}" if before == after else f"{before:,} → {after:,}"

    cells = [
        [row["name"] or "(model)", row["type"], *(pair(row, what) for what in ("channels", "params", "flops"))]
        for row in rows
    ]
    total = ["total", "", "", pair(sums, "params"), pair(sums, "flops")]
    head = ["layer", "type", "channels", "parameters", "FLOPs"]
    return Table(title, head, [*cells, total], words=2, parted=len(cells))
