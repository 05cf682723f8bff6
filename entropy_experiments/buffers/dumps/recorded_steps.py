"""What `record_steps(trainer)` of this project writes beside a run of TRL: `<output_dir>/recorded_steps/step-<step>.parquet`.

Token ids as they were drawn, masks of tools, rewards and the sampler's log-probabilities (rl_training/run/step_record.py).
Advantages are those of the loss, where it had the very sequences that were generated. Prompts follow each other in groups of
`num_generations`, over processes too, as TRL draws them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from entropy_experiments.buffers.dumps.files import rows_of
from entropy_experiments.buffers.dumps.rows import RolloutRow, logprobs, mask, number, tokens, whole
from rl_training.errors import UserError
from rl_training.run.step_record import GENERATED, LOSS, read_settings

NAME = "TRL, recorded by this project"
FILES = r"step-(?P<step>\d{6})\.parquet"


def matches(keys: set[str]) -> bool:
    """Whether a row of these keys is of such a file."""
    return {"part", "batch", "prompt_ids", "completion_ids", "mask", "rewards"} <= keys


def sequences_of(file: Path) -> Callable[[dict[str, Any], str, int | None], Iterator[RolloutRow]]:
    """Reads the rows of one file, in order. Raises UserError where the run's settings are not beside it."""
    settings = read_settings(file.absolute().parent.parent)
    if settings is None:
        raise UserError(
            f"{file.parent}/run.json is missing, which says how rewards and groups were made: copy it as well"
        )
    counts: Counter[int] = Counter()
    advantages = _advantages(file)

    def sequences(data: dict[str, Any], place: str, step: int | None) -> Iterator[RolloutRow]:
        prompt, completion = (tokens(name, data[name]) for name in ("prompt_ids", "completion_ids"))
        drawn = mask("mask", data["mask"])
        if data["part"] not in (GENERATED, LOSS) or prompt is None or completion is None or drawn is None:
            raise ValueError("is no row that record_steps writes: the file is damaged; copy it again")
        if data["part"] == LOSS:
            return
        batch = whole("batch", data["batch"]) or 0
        group, counts[batch] = counts[batch] // settings.completions_per_prompt, counts[batch] + 1
        yield RolloutRow(
            place=place,
            prompt_ids=prompt,
            completion_ids=completion,
            completion_mask=None if all(drawn) else drawn,
            reward=_reward(data["rewards"], settings.reward_weights),
            advantage=advantages[_key(data)].pop() if advantages else None,
            sampler_logprobs=logprobs("sampler_logprobs", data.get("sampler_logprobs")),
            group=f"{batch}.{group}",
            step=step,
            temperature=settings.temperature,
        )

    return sequences


_Key = tuple[tuple[int, ...], tuple[int, ...]]


def _key(row: dict[str, Any]) -> _Key:
    return tuple(row["prompt_ids"]), tuple(row["completion_ids"])


def _advantages(file: Path) -> dict[_Key, list[float]]:
    """Those of the loss by sequence (equal sequences are interchangeable); {} where they are not known of every generated one, or
    the loss had other sequences.
    """
    generated, found, unknown = Counter[_Key](), defaultdict[_Key, list[float]](list), False
    for place, row in rows_of(file, ("part", "prompt_ids", "completion_ids", "advantage")):
        if not isinstance(row, dict) or None in (row.get("prompt_ids"), row.get("completion_ids")):
            return {}  # said where the rows are read
        value = number(f"{place}: advantage", row.get("advantage"))
        generated[_key(row)] += row["part"] == GENERATED
        if row["part"] == LOSS and value is not None:
            found[_key(row)].append(value)
        unknown = unknown or (row["part"] == LOSS and value is None)
    same = +generated == Counter({key: len(values) for key, values in found.items()})
    return {} if unknown or not same else found


def _reward(values: Any, weights: list[float]) -> float | None:
    """TRL's sum of rewards by their weights; None where none judged. Raises ValueError for other rewards than the run's."""
    if not isinstance(values, list) or len(values) != len(weights):
        raise ValueError(f"has {len(values) if isinstance(values, list) else 'no'} rewards, the run had {len(weights)}")
    judged = [(number("rewards", v), w) for v, w in zip(values, weights, strict=True) if v is not None]
    return sum((v or 0.0) * w for v, w in judged) if judged else None


def notes(rows: list[RolloutRow], path: Path) -> list[str]:
    """What has to be said of all of them: where the step's loss had other sequences than were generated in it."""
    generated, trained, masked = Counter[Any](), Counter[Any](), 0
    for _, row in rows_of(path, ("part", "prompt_ids", "completion_ids", "mask")):
        if isinstance(row, dict) and row["part"] in (GENERATED, LOSS):
            key = (tuple(row["prompt_ids"]), tuple(row["completion_ids"]))
            (generated if row["part"] == GENERATED else trained)[key] += 1
            masked += row["part"] == LOSS and not any(row["mask"])
    said = []
    if trained and trained != generated:
        said.append(
            f"{path.name}: the step's loss had {trained.total()} sequences and {generated.total()} were generated in it, "
            f"{(trained & generated).total()} of them the same (steps_per_generation, num_iterations): those generated are taken"
        )
    if masked:
        said.append(
            f"{path.name}: {masked} sequences were masked out of the loss as a whole, and are weighed here as any other"
        )
    return said
