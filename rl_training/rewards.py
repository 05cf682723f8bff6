"""The built-in rewards by their public path; they live in tasks/."""

from rl_training.tasks.rewards import completion_text, exact, find_last_number, last_number, math_verify

__all__ = ["completion_text", "exact", "find_last_number", "last_number", "math_verify"]
