"""The ``dnr`` command: arguments in, exit codes out."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence

from dnr_plugin.cli import bench_commands, recipe_commands, result_commands
from dnr_plugin.cli.output import BAD_INPUT, FAILED, TARGET_MISSED, TERMINATED
from dnr_plugin.errors import InputError, RunError, TargetError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments after the program's name; ``sys.argv`` by default.

    Returns:
        0 done; 2 the input is wrong (one line per problem on stderr); 3 the target was not reached, what was reached is
        saved; 143 it was terminated (SIGTERM); 1 anything else, also where it was interrupted (SIGINT).
    """
    hint = ""  # of an option that the command has
    try:
        with _terminable(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            # what torch says about itself, and what the report says anyway
            warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
            warnings.filterwarnings("ignore", message=".* is left alone")
            arguments = _parser().parse_args(argv)
            if hasattr(arguments, "resume"):
                hint = "; add --resume to go on after the last finished epoch"
            if argv is None and hasattr(arguments, "keeps_memory"):  # in a process of its own
                from dnr_plugin.devices import keep_memory

                keep_memory()
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
        print(f"dnr: interrupted{hint}", file=sys.stderr)
        return FAILED
    except _Terminated:
        print(f"dnr: terminated{hint}", file=sys.stderr)
        return TERMINATED
    except OSError as error:
        print(
            f"dnr: {error}{'; with space and access restored, add --resume to go on' if hint else ''}", file=sys.stderr
        )
        return FAILED
    except RunError as error:
        print(f"dnr: {error}", file=sys.stderr)
        return FAILED


_AGAIN = 0.5  # seconds after which a signal that was not heeded is raised again


class _Terminated(BaseException):
    """SIGTERM came. No ``except Exception`` on the way swallows it."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM and SIGINT end what runs inside: files half written go, locks are let go of.

    What a signal raises inside a finaliser, Python prints and forgets: until it is heeded it is raised again.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may say what signals do
        yield
        return
    errors: dict[int, BaseException] = {signal.SIGTERM: _Terminated(), signal.SIGINT: KeyboardInterrupt()}
    raised: list[BaseException] = []
    timed = hasattr(signal, "setitimer")  # not on Windows

    def stop(number: int, frame: object) -> None:
        raised.append(errors.get(number, raised[-1] if raised else KeyboardInterrupt()))
        if timed:  # later each time, lest it keeps step with what swallows it
            signal.setitimer(signal.ITIMER_REAL, _AGAIN * 1.2 ** len(raised))
        raise raised[-1]

    def ignored(problem: sys.UnraisableHookArgs) -> None:
        if problem.exc_value not in raised:
            told(problem)

    numbers = [*errors, *([signal.SIGALRM] if timed else [])]
    before = {number: signal.signal(number, stop) for number in numbers}
    told, sys.unraisablehook = sys.unraisablehook, ignored
    try:
        yield
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = told
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _show_warning(message: Warning | str, *args: object, **kwargs: object) -> None:
    print(f"dnr: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dnr",
        description="Compress convolutional networks by their dying neurons.",
        epilog="Exit codes: 0 done; 2 the input is wrong; 3 the target was not reached (what was is saved); 143 "
        "terminated; 1 other.",
    )
    from importlib.metadata import version

    parser.add_argument("--version", action="version", version=f"dnr_plugin {version('dnr_plugin')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for family in (recipe_commands, result_commands, bench_commands):
        family.register(commands)
    return parser
