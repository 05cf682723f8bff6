"""Reward functions in TRL's signature: `f(prompts, completions, **columns) -> list[float | None]`.

`exact`         1 if the completion, stripped of surrounding white space, is the answer; else 0.
`last_number`   1 if the last number in the completion equals the answer; else 0.
`math_verify`   1 if math-verify finds in the completion an expression equal to the answer; else 0.
`score_answer`  what the reasoning-gym data set's own scorer gives, in [0, 1]: it sees the content of the last
                <answer>...</answer> where there is one, else the whole stripped completion. Many scorers give
                part of the reward to a text that merely contains the answer.
`f.py:name`, `pkg.module:name`  one's own function (rl_training/tasks/own_rewards.py).

A completion is a string, or a list of chat messages of which the last one counts. The last two
built-in ones evaluate what the policy wrote, and do so in a sandbox (rl_training/tasks/sandbox).
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from decimal import Decimal
from typing import Any

from rl_training.tasks.sandbox.scoring import RewardLimits, SandboxedScorer, mathematics_server

RewardFunction = Callable[..., Any]
"""Sync or async, and a None among its rewards means that it does not judge that completion, as in
TRL.
"""

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?")
_OPENING, _CLOSING = "<answer>", "</answer>"


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a completion: the string itself, or the content of its last message."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or ())


def exact(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the stripped completion is the stripped answer, else 0."""
    pairs = zip(completions, answer, strict=True)
    return [float(completion_text(completion).strip() == gold.strip()) for completion, gold in pairs]


def last_number(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the last number in the completion equals the answer, else 0; `1,000.0` is `1000`."""
    pairs = zip(completions, answer, strict=True)
    return [float(find_last_number(completion_text(text)) == Decimal(gold.strip())) for text, gold in pairs]


def find_last_number(text: str) -> Decimal | None:
    """Return the last number in digits; a minus sign belongs to it unless a digit or letter
    precedes.
    """
    found = _NUMBER.findall(text.replace("\u2212", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None


def tagged_answer(text: str) -> str:
    """The content of the last <answer>...</answer>, or the whole text; in one walk through it,
    however often a tag is opened.
    """
    found, start = text, text.find(_OPENING)
    while start >= 0 and (end := text.find(_CLOSING, start + len(_OPENING))) >= 0:
        found = text[start + len(_OPENING) : end]
        start = text.find(_OPENING, end + len(_CLOSING))
    return found


def math_verify(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[str],
    *,
    limits: RewardLimits = RewardLimits(),  # noqa: B008 (it is frozen)
    **_: Any,
) -> list[float]:
    """1 where math-verify finds the completion's expression equal to the answer's, else 0.

    Works in any thread.
    """
    scorer = SandboxedScorer("math_verify", mathematics_server(), limits, apart=True)
    texts = [completion_text(completion) for completion in completions]
    return scorer.score([[gold, text] for gold, text in zip(answer, texts, strict=True)])


def math_verify_within(limits: RewardLimits) -> RewardFunction:
    """`math_verify` under limits of one's own, as a function of the same name."""
    return functools.update_wrapper(functools.partial(math_verify, limits=limits), math_verify)


def are_mathematics(answers: Sequence[str]) -> list[bool]:
    """Whether math-verify can read each reference answer; bare LaTeX is understood.

    False for one that takes too long.
    """
    scorer = SandboxedScorer("math_verify", mathematics_server(), RewardLimits(), apart=False)
    return scorer.readable(list(answers))


def score_answer(scorer: SandboxedScorer, problems: Collection[int]) -> RewardFunction:
    """Return the reward function that asks the reasoning-gym data set's own scorer, in the sandbox.

    Args:
        problems: the prompt indices that may be asked for.

    Raises:
        KeyError: another one.
    """

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], prompt_index: Sequence[int], **_: Any
    ) -> list[float]:
        items = []
        for completion, index in zip(completions, prompt_index, strict=True):
            if int(index) not in problems:
                raise KeyError(int(index))
            text = completion_text(completion)
            items.append([int(index), tagged_answer(text).strip()])
        return scorer.score(items)

    reward.__name__ = reward.__qualname__ = scorer.name
    return reward
