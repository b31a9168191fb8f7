"""Commands that must be refused."""

from __future__ import annotations

import pytest

from dnr_plugin.cli.main import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must end with exit code 2; returns stderr."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert all(line.startswith("dnr: ") for line in captured.err.splitlines())
    return captured.err
