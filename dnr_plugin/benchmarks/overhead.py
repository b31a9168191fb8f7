"""What observing, scoring, planning and repair cost, side by side in one process, as ratios of forward passes."""

from __future__ import annotations

import contextlib
import copy
import gc
import mmap
import statistics
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from dnr_plugin.devices import device_name, fast_layout, now, pick_device, to_device, versions
from dnr_plugin.models.build import build_model
from dnr_plugin.network.graph import build_graph
from dnr_plugin.observation.observer import Observer
from dnr_plugin.pruning.plan import plan_removal
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.recipe.sections import ModelOptions
from dnr_plugin.repair.network import repair_network
from dnr_plugin.reports.table import Table
from dnr_plugin.scoring.importance import DyingNeuronImportance
from dnr_plugin.scoring.scores import SCORES

CLASSES = 10
KEPT = 0.5  # of the FLOPs, in the plan that is repaired
_BATCH = 32  # calibration images at once
_LARGE = 64  # pixels a side from which on a network gets the stem, and fewer training steps, of large images
_WARM = 2  # training steps that are not timed
_BEFORE = 16  # batches of small images seen before: of the first, more rows go into second moments


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        network: as a recipe names it: resnet18, torchvision.resnet50.
        width: of networks of the package that have one: channels of the first stage.
        images: calibration images; side: of each, in pixels; None: 32, for torchvision's networks 224.
        batch, rounds: images of a training step, and how many are timed of each kind; None: 64 and 15, of large images
            8 and 3.
        passes: times that the calibration images pass, observed and not, in turn.
        seed: of weights and images.
    """

    network: str = "resnet18"
    width: int = 64
    images: int = 256
    side: int | None = None
    batch: int | None = None
    rounds: int | None = None
    passes: int = 2
    seed: int = 0

    def resolved(self) -> Setting:
        """With numbers for None."""
        side = self.side or (224 if "." in self.network else 32)
        batch, rounds = (8, 3) if side > _LARGE else (64, 15)
        return replace(self, side=side, batch=self.batch or batch, rounds=self.rounds or rounds)

    @property
    def name(self) -> str:
        """Of the network, with the width of those that have one."""
        return f"{self.network}, width {self.width}" if "." not in self.network else self.network


@dataclass(frozen=True)
class Cost:
    """One row.

    Attributes:
        name: of what was done.
        seconds: that it took; the median, where it was done several times, of training steps the mean, since second
            moments are not multiplied in each.
        ratio: to the forward passes of the same images, or to a plain training step; of these means, or the median of
            pairs that were timed in turn.
        peak_bytes: most memory beyond what was held before; None where it cannot be told (outside of Linux, without a
            GPU) or was not asked.
    """

    name: str
    seconds: float
    ratio: float
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Overhead:
    """What one network's costs are.

    Attributes:
        setting: resolved.
        calibration: costs of a network that is scored, planned and repaired, forward passes first; each score on top of
            what was observed.
        training: costs of training steps, the plain one first.
        where: hardware and versions.
        products: multiply-adds in float64 that scoring by redundancy is bound to, and the seconds in which
            ``torch.matmul`` does as many here.
    """

    setting: Setting
    calibration: list[Cost]
    training: list[Cost]
    where: str
    products: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain figures."""
        return asdict(self)

    def tables(self) -> list[Table]:
        """Of calibration, and of training steps."""
        s = self.setting
        head = ["", "seconds", "times", "memory at the peak"]
        titles = (
            f"{s.name}: {s.images} images of {s.side}x{s.side}, times as long as their forward passes",
            f"{s.name}: training steps of {s.batch} images, times as long as a plain one (n = {s.rounds})",
        )
        return [
            Table(title, head, [_row(cost) for cost in costs])
            for title, costs in zip(titles, (self.calibration, self.training), strict=True)
        ]

    def notes(self) -> list[str]:
        """What a reader should know beside the tables."""
        count, seconds = self.products
        return [
            f"{self.where}, seed {self.setting.seed}, n = {self.setting.passes} passes in turn; the rest is done once.",
            f"Scoring by redundancy is {count / 1e9:.1f} G multiply-adds in float64 (inverses of second moments, and "
            f"removals), for which torch.matmul takes {seconds:.1f} s here.",
        ]


def overhead(setting: Setting, *, device: str = "auto") -> Overhead:
    """Measures a network with fresh weights; what is compared is timed in turn, so that drift hits both alike.

    Args:
        setting: what is measured.
        device: "auto", "cpu" or "cuda".

    Raises:
        InputError: an unknown network, or one that does not take such images.
    """
    setting, chosen = setting.resolved(), pick_device(device)
    model = fresh_network(setting, chosen)
    bench = _Bench(model, setting, chosen)
    calibration, products = bench.calibration()
    where = f"{device_name(chosen)}, torch {versions()['torch']}"
    return Overhead(setting, calibration, bench.training(), where, products)


def fresh_network(setting: Setting, device: torch.device) -> nn.Module:
    """A network with the weights of a seed, in the layout that the device is fast in.

    Args:
        setting: resolved.
        device: where it is.
    """
    assert setting.side is not None
    torch.manual_seed(setting.seed)
    own: dict[str, Any] = {"width": setting.width} if "." not in setting.network else {}
    if setting.network == "resnet18":
        own["stem"] = "imagenet" if setting.side > _LARGE else "cifar"
    model = build_model(ModelOptions(name=setting.network, **own), CLASSES, image_size=setting.side)
    return to_device(model, device).to(memory_format=fast_layout(device))


class _Bench:
    def __init__(self, model: nn.Module, setting: Setting, device: torch.device) -> None:
        self.model, self.setting, self.device = model, setting, device

    def images(self, count: int) -> Tensor:
        side = self.setting.side or 0
        return torch.randn(count, 3, side, side, device=self.device).to(memory_format=fast_layout(self.device))

    def clock(self, work: Callable[[], object]) -> float:
        start = now(self.device)
        work()
        return now(self.device) - start

    def calibration(self) -> tuple[list[Cost], tuple[float, float]]:
        """Forward passes, then all that is done on them."""
        model, count = self.model.eval(), self.setting.images
        batches = [self.images(min(_BATCH, count - start)) for start in range(0, count, _BATCH)]
        importance = DyingNeuronImportance()

        @torch.no_grad()
        def forward() -> None:
            for batch in batches:
                model(batch)

        def observe() -> None:
            with importance.observe(model):
                forward()

        with torch.no_grad():
            model(batches[0])
        plain, observed, peaks = list[float](), list[float](), list[int | None]()
        for _ in range(self.setting.passes):
            plain.append(self.clock(forward))
            with _Peak(self.device) as peak:
                observed.append(self.clock(observe))
            peaks.append(peak.bytes)
        passed = statistics.median(plain)
        costs = [
            Cost("forward passes", passed, 1.0),
            Cost("observing, second moments included", statistics.median(observed), _ratio(observed, plain), peaks[0]),
        ]

        def add(name: str, work: Callable[[], object]) -> None:
            with _Peak(self.device) as peak:
                seconds = self.clock(work)
            costs.append(Cost(name, seconds, seconds / passed, peak.bytes))

        example = batches[0][:1]
        graph = build_graph(copy.deepcopy(model), example)
        groups = [g for g in graph.get_all_groups() if not isinstance(g[0].dep.target.module, nn.Linear)]

        def scored(criterion: Callable[[Any], Any]) -> Callable[[], None]:
            def score() -> None:
                for group in groups:
                    criterion(group)

            return score

        def planned() -> None:
            plans.append(plan_removal(model, example, importance, "flops", KEPT, scope="cost_aware").removals)

        def taylor() -> None:
            for batch in batches:
                labels = torch.randint(0, CLASSES, (len(batch),), device=self.device)
                F.cross_entropy(graph.model(batch), labels).backward()  # type: ignore[no-untyped-call]
            scored(tp.importance.TaylorImportance())()

        plans: list[dict[str, list[int]]] = []
        products = self._products(importance)
        add("scoring all groups: redundancy, the default", scored(importance))
        add(f"planning to {KEPT:.0%} of the FLOPs, scores known", planned)
        pruned = copy.deepcopy(model)
        prune_neurons(pruned, example, plans[0])
        add("repair_network", lambda: repair_network(pruned, model, example, plans[0], batches))
        for name in SCORES:
            if name != "redundancy":
                other = DyingNeuronImportance(name)
                other.judge_by(importance.observer)  # type: ignore[arg-type]
                add(f"scoring all groups: {name}", scored(other))
        add("MagnitudeImportance", scored(tp.importance.MagnitudeImportance()))
        add("TaylorImportance, with the gradients that it needs", taylor)
        return costs, products

    def _products(self, importance: DyingNeuronImportance) -> tuple[float, float]:
        """See `Overhead`; inverses cost F^3, taking all inputs away 2 F^3 / 3 and, from O outputs, O F^2 / 2."""
        assert importance.observer is not None
        count = 0.0
        for name, activity in importance.observer.activities.items():
            blocks = [] if activity.moments is None else activity.moments.blocks
            for block in blocks:
                inputs = block.channels * block.features
                weights = sum(p.numel() for p in importance.observer.modules[name].parameters() if p.dim() > 1)
                count += 5 / 6 * inputs**3 + weights / len(blocks) / 2 * inputs
        a = torch.randn(1024, 1024, dtype=torch.float64)
        a @ a
        each = min(self.clock(lambda: a @ a) for _ in range(3)) / 1024**3
        return count, count * each

    def training(self) -> list[Cost]:
        """Steps with every batch observed, and without. Opening an observer, once for many, is not timed."""
        model, batch = self.model.train(), self.setting.batch or 0
        images, labels = self.images(batch), torch.randint(0, CLASSES, (batch,), device=self.device)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        observers = {
            "a plain step": None,
            "every batch observed, as training with dying neurons does": Observer(model, training=True),
            "every batch observed, second moments included": Observer(model, moments=True),
        }

        def step() -> None:
            optimizer.zero_grad()
            out = model(images)
            out = out if isinstance(out, Tensor) else out[0]  # Inception and GoogLeNet add others
            F.cross_entropy(out, labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        times: dict[str, list[float]] = {name: [] for name in observers}
        with contextlib.ExitStack() as running:
            opened = [running.enter_context(observer) for observer in observers.values() if observer is not None]
            if (self.setting.side or 0) <= _LARGE:
                with torch.no_grad():
                    for _ in range(_BEFORE):
                        model(images)
            for number in range(_WARM + (self.setting.rounds or 0)):
                for name, observer in observers.items():
                    with _paused(other for other in opened if other is not observer):
                        seconds = self.clock(step)
                    if number >= _WARM:
                        times[name].append(seconds)
        plain = sum(next(iter(times.values())))
        return [Cost(name, statistics.fmean(taken), sum(taken) / plain) for name, taken in times.items()]


@contextlib.contextmanager
def _paused(observers: Iterable[Observer]) -> Iterator[None]:
    with contextlib.ExitStack() as pauses:
        for observer in observers:
            pauses.enter_context(observer.paused())
        yield


def measured(
    networks: Sequence[str],
    widths: Sequence[int],
    images: Sequence[int],
    setting: Mapping[str, Any],
    device: str,
    track: Callable[..., Any],
) -> Iterator[Overhead]:
    """`overhead` of several networks, each of every width that it can have, and with every number of images."""
    settings = [
        Setting(network=network, width=width, images=count, **setting)
        for network in networks
        for width in (widths[:1] if "." in network else widths)
        for count in images
    ]
    for one in track(settings, len(settings), "measuring"):
        yield overhead(one, device=device)


class _Peak:
    """Highest memory inside the context beyond that at its start: of the GPU, or of the process as Linux tells it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> _Peak:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif _STATM.exists():
            self._before = self._highest = _resident()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._highest = max(self._highest, _resident())

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        elif self._thread is not None:
            self._done.set()
            self._thread.join()
            self.bytes = self._highest - self._before


_STATM = Path("/proc/self/statm")


def _resident() -> int:
    return int(_STATM.read_text().split()[1]) * mmap.PAGESIZE


def _ratio(first: list[float], second: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def _row(cost: Cost) -> list[str]:
    memory = "" if cost.peak_bytes is None else f"{cost.peak_bytes / 2**20:,.0f} MiB"
    return [cost.name, f"{cost.seconds:.3f}", f"{cost.ratio:.3f}", memory]
