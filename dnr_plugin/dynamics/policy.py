"""Who becomes a candidate for removal while a network trains, who is given back, and whose time has come."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dnr_plugin.dynamics.candidates import CandidateHistory
from dnr_plugin.dynamics.timetable import Timetable
from dnr_plugin.pruning.layers import Layer
from dnr_plugin.pruning.targets import TARGETS, Dead, Target

Ramp = Literal["linear", "cubic", "at_once"]
# From a share of the target's measure that is to be gone, and neurons that go before all others: those that go.
Chooser = Callable[[float, Mapping[str, Tensor]], Mapping[str, Sequence[int]]]
Scorer = Callable[[Layer], Tensor]
Histories = Mapping[str, CandidateHistory]


@dataclass(frozen=True)
class Policy:
    """The rules; see `dynamics.DyingNeuronDynamics` for the meaning of each option.

    Raises:
        ValueError: an option is out of range, or the timetable too short for them.
    """

    when: Timetable
    kind: str | None
    value: float
    patience: int
    ramp: Ramp
    margin: float
    max_share: float
    dying_entropy: float | None

    @property
    def target(self) -> Target | None:
        """What is to be reached; None where nothing is removed."""
        return None if self.kind is None else TARGETS[self.kind](self.value)

    @property
    def _only_dead(self) -> bool:
        return isinstance(self.target, Dead)

    def __post_init__(self) -> None:
        when = self.when
        targets = [kind for kind, target in TARGETS.items() if target.resumable]
        if self.kind is not None and self.kind not in targets:
            raise ValueError(f"kind: expected None or one of {', '.join(targets)}, found {self.kind!r}")
        if not when.in_range:
            raise ValueError(f"when: expected 1 <= watched <= check_every, found {when}")
        share, dying = self.target is None or self.target.fits, self.dying_entropy
        for name, fits, expected in (
            ("value", share, "a number above 0 and below 1"),
            ("patience", self.patience >= 0, "at least 0"),
            ("ramp", self.ramp in get_args(Ramp), f"one of {', '.join(get_args(Ramp))}"),
            ("margin", self.margin >= 1.0, "at least 1"),
            ("max_share", 0.0 < self.max_share <= 1.0, "a number in (0, 1]"),
            ("dying_entropy", dying is None or dying > 0.0, "None or a number above 0"),
        ):
            if not fits:
                raise ValueError(f"{name}: expected {expected}, found {getattr(self, name)!r}")
        if self.kind is not None and (when.last - when.first < self.patience or not when.in_time):
            raise ValueError(
                f"when: expected the first candidates (check {when.first}) to have {self.patience} checks of patience "
                f"before the last removal (check {when.last}), and that one to come by until, found {when}"
            )

    def nominate(
        self,
        number: int,
        layers: Sequence[Layer],
        histories: Histories,
        plan: Chooser,
        score: Scorer,
    ) -> dict[str, int] | None:
        """Nominates and restores candidates, in their histories.

        Args:
            number: of the check.
            layers: that were judged.
            histories: of these layers, the check included.
            plan: chooses neurons by the criterion.
            score: of the neurons of a layer.

        Returns:
            How many of each layer were nominated; None where the target is met.
        """
        woken = self._restore(number, layers, histories, plan)
        dying = self._dying(layers, histories)
        first = {layer.name: histories[layer.name].candidates | dying[layer.name] for layer in layers}
        wanted = plan(self._share(number), first)
        if not wanted and number >= self.when.last - self.patience and not self._only_dead:
            return None
        nominated = {}
        for layer in layers:
            history, called = histories[layer.name], torch.zeros(layer.size, dtype=torch.bool)
            called[list(wanted.get(layer.name, ()))] = True
            waiting = history.candidates
            history.waiting[waiting & ~called] = -1  # more waited than the target needs
            history.waiting[waiting & called] += 1
            fresh = called & ~waiting
            if number < self.when.last:
                most = max(1, int(self.max_share * layer.units))
                fresh = lowest(layer, fresh & ~woken[layer.name], most, score(layer))
            history.waiting[fresh] = 0
            history.nominated_dead[fresh] = history.dead[fresh]
            nominated[layer.name] = int(fresh.sum())
        return nominated

    def expired(
        self,
        number: int,
        before: int,
        layers: Sequence[Layer],
        histories: Histories,
        score: Scorer,
    ) -> dict[str, list[int]]:
        """The candidates that have waited long enough, in portions that may go.

        Args:
            number: of the check.
            before: of the check before.
            layers, histories, score: see `nominate`.
        """
        if not self.when.removes(number, before):
            return {}
        # a target is met at the last check whoever waits; death is a verdict that takes patience even then
        hurried = number >= self.when.last and not self._only_dead
        gone = {}
        for layer in layers:
            history = histories[layer.name]
            due = history.candidates if hurried else history.waiting >= self.patience
            going = torch.zeros_like(due)
            for part in layer.parts:
                inside = torch.isin(layer.unit, torch.tensor(part.units))
                units = int(layer.all_of(due | ~inside)[part.units].sum())
                whole = [n for n in itertools.accumulate(part.portions) if n <= units]
                if whole:
                    going |= lowest(layer, due & inside, whole[-1], score(layer))
            if going.any():
                gone[layer.name] = going.nonzero().flatten().tolist()
        return gone

    def _restore(self, number: int, layers: Sequence[Layer], histories: Histories, plan: Chooser) -> dict[str, Tensor]:
        """Gives back candidates that fire again, which it returns, and those that clearly outrank what has to go."""
        woken = {}
        for layer in layers:
            history = histories[layer.name]
            woken[layer.name] = layer.touched(history.candidates & history.nominated_dead & ~history.dead)
        if any(bool(histories[layer.name].candidates.any()) for layer in layers):
            # without a margin, neurons about the threshold would come and go at every check
            far = plan(min(1.0, self.margin * self._share(number)), self._dying(layers, histories))
            for layer in layers:
                history, low = histories[layer.name], torch.zeros(layer.size, dtype=torch.bool)
                low[list(far.get(layer.name, ()))] = True
                history.waiting[history.candidates & (~low | woken[layer.name])] = -1
        return woken

    def _dying(self, layers: Sequence[Layer], histories: Histories) -> dict[str, Tensor]:
        """Neurons that go as the dead ones do: of low entropy, and falling unless they are candidates already."""
        dying = {}
        for layer in layers:
            history = histories[layer.name]
            low = history.entropy <= (-1.0 if self.dying_entropy is None else self.dying_entropy)
            dying[layer.name] = low & (history.falling | history.candidates)
        return dying

    def _share(self, number: int) -> float:
        """The share of what the target measures that is to be gone by a check; all of it at the last nomination."""
        assert self.target is not None
        t = min(1.0, (number - self.when.first + 1) / (self.when.last - self.patience - self.when.first + 1))
        return self.target.removed * {"linear": t, "cubic": 1.0 - (1.0 - t) ** 3, "at_once": 1.0}[self.ramp]


def lowest(layer: Layer, marked: Tensor, most: int, scores: Tensor) -> Tensor:
    """Of marked neurons, in whole units, the ``most`` lowest in score; bool, shape [size]."""
    units = layer.any_of(marked).nonzero().flatten()
    order = layer.by_unit(scores)[units].argsort(stable=True)
    taken = torch.zeros_like(marked)
    taken[layer.neurons(units[order[:most]].tolist())] = True
    return taken
