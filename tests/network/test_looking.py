"""Looking at a model: what stands aside comes back, and what takes too long ends."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from dnr_plugin.network.looking import OutOfTime, at_most, prepared, transparent_norms


def everything() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU(inplace=True), nn.PReLU(), nn.PReLU(4),
        nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(2), nn.LSTM(9, 5),
    )  # fmt: skip


def look_and_fail(model: nn.Sequential) -> None:
    before = [*model]
    with prepared(model), transparent_norms(model, batch=True):
        assert isinstance(model[3], nn.LeakyReLU)
        assert isinstance(before[3].weight, nn.Parameter)
        assert model[3].negative_slope == float(before[3].weight.detach())
        assert isinstance(model[4], nn.PReLU)
        assert not model[2].inplace
        x = torch.randn(2, 4, 3, 3)
        for norm in (model[1], model[5], model[6], model[7]):
            assert torch.equal(norm(x), x)
            assert norm(x) is not x
        raise RuntimeError("inside")


def test_what_stands_aside_comes_back() -> None:
    model = everything()
    before, state = [*model], [dict(vars(module)) for module in model.modules()]
    with pytest.raises(RuntimeError, match="inside"):
        look_and_fail(model)
    assert [*model] == before
    assert [dict(vars(module)) for module in model.modules()] == state


def endless() -> None:
    with at_most(0.05):
        while True:
            try:
                time.sleep(0.001)
            except Exception:
                continue


def test_what_takes_too_long_ends_whatever_it_swallows() -> None:
    with pytest.raises(OutOfTime):
        endless()


def test_what_ends_in_time_is_never_disturbed() -> None:
    for wait in (0.0, 0.005, 0.0099, 0.01):
        for _ in range(20):
            try:
                with at_most(0.01):
                    time.sleep(wait)
            except OutOfTime:
                assert wait > 0.0
            time.sleep(0.002)  # one that comes late would come here


def test_a_profiler_can_look_on() -> None:
    """An interpreter left waiting for an exception that was called back never ends under a profiler."""
    code = (
        "import cProfile\n"
        "from dnr_plugin.network.looking import at_most\n"
        "profile = cProfile.Profile()\n"
        "profile.enable()\n"
        "for _ in range(10):\n"
        "    with at_most(60.0):\n"
        "        sum(range(100))\n"
        "profile.disable()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
