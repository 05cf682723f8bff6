"""open-instruct's `--save_traces`: `<rollouts_save_path>/<run>_rollouts_<shard>.jsonl`, one sequence a line, with token ids.

The mask of the response is not written. Under tools its foreign tokens carry the log-probability 0 exactly, and are told by
that: a token that the policy drew with probability 1 to rounding has no entropy and no gradient, so that nothing is lost.
prompt_idx counts anew in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from entropy_experiments.buffers.dumps.rows import RolloutRow, logprobs, number, tokens, whole

NAME = "open-instruct"
FILES = r".+_rollouts_\d+\.jsonl"


def matches(keys: set[str]) -> bool:
    """Whether a row of these keys is one of open-instruct's."""
    return {"prompt_tokens", "response_tokens", "advantage", "prompt_idx"} <= keys


def sequences_of(file: Path) -> Callable[[dict[str, Any], str, int | None], Iterator[RolloutRow]]:
    """Reads the rows of one file, in order; a step that stands in it twice is refused (a resumed run appends to the shard)."""
    seen: set[tuple[str, str]] = set()

    def of_file(data: dict[str, Any], place: str, step: int | None) -> Iterator[RolloutRow]:
        key = (str(data.get("step")), str(data.get("sample_idx")))
        if data.get("sample_idx") is not None and key in seen:
            raise ValueError(
                f"sample {key[1]} of step {key[0]} stands twice: the run was resumed; keep the lines of one attempt"
            )
        seen.add(key)
        yield from sequences(data, place, step)

    return of_file


def sequences(data: dict[str, Any], place: str, step: int | None) -> Iterator[RolloutRow]:
    """The sequence of a line. Raises ValueError where it is not what open-instruct writes."""
    prompt, response = (
        tokens("prompt_tokens", data["prompt_tokens"]),
        tokens("response_tokens", data["response_tokens"]),
    )
    recorded = logprobs("logprobs", data.get("logprobs"))
    own_step = whole("step", data.get("step"))
    reason = data.get("finish_reason")
    advantage, reward = number("advantage", data["advantage"]), number("reward", data.get("reward"))
    if prompt is None or response is None or advantage is None:
        raise ValueError("prompt_tokens, response_tokens or advantage is null")
    yield RolloutRow(
        place=place,
        prompt_ids=prompt,
        completion_ids=response,
        completion_mask=_mask(data.get("request_info"), recorded),
        reward=reward,
        advantage=advantage,
        sampler_logprobs=recorded,
        group=None if data["prompt_idx"] is None else str(whole("prompt_idx", data["prompt_idx"])),
        step=own_step,
        truncated=None if reason is None else reason == "length",
    )


def _mask(request: Any, recorded: list[float | None] | None) -> list[bool] | None:
    called = isinstance(request, dict) and (request.get("tool_calleds") or request.get("num_calls"))
    if not called:
        return None
    if recorded is None:
        raise ValueError(
            "a tool was called, and neither a mask nor log-probabilities say which tokens the policy drew; leave the line out"
        )
    return [value != 0.0 for value in recorded]


def notes(rows: list[RolloutRow], path: Path) -> list[str]:
    """What has to be said of all of them."""
    masked = sum(row.completion_mask is not None for row in rows)
    if not masked:
        return []
    return [
        f"{masked} of {len(rows)} sequences called a tool; open-instruct writes no mask, and tokens with the recorded "
        "log-probability 0 are taken for the tool's (under mask_tool_use=False the run's loss had them too)"
    ]
