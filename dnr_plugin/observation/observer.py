"""Hooks that feed `activity.Activity` from a live network, at the inputs of the layers that consume its neurons.

Read at the consumer, a neuron's activation has every ReLU, residual sum, pooling, concatenation and flattening behind
it already, whether these were modules, functions or the same module called twice.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.network.calling import Pausable, eager, module_names, uncompiled
from dnr_plugin.network.kinds import consumer, is_consumer
from dnr_plugin.observation.activity import Activity
from dnr_plugin.observation.moments import moments_of, share


def _in_backward() -> bool:
    """Whether autograd is running: a layer called then is being recomputed by gradient checkpointing."""
    probe = getattr(torch._C, "_current_graph_task_id", None)
    return probe is not None and probe() != -1


def _being_traced(module: nn.Module) -> bool:
    """Whether Torch-Pruning (by hooks of its own) or fvcore (by the JIT) is tracing, on data that mean nothing."""
    if torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
        return True
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__module__", "").startswith("torch_pruning") for hook in hooks)


class _InputHook:
    """A forward pre-hook. A class, not a lambda, so that a model can be pickled or copied while it is observed.

    The hook of such a copy does nothing: only the model itself is observed.
    """

    def __init__(self, observer: Observer, name: str) -> None:
        self.observer: Observer | None = observer
        self.name = name

    def __getstate__(self) -> dict[str, Any]:
        return {"observer": None, "name": self.name}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.observer is None:
            return
        a = consumer(module).reads(args, kwargs)
        if a is not None:
            self.observer._read(self.name, module, a)


class Observer(Pausable):
    """Reads the activations of a model while it is used as a context manager.

    Statistics add up over several contexts, until `reset`. Hooks exist only inside the context, also when it is left
    by an exception. They are silent while the model is traced by Torch-Pruning or fvcore, and while autograd
    recomputes a checkpointed segment.

    Args:
        model: any network; a DataParallel, DistributedDataParallel or compiled wrapper is seen through.
        threshold, share, bins: see `activity.Activity`.
        moments: gather second moments as well (`moments.Moments`), of wide layers by blocks (`moments.BlockMoments`).
        training: watch a network that trains: read only in train mode, and ahead of other hooks, such as those that
            zero candidates.

    Attributes:
        activities: statistics by the consumer's name, of those that were called; brought up to date when the context
            is left.
        modules: every consumer by name, called or not.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        threshold: float = 0.0,
        share: float = 0.125,
        bins: int = 16,
        moments: bool = False,
        training: bool = False,
    ) -> None:
        self.model, self.moments = model, moments
        self.threshold, self.share, self.bins, self.training = threshold, share, bins, training
        self.modules = {name: module for module, name in module_names(eager(model)).items() if is_consumer(module)}
        self.activities: dict[str, Activity] = {}
        self._by_device: dict[tuple[str, torch.device], Activity] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._recent: deque[tuple[weakref.ref[Tensor], int, type, Activity]] = deque(maxlen=8)
        self._lock = threading.Lock()
        self._running = contextlib.ExitStack()

    def __enter__(self) -> Observer:
        if self._handles:
            raise RuntimeError("this observer is already open")
        for name, module in self.modules.items():
            hook = _InputHook(self, name)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=self.training))
        if not self.training:  # whose steps are compiled with the hooks, or not at all
            self._running.enter_context(uncompiled())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        read = bool(self._by_device)
        self._collect()
        if kind is not None:
            return
        broken = [name for name, activity in self.activities.items() if not activity.finite]
        if broken:
            raise ValueError(
                f"activations that are not finite reached {', '.join(broken[:5])}"
                f"{f' and {len(broken) - 5} more layers' if len(broken) > 5 else ''}: statistics of NaN or infinity "
                "would make live neurons look dead"
            )
        if not read:
            raise RuntimeError(
                "no activation was read: either the model was not called inside the context, or it was compiled and "
                "warmed up before (hooks added later never fire in a compiled model: observe first)"
            )

    def release(self) -> None:
        """Removes the hooks and asks nothing about what they read."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._running.close()

    def reset(self) -> None:
        """Forgets everything read so far, also inside the context."""
        with self._lock:
            self.activities.clear()
            self._by_device.clear()
            self._recent.clear()

    @property
    def samples(self) -> int:
        """The fewest samples that any layer called so far has seen, also inside the context."""
        seen: dict[str, int] = {name: activity.samples for name, activity in self.activities.items()}
        for (name, _), activity in self._by_device.items():
            seen[name] = seen.get(name, 0) + activity.samples
        return min(seen.values(), default=0)

    def all_reduce(self) -> None:
        """Adds up what the ranks of the default process group have read; before the context is left."""
        for name, module in self.modules.items():  # each rank may have called other layers
            device = self._device_of(module)
            activity = self._by_device.get((name, device)) or self._empty(name, module, device)
            activity.all_reduce()
            if activity.samples:
                self._by_device[name, device] = activity

    def state_dict(self) -> dict[str, Any]:
        """Everything read so far, as tensors and plain numbers; on the CPU."""
        merged: dict[str, Activity] = {}
        for name, activity in [*self.activities.items(), *((name, a) for (name, _), a in self._by_device.items())]:
            if name in merged:
                merged[name].merge(activity)
            else:
                merged[name] = copy.copy(activity)
        return {name: activity.state_dict() for name, activity in merged.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned, for a network of the same widths."""
        self.reset()
        for name, values in state.items():
            module = self.modules[name]
            device = self._device_of(module)
            self._by_device[name, device] = self._empty(name, module, device)
            self._by_device[name, device].load_state_dict(values)

    def _device_of(self, module: nn.Module) -> torch.device:
        return next(itertools.chain(module.parameters(), self.model.parameters())).device

    def _empty(self, name: str, module: nn.Module, device: torch.device) -> Activity:
        channels, _ = consumer(module).channels
        activity = Activity(channels, threshold=self.threshold, share=self.share, bins=self.bins, device=device)
        if self.moments:
            activity.moments = moments_of(module, device)
            earlier = self.activities.get(name)
            if activity.moments is not None and earlier is not None and earlier.moments is not None:
                activity.moments.go_on_from(earlier.moments)  # type: ignore[arg-type]
        return activity

    def _read(self, name: str, module: nn.Module, a: Tensor) -> None:
        if self._paused or _being_traced(module) or _in_backward() or a.numel() == 0:
            return
        if self.training and not self.model.training:
            return
        if torch.is_inference_mode_enabled():  # where sums would be made that nothing outside of it can be added to
            with torch.inference_mode(False), torch.no_grad():
                self._read(name, module, a)
            return
        # DataParallel replicas run in threads: one set of sums for each device, merged at the end
        with self._lock:
            activity = self._by_device.get((name, a.device))
            if activity is None:
                self._by_device[name, a.device] = activity = self._empty(name, module, a.device)
            batch = self._recall(module, a)
        if batch is None:
            batch = activity.of_batch(consumer(module).by_channel(a.detach()))
            if not a.is_inference():
                self._recent.append((weakref.ref(a), a._version, type(module), batch))
        activity.merge(batch)
        if activity.moments is not None:
            activity.moments.update(module, a)

    def _recall(self, module: nn.Module, a: Tensor) -> Activity | None:
        """The statistics of this very tensor, unless it was written to since: branches often read the same one."""
        for reference, version, reader, batch in tuple(self._recent):
            # inference tensors count no versions, so that an in-place change of them would go unseen
            if reference() is a and reader is type(module) and not a.is_inference() and a._version == version:
                return batch
        return None

    def _collect(self) -> None:
        for (name, _), activity in self._by_device.items():
            if name in self.activities:
                self.activities[name].merge(activity)
            else:
                self.activities[name] = activity
        share(block for a in self.activities.values() if a.moments is not None for block in a.moments.blocks)
        self._by_device.clear()
        self._recent.clear()
