"""The configuration of one training run. See `cfg/testconfig.yaml` for the demo's, commented line by line."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    ByteSize,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from rl_training.configuration import StrictModel
from rl_training.controller_config import EntropyControllerConfig
from rl_training.probe_config import EntropyProbeConfig

# YAML has lists only; tuples keep the configuration immutable.
Names = Annotated[tuple[str, ...], Field(strict=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]

BUILT_IN_REWARDS = ("default", "score_answer", "exact", "last_number", "math_verify")


class ModelConfig(StrictModel):
    """Which policy is trained, and in which precision."""

    name: str = "smollm2-135m"
    """`smollm2-135m`, a model id of the Hugging Face hub, a local folder, or a .gguf file."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the weights; below float32 log-ratios are quantised and small entropy changes are lost."""
    device: str = "auto"
    """`auto` (the accelerator if there is one), `cpu`, `cuda`, `cuda:1`, ..."""


class LoraConfig(StrictModel):
    """Low-rank adapters; without them every weight of the model is trained."""

    enabled: bool = True
    """Train adapters on the frozen model, rather than the model itself."""
    r: PositiveInt = 16
    """Rank of each adapter."""
    alpha: PositiveInt = 32
    """Scale of each adapter: its output is multiplied by alpha / r."""
    target_modules: str | Names = "all-linear"
    """`all-linear`, or a list of module names such as [q_proj, v_proj]."""

    @field_validator("target_modules")
    @classmethod
    def _some_module(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("names no module: write all-linear or a list such as [q_proj, v_proj]")
        return value


class TaskConfig(StrictModel):
    """Prompts with answers that a program can check."""

    source: Literal["reasoning_gym", "jsonl"] = "reasoning_gym"
    """`reasoning_gym` (a procedural data set by name) or `jsonl` (a file of one's own)."""
    name: str = "chain_sum"
    """Name of the reasoning-gym data set."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the reasoning-gym data set, e.g. {max_terms: 2}."""
    path: str | None = None
    """JSONL file with one {"prompt": ..., "answer": ...} a line, for source jsonl."""
    size: PositiveInt = 128
    """Distinct prompts to train on."""
    heldout_size: NonNegativeInt = 64
    """Further distinct prompts, never trained on, on which entropy is measured."""
    seed: NonNegativeInt = 0
    """Seed of the prompts and of their split."""
    system_prompt: str | None = None
    """System message before every prompt; none by default."""
    reward: str = "default"
    """`default` (score_answer, jsonl: math_verify), exact, last_number, math_verify, file.py:function, module:function."""
    reward_timeout: PositiveFloat = 10.0
    """Seconds that a built-in reward may take for one completion; then its process is ended, see on_reward_error."""
    reward_memory: ByteSize = ByteSize(1 << 30)
    """Memory that a built-in reward may take for one completion (1GiB), beside what the scorer itself takes."""
    reward_process: bool = False
    """Run a reward function of your own in a child process; reward_timeout and reward_memory are then limits of one call."""
    on_reward_error: Literal["zero", "raise"] | None = None
    """A reward that fails gives 0 with a warning (`zero`) or stops (`raise`); null: built-in ones zero, your own raise."""

    @model_validator(mode="after")
    def _source_is_complete(self) -> Self:
        if self.source == "jsonl" and self.path is None:
            raise ValueError("source jsonl needs a file: set task.path")
        if self.source == "jsonl" and self.arguments:
            raise ValueError("arguments belong to source reasoning_gym; a jsonl file takes none")
        if self.source == "reasoning_gym" and self.path is not None:
            raise ValueError("path belongs to source jsonl: set task.source=jsonl or remove task.path")
        if clash := {"size", "seed"} & set(self.arguments):
            raise ValueError(f"set task.{min(clash)} rather than task.arguments.{min(clash)}")
        if self.reward not in BUILT_IN_REWARDS and ":" not in self.reward:
            known = ", ".join(BUILT_IN_REWARDS)
            raise ValueError(
                f"reward {self.reward!r} is none of {known}, path/to/file.py:function, pkg.module:function"
            )
        if self.reward == "score_answer" and self.source == "jsonl":
            raise ValueError("reward score_answer is a reasoning-gym data set's own; a jsonl file has none")
        return self


class RolloutsConfig(StrictModel):
    """How completions are sampled: from the distribution that is differentiated, the softmax at a temperature."""

    prompts_per_step: PositiveInt = 8
    """Prompts in the buffer of one optimizer step."""
    completions_per_prompt: int = Field(default=8, ge=2)
    """Completions of each prompt; advantages compare them, so at least 2."""
    max_completion_length: PositiveInt = 24
    """Tokens after which a completion is cut off."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; entropies and their gradients are those of the policy at this temperature."""
    top_p: float = 1.0
    """Must stay 1: nucleus sampling draws from another distribution than the one that is differentiated."""
    top_k: int = 0
    """Must stay 0 (off), for the same reason."""

    @field_validator("top_p")
    @classmethod
    def _whole_distribution(cls, value: float) -> float:
        if value != 1.0:
            raise ValueError(f"must be 1, found {value:g}: the whole softmax is what is differentiated")
        return value

    @field_validator("top_k")
    @classmethod
    def _every_token(cls, value: int) -> int:
        if value != 0:
            raise ValueError(f"must be 0, found {value}: the whole softmax is what is differentiated")
        return value


class TrainingBufferConfig(StrictModel):
    """Which sampled groups enter the training step."""

    difficulty_weighting: bool = True
    """Draw a prompt more often the nearer its success rate so far is to one half."""
    reject_zero_advantage: bool = True
    """Reject prompts whose completions all earned the same reward: they carry no gradient."""
    max_refill_rounds: NonNegativeInt = 2
    """Times that rejected prompts are replaced by freshly sampled ones within a step."""
    pass_threshold: float = 0.5
    """Reward at which a completion counts as solved, for the difficulty of its prompt."""


class AlgorithmConfig(StrictModel):
    """The policy-gradient loss."""

    name: Literal["dr_grpo"] = "dr_grpo"
    """Dr. GRPO: advantages centred per prompt, not divided by their deviation."""
    length_normalizer: Literal["constant", "prompt_longest"] = "constant"
    """Divide a sequence's sum by `constant` (max_completion_length) or by its prompt's longest completion."""


class OptimizerConfig(StrictModel):
    """AdamW, its clipping and its schedule."""

    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate."""
    beta1: Decay = 0.9
    """Decay of the first moment."""
    beta2: Decay = 0.999
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """The gradient is scaled down to this norm where it exceeds it."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """Course of the learning rate over the run."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    micro_batch_size: PositiveInt = 16
    """Sequences in one forward and backward pass; gradients accumulate over the buffer."""

    @model_validator(mode="after")
    def _warmup_has_a_schedule(self) -> Self:
        if self.warmup_steps and self.lr_scheduler == "constant":
            raise ValueError("lr_scheduler constant has no warm-up: take constant_with_warmup")
        return self


class TrainingConfig(StrictModel):
    """Length, place and reporting of the run."""

    steps: PositiveInt = 8
    """Optimizer steps in all, those of a resumed run included."""
    save_every: PositiveInt = 4
    """Steps between checkpoints; the last step is always saved."""
    seed: NonNegativeInt = 42
    """Seed of the adapters' initial weights, of the sampling and of the data order."""
    output_dir: str = Field(default="runs/collapse", min_length=1)
    """Folder of the run: checkpoints, logs and this configuration."""
    report_to: Names = ("tensorboard",)
    """Loggers by their Trainer names (tensorboard, wandb, trackio, ...); [] for none."""
    resume_from_checkpoint: str | None = None
    """Checkpoint folder to go on from."""
    gradient_checkpointing: bool = False
    """Keep a layer's input alone for the backward pass and compute the rest again: less memory, about a third more time."""
    memory_limit: ByteSize | None = None
    """What weights, gradients and Adam's moments may take (8GiB); training that needs more does not begin. Default: no limit."""


class TrainConfig(StrictModel):
    """Everything that defines a training run."""

    model: ModelConfig = ModelConfig()
    """The policy."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters."""
    task: TaskConfig = TaskConfig()
    """Prompts and reward."""
    rollouts: RolloutsConfig = RolloutsConfig()
    """Sampling."""
    training_buffer: TrainingBufferConfig = TrainingBufferConfig()
    """Filtering and refilling of the sampled groups."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """Loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    training: TrainingConfig = TrainingConfig()
    """Run."""
    entropy_probe: EntropyProbeConfig = EntropyProbeConfig()
    """Probe."""
    entropy_controller: EntropyControllerConfig = EntropyControllerConfig()
    """Controller, which changes training where it is enabled."""

    @model_validator(mode="after")
    def _buffer_is_consistent(self) -> Self:
        size, needed = self.task.size, self.rollouts.prompts_per_step
        if size < needed:
            raise ValueError(f"task.size {size} is less than rollouts.prompts_per_step {needed}")
        if self.entropy_probe.enabled and self.task.heldout_size < 2:
            raise ValueError(
                "the entropy probe needs two held-out prompts or more: set task.heldout_size or disable it"
            )
        if self.entropy_controller.enabled and self.task.heldout_size < 2:
            raise ValueError(
                "the entropy controller needs two held-out prompts or more: set task.heldout_size or disable it"
            )
        return self
