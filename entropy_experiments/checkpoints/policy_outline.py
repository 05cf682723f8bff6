"""The policy of a checkpoint without its weights: modules and shapes on torch's meta device, adapters attached.

Built from the configuration files and the headers of the weight files alone, it says what loading would run into: code that comes
with a model, a quantised or missing base model, weights of another shape or name, added tokens; and which parameters are trained.
"""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entropy_experiments.checkpoints.adapter_file import (
    adapter_weights,
    read_adapter_config,
    saved_embeddings,
    weight_shapes,
)
from entropy_experiments.checkpoints.adapter_patterns import refuse_endless_patterns
from entropy_experiments.checkpoints.folder import ADAPTER_CONFIG, Adapter
from rl_training.errors import UserError, first_line
from rl_training.models.load import outline_model


def outline_policy(
    folder: Path, base: str, adapter: Adapter | None, reproducible: bool, local_files_only: bool = False
) -> nn.Module:
    """The policy on the meta device, its trained parameters requiring gradients.

    base: name or folder of the (base) model. Raises UserError for what loading would refuse.
    """
    content = None if adapter is None else read_adapter_config(adapter.folder, reproducible)
    model: Any = outline_model(base, local_files_only)
    if adapter is None or content is None:
        return model.requires_grad_(True)
    refuse_endless_patterns(str(adapter.folder / ADAPTER_CONFIG), content, [name for name, _ in model.named_modules()])
    shapes = weight_shapes(adapter_weights(adapter.folder))
    resize_vocabulary(model, shapes, folder)
    try:
        return _attach(model, adapter, shapes, "meta")
    except (NotImplementedError, RuntimeError):  # torch's two ways to say that a tensor on meta has no values
        # A few kinds of adapter look at values as they are made (BOFT, SHiRA): any values will do.
        model = outline_model(base, local_files_only).to_empty(device="cpu")
        resize_vocabulary(model, shapes, folder)
        try:
            return _attach(model, adapter, shapes, "cpu")
        except (NotImplementedError, RuntimeError) as error:
            line = first_line(error)
            raise UserError(f"the adapter in {adapter.folder} cannot be examined: {line[:200]}; train LoRA") from error


def resize_vocabulary(model: Any, shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Give the base model as many rows of embeddings as the adapter's own file has: tokens were added before training.

    Raises UserError where the tokenizer has more tokens than there are rows, and the adapter brings none.
    """
    rows = {shape[0] for shape in saved_embeddings(shapes).values()}
    have = int(model.get_input_embeddings().weight.shape[0])
    if len(rows) > 1:
        raise UserError(
            f"{folder}: the adapter's embeddings have {sorted(rows)} rows: they are of different vocabularies"
        )
    if rows and rows != {have}:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.resize_token_embeddings(rows.pop(), mean_resizing=False)
    elif not rows and (tokens := _tokens(folder)) > have:
        raise UserError(
            f"{folder}: its tokenizer has {tokens} tokens, its base model rows for {have}, and the rows that were added are "
            "not in the checkpoint: save the resized base model by save_pretrained, and name it with checkpoint.model=..."
        )


def _tokens(folder: Path) -> int:
    """Of the checkpoint's own tokenizer, 0 where there is none."""
    from rl_training.models.load import read_tokenizer

    return len(read_tokenizer(folder)) if (folder / "tokenizer_config.json").exists() else 0


def _attach(model: Any, adapter: Adapter, shapes: dict[str, tuple[int, ...]], device: str) -> nn.Module:
    from peft import PeftConfig, get_peft_model
    from peft.utils.save_and_load import get_peft_model_state_dict

    where = f"the adapter in {adapter.folder}"
    try:
        config = copy.deepcopy(PeftConfig.from_pretrained(str(adapter.folder)))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{adapter.folder / ADAPTER_CONFIG} is damaged ({first_line(error)}): copy it again") from error
    config.inference_mode = False
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False  # there is nothing to decompose
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")
        try:
            adapted = get_peft_model(model, config, adapter_name=adapter.name, low_cpu_mem_usage=device == "meta")
            wanted = get_peft_model_state_dict(adapted, adapter_name=adapter.name, save_embedding_layers=False)
        except (ValueError, KeyError, AttributeError, TypeError, re.error) as error:
            line = first_line(error)
            raise UserError(
                f"{where} does not fit its base model: {line}; name the right one with checkpoint.model=..."
            ) from error
    embeddings = saved_embeddings(shapes)
    missing = sorted(wanted.keys() - shapes.keys())
    extra = sorted(shapes.keys() - wanted.keys() - embeddings.keys())
    if missing:
        raise UserError(
            f"{where} is partial: it has no {missing[0]!r} ({len(missing)} weights are missing); copy it again"
        )
    if extra:
        raise UserError(
            f"{where} has weights that its base model has no place for, e.g. {extra[0]!r} ({len(extra)} in all): it is of "
            "another base model; name the right one with checkpoint.model=..."
        )
    for name, tensor in wanted.items() if config.peft_type != "ADALORA" else ():  # which saves the ranks it kept
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(
                f"{where}: {name!r} is {shapes[name]}, the base model wants {tuple(tensor.shape)}: it is of another base model; "
                "name the right one with checkpoint.model=..."
            )
    return adapted
