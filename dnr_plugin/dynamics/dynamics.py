"""Training with dying neurons: dying neurons become candidates, candidates come back or are removed for good."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from dnr_plugin.devices import ranks
from dnr_plugin.dynamics.candidates import CandidateHistory
from dnr_plugin.dynamics.check import Check, LayerCheck
from dnr_plugin.dynamics.live_parameters import live_factors
from dnr_plugin.dynamics.policy import Policy, Ramp
from dnr_plugin.dynamics.timetable import Timetable
from dnr_plugin.dynamics.zeroing import SoftZeros
from dnr_plugin.errors import TargetError
from dnr_plugin.network.calling import eager, eval_outputs, one_sample, output_difference
from dnr_plugin.network.dependencies import channels_carrying, inexact_reason, output_layers, uses
from dnr_plugin.observation.observer import Observer
from dnr_plugin.pruning.groups import prunable_layers
from dnr_plugin.pruning.layers import Layer, Limits
from dnr_plugin.pruning.numbering import renumbered
from dnr_plugin.pruning.order import COUNTED_SCOPES
from dnr_plugin.pruning.plan import plan_removal
from dnr_plugin.pruning.removal import prune_neurons
from dnr_plugin.pruning.targets import Baseline, baseline
from dnr_plugin.scoring.evidence import histograms, judge
from dnr_plugin.scoring.importance import DyingNeuronImportance


class DyingNeuronDynamics:
    """Watches the neurons of a network that is being trained, and removes those that stay dead or useless.

    Every ``when.check_every`` steps the neurons are judged on the training batches just seen. Neurons whose removal the
    target calls for, dead ones first, become *candidates*: from then on they are zero where they are used, but go on
    learning (`zeroing.SoftZeros`). A candidate that was dead and fires again is restored, and so is one that has come
    to rank clearly above those that have to go. What is still a candidate after ``patience`` checks is removed
    physically: parameters, gradients, optimizer state and statistics shrink, learning rate schedules go on, and the
    network trains on, smaller. Since it was zero all along, its removal changes nothing (but behind LayerNorm,
    GroupNorm, attention and softmax over channels).

    The policy of *DNR-Pruning* (Wang & Jiang, TMLR 2025), whose code cannot run; soft zeros after SFP (He et al., IJCAI
    2018); with ``kind="dead"`` and ``patience=0`` that of DemP (Dufort-Labbé et al., arXiv 2403.07688).

    Example:
        >>> with DyingNeuronDynamics(model, example_inputs, when=Timetable(check_every=100, until=2000),
        ...                          optimizer=optimizer, kind="flops", value=0.5) as dynamics:
        ...     for images, labels in batches:
        ...         optimizer.zero_grad()
        ...         loss_of(model(images), labels).backward()
        ...         optimizer.step()
        ...         check = dynamics.step()

    With `DistributedDataParallel`, give the network inside the wrapper, and wrap it anew after a check that removed
    something: its reducer holds the old parameters. Statistics are summed over the ranks, so that all remove the same.

    Args:
        model: the bare network; changed in place while it trains. Hooks live only inside the context.
        example_inputs: as Torch-Pruning takes them.
        when: to look at the neurons and to remove some.
        optimizer: taken along when neurons are removed.
        followers: models that lose the same neurons, as an average of the weights (`removal.prune_neurons`).
        kind: a target of `targets.TARGETS` but latency; None to watch and remove nothing.
        value: share kept ("flops", "params") or removed ("neuron_sparsity", "weight_sparsity") at the end.
        patience: checks that a candidate waits, >= 0; 0 removes it at once. At the last check all go that a target
            needs, candidates before others; those that are merely dead stay.
        zero: whether candidates are zeroed while they wait.
        ramp: how the target is approached from check to check; see the recipes' ``prune.dynamics.ramp``.
        margin: a candidate that was alive is restored once it would stay if ``margin`` times as much were to go, >= 1.
        max_share: largest share in (0, 1] of a layer that becomes candidates at one check, at least one neuron; not at
            the last, where the target is met whatever it takes.
        dying_entropy: a neuron whose activation histogram has at most this entropy in bits, and less than at the
            check before, is dying and goes as the dead ones do; None: only dead ones.
        min_samples: samples per layer that a check needs; it is put off until so many were read.
        importance: ranks the neurons and sets how they are read; `DyingNeuronImportance("variation")` by
            default. Redundancy, too, goes by variances alone here, as no second moments are gathered while training.
        scope: "local", "global" or "isomorphic" (`plan.plan_removal`).
        limits: what may be removed.
        dense: `targets.baseline` of the dense model, when going on with one that was pruned.
        fold: move the means of removed neurons that were not zeroed into what follows.

    Attributes:
        checks: how many there were.
        histories: root layer -> `CandidateHistory`.
        skipped: groups that were left alone at the last check, as (root layer, reason).
        finished: whether removal has ended.
        stopped: why it ended early, or None.

    Raises:
        ValueError: an argument is out of range.
        InputError: the model cannot be traced, or the limits name no layer.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        when: Timetable,
        optimizer: torch.optim.Optimizer | None = None,
        kind: str | None = "dead",
        value: float = 1.0,
        patience: int = 2,
        zero: bool = True,
        ramp: Ramp = "cubic",
        margin: float = 2.0,
        max_share: float = 0.25,
        dying_entropy: float | None = None,
        min_samples: int = 1536,
        importance: DyingNeuronImportance | None = None,
        scope: str = "local",
        limits: Limits = Limits(),
        dense: Baseline | None = None,
        fold: bool = True,
        followers: Sequence[nn.Module] = (),
    ) -> None:
        policy = Policy(when, kind, value, patience, ramp, margin, max_share, dying_entropy)
        if min_samples < 1:
            raise ValueError(f"min_samples: expected at least 1, found {min_samples}")
        if scope not in COUNTED_SCOPES:
            raise ValueError(f"scope: expected one of {', '.join(COUNTED_SCOPES)}, found {scope!r}")
        model = eager(model)
        self.model, self.example, self.optimizer = model, one_sample(example_inputs), optimizer
        self.when, self.policy, self.min_samples = when, policy, min_samples
        self._zeroing = zero
        self.importance = importance or DyingNeuronImportance("variation", moments=False)
        self.scope, self.limits, self.fold, self.followers = scope, limits.in_training(scope), fold, tuple(followers)
        self.dense = dense or baseline(model, example_inputs, verify=limits.verify)
        if dense is None and policy.target is not None:
            policy.target.check_counts(self.dense.report)
        self._layers()  # what the limits name must exist
        self._outputs = output_layers(model, self.example)
        self._zeros = SoftZeros()
        self._observer: Observer | None = None
        self._dead_in: dict[str, Layer] = {}
        self._live: dict[Tensor, Tensor] | None = None
        self._due = (-1, False)
        self._inside = False
        self._read: Mapping[str, Any] | None = None
        self._step, self._next, self._number = 0, when.step_of(1), 0
        self.checks = 0
        self.histories: dict[str, CandidateHistory] = {}
        self.skipped: list[tuple[str, str]] = []
        self.finished = kind is None
        self.stopped: str | None = None

    def __enter__(self) -> DyingNeuronDynamics:
        self._inside = True
        try:
            if self.histories:
                self._install(self._layers())
            self._watch()
            if self._observer is not None and self._read is not None:
                self._observer.load_state_dict(self._read)
        except BaseException:  # no hooks stay behind
            self.__exit__(None, None, None)
            raise
        self._read = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends watching; candidates that still wait are zeroed no longer."""
        self._inside = False
        self._zeros.clear()
        self._dead_in, self._live = {}, None
        if self._observer is not None:
            self._observer.release()
            self._observer = None

    @property
    def due(self) -> bool:
        """Whether the next call of `step` will judge the neurons."""
        if self._observer is None or self._step + 1 < self._next:
            return False
        if self._due[0] == self._step:
            return self._due[1]
        samples = torch.tensor(self._observer.samples, device=next(self.model.parameters()).device)
        if ranks() > 1:  # the same answer everywhere, also where last batches differ
            torch.distributed.all_reduce(samples)
        self._due = (self._step, int(samples) >= self.min_samples)
        return self._due[1]

    def step(self) -> Check | None:
        """Counts a training step, to be called after the optimizer's; judges the neurons when it is time.

        Returns:
            What was found and done, or None where no check was due.

        Raises:
            RuntimeError: outside of the context; or no activation was read.
            ValueError: activations were not finite.
        """
        if not self._inside:
            raise RuntimeError("dynamics.step() was called outside of `with dynamics:`, where nothing is watched")
        due = self.due
        self._step += 1
        check = self._check() if due else None
        self._watch()
        return check

    def live(self, parameter: Tensor) -> Tensor | None:
        """Factors that broadcast to a parameter: 0 where it makes a neuron that was dead at the last check, else 1.

        None where it makes no dead neuron. For `pressure.add_noise`.
        """
        if self._live is None:
            self._live = live_factors({name: self.histories[name].dead for name in self._dead_in}, self._dead_in)
        return self._live.get(parameter)

    def _watch(self) -> None:
        """Opens the observer for the last steps before a check."""
        if self._observer is None and self._step >= self.when.watches_from(self._number + 1):
            self._observer = self.importance.observer_of(self.model, training=True)
            self._observer.__enter__()

    def _check(self) -> Check:
        start = time.perf_counter()
        self._judge()
        self.checks += 1
        # from here on the network is traced and copied, which is not for hooks to see
        self._zeros.clear()
        prunable = prunable_layers(self.model, self.example, self.limits, self.dense.sizes)
        layers, self.skipped = prunable.layers, prunable.skipped
        changed: dict[str, tuple[Tensor, Tensor]] = {}
        zero: dict[str, Tensor] = {}
        for layer in layers:
            evidence = self.importance.evidence(layer.group)
            if not evidence:
                self.skipped.append((layer.name, str(self.importance.why_unscored(layer.group))))
                continue
            history = self.histories.setdefault(layer.name, CandidateHistory(layer.size, self.importance.bins))
            verdict = judge(evidence, layer.size)
            zero[layer.name] = verdict.zero
            changed[layer.name] = history.update(verdict.dead, histograms(evidence, layer.size))
        judged = [layer for layer in layers if layer.name in changed]
        waiting = {layer.name: int(self.histories[layer.name].candidates.sum()) for layer in judged}
        nominated = self._move(judged)
        rows = []
        for layer in judged:
            history, (died, reactivated) = self.histories[layer.name], changed[layer.name]
            rows.append(
                LayerCheck(
                    layer=layer.name,
                    neurons=layer.size,
                    dead=int(history.dead.sum()),
                    died=int(died.sum()),
                    reactivated=int(reactivated.sum()),
                    candidates=0,
                    nominated=nominated.get(layer.name, 0),
                    restored=0,
                    removed=0,
                    entropy=float(history.entropy.mean()),
                    drift=float(history.drift.mean()) if history.checks > 1 else None,
                )
            )
        removed, exact, difference = self._remove(judged, zero)
        self._number = self.when.number(self._step)
        self._next = self.when.step_of(self._number + 1)
        for k, row in enumerate(rows):
            gone, candidates = len(removed.get(row.layer, ())), int(self.histories[row.layer].candidates.sum())
            restored = waiting[row.layer] + row.nominated - gone - candidates
            rows[k] = dataclasses.replace(row, candidates=candidates, restored=restored, removed=gone)
        return Check(self.checks, self._step, rows, removed, exact, difference, time.perf_counter() - start)

    def _judge(self) -> None:
        """Hands what was read over to the criterion, the sum of all ranks."""
        assert self._observer is not None
        observer, self._observer = self._observer, None
        observer.release()
        if ranks() > 1:  # before anything can fail on one rank and leave the others waiting
            observer.all_reduce()
        observer.__exit__(None, None, None)
        self.importance.judge_by(observer)

    def _layers(self) -> list[Layer]:
        return prunable_layers(self.model, self.example, self.limits, self.dense.sizes).layers

    def _move(self, layers: Sequence[Layer]) -> dict[str, int]:
        """Nominates and restores candidates; returns how many of each layer were nominated."""
        number = self.when.number(self._step)
        if self.finished or number < self.when.first:
            return {}
        if self._collapsed(layers):
            self.stopped = "every neuron that the outputs depend on is dead"
            nominated = None
        else:
            nominated = self.policy.nominate(number, layers, self.histories, self._planned, self._score)
        if nominated is None:
            self._finish()
        return nominated or {}

    def _finish(self) -> None:
        """Ends removal: no neuron is a candidate any more."""
        self.finished = True
        for history in self.histories.values():
            history.waiting.fill_(-1)

    def _collapsed(self, layers: Sequence[Layer]) -> bool:
        """Whether the outputs are constant because all that reaches them is dead."""
        return any(
            bool(self.histories[layer.name].dead.all())
            for layer in layers
            if any(use.module in self._outputs for use in uses(layer.group))
        )

    def _planned(self, removed: float, first: Mapping[str, Tensor]) -> Mapping[str, Sequence[int]]:
        """The neurons to take so that a share of what the target measures is gone, some of them before all others."""
        assert self.policy.target is not None
        target = self.policy.target.with_removed(removed)
        try:
            plan = plan_removal(
                self.model, self.example, self.importance, target.kind, target.value,
                scope=self.scope, limits=self.limits, dense=self.dense, dying=first,
            )  # fmt: skip
        except TargetError as error:
            plan = error.plan
        return plan.removals

    def _score(self, layer: Layer) -> Tensor:
        scores = self.importance(layer.group)
        assert scores is not None  # a layer without evidence is not judged
        return scores

    def _remove(self, layers: Sequence[Layer], zero: Mapping[str, Tensor]) -> tuple[dict[str, list[int]], int, float]:
        """Removes the candidates whose time has come.

        Args:
            layers: that were judged.
            zero: their neurons that were zero on all samples of this check.

        Returns:
            What was removed, how many of these were zero where they are used, and the change of the outputs by them.
        """
        number = self.when.number(self._step)
        gone: dict[str, list[int]] = {}
        if not self.finished:
            gone = self.policy.expired(number, self._number, layers, self.histories, self._score)
        exact = {}
        for layer in layers:
            sure = self._zeroed(self.histories[layer.name], since=1)
            if inexact_reason(layer.group) is None:
                sure = sure | zero[layer.name]
            exact[layer.name] = [n for n in gone.get(layer.name, []) if sure[n]]
        count, difference = sum(map(len, exact.values())), 0.0
        if count:
            before = self._outputs_as_trained(layers)
            layers = self._prune(exact, fold=False)
            difference = output_difference(before, self._outputs_as_trained(layers))[0]
        rest = {name: renumbered(neurons, exact[name]) for name, neurons in gone.items()}
        if any(rest.values()):  # what was in use until now leaves its mean behind
            layers = self._prune(rest, fold=self.fold)
        if number >= self.when.last:
            self._finish()
        self._install(layers)
        return gone, count, difference

    def _prune(self, removals: Mapping[str, Sequence[int]], fold: bool) -> Sequence[Layer]:
        """Removes neurons, with their histories; returns the layers as they are now."""
        self._zeros.clear()
        prune_neurons(
            self.model,
            self.example,
            removals,
            importance=self.importance,
            fold=fold,
            optimizer=self.optimizer,
            followers=self.followers,
        )
        for name, neurons in removals.items():
            self.histories[name].keep(self.histories[name].without(neurons))
        return self._layers()

    def _zeroed(self, history: CandidateHistory, since: int = 0) -> Tensor:
        """Candidates that are zero where they are used, and have been for so many checks."""
        return history.waiting >= since if self._zeroing else torch.zeros_like(history.dead)

    def _outputs_as_trained(self, layers: Sequence[Layer]) -> list[Tensor]:
        """What the network makes of the example, in eval mode, with zeroed what was zero in the steps before."""
        self._install(layers, since=1)
        return eval_outputs(self.model, self.example)

    def _install(self, layers: Sequence[Layer], since: int = 0) -> None:
        """Zeroes the candidates, and notes where dead neurons are."""
        known = {layer.name: layer for layer in layers if layer.name in self.histories}
        zeroed = ((layer.group, self._zeroed(self.histories[name], since)) for name, layer in known.items())
        self._zeros.set(channels_carrying(zeroed))
        self._dead_in = {name: layer for name, layer in known.items() if self.histories[name].dead.any()}
        self._live = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that a continued training needs besides model and optimizer: tensors and plain values.

        Of several ranks each has its own.
        """
        return {
            "step": self._step,
            "next": self._next,
            "number": self._number,
            "checks": self.checks,
            "finished": self.finished,
            "stopped": self.stopped,
            "skipped": [list(skipped) for skipped in self.skipped],
            "histories": {name: history.state_dict() for name, history in self.histories.items()},
            "read": None if self._observer is None else self._observer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned; before the context is entered, on a model of the same widths."""
        self._step, self._next, self._number = state["step"], state["next"], state["number"]
        self.checks, self.finished, self.stopped = state["checks"], state["finished"], state["stopped"]
        self.skipped = [(layer, reason) for layer, reason in state["skipped"]]
        self.histories = {name: CandidateHistory.from_state_dict(past) for name, past in state["histories"].items()}
        self._read = state["read"]
