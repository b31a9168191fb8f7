"""Commands on a recipe: run, sweep, check, plan, recipes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dnr_plugin.cli.arguments import (
    Commands,
    command,
    computes,
    recipe_file,
    recipe_of,
    takes_device,
    takes_recipe,
)
from dnr_plugin.cli.output import DONE, show, track
from dnr_plugin.errors import InputError, TargetError, did_you_mean


def register(commands: Commands) -> None:
    """Adds the commands of this family."""
    run = command(commands, "run", _run, "train, remove, fine-tune and report, as a recipe says")
    takes_recipe(run)
    run.add_argument("--output", metavar="DIR", help="folder of the run; default: runs/<recipe name>")
    run.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    takes_device(run)

    sweep = command(commands, "sweep", _sweep, "run a recipe once for each combination of values, then compare")
    takes_recipe(sweep)
    sweep.add_argument(
        "--vary", metavar="a.b=v1,v2,...", action="append", required=True,
        help="an option and the values it takes; may be repeated for all combinations",
    )  # fmt: skip
    sweep.add_argument("--output", metavar="DIR", help="folder of the runs' folders; default: sweeps/<recipe name>")
    sweep.add_argument("--resume", action="store_true", help="go on with the sweep in the folder; values may be added")
    takes_device(sweep)

    check = command(commands, "check", _check, "validate a recipe, its data and its target, without training")
    takes_recipe(check)

    plan = command(
        commands, "plan", _plan, "show what would be removed, layer by layer; writes nothing, trains nothing"
    )
    takes_recipe(plan)
    takes_device(plan)
    computes(run, sweep, plan)

    recipes = command(commands, "recipes", _recipes, "list the shipped recipes, print one, or explain every option")
    recipes.add_argument("name", nargs="?", metavar="NAME", help="a recipe to print, or: options")


def _run(arguments: argparse.Namespace) -> int:
    from dnr_plugin.reports.run_report import facts, summary_table
    from dnr_plugin.runs.run import run_recipe

    with recipe_of(arguments) as recipe:
        output = Path(arguments.output) if arguments.output else Path("runs") / recipe.name
        report = run_recipe(recipe, output, resume=arguments.resume, device=arguments.device, track=track)
    written = f"Written to {output}: report.html, report.json, model.safetensors"
    show(summary_table(report), *(f"- {fact}" for fact in facts(report)), written)
    target, stopped = report["target"], (report["dynamics"] or {}).get("stopped")
    if not target["reached"]:
        raise TargetError(
            f"{target['kind']}: {target['requested']} was asked, {target['achieved']:.4f} was reached and is saved"
            + (f"; removal stopped, since {stopped}" if stopped else ""),
            target["achieved"],
        )
    return DONE


def _sweep(arguments: argparse.Namespace) -> int:
    from dnr_plugin.runs.sweep import run_sweep

    def say(text: str) -> None:
        if sys.stderr.isatty():
            print(text, file=sys.stderr)

    outcome = run_sweep(
        recipe_file(arguments.recipe), arguments.overrides, arguments.vary,
        Path(arguments.output) if arguments.output else None,
        resume=arguments.resume, device=arguments.device, track=track, say=say,
    )  # fmt: skip
    show(f"Written to {outcome.folder}: {', '.join(outcome.reports) or 'no finished run'}")
    outcome.raise_problems()
    return DONE


def _check(arguments: argparse.Namespace) -> int:
    from dnr_plugin.runs.checks import check_images, check_recipe

    with recipe_of(arguments) as recipe:
        check_recipe(recipe)
        check_images(recipe)
    show(f"{recipe_file(arguments.recipe)}: fine")
    return DONE


def _plan(arguments: argparse.Namespace) -> int:
    from dnr_plugin.reports.layer_report import layer_table
    from dnr_plugin.runs.preview import plan_recipe

    with recipe_of(arguments) as recipe:
        plan, rows, missed = plan_recipe(recipe, arguments.device, track)
    if plan is None:
        show(layer_table(rows, f"{recipe.name}: as it is"), "- Mode watch removes nothing.")
        return DONE
    notes = [f"{layer} is left alone: {reason}." for layer, reason in plan.skipped]
    if recipe.model.checkpoint is None:
        notes.append("Weights are untrained: after training, other neurons go and layers may shrink differently.")
    if plan.predicted is not None:
        notes.insert(0, f"Times of layers predict {plan.predicted:.4f}.")
    if plan.round_to is not None and recipe.prune.round_to != plan.round_to:
        notes.insert(0, f"Layers keep multiples of {plan.round_to} channels, as measured.")
    runtime = f" in {recipe.prune.runtime}" if recipe.prune.runtime != "eager" and plan.predicted is not None else ""
    show(
        layer_table(rows, f"{recipe.name}: what would be removed"),
        f"- {plan.removed} of {plan.neurons} neurons would go; {plan.dead} are dead.",
        f"- Target {plan.kind}{runtime}: {plan.requested:g} requested, {plan.achieved:.4f} achieved.",
        *(f"- {note}" for note in notes),
    )
    if missed is not None:
        raise missed
    return DONE


def _recipes(arguments: argparse.Namespace) -> int:
    from dnr_plugin.recipe.load import load_recipe, shipped_recipes
    from dnr_plugin.recipe.schema_wording import option_reference

    shipped = shipped_recipes()
    if arguments.name == "options":
        show(option_reference().rstrip("\n"))
    elif arguments.name is None:
        width = max(map(len, shipped))
        listed = [f"{name:{width}}  {load_recipe(file).description}" for name, file in shipped.items()]
        show(*listed, "\ndnr recipes NAME prints one; dnr recipes options explains every option.")
    elif arguments.name in shipped:
        show(shipped[arguments.name].read_text(encoding="utf-8").rstrip("\n"))
    else:
        raise InputError(
            f"recipes: expected options or one of {', '.join(shipped)}, found {arguments.name!r}"
            f"{did_you_mean(arguments.name, shipped)}"
        )
    return DONE
