"""A recipe as a whole; ``dnr recipes options`` prints every option of it."""

from __future__ import annotations

from pydantic import Field

from dnr_plugin.recipe.sections import DataOptions, ModelOptions, PruneOptions, ReportOptions, Section
from dnr_plugin.recipe.training_sections import FinetuneOptions, TrainOptions


class Recipe(Section):
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="names the run and its folder"
    )
    description: str = Field(default="", max_length=1000, description="one line, shown by `dnr recipes`")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of weights, order, augmentation, subsets and drawn data")
    model: ModelOptions = Field(description="the network")
    data: DataOptions = Field(description="the images")
    train: TrainOptions = Field(description="training before removal; epochs 0 with a checkpoint")
    prune: PruneOptions = Field(description="what to remove and how")
    finetune: FinetuneOptions = Field(
        default=FinetuneOptions(epochs=0), description="training after removal; none by default"
    )
    report: ReportOptions = Field(default=ReportOptions(), description="what is measured at the end")
