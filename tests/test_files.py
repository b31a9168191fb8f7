"""Files and folders: names that files hold stay inside their folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dnr_plugin.cli.main import main
from dnr_plugin.errors import InputError
from dnr_plugin.files import contents, inside, locked, read_json, read_json_lines


@pytest.mark.parametrize("name", ["a", "a/b", "a b", "..a", "a/../b"])
def test_names_inside(name: str, tmp_path: Path) -> None:
    assert inside(tmp_path, name, tmp_path / "list.json") == name


@pytest.mark.parametrize("name", ["..", "../other", "a/../../b", "/etc", "", ".", "a/..", 3, None, ["a"], "out/x"])
def test_names_that_lead_out(name: Any, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "out").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"list\.json: expected names of folders in"):
        inside(tmp_path / "sweep", name, Path("list.json"))


@pytest.mark.parametrize("field", ["folder", "dense"])
def test_a_sweep_writes_and_reads_in_its_own_folder_alone(
    field: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, other = tmp_path / "sweep", tmp_path / "other"
    sweep.mkdir()
    other.mkdir()
    (other / "report.json").write_text("{}")
    run = {"folder": "a", "dense": None, "values": ["0.5"], "recipe": {}} | {field: "../other"}
    (sweep / "sweep.json").write_text(json.dumps({"runs": [run]}))
    vary = ["sweep", str(tiny), "--vary", "prune.target.flops=0.5", "--output", str(sweep), "--resume"]
    for command in (vary, ["compare", str(sweep)] if field == "folder" else vary):
        assert main(command) == 2
        assert capsys.readouterr().err.startswith(f"dnr: {sweep / 'sweep.json'}: expected names of folders in {sweep}")
    assert [path.name for path in other.iterdir()] == ["report.json"]
    assert [path.name for path in sweep.iterdir()] == ["sweep.json"]


def test_a_lock_takes_what_a_kill_has_left_and_nothing_else(tmp_path: Path) -> None:
    for name in (".report.json.ab12.dnr-tmp", ".mine.tmp", "report.json"):
        (tmp_path / name).touch()
    assert sorted(path.name for path in contents(tmp_path)) == [".mine.tmp", "report.json"]
    with locked(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "report.json"]
    assert contents(tmp_path / "nowhere") == []


def test_json_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for content in (b"{", b"\xff", b"[" * 100_000, b"9" * 10_000):
        file.write_bytes(content)
        with pytest.raises(InputError, match="found damage") as caught:
            read_json(file)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path)
    file.write_text('{"a": 1}\n{"b": 2}\n{"cut')
    assert read_json_lines(file) == [{"a": 1}, {"b": 2}]
    file.write_text('{"a": 1}\nx\n')
    with pytest.raises(InputError, match=r"a\.json:2: expected JSON"):
        read_json_lines(file)
