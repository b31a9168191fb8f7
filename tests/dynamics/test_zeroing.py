"""Zeroed channels against a network whose consumers ignore them; their gradient by hand; what stays behind."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import images, make
from torch import Tensor, nn

from dnr_plugin.dynamics.zeroing import SoftZeros
from dnr_plugin.network.kinds import consumer


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def some(module: nn.Module, *channels: int) -> Tensor:
    return torch.isin(torch.arange(consumer(module).channels[0]), torch.tensor(channels))


def ignoring(module: nn.Module, gone: Tensor) -> nn.Module:
    """A copy whose weights for these input channels are zero."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        if isinstance(module, nn.MultiheadAttention):
            module.in_proj_weight[:, gone] = 0.0
        elif isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
            wide = module.weight.view(module.groups, -1, *module.weight.shape[1:])  # [groups, out, in of the group]
            for channel in gone.nonzero().flatten().tolist():
                group, inside = divmod(channel, wide.shape[2])
                wide[group, :, inside] = 0.0
        elif isinstance(module, nn.Linear):
            module.weight[:, gone] = 0.0
        else:  # transposed: [in, out / groups, *kernel]
            module.weight[gone] = 0.0
    return module


CONSUMERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 3, 3), (5, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 3, 3), (5, 4, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 3, 2), (5, 4, 3, 3, 3)),
    "unbatched": (lambda: nn.Conv2d(4, 3, 3), (4, 6, 7)),
    "unbatched1d": (lambda: nn.Conv1d(4, 3, 3), (4, 9)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (5, 4, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 3), (5, 4, 6, 6)),
    "grouped transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (5, 4, 6, 6)),
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "sequence": (lambda: nn.Linear(4, 3), (5, 7, 4)),
    "one vector": (lambda: nn.Linear(4, 3), (4,)),
}


@pytest.mark.parametrize(("build", "shape"), CONSUMERS.values(), ids=CONSUMERS.keys())
@pytest.mark.parametrize("by_name", [False, True])
def test_zeroed_channels_are_as_if_no_weight_read_them(
    build: Callable[[], nn.Module], shape: tuple[int, ...], by_name: bool
) -> None:
    torch.manual_seed(0)
    module, a = build(), torch.randn(shape)
    gone, zeros = some(module, 1, 2), SoftZeros()
    reference = ignoring(module, gone)

    def called(m: nn.Module) -> Tensor:
        out: Tensor = m(input=a) if by_name else m(a)
        return out

    plain = called(module)
    zeros.set({module: gone})
    torch.testing.assert_close(called(module), called(reference))
    assert not torch.allclose(called(module), plain)
    zeros.clear()
    assert torch.equal(called(module), plain)
    assert hooks(module) == 0


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_attention_loses_query_key_and_value(batch_first: bool, by_name: bool, training: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(4, 2, batch_first=batch_first).train(training)
    a = torch.randn(5, 7, 4)
    zeros, gone = SoftZeros(), some(module, 3)
    reference = ignoring(module, gone)

    def called(m: nn.Module) -> Tensor:
        with torch.set_grad_enabled(training):  # without gradients attention has a fast path of its own
            out: Tensor = (m(query=a, key=a, value=a) if by_name else m(a, a, a))[0]
            return out

    plain = called(module)
    zeros.set({module: gone})
    torch.testing.assert_close(called(module), called(reference), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(called(module), plain, atol=1e-4)


def test_autocast_keeps_its_types() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)), images()
    gone, zeros = some(model[2], 0, 3), SoftZeros()
    reference = nn.Sequential(model[0], model[1], ignoring(model[2], gone))
    zeros.set({model[2]: gone})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, reference(x))
        out.float().sum().backward()
    assert model[0].weight.grad is not None and model[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("name", "consumers"), [("plain", {"b": [0, 3], "fc": [4, 5, 6, 7, 20]}),
                                                 ("residual", {"a1": [1], "b1": [1], "fc": [1], "a2": [2, 5]}),
                                                 ("concat", {"d1": [2], "d2": [2, 7], "fc": [6, 0]}),
                                                 ("grouped", {"g": [0, 4, 8], "b": [1, 5, 9]})])  # fmt: skip
def test_whole_networks(name: str, consumers: dict[str, list[int]]) -> None:
    """Flattened, residual, concatenated and grouped channels, several consumers at a time."""
    model, x, zeros = make(name), images(), SoftZeros()
    reference, plain = copy.deepcopy(model), model(x)
    gone = {key: some(model.get_submodule(key), *channels) for key, channels in consumers.items()}
    for key, marked in gone.items():
        setattr(reference, key, ignoring(reference.get_submodule(key), marked))
    zeros.set({model.get_submodule(key): marked for key, marked in gone.items()})
    assert hooks(model) == len(gone)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model(x), plain, atol=1e-4)


def test_the_gradient_is_straight_through() -> None:
    """Forward without the channels, backward with the consumer's weights for them as they are."""
    torch.manual_seed(0)
    first, second, x = nn.Linear(3, 4), nn.Linear(4, 2), torch.randn(6, 3)
    zeros, keep = SoftZeros(), torch.tensor([1.0, 0.0, 1.0, 0.0])
    zeros.set({second: keep == 0})
    loss = second(first(x)).square().sum()
    loss.backward()

    a = first(x).detach()
    out = (a * keep) @ second.weight.T + second.bias
    back = 2 * out  # of the loss with respect to the output
    reaching = back @ second.weight  # all four columns
    torch.testing.assert_close(loss.detach(), out.square().sum().detach())
    torch.testing.assert_close(first.weight.grad, reaching.T @ x)
    torch.testing.assert_close(first.bias.grad, reaching.sum(0))
    torch.testing.assert_close(second.weight.grad, back.T @ (a * keep))
    assert second.weight.grad is not None and first.weight.grad is not None
    assert second.weight.grad[:, [1, 3]].abs().sum() == 0
    assert (first.weight.grad[[1, 3]].abs().sum(1) > 0).all()


def test_what_is_zeroed_keeps_its_own_value() -> None:
    """A residual sum behind the consumer's input, and in-place operations, see the channel as it is."""
    torch.manual_seed(0)
    layer, zeros = nn.Linear(3, 3), SoftZeros()
    a = torch.randn(4, 3)
    before = a.clone()
    zeros.set({layer: some(layer, 0)})
    out = layer(a) + a
    assert torch.equal(a, before)
    torch.testing.assert_close(out, ignoring(layer, some(layer, 0))(a) + a)


def test_set_replaces_and_clear_ends() -> None:
    model, x, zeros = make("plain"), images(), SoftZeros()
    b, c = model.get_submodule("b"), model.get_submodule("c")
    zeros.set({b: some(b, 0), c: some(c, 1)})
    zeros.set({b: some(b, 5)})
    assert hooks(model) == 1
    reference = copy.deepcopy(model)
    zeros.clear()
    plain = model(x)
    reference_b = ignoring(b, some(b, 5))
    expected = copy.deepcopy(model)
    expected.b = reference_b
    torch.testing.assert_close(reference(x), expected(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(plain, reference(x), atol=1e-5)
    assert hooks(model) == 0
    zeros.set({b: some(b)})  # nothing to zero: no hook
    assert hooks(model) == 0
    zeros.clear()


def pickled(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_zeroed_model_can_be_copied_and_saved(copied: Callable[[nn.Module], nn.Module]) -> None:
    """The copy is zeroed as well, and stays so on its own."""
    model, x, zeros = make("plain"), images(), SoftZeros()
    b = model.get_submodule("b")
    zeros.set({b: some(b, 0, 1, 2)})
    expected = model(x)
    again = copied(model)
    zeros.clear()
    assert torch.equal(again(x), expected)
    assert not torch.equal(model(x), expected)


def test_other_inputs_than_float_tensors_are_refused_by_the_layer_itself() -> None:
    layer, zeros = nn.Linear(3, 2), SoftZeros()
    zeros.set({layer: some(layer, 0)})
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.ones(2, 3, dtype=torch.int64))


def test_double_precision_and_no_gradient() -> None:
    layer, zeros = nn.Linear(3, 2).double(), SoftZeros()
    a = torch.randn(4, 3, dtype=torch.float64)
    zeros.set({layer: some(layer, 2)})
    with torch.no_grad():
        out = layer(a)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, F.linear(a[:, :2], layer.weight[:, :2], layer.bias))
