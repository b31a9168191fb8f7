"""What the benchmark of criteria comes to: means over the seeds, as plain data, Markdown and tables."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from dnr_plugin.benchmarks.criteria.contenders import CRITERIA, MENDED, OURS
from dnr_plugin.devices import versions
from dnr_plugin.pruning.order import SCOPES
from dnr_plugin.recipe.schema import Recipe
from dnr_plugin.reports.layer_report import NOTE
from dnr_plugin.reports.table import Table, bold, markdown_items, plain_markdown

FIGURES = {
    "removed": "right after removal",
    "recalibrated": "BatchNorm recalibrated",
    "repaired": "repaired",
    "recalibrated_finetuned": "BatchNorm recalibrated, then fine-tuned",
    "repaired_finetuned": "repaired, then fine-tuned",
}
# What one table or one row of plots shows side by side.
PAIRS = (("recalibrated", "repaired"), ("recalibrated_finetuned", "repaired_finetuned"))


def summary(recipe: Recipe, recalibration: int, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds, as plain data.

    Args:
        recipe: of the benchmark.
        recalibration: images for BatchNorm.
        cells: the lines of ``cells.jsonl``.

    Returns:
        Settings, ``dense`` accuracy by seed, and ``rows``, one for each criterion, scope and level: ``kept_flops`` and
        each of ``accuracy`` as ``{"mean", "sd", "n"}`` or None, shares in [0, 1]; ``reasons`` for what is missing.
    """
    groups: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["criterion"], cell["scope"], cell["level"]), []).append(cell)
    names, scopes = list(CRITERIA), list(SCOPES)
    order = sorted(groups, key=lambda key: (names.index(key[0]), scopes.index(key[1]), -key[2]))
    dense = {str(cell["seed"]): cell["dense_accuracy"] for cell in sorted(cells, key=lambda cell: int(cell["seed"]))}
    return {
        "name": recipe.name,
        "recipe": recipe.model_dump(mode="json"),
        "images": {
            "calibration": recipe.prune.observe.samples,
            "recalibration": recalibration,
            "repair": recipe.prune.repair_samples,
        },
        "versions": versions(),
        "devices": sorted({cell["device"] for cell in cells}),
        "figures": FIGURES,
        "dense": {"by_seed": dense, **(_statistics(list(dense.values())) or {})},
        "rows": [
            {
                "criterion": criterion,
                "ours": criterion in OURS,
                "scope": scope,
                "level": level,
                "n": sum(bool(cell["accuracy"]) for cell in of_group),
                "kept_flops": _statistics([cell["kept"] for cell in of_group if cell["kept"] is not None]),
                "accuracy": {
                    name: _statistics([cell["accuracy"][name] for cell in of_group if name in cell["accuracy"]])
                    for name in FIGURES
                },
                "reasons": sorted({cell["reason"] for cell in of_group if cell["reason"]}),
            }
            for criterion, scope, level in order
            for of_group in [groups[criterion, scope, level]]
        ],
    }


def _statistics(values: Sequence[float]) -> dict[str, Any] | None:
    if not values:
        return None
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None, "n": len(values)}


def pairs_in(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Those of `PAIRS` of which there are figures, at least the first."""
    rows = result["rows"]
    return [pair for pair in PAIRS if any(row["accuracy"][name] for row in rows for name in pair)] or [PAIRS[0]]


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The best of each level first, then every criterion for each scope.

    The best of a column is bold; criteria come in the order of their mean over the levels.
    """
    rows = result["rows"]
    levels = sorted({row["level"] for row in rows}, reverse=True)
    head = [f"{100 * level:g} % of FLOPs" for level in levels]
    pairs = pairs_in(result)
    best: list[list[str]] = []
    for name in itertools.chain(*pairs):
        at = [[row for row in rows if row["level"] == level] for level in levels]
        tops = [max(of_level, key=lambda row: _mean(row, name)) for of_level in at]
        shown = [f"{top['criterion']}, {top['scope']}: {_shown(top, name, result)}" for top in tops]
        best.append([FIGURES[name], *shown])
    listed = [Table("Best at each level", ["test accuracy, %", *head], best)]
    for scope, pair in itertools.product(dict.fromkeys(row["scope"] for row in rows), pairs):
        title = f"Scope {scope}: {FIGURES[pair[0]]} / {FIGURES[pair[1]]}"
        body = _scope_table([row for row in rows if row["scope"] == scope], levels, pair, result)
        listed.append(Table(title, ["criterion", "from", *head], body, words=2))
    return listed


def _scope_table(
    rows: Sequence[Mapping[str, Any]], levels: Sequence[float], pair: tuple[str, str], result: Mapping[str, Any]
) -> list[list[str]]:
    at = {(row["criterion"], row["level"]): row for row in rows}
    top = {
        (level, name): max(_mean(row, name) for row in rows if row["level"] == level)
        for level in {row["level"] for row in rows}
        for name in pair
    }

    def worth(criterion: str) -> tuple[int, float]:
        known = [row for row in rows if row["criterion"] == criterion and row["accuracy"][pair[1]]]
        return len(known), mean(_mean(row, pair[1]) for row in known) if known else 0.0

    def text(criterion: str, level: float, name: str) -> str:
        row = at.get((criterion, level))
        if row is None or not row["accuracy"][name]:
            return "-"
        shown = _shown(row, name, result)
        return bold(shown) if _mean(row, name) == top[level, name] else shown

    return [
        [
            criterion,
            _source(criterion),
            *(" / ".join(text(criterion, level, name) for name in pair) for level in levels),
        ]
        for criterion in sorted({row["criterion"]: None for row in rows}, key=worth, reverse=True)
    ]


def _source(criterion: str) -> str:
    if criterion in OURS:
        return "dnr_plugin"
    return "Torch-Pruning, mended" if criterion in MENDED else "Torch-Pruning"


def _mean(row: Mapping[str, Any], name: str) -> float:
    """For ranking; below all others where there is none."""
    return float(row["accuracy"][name]["mean"]) if row["accuracy"][name] else -1.0


def _shown(row: Mapping[str, Any], name: str, result: Mapping[str, Any]) -> str:
    accuracy = row["accuracy"][name]
    if not accuracy:
        return "-"
    spread = "" if accuracy["sd"] is None else f" ± {100 * accuracy['sd']:.1f}"
    fewer = "" if accuracy["n"] == result["dense"]["n"] else f" (n = {accuracy['n']})"
    return f"{100 * accuracy['mean']:.1f}{spread}{fewer}"


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader should know beside the tables."""
    dense, images, pairs = result["dense"], result["images"], result["recipe"]["prune"]["repair_pairs"]
    by_seed = ", ".join(f"{100 * value:.1f} (seed {seed})" for seed, value in dense["by_seed"].items())
    lines = [
        f"Test accuracy in %, mean ± sample standard deviation over n = {dense['n']} seeds; best of a column in bold.",
        f"Dense networks: {by_seed}. Each is the same for every criterion.",
        f"Images: {images['calibration']} for every criterion, {images['recalibration']} for BatchNorm, "
        f"{images['repair']} for repair{' of layers and of pairs of layers' if pairs else ''}.",
        "The best of many settings is chosen on the test images here, so it is better by chance as well.",
        "Every criterion is planned by the same planner to the same FLOPs, and offered the same repair.",
        NOTE,
        f"Device: {'; '.join(result['devices'])}; torch {result['versions']['torch']}, torch-pruning "
        f"{result['versions']['torch-pruning']}.",
    ]
    failed: dict[tuple[str, str, str], list[str]] = {}
    for row in result["rows"]:
        for reason in row["reasons"]:
            failed.setdefault((row["criterion"], row["scope"], reason), []).append(f"{100 * row['level']:g} %")
    lines += [f"{criterion}, {scope}, {', '.join(at)}: {why}" for (criterion, scope, why), at in failed.items()]
    return lines


def markdown(result: Mapping[str, Any]) -> str:
    """All tables and notes as Markdown."""
    lines = [f"# Criteria compared: {plain_markdown(result['name'])}", "", *markdown_items(notes(result))]
    for table in tables(result):
        lines += ["", f"## {table.title}", "", *table.markdown()]
    return "\n".join(lines) + "\n"
