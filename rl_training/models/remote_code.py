"""Code that comes with a model is never run, and nobody is asked whether it should be.

Every `from_pretrained` here says trust_remote_code=False. transformers then raises for a model that
has no class of its own, in words that advise to trust; this is what is said instead. Kernels that a
configuration names on the hub are code as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rl_training.errors import UserError

_FILES = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def refused_code(name: str, error: BaseException) -> UserError | None:
    """The refusal, where `error` is transformers' own for a model or tokenizer that brings code;
    None for other errors.
    """
    text = str(error)
    if "trust_remote_code" not in text and "custom code" not in text:
        return None
    return UserError(
        f"{name} brings code of its own ({_where(Path(name))}), which is never run here: take a model whose architecture "
        "transformers has, or save it in such a one"
    )


def refuse_kernels(name: str, config: Any) -> None:
    """Raises UserError for a configuration that names an implementation on the hub: transformers
    would fetch it and run it.
    """
    for key in ("_attn_implementation", "_experts_implementation"):
        value = getattr(config, key, None)
        if isinstance(value, str) and "/" in value:
            raise UserError(
                f"{name} names the kernel {value!r} ({key.lstrip('_')} in config.json), code on the hub which is never run here: "
                "take that key out of config.json"
            )


def _where(folder: Path) -> str:
    """Which file of a local folder names the code."""
    for file in _FILES:
        try:
            content = json.loads((folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and "auto_map" in content:
            return f"auto_map in {file}"
    return "auto_map in its configuration"
