"""Models and tokenizers: where they come from, how they are read, and on which devices they lie.

Imports rl_training.config and what lies below it. `load_model_and_tokenizer`, `add_lora` and
`disable_dropout` can be imported from here.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl_training.models.load import add_lora, disable_dropout, load_model_and_tokenizer

__all__ = ["add_lora", "disable_dropout", "load_model_and_tokenizer"]


def __getattr__(name: str) -> Any:
    """Import models.load when one of its names is first asked for: it needs torch and transformers."""
    if name in __all__:
        from rl_training.models import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
