"""`DyingNeuronImportance`: dying-neuron statistics as a criterion for every pruner of Torch-Pruning."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch_pruning as tp
from torch import Tensor, nn

from dnr_plugin.network.calling import network_of
from dnr_plugin.network.dependencies import Unscored, channel_groups, parts, shared_reason, units, uses
from dnr_plugin.network.kinds import consumer
from dnr_plugin.network.units import ties
from dnr_plugin.observation.history import NeuronHistory
from dnr_plugin.observation.observer import Observer
from dnr_plugin.scoring.correction import correct
from dnr_plugin.scoring.evidence import Evidence, Verdict, judge, read
from dnr_plugin.scoring.following import Followed, Pending
from dnr_plugin.scoring.pruners import asked_by, for_a_penalty, warn_of_little
from dnr_plugin.scoring.redundancy import Redundancy
from dnr_plugin.scoring.scores import best_units, check_settings, lexicographic, score_neurons

# Three tiers of float64, far apart: dead neurons below, live ones between, those that must stay above.
_DEAD, _FLOOR, _CEILING, _KEPT = 1e-30, 1e-20, 1e20, 1e30
_STEP = 1e-9  # relative distance that keeps neighbours in rank apart


class DyingNeuronImportance(tp.importance.Importance):  # type: ignore[misc]
    r"""Scores the neurons of a dependency group by their observed activations; low = dying, removed first.

    Each neuron is read at the input of every layer that uses it. Neurons that are dead on all observed samples come
    first, whatever the score; then the others by ``score``:

    ================== ============================================================== =============================
    score              formula                                                        reduced over consumers by
    ================== ============================================================== =============================
    redundancy         what outputs lose once the other neurons stand in for it       sum
    contribution       :math:`\overline{|a|}\,\lVert W_{:,c}\rVert_2`                 sum
    variation          :math:`\operatorname{std}(a)\,\lVert W_{:,c}\rVert_2`          sum
    magnitude          :math:`m_c=\overline{|a|}`                                     max
    dormancy           :math:`m_c/\overline{m}` (ReDo, ICML 2023)                     max
    firing_rate        :math:`r_c=\overline{1[a>\theta]}`                             max
    sample_activity    share of samples in which the neuron fires anywhere            max
    entropy            entropy of the activation histogram, bits                      max
    on_off_entropy     entropy of firing or not, bits                                 max
    ================== ============================================================== =============================

    The default kept most accuracy of these, and of Torch-Pruning's criteria, on CIFAR-10 (``docs/criterion.md``); it
    needs second moments. Rarely firing neurons are not unimportant ones: in a live network they are the selective ones.

    Scores are finite, positive and distinct over the whole network, so that Torch-Pruning's global threshold
    (``importance <= threshold``) takes exactly as many neurons as were asked for. The best neurons of each layer are
    lifted above all others, so that no layer is emptied or pruned beyond ``max_pruning_ratio``, unless a pruner asks
    for more neurons than there are besides.

    Example:
        >>> importance = DyingNeuronImportance()
        >>> with importance.observe(model):
        ...     for images, _ in calibration: model(images)
        >>> pruner = tp.pruner.BasePruner(model, example_inputs, importance, pruning_ratio=0.5, global_pruning=True)
        >>> pruner.step()

    Between the steps of an iterative pruner the statistics follow the channels that were kept; ``observe`` again to
    take them anew (after recalibrating BatchNorm: on stale BatchNorm statistics they are worthless).

    Args:
        score: one of the above.
        normalizer: divides a group's live scores by their "mean" or "max" so that layers compare in global scope;
            None for raw scores, or a function of the live scores, float64, shape [live]. "auto": "mean", but None for
            redundancy, which compares between layers as it is.
        max_pruning_ratio: largest share in (0, 1] taken from one group over all steps, of the size it had when it was
            first scored; observing another model starts anew. (BasePruner's own is not held within a step.) In global
            scope the default keeps layers from shrinking to one channel; in local scope the pruner's ratio decides.
        min_channels: neurons that every group keeps, >= 1.
        threshold: theta >= 0; a neuron fires where its activation exceeds it.
        share: share in (0, 1] of each batch that means, rates and histograms read.
        bins: bins of the activation histogram.
        moments: gather second moments while observing, which redundancy and `repair` need.
        histories: what became of the neurons while the network trained: root layer -> `NeuronHistory`, as
            `DyingNeuronDynamics.histories` has them; of this model as it is now.
        prior: exponent >= 0 by which these count: a neuron's score is multiplied with the share of checks at which it
            was alive, to this power. 0: not at all; ``docs/criterion.md`` has what it gained.

    Attributes:
        skipped: groups that got no score, by root layer, with the reason; Torch-Pruning leaves these alone.

    Raises:
        ValueError: an argument is out of range or unknown.
    """

    def __init__(
        self,
        score: str = "redundancy",
        *,
        normalizer: str | Callable[[Tensor], Tensor] | None = "auto",
        max_pruning_ratio: float = 0.9,
        min_channels: int = 1,
        threshold: float = 0.0,
        share: float = 0.125,
        bins: int = 16,
        moments: bool = True,
        histories: Mapping[str, NeuronHistory] | None = None,
        prior: float = 0.0,
    ) -> None:
        check_settings(score, normalizer, moments, max_pruning_ratio, min_channels, threshold, prior)
        if normalizer == "auto":
            normalizer = None if score == "redundancy" else "mean"
        if prior and histories is None:
            raise ValueError(f"histories: expected those of a training that was watched with prior {prior}, found none")
        self._histories, self.prior = dict(histories or {}), prior
        self.score, self.normalizer = score, normalizer
        self.max_pruning_ratio, self.min_channels = max_pruning_ratio, min_channels
        self.threshold, self.share, self.bins, self.moments = threshold, share, bins, moments
        self.skipped: dict[str, str] = {}
        self.observer: Observer | None = None
        self._redundancy = Redundancy()
        self._ids: dict[str, Tensor] = {}
        self._first_size, self._order = dict[str, int](), dict[str, int]()
        self._followed: dict[tp.DependencyGraph, Followed] = {}
        self._warned: weakref.WeakSet[tp.pruner.BasePruner] = weakref.WeakSet()

    @contextlib.contextmanager
    def observe(self, model: nn.Module) -> Iterator[Observer]:
        """Starts statistics anew and reads the model's activations while the context is open.

        Args:
            model: the network about to be pruned. Call it in eval mode under ``torch.no_grad()`` on data like its
                training data; train mode works as well.

        Raises:
            ValueError: an activation was not finite.
            RuntimeError: no activation was read.
        """
        observer = self.observer_of(model)
        with observer:
            yield observer
        self.judge_by(observer)

    def observer_of(self, model: nn.Module, *, training: bool = False) -> Observer:
        """An observer with this criterion's settings, not yet open.

        Args:
            model: the network to observe.
            training: watch it while it trains, without second moments (see `Observer`).
        """
        moments = self.moments and not training
        return Observer(
            model, threshold=self.threshold, share=self.share, bins=self.bins, moments=moments, training=training
        )

    def judge_by(self, observer: Observer) -> None:
        """Scores by what a closed observer has read, from now on.

        Args:
            observer: made by `observer_of`. One of another model starts ``max_pruning_ratio`` anew.
        """
        if self.observer is not None and network_of(self.observer.model) is not network_of(observer.model):
            self._first_size.clear()
            self._order.clear()
        self.observer = observer
        self._ids = {name: torch.arange(activity.channels) for name, activity in observer.activities.items()}
        self._followed.clear()
        self.skipped.clear()

    @torch.no_grad()
    def __call__(self, group: tp.dependency.Group) -> Tensor | None:
        """Scores a group.

        Args:
            group: with full or partial indices.

        Returns:
            Score per root index, shape [n], float64, positive, on the CPU; None where the group has no observed
            consumer (its name and the reason are then in `skipped`). Where a pruner asks for a penalty on weights
            (`pruners`) NaN, by which it leaves the group alone, and no neuron is marked as one to keep.

        Raises:
            RuntimeError: nothing was observed, or layers were pruned in a way that could not be followed.
        """
        evidence, root, n = self.evidence(group), self._root(group), len(group[0].idxs)
        penalty = for_a_penalty(asked := asked_by())
        warn_of_little(asked, self._warned, self.why_unscored)
        try:
            score = self._score(group, evidence)
        except Unscored as error:
            if penalty:
                return torch.full((n,), math.nan, dtype=torch.float64)
            if root not in self.skipped:
                warnings.warn(f"{root} is left alone: {error}", stacklevel=2)
            self.skipped[root] = str(error)
            return None
        self.skipped.pop(root, None)
        if not penalty:
            self._note(group, evidence)
        if self.prior:
            score *= self._alive(root, group) ** self.prior
        order = lexicographic(score, score_neurons("magnitude", evidence, n))
        dead = judge(evidence, n).dead
        live = ~dead
        if self.normalizer is not None and live.any():
            score[live] = self._normalize(score[live])
        score = score.nan_to_num(nan=0.0).clamp(_FLOOR, _CEILING).masked_fill(dead, _DEAD)

        # ranks within the group and a fraction of each group's own keep equal scores apart
        rank = torch.empty(n, dtype=torch.float64)
        rank[order] = torch.arange(n, dtype=torch.float64)
        rank += (self._order.setdefault(root, len(self._order)) + 1) * 0.6180339887498949 % 1.0
        distinct = score * (1.0 + _STEP * rank)
        if penalty:
            return distinct
        kept = self._kept(root, group, distinct) | ~read(evidence, n)
        return torch.where(kept, _KEPT * (1.0 + _STEP * rank), distinct)

    def _score(self, group: tp.dependency.Group, evidence: Sequence[Evidence]) -> Tensor:
        """By `score`, raw, float64, shape [n]; an Unscored says why there is none."""
        if not evidence:
            raise Unscored(self.why_unscored(group))
        if self.score != "redundancy":
            return score_neurons(self.score, evidence, len(group[0].idxs))
        return self._redundancy.of(self._root(group), group._DG, evidence, ties(group)[torch.tensor(group[0].idxs)])

    def evidence(self, group: tp.dependency.Group) -> list[Evidence]:
        """The consumers of a group with what was observed there; empty if incomplete (`why_unscored`).

        Raises:
            RuntimeError: nothing was observed, or layers were pruned in a way that could not be followed.
        """
        try:
            return self._look_up(group)
        except Unscored:
            return []

    def why_unscored(self, group: tp.dependency.Group) -> str | None:
        """Why a group gets no score, or None where it gets one.

        Raises:
            RuntimeError: nothing was observed, or layers were pruned in a way that could not be followed.
        """
        try:
            self._look_up(group)
        except Unscored as missing:
            return str(missing)
        return None

    def follow(self, group: tp.dependency.Group) -> None:
        """Notes which channels of a group's consumers carry its neurons, so that statistics follow when these go.

        Scoring a group does this; to be called before ``group.prune()`` for a group that was not scored on its graph.
        """
        self._note(group, self.evidence(group))

    def _note(self, group: tp.dependency.Group, evidence: Sequence[Evidence]) -> None:
        """`follow`, where the evidence was looked up already."""
        graph, root = group._DG, self._root(group)
        outwards = graph.is_out_channel_pruning_fn(group[0].dep.handler)
        roots, names = torch.tensor(group[0].idxs), self._carried(graph).consumers
        self._followed[graph].pending[root, outwards] = [
            Pending(names[e.use.module], self._ids[names[e.use.module]][e.use.channels], roots[e.use.neurons])
            for e in evidence
        ]

    def repair(self, group: tp.dependency.Group) -> dict[str, str]:
        """Corrects in closed form what remains of a group's consumers; to be called right before ``group.prune()``.

        Their kept weights, and the bias or the BatchNorm behind them, change so that they lose least without the
        group's neurons, judged by the observed second moments (`redundancy`). Layers are corrected one by one, as if
        what they read were else unchanged; `repair_network` fits them one after another and does better.

        Args:
            group: with the indices that are about to be pruned.

        Returns:
            Consumers left as they are, with the reason.

        Raises:
            RuntimeError: no second moments were observed.
        """
        evidence = self.evidence(group)
        if not self.moments:
            raise RuntimeError("repair needs second moments: construct the importance with moments=True")
        names = self._carried(group._DG).names
        reasons = {names[e.use.module]: correct(group._DG, e) for e in evidence}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Forgets on leaving what was removed inside: for trials on a copy of the model."""
        restore = self.snapshot()
        self._followed = {}
        try:
            yield
        finally:
            restore()

    def snapshot(self) -> Callable[[], None]:
        """What makes statistics and histories again what they are now, whatever is removed and followed meanwhile."""
        observer = self.observer
        activities = {} if observer is None else {name: copy.copy(a) for name, a in observer.activities.items()}
        ids, histories, followed = dict(self._ids), dict(self._histories), dict(self._followed)

        def restore() -> None:
            if observer is not None:
                observer.activities = activities
            self._ids, self._histories, self._followed = ids, histories, followed

        return restore

    def verdict(self, group: tp.dependency.Group) -> Verdict | None:
        """Which neurons of a group are silent, zero, constant and dead, or None where it has no observed consumer.

        Raises:
            RuntimeError: nothing was observed, or layers were pruned in a way that could not be followed.
        """
        evidence = self.evidence(group)
        return judge(evidence, len(group[0].idxs)) if evidence else None

    def _look_up(self, group: tp.dependency.Group) -> list[Evidence]:
        """`evidence`, with an Unscored that says what is missing."""
        if self.observer is None:
            raise RuntimeError(
                "nothing was observed yet: call the model inside `with importance.observe(model):` before pruning"
            )
        if (shared := shared_reason(group)) is not None:
            raise Unscored(shared)
        names, evidence = self._carried(group._DG).consumers, list[Evidence]()
        for use in uses(group):
            name = names.get(use.module)
            if name is None or name not in self.observer.modules:
                raise Unscored("a layer that reads its neurons is not part of the observed model")
            if name not in self.observer.activities:
                raise Unscored(f"{name}, which reads its neurons, was not called while the model was observed")
            activity = self.observer.activities[name]
            channels, _ = consumer(use.module).channels
            if int(use.channels.max()) >= channels:
                raise Unscored(f"Torch-Pruning takes channels from {name} that it does not have")
            if activity.channels != channels:
                raise RuntimeError(
                    f"the statistics of {name} describe {activity.channels} input channels, but it has "
                    f"{channels} now: it was pruned in a way that could not be followed; observe the model again"
                )
            evidence.append(Evidence(use, activity))
        if not evidence:
            raise Unscored("no layer that could be observed reads its neurons, as with the outputs of the model")
        return evidence

    @property
    def histories(self) -> dict[str, NeuronHistory]:
        """Of the neurons that remain, by root layer."""
        self._carry_over()
        return self._histories

    def _carried(self, graph: tp.DependencyGraph) -> Followed:
        """A graph's names, with its removals so far carried over."""
        self._carry_over()
        if graph not in self._followed:
            self._followed[graph] = Followed(graph)
        return self._followed[graph]

    def _carry_over(self) -> None:
        """Carries the removals that graphs have recorded since the last call over to statistics and histories.

        A group's channels at each consumer are noted, under lasting numbers, when it is scored. So it does not matter
        in which order the groups of one step, which may share a consumer by concatenation, are then pruned.
        """
        for graph, followed in [*self._followed.items()]:
            history = graph.pruning_history()
            for root, outwards, indices in history[followed.seen :]:
                if outwards and root in self._histories:
                    past = self._histories[root]
                    self._histories[root] = past.kept(past.without(indices))
                for use in followed.pending.pop((root, outwards), []):
                    gone = use.ids[torch.isin(use.roots, torch.tensor(list(indices)))]
                    stays = ~torch.isin(self._ids[use.consumer], gone)
                    if not stays.all():
                        assert self.observer is not None
                        self.observer.activities[use.consumer].keep(stays.nonzero().flatten())
                        self._ids[use.consumer] = self._ids[use.consumer][stays]
            followed.seen = len(history)

    def _root(self, group: tp.dependency.Group) -> str:
        return self._carried(group._DG).names[group[0].dep.target.module]

    def _alive(self, root: str, group: tp.dependency.Group) -> Tensor:
        """Share of checks at which each neuron of a group was alive; one that was never judged counts as alive."""
        indices = group[0].idxs
        if root not in self._histories:
            return torch.ones(len(indices), dtype=torch.float64)
        share, channels = self._histories[root].alive_share, self._channels(group)
        if len(share) != channels:
            raise RuntimeError(
                f"histories: expected one of {channels} neurons for {root}, found one of {len(share)}: it was pruned "
                "in a way that could not be followed"
            )
        return share[list(indices)]

    def _channels(self, group: tp.dependency.Group) -> int:
        """Neurons of the whole group, of which ``group`` may hold a part."""
        dep = group[0].dep
        outwards = group._DG.is_out_channel_pruning_fn(dep.handler)
        return int((group._DG.get_out_channels if outwards else group._DG.get_in_channels)(dep.target.module))

    def _normalize(self, score: Tensor) -> Tensor:
        if callable(self.normalizer):
            return self.normalizer(score)
        scale = score.mean() if self.normalizer == "mean" else score.max()
        return score / scale if scale > 0 else score

    def _kept(self, root: str, group: tp.dependency.Group, score: Tensor) -> Tensor:
        """Marks the best neurons of a whole group, in whole units of every part, that no removal may take."""
        if len(score) != self._channels(group) or len(score) % channel_groups(group):
            return torch.zeros(len(score), dtype=torch.bool)
        size = int((unit := units(group)).max()) + 1
        first = self._first_size.setdefault(root, size)
        return best_units(score, unit, parts(group, unit), first, self.max_pruning_ratio, self.min_channels)[unit]
