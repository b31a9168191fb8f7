"""The figures of a run as JSON, Markdown, HTML and terminal tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dnr_plugin.files import atomic_write
from dnr_plugin.reports.figures.drawing import save_figures
from dnr_plugin.reports.figures.run import RUN_CAPTIONS, run_figures
from dnr_plugin.reports.html import html_images, html_items, html_page
from dnr_plugin.reports.layer_report import NOTE, count_footnotes, count_warnings, layer_table
from dnr_plugin.reports.slow_layers import slow_layers
from dnr_plugin.reports.table import Table, markdown_items, plain_markdown

_FOLLOWS, _FEW = 0.5, 0.05  # share of the fall in FLOPs below which time did not follow; a fall that is none


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _count(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3f} {unit}"
    return f"{value:g}"


def summary_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(measure, dense, pruned, pruned as a share of dense) for a run's report."""
    dense, pruned = report["dense"], report["pruned"]
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
    for timed in _timed(report):
        spread = timed.get("spread")
        rows.append(
            (
                f"latency, batch {timed['batch']}{_in_runtime(timed, ', ')}",
                f"{timed['dense_ms']:.2f} ms",
                f"{timed['pruned_ms']:.2f} ms",
                _percent(timed["ratio"]) + ("" if spread is None else f" ± {50 * spread:.1f}"),
            )
        )
    return rows


def _in_runtime(timed: Mapping[str, Any], before: str) -> str:
    """The runtime of a latency or of a recipe's removal, after some words; nothing in eager mode."""
    runtime = timed.get("runtime", "eager")  # reports of earlier versions have none
    return "" if runtime == "eager" else f"{before}{runtime}"


def _timed(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Latencies by batch; reports of earlier versions have one, or none."""
    one = report.get("latency")
    return list(report.get("latencies") or ([one] if one else []))


def facts(report: Mapping[str, Any]) -> list[str]:
    """What a reader should know beside the table, one sentence a line."""
    target, dead, exact = report["target"], report["dead"], report["exact_removal"]
    if target["kind"] is None:
        lines = ["The run watched its neurons and removed none."]
    else:
        predicted = target.get("predicted")  # reports of earlier versions have none
        runtime = "" if predicted is None else _in_runtime(report["recipe"].get("prune", {}), " in ")
        told = "" if predicted is None else f"; {_value(predicted)} was predicted from times of layers"
        lines = [
            f"Target {target['kind']}{runtime}: {_value(target['requested'])} requested, {_value(target['achieved'])} "
            f"achieved{told}.",
            f"Removed {_percent(report['sparsity']['neuron'])} of the neurons and "
            f"{_percent(report['sparsity']['weight'])} of the parameters.",
        ]
    lines += [*_rounding_facts(report), *count_warnings(report["unsupported_ops"])]
    lines += [*_slow_facts(report), *slow_layers(report)]
    lines += [f"Latency in {name} was not measured: {why}." for name, why in report.get("unmeasured", {}).items()]
    when = "before the removal" if report.get("mode", "after_training") == "after_training" else "at the last check"
    counted_dead = f"{dead['neurons']} of {dead['of']} neurons were dead {when}"
    if target["kind"] is None:
        lines.append(f"{counted_dead}.")
    elif exact["neurons"]:
        lines.append(
            f"{counted_dead}; removing {exact['neurons']} that were exactly zero changed the outputs by at most "
            f"{exact['max_abs_diff']:.1e}."
        )
    else:
        lines.append(f"{counted_dead}; no removed neuron was exactly zero.")
    if (repair := report.get("repair")) is not None:
        narrow = ", in bfloat16," if repair.get("narrow") else ""  # reports of earlier versions do not say
        lines.append(
            f"Repair{narrow} fitted {repair['layers']} layers to the dense network's: on average they lacked "
            f"{_percent(repair['error_before'])} of the variance of what they gave, {_percent(repair['error_after'])} "
            "after it."
        )
        lines += [f"Repair left {layer} as it was: {reason}." for layer, reason in repair["left"]]
    lines += _dynamics_facts(report.get("dynamics"), report.get("mode") == "dynamic")
    if report["skipped"]:
        named = "; ".join(f"{item['layer']} ({item['reason']})" for item in report["skipped"])
        lines.append(f"Left alone: {named}.")
    lines += count_footnotes(report["unsupported_ops"])
    if left := report.get("activation", {}).get("left"):  # reports of earlier versions have none
        name = report["activation"]["name"]
        kinds = Counter(line.rpartition(" (")[2].removesuffix(")") for line in left)
        counted = ", ".join(f"{times} {kind}" for kind, times in kinds.most_common())
        lines.append(f"{f'Activations other than {name}' if name else 'Activations, left as they are'}: {counted}.")
    if precision := report.get("amp"):  # reports of earlier versions have none
        lines.append(" ".join(_precision_fact(stage, chosen) for stage, chosen in precision.items()))
    seconds = report["seconds"]
    lines.append(
        f"Seed {report['seed']}, {report['device']}; {seconds['train']:.0f} s training, "
        f"{seconds['prune']:.0f} s pruning, {seconds['finetune']:.0f} s fine-tuning. {NOTE}"
    )
    return lines


def _slow_facts(report: Mapping[str, Any]) -> list[str]:
    """Where FLOPs fell and time did not."""
    kept = report["kept"]["flops"]
    slow = [t for t in _timed(report) if (1 - t["ratio"]) < _FOLLOWS * (1 - kept) and kept < 1 - _FEW]
    if not slow:
        return []
    shown = ", ".join(f"{_percent(t['ratio'])} at batch {t['batch']}{_in_runtime(t, ' in ')}" for t in slow)
    return [
        f"FLOPs fell to {_percent(kept)}, but time to no less than {shown}: hardware rounds channels up, and a small "
        "layer takes as long as a call. Target latency and round_to auto go by measured times."
    ]


def _rounding_facts(report: Mapping[str, Any]) -> list[str]:
    """Of how many channels layers kept a multiple, where that was measured."""
    options, round_to = report["recipe"].get("prune", {}), report.get("round_to")
    measured = options.get("round_to") == "auto" or (
        options.get("scope") == "latency_aware" and options.get("round_to") is None
    )
    if not measured or round_to is None:
        return []
    if round_to == 1:
        return ["Any number of channels was kept: as measured on layers, this machine rounds to no multiple."]
    return [f"Multiples of {round_to} channels were kept: as measured on layers, smaller steps save no time here."]


def _precision_fact(stage: str, chosen: Mapping[str, Any]) -> str:
    """In what a stage computed, and why."""
    did = "Trained" if stage == "train" else "Fine-tuned"
    if chosen["float32_ms"] is not None and chosen["bfloat16_ms"] is not None:
        why = (
            f"a trial step of {chosen['images']} images took {chosen['float32_ms']:.0f} ms in float32 and "
            f"{chosen['bfloat16_ms']:.0f} ms in bfloat16"
        )
    else:
        why = chosen["reason"] or "as the recipe asks"
    return f"{did} in {'bfloat16' if chosen['used'] else 'float32'}: {why}."


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
    lines = [f"# {plain_markdown(report['name'])}", "", *summary_table(report).markdown()]
    lines += ["", *markdown_items(facts(report))]
    return "\n".join([*lines, "", "## Layers", "", *layer_table(report["layers"]).markdown()]) + "\n"


def summary_table(report: Mapping[str, Any]) -> Table:
    """Accuracy, parameters, FLOPs and latency, dense against pruned."""
    return Table(report["name"], ["", "dense", "pruned", "pruned / dense"], summary_rows(report))


def write_report(folder: Path, report: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> None:
    """Writes ``report.json``, ``report.md``, ``plots/*.png`` and the self-contained ``report.html``."""
    drawn = save_figures(run_figures(report, events), folder / "plots")
    with atomic_write(folder / "report.json") as file:
        json.dump(report, file, indent=1)
        file.write("\n")
    with atomic_write(folder / "report.md") as file:
        file.write(markdown(report))
    with atomic_write(folder / "report.html") as file:
        file.write(_page(report, drawn))


def _page(report: Mapping[str, Any], drawn: Sequence[Path]) -> str:
    return html_page(
        report["name"],
        summary_table(report).html(),
        html_items(facts(report)),
        html_images(drawn, RUN_CAPTIONS),
        "<h2>Layers</h2>",
        layer_table(report["layers"]).html(),
    )
