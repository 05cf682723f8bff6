"""The sidecar that a checkpoint of ours carries beside the Hugging Face Trainer's own files.

`optimizer.pt` numbers its entries and names none of them, the scheduler may already hold the *next* learning rate, and
nothing in a checkpoint says how completions were sampled. The sidecar `entropy_experiments.json` says all three.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from rl_training.configuration import StrictModel, validate_config
from rl_training.errors import UserError
from rl_training.files import read_regular, write_whole
from rl_training.run import record_ranges as of

SIDECAR_NAME = "entropy_experiments.json"
SIDECAR_FORMAT = 2
_LARGEST = 1 << 28
# What this release reads: a checkpoint of format 1 lacks the fields that have a default below.
_READABLE_FORMATS = (1, 2)


class SidecarSampling(StrictModel):
    """How completions were drawn in the run."""

    temperature: of.Temperature
    top_p: of.TopP
    top_k: of.TopK
    max_completion_length: of.Tokens
    eos_token_ids: of.EndTokens
    pad_token_id: of.TokenId
    prompts_per_step: of.Sequences
    completions_per_prompt: of.Sequences
    chat_template_sha256: of.Digest | None = None
    """Digest of the tokenizer's chat template; None where it was not recorded."""
    chat_template_kwargs: of.Settings = {}
    """Arguments of the chat template beside the messages, e.g. {"enable_thinking": false}."""
    contents_in_parts: bool = False
    """Whether messages were given to the template in parts, as those of multimodal models are."""
    generation: of.Settings = {}
    """Every key of the generator's final configuration that has a value; empty where it was not recorded."""
    training_noise: of.Texts = []
    """What made training mode another function than evaluation mode, e.g. "neftune_noise_alpha=5"."""
    adapters: of.Texts = []
    """Kinds of the adapters that the policy had, e.g. "LORA"."""
    environment: of.Text | None = None
    """What wrote into completions beside the policy: tools, environment_factory or rollout_func; None for nothing."""


class SidecarWitness(StrictModel):
    """A few of the run's sequences with their log-probabilities under the policy that was saved: whoever loads the checkpoint
    must find the same ones.
    """

    prompt_ids: list[of.TokenIds]
    completion_ids: list[of.TokenIds]
    scores: list[of.Score]
    """Log-probability of each completion, nats, at the sampling temperature."""


class SidecarGradientPremise(StrictModel):
    """What the run found when it held its own gradient against that of its sequences' weights; see docs/guides/training.md."""

    step: of.Step
    made: bool
    """Whether it could be checked; `trouble` says why not."""
    trouble: of.LongText | None
    """What is wrong; null where the premise held."""
    relative_error: of.Error | None = None
    tolerance: of.Error | None = None
    logprob_difference: of.Error | None = None
    """Of a token's log-probability between the trainer's forward pass and the policy's, nats."""


class SidecarAlgorithm(StrictModel):
    """How sequences were weighted in the loss, and how the training buffer was filled."""

    scheme: of.Scheme
    length_normalizer: of.Normalizer
    max_grad_norm: of.GradientNorm
    difficulty_weighting: bool
    reject_zero_advantage: bool
    max_refill_rounds: of.Rounds


class Sidecar(StrictModel):
    """What a checkpoint must carry to be analysed; see the fields of the same name in docs/guides/checkpoints.md."""

    format: Literal[1, 2]
    step: of.Step
    model_name: of.Text
    dtype: of.Precision
    mixed_precision: of.Autocast
    """Autocast of the training forwards ("no" for none); an analysis runs without."""
    quantization: of.LongText | None
    optimizer_parameter_names: list[of.Texts]
    """Per parameter group, the names in the order of the optimizer's integer ids."""
    learning_rates_used: list[of.LearningRate]
    """Per parameter group, the rate that the last step was taken with."""
    sampling: SidecarSampling
    algorithm: SidecarAlgorithm
    task: of.TaskSettings | None
    """The task's configuration, where it came from one."""
    pass_rates: of.PassCounts
    rank_count: of.Processes
    versions: dict[of.Text, of.Text]
    optimizer_class: of.Text | None = None
    """Full name of the optimizer's class, e.g. torch.optim.adamw.AdamW; None where it was not recorded."""
    sha256: dict[str, of.Digest] = {}
    """Digest of each file of weights and optimizer state, by its name in the checkpoint."""
    rollouts_sha256: of.Digest | None = None
    """Digest of the record of this step's sequences, which lies beside the checkpoint; None where there was none."""
    witness: SidecarWitness | None = None
    """None where none was recorded."""
    gradient_premise: SidecarGradientPremise | None = None
    """None where no step had a gradient yet, or the release did not check."""
    entropy_controller: of.LongText | None = None
    """What an entropy controller added to the gradient, which no sequence's weight says; None where there was none."""
    own_sha256: of.Digest | None = None
    """Digest of this record without this field; None in records of earlier releases, or that a person changed."""


def write_sidecar(folder: Path, sidecar: Sidecar) -> Path:
    """Write it, with its own digest, whole or not at all; flushed to disk before it gets its name."""
    path = folder / SIDECAR_NAME
    content = json.loads(sidecar.model_dump_json())
    content["own_sha256"] = _own_digest(content)
    # Without a line end: cut short by a single byte it is no JSON.
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False))
    return path


def _own_digest(content: dict[str, Any]) -> str:
    rest = {name: value for name, value in content.items() if name != "own_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


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
        data = json.loads(read_regular(path, _LARGEST).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it, or delete it to analyse without it") from error
    known = isinstance(data, dict) and type(data.get("format")) is int and data["format"] in _READABLE_FORMATS
    if not known:
        found = data.get("format") if isinstance(data, dict) else None
        raise UserError(
            f"{path} is of format {str(found)[:40]}, this release reads formats 1 and 2: use the release that wrote it"
        )
    found = validate_config(Sidecar, data, str(path))
    if found.own_sha256 is not None and found.own_sha256 != _own_digest(data):
        raise UserError(
            f"{path} is not as it was written (its SHA-256 differs from its own_sha256): it is damaged, copy the checkpoint "
            "again; or, if you changed it, delete its line own_sha256"
        )
    return found
