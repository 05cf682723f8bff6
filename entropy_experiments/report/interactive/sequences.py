"""The sequences behind the figures, for the page (templates/sequences.js): texts, what is known of each, and of its tokens.

Texts are made legible here (text_display) and set as textContent there. Numbers of tokens travel as float32 in base64, one entry
a completion token: shares of dh (nats per token, adding up to the sequence's), log-probabilities and entropies (nats).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from entropy_experiments.report.interactive.kernels import packed
from entropy_experiments.text.display import PromptFrame, clip, visible
from entropy_experiments.text.numbers import as_number, plain, signed, with_interval

MOST_TOKENS = 300_000
"""Tokens described one by one in a page; the sequences of least share go without beyond it (about 25 bytes a token)."""
_MOST_TOKENS_EACH = 4_000
_TEXT_CHARACTERS = 20_000
_TOKEN_CHARACTERS = 200


def sequence_details(
    evaluation: Sequence[Mapping[str, Any]],
    training: Sequence[Mapping[str, Any]],
    frame: PromptFrame,
) -> dict[str, Any]:
    """{"prompts": distinct texts, "evaluation": [...], "training": [...], "left_out": sequences without tokens for want of room}.

    evaluation, training: rows as ResultsFolder has them. frame: what all prompts share, left out of "own".

    A sequence is {"prompt_index", "prompt": place in prompts, "completion", "facts": [[name, finished text], ...], "tokens":
    {"texts", "shares", "logprobs", "entropies", "foreign"} or None}, the three numbers base64 or None; foreign: places of tokens
    that the policy did not draw.
    """
    prompts: dict[str, int] = {}
    chosen = _within_budget(evaluation, training)
    details: dict[str, Any] = {}
    for name, rows in (("evaluation", evaluation), ("training", training)):
        details[name] = [
            {
                "prompt_index": row["prompt_index"],
                "prompt": prompts.setdefault(row["prompt"], len(prompts)),
                "completion": clip(row["completion"], _TEXT_CHARACTERS),
                "facts": _facts(row, name),
                "tokens": _tokens(row) if (name, row["row"]) in chosen else None,
            }
            for row in rows
        ]
    texts = [
        {"whole": clip(prompt, _TEXT_CHARACTERS, "both"), "own": clip(frame.own_part(prompt), _TEXT_CHARACTERS, "both")}
        for prompt in prompts
    ]
    return {"prompts": texts, **details, "left_out": len(evaluation) + len(training) - len(chosen)}


def _within_budget(
    evaluation: Sequence[Mapping[str, Any]], training: Sequence[Mapping[str, Any]]
) -> set[tuple[str, int]]:
    """(buffer, row) of the sequences whose tokens have room: training by the size of their share, then evaluation."""
    ranked = sorted(training, key=lambda row: (-abs(as_number(row.get("delta_h")) or 0.0), row["row"]))
    room, chosen = MOST_TOKENS, set()
    for name, rows in (("training", ranked), ("evaluation", evaluation)):
        for row in rows:
            room -= min(int(as_number(row.get("length")) or 0), _MOST_TOKENS_EACH)
            if room >= 0:
                chosen.add((name, row["row"]))
    return chosen


def _facts(row: Mapping[str, Any], buffer: str) -> list[list[str]]:
    length, entropy = as_number(row.get("length")), as_number(row.get("entropy_sum"))
    facts = [["reward", plain(row.get("reward"))]]
    if buffer == "training":
        facts += [
            ["advantage", signed(row.get("advantage"))],
            ["weight w", signed(row.get("weight"))],
            ["accounting share of Δh", _with_unit(row.get("delta_h"), row.get("delta_h_low"), row.get("delta_h_high"))],
            [
                "effect of leaving out",
                _with_unit(row.get("effect_of_leaving_out"), row.get("effect_low"), row.get("effect_high")),
            ],
        ]
    else:
        facts.append(["its term of the predicted change", _with_unit(row.get("delta_h_lost"))])
    ending = (
        ", cut" if row.get("truncated") is True else ", ended by the environment" * (row.get("ending") == "environment")
    )
    facts.append(["length", f"{plain(length)} tokens{ending}"])
    if length and entropy is not None:
        facts.append(["mean token entropy", f"{plain(entropy / length)} nats"])
    if as_number(row.get("score")) is not None:
        facts.append(["log-probability", f"{signed(row.get('score'))} nats"])
    return facts


def _with_unit(share: object, low: object = None, high: object = None) -> str:
    if as_number(share) is None:
        return signed(share)
    known = as_number(low) is not None and as_number(high) is not None
    return f"{with_interval(share, low, high) if known else signed(share)} nats per token"


def _tokens(row: Mapping[str, Any]) -> dict[str, Any] | None:
    texts, shares = row["token_texts"], row["token_shares"]
    if not texts or len(texts) > _MOST_TOKENS_EACH:
        return None
    columns = {"shares": shares, "logprobs": row.get("logprobs"), "entropies": row.get("entropies")}
    shown = {name: _column(values, len(texts)) for name, values in columns.items()}
    drawn = row.get("completion_mask") or [True] * len(texts)
    foreign = [place for place, own in enumerate(drawn) if not own]
    return {"texts": [_token_text(text) for text in texts], **shown, "foreign": foreign}


def _column(values: object, count: int) -> str | None:
    if not isinstance(values, list) or len(values) != count:
        return None
    known = [as_number(value) for value in values]
    return packed(np.array([np.nan if value is None else value for value in known]))


def _token_text(text: object) -> str:
    words = str(text)
    return visible(words) if len(words) <= _TOKEN_CHARACTERS else clip(words, _TOKEN_CHARACTERS)
