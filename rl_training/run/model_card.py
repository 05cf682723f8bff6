"""README.md of a run: what was trained from what, how its entropy went, and what the probe said of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from matplotlib.figure import Figure

from rl_training.files import write_whole
from rl_training.intervals import interval

FIGURE = "entropy.png"
_BASES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def write_model_card(folder: Path, base: str, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes README.md and, where entropy was logged, its figure into `folder`.

    Args:
        base: the name that the base model is loaded by: a hub id, a folder, or a bundled model.
        facts: what stands in the table of settings, in its order.
        rows: the trainer's log history.
    """
    rows = [row for row in rows if "loss" in row]
    entropy = _series(rows, "entropy_probe/entropy") or _series(rows, "entropy")
    parts = [_front_matter(base), f"# {folder.resolve().name}", _what(base)]
    parts.append("\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]))
    if entropy:
        write_whole(folder / FIGURE, _figure(rows, entropy))
        parts += ["## Entropy", f"![Entropy over training]({FIGURE})", " ".join(_sentences(rows, entropy))]
    parts += [
        "## Limits",
        "Quality and safety of this model were not evaluated; reward and entropy are those of its training task.",
    ]
    write_whole(folder / "README.md", "\n\n".join(parts) + "\n")


def _front_matter(base: str) -> str:
    data: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if hub := _hub_id(base):
        data["base_model"] = hub
    data["tags"] = ["trl", "dr-grpo", "reinforcement-learning", "generated_from_trainer"]
    return f"---\n{yaml.safe_dump(data, sort_keys=False)}---"


def _hub_id(base: str) -> str | None:
    """The base as hubs know it; None for a local folder or file, whose path means nothing to others."""
    name = _BASES.get(base, base)
    return None if Path(name).expanduser().exists() or name.count("/") != 1 or name.startswith((".", "/")) else name


def _what(base: str) -> str:
    hub = _hub_id(base)
    named = f"[{hub}](https://huggingface.co/{hub})" if hub else f"a local model (`{Path(base).name}`)"
    return f"Fine-tuned from {named} by reinforcement learning with Dr. GRPO, with TRL {version('trl')}."


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of the rows that hold a finite value."""
    return [
        (int(row["step"]), float(row[name]))
        for row in rows
        if isinstance(row.get(name), int | float) and math.isfinite(row[name])
    ]


def _sentences(rows: Sequence[Mapping[str, Any]], entropy: list[tuple[int, float]]) -> list[str]:
    """Entropy at both ends with what is known of their errors, and the probe's sums, where both are over the same steps."""
    probed = bool(_series(rows, "entropy_probe/entropy"))
    names = ("entropy_probe/entropy", "entropy_probe/measured_df") if probed else ("entropy", "entropy_df")
    where = "the probe's sequences" if probed else "the sequences trained on"
    where += ", each the mean over the steps since the log's line before" if _are_means(rows) else ""
    ends = [f"{_at(rows, *names, step)} at step {step}" for step, _ in (entropy[0], entropy[-1])]
    found = [f"Entropy in nats per token was {' and '.join(dict.fromkeys(ends))}, on {where} ({_BRACKETS})."]
    sums = _sums(rows)
    if sums:
        found.append(f"While training, the probe's {sums} nats per token ({_INTERVALS}).")
        if probed and entropy[0] != entropy[-1]:
            found.append(_WHY_APART)
    return found


def _are_means(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the trainer logged only every few steps, whose means its rows then are."""
    steps = [0, *(int(row["step"]) for row in rows)]
    return any(later > earlier + 1 for earlier, later in pairwise(steps))


_BRACKETS = "brackets: 95% intervals"
_WHY_APART = (
    "These sums need not equal the difference of the two entropies: each entropy is that before its step, so that the change of "
    "the last step comes after both, and the probe takes other sequences as training goes on."
)
_INTERVALS = "their intervals: `entropy-experiments analyze` of a checkpoint"


def _at(rows: Sequence[Mapping[str, Any]], name: str, freedom: str, step: int) -> str:
    """A logged value with its 95% interval."""
    row = next(row for row in rows if row["step"] == step and _is_number(row.get(name)))
    value, error, df = row[name], row.get(f"{name}_se"), row.get(freedom)
    if not (_is_number(error) and _is_number(df)):
        return f"{value:.3f} (no interval)"
    low, high = interval(value, error, df)
    return f"{value:.3f} [{low:.2f}, {high:.2f}]".replace("-", "−")


def _sums(rows: Sequence[Mapping[str, Any]]) -> str:
    """Predicted and measured changes added up, over the steps that have both; "" where neither was logged."""
    last = {name: _last(rows, name) for name in ("predicted", "predicted_where_measured", "watched", "measured")}
    predicted, measured = last["predicted"], last["measured"] if last["watched"] is None else last["watched"]
    where = ""
    if last["predicted_where_measured"] is not None:  # logged where it is another number
        steps = next((f"{row[_STEPS]:.0f} " for row in reversed(rows) if _is_number(row.get(_STEPS))), "")
        predicted, where = last["predicted_where_measured"], f", over the {steps}steps that were measured too,"
    known = [("predicted", predicted), ("measured", measured)]
    told = [
        f"{word} changes{where} add up to {value:+.3f}".replace("-", "−") for word, value in known if value is not None
    ]
    return ", its ".join(told)


_STEPS = "entropy_probe/measured_steps"


def _last(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The last sum of that name, nats per token."""
    key = f"entropy_probe/cumulative_{name}"
    return next((row[key] for row in reversed(rows) if _is_number(row.get(key))), None)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _figure(rows: Sequence[Mapping[str, Any]], entropy: list[tuple[int, float]]) -> bytes:
    changes = [
        (label, found)
        for name, label in (("predicted", "predicted"), ("watched", "measured"), ("measured", "measured"))
        if (found := _series(rows, f"entropy_probe/{name}"))
    ]
    figure = Figure(figsize=(7, 4.5 if changes else 2.8), layout="constrained")
    axes = figure.subplots(2 if changes else 1, 1, sharex=True, squeeze=False)[:, 0]
    axes[0].plot(*zip(*entropy, strict=True), marker="o", markersize=3)
    axes[0].set_ylabel("entropy\n(nats per token)")
    axes[0].set_ylim(bottom=0)
    if changes:
        axes[1].axhline(0, color="grey", linewidth=0.8)
        for label, series in changes:
            axes[1].plot(*zip(*series, strict=True), marker="o", markersize=3, label=label)
        axes[1].set_ylabel("change in a step\n(nats per token)")
        axes[1].legend(frameon=False)
    axes[-1].set_xlabel("training step")
    target = BytesIO()
    figure.savefig(target, format="png", dpi=120)
    return target.getvalue()
