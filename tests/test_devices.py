"""What a process of the command line does with memory, and how that is named."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from helpers.common import ROOT

from dnr_plugin.cli.main import _parser
from dnr_plugin.devices import device_name, has_bfloat16

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is kept by glibc alone")
# What is held of 256 MiB once they are freed, and how the device is named.
FREED = """
import pathlib, torch
from dnr_plugin import devices
def held():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
print(devices.keep_memory() if {keep} else None)
before = held()
large = torch.ones(2**26)
del large
print(held() - before, devices.device_name(torch.device("cpu")))
"""


def in_a_process(code: str, *arguments: str, **variables: str) -> list[str]:
    allocator = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(allocator)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment | variables, cwd=ROOT, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


@glibc
@pytest.mark.parametrize("keep", [True, False])
def test_freed_memory_is_kept_where_it_is_asked_for(keep: bool) -> None:
    answer, freed = in_a_process(FREED.format(keep=keep))
    held, name = freed.split(" ", 1)
    assert answer == ("True" if keep else "None")
    assert (int(held) > 2**27) is keep
    assert name.endswith(" threads, memory kept)" if keep else " threads)")


@glibc
def test_what_the_environment_says_is_left_and_named() -> None:
    answer, freed = in_a_process(FREED.format(keep=True), MALLOC_TOP_PAD_="4096", LD_PRELOAD="")
    assert answer == "False"
    assert freed.endswith("threads, MALLOC_TOP_PAD_=4096)")


KEEPS = """
from dnr_plugin import devices
from dnr_plugin.cli.main import main
code = main({arguments})
print(code, devices._memory_kept)
"""


@glibc
@pytest.mark.parametrize(
    ("arguments", "own", "kept"),
    [
        (["plan", "quickstart"], True, True),
        (["plan", "quickstart"], False, False),  # called by a program, whose memory is not ours
        (["check", "quickstart"], True, False),  # computes nothing
    ],
)
def test_commands_that_compute_keep_it_in_a_process_of_their_own(arguments: list[str], own: bool, kept: bool) -> None:
    lines = in_a_process(KEEPS.format(arguments="" if own else arguments), *arguments)
    assert lines[-1] == f"0 {kept}"


def test_overhead_tells_how_much_memory_is_held() -> None:
    """So that it must not keep what was freed."""
    keeps = {
        words: hasattr(_parser().parse_args([*words.split(), *rest]), "keeps_memory")
        for words, rest in (
            ("run", ["r"]), ("sweep", ["r", "--vary", "a=1"]), ("plan", ["r"]), ("bench latency", []),
            ("bench criteria", ["r", "--output", "o"]), ("bench sensitivity", ["r", "--output", "o"]),
            ("bench overhead", []), ("bench zoo", []), ("check", ["r"]), ("compare", ["r"]),
        )
    }  # fmt: skip
    assert [words for words, does in keeps.items() if not does] == ["bench overhead", "bench zoo", "check", "compare"]


def test_a_gpu_is_not_asked_for_instructions_of_a_cpu() -> None:
    assert has_bfloat16(torch.device("cuda")) is False
    assert isinstance(has_bfloat16(torch.device("cpu")), bool)
    assert device_name(torch.device("cpu")).startswith("CPU (")
