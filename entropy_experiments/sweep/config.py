"""The configuration of a sweep over checkpoints. See `configs/entropy_sweep.yaml`, commented line by line."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from entropy_experiments.config import (
    AnalysisConfig,
    BuffersConfig,
    CheckpointOverrides,
    EntropyAnalysisConfig,
    FisherAnalysisConfig,
    Scales,
)
from rl_training.configuration import StrictModel


class CheckpointSelection(StrictModel):
    """Which of a run's checkpoints are analysed: all of them, or one of the three."""

    steps: Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)] | None = None
    """These steps alone; each must be there."""
    stride: PositiveInt | None = None
    """Every so many-th checkpoint in order, from the first; the last is always among them."""
    last: PositiveInt | None = None
    """The last so many."""

    @model_validator(mode="after")
    def _one_way_of_choosing(self) -> Self:
        given = [name for name in ("steps", "stride", "last") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say which checkpoints are analysed: give one of them")
        return self


class SweepBuffersConfig(BuffersConfig):
    """Double sampling, with the same evaluation prompts at every checkpoint unless they are the run's own."""

    eval_prompts: Literal["random", "fixed_set", "from_run"] = "fixed_set"
    """`fixed_set`: the split's first prompts; `random`: by seed, and so the same ones at every checkpoint too; `from_run`: what
    each checkpoint's next step recorded, of other prompts at each, so that little is said of several checkpoints together."""


class SweepQuestionsConfig(AnalysisConfig):
    """Which questions are answered at every checkpoint; what takes many real steps is off."""

    step_scales: Scales = (0.5, 1.0, 2.0)
    """Multiples of the step at which the entropy change is measured; 1 is always among them."""
    fresh_scales: Annotated[tuple[PositiveFloat, ...], Field(strict=False)] = ()
    """At which of these completions are drawn anew as well; a sampling each."""
    higher_order: bool = False
    """At which step size does the second order matter? Two forward passes for every scale up to 1."""
    intervention: bool = False
    """Do the shares say what happens when sequences are really left out of the step? Some fifty forward passes."""
    weighting_steps: bool = False
    """Take and measure each weighting's real step as well; some fifteen forward passes."""
    prices: bool = False
    """What could be done in place of each step, and what would it cost in reward? Some seventeen forward passes."""


class SweepAnalysisConfig(EntropyAnalysisConfig):
    """The analysis of every checkpoint: sizes of the two buffers, how they are drawn, and what is computed."""

    sampling: SweepBuffersConfig = SweepBuffersConfig()
    """Double sampling."""
    analysis: SweepQuestionsConfig = SweepQuestionsConfig()
    """Questions."""


class SweepConfig(StrictModel):
    """Everything that defines one sweep."""

    seed: NonNegativeInt = 0
    """Seed of prompts and completions of both buffers, the same at every checkpoint."""
    output_dir: str = Field(default="results", min_length=1)
    """Folder under which `sweep_<date>/<run>` is made."""
    checkpoints: CheckpointSelection = CheckpointSelection()
    """Which checkpoints; all null: every one."""
    checkpoint: CheckpointOverrides = CheckpointOverrides()
    """Overrides of every checkpoint's own record."""
    entropy_analysis: SweepAnalysisConfig = SweepAnalysisConfig()
    """The analysis."""

    @model_validator(mode="after")
    def _evaluation_prompts_stay(self) -> Self:
        if self.entropy_analysis.sampling.same_prompts:
            raise ValueError(
                "entropy_analysis.sampling.same_prompts=true takes the training buffer's prompts, which change from checkpoint "
                "to checkpoint: a sweep compares checkpoints on the same evaluation prompts; leave it false"
            )
        if self.checkpoint.sharding is not None:
            raise ValueError(
                "checkpoint.sharding cuts one model over all processes, and a sweep deals checkpoints out to them: analyse the "
                "checkpoints one by one, or leave it out"
            )
        self.of_a_checkpoint()
        return self

    def of_a_checkpoint(self) -> FisherAnalysisConfig:
        """The configuration of every single analysis."""
        return FisherAnalysisConfig.model_validate(self.model_dump(exclude={"checkpoints", "output_dir"}))
