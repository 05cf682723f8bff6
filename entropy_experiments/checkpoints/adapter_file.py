"""The files of a PEFT adapter, checked before anything is built of them: its configuration, its weights' names and shapes.

An option that is not known is refused, for PEFT would leave it out with a warning; so is one that makes PEFT import modules by
name, and every kind of adapter that is no function of the model's weights alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from entropy_experiments.checkpoints.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from rl_training.errors import UserError, first_line
from rl_training.models.adapter_initialisation import REMEDY, unrepeatable_initialisation

# Options that say where the adapter came from, and none that change what it computes.
_IGNORED = frozenset(
    {"auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "task_type"}
)
# Options under which the adapter is more than weights beside weights; each must be off.
_MUST_BE_OFF = {
    "megatron_config": "it imports modules by name",
    "alora_invocation_tokens": "it acts from some token on only",
    "arrow_config": "it routes between adapters",
    "use_qalora": "it needs a quantised base model",
    "monteclora_config": "its forward pass is random",
    "velora_config": "its gradients are projected",
    "layer_replication": "it stacks layers of the base model anew",
}
LORA_OPTIONS = frozenset(
    "peft_type r target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save "
    "init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core trainable_token_indices "
    "loftq_config eva_config corda_config lora_ga_config use_dora qalora_group_size runtime_config lora_bias target_parameters "
    "use_bdlora kasa_config ensure_weight_tying".split()
)
"""Options of LoRA under which a policy is loaded as it was trained; any other must be off."""
SUPPORTED = frozenset(
    "ADALORA BEFT BOFT DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LN_TUNING LOHA LOKR LORA MISS OFT PEANUT "
    "PSOFT RANDLORA ROAD SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT".split()
)
"""Kinds of adapter that are loaded as they were trained (a test does it with each); any other is refused."""
_BEFORE_THE_PROMPT = (
    "it puts trained vectors before the prompt, and log-probabilities of such a policy are not computed here"
)
_MIXED = "it is several adapters mixed by input, which is not supported"
_REFUSED = {
    **dict.fromkeys("PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING CPT".split(), _BEFORE_THE_PROMPT),
    **dict.fromkeys("ADAPTION_PROMPT CARTRIDGE".split(), _BEFORE_THE_PROMPT),
    **dict.fromkeys("XLORA POLY SHADOW".split(), _MIXED),
    "PVERA": "its forward pass is random in training",
    "OSF": "its gradients are projected in training",
    "C3A": "its backward pass is not the derivative of its forward pass, so that shares of a step do not add up to what it did",
    "LILY": "it averages over all tokens of a batch, so that a sequence is scored by what stands beside it",
    "ADAMSS": "what it trains is chosen from the base model's values",
}
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "lm_head", "embed_out")


@dataclasses.dataclass(frozen=True)
class LoraFactor:
    """A parameter of the model by its name, and the value that the checkpoint saved."""

    name: str
    weight: Tensor


def read_adapter_config(folder: Path, reproducible: bool) -> dict[str, Any]:
    """The content of adapter_config.json. reproducible: a record of the run shows whether the loaded policy is the trained one.

    Raises UserError for kinds and options that are refused, naming them.
    """
    path = folder / ADAPTER_CONFIG
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no object: the checkpoint is damaged; copy it again")
    known = _fields_of(path, content.get("peft_type"))
    _check_options(path, content, known)
    start = unrepeatable_initialisation(content)
    if start is not None and not reproducible:
        raise UserError(
            f"{path} has init_lora_weights={start!r}, which changes the base model at every load, and no record tells whether it "
            f"is the trained one: {REMEDY}"
        )
    return content


def _fields_of(path: Path, kind: Any) -> set[str]:
    """The options of an adapter of this kind."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    configuration = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, str) else None
    if configuration is None:
        raise UserError(
            f"{path}: peft_type {kind!r} is no adapter that the installed PEFT knows: install the one that wrote it"
        )
    if kind not in SUPPORTED:
        why = _REFUSED.get(str(kind), "it is not known here to be loaded as it was trained")
        raise UserError(f"{path} is of kind {kind}: {why}; train LoRA, or the whole model")
    return {field.name for field in dataclasses.fields(configuration)}


def _check_options(path: Path, content: dict[str, Any], known: set[str]) -> None:
    """Raises UserError for an option that PEFT does not know, or that is set and not known here to be predicted right."""
    for key, value in content.items():
        if key in _IGNORED or value in (None, False, [], {}, 0):
            continue
        if key not in known:
            raise UserError(
                f"{path} has the option {key}={str(value)[:80]!r}, which the installed PEFT does not know and would leave out: "
                f"install the PEFT that wrote it ({content.get('peft_version', 'a newer one')})"
            )
        why = _MUST_BE_OFF.get(key)
        if why is None and content.get("peft_type") == "LORA" and key not in LORA_OPTIONS:
            why = "what it does to the policy is not known here"
        if why is not None:
            raise UserError(f"{path} has {key} set: {why}, so its policy cannot be analysed; train without it")
    if content.get("ensure_weight_tying") and content.get("modules_to_save"):
        raise UserError(
            f"{path} has ensure_weight_tying with modules_to_save: PEFT ties these when it makes the adapter, not when it loads "
            "it, so that the loaded policy has a parameter more than the trained one; train without ensure_weight_tying"
        )


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a safetensors file; only its header is read. Raises UserError where that is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        line = first_line(error)
        raise UserError(f"{path} is damaged ({line}): the checkpoint is partial; copy it again") from error


def saved_factors(folder: Path, adapter: str, trained: Iterable[str]) -> list[tuple[LoraFactor, LoraFactor]]:
    """(A, B) of every linear layer with LoRA both of whose factors are among the parameters `trained`."""
    known, found = set(trained), []
    with safe_open(adapter_weights(folder), framework="pt") as file:
        keys = set(file.keys())
        for name in sorted(known):
            start, middle, _ = name.rpartition(f".lora_A.{adapter}.weight")
            names = [name, f"{start}.lora_B.{adapter}.weight"]
            saved = [f"{start}.lora_{side}.weight" for side in "AB"]
            if middle and known.issuperset(names) and keys.issuperset(saved):
                a, b = (LoraFactor(n, file.get_tensor(key)) for n, key in zip(names, saved, strict=True))
                found.append((a, b))
    return found


def saved_embeddings(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Those of an adapter's weights that are whole embedding tables or output heads, saved because tokens were added."""
    return {name: shape for name, shape in shapes.items() if len(shape) == 2 and _is_embedding(name)}


def _is_embedding(name: str) -> bool:
    """Whether a weight is a whole table; PEFT also saves the frozen one beneath an adapter that sits on it."""
    module, _, last = name.removesuffix(".base_layer.weight").removesuffix(".weight").rpartition(".")
    return name.endswith(".weight") and bool(module) and last in _EMBEDDINGS


def adapter_weights(folder: Path) -> Path:
    """The file of an adapter's weights."""
    return folder / ADAPTER_WEIGHTS
