"""What the hooks read at the consumers' inputs, and when they stay silent."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from fvcore.nn import FlopCountAnalysis
from helpers.networks import Residual, images, make
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dnr_plugin.dynamics.zeroing import SoftZeros
from dnr_plugin.network.kinds import is_consumer
from dnr_plugin.observation.activity import Activity
from dnr_plugin.observation.observer import Observer


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def observed(model: nn.Module, *inputs: Any, **settings: Any) -> dict[str, Activity]:
    with torch.no_grad(), Observer(model, **{"share": 1.0, **settings}) as observer:
        for x in inputs:
            model(x)
    return observer.activities


def assert_reads(activity: Activity, a: Tensor, channel_dim: int = 1) -> None:
    """The activity is that of tensor ``a``, computed here by NumPy alone."""
    x = a.detach().double().movedim(channel_dim, 0).reshape(activity.channels, -1).numpy()
    assert activity.values == x.shape[1]
    np.testing.assert_array_equal(activity.highest, x.max(1))
    np.testing.assert_array_equal(activity.lowest, x.min(1))
    np.testing.assert_array_equal(activity.firing_rate, (x > 0).mean(1))
    np.testing.assert_allclose(activity.mean, x.mean(1), rtol=1e-12, atol=1e-14)


def conv(inside: int = 3, out: int = 4, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inside, out, 1, **options)


class SharedReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.relu = conv(), conv(4), conv(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.relu(self.b(self.relu(self.a(x)))))


class Joined(nn.Module):
    """Residual sum, F.relu, concatenation, pooling and flatten, each in front of a consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(), conv(4), conv(4), conv(8)
        self.fc = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = x + self.b(x)
        z = torch.cat([y, F.relu(self.c(y))], 1)
        return self.fc(F.max_pool2d(self.d(z), 4).flatten(1))


def test_a_shared_relu_called_twice_is_read_after_each_call() -> None:
    torch.manual_seed(0)
    model, x = SharedReLU(), images()
    found = observed(model, x)
    assert_reads(found["a"], x)
    first = model.a(x).relu()
    assert_reads(found["b"], first)
    assert_reads(found["c"], model.b(first).relu())


def test_functional_relu_sum_concat_pool_and_flatten_are_read_after_the_op() -> None:
    torch.manual_seed(0)
    model, x = Joined(), images()
    found = observed(model, x)
    first = model.a(x).relu()
    assert_reads(found["b"], first)
    total = first + model.b(first)
    assert_reads(found["c"], total)
    both = torch.cat([total, model.c(total).relu()], 1)
    assert_reads(found["d"], both)
    assert_reads(found["fc"], F.max_pool2d(model.d(both), 4).flatten(1))


@pytest.mark.parametrize(
    ("module", "shape", "channel_dim"),
    [
        (nn.Conv1d(4, 2, 3), (5, 4, 9), 1),
        (nn.Conv2d(4, 2, 3), (5, 4, 6, 7), 1),
        (nn.Conv2d(4, 2, 3), (4, 6, 7), 0),
        (nn.Conv1d(4, 2, 3), (4, 9), 0),
        (nn.Conv3d(4, 2, 2), (5, 4, 3, 3, 3), 1),
        (nn.ConvTranspose2d(4, 2, 3), (5, 4, 6, 6), 1),
        (nn.Conv2d(4, 8, 3, groups=2), (5, 4, 6, 6), 1),
        (nn.Linear(4, 2), (5, 4), 1),
        (nn.Linear(4, 2), (4,), 0),
        (nn.Linear(4, 2), (5, 7, 4), 2),
        (nn.Linear(4, 2), (5, 3, 6, 4), 3),
    ],
)
def test_every_layout_is_read_by_channel(module: nn.Module, shape: tuple[int, ...], channel_dim: int) -> None:
    """Convolutions of 1 to 3 dimensions, unbatched as well, transposed, grouped; linear on sequences and NHWC."""
    a = torch.randn(shape)
    activity = observed(nn.Sequential(module), a)["0"]
    assert activity.channels == 4
    assert_reads(activity, a, channel_dim)
    assert activity.samples == (1 if len(shape) in (1,) or channel_dim == 0 else 5)


class Attention(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(query=x, key=x, value=x)[0]


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_counts_samples_and_not_positions(batch_first: bool) -> None:
    a = torch.randn(5, 7, 4)
    activity = observed(Attention(batch_first), a if batch_first else a.transpose(0, 1))["attention"]
    assert activity.samples == 5
    assert_reads(activity, a, 2)
    assert activity.fired_samples.tolist() == (a > 0).any(1).sum(0).tolist()


def test_consumers_are_the_layers_that_mix_channels() -> None:
    assert is_consumer(nn.Conv2d(4, 8, 3, groups=2))
    assert is_consumer(nn.Conv2d(1, 1, 3))
    assert is_consumer(nn.Conv2d(4, 8, 3, groups=4))  # two filters for each channel
    assert not is_consumer(nn.Conv2d(4, 4, 3, groups=4))
    assert not is_consumer(nn.BatchNorm2d(4))


def test_hooks_exist_inside_the_context_only() -> None:
    model, x = make("plain"), images()
    with Observer(model) as observer:
        assert hooks(model) == 4
        model(x)
        with pytest.raises(RuntimeError, match="already open"):
            observer.__enter__()
    assert hooks(model) == 0
    model(x)
    assert {a.samples for a in observer.activities.values()} == {8}


def test_hooks_go_when_the_body_fails() -> None:
    model = make("plain")
    with pytest.raises(KeyError, match="mine"), Observer(model):
        raise KeyError("mine")
    assert hooks(model) == 0


def test_statistics_add_up_until_reset() -> None:
    model = make("plain")
    observer = Observer(model)
    for _ in range(2):
        with observer:
            model(images(8))
            model(images(4))
    assert observer.activities["b"].samples == 24
    with observer:
        model(images(8))
        observer.reset()
        model(images(4))
    assert observer.activities["b"].samples == 4
    observer.reset()
    assert observer.activities == {}


def test_train_and_eval_mode_are_left_alone_and_read_as_they_are() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.Dropout(0.5), conv(4)).train()
    x = images()
    with Observer(model, share=1.0) as observer:
        torch.manual_seed(0)
        model(x)
    assert model.training
    expected = copy.deepcopy(model)
    torch.manual_seed(0)
    assert_reads(observer.activities["3"], expected[2](expected[1](expected[0](x))))
    model.eval()
    assert_reads(observed(model, x)["3"], model[1](model[0](x)))


def test_channels_last_gives_the_same_statistics() -> None:
    model, x = make("residual"), images()
    plain = observed(model, x)
    last = observed(model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
    for name, activity in plain.items():
        np.testing.assert_allclose(last[name].mean, activity.mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(last[name].highest, activity.highest, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(last[name].firing_rate, activity.firing_rate, atol=0.01)


def test_autocast_is_read_in_bfloat16() -> None:
    model, x = SharedReLU(), images()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found, first = observed(model, x), model.a(x).relu()
    assert first.dtype == torch.bfloat16
    assert_reads(found["b"], first)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda m: torch.compile(m, backend="eager"),
        lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
        lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
    ],
    ids=["data_parallel", "compile", "compile_data_parallel", "data_parallel_compile"],
)
def test_names_are_those_of_the_wrapped_network(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = make("plain")
    assert set(Observer(wrap(model)).modules) == set(Observer(model).modules) == {"a", "b", "c", "fc"}


def test_a_submodule_that_happens_to_be_called_module_keeps_its_name() -> None:
    """Stripping every ``module.`` would let two layers share a name."""
    model = nn.Module()
    model.conv, model.module = conv(), nn.ModuleDict({"conv": conv()})
    assert set(Observer(model).modules) == {"conv", "module.conv"}


def test_paused_reads_nothing() -> None:
    model, x = make("plain"), images()
    with Observer(model) as observer:
        model(x)
        with contextlib.suppress(KeyError), observer.paused():
            model(x)
            raise KeyError
        model(x)
    assert observer.activities["b"].samples == 16


@pytest.mark.parametrize(
    "trace",
    [
        lambda m, x: tp.DependencyGraph().build_dependency(m, example_inputs=x),
        lambda m, x: FlopCountAnalysis(m, x).unsupported_ops_warnings(False).total(),
        lambda m, x: tp.utils.count_ops_and_params(m, x),
    ],
    ids=["build_dependency", "fvcore", "count_ops_and_params"],
)
def test_tracing_inside_the_context_is_not_observed(trace: Callable[[nn.Module, Tensor], Any]) -> None:
    model, x = make("plain"), images()
    with Observer(model, share=1.0) as observer:
        model(x)
        trace(model, torch.full((2, 3, 8, 8), 1e6))
        model(x)
    expected = observed(model, x, x)
    assert {a.samples for a in observer.activities.values()} == {16}
    for name, activity in observer.activities.items():
        assert torch.equal(activity.highest, expected[name].highest)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_each_sample_once(use_reentrant: bool) -> None:
    model, x = SharedReLU(), images().requires_grad_()
    calls = []
    model.b.register_forward_hook(lambda *_: calls.append(1))
    with Observer(model, share=1.0) as observer:
        checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
        checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
    assert len(calls) == 4  # the recomputation did happen
    assert {a.samples for a in observer.activities.values()} == {16}
    assert_reads(observer.activities["b"], torch.cat([model.a(x).relu()] * 2))


class Branches(nn.Module):
    """Two consumers of one tensor, which is rectified in place between them, and a linear layer of another layout."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(), conv(4), conv(4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        if self.between:
            x.relu_()
        return y + self.c(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("between", [True, False])
def test_one_tensor_is_read_once_unless_it_changes(
    mode: Callable[[], Any], between: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Branches share one computation; an in-place change between them is seen, without version counters too."""
    counted = []
    original = Activity.of_batch
    monkeypatch.setattr(Activity, "of_batch", lambda self, a: counted.append(1) or original(self, a))
    torch.manual_seed(0)
    model, x = Branches(between), images()
    with mode(), Observer(model, share=1.0) as observer:
        model(x.clone())
        model(x.clone())
    assert len(counted) == (4 if mode is torch.no_grad and not between else 6)
    first = model.a(x)
    assert_reads(observer.activities["b"], torch.cat([first] * 2))
    assert_reads(observer.activities["c"], torch.cat([first.relu() if between else first] * 2))


def test_what_inference_mode_showed_goes_on_outside() -> None:
    """Of layers whose second moments are added up in blocks, too: statistics are the same to the bit."""
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Conv2d(3, 400, 1), nn.ReLU(), nn.Conv2d(400, 2, 1)), images(8).chunk(2)
    found = {}
    for mode in (torch.no_grad, torch.inference_mode):
        observer = Observer(model, moments=True)
        with observer, mode():
            model(x)
            model(x + y)
        activity = observer.activities["2"]
        activity.update(y.repeat(1, 200, 1, 1)[:, :400].flatten(2))
        assert activity.moments is not None
        activity.moments.update(model[2], y.repeat(1, 134, 1, 1)[:, :400])
        found[mode] = activity.state_dict()
        for value in (activity.total, activity.fired_samples, activity.highest, activity.moments.blocks[0].sums):
            value.add_(1)  # as all_reduce does
    first, second = found.values()
    assert first.keys() == second.keys()
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_contexts_of_one_batch_each_are_as_one_context() -> None:
    """Second moments, too, of which a batch's positions and half are known by its number; also of blocks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 2100, 1), nn.ReLU(), nn.Conv2d(2100, 2, 1))
    batches = images(16, size=40).split(4)
    at_once, apart = Observer(model, moments=True), Observer(model, moments=True)
    with at_once, torch.no_grad():
        for batch in batches:
            model(batch)
    for batch in batches:
        with apart, torch.no_grad():
            model(batch)
    for name in ("0", "2", "4"):
        found, expected = apart.activities[name].moments, at_once.activities[name].moments
        assert found is not None
        assert expected is not None
        for mine, theirs in zip(found.blocks, expected.blocks, strict=True):
            assert mine.batches == theirs.batches == 4
            torch.testing.assert_close(mine.sums, theirs.sums, rtol=1e-6, atol=1e-4)


def test_an_inplace_residual_network_is_read_right() -> None:
    model, x = make("residual"), images()
    assert isinstance(model, Residual)
    found = observed(model, x)
    stem = model.stem(x).clamp_min(0)
    assert_reads(found["a1"], stem)
    inner = model.a1(stem).clamp_min(0)
    assert_reads(found["a2"], inner)
    block = (model.a2(inner) + stem).clamp_min(0)
    assert_reads(found["b1"], block)
    out = (model.b2(model.b1(block).clamp_min(0)) + block).clamp_min(0)
    assert_reads(found["fc"], out.mean((2, 3)))


def test_tensors_are_not_kept_alive() -> None:
    import weakref

    model = nn.Sequential(conv())
    with Observer(model):
        x = images()
        alive = weakref.ref(x)
        model(x)
        del x
        assert alive() is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_layer(bad: float) -> None:
    model, x = make("plain"), images()
    model.b.bias.data[2] = bad
    with pytest.raises(ValueError, match=r"not finite reached c, fc: "), torch.no_grad(), Observer(model):
        model(x)
    assert hooks(model) == 0


def test_a_model_that_is_never_called_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no activation was read"), Observer(make("plain")):
        pass


def test_reading_nothing_the_second_time_is_an_error_too() -> None:
    """Otherwise old statistics would pass for new ones."""
    model = make("plain")
    observer = Observer(model)
    with observer:
        model(images())
    with pytest.raises(RuntimeError, match="no activation was read"), observer:
        pass


@pytest.mark.parametrize("warm", [True, False])
def test_a_compiled_model_is_observed_or_refused(warm: bool) -> None:
    """Never silently nothing; what is read is right."""
    torch._dynamo.reset()
    model, x = SharedReLU(), images()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        if warm:
            compiled(x)
        try:
            with Observer(compiled, share=1.0) as observer:
                compiled(x)
        except RuntimeError as error:
            assert warm
            assert "compiled" in str(error)  # noqa: PT017
        else:
            assert_reads(observer.activities["b"], model.a(x).relu())
            assert_reads(observer.activities["c"], model.b(model.a(x).relu()).relu())
        compiled(x)
    assert hooks(model) == 0


def test_a_model_can_be_saved_and_copied_while_observed() -> None:
    """The copies work, and are not observed."""
    model, x = make("plain"), images()
    with torch.no_grad(), Observer(model) as observer:
        expected = model(x)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        copied = copy.deepcopy(model)
        assert torch.equal(loaded(x), expected)
        assert torch.equal(copied(x), expected)
    assert {a.samples for a in observer.activities.values()} == {8}


class NoSync(TorchDispatchMode):
    """Fails on everything that would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func)
        assert not any(bad in name for bad in ("_local_scalar_dense", "nonzero", "is_nonzero")), name
        assert "_to_copy" not in name or (kwargs or {}).get("device") is None, name
        return func(*args, **(kwargs or {}))


def test_observing_never_waits_for_the_device() -> None:
    model, x = make("residual"), images()
    with torch.no_grad(), Observer(model), NoSync():
        model(x)
        model(x)


@pytest.mark.gpu
def test_observing_never_waits_for_cuda() -> None:
    """The real thing: CUDA's own check for synchronisation, and the same statistics as on the CPU."""
    model, x = make("residual"), images()
    expected = observed(model, x)
    model, x = model.cuda(), x.cuda()
    with torch.no_grad():
        model(x)
        with Observer(model, share=1.0) as observer:
            torch.cuda.set_sync_debug_mode("error")
            try:
                model(x)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    for name, activity in observer.activities.items():
        np.testing.assert_allclose(activity.mean.cpu(), expected[name].mean, rtol=1e-2, atol=1e-4)
        assert int(activity.histogram.sum()) == int(expected[name].histogram.sum())


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_state_taken_between_batches_goes_on(cut: int) -> None:
    """Inside the context and through a file: statistics equal those without a break to the bit."""
    model, batches = make("residual"), [images(4, seed=k) for k in range(3)]
    whole = observed(model, *batches)
    with torch.no_grad():
        with Observer(model, share=1.0) as first:
            for x in batches[:cut]:
                model(x)
            buffer = io.BytesIO()
            torch.save(first.state_dict(), buffer)
            model(images(2, seed=9))  # not part of the state
        buffer.seek(0)
        second = Observer(model, share=1.0)
        with second:
            second.load_state_dict(torch.load(buffer, weights_only=True))
            assert second.samples == 4 * cut
            for x in batches[cut:]:
                model(x)
            assert second.samples == 12
    for name, activity in whole.items():
        for key, value in activity.state_dict().items():
            found = second.activities[name].state_dict()[key]
            assert torch.equal(found, value) if isinstance(value, Tensor) else found == value, (name, key)


def test_a_state_adds_up_what_earlier_contexts_read() -> None:
    model = make("plain")
    observer = Observer(model, share=1.0)
    with observer:
        model(images(4))
    with observer:
        model(images(3, seed=2))
        state = observer.state_dict()
        assert observer.samples == state["b"]["samples"] == 7
        model(images(4))
    assert state["b"]["samples"] == 7
    assert observer.samples == 11


def test_a_state_of_other_widths_is_refused() -> None:
    with Observer(make("plain")) as observer:
        observer.model(images())
    with pytest.raises(ValueError, match="expected shape"):
        Observer(type(make("plain"))(6)).load_state_dict(observer.state_dict())


def test_training_is_read_and_evaluation_is_not() -> None:
    model = make("plain").train()
    with Observer(model, training=True) as observer:
        model(images(8))
        model.eval()
        model(images(5))
        model.train()
        model(images(2))
    assert {activity.samples for activity in observer.activities.values()} == {10}


@pytest.mark.parametrize("earlier", [True, False])
def test_training_is_read_ahead_of_what_zeroes(earlier: bool) -> None:
    """Whether the channels were zeroed before the observer was opened or after."""
    model, x, zeros = make("plain").train(), images(), SoftZeros()
    b = model.get_submodule("b")
    gone = {b: torch.arange(8) < 4}
    expected = model.bn(model.a(x)).relu()
    if earlier:
        zeros.set(gone)
    with Observer(model, share=1.0, training=True) as observer:
        if not earlier:
            zeros.set(gone)
        model(x)
    assert_reads(observer.activities["b"], expected)
    assert (observer.activities["b"].fired_samples[:4] > 0).any()
    # and c's input shows that they were zeroed
    assert not torch.allclose(observer.activities["c"].mean, observed_mean(model, expected), atol=1e-6)


def observed_mean(model: nn.Module, a: Tensor) -> Tensor:
    zeroless = F.conv2d(a, model.b.weight, model.b.bias, padding=1).relu()
    return zeroless.detach().double().mean((0, 2, 3))
