"""What a task's description may name when a stranger wrote it: a checkpoint carries one, and
whoever opens it did not.

Allowed is a reasoning-gym data set by name, with small arguments, whose scorer does no more than
compare. A path is not opened, a function is not imported, and what evaluates the completions (which
the stranger's weights write) is not run, unless the user says so: with --trust, or with a task of
their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REMEDY = "pass --trust if you trust whoever made the checkpoint, or give the task yourself (checkpoint.task={...})"

COMPARING_VERSION = "0.1.25"
"""The version of reasoning-gym whose scorers were read."""
COMPARING_SCORERS = frozenset(
    "ab acre aiw arc_1d base_conversion binary_alternation caesar_cipher calendar_arithmetic chain_sum circuit_logic coin_flip "
    "color_cube_rotation complex_arithmetic count_bits count_primes course_schedule cryptarithm decimal_arithmetic "
    "decimal_chain_sum dice emoji_mystery family_relationships fraction_simplification futoshiki gcd isomorphic_strings kakurasu "
    "knights_knaves largest_island lcm leg_counting letter_counting letter_jumble mahjong_puzzle maze mini_sudoku modulo_grid "
    "needle_haystack number_filtering number_format number_sequence palindrome_generation path_star power_function "
    "prime_factorization products quantum_lock ransom_note rectangle_count rotate_matrix rotten_oranges sentence_reordering "
    "shortest_path simple_geometry spell_backward string_manipulation string_splitting string_synthesis sudoku survo syllogism "
    "tower_of_hanoi tsumego word_ladder word_sequence_reversal word_sorting zebra_puzzles".split()
)
"""Data sets whose scorer compares texts and numbers and evaluates neither; a test reads the
installed sources again.
"""

_COMPARING_REWARDS = ("exact", "last_number")
_MOST_PROMPTS, _LARGEST_NUMBER, _LONGEST_TEXT, _MOST_VALUES, _DEEPEST = 100_000, 10**6, 200, 200, 3
_LONGEST_SECONDS, _MOST_MEMORY = 60.0, 4 << 30


def why_trust_is_needed(task: Mapping[str, Any]) -> str | None:
    """What a recorded task asks for that a stranger may not have, in words that follow "its record
    names"; None for nothing.

    Args:
        task: a task's configuration as a checkpoint carries it. Opens and imports nothing.
    """
    reward = str(task.get("reward", "default"))
    if ":" in reward:
        return f"a reward function of its own, {reward[:80]!r}, which would be imported and run"
    if task.get("source", "reasoning_gym") != "reasoning_gym" or task.get("path") is not None:
        return f"a file, {str(task.get('path'))[:80]!r}, which would be opened"
    name = str(task.get("name", "chain_sum"))
    if reward in ("default", "score_answer"):
        if name not in COMPARING_SCORERS:
            return f"the data set {name[:80]!r}, whose scorer may evaluate what the policy writes"
    elif reward not in _COMPARING_REWARDS:
        return f"the reward {reward[:80]!r}, which evaluates what the policy writes"
    return _why_its_size_is(task)


def _why_its_size_is(task: Mapping[str, Any]) -> str | None:
    bounds = (
        ("size", _MOST_PROMPTS),
        ("heldout_size", _MOST_PROMPTS),
        ("reward_timeout", _LONGEST_SECONDS),
        ("reward_memory", _MOST_MEMORY),
    )
    for key, most in bounds:
        value = task.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            return f"a {key} of {str(value)[:40]}, more than {most:g}"
    if not _is_small(task.get("arguments", {}), _DEEPEST):
        return "arguments of the data set that are unusually large or no plain values"
    return None


def _is_small(value: Any, depth: int) -> bool:
    if isinstance(value, dict):
        parts = [*value, *value.values()]
        return depth > 0 and len(parts) <= _MOST_VALUES and all(_is_small(part, depth - 1) for part in parts)
    if isinstance(value, list | tuple):
        return depth > 0 and len(value) <= _MOST_VALUES and all(_is_small(part, depth - 1) for part in value)
    if isinstance(value, str):
        return len(value) <= _LONGEST_TEXT
    return value is None or (isinstance(value, int | float) and abs(value) <= _LARGEST_NUMBER)
