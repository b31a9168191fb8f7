"""The ``dnr`` command: arguments in, exit codes out."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .errors import InputError, RunError, TargetError

DONE, FAILED, BAD_INPUT, TARGET_MISSED = 0, 1, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments after the program's name; ``sys.argv`` by default.

    Returns:
        0 done; 2 the input is wrong (one line per problem on stderr); 3 the target was not reached, what was reached is
        saved; 1 anything else.
    """
    arguments = _parser().parse_args(argv)
    # what torch says about itself, and what the report says anyway
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", message=".* is left alone")
    try:
        code: int = arguments.command(arguments)
        return code
    except InputError as error:
        for problem in error.problems:
            print(f"dnr: {problem}", file=sys.stderr)
        return BAD_INPUT
    except TargetError as error:
        print(f"dnr: {error}", file=sys.stderr)
        return TARGET_MISSED
    except KeyboardInterrupt:
        print("dnr: interrupted; add --resume to go on after the last finished epoch", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"dnr: {error}; with space and access restored, add --resume to go on", file=sys.stderr)
        return FAILED
    except RunError as error:
        print(f"dnr: {error}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dnr",
        description="Compress convolutional networks by their dying neurons.",
        epilog="Exit codes: 0 done; 2 the input is wrong; 3 the target was not reached (what was is saved); 1 other.",
    )
    from importlib.metadata import version

    parser.add_argument("--version", action="version", version=f"dnr_plugin {version('dnr_plugin')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, to: Any = commands
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = to.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(command=run)
        return sub

    def takes_recipe(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe (dnr recipes)")
        sub.add_argument(
            "--set", metavar="a.b=value", action="append", default=[], dest="overrides",
            help="override an option; may be repeated",
        )  # fmt: skip

    def takes_device(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")

    def takes_saved(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--input", metavar="CxHxW", help="shape of one image; default: the builder's, else 3x224x224")
        sub.add_argument(
            "--allow-import", action="store_true", help="let a saved model call the module:function that built it"
        )

    run = command("run", _run, "train, remove, fine-tune and report, as a recipe says")
    takes_recipe(run)
    run.add_argument("--output", metavar="DIR", help="folder of the run; default: runs/<recipe name>")
    run.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    takes_device(run)

    sweep = command("sweep", _sweep, "run a recipe once for each combination of values, then compare")
    takes_recipe(sweep)
    sweep.add_argument(
        "--vary", metavar="a.b=v1,v2,...", action="append", required=True,
        help="an option and the values it takes; may be repeated for all combinations",
    )  # fmt: skip
    sweep.add_argument("--output", metavar="DIR", help="folder of the runs' folders; default: sweeps/<recipe name>")
    sweep.add_argument("--resume", action="store_true", help="go on with the sweep in the folder; values may be added")
    takes_device(sweep)

    check = command("check", _check, "validate a recipe, its data and its target, without training")
    takes_recipe(check)

    plan = command("plan", _plan, "show what would be removed, layer by layer; writes nothing, trains nothing")
    takes_recipe(plan)
    takes_device(plan)

    report = command("report", _report, "show FLOPs and parameters per layer, dense against pruned")
    report.add_argument("folder", metavar="RUN_OR_MODEL", help="folder of a run, or one written by save_pruned")
    report.add_argument("--format", choices=("table", "markdown", "json"), default="table", help="default: table")
    takes_saved(report)

    export = command("export", _export, "write the pruned model as one file, checked against its outputs")
    export.add_argument("folder", metavar="RUN", help="folder of a finished run, or one written by save_pruned")
    export.add_argument(
        "--format", choices=("onnx", "torch"), required=True,
        help='onnx, which needs: pip install "dnr_plugin[export]"; torch: for torch.export.load',
    )  # fmt: skip
    export.add_argument("--output", metavar="FILE", required=True, help="a file that does not exist yet")
    takes_saved(export)

    compare = command("compare", _compare, "show finished runs side by side, and what tells them apart")
    compare.add_argument("folders", metavar="RUN", nargs="+", help="folder of a finished run, or of a sweep")
    compare.add_argument("--output", metavar="DIR", help="write tables and plots there; by default nothing is written")

    recipes = command("recipes", _recipes, "list the shipped recipes, print one, or explain every option")
    recipes.add_argument("name", nargs="?", metavar="NAME", help="a recipe to print, or: options")

    text = "measure things side by side"
    bench = commands.add_parser("bench", help=text, description=text[0].upper() + text[1:] + ".")
    benches = bench.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)

    overhead = command("overhead", _bench_overhead, "what observing and scoring cost, in one process", benches)
    overhead.add_argument("--width", type=_positive, default=64, help="of ResNet-18; default: 64")
    overhead.add_argument("--batch", type=_positive, default=64, help="images per training step; default: 64")
    overhead.add_argument("--rounds", type=_positive, default=15, help="timed rounds of each; default: 15")
    overhead.add_argument("--images", type=_positive, default=256, help="that criteria and repair see; default: 256")
    overhead.add_argument("--side", type=_positive, default=32, help="of these images, in pixels; default: 32")
    overhead.add_argument("--json", action="store_true", help="print JSON")
    takes_device(overhead)

    criteria = command("criteria", _bench_criteria, "every criterion of Torch-Pruning against every score", benches)
    takes_recipe(criteria)
    criteria.add_argument("--output", metavar="DIR", required=True, help="folder of the benchmark")
    criteria.add_argument("--seeds", metavar="N,N,...", help="one dense network each; default: 0,1,2")
    criteria.add_argument(
        "--levels", metavar="X,X,...", help="shares of the FLOPs that are kept; default: 0.75,0.5,0.35,0.25,0.15"
    )
    criteria.add_argument("--scopes", metavar="A,B,...", help="default: local,global,isomorphic")
    criteria.add_argument("--criteria", metavar="A,B,...", help="default: all")
    criteria.add_argument("--finetune", action="store_true", help="also fine-tune each network, as the recipe says")
    criteria.add_argument(
        "--resume", action="store_true", help="go on with the benchmark in the folder; the lists may be others"
    )
    takes_device(criteria)

    sensitivity = command("sensitivity", _bench_sensitivity, "accuracy with a share of one layer removed", benches)
    takes_recipe(sensitivity)
    sensitivity.add_argument("--output", metavar="DIR", required=True, help="folder; may be that of bench criteria")
    sensitivity.add_argument("--shares", metavar="X,X,...", help="of a layer; default: 0.25,0.5,0.75,0.9")
    takes_device(sensitivity)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _show(*parts: Any) -> None:
    """Prints text and tables; a reader of the pipe who has seen enough, such as head, is no error."""
    from rich.console import Console

    class Pipe(Console):
        def on_broken_pipe(self) -> None:  # rich would end the program, and with it the exit code
            raise BrokenPipeError

    try:
        # a file or pipe has no width, and the 80 columns that rich would take for it break wide tables
        console = Pipe(width=None if sys.stdout.isatty() else 250)
        for part in parts:
            if isinstance(part, str):
                print(part)
            else:
                console.print(part)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _recipe_file(name: str) -> str:
    """A file as it is, or else the shipped recipe of that name."""
    from .recipe import shipped_recipes

    if os.path.exists(name) or name.endswith((".yaml", ".yml")) or name not in shipped_recipes():
        return name
    return str(shipped_recipes()[name])


def _track(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    """A progress bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, description=what, total=total, console=console, transient=True, disable=not console.is_terminal)


def _run(arguments: argparse.Namespace) -> int:
    from .recipe import load_recipe, located
    from .report import facts, summary_table
    from .run import run_recipe

    file = _recipe_file(arguments.recipe)
    recipe = load_recipe(file, arguments.overrides)
    output = Path(arguments.output) if arguments.output else Path("runs") / recipe.name
    try:
        report = run_recipe(recipe, output, resume=arguments.resume, device=arguments.device, track=_track)
    except InputError as error:
        raise located(error, file, arguments.overrides) from None
    written = f"Written to {output}: report.html, report.json, model.safetensors"
    _show(summary_table(report), *(f"- {fact}" for fact in facts(report)), written)
    target, stopped = report["target"], (report["dynamics"] or {}).get("stopped")
    if not target["reached"]:
        raise TargetError(
            f"{target['kind']}: {target['requested']} was asked, {target['achieved']:.4f} was reached and is saved"
            + (f"; removal stopped, since {stopped}" if stopped else ""),
            target["achieved"],
        )
    return DONE


def _sweep(arguments: argparse.Namespace) -> int:
    from .sweep import run_sweep

    def say(text: str) -> None:
        if sys.stderr.isatty():
            print(text, file=sys.stderr)

    outcome = run_sweep(
        _recipe_file(arguments.recipe), arguments.overrides, arguments.vary,
        Path(arguments.output) if arguments.output else None,
        resume=arguments.resume, device=arguments.device, track=_track, say=say,
    )  # fmt: skip
    _show(f"Written to {outcome.folder}: {', '.join(outcome.reports) or 'no finished run'}")
    outcome.raise_problems()
    return DONE


def _check(arguments: argparse.Namespace) -> int:
    from .checks import check_recipe
    from .recipe import load_recipe, located

    file = _recipe_file(arguments.recipe)
    recipe = load_recipe(file, arguments.overrides)
    try:
        check_recipe(recipe)
    except InputError as error:
        raise located(error, file, arguments.overrides) from None
    _show(f"{file}: fine")
    return DONE


def _plan(arguments: argparse.Namespace) -> int:
    from .recipe import load_recipe, located
    from .report import layer_table
    from .run import plan_recipe

    file = _recipe_file(arguments.recipe)
    recipe = load_recipe(file, arguments.overrides)
    try:
        plan, rows, missed = plan_recipe(recipe, arguments.device, _track)
    except InputError as error:
        raise located(error, file, arguments.overrides) from None
    if plan is None:
        _show(layer_table(rows, f"{recipe.name}: as it is"), "- Mode watch removes nothing.")
        return DONE
    notes = [f"{layer} is left alone: {reason}." for layer, reason in plan.skipped]
    if recipe.model.checkpoint is None:
        notes.append("Weights are untrained: after training, other neurons go and layers may shrink differently.")
    _show(
        layer_table(rows, f"{recipe.name}: what would be removed"),
        f"- {plan.removed} of {plan.neurons} neurons would go; {plan.dead} are dead.",
        f"- Target {plan.kind}: {plan.requested:g} requested, {plan.achieved:.4f} achieved.",
        *(f"- {note}" for note in notes),
    )
    if missed is not None:
        raise missed
    return DONE


def _report(arguments: argparse.Namespace) -> int:
    from . import report

    folder = Path(arguments.folder)
    if (folder / "report.json").is_file():
        try:
            found = json.loads((folder / "report.json").read_text())
            tables = [report.summary_table(found), report.layer_table(found["layers"], "layers")]
            notes, text = report.facts(found), report.markdown(found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{folder / 'report.json'}: expected the report of a run, found damage: {error!r}"
            ) from error
    else:
        found, notes = report.report_model(folder, arguments.input, arguments.allow_import)
        tables = [report.layer_table(found["layers"], str(folder))]
        text = "\n".join([*report.layer_markdown(found["layers"]), "", *(f"- {note}" for note in notes)])
    if arguments.format == "json":
        _show(json.dumps(found, indent=1))
    elif arguments.format == "markdown":
        _show(text.rstrip("\n"))
    else:
        _show(*tables, *(f"- {note}" for note in notes))
    return DONE


def _export(arguments: argparse.Namespace) -> int:
    from .export import BATCHES, export_model

    difference = export_model(
        arguments.folder, arguments.output, format=arguments.format, shape=arguments.input,
        allow_import=arguments.allow_import,
    )  # fmt: skip
    batches = " and ".join(map(str, BATCHES))
    _show(
        f"Written to {arguments.output}; on random images in batches of {batches} its outputs differ from the "
        f"model's by at most {difference:.1e} of the largest."
    )
    return DONE


def _compare(arguments: argparse.Namespace) -> int:
    from .compare import check_output, compare_runs, comparison_table, notes, write_comparison

    output = Path(arguments.output) if arguments.output else None
    if output is not None:
        check_output(output)
    comparison = compare_runs(arguments.folders)
    written = []
    if output is not None:
        write_comparison(output, comparison)
        written.append(f"Written to {output}: compare.html, compare.json, compare.md")
    _show(comparison_table(comparison), *(f"- {note}" for note in notes(comparison)), *written)
    return DONE


def _recipes(arguments: argparse.Namespace) -> int:
    from .errors import did_you_mean
    from .recipe import load_recipe, option_reference, shipped_recipes

    shipped = shipped_recipes()
    if arguments.name == "options":
        _show(option_reference().rstrip("\n"))
    elif arguments.name is None:
        width = max(map(len, shipped))
        listed = [f"{name:{width}}  {load_recipe(file).description}" for name, file in shipped.items()]
        _show(*listed, "\ndnr recipes NAME prints one; dnr recipes options explains every option.")
    elif arguments.name in shipped:
        _show(shipped[arguments.name].read_text(encoding="utf-8").rstrip("\n"))
    else:
        raise InputError(
            f"recipes: expected options or one of {', '.join(shipped)}, found {arguments.name!r}"
            f"{did_you_mean(arguments.name, shipped)}"
        )
    return DONE


def _bench_overhead(arguments: argparse.Namespace) -> int:
    from .bench import costs, overhead

    found = overhead(width=arguments.width, batch=arguments.batch, rounds=arguments.rounds, device=arguments.device)
    found["criteria"] = costs(
        width=arguments.width, images=arguments.images, side=arguments.side, device=arguments.device
    )
    lines = [*found["lines"], *found["criteria"]["lines"]]
    _show(json.dumps(found, indent=1) if arguments.json else "\n".join(lines))
    return DONE


def _bench_sensitivity(arguments: argparse.Namespace) -> int:
    from rich.table import Table

    from .bench_sensitivity import run_sensitivity, shares_of, table
    from .recipe import load_recipe, located

    file = _recipe_file(arguments.recipe)
    shares = shares_of(arguments.shares)
    recipe = load_recipe(file, arguments.overrides)
    try:
        result = run_sensitivity(recipe, arguments.output, shares, device=arguments.device, track=_track)
    except InputError as error:
        raise located(error, file, arguments.overrides) from None
    head, *rows = table(result)
    shown = Table(*head, title=f"accuracy in %, as it is / repaired; dense {100 * result['dense']:.2f}")
    for row in rows:
        shown.add_row(*row)
    _show(shown, f"Written to {arguments.output}: sensitivity.md, sensitivity.json, sensitivity.png")
    return DONE


def _bench_criteria(arguments: argparse.Namespace) -> int:
    from .bench_criteria import grid_of, run_criteria
    from .bench_tables import notes, terminal_tables
    from .recipe import load_recipe, located

    file = _recipe_file(arguments.recipe)
    grid = grid_of(arguments.seeds, arguments.levels, arguments.scopes, arguments.criteria)
    recipe = load_recipe(file, arguments.overrides)
    try:
        result = run_criteria(
            recipe, arguments.output, grid,
            finetune=arguments.finetune, resume=arguments.resume, device=arguments.device, track=_track,
        )  # fmt: skip
    except InputError as error:
        raise located(error, file, arguments.overrides) from None
    written = f"Written to {arguments.output}: criteria.md, criteria.json, criteria.png, cells.jsonl"
    _show(*terminal_tables(result), *(f"- {note}" for note in notes(result)), written)
    return DONE
