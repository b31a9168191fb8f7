"""Where a layer's outputs first matter, read off a run, whatever way a network is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers.networks import images, make
from torch import Tensor, nn

from dnr_plugin.models.build import build_model
from dnr_plugin.network.flow import Calls, Site, trace_sites
from dnr_plugin.network.graph import build_graph
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.recipe.sections import ModelOptions

X = images(2)


def plain(site: Site) -> tuple[str | None, bool, bool]:
    """BatchNorm behind it, whether it makes up for a sum, and whether a ReLU follows."""
    assert (site.sum is None) == (site.other is None)
    return site.norm, site.sum is not None, site.rectified


def own_resnet() -> nn.Module:
    return build_model(ModelOptions(name="resnet20", width=4), 5, image_size=8).eval()


def test_the_sites_of_our_resnet() -> None:
    """The second convolution of a block makes up for the sum, also where a shortcut has a convolution of its own."""
    model = own_resnet()
    sites = trace_sites(model, X)
    assert plain(sites["conv1"]) == ("bn1", False, True)
    assert plain(sites["layer1.0.conv1"]) == ("layer1.0.bn1", False, True)
    assert plain(sites["layer1.0.conv2"]) == ("layer1.0.bn2", True, True)
    # here the shortcut runs first
    assert plain(sites["layer2.0.downsample.0"]) == ("layer2.0.downsample.1", False, False)
    assert plain(sites["layer2.0.conv2"]) == ("layer2.0.bn2", True, True)
    assert plain(sites["fc"]) == (None, False, False)
    assert sites["conv1"].size == 4 * 8 * 8
    assert sites["fc"].size == 5
    assert list(sites)[:2] == ["conv1", "layer1.0.conv1"]
    assert list(sites)[-1] == "fc"
    for name, site in sites.items():
        if site.sum is not None:
            assert site.other < site.sum, name


def test_the_sites_of_torchvisions_resnet() -> None:
    """Its shortcut runs last, so that it makes up for the sum; ReLU and sums are in place."""
    sites = trace_sites(torchvision.models.resnet18(num_classes=5).eval(), images(1, size=32))
    assert plain(sites["conv1"]) == ("bn1", False, True)
    assert plain(sites["layer1.0.conv1"]) == ("layer1.0.bn1", False, True)
    assert plain(sites["layer1.1.conv2"]) == ("layer1.1.bn2", True, True)
    assert plain(sites["layer2.0.conv2"]) == ("layer2.0.bn2", False, False)
    assert plain(sites["layer2.0.downsample.0"]) == ("layer2.0.downsample.1", True, True)
    assert plain(sites["fc"]) == (None, False, False)


class Block(nn.Module):
    """Two layers, a BatchNorm, and whatever is done with them."""

    def __init__(self, how: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.how = how
        self.stem, self.a, self.b = (nn.Conv2d(i, 4, 3, padding=1) for i in (3, 4, 4))
        self.bn, self.bn2, self.act, self.inplace = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU(), nn.ReLU(True)
        self.other = nn.GELU()

    def forward(self, x: Tensor) -> Any:
        return self.how(self, x)


def sites_of(how: Callable[[Any, Tensor], Any]) -> dict[str, Site]:
    torch.manual_seed(0)
    return trace_sites(Block(how).eval(), X)


RELUS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "nn.ReLU": lambda m, x: m.act(x),
    "nn.ReLU in place": lambda m, x: m.inplace(x),
    "F.relu": lambda m, x: F.relu(x),
    "F.relu in place": lambda m, x: F.relu(x, inplace=True),
    "F.relu_": lambda m, x: F.relu_(x),
    "torch.relu": lambda m, x: torch.relu(x),
    "torch.relu_": lambda m, x: torch.relu_(x),
    "Tensor.relu": lambda m, x: x.relu(),
    "Tensor.relu_": lambda m, x: x.relu_(),
}


@pytest.mark.parametrize("relu", RELUS)
def test_a_relu_is_seen_however_it_is_called(relu: str) -> None:
    """After a layer, a BatchNorm, or a sum."""
    act = RELUS[relu]
    assert plain(sites_of(lambda m, x: act(m, m.stem(x)).mean())["stem"]) == (None, False, True)
    assert plain(sites_of(lambda m, x: act(m, m.bn(m.stem(x))).mean())["stem"]) == ("bn", False, True)

    def residual(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return act(m, m.bn(m.a(x)) + x).mean()

    assert plain(sites_of(residual)["a"]) == ("bn", True, True)


def test_other_activations_are_no_relu() -> None:
    assert plain(sites_of(lambda m, x: m.other(m.stem(x)))["stem"]) == (None, False, False)
    assert plain(sites_of(lambda m, x: F.silu(m.bn(m.stem(x))))["stem"]) == ("bn", False, False)


def iadd(y: Tensor, x: Tensor) -> Tensor:
    y += x
    return y


ADDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": lambda y, x: y + x,
    "reversed": lambda y, x: x + y,
    "torch.add": torch.add,
    "add_": lambda y, x: y.add_(x),
    "+=": iadd,
}


@pytest.mark.parametrize("add", ADDS)
def test_a_sum_is_seen_however_it_is_written(add: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.act(m.stem(x))
        return m.inplace(ADDS[add](m.bn(m.a(x)), x))

    sites = sites_of(forward)
    assert plain(sites["stem"]) == (None, False, True)
    assert plain(sites["a"]) == ("bn", True, True)


def test_asking_for_a_shape_is_not_reading() -> None:
    sites = sites_of(lambda m, x: m.act((y := m.bn(m.stem(x))).view(y.shape[0], *y.size()[1:])) + y.dim())
    assert plain(sites["stem"]) == ("bn", False, False)  # a view is no ReLU
    sites = sites_of(lambda m, x: (m.act(y := m.bn(m.stem(x))), y.shape))
    assert plain(sites["stem"]) == ("bn", False, True)


NO_SUMS: dict[str, Callable[[Any, Tensor], Any]] = {
    "a number": lambda m, x: m.a(m.stem(x)) + 1.0,
    "broadcast": lambda m, x: m.a(y := m.stem(x)) + y.mean((2, 3), keepdim=True),
    "scaled": lambda m, x: torch.add(m.a(y := m.stem(x)), y, alpha=2),
    "what comes later": lambda m, x: m.a(y := m.stem(x)) + torch.sin(y),
    "difference": lambda m, x: m.a(y := m.stem(x)) - y,
    "the model's input": lambda m, x: m.a(m.stem(x))[:, :3] + x,
    "changed before": lambda m, x: m.a(y := m.act(m.stem(x))).mul_(2.0) + y,
}


@pytest.mark.parametrize("name", NO_SUMS)
def test_what_is_no_sum_of_two_layers_outputs(name: str) -> None:
    assert plain(sites_of(NO_SUMS[name])["a"]) == (None, False, False)


def test_before_and_after_activation() -> None:
    """Pre-activation order: the BatchNorm and ReLU in front of a layer read the stream, which is a sum."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = m.a(m.act(m.bn(x))) + x
        return m.act(m.bn2(m.b(x)))

    sites = sites_of(forward)
    assert plain(sites["stem"]) == (None, False, False)  # read by the BatchNorm and by the sum
    assert plain(sites["a"]) == (None, True, False)
    assert plain(sites["b"]) == ("bn2", False, True)


READ_TWICE: dict[str, Callable[[Any, Tensor, Callable[[Tensor], Tensor]], Any]] = {
    "called": lambda m, y, f: (f(y), torch.sin(y)),
    "in a list": lambda m, y, f: torch.cat([f(y), y], 1),
    "by keyword": lambda m, y, f: (f(y), torch.mean(input=y)),
    "by another layer": lambda m, y, f: (f(y), m.b(y)),
    "in parts": lambda m, y, f: (f(y), torch.sin(y.chunk(2, 1)[0])),
    "returned": lambda m, y, f: (f(y), y),
    "returned in a dict": lambda m, y, f: {"out": f(y), "features": [y]},
}


@pytest.mark.parametrize("name", READ_TWICE)
def test_outputs_that_are_read_twice_matter_as_they_are(name: str) -> None:
    """Neither a ReLU nor a BatchNorm is all that becomes of them."""
    read = READ_TWICE[name]
    sites = sites_of(lambda m, x: read(m, m.bn(m.stem(x)), m.act))
    assert plain(sites["stem"]) == ("bn", False, False)
    sites = sites_of(lambda m, x: read(m, m.stem(x), m.bn))
    assert sites["stem"].rectified is False
    assert plain(sites["stem"]) == (None, False, False)
    sites = sites_of(lambda m, x: read(m, m.a(y := m.stem(x)), lambda z: m.act(z + y)))
    assert plain(sites["a"]) == (None, False, False)


def test_a_layer_that_runs_twice_is_left_out() -> None:
    assert set(sites_of(lambda m, x: m.a(F.relu(m.a(m.stem(x)))))) == {"stem"}


def test_a_layer_that_does_not_run_is_left_out() -> None:
    assert set(sites_of(lambda m, x: m.b(m.stem(x)))) == {"stem", "b"}


class Numbered(Calls):
    def __init__(self) -> None:
        super().__init__({})
        self.names: list[str] = []

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.names.append(func.__name__)


@pytest.mark.parametrize("name", ["own", "torchvision", "residual", "concat", "mobile"])
def test_a_pruned_model_numbers_its_calls_like_the_dense_one(name: str) -> None:
    if name == "own":
        model, root = own_resnet(), "layer1.0.conv1"
    elif name == "torchvision":
        model, root = torchvision.models.resnet18(num_classes=5).eval(), "layer2.0.conv1"
    else:
        model, root = make(name), {"residual": "a1", "concat": "d1", "mobile": "expand"}[name]
    runs = []
    for x, pruned in ((images(1, size=32), False), (images(3, size=32), True)):
        if pruned:
            prune_neurons(model, images(1, size=32), {root: [0, 2]})
        with torch.no_grad(), Numbered() as calls:
            model(x)
        runs.append(calls.names)
        assert calls.count == len(calls.names)
    assert runs[0] == runs[1]
    assert len(runs[0]) > 5


def test_calls_hand_on_results_and_skip_what_hooks_do() -> None:
    found: list[Tensor] = []
    a = torch.full((2,), 2.0)
    with Calls({1: found.append}) as calls:
        a = a * 2
        with calls.paused():
            a.sin()
            with calls.paused():
                a.cos()
            a.tan()
        b = a + 1
    assert found[0] is b
    assert calls.count == 2


def test_tracing_leaves_the_model_as_it_was() -> None:
    """Modes, hooks and statistics; also where the model fails."""
    model = own_resnet().train()
    model.layer1.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    build_graph(model, X)
    trace_sites(model, X)
    with pytest.raises(RuntimeError):
        trace_sites(model, torch.randn(1, 5, 8, 8))
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_who_alone_reads_what_a_relu_gives() -> None:
    sites = trace_sites(own_resnet(), X)
    assert sites["layer1.0.conv1"].reader == "layer1.0.conv2"
    assert sites["conv1"].reader is None  # the shortcut reads it as well
    assert sites["layer1.0.conv2"].reader is None  # a sum comes first
    assert sites["layer3.2.conv2"].reader is None  # pooled before the classifier reads it


@pytest.mark.parametrize("relu", RELUS)
def test_a_reader_is_seen_however_the_relu_is_called(relu: str) -> None:
    act = RELUS[relu]
    assert sites_of(lambda m, x: m.b(act(m, m.bn(m.stem(x)))))["stem"].reader == "b"


def test_what_is_read_otherwise_has_no_single_reader() -> None:
    def two(m: Any, x: Tensor) -> Any:
        y = m.act(m.stem(x))
        return m.a(y), m.b(y)

    assert sites_of(two)["stem"].reader is None
    assert sites_of(lambda m, x: m.a(y := m.act(m.stem(x))) + y)["stem"].reader is None
    assert sites_of(lambda m, x: m.a(m.act(m.stem(x)).mul_(2.0)))["stem"].reader is None
    assert sites_of(lambda m, x: m.a(m.other(m.stem(x))))["stem"].reader is None
