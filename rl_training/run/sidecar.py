"""The sidecar that a checkpoint of ours carries beside the Hugging Face Trainer's own files.

`optimizer.pt` numbers its entries and names none of them, the scheduler may already hold the *next* learning rate, and
nothing in a checkpoint says how completions were sampled. The sidecar `entropy_experiments.json` says all three.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from rl_training.configuration import StrictModel, validate_config
from rl_training.errors import UserError
from rl_training.files import write_whole

SIDECAR_NAME = "entropy_experiments.json"
SIDECAR_FORMAT = 2
# What this release reads: a checkpoint of format 1 lacks the fields that have a default below.
_READABLE_FORMATS = (1, 2)
_LARGEST_COUNT = 10**7


class SidecarSampling(StrictModel):
    """How completions were drawn in the run."""

    temperature: PositiveFloat
    top_p: float
    top_k: int
    max_completion_length: Annotated[int, Field(ge=1, le=_LARGEST_COUNT)]
    eos_token_ids: list[int]
    pad_token_id: NonNegativeInt
    prompts_per_step: Annotated[int, Field(ge=1, le=_LARGEST_COUNT)]
    completions_per_prompt: Annotated[int, Field(ge=1, le=_LARGEST_COUNT)]
    chat_template_sha256: str | None = None
    """Digest of the tokenizer's chat template; None where it was not recorded."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments of the chat template beside the messages, e.g. {"enable_thinking": false}."""
    contents_in_parts: bool = False
    """Whether messages were given to the template in parts, as those of multimodal models are."""
    generation: dict[str, Any] = {}
    """Every key of the generator's final configuration that has a value; empty where it was not recorded."""
    training_noise: list[str] = []
    """What made training mode another function than evaluation mode, e.g. "neftune_noise_alpha=5"."""
    adapters: list[str] = []
    """Kinds of the adapters that the policy had, e.g. "LORA"."""
    environment: str | None = None
    """What wrote into completions beside the policy: tools, environment_factory or rollout_func; None for nothing."""


class SidecarWitness(StrictModel):
    """A few of the run's sequences with their log-probabilities under the policy that was saved: whoever loads the checkpoint
    must find the same ones.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    scores: list[float]
    """Log-probability of each completion, nats, at the sampling temperature."""


class SidecarGradientPremise(StrictModel):
    """What the run found when it held its own gradient against that of its sequences' weights; see docs/guides/training.md."""

    step: int
    made: bool
    """Whether it could be checked; `trouble` says why not."""
    trouble: str | None
    """What is wrong; null where the premise held."""
    relative_error: float | None = None
    tolerance: float | None = None
    logprob_difference: float | None = None
    """Of a token's log-probability between the trainer's forward pass and the policy's, nats."""


class SidecarAlgorithm(StrictModel):
    """How sequences were weighted in the loss, and how the training buffer was filled."""

    scheme: str
    length_normalizer: str
    max_grad_norm: float
    difficulty_weighting: bool
    reject_zero_advantage: bool
    max_refill_rounds: int


class Sidecar(StrictModel):
    """What a checkpoint must carry to be analysed; see the fields of the same name in docs/guides/checkpoints.md."""

    format: int
    step: NonNegativeInt
    model_name: str
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    mixed_precision: str
    """Autocast of the training forwards ("no" for none); an analysis runs without."""
    quantization: str | None
    optimizer_parameter_names: list[list[str]]
    """Per parameter group, the names in the order of the optimizer's integer ids."""
    learning_rates_used: list[float]
    """Per parameter group, the rate that the last step was taken with."""
    sampling: SidecarSampling
    algorithm: SidecarAlgorithm
    task: dict[str, Any] | None
    """The task's configuration, where it came from one."""
    pass_rates: dict[str, list[float]]
    rank_count: PositiveInt
    versions: dict[str, str]
    optimizer_class: str | None = None
    """Full name of the optimizer's class, e.g. torch.optim.adamw.AdamW; None where it was not recorded."""
    sha256: dict[str, str] = {}
    """Digest of each file of weights and optimizer state, by its name in the checkpoint."""
    rollouts_sha256: str | None = None
    """Digest of the record of this step's sequences, which lies beside the checkpoint; None where there was none."""
    witness: SidecarWitness | None = None
    """None where none was recorded."""
    gradient_premise: SidecarGradientPremise | None = None
    """None where no step had a gradient yet, or the release did not check."""


def write_sidecar(folder: Path, sidecar: Sidecar) -> Path:
    """Write it whole or not at all; flushed to disk before it gets its name."""
    path = folder / SIDECAR_NAME
    write_whole(path, sidecar.model_dump_json(indent=1))
    return path


def refuse_special_file(path: Path) -> None:
    """Raises UserError for a pipe, a device or a socket: reading one may never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is a pipe or a device, no file: the checkpoint was tampered with; copy it again")


def read_sidecar(folder: Path) -> Sidecar | None:
    """The checkpoint's sidecar, or None where it has none. Raises UserError for one that is broken or too new."""
    path = folder / SIDECAR_NAME
    if not path.exists():
        return None
    refuse_special_file(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it, or delete it to analyse without it") from error
    if not isinstance(data, dict) or data.get("format") not in _READABLE_FORMATS:
        found = data.get("format") if isinstance(data, dict) else None
        raise UserError(
            f"{path} is of format {found}, this release reads formats 1 and 2: use the release that wrote it"
        )
    return validate_config(Sidecar, data, str(path))
