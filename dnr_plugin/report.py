"""Turns the figures of a run, or of a saved model, into JSON, Markdown, HTML and terminal tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import page, plots
from .checkpoint import ARCHITECTURE, load_pruned
from .errors import InputError
from .files import atomic_write
from .measure import FlopReport, flop_report

if TYPE_CHECKING:
    from rich.console import RenderableType

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


def saved_model(folder: Path, shape: str | None, allow_import: bool) -> tuple[nn.Module, dict[str, Any], Tensor]:
    """A saved model in eval mode, its builder, and a blank image of a size that it takes.

    Args:
        folder: written by `checkpoint.save_pruned`.
        shape: "3x32x32", or None for what the builder says.
        allow_import: see `checkpoint.load_pruned`.

    Raises:
        InputError: the folder holds no model, or the model does not take such images.
    """
    from .checks import check_forward

    model = load_pruned(folder, allow_import)
    builder = json.loads((folder / ARCHITECTURE).read_text(encoding="utf-8"))["builder"]
    kwargs = builder["kwargs"]
    given = shape or f"{kwargs.get('in_channels', 3)}x" + "x".join([str(kwargs.get("image_size", 224))] * 2)
    try:
        sizes = [int(side) for side in given.split("x")]
    except ValueError:
        sizes = []
    if len(sizes) != 3 or min(sizes) < 1:
        raise InputError(f"--input: expected CxHxW such as 3x224x224, found {given!r}")
    example = torch.zeros(1, *sizes)
    check_forward(model, example, 1)
    return model, builder, example


def report_model(folder: Path, shape: str | None, allow_import: bool) -> tuple[dict[str, Any], list[str]]:
    """FLOPs and parameters per layer of a saved model against the dense model it came from, with notes.

    Args:
        folder: see `saved_model`, as the others.
        shape: of one image.
        allow_import: let the model's builder be imported.

    Raises:
        InputError: see `saved_model`.
    """
    from .models import rebuild

    model, builder, example = saved_model(folder, shape, allow_import)
    dense, pruned = flop_report(rebuild(builder, allow_import), example), flop_report(model, example)
    found: dict[str, Any] = {
        "builder": builder,
        "dense": {"params": dense.params, "flops": dense.flops},
        "pruned": {"params": pruned.params, "flops": pruned.flops},
        "kept": {"params": pruned.params / dense.params, "flops": pruned.flops / dense.flops},
        "layers": layer_rows(dense, pruned),
        "unsupported_ops": pruned.unsupported_ops,
    }
    uncounted = ", ".join(pruned.unsupported_ops) or "nothing"
    notes = [
        f"Kept {100 * found['kept']['params']:.2f} % of the parameters and {100 * found['kept']['flops']:.2f} % of the "
        f"FLOPs for an image of {'x'.join(map(str, example.shape[1:]))}.",
        f"Not counted by fvcore: {uncounted}. {NOTE}",
    ]
    return found, notes


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _count(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3f} {unit}"
    return f"{value:g}"


def summary_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(measure, dense, pruned, pruned as a share of dense) for a run's report."""
    dense, pruned, latency = report["dense"], report["pruned"], report.get("latency")
    # a run that removes while it trains has no dense network to compare with
    known = dense["accuracy"] is not None
    change = f"{100 * (pruned['accuracy'] - dense['accuracy']):+.2f} points" if known else "-"
    rows = [("accuracy", _percent(dense["accuracy"]), _percent(pruned["accuracy"]), change)]
    if pruned["accuracy_before_finetune"] is not None:
        rows.append(("accuracy before fine-tuning", "", _percent(pruned["accuracy_before_finetune"]), ""))
    rows += [
        ("parameters", _count(dense["params"]), _count(pruned["params"]), _percent(report["kept"]["params"])),
        ("FLOPs", _count(dense["flops"]), _count(pruned["flops"]), _percent(report["kept"]["flops"])),
    ]
    if latency:
        rows.append(
            (
                f"latency, batch {latency['batch']}",
                f"{latency['dense_ms']:.2f} ms",
                f"{latency['pruned_ms']:.2f} ms",
                _percent(latency["ratio"]),
            )
        )
    return rows


def facts(report: Mapping[str, Any]) -> list[str]:
    """What a reader should know beside the table, one sentence a line."""
    target, dead, exact = report["target"], report["dead"], report["exact_removal"]
    if target["kind"] is None:
        lines = ["The run watched its neurons and removed none."]
    else:
        lines = [
            f"Target {target['kind']}: {_value(target['requested'])} requested, {_value(target['achieved'])} achieved.",
            f"Removed {_percent(report['sparsity']['neuron'])} of the neurons and "
            f"{_percent(report['sparsity']['weight'])} of the parameters.",
        ]
    when = "before the removal" if report.get("mode", "after_training") == "after_training" else "at the last check"
    found = f"{dead['neurons']} of {dead['of']} neurons were dead {when}"
    if target["kind"] is None:
        lines.append(f"{found}.")
    elif exact["neurons"]:
        lines.append(
            f"{found}; removing {exact['neurons']} that were exactly zero changed the outputs by at most "
            f"{exact['max_abs_diff']:.1e}."
        )
    else:
        lines.append(f"{found}; no removed neuron was exactly zero.")
    if (repair := report.get("repair")) is not None:
        lines.append(
            f"Repair fitted {repair['layers']} layers to the dense network's: on average they lacked "
            f"{_percent(repair['error_before'])} of the variance of what they gave, {_percent(repair['error_after'])} "
            "after it."
        )
        lines += [f"Repair left {layer} as it was: {reason}." for layer, reason in repair["left"]]
    lines += _dynamics_facts(report.get("dynamics"), report.get("mode") == "dynamic")
    if report["skipped"]:
        named = "; ".join(f"{item['layer']} ({item['reason']})" for item in report["skipped"])
        lines.append(f"Left alone: {named}.")
    if report["unsupported_ops"]:
        named = ", ".join(f"{name} ({times}x)" for name, times in report["unsupported_ops"].items())
        lines.append(f"Not counted by fvcore: {named}.")
    if left := report.get("activation", {}).get("left"):  # reports of earlier versions have none
        name = report["activation"]["name"]
        kinds = Counter(line.rpartition(" (")[2].removesuffix(")") for line in left)
        counted = ", ".join(f"{times} {kind}" for kind, times in kinds.most_common())
        lines.append(f"{f'Activations other than {name}' if name else 'Activations, left as they are'}: {counted}.")
    seconds = report["seconds"]
    lines.append(
        f"Seed {report['seed']}, {report['device']}; {seconds['train']:.0f} s training, "
        f"{seconds['prune']:.0f} s pruning, {seconds['finetune']:.0f} s fine-tuning. {NOTE}"
    )
    return lines


def _dynamics_facts(dynamics: Mapping[str, Any] | None, removed: bool) -> list[str]:
    """What the checks of a run found while it trained, and did if it removed."""
    if not dynamics:
        return []
    lines = [
        f"In {dynamics['checks']} checks while training, neurons died {dynamics['died']} times, dead ones were "
        f"reactivated {dynamics['reactivated']} times"
        + (
            f", candidates were restored {dynamics['restored']} times, and {dynamics['removed']} were removed."
            if removed
            else "."
        )
    ]
    if dynamics["stopped"] is not None:
        lines.append(f"Removal stopped early: {dynamics['stopped']}.")
    if dynamics["wall_clock_ratio"] is not None:
        lines.append(
            f"Training took {dynamics['wall_clock_ratio']:.2f} times what the same steps take on the dense network, "
            "estimated from the epochs before the first removal."
        )
    return lines


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:.4g}"


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: summary, facts, layers."""
    lines = [f"# {report['name']}", "", "| | dense | pruned | pruned / dense |", "|---|---:|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in summary_rows(report)]
    lines += ["", *(f"- {fact}" for fact in facts(report)), "", "## Layers", ""]
    lines += layer_markdown(report["layers"])
    return "\n".join(lines) + "\n"


def layer_markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows of `layer_rows` as a Markdown table."""
    lines = ["| layer | type | channels | parameters | FLOPs |", "|---|---|---:|---:|---:|"]
    for row in rows:
        cells = [f"{row[f'{what}_before']:,} → {row[f'{what}_after']:,}" for what in ("channels", "params", "flops")]
        lines.append(f"| {row['name'] or '(model)'} | {row['type']} | {' | '.join(cells)} |")
    return lines


def summary_table(report: Mapping[str, Any]) -> RenderableType:
    """The summary for a terminal."""
    from rich.table import Table

    table = Table(title=report["name"], title_justify="left")
    for column, justify in (("", "left"), ("dense", "right"), ("pruned", "right"), ("pruned / dense", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in summary_rows(report):
        table.add_row(*row)
    return table


def layer_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> RenderableType:
    """The layers for a terminal, with a line of sums."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_footer=True)
    sums = {
        f"{what}_{when}": sum(row[f"{what}_{when}"] for row in rows)
        for what in ("params", "flops")
        for when in ("before", "after")
    }

    def pair(values: Mapping[str, Any], what: str) -> str:
        before, after = values[f"{what}_before"], values[f"{what}_after"]
        return f"{before:,}" if before == after else f"{before:,} → {after:,}"

    for column, footer, justify in (
        ("layer", "total", "left"),
        ("type", "", "left"),
        ("channels", "", "right"),
        ("parameters", pair(sums, "params"), "right"),
        ("FLOPs", pair(sums, "flops"), "right"),
    ):
        table.add_column(column, footer=footer, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(row["name"] or "(model)", row["type"], *(pair(row, w) for w in ("channels", "params", "flops")))
    return table


def write_report(folder: Path, report: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None:
    """Writes ``report.json``, ``report.md``, ``plots/*.png`` and the self-contained ``report.html``."""
    drawn = plots.save_figures(plots.run_figures(report, events), folder / "plots")
    with atomic_write(folder / "report.json") as file:
        json.dump(report, file, indent=1)
        file.write("\n")
    with atomic_write(folder / "report.md") as file:
        file.write(markdown(report))
    with atomic_write(folder / "report.html") as file:
        file.write(_page(report, drawn))


def _page(report: Mapping[str, Any], drawn: Sequence[Path]) -> str:
    def pair(values: Mapping[str, Any], what: str) -> str:
        return f"{values[f'{what}_before']:,} → {values[f'{what}_after']:,}"

    layers = [
        [row["name"] or "(model)", row["type"], *(pair(row, what) for what in ("channels", "params", "flops"))]
        for row in report["layers"]
    ]
    return page.page(
        report["name"],
        page.table(["", "dense", "pruned", "pruned / dense"], summary_rows(report)),
        page.items(facts(report)),
        page.images(drawn, plots.CAPTIONS),
        "<h2>Layers</h2>",
        page.table(["layer", "type", "channels", "parameters", "FLOPs"], layers),
    )
