"""Times of layers: what is measured, kept, and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.layer_times import Measured, stairs
from torch import nn

from dnr_plugin.errors import RunError
from dnr_plugin.pruning import latency_table
from dnr_plugin.pruning.latency import layer_shapes
from dnr_plugin.pruning.latency_table import LatencyTable, LayerShape, table_file

timed_layers = latency_table.timed_layers  # as it is without the fixture that makes times up
CPU = torch.device("cpu")
LINEAR = LayerShape("Linear", (("bias", True),), (8, 4), (2,))
WIDE = LINEAR.with_channels(64, 32)


def test_a_layer_is_measured_once(tmp_path: Path) -> None:
    """Also by a table that reads the file of another."""
    measured, file = Measured(stairs(1)), tmp_path / "cache" / "times.json"
    table = LatencyTable(CPU, file, measure=measured)
    table.require([LINEAR, WIDE, LINEAR])
    table.require([WIDE])
    assert measured.asked == [LINEAR, WIDE]
    assert table.seconds(WIDE) == pytest.approx(stairs(1)(WIDE))
    again = LatencyTable(CPU, file, measure=measured)
    again.require([LINEAR, WIDE])
    assert (again.seconds(LINEAR), len(again), len(measured.asked)) == (table.seconds(LINEAR), 2, 2)


def test_what_is_measured_later_is_scaled_to_what_was() -> None:
    """On a machine that is twice as slow by then."""
    measured, slow = Measured(stairs(1)), Measured(lambda shape: 2 * stairs(1)(shape))
    table = LatencyTable(CPU, None, measure=lambda shapes: (slow if len(table) else measured)(shapes))
    table.require([LINEAR])
    table.require([WIDE, LINEAR])
    assert slow.asked == [WIDE, LINEAR]
    assert table.seconds(WIDE) == pytest.approx(stairs(1)(WIDE))


def test_tables_that_are_filled_at_once_keep_what_each_measured(tmp_path: Path) -> None:
    first, second = (LatencyTable(CPU, tmp_path / "times.json", measure=Measured(stairs())) for _ in range(2))
    first.require([LINEAR])
    second.require([WIDE])
    assert len(LatencyTable(CPU, tmp_path / "times.json")) == 2


def test_nothing_is_kept_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    LatencyTable(CPU, None, measure=Measured(stairs())).require([LINEAR])
    assert list(tmp_path.iterdir()) == []
    LatencyTable(CPU, measure=Measured(stairs())).require([LINEAR])
    assert [path.name for path in tmp_path.iterdir()] == ["dnr_plugin"]


def test_the_table_of_another_machine_is_refused_and_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, measured = tmp_path / "times.json", Measured(stairs())
    with monkeypatch.context() as patch:
        patch.setattr(latency_table, "device_name", lambda device: "an abacus")
        LatencyTable(CPU, file, measure=measured).require([LINEAR, WIDE])
        assert table_file(latency_table.machine(CPU)) != table_file({"device": "another"})
    with pytest.warns(UserWarning, match=r"times\.json: expected layer times of this machine .*another \(an abacus\)"):
        table = LatencyTable(CPU, file, measure=measured)
    assert len(table) == 0
    table.require([LINEAR])
    assert len(LatencyTable(CPU, file)) == 1


DAMAGED = [
    "{", "[]", "{}", '{"format": 99, "layers": {}}', '{"format": 1, "layers": {"a": -1.0}}',
    '{"format": 1, "layers": {"a": "fast"}}', '{"format": 1, "layers": {"a": NaN}}', '{"format": 1, "layers": []}',
    '{"format": 1, "layers": {}, "machine": 3}', '{"format": [], "layers": {}}',
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED)
def test_damage_is_told_and_rebuilt(tmp_path: Path, text: str) -> None:
    file = tmp_path / "times.json"
    file.write_text(text)
    with pytest.warns(UserWarning, match="measured anew") as caught:
        table = LatencyTable(CPU, file, measure=Measured(stairs()))
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    table.require([LINEAR])
    assert list(json.loads(file.read_text())["layers"]) == [LINEAR.key]


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    table = LatencyTable(CPU, tmp_path / "taken" / "times.json", measure=Measured(stairs()))
    with pytest.warns(UserWarning, match="layer times are not kept"):
        table.require([LINEAR])
    assert table.seconds(LINEAR) > 0


def test_a_machine_that_is_too_noisy_says_so() -> None:
    """With the spread; where further rounds agree, nothing is said, and what is slow for a while does not count."""
    with pytest.raises(
        RunError, match=r"repeat within 25%, found a spread of 50% after 12 rounds: this machine is too"
    ):
        LatencyTable(CPU, None, measure=lambda shapes: [[1.0, 2.0, 1.0, 2.0]] * len(shapes)).require([LINEAR, WIDE])
    tries = iter([[1.0, 2.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 9.0]])
    calm = LatencyTable(CPU, None, measure=lambda shapes: [next(tries)] * len(shapes))
    calm.require([LINEAR])
    assert calm.seconds(LINEAR) == 1.0


def test_layers_run_in_the_shapes_of_a_network() -> None:
    """Every kind of layer that a table has is found in a network and built anew."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding="valid"), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 12, 1, groups=2, bias=False), nn.GroupNorm(3, 12), nn.Flatten(2), nn.Conv1d(12, 4, 2),
        nn.InstanceNorm1d(4), nn.Linear(24, 6), nn.LayerNorm(6),
    )  # fmt: skip
    noted = layer_shapes(model, torch.randn(2, 3, 16, 16))
    shapes = [shape for called in noted.values() for shape in called]
    assert [shape.type for shape in shapes] == [
        "Conv2d", "BatchNorm2d", "Conv2d", "Conv2d", "GroupNorm", "Conv1d", "Linear", "LayerNorm",
    ]  # fmt: skip
    assert shapes[2].with_channels(5, 5).module().groups == 5
    assert (shapes[0].channels, shapes[0].sizes, shapes[0].input_shape()) == ((3, 8), (2, 16, 16), (2, 3, 16, 16))
    assert len({shape.key for shape in shapes}) == len(shapes)
    times = timed_layers(shapes, CPU)
    assert len(times) == len(shapes)
    assert all(len(rounds) == len(times[0]) >= 5 and min(rounds) > 0 for rounds in times)
    assert model.training


def test_memory_bounds_what_is_timed_together() -> None:
    parts = latency_table._parts([2**29, 2**29, 1, 2**31, 3], 5)
    assert list(parts) == [[0, 1], [2], [3], [4]]
    assert list(latency_table._parts([1] * 5, 2)) == [[0, 1], [2, 3], [4]]
    assert list(latency_table._parts([], 5)) == []


def test_channels_last_is_a_shape_of_its_own() -> None:
    model, x = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last), torch.randn(2, 4, 8, 8)
    (last,) = layer_shapes(model, x.to(memory_format=torch.channels_last))[""]
    (first,) = layer_shapes(model, x)[""]
    assert (last.channels_last, first.channels_last) == (True, False)
    assert last.key != first.key
    assert timed_layers([last], CPU)[0]


def test_layers_run_in_onnx_runtime() -> None:
    """Under keys of their own, beside those of eager mode."""
    version = pytest.importorskip("onnxruntime").__version__
    pytest.importorskip("onnx")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 5))
    model, x = model.to(memory_format=torch.channels_last), torch.randn(2, 3, 8, 8)
    noted = layer_shapes(model, x.to(memory_format=torch.channels_last), "onnxruntime")
    shapes = [shape for called in noted.values() for shape in called]
    assert [shape.type for shape in shapes] == ["Conv2d", "BatchNorm2d", "Linear"]
    times = timed_layers(shapes, CPU)
    assert all(len(rounds) == len(times[0]) >= 5 and min(rounds) > 0 for rounds in times)
    keys = [shape.key for shape in shapes]
    assert all(key.startswith(f"onnxruntime {version} ") for key in keys)
    assert not {*keys} & {shape.key for called in layer_shapes(model, x).values() for shape in called}
