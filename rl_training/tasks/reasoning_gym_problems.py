"""The problems of a reasoning-gym data set. Runs in the sandbox's server, where arguments and texts
can do no harm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from random import Random
from typing import Any

from rl_training.errors import UserError, first_line

# A finite data set is taken to be exhausted after this many draws in a row that were all seen
# before.
DRAWS_WITHOUT_A_NEW_PROMPT = 2000
# Some data sets allocate, or refuse, in proportion to the size that they are told.
LARGEST_DECLARED_SIZE = 20_000


def create_dataset(name: str, arguments: Mapping[str, Any], seed: int, count: int) -> Any:
    """Instantiate a reasoning-gym data set from which `count` distinct prompts will be drawn.

    Raises:
        UserError: if the data set or an argument is unknown (valid names are given), or the data
            set refuses a value.
    """
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        near = get_close_matches(name, DATASETS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `reasoning_gym.factory.DATASETS`"
        raise UserError(f"task.name: reasoning-gym has no data set {name!r}: {hint}")
    dataset_class, config_class = DATASETS[name]
    valid = [item.name for item in fields(config_class) if item.init and item.name not in ("seed", "size")]
    for argument in arguments:
        if argument not in valid:
            near = get_close_matches(argument, valid, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(valid)
            raise UserError(f"task.arguments: {name} has no argument {argument!r}: {hint}valid are {known}")
    # Neighbouring seeds of reasoning-gym share all but one of their problems, since problem i has
    # seed + i.
    seed = Random(seed).getrandbits(31)
    size = max(LARGEST_DECLARED_SIZE, count)
    try:
        return dataset_class(config=config_class(seed=seed, size=size, **arguments))
    except Exception as error:  # the data sets raise whatever they like; nothing is hidden, all of it is the user's
        given = ", ".join(f"{key}={value!r}"[:80] for key, value in arguments.items()) or "no arguments"
        raise UserError(f"task.arguments: {name} refuses {given}: {first_line(error)}") from error


def draw_entries(dataset: Any, count: int) -> list[dict[str, Any]]:
    """Entries of `count` distinct questions, or fewer where the data set seems exhausted."""
    entries: dict[str, dict[str, Any]] = {}
    draws_without_new = 0
    for index in range(dataset.config.size):
        entry = dataset[index]
        if entry["question"] in entries:
            draws_without_new += 1
            if draws_without_new == DRAWS_WITHOUT_A_NEW_PROMPT:
                break
            continue
        draws_without_new = 0
        entries[entry["question"]] = entry
        if len(entries) == count:
            break
    return list(entries.values())
