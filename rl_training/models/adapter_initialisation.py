"""Initialisations of LoRA after which a saved adapter, loaded again, is the policy that was saved.

PiSSA, OLoRA and their like take something out of the *base* weights when an adapter is created,
also when it is created to load a saved one into. The policy comes back only if that takes out the
same thing again: an exact singular value or QR decomposition does, a randomised one does not, and
others need data that the checkpoint does not hold.
"""

from __future__ import annotations

from typing import Any

# The first five leave the base as it is; the last two take the same out of it each time.
REPEATABLE = (True, False, "gaussian", "eva", "orthogonal", "pissa", "olora")


def unrepeatable_initialisation(config: Any) -> str | None:
    """The initialisation that makes another policy at each load, or None.

    Args:
        config: an adapter's, as a dict or an object.
    """
    held = config if isinstance(config, dict) else vars(config)
    name = held.get("init_lora_weights", True)
    known = name in REPEATABLE or (isinstance(name, str) and name.lower() in REPEATABLE)
    return None if known or name is None else str(name)


REMEDY = (
    "train with init_lora_weights=True, or save the run's adapter as plain LoRA (PeftModel.save_pretrained with "
    "path_initial_model_for_weight_conversion)"
)
