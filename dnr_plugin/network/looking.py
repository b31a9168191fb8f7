"""A model made ready to be looked at: what Torch-Pruning cannot follow in its autograd graph stands aside meanwhile.

Nothing works in place, outputs that are views are copied, and what acts on each element by itself is no layer of
channels. So the graph holds the layers that a prune has to change, and no others.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from dnr_plugin.network.attention import attention_stand_ins
from dnr_plugin.network.kinds import kind_of
from dnr_plugin.network.sequence_kinds import Recurrent


@contextlib.contextmanager
def prepared(model: nn.Module) -> Iterator[list[Tensor]]:
    """Lets stand-ins run in a model while it is traced; afterwards all is as it was.

    What is given has to be traced beside the outputs, once the model ran.

    - modules with ``inplace`` set work out of place: an operation in place rewrites the history of what it changes;
    - the output of InstanceNorm, a view, is copied: what works in place behind it would take the norm out of the graph;
    - a PReLU with one slope for all channels is a LeakyReLU: Torch-Pruning takes it for a layer of one channel;
    - a recurrent layer is one product with its input, not a loop over time;
    - split attention hands its value on, and what its query and key come to aside.
    """
    aside: list[Tensor] = []
    in_place = [module for module in model.modules() if getattr(module, "inplace", False) is True]
    forwards: dict[nn.Module, Any] = {}
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for module in in_place:
            module.inplace = False  # type: ignore[assignment]
        for module in [*model.modules()]:
            kind = kind_of(module)
            if isinstance(module, nn.modules.instancenorm._InstanceNorm) and kind.stock:
                forwards[module] = Tensor.clone
            elif isinstance(kind, Recurrent) and kind.stock:
                forwards[module] = kind.stand_in
            for name, child in module._modules.items():
                if isinstance(child, nn.PReLU) and child.num_parameters == 1:
                    swapped.append((module, name, child))
                    module._modules[name] = nn.LeakyReLU(float(child.weight.detach()))
        with _running(forwards | attention_stand_ins(model, aside.append)):
            yield aside
    finally:
        for module in in_place:
            module.inplace = True  # type: ignore[assignment]
        for module, name, child in swapped:
            module._modules[name] = child


@contextlib.contextmanager
def transparent_norms(model: nn.Module, *, batch: bool = False) -> Iterator[None]:
    """Lets the norms that mix channels hand on what they get, so that channels can be told apart behind them.

    Args:
        model: with LayerNorm, GroupNorm and RMSNorm of torch's own.
        batch: whether BatchNorm, InstanceNorm and dropout do so as well, which in train mode mix samples or draw.
    """
    types: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
    types += (nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()
    if batch:
        types += (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    norms = [module for module in model.modules() if isinstance(module, types) and kind_of(module).stock]
    with _running(dict.fromkeys(norms, Tensor.clone)):
        yield


@contextlib.contextmanager
def _running(forwards: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Lets modules run by another ``forward``."""
    before = {module: module.__dict__["forward"] for module in forwards if "forward" in module.__dict__}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module in forwards:
            if module in before:
                module.__dict__["forward"] = before[module]
            else:
                del module.__dict__["forward"]


class OutOfTime(BaseException):
    """What should have ended did not. No ``except Exception`` inside swallows it."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Ends with `OutOfTime` what runs longer inside, where it is Python that runs."""
    thread, lock, state = threading.get_ident(), threading.Lock(), {"inside": True, "over": False}
    raise_in: Any = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def stop() -> None:
        with lock:
            if state["inside"]:
                state["over"] = True
                raise_in(ctypes.c_ulong(thread), ctypes.py_object(OutOfTime))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except OutOfTime:
        state["over"] = False
        raise
    finally:
        with lock:
            state["inside"] = False
        timer.cancel()
        # one that is on its way still arrives here; calling it back would leave the interpreter waiting for it for ever
        with contextlib.suppress(OutOfTime):
            for _ in range(1000 * state["over"]):
                pass
