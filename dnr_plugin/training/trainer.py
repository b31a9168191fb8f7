"""Training of a classifier; reads from top to bottom."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnr_plugin.data.images import ImageSource
from dnr_plugin.devices import fast_layout
from dnr_plugin.dynamics.check import Check
from dnr_plugin.dynamics.dynamics import DyingNeuronDynamics
from dnr_plugin.errors import RunError
from dnr_plugin.recipe.training_sections import TrainOptions
from dnr_plugin.seeds import derive_seed
from dnr_plugin.training.evaluation import Progress
from dnr_plugin.training.pressure import add_l1, add_noise, batchnorm_scales
from dnr_plugin.training.schedules import lr_factor, scheduled

# Losses wait on the device for this many steps before anyone looks at them.
_CHECK_EVERY = 50


class DivergedError(RunError):
    """The loss became NaN or infinite; the message names epoch, step and learning rate."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch did.

    Attributes:
        loss: mean over its steps.
        lr: learning rate of its last step.
        images: how many were trained on.
        checks: of the neurons, where these are watched.
    """

    loss: float
    lr: float
    images: int
    checks: Sequence[Check] = ()


class Trainer:
    """A model's optimizer and schedule over all epochs of one stage.

    An epoch depends on the model, the optimizer, ``seed`` and its number alone, so that a run continued after any
    epoch is the same run.

    Args:
        model: on its device.
        images: training images on the same device.
        options: of the recipe; ``amp: auto`` is float32 here, see `precision.choose_precision`.
        seed: of order and augmentation.
        augment: names of augmentations.

    Attributes:
        amp: whether it computes in bfloat16.
        dynamics: watches the neurons while an epoch runs, where it is set.
    """

    def __init__(
        self, model: nn.Module, images: ImageSource, options: TrainOptions, seed: int, augment: Iterable[str] = ()
    ) -> None:
        self.amp = options.amp is True
        if self.amp:
            model.to(memory_format=fast_layout(next(model.parameters()).device))  # type: ignore[call-overload]
        self.model, self.images, self.options, self.seed = model, images, options, seed
        self.augment = tuple(augment)
        self.dynamics: DyingNeuronDynamics | None = None
        self._last_lr = options.lr
        self.steps_per_epoch = len(images) // options.batch_size
        self.steps = self.steps_per_epoch * options.epochs
        self.optimizer = make_optimizer(model, options)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(options, step, self.steps)
        )

    def epoch(self, number: int, progress: Progress | None = None) -> Epoch:
        """Trains for one epoch.

        Args:
            number: 0 for the first; selects order and augmentation.
            progress: wraps the steps for display.

        Raises:
            DivergedError: the loss or an activation is not finite.
        """
        self.model.train()
        losses: list[Tensor] = []
        checks: list[Check] = []
        total = 0.0
        steps: Iterable[Tensor] = self._steps(number)
        if progress is not None:
            steps = progress(steps, self.steps_per_epoch)
        for step, loss in enumerate(steps):
            losses.append(loss)
            due = self.dynamics is not None and self.dynamics.due
            if due or len(losses) == _CHECK_EVERY or step == self.steps_per_epoch - 1:
                total += self._checked(losses, number, step)
                losses.clear()
            checks += self._judged(number, step)
        images = self.steps_per_epoch * self.options.batch_size
        return Epoch(total / self.steps_per_epoch, self._last_lr, images, checks)

    def _judged(self, epoch: int, step: int) -> list[Check]:
        if self.dynamics is None:
            return []
        try:
            check = self.dynamics.step()
        except ValueError as error:
            raise DivergedError(f"epoch {epoch + 1}, step {step + 1}: {error}") from error
        return [] if check is None else [check]

    def _steps(self, number: int) -> Iterable[Tensor]:
        options = self.options
        seed = derive_seed(self.seed, number)
        batches = self.images.batches(options.batch_size, seed=seed, augment=self.augment, drop_last=True)
        for step, (images, labels) in enumerate(batches):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
                logits = self.model(images)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=options.label_smoothing)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self._press(number, step)
            self._last_lr = float(self.schedule.get_last_lr()[0])
            self.optimizer.step()
            self.schedule.step()
            yield loss.detach()

    def _press(self, epoch: int, step: int) -> None:
        """Makes of the loss's gradient what the optimizer steps along, and sets the weight decay of this step."""
        options, pressure = self.options, self.options.pressure
        share = (epoch * self.steps_per_epoch + step) / self.steps

        def noise(when: str) -> None:
            if pressure.noise is not None and pressure.noise.when == when:
                std = pressure.noise.std * scheduled(pressure.noise.schedule, share)
                live = self.dynamics.live if self.dynamics and pressure.noise.neurons == "live" else None
                add_noise(self.model.parameters(), std, derive_seed(self.seed, "noise", epoch, step), live)

        if pressure.bn_l1 is not None:
            add_l1(batchnorm_scales(self.model), pressure.bn_l1.strength * scheduled(pressure.bn_l1.schedule, share))
        noise("before_clipping")
        if options.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_norm)
        noise("after_clipping")
        for group in self.optimizer.param_groups:
            group["weight_decay"] = options.weight_decay * scheduled(pressure.weight_decay_schedule, share)

    def _checked(self, losses: list[Tensor], epoch: int, last_step: int) -> float:
        values = torch.stack(losses).double().cpu()
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            step = last_step - len(losses) + 1 + int(bad[0])
            raise DivergedError(
                f"the loss became {float(values[bad[0]]):g} at epoch {epoch + 1}, step {step + 1} "
                f"(learning rate {self._last_lr:.3g}): lower lr, or set clip_norm or warmup_epochs"
            )
        return float(values.sum())


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """The optimizer that the options name."""
    if options.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            options.lr,
            momentum=0.9 if options.momentum is None else options.momentum,
            nesterov=options.nesterov,
            weight_decay=options.weight_decay,
        )
    kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
    return kind(model.parameters(), options.lr, weight_decay=options.weight_decay)
