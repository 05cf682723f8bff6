"""The configuration of one analysis. See `configs/fisher_analysis.yaml`, commented line by line."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, ByteSize, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rl_training.config import TaskConfig
from rl_training.configuration import StrictModel

Place = Annotated[int | str, BeforeValidator(lambda x: int(x) if isinstance(x, str) and x.isdigit() else x)]
Scales = Annotated[tuple[PositiveFloat, ...], Field(strict=False, min_length=1)]


class BuffersConfig(StrictModel):
    """Double sampling: where the two buffers' prompts come from."""

    eval_prompts: Literal["random", "fixed_set", "from_run"] = "random"
    """`random`: uniform by seed; `fixed_set`: the split's first prompts, the same for every checkpoint; `from_run`: nothing is
    drawn, rows are what the run's next step recorded before rejection (drawn by this checkpoint's policy)."""
    eval_split: Literal["heldout", "train"] = "heldout"
    """Which prompts the evaluation buffer is drawn from; nothing of their rewards is looked at."""
    eval_completions: Literal["sampled", "reference"] = "sampled"
    """`sampled` from the policy; `reference`: each prompt's own answer, a row that was not drawn from the policy."""
    eval_sequences_path: str | None = None
    """Sequences of one's own, or a trainer's dump of rollouts, as rows in place of anything drawn."""
    eval_sequences_step: NonNegativeInt | None = None
    """Which step's sequences of a dump are taken; by default those drawn for the step after the checkpoint."""
    eval_sequences_drawn: bool = False
    """True says that this checkpoint's policy drew them, all that it drew: they then stand for its entropy. It is checked."""
    train_prompts: Literal["random", "fixed_set", "from_run"] = "random"
    """`random`: by difficulty; `fixed_set`: the first prompts; `from_run`: the buffer the checkpoint's last step used."""
    train_completions: Literal["sampled", "reference"] = "sampled"
    """`sampled` from the policy; `reference`: each prompt's own answer, columns without weights."""
    train_sequences_path: str | None = None
    """The same as columns; without rewards, advantages or weights there is no step, only the kernel."""
    train_sequences_step: NonNegativeInt | None = None
    """Which step's sequences of a dump are taken; by default those of the checkpoint's own step."""
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
    mask_truncated_completions: bool = False
    """True gives completions that were cut no weight in the step, as TRL's setting of this name does; for checkpoints of plain
    TRL. A run's recorded weights (from_run) and weights of one's own are taken as they are."""
    max_refill_rounds: NonNegativeInt = 4
    """Times that groups without reward differences are replaced."""

    @property
    def rows_are_drawn(self) -> bool:
        """Whether the evaluation sequences come from the policy, so that they say something of its entropy."""
        return self.analysis_draws_rows or (self.eval_sequences_path is not None and self.eval_sequences_drawn)

    @property
    def analysis_draws_rows(self) -> bool:
        """Whether they are neither given nor references: drawn here, or taken from what the run recorded."""
        return self.eval_sequences_path is None and self.eval_completions == "sampled"

    @model_validator(mode="after")
    def _one_source_a_side(self) -> Self:
        if self.eval_sequences_path is not None and self.eval_completions == "reference":
            raise ValueError(
                "eval_sequences_path and eval_completions=reference both say what the rows are: take one of them"
            )
        if self.eval_completions == "reference" and self.eval_completions_per_prompt > 1:
            raise ValueError("a prompt has one reference completion: leave eval_completions_per_prompt at 1")
        if self.train_sequences_path is not None and self.train_completions == "reference":
            raise ValueError(
                "train_sequences_path and train_completions=reference both say what the columns are: take one of them"
            )
        for side, path in (("eval", self.eval_sequences_path), ("train", self.train_sequences_path)):
            if path is None and getattr(self, f"{side}_sequences_step") is not None:
                raise ValueError(f"{side}_sequences_step is of {side}_sequences_path: give that, or leave it out")
        if self.eval_sequences_drawn and self.eval_sequences_path is None:
            raise ValueError("eval_sequences_drawn is said of eval_sequences_path: give that, or leave it out")
        if self.eval_prompts == "from_run" and (not self.analysis_draws_rows or self.same_prompts):
            raise ValueError(
                "eval_prompts=from_run takes the sequences that the run recorded: leave out eval_sequences_path, "
                "eval_completions=reference and same_prompts, or eval_prompts"
            )
        own = self.train_sequences_path is not None or self.train_completions == "reference"
        if own and self.train_prompts == "from_run":
            raise ValueError(
                "train_prompts=from_run takes the sequences that the run recorded: leave out train_sequences_path and "
                "train_completions=reference, or train_prompts"
            )
        return self


class FisherKernelConfig(StrictModel):
    """The kernel."""

    compute_full: bool = True
    """Compute the matrices; false leaves predictions and measurements only."""
    preconditioning: Literal["checkpoint", "step", "none"] = "checkpoint"
    """P from Adam's second moments in the `checkpoint`, or from those of the analysed `step`; `none`: P = 1."""
    token_batch_size: PositiveInt = 2048
    """Padded tokens in one forward and backward pass; bounds memory."""
    method: Literal["auto", "hooks", "loop"] = "auto"
    """Rows by `hooks` (batched passes) or by a `loop` of one pass per sequence, for any model; `auto`: hooks where they do."""
    strategy: Literal["auto", "memory", "disk", "factored", "tiles"] = "auto"
    """Training rows in `memory`, on `disk`, as factors (`factored`), or formed anew in `tiles`; `auto`: the first that fits."""
    memory_budget: ByteSize | None = None
    """What the process may take in all (8GiB); by default most of what is free."""
    disk_budget: ByteSize = ByteSize(0)
    """What rows, or factors of rows, may take on disk (200GiB)."""
    save_gradients: bool = False
    """Keep the training rows in the results folder, for other preconditioners and other questions."""
    gradient_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the store; its rounding error is measured and printed."""
    projection_dim: PositiveInt | None = None
    """Numbers that each module's rows are randomly projected to, for very many sequences; by default rows are exact."""
    filter_modules: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    """Shell patterns of parameter names that rows are restricted to; by default all trainable parameters."""


class AnalysisConfig(StrictModel):
    """Which questions are answered; each is a page of docs/analyses."""

    prompt_structure: bool = True
    """Do sequences of the same prompt move each other more than sequences of different prompts?"""
    sequence_clustering: bool = True
    """Do the training sequences' gradients fall into groups, and what do these share?"""
    entropy_prediction: bool = True
    """How well does the first order predict what the step really does to entropy? Without it nothing is measured."""
    step_scales: Scales = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
    """Multiples of the step at which the entropy change is measured; 1 is always among them."""
    fresh_scales: Annotated[tuple[PositiveFloat, ...], Field(strict=False)] = (1.0, 4.0)
    """At which of these completions are drawn anew as well (others than these are left out); a sampling each."""
    higher_order: bool = True
    """At which step size does the second order matter?"""
    attribution: bool = True
    """Which training sequences, prompts and tokens moved entropy, and which evaluation sequences lost it?"""
    intervention: bool = True
    """Do the shares say what happens when sequences are really left out of the step?"""
    intervention_subsets: int = Field(default=40, ge=3)
    """Random halves of the training buffer with which a real step is taken; each costs a forward pass."""
    weighting_schemes: bool = True
    """What would other weightings of the same sequences have cost in entropy?"""
    weighting_steps: bool = True
    """Take and measure each weighting's real step as well; each costs a forward pass."""
    prices: bool = True
    """What could be done in place of this step, and what would it cost in reward? An eighth of an analysis."""
    price_steps: bool = False
    """Take and measure each intervention's real step as well; each costs a forward pass."""
    baselines: bool = True
    """How do other predictors of entropy change do on the same step?"""
    buffers: bool = True
    """How do the two buffers differ?"""


class EntropyAnalysisConfig(StrictModel):
    """Sizes of the two buffers, how they are drawn, and what is computed from them."""

    eval_batch_size: int = Field(default=64, ge=2)
    """Sequences in the unfiltered evaluation buffer."""
    train_batch_size: PositiveInt = 64
    """Sequences in the filtered training buffer."""
    sampling: BuffersConfig = BuffersConfig()
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
    device_map: Literal["auto", "balanced", "sequential"] | dict[str, Place] | None = None
    """Where a base model's parts go that is too large for one device, in place of `device`: module name to device or `disk`."""
    max_memory: dict[Place, ByteSize] | None = None
    """What a device_map that is chosen by itself may put on each device, `{0: 20GiB, cpu: 100GiB}`; by default what is free."""
    offload_folder: str | None = None
    """Where offloaded weights go that cannot be read from the model's own files (no safetensors, or converted)."""
    sharding: Literal["fsdp2"] | None = None
    """`fsdp2` cuts a model that no device holds over the processes of a launch: each has a part of every weight, and its rows."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None
    """Precision of passes; by default the run's, and float32 where that is below (its weights as they are). Below float32
    self-checks fail on rounding alone; float64 takes twice as long and twice the memory, and gives kernels two digits more."""
    learning_rate: PositiveFloat | None = None
    """Rate of the analysed step; by default the one the checkpoint's last step was taken with."""
    max_grad_norm: PositiveFloat | None = None
    """Gradient clipping of the analysed step; by default the run's (1.0 without a sidecar)."""
    task: TaskConfig | None = None
    """Prompts and rewards; by default the run's. Needed for checkpoints without a sidecar."""

    @model_validator(mode="after")
    def _one_placement(self) -> Self:
        if self.device_map is not None and self.device != "auto":
            raise ValueError("device and device_map both say where the model goes: leave one of them out")
        if self.max_memory is not None and not isinstance(self.device_map, str):
            raise ValueError("max_memory is for a device_map that is chosen by itself: set device_map=auto")
        if self.offload_folder is not None and self.device_map is None:
            raise ValueError("offload_folder is for weights that a device_map offloads: set device_map")
        if self.sharding is not None and self.device_map is not None:
            raise ValueError("sharding and device_map both say where the model goes: leave one of them out")
        return self

    @property
    def on_cpu(self) -> bool:
        """Whether it is said that everything is computed on the CPU."""
        if isinstance(self.device_map, dict):
            return set(self.device_map.values()) <= {"cpu", "disk"}
        return self.device == "cpu"


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

    @model_validator(mode="after")
    def _a_cut_model_keeps_rows_where_its_weights_are(self) -> Self:
        kernel = self.entropy_analysis.fisher_kernel
        asked = {
            "save_gradients": kernel.save_gradients,
            "strategy=disk": kernel.strategy == "disk" or kernel.disk_budget > 0,
            "strategy=factored": kernel.strategy == "factored",
            "projection_dim": kernel.projection_dim is not None,
        }
        found = [name for name, is_set in asked.items() if is_set]
        if self.checkpoint.sharding is not None and found:
            raise ValueError(
                f"checkpoint.sharding keeps rows in memory, each process those of its own weights: leave out fisher_kernel's "
                f"{' and '.join(found)} (with strategy=auto it takes tiles where memory is short)"
            )
        return self
