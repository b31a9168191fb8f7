"""Statistics of activations against NumPy and SciPy, and how they merge, drift, travel and follow removals."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from helpers.activities import data, numpy_octave, observed, read
from helpers.ranks import run_two_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dnr_plugin.observation.activity import Activity, dormancy
from dnr_plugin.observation.entropy import drift_bits, entropy_bits, octaves, on_off_entropy_bits

INTEGERS = ("samples", "values", "fired_samples", "fired", "histogram", "highest", "lowest")
SUMS = ("total", "total_magnitude", "total_square")


def assert_same(found: Activity, expected: Activity) -> None:
    for name in INTEGERS:
        assert np.array_equal(np.asarray(getattr(found, name)), np.asarray(getattr(expected, name))), name
    for name in SUMS:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("threshold", [0.0, 0.7])
@pytest.mark.parametrize("bins", [2, 3, 16])
def test_every_statistic_equals_numpy(threshold: float, bins: int) -> None:
    """All of section 3's statistics on signed data, from the definitions."""
    a = data()
    activity = observed(a, threshold=threshold, bins=bins)
    x = a.double().numpy()
    flat = x.transpose(1, 0, 2).reshape(5, -1)
    assert (activity.samples, activity.values, activity.channels) == (24, 24 * 7, 5)
    np.testing.assert_array_equal(activity.firing_rate, (flat > threshold).mean(1))
    np.testing.assert_array_equal(activity.sample_activity, (x.max(2) > threshold).mean(0))
    np.testing.assert_allclose(activity.mean, flat.mean(1), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(activity.variance, flat.var(1), rtol=1e-12)
    np.testing.assert_allclose(activity.mean_magnitude, np.abs(flat).mean(1), rtol=1e-12)
    np.testing.assert_allclose(activity.dormancy, np.abs(flat).mean(1) / np.abs(flat).mean(), rtol=1e-12)
    np.testing.assert_array_equal(activity.highest, flat.max(1))
    np.testing.assert_array_equal(activity.lowest, flat.min(1))
    np.testing.assert_array_equal(activity.silent, flat.max(1) <= threshold)
    np.testing.assert_array_equal(activity.zero, np.abs(flat).max(1) == 0)
    histogram = np.array([np.bincount([numpy_octave(v, threshold, bins) for v in row], minlength=bins) for row in flat])
    np.testing.assert_array_equal(activity.histogram, histogram)
    np.testing.assert_allclose(activity.entropy, scipy.stats.entropy(histogram, base=2, axis=1), atol=1e-12)
    rate = (flat > threshold).mean(1)
    np.testing.assert_allclose(
        activity.on_off_entropy, scipy.stats.entropy([rate, 1 - rate], base=2, axis=0), atol=1e-12
    )
    assert activity.finite


def test_per_batch_merged_and_at_once_are_the_same() -> None:
    a = data(n=30)
    parts = [a[:7], a[7:8], a[8:30]]
    halves = observed(*parts[:2])
    halves.merge(observed(parts[2]))
    assert_same(observed(*parts), observed(a))
    assert_same(halves, observed(a))


@pytest.mark.parametrize(
    "change", [{"threshold": 0.5}, {"bins": 8}, {"channels": 4}], ids=["threshold", "bins", "channels"]
)
def test_unlike_activities_do_not_merge(change: dict[str, float]) -> None:
    settings = {"channels": 5, "threshold": 0.0, "bins": 16}
    with pytest.raises(ValueError, match="same threshold, bins and channels"):
        Activity(**settings).merge(Activity(**{**settings, **change}))  # type: ignore[arg-type]


def test_octaves_have_the_documented_edges() -> None:
    """A power of two opens its bin; the first and last bins are open; nothing at or below theta is counted."""
    edges = torch.tensor([2.0**k for k in range(-8, 6)])  # 14 edges of 16 bins
    assert octaves(edges, 0.0, 16).tolist() == list(range(2, 16))
    assert octaves(torch.nextafter(edges, torch.zeros(14)), 0.0, 16).tolist() == list(range(1, 15))
    tiny, huge = 1e-42, 3e38  # a subnormal has no exponent of its own
    assert octaves(torch.tensor([0.0, -0.0, -1.0, -huge, tiny, huge]), 0.0, 16).tolist() == [0, 0, 0, 0, 1, 15]
    assert octaves(torch.tensor([1.0, 2.0, 2.5, 4.0]), 2.0, 16).tolist() == [0, 0, 11, 12]
    assert octaves(torch.tensor([-1.0, 0.0, 1e-9, 1.0, 1e9]), 0.0, 2).tolist() == [0, 0, 1, 1, 1]


def test_octaves_leave_their_input_alone() -> None:
    a = data()
    before = a.clone()
    octaves(a, 0.0, 16)
    observed(a)
    assert torch.equal(a, before)


def test_two_bins_are_on_off_entropy() -> None:
    activity = observed(data(), bins=2)
    np.testing.assert_allclose(activity.entropy, activity.on_off_entropy, atol=1e-15)
    assert activity.on_off_entropy.max() > 0.5


def test_entropies_at_their_limits() -> None:
    assert entropy_bits(torch.tensor([[0, 0, 0, 0], [9, 0, 0, 0], [3, 3, 3, 3]])).tolist() == [0.0, 0.0, 2.0]
    assert on_off_entropy_bits(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0.0, 1.0, 0.0]


def test_a_silent_layer_has_dormancy_zero() -> None:
    assert dormancy(torch.zeros(3, dtype=torch.float64)).tolist() == [0.0, 0.0, 0.0]
    assert dormancy(torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)).tolist() == [0.0, 0.75, 2.25]


@pytest.mark.parametrize(("share", "stride"), [(1.0, 1), (0.5, 2), (0.3, 3), (0.125, 8)])
def test_a_share_reads_every_so_manieth_sample(share: float, stride: int) -> None:
    """Means, rates and histograms read the share; highest, lowest and fired samples read all samples."""
    a = data(n=20)
    activity, part = observed(a, share=share), observed(a[::stride])
    assert activity.samples == 20
    assert activity.values == len(range(0, 20, stride)) * 7
    for name in ("fired", "histogram", "values"):
        assert np.array_equal(np.asarray(getattr(activity, name)), np.asarray(getattr(part, name))), name
    np.testing.assert_allclose(activity.mean, a.double()[::stride].mean((0, 2)), rtol=1e-12, atol=1e-14)
    for name in ("highest", "lowest", "fired_samples", "silent", "zero"):
        assert torch.equal(getattr(activity, name), getattr(observed(a), name)), name


def test_large_maps_are_read_at_some_positions() -> None:
    """For means, rates and histograms; what decides who is dead reads all, and a share of 1 does for everything."""
    a = torch.randn(8, 3, 56 * 56, generator=torch.Generator().manual_seed(0))
    a[1, 0, 1] = 100.0
    activity, whole = observed(a, share=0.125), observed(a, share=1.0)
    assert 256 <= activity.values < 512
    assert torch.equal(activity.histogram.sum(1), torch.full((3,), activity.values))
    np.testing.assert_allclose(activity.firing_rate, (a[0] > 0).double().mean(1), atol=0.1)
    assert whole.values == 8 * 56 * 56
    for name in ("highest", "lowest", "fired_samples", "silent"):
        assert torch.equal(getattr(activity, name), getattr(whole, name)), name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(5, 64, 8, 8), (5, 24, 8, 8), (5, 24, 7, 7), (3, 37, 9, 9), (3, 37, 3, 3)])
def test_extremes_are_of_all_positions(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    """Of channels side by side, positions are read several at once, with or without a remainder."""
    a = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    a[-1, 3], a[-1, 4, -1, -1], a[0, 5, 1, 1], a[:, 6] = -1.0, torch.nan, -torch.inf, 0.0
    activity = observed(a.flatten(2))
    flat = a.flatten(2).transpose(0, 1).flatten(1)
    torch.testing.assert_close(activity.highest, flat.amax(1), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(activity.lowest, flat.amin(1), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(activity.fired_samples, (a.flatten(2) > 0).any(2).sum(0) - F.one_hot(torch.tensor(4), shape[1]))
    assert not activity.finite


def test_one_spike_outside_the_share_is_not_dead() -> None:
    a = torch.zeros(16, 2, 4)
    a[3, 1, 2] = 1e-3
    activity = observed(a, share=0.125)
    assert activity.fired.tolist() == [0, 0]
    assert activity.fired_samples.tolist() == [0, 1]
    assert activity.silent.tolist() == activity.zero.tolist() == [True, False]


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        Activity(3, share=share)


@pytest.mark.parametrize("bins", [1, 65])
def test_bins_outside_their_range_are_refused(bins: int) -> None:
    with pytest.raises(ValueError, match="bins"):
        Activity(3, bins=bins)


def test_sums_do_not_drift() -> None:
    """4,000 merges doubled 14 times make 6.5e7 batches: a float32 sum would have stopped growing long before."""
    a = torch.full((1, 2, 1), 0.1)
    a[:, 1] = 1.0
    activity = observed(*[a] * 4000)
    for _ in range(14):
        activity.merge(pickle.loads(pickle.dumps(activity)))
    count = 4000 * 2**14
    assert activity.samples == activity.values == count > 2**24
    exact = float(np.float64(np.float32(0.1)))
    np.testing.assert_allclose(activity.mean, [exact, 1.0], rtol=1e-12)
    np.testing.assert_allclose(activity.total[1], count, rtol=0)
    assert float(torch.tensor(2.0**24) + 1.0) == 2.0**24  # what a float32 sum would do


def test_one_large_batch_does_not_drift() -> None:
    """Within a batch, too, sums are float64."""
    a = torch.full((1, 1, 2**21), 1.1)
    np.testing.assert_allclose(observed(a).total, [float(np.float32(1.1)) * 2**21], rtol=1e-12)


@pytest.mark.parametrize("constant", [0.1, -3.0, 12345.678, -1e6])
def test_a_constant_channel_has_no_variance(constant: float) -> None:
    activity = observed(*[torch.full((4, 1, 9), constant)] * 50)
    assert float(activity.variance) >= 0
    assert float(activity.variance.sqrt()) <= 1e-6 * abs(constant)


def test_a_small_variance_on_a_large_offset_is_seen() -> None:
    a = 1000.0 + torch.randn(64, 1, 50, generator=torch.Generator().manual_seed(0)) * 0.01
    np.testing.assert_allclose(observed(a).variance, a.double().var(correction=0), rtol=1e-4)


@pytest.mark.parametrize("share", [1.0, 0.125])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_anywhere_is_seen(bad: float, share: float) -> None:
    """Also in a sample that the share leaves out, and also when finite batches follow."""
    a = data()
    a[5, 3, 2] = bad
    assert observed(data(seed=1), data(seed=2), share=share).finite
    assert not observed(data(seed=1), a, data(seed=2), share=share).finite


def test_keep_follows_the_channels() -> None:
    """After a removal, and when updates go on, statistics are those of the kept channels in the given order."""
    first, second = data(seed=1), data(seed=2)
    activity = observed(first)
    activity.keep(torch.tensor([4, 0, 3]))
    activity.update(second[:, [4, 0, 3]])
    assert activity.channels == 3
    assert_same(activity, observed(torch.cat([first, second])[:, [4, 0, 3]]))


def test_pickling_keeps_everything() -> None:
    activity = observed(data(), threshold=0.5, share=0.5, bins=8)
    again = pickle.loads(pickle.dumps(activity))
    assert_same(again, activity)
    again.update(data(seed=3))
    activity.update(data(seed=3))
    assert_same(again, activity)


def test_float64_activations_keep_their_precision() -> None:
    """A constant is folded from the highest and lowest value, so these may not be rounded to float32."""
    a = torch.full((4, 1, 3), 0.7, dtype=torch.float64)
    activity = observed(a, a)
    assert float(activity.highest) == float(activity.lowest) == 0.7
    assert float(activity.mean) == pytest.approx(0.7, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_other_types_are_read_as_float32(dtype: torch.dtype, threshold: float) -> None:
    """A half-precision activation is judged by its own value: the threshold is not rounded to its type."""
    a = (data() / 64.0).to(dtype)
    a[0, 0, 0] = torch.tensor(0.1, dtype=dtype)
    a[:, 3] = torch.tensor(0.1, dtype=dtype)  # rounded up in bfloat16: above 0.1
    activity = observed(a, threshold=threshold)
    assert_same(activity, observed(a.float(), threshold=threshold))
    assert torch.equal(activity.fired > 0, activity.fired_samples > 0)
    assert activity.highest.dtype == torch.float32
    assert activity.total.dtype == torch.float64


def size(activity: Activity) -> int:
    return sum(v.numel() * v.element_size() for v in vars(activity).values() if isinstance(v, Tensor))


def test_memory_is_fixed() -> None:
    activity = Activity(5, share=1.0)
    before = size(activity)
    for seed in range(10):
        activity.update(data(n=3 + seed, seed=seed))
        assert size(activity) == before
    assert before == 5 * (2 * 8 + 2 * 4 + 3 * 8 + 16 * 8)


class NoSync(TorchDispatchMode):
    """Fails on everything that would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func)
        assert not any(bad in name for bad in ("_local_scalar_dense", "nonzero", "_to_copy.cpu")), name
        if "_to_copy" in name:
            assert (kwargs or {}).get("device") is None, name
        return func(*args, **(kwargs or {}))


def test_update_never_waits_for_the_device() -> None:
    activity, a = Activity(5, share=0.5), data()
    with NoSync():
        activity.update(a)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        a.sum().item()


RANK = """
import sys, pickle, torch, torch.distributed as dist
sys.path[:0] = sys.argv[3:]
from helpers.activities import data, observed
from helpers.activities import read
rank, where = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{where}/init", rank=rank, world_size=2)
a = data(n=30)
mine = observed(a[:11] if rank == 0 else a[11:])
mine.moments = read(rank)
mine.all_reduce()
pickle.dump(mine, open(f"{where}/{rank}.pkl", "wb"))
for culprit in (0, 1):
    broken = data()
    if rank == culprit:
        broken[2, 3, 1] = float("nan")
    other = observed(broken)
    other.all_reduce()
    pickle.dump(other, open(f"{where}/{rank}.nan{culprit}.pkl", "wb"))
dist.destroy_process_group()
"""


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    """Sums, counts, maxima and minima over gloo; second moments as well; a NaN on one rank is known to both."""
    run_two_ranks(RANK, tmp_path)
    moments = read(0).merged(read(1))
    for rank in (0, 1):
        found = pickle.loads((tmp_path / f"{rank}.pkl").read_bytes())
        assert_same(found, observed(data(n=30)))
        torch.testing.assert_close(found.moments.sums, moments.sums)
        for culprit in (0, 1):
            assert not pickle.loads((tmp_path / f"{rank}.nan{culprit}.pkl").read_bytes()).finite


def test_drift_equals_scipy() -> None:
    """With half a count in every bin, so that a bin that was empty is no infinity; 0 for equal shares of many."""
    generator = torch.Generator().manual_seed(0)
    now, before = torch.randint(0, 40, (2, 30, 6), generator=generator)
    now[0], before[1] = 0, 0
    expected = scipy.stats.entropy(now.numpy() + 0.5, before.numpy() + 0.5, base=2, axis=1)
    np.testing.assert_allclose(drift_bits(now, before), expected, atol=1e-12)
    assert drift_bits(now, now).tolist() == [0.0] * 30
    assert (drift_bits(now, before)[2:] > 0).all()


def test_a_state_goes_on_where_it_was_taken(tmp_path: Path) -> None:
    whole, first = observed(data(seed=1), data(seed=2)), observed(data(seed=1))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    again = Activity(5, share=1.0)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    again.update(data(seed=2))
    assert_same(again, whole)
    for name in SUMS:  # to the bit, not nearly
        assert torch.equal(getattr(again, name), getattr(whole, name)), name
    assert again.samples == 48


@pytest.mark.parametrize("other", [{"channels": 4}, {"channels": 5, "bins": 8}])
def test_a_state_of_other_channels_or_bins_is_refused(other: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected shape"):
        Activity(**other).load_state_dict(observed(data()).state_dict())  # type: ignore[arg-type]
