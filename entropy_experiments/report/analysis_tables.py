"""A compact table for each analysis, from its dict in summary.json: finished text, ready to print and to escape.

Whatever a folder lacks is "not known" or leaves its row out; nothing here raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entropy_experiments.text.display import one_line, prompt_frame
from entropy_experiments.text.numbers import as_number, lookup, plain, plus_minus, signed, value_and_error

_PROMPTS_SHOWN = 5
_QUANTITIES = {
    "length": "Completion length, tokens",
    "entropy": "Token entropy, nats per token",
    "reward": "Reward",
    "truncated": "Share cut at the maximum length",
}


@dataclass(frozen=True)
class Table:
    """columns: (heading, whether it holds numbers). rows: cells, as many as columns."""

    caption: str
    columns: tuple[tuple[str, bool], ...]
    rows: list[list[str]]


def _table(caption: str, headings: Sequence[str], rows: list[list[str]]) -> list[Table]:
    """One table whose first column holds words and the others numbers; none without rows."""
    if not rows:
        return []
    return [Table(caption, tuple((heading, place > 0) for place, heading in enumerate(headings)), rows)]


def _dicts(tree: object, *path: str) -> list[Mapping[str, Any]]:
    found = lookup(tree, *path) if path else tree
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []


def _estimate(tree: object, *path: str) -> str:
    return plus_minus(*value_and_error(lookup(tree, *path)))


def _percent(value: object) -> str:
    number = as_number(value)
    return plain(None) if number is None else f"{number:.0%}"


def _p(value: object) -> str:
    return plain(value, 2)


def _buffers(result: Mapping[str, Any]) -> list[Table]:
    rows = []
    for name, heading in _QUANTITIES.items():
        q = lookup(result, "quantities", name)
        means = [
            plus_minus(as_number(lookup(q, side, "mean")), as_number(lookup(q, side, "standard_error")), plus=False)
            for side in ("evaluation", "training")
        ]
        if lookup(q, "training", "mean") is None and lookup(q, "evaluation", "mean") is None:
            continue
        verdict = "differ" if lookup(q, "differs") else lookup(q, "reason") or "may be chance"
        larger = _percent(lookup(q, "probability_larger", "value"))
        difference = signed(lookup(q, "standardised_difference"), 2)
        rows.append([heading, *means, difference, larger, _p(lookup(q, "p_value")), str(verdict)])
    headings = (
        "", "Evaluation, mean", "Training, mean", "Difference in standard deviations", "Training larger in … of pairs", "p", "",
    )  # fmt: skip
    return _table("Means with standard errors over prompts; p: Mann–Whitney, prompts as units.", headings, rows)


def _entropy_prediction(result: Mapping[str, Any]) -> list[Table]:
    rows = []
    for row in _dicts(result, "rows"):
        ratio = next(
            (
                c.get("ratio")
                for c in _dicts(row, "comparisons")
                if (c.get("estimator"), c.get("measure")) in _SAME_SAMPLE
            ),
            None,
        )
        estimator = "rao_blackwell" if lookup(row, "predicted", "rao_blackwell") else "fixed_prefix"
        measure = "snis" if lookup(row, "measured", "snis") else "fixed_prefix"
        fresh = lookup(row, "measured", "fresh")
        rows.append(
            [
                plain(row.get("scale")),
                _estimate(row, "predicted", estimator),
                _estimate(row, "measured", measure),
                "–" if fresh is None else plus_minus(*value_and_error(fresh)),
                plain(ratio),
                plain(lookup(row, "measured", measure, "effective_sample_size")),
            ]
        )
    headings = (
        "Scale of the step", "Predicted (first order)", "Measured on the same tokens", "Measured on fresh samples",
        "Measured / its own derivative", "Effective sample",
    )  # fmt: skip
    return _table("Change of entropy along the step, nats per token.", headings, rows)


_SAME_SAMPLE = {("split", "snis"), ("fixed_prefix", "fixed_prefix")}


def _higher_order(result: Mapping[str, Any]) -> list[Table]:
    second, equal = lookup(result, "second_order"), lookup(result, "equal_at")
    if lookup(second, "value") is None:
        return []
    between = f"{plain(lookup(equal, 'low'), 2)} to {plain(lookup(equal, 'high'), 2) if lookup(equal, 'high') else '∞'}"
    rows = [
        ["First order D", _estimate(result, "first_order"), "by the split estimator; fitted to the curve: "
         + signed(lookup(result, "first_order", "fitted"))],
        ["Second order Q = ½ δθᵀ∇²h δθ", plus_minus(as_number(lookup(second, "value")), as_number(lookup(second, "total_error"))),
         f"ratio to the first: {signed(lookup(result, 'ratio'))}"],
        ["Third and fourth order", f"{signed(lookup(result, 'third'))}, {signed(lookup(result, 'fourth'))}", "fitted beside"],
        ["s*, where |Q| s² = |D| s", plain(lookup(equal, "value")), f"times the step; {between}"],
    ]  # fmt: skip
    columns = (("", False), ("Value", True), ("", False))
    return [Table("Orders of the change along the step at s = 1, nats per token.", columns, rows)]


def _attribution(result: Mapping[str, Any]) -> list[Table]:
    sides = {"all": "All", "lowering": "Lowering entropy", "raising": "Raising entropy"}
    rows = []
    for name, label in sides.items():
        c = lookup(result, "concentration", name)
        if c is not None:
            rows.append(
                [
                    label,
                    plain(lookup(c, "count")),
                    _thousandths(lookup(c, "sum")),
                    _percent(lookup(c, "top_mass")),
                    plain(lookup(c, "half_mass_count")),
                    plain(lookup(c, "gini"), 2),
                    plain(lookup(c, "effective_number")),
                ]
            )
    top = plain(lookup(result, "concentration", "all", "top"))
    headings = (
        "Training sequences", "Number", "Sum of accounting shares (×10⁻³ nats/token)", f"Mass of the top {top}",
        "Hold half the mass", "Gini", "Effective number",
    )  # fmt: skip
    found = _table("How far a few sequences make up the step's change.", headings, rows)
    groups = [
        [
            f"{row.get('side')}: {row.get('group')}" + " advantage" * (row.get("by") == "advantage"),
            plain(row.get("sequences")),
            _thousandths(row.get("value")),
            plain(row.get("entropy")),
        ]
        for row in _dicts(result, "groups")
    ]
    if groups:
        words = (
            "Sequences",
            "Number",
            "Sum of accounting shares, or of contributions (×10⁻³ nats/token)",
            "Entropy (nats/token)",
        )
        found += _table("By how completions ended, and by the sign of the advantage.", words, groups)
    prompts = _dicts(result, "evaluation", "prompts")
    frame = prompt_frame([str(row.get("prompt")) for row in prompts])
    losing = [
        [
            str(row.get("prompt_index")),
            one_line(frame.own_part(str(row.get("prompt"))), 160, "both"),
            _thousandths(row.get("contribution")),
        ]
        for row in prompts[:_PROMPTS_SHOWN]
    ]
    columns = (("Evaluation prompt", False), ("Prompt text", False), ("Contribution (×10⁻³ nats/token)", True))
    if losing:
        found.append(Table("The reverse view: evaluation prompts that lose most entropy.", columns, losing))
    return found


def _intervention(result: Mapping[str, Any]) -> list[Table]:
    names = {
        "split": "Accounting shares, split estimator (derivative of the measurement)",
        "fixed_prefix": "Accounting shares, fixed prefix (derivative of the measurement)",
        "rao_blackwell": "Accounting shares, Rao–Blackwell (those of the report)",
        "response": "Mean effects over halves (P and clipping answer)",
    }
    scores = lookup(result, "scores")
    rows = []
    for name, score in scores.items() if isinstance(scores, Mapping) else ():
        interval = lookup(score, "interval")
        known = isinstance(interval, list) and len(interval) == 2
        between = f" [{plain(interval[0], 2)}, {plain(interval[1], 2)}]" if known else ""
        spearman = (
            f"{plain(lookup(score, 'spearman'), 3)}{between}" if known else str(lookup(score, "reason") or "not known")
        )
        line = [_with_ends(score, "slope", plain), _with_ends(score, "intercept", signed)]
        error = plain(lookup(score, "root_mean_square_error"))
        rows.append([names.get(name, name), spearman, plain(lookup(score, "pearson")), *line, error])
    headings = (
        "Prediction", "Linear datamodelling score [95%]", "Pearson", "Slope [95%]", "Intercept [95%], nats per token",
        "Error, nats per token",
    )  # fmt: skip
    found = _table("Predicted against measured change over random halves of the training buffer.", headings, rows)
    removed = []
    for kind, label in (("costing", "said to cost most"), ("giving", "said to give most")):
        removal = lookup(result, "removals", kind)
        sequences = lookup(removal, "sequences")
        if not isinstance(sequences, list):
            continue
        predicted = lookup(removal, "predicted_difference", str(lookup(result, "headline")))
        removed.append(
            [
                f"Without the {len(sequences)} {label}",
                *(_thousandths(v) for v in (predicted, lookup(removal, "difference"))),
            ]
        )
    random = lookup(result, "removals", "random")
    if random is not None:
        label = f"Without {plain(lookup(random, 'sequences'))} at random: standard deviation"
        removed.append([label, "–", _thousandths(lookup(random, "spread")).lstrip("+")])
    headings = ("Real step", "Predicted difference (×10⁻³)", "Measured difference (×10⁻³)")
    return found + _table("Against the step with all sequences, nats per token.", headings, removed)


def _with_ends(score: object, name: str, form: Callable[[object, int], str]) -> str:
    """A number with its 95% interval, where it has one."""
    ends, text = lookup(score, f"{name}_interval"), form(lookup(score, name), 2)
    known = isinstance(ends, list) and len(ends) == 2
    return f"{text} [{form(ends[0], 2)}, {form(ends[1], 2)}]" if known else text


def _prompt_structure(result: Mapping[str, Any]) -> list[Table]:
    rows = []
    for label, tree, left, right in (
        ("Same prompt against other prompts, cosine", lookup(result, "train", "cosine"), "same_prompt", "cross_prompt"),
        ("Same prompt against other prompts, raw K₁", lookup(result, "train", "raw"), "same_prompt", "cross_prompt"),
        ("The same between the two buffers, raw K₁", lookup(result, "evaluation", "raw"), "same_prompt", "cross_prompt"),
        ("Within prompts: two correct against mixed, cosine", lookup(result, "within_group", "cosine"), "correct_correct",
         "correct_wrong"),
        ("Within prompts: two wrong against mixed, cosine", lookup(result, "within_group", "cosine"), "wrong_wrong",
         "correct_wrong"),
        ("Within prompts: two correct against mixed, raw K₁", lookup(result, "within_group", "raw"), "correct_correct",
         "correct_wrong"),
        ("Within prompts: two wrong against mixed, raw K₁", lookup(result, "within_group", "raw"), "wrong_wrong",
         "correct_wrong"),
    ):  # fmt: skip
        p, reason = lookup(tree, "test", "p_value"), lookup(tree, "test", "reason")
        means = [plain(lookup(tree, side, "mean")) for side in (left, right)]
        rows.append([label, *means, plain(lookup(tree, left, "pairs")), str(reason) if reason else _p(p)])
    headings = ("Pairs", "Mean of these", "Mean of the others", "Number of these", "p (permutation)")
    note = "Mean kernel values over pairs of sequences; two rows within prompts share one test."
    counts = lookup(result, "duplicates")
    if counts and counts["equal_pairs"]:
        note += (
            f" {counts['distinct']} of {counts['sequences']} training sequences are distinct: {counts['equal_pairs']} pairs of "
            "equal ones are left out."
        )
    found = _table(note, headings, rows)
    single = lookup(result, "single_batch")
    parts = [
        ["Same sequence on both sides", _thousandths(lookup(single, "self", "value"))],
        ["Other sequences of the same prompt", _thousandths(lookup(single, "same_prompt", "value"))],
        ["Other prompts", _thousandths(lookup(single, "cross_prompt", "value"))],
        ["All: the training buffer in both roles", _thousandths(lookup(single, "value"))],
        ["U-statistic over its prompts", _thousandths_with_error(lookup(single, "u_statistic"))],
        ["Its bias: all minus U-statistic", _thousandths_with_error(lookup(single, "bias"))],
        ["By the evaluation buffer", _thousandths(lookup(single, "evaluation_value"))],
    ]
    headings = ("What the training buffer alone would predict", "δh of the batch part (×10⁻³ nats/token)")
    return found + _table("Where a single batch's prediction comes from.", headings, parts if single else [])


def _sequence_clustering(result: Mapping[str, Any]) -> list[Table]:
    rows = [
        [
            plain(row.get("cluster")),
            plain(row.get("size")),
            f"{plain(row.get('main_prompt'))} ({_percent(row.get('main_prompt_share'))})",
            plain(row.get("mean_length")),
            _percent(row.get("correct_share")),
            plain(row.get("mean_cosine"), 2),
            plain(row.get("medoid")),
            ", ".join(f"{one_line(str(w), 24)} ({n})" for w, n in row.get("first_words") or []),
        ]
        for row in _dicts(result, "clusters")
    ]
    headings = (
        "Cluster", "Sequences", "Commonest prompt (share)", "Mean length", "Correct", "Mean cosine", "Most typical sequence",
        "First words",
    )  # fmt: skip
    found = _table("The clusters, along the tree's order.", headings, rows)
    shared = lookup(result, "shared")
    labels = {"prompt": "Prompt", "length": "Length", "correctness": "Correctness", "first_word": "First word"}
    rows = []
    for name, label in labels.items() if isinstance(shared, Mapping) else ():
        entry = lookup(shared, name)
        p = [_p(lookup(entry, key)) for key in ("p_value", "p_within_prompt", "p_holm")]
        rows.append([label, str(lookup(entry, "measure")), plain(lookup(entry, "value"), 2), *p])
    headings = ("What members share", "Measure", "Value", "p", "p within prompts", "p, corrected for four")
    return found + _table("How far the clusters go along with what is known of the sequences.", headings, rows)


def _weighting_schemes(result: Mapping[str, Any]) -> list[Table]:
    rows = []
    for row in _dicts(result, "rows"):
        label = str(row.get("label", row.get("name")))
        if "delta_h" not in row:
            rows.append([label, f"no weights: {row.get('reason', 'not known')}", *[""] * 5])
            continue
        rows.append(
            [
                label,
                _thousandths_with_error(lookup(row, "delta_h", "raw")),
                _thousandths_with_error(lookup(row, "delta_h", "equal_length")),
                _thousandths_with_error(lookup(row, "actual", "equal_length")),
                _thousandths_with_error(lookup(row, "delta_h", "equal_gain")),
                _estimate(row, "reward_gain"),
                _estimate(row, "entropy_cost_per_reward")
                if lookup(row, "entropy_cost_per_reward", "value") is not None
                else "–",
            ]
        )
    headings = (
        "Weights", "δh as it is", "δh at equal length", "the same, measured", "δh at equal gain", "Gain of mean reward",
        "Cost: nats per token for one unit of reward",
    )  # fmt: skip
    return _table("Batch part of the change, ×10⁻³ nats per token.", headings, rows)


def _baselines(result: Mapping[str, Any]) -> list[Table]:
    rows = []
    for row in _dicts(result, "rows"):
        comparable = row.get("comparable_in_scale") is True
        sign = {True: "yes", False: "no"}.get(row.get("sign_agrees"), "–")  # type: ignore[arg-type]
        rows.append(
            [
                str(row.get("label")),
                plus_minus(row.get("predicted"), row.get("standard_error"))
                if comparable
                else signed(row.get("predicted")),
                plus_minus(row.get("actual"), row.get("actual_standard_error")),
                plain(row.get("ratio")) if comparable else "–",
                "–" if as_number(row.get("z")) is None else f"{row['z']:.1f}",
                sign,
                str(row.get("reason") or ""),
            ]
        )
    headings = ("Predictor", "Predicted", "Measured", "Measured / predicted", "z", "Same sign", "")
    return _table(
        "Predictors of the step's change, nats per token; those on another scale by their sign alone.", headings, rows
    )


def _thousandths(value: object) -> str:
    number = as_number(value)
    return signed(None if number is None else 1e3 * number)


def _thousandths_with_error(entry: object) -> str:
    value, error = value_and_error(entry)
    if value is None:
        return "–"
    return signed(1e3 * value) if error is None else plus_minus(1e3 * value, 1e3 * error)


TABLES: dict[str, Callable[[Mapping[str, Any]], list[Table]]] = {
    "buffers": _buffers,
    "entropy_prediction": _entropy_prediction,
    "higher_order": _higher_order,
    "attribution": _attribution,
    "intervention": _intervention,
    "prompt_structure": _prompt_structure,
    "sequence_clustering": _sequence_clustering,
    "weighting_schemes": _weighting_schemes,
    "baselines": _baselines,
}
