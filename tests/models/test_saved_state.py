"""What a saved model keeps besides its parameters, and what a saved file may not do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnr_plugin import load_pruned, prune_neurons, save_pruned
from dnr_plugin.errors import InputError
from dnr_plugin.models.build import rebuild
from dnr_plugin.models.saved import ARCHITECTURE

X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Norm(nn.Module):
    """With a buffer that its state leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1), persistent=False)
        self.c, self.fc, self.sizes, self.pair = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), [1, 2], (1, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.c(x - self.mean).relu().mean((2, 3)))
        return out


class Extra(Norm):
    version = 1

    def get_extra_state(self) -> dict[str, int]:
        return {"version": self.version}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.version = state["version"]


class Odd(Norm):
    def get_extra_state(self) -> set[int]:
        return {1}


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.norm, self.fc = nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.norm(self.c(x)).relu().mean((2, 3)))
        return out


class Versioned(Norm):
    """Reads states of version 1 otherwise, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if local_metadata.get("version", 1) < 2:
            raise RuntimeError("a state of version 1")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)  # type: ignore[no-untyped-call]


class Shared(Norm):
    """One layer by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.c


@pytest.fixture(autouse=True)
def _module(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("usernets")
    for kind in (Norm, Extra, Odd, Lazy, Versioned, Shared):
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "usernets", module)
    return


def back(model: nn.Module, folder: Path) -> Any:
    builder = {"name": f"usernets:{type(model).__name__}", "kwargs": {}}
    save_pruned(model, folder, builder)
    loaded = load_pruned(folder, allow_import=True)
    assert torch.equal(model.eval()(X), loaded(X))
    return loaded


@pytest.mark.parametrize("kind", [Norm, Extra, Lazy, Versioned, Shared])
def test_models_of_every_make_come_back(kind: type[nn.Module], tmp_path: Path) -> None:
    model = kind()
    model(X)
    prune_neurons(model, X[:1], {"c": [0, 3]})
    if hasattr(model, "mean"):
        model.mean.fill_(0.5)
    loaded = back(model, tmp_path / "saved")
    assert loaded.c.out_channels == 6
    assert {name: b.tolist() for name, b in loaded.named_buffers()} == {
        name: b.tolist() for name, b in model.named_buffers()
    }


def test_flags_lists_and_extra_state_come_back(tmp_path: Path) -> None:
    model: Any = Extra()
    model.c.requires_grad_(False)
    model.names, model.pair, model.sizes, model.version = ["cat", "dog"], (3, 4), [5], 7
    loaded = back(model, tmp_path / "saved")
    assert (loaded.names, loaded.pair, loaded.sizes, loaded.version) == (["cat", "dog"], (3, 4), [5], 7)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def test_what_its_builder_freezes_can_be_unfrozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Frozen(Norm):
        def __init__(self) -> None:
            super().__init__()
            self.c.requires_grad_(False)

    monkeypatch.setattr(sys.modules["usernets"], "Frozen", Frozen, raising=False)
    for flag in (True, False):
        model = Frozen()
        model.c.requires_grad_(flag)
        assert back(model, tmp_path / str(flag)).c.weight.requires_grad is flag


def test_extra_state_that_needs_pickle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="_extra_state: expected a tensor or plain values"):
        save_pruned(Odd(), tmp_path / "saved", {"name": "usernets:Odd", "kwargs": {}})
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("module", "key", "value"),
    [
        ("", "dnr_builder", {"name": "os:system", "kwargs": {"command": "touch PWNED"}}),
        ("", "dnr_builder", "os:system"),
        ("", "forward", 1),
        ("c", "eval", 1),
        ("c", "_forward_hooks", []),
        ("", "training", True),
        ("c", "weight", 1),
        ("", "fc", 1),
        ("c", "out_channels", "8"),
        ("c", "padding_mode", 3),
        ("c", "out_channels", {"a": 1}),
    ],
)
def test_a_file_sets_plain_attributes_alone(module: str, key: str, value: Any, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save_pruned(Norm(), folder, {"name": "usernets:Norm", "kwargs": {}})
    architecture = json.loads((folder / ARCHITECTURE).read_text())
    architecture["modules"] = {module: {key: value}}
    (folder / ARCHITECTURE).write_text(json.dumps(architecture))
    with pytest.raises(InputError, match=rf"architecture\.json: does not fit usernets:Norm: .*{key}"):
        load_pruned(folder, allow_import=True)


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"])
def test_networks_for_segmentation_and_detection_are_built_by_name(name: str, tmp_path: Path) -> None:
    builder = {"name": f"torchvision.{name}", "kwargs": {"num_classes": 3}}
    model = rebuild(builder)
    save_pruned(model, tmp_path)
    loaded = load_pruned(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
