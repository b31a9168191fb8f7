"""Commands on what runs leave: report, export, compare."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dnr_plugin.cli.arguments import Commands, command, takes_saved
from dnr_plugin.cli.output import DONE, show, track
from dnr_plugin.errors import InputError


def register(commands: Commands) -> None:
    """Adds the commands of this family."""
    report = command(commands, "report", _report, "show FLOPs and parameters per layer, dense against pruned")
    report.add_argument("folder", metavar="RUN_OR_MODEL", help="folder of a run, or one written by save_pruned")
    report.add_argument("--format", choices=("table", "markdown", "json"), default="table", help="default: table")
    takes_saved(report)

    export = command(commands, "export", _export, "write the pruned model as one file, checked against its outputs")
    export.add_argument("folder", metavar="RUN", help="folder of a finished run, or one written by save_pruned")
    export.add_argument(
        "--format", choices=("onnx", "torch"), required=True,
        help='onnx, which needs: pip install "dnr_plugin[export]"; torch: for torch.export.load',
    )  # fmt: skip
    export.add_argument(
        "--int8", action="store_true",
        help="with onnx: in 8-bit integers, calibrated on the run's training images and checked on its test images",
    )  # fmt: skip
    export.add_argument("--output", metavar="FILE", required=True, help="a file that does not exist yet")
    takes_saved(export)

    compare = command(commands, "compare", _compare, "show finished runs side by side, and what tells them apart")
    compare.add_argument("folders", metavar="RUN", nargs="+", help="folder of a finished run, or of a sweep")
    compare.add_argument("--output", metavar="DIR", help="write tables and plots there; by default nothing is written")


def _report(arguments: argparse.Namespace) -> int:
    from dnr_plugin.reports.layer_report import layer_table, report_model
    from dnr_plugin.reports.run_report import facts, markdown, summary_table
    from dnr_plugin.reports.stored import stored_report
    from dnr_plugin.reports.table import markdown_items

    folder = Path(arguments.folder)
    if (folder / "report.json").is_file():
        report = stored_report(folder / "report.json")
        tables = [summary_table(report), layer_table(report["layers"], "layers")]
        notes, text = facts(report), markdown(report)
    else:
        report, notes = report_model(folder, arguments.input, arguments.allow_import)
        tables = [layer_table(report["layers"], str(folder))]
        text = "\n".join([*layer_table(report["layers"]).markdown(), "", *markdown_items(notes)])
    if arguments.format == "json":
        show(json.dumps(report, indent=1))
    elif arguments.format == "markdown":
        show(text.rstrip("\n"))
    else:
        show(*tables, *(f"- {note}" for note in notes))
    return DONE


def _export(arguments: argparse.Namespace) -> int:
    from dnr_plugin.models.export import BATCHES, export_model

    if arguments.int8:
        return _export_int8(arguments)
    difference = export_model(
        arguments.folder, arguments.output, format=arguments.format, shape=arguments.input,
        allow_import=arguments.allow_import,
    )  # fmt: skip
    batches = " and ".join(map(str, BATCHES))
    show(
        f"Written to {arguments.output}; on random images in batches of {batches} its outputs differ from the "
        f"model's by at most {difference:.1e} of the largest."
    )
    return DONE


def _export_int8(arguments: argparse.Namespace) -> int:
    from dnr_plugin.runs.int8_export import export_int8

    if arguments.format != "onnx":
        raise InputError(f"--int8: expected --format onnx, found {arguments.format}")
    if arguments.input is not None:
        raise InputError(
            f"--input: expected nothing with --int8, which takes the run's images, found {arguments.input}"
        )
    exported = export_int8(arguments.folder, arguments.output, allow_import=arguments.allow_import, track=track)
    show(exported.table(), *(f"- {note}" for note in exported.notes()), f"Written to {arguments.output}")
    return DONE


def _compare(arguments: argparse.Namespace) -> int:
    from dnr_plugin.reports.comparison import compare_runs
    from dnr_plugin.reports.comparison_report import check_output, comparison_table, notes, write_comparison

    output = Path(arguments.output) if arguments.output else None
    if output is not None:
        check_output(output)
    comparison = compare_runs(arguments.folders)
    written = []
    if output is not None:
        write_comparison(output, comparison)
        written.append(f"Written to {output}: compare.html, compare.json, compare.md")
    show(comparison_table(comparison), *(f"- {note}" for note in notes(comparison)), *written)
    return DONE
