"""The configuration of one analysis. See `configs/fisher_analysis.yaml`, commented line by line."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rl_training.config import TaskConfig
from rl_training.configuration import StrictModel

Scales = Annotated[tuple[float, ...], Field(strict=False, min_length=1)]


class SamplingConfig(StrictModel):
    """Double sampling: where the two buffers' prompts come from."""

    eval_prompts: Literal["random", "fixed_set"] = "random"
    """`random`: uniform by seed; `fixed_set`: the split's first prompts, the same for every checkpoint."""
    eval_split: Literal["heldout", "train"] = "heldout"
    """Which prompts the evaluation buffer is drawn from; nothing of their rewards is looked at."""
    train_prompts: Literal["random", "fixed_set", "from_run"] = "random"
    """`random`: by difficulty; `fixed_set`: the first prompts; `from_run`: the buffer the checkpoint's last step used."""
    same_prompts: bool = False
    """True draws the evaluation buffer from the training buffer's prompts (fresh completions); false keeps them apart."""
    completions_per_prompt: int | None = Field(default=None, ge=2)
    """Completions of each training prompt; by default as many as the run used."""
    eval_completions_per_prompt: PositiveInt = 1
    """Completions of each evaluation prompt; more independent prompts beat more completions of one."""
    temperature: PositiveFloat | None = None
    """Sampling temperature; by default the run's. Needed for checkpoints without a sidecar."""
    max_completion_length: PositiveInt | None = None
    """Tokens after which a completion is cut; by default the run's. Needed for checkpoints without a sidecar."""
    max_refill_rounds: NonNegativeInt = 4
    """Times that groups without reward differences are replaced."""


class FisherKernelConfig(StrictModel):
    """The kernel."""

    compute_full: bool = True
    """Compute the matrices; false leaves predictions and measurements only."""
    preconditioning: Literal["checkpoint", "step", "none"] = "checkpoint"
    """P from Adam's second moments in the `checkpoint`, or from those of the analysed `step`; `none`: P = 1."""
    token_batch_size: PositiveInt = 2048
    """Padded tokens in one forward and backward pass; bounds memory."""


class AnalysisConfig(StrictModel):
    """Which questions are answered."""

    prompt_structure: bool = True
    """Do sequences of the same prompt move each other more than sequences of different prompts?"""
    entropy_prediction: bool = True
    """How well does the first order predict what the step really does to entropy?"""
    step_scales: Scales = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)
    """Multiples of the step at which the entropy change is measured; 1 is always among them."""


class EntropyAnalysisConfig(StrictModel):
    """Sizes of the two buffers, how they are drawn, and what is computed from them."""

    eval_batch_size: PositiveInt = 64
    """Sequences in the unfiltered evaluation buffer."""
    train_batch_size: PositiveInt = 64
    """Sequences in the filtered training buffer."""
    sampling: SamplingConfig = SamplingConfig()
    """Double sampling."""
    fisher_kernel: FisherKernelConfig = FisherKernelConfig()
    """Kernel."""
    analysis: AnalysisConfig = AnalysisConfig()
    """Questions."""


class CheckpointOverrides(StrictModel):
    """What a checkpoint does not say, or says wrongly for this purpose."""

    model: str | None = None
    """Base model (name, folder or .gguf file) where the checkpoint's own reference does not load."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision to load in; by default the run's. Below float32 self-checks fail on rounding alone."""
    learning_rate: PositiveFloat | None = None
    """Rate of the analysed step; by default the one the checkpoint's last step was taken with."""
    max_grad_norm: PositiveFloat | None = None
    """Gradient clipping of the analysed step; by default the run's (1.0 without a sidecar)."""
    task: TaskConfig | None = None
    """Prompts and rewards; by default the run's. Needed for checkpoints without a sidecar."""


class FisherAnalysisConfig(StrictModel):
    """Everything that defines one analysis of one checkpoint."""

    seed: NonNegativeInt = 0
    """Seed of prompts and completions of both buffers."""
    output_dir: str = Field(default="results", min_length=1)
    """Folder under which `analysis_<date>/<run>_checkpoint-<step>` is made."""
    checkpoint: CheckpointOverrides = CheckpointOverrides()
    """Overrides of the checkpoint's own record."""
    entropy_analysis: EntropyAnalysisConfig = EntropyAnalysisConfig()
    """The analysis."""

    @model_validator(mode="after")
    def _a_batch_holds_whole_groups(self) -> Self:
        a = self.entropy_analysis
        if a.sampling.completions_per_prompt and a.train_batch_size % a.sampling.completions_per_prompt:
            raise ValueError(
                f"entropy_analysis.train_batch_size {a.train_batch_size} is not a multiple of sampling.completions_per_prompt "
                f"{a.sampling.completions_per_prompt}"
            )
        return self
