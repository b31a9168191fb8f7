"""Commands that measure: one function a benchmark."""

from __future__ import annotations

import argparse
import json

from dnr_plugin.cli.arguments import (
    Commands,
    command,
    computes,
    family,
    positive,
    recipe_of,
    several,
    takes_device,
    takes_recipe,
)
from dnr_plugin.cli.output import DONE, show, track


def register(commands: Commands) -> None:
    """Adds ``bench`` and its benchmarks."""
    benches = family(commands, "bench", "measure things side by side", "benchmarks", "BENCHMARK")

    overhead = command(benches, "overhead", _overhead, "what observing, scoring, planning and repair cost")
    overhead.add_argument("networks", metavar="NETWORK", nargs="*", default=["resnet18"],
                          help="as recipes name them, also torchvision.NAME; default: resnet18")  # fmt: skip
    overhead.add_argument("--width", metavar="N,N,...", type=several, default=[64],
                          help="of the package's networks; default: 64")  # fmt: skip
    overhead.add_argument("--images", metavar="N,N,...", type=several, default=[256],
                          help="to observe and repair with; default: 256")  # fmt: skip
    overhead.add_argument("--side", type=positive, help="of the images, in pixels; default: 32, of torchvision's 224")
    overhead.add_argument("--batch", type=positive, help="images of a training step; default: 64, of large images 8")
    overhead.add_argument("--rounds", type=positive, help="timed training steps; default: 15, of large images 3")
    overhead.add_argument("--json", action="store_true", help="print JSON")
    overhead.add_argument("--output", metavar="DIR", help="folder of a table and a plot of cost against size")
    takes_device(overhead)

    latency = command(benches, "latency", _latency, "latency asked of a plan against what comes out, and its FLOPs")
    latency.add_argument("networks", metavar="NETWORK", nargs="*", default=["resnet18"],
                         help="as recipes name them, also torchvision.NAME; default: resnet18")  # fmt: skip
    latency.add_argument("--width", metavar="N", type=positive, default=64,
                         help="of the package's networks; default: 64")  # fmt: skip
    latency.add_argument("--side", type=positive, help="of the images, in pixels; default: 32, of torchvision's 224")
    latency.add_argument("--batch", metavar="N,N,...", type=several, default=[1, 32], help="default: 1,32")
    latency.add_argument("--runtimes", metavar="A,B,...", default="eager", help="default: eager")
    latency.add_argument("--levels", metavar="X,X,...", default="0.75,0.5,0.25",
                         help="shares of the latency to keep; default: 0.75,0.5,0.25")  # fmt: skip
    latency.add_argument("--output", metavar="DIR", help="folder of latency.json, latency.md and latency.png")
    takes_device(latency)

    criteria = command(benches, "criteria", _criteria, "every criterion of Torch-Pruning against every score")
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

    sensitivity = command(benches, "sensitivity", _sensitivity, "accuracy with a share of one layer removed")
    takes_recipe(sensitivity)
    sensitivity.add_argument("--output", metavar="DIR", required=True, help="folder; may be that of bench criteria")
    sensitivity.add_argument("--shares", metavar="X,X,...", help="of a layer; default: 0.25,0.5,0.75,0.9")
    takes_device(sensitivity)
    computes(latency, criteria, sensitivity)  # not overhead, which tells how much memory is held

    zoo = command(benches, "zoo", _zoo, "prune networks of torchvision and others as their packages build them")
    zoo.add_argument("networks", metavar="NETWORK", nargs="*", default=["torchvision.*"],
                     help="names or patterns; default: torchvision.*")  # fmt: skip
    zoo.add_argument("--list", action="store_true", help="print the names, and do nothing else")
    zoo.add_argument("--flops", type=float, default=0.5, help="share that is to remain; default: 0.5")
    zoo.add_argument("--seconds", type=float, default=120.0, help="that a network may take; default: 120")
    zoo.add_argument("--output", metavar="DIR", help="folder of zoo.json and zoo.md; by default nothing is written")
    zoo.add_argument("--resume", action="store_true", help="go on with the zoo in the folder")


def _overhead(arguments: argparse.Namespace) -> int:
    from dnr_plugin.benchmarks.growth import FILE, growth_table, write_growth
    from dnr_plugin.benchmarks.options import check_output
    from dnr_plugin.benchmarks.overhead import measured

    folder = check_output(arguments.output, FILE) if arguments.output is not None else None
    setting = {key: getattr(arguments, key) for key in ("side", "batch", "rounds")}
    results = []
    for result in measured(
        arguments.networks, arguments.width, arguments.images, setting, arguments.device, track
    ):  # fmt: skip
        results.append(result)
        if folder is not None:  # after each, so that nothing is lost
            write_growth(results, folder)
        if not arguments.json:
            show(*result.tables(), *(f"- {note}" for note in result.notes()))
    if arguments.json:
        show(json.dumps([result.as_dict() for result in results], indent=1))
        return DONE
    if len(results) > 1:
        show(growth_table(results))
    if folder is not None:
        show(f"Written to {arguments.output}: overhead.json, overhead.md, overhead.png")
    return DONE


def _latency(arguments: argparse.Namespace) -> int:
    from dnr_plugin.benchmarks.latency import (
        FILE,
        latencies_asked,
        latency_table,
        notes,
        runtimes_of,
        write_latencies,
    )
    from dnr_plugin.benchmarks.options import check_output, shares

    levels, runtimes = shares("--levels", arguments.levels, "the latency"), runtimes_of(arguments.runtimes)
    folder = check_output(arguments.output, FILE) if arguments.output is not None else None
    setting = {"width": arguments.width, "side": arguments.side}
    results = []
    for result in latencies_asked(
        arguments.networks, runtimes, arguments.batch, levels, setting, arguments.device, track
    ):  # fmt: skip
        results.append(result)
        if folder is not None:  # after each, so that nothing is lost
            write_latencies(results, folder, arguments.device)
    show(latency_table(results), *(f"- {note}" for note in notes(results, arguments.device)))
    if folder is not None:
        show(f"Written to {arguments.output}: latency.json, latency.md, latency.png")
    return DONE


def _sensitivity(arguments: argparse.Namespace) -> int:
    from dnr_plugin.benchmarks.sensitivity import run_sensitivity, sensitivity_table, shares_of

    shares = shares_of(arguments.shares)
    with recipe_of(arguments) as recipe:
        result = run_sensitivity(recipe, arguments.output, shares, device=arguments.device, track=track)
    show(sensitivity_table(result), f"Written to {arguments.output}: sensitivity.md, sensitivity.json, sensitivity.png")
    return DONE


def _criteria(arguments: argparse.Namespace) -> int:
    from dnr_plugin.benchmarks.criteria.grid import grid_of
    from dnr_plugin.benchmarks.criteria.run import run_criteria
    from dnr_plugin.benchmarks.criteria.tables import notes, tables

    grid = grid_of(arguments.seeds, arguments.levels, arguments.scopes, arguments.criteria)
    with recipe_of(arguments) as recipe:
        result = run_criteria(
            recipe, arguments.output, grid,
            finetune=arguments.finetune, resume=arguments.resume, device=arguments.device, track=track,
        )  # fmt: skip
    written = f"Written to {arguments.output}: criteria.md, criteria.json, criteria.png, cells.jsonl"
    show(*tables(result), *(f"- {note}" for note in notes(result)), written)
    return DONE


def _zoo(arguments: argparse.Namespace) -> int:
    from dnr_plugin.benchmarks.zoo.networks import chosen
    from dnr_plugin.benchmarks.zoo.run import run_zoo, zoo_table

    if arguments.list:
        show("\n".join(entry.name for entry in chosen(arguments.networks)))
        return DONE
    result = run_zoo(
        arguments.networks, flops=arguments.flops, seconds=arguments.seconds, output=arguments.output,
        resume=arguments.resume, track=track,
    )  # fmt: skip
    show(zoo_table(result))
    if arguments.output is not None:
        show(f"Written to {arguments.output}: zoo.json, zoo.md")
    return DONE
