"""A compact table for each analysis, from its record: finished text, ready to print and to escape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from entropy_experiments.records.attribution_results import AttributionResult
from entropy_experiments.records.clustering_results import ClusteringResult
from entropy_experiments.records.kernel_results import (
    BuffersResult,
    CorrectnessPairs,
    PairBlock,
    PermutationTest,
    PromptStructureResult,
    Quantity,
)
from entropy_experiments.records.step_results import (
    BaselinesResult,
    EntropyPredictionResult,
    HigherOrderResult,
    InterventionResult,
    ShareScore,
)
from entropy_experiments.report.cells import (
    estimate_cell,
    note_cell,
    table_of,
    thousandths,
    thousandths_with_error,
)
from entropy_experiments.report.content import Table
from entropy_experiments.report.price_tables import price_tables, weighting_tables
from entropy_experiments.statistics.confidence import UNTRUSTED, measured_cell
from entropy_experiments.text.display import one_line, prompt_frame
from entropy_experiments.text.numbers import plain, plus_minus, signed

_PROMPTS_SHOWN = 5
_QUANTITIES: dict[Quantity, str] = {
    "length": "Completion length, tokens",
    "entropy": "Mean token entropy of a completion, nats per token",
    "reward": "Reward",
    "truncated": "Share cut at the maximum length",
}


def _percent(value: float | None) -> str:
    return plain(None) if value is None else f"{value:.0%}"


def _p(value: float | None) -> str:
    return plain(value, 2)


def _buffers(result: BuffersResult) -> list[Table]:
    rows = []
    for name, heading in _QUANTITIES.items():
        quantity = result.quantities[name]
        if quantity.training.mean is None and quantity.evaluation.mean is None:
            continue
        means = [
            plus_minus(side.mean, side.standard_error, plus=False) for side in (quantity.evaluation, quantity.training)
        ]
        verdict = "differ" if quantity.differs else quantity.reason or "may be chance"
        larger = _percent(quantity.probability_larger.value)
        rows.append(
            [
                heading,
                *means,
                signed(quantity.standardised_difference, 2),
                larger,
                _p(quantity.p_value),
                note_cell(verdict),
            ]
        )
    headings = (
        "", "Evaluation, mean", "Training, mean", "Difference in standard deviations", "Training larger in … of pairs", "p", "",
    )  # fmt: skip
    return table_of("Means with standard errors over prompts; p: Mann–Whitney, prompts as units.", headings, rows)


def _entropy_prediction(result: EntropyPredictionResult) -> list[Table]:
    same_sample = {("split", "snis"), ("fixed_prefix", "fixed_prefix")}
    rows = []
    for row in result.rows:
        ratio = next((c.ratio for c in row.comparisons if (c.estimator, c.measure) in same_sample), None)
        predicted = row.predicted.get("rao_blackwell") or row.predicted.get("fixed_prefix")
        measured = row.measured.get("snis") or row.measured.get("fixed_prefix")
        rows.append(
            [
                plain(row.scale),
                estimate_cell(predicted),
                estimate_cell(measured),
                estimate_cell(row.measured.get("fresh")),
                plain(ratio),
                plain(None if measured is None else measured.effective_sample_size),
            ]
        )
    headings = (
        "Scale of the step", "Predicted (first order)", "Measured on the same tokens", "Measured on fresh samples",
        "Measured / its own derivative", "Effective sample",
    )  # fmt: skip
    return table_of("Change of entropy along the step, nats per token.", headings, rows)


def _higher_order(result: HigherOrderResult) -> list[Table]:
    second, equal = result.second_order, result.equal_at
    if second.value is None:
        return []
    between = f"{plain(equal.low, 2)} to {plain(equal.high, 2) if equal.high else '∞'}"
    rows = [
        ["First order D", estimate_cell(result.first_order),
         f"by the split estimator; fitted to the curve: {signed(result.first_order.fitted)}"],
        ["Second order Q = ½ δθᵀ∇²h δθ", plus_minus(second.value, second.total_error),
         f"ratio to the first: {signed(result.ratio)}"],
        ["Third and fourth order", f"{signed(result.third)}, {signed(result.fourth)}", "fitted beside"],
        ["s*, where |Q| s² = |D| s", plain(equal.value), f"times the step; {between}"],
    ]  # fmt: skip
    columns = (("", False), ("Value", True), ("", False))
    return [Table("Orders of the change along the step at s = 1, nats per token.", columns, rows)]


def _attribution(result: AttributionResult) -> list[Table]:
    shares = result.concentration
    sides = {"All": shares.all, "Lowering entropy": shares.lowering, "Raising entropy": shares.raising}
    rows = [
        [
            label,
            plain(c.count),
            thousandths(c.sum),
            _percent(c.top_mass),
            plain(c.half_mass_count),
            plain(c.gini, 2),
            plain(c.effective_number),
        ]
        for label, c in sides.items()
    ]
    headings = (
        "Training sequences", "Number", "Sum of accounting shares (×10⁻³ nats/token)", f"Mass of the top {shares.all.top}",
        "Number that hold half the mass", "Gini coefficient", "Effective number",
    )  # fmt: skip
    note = (
        "How far a few sequences make up the step's change. Mass: the sum of absolute shares. Gini coefficient: 0 where all "
        "shares are equally large. Effective number: the square of the mass over the sum of squared shares."
    )
    found = table_of(note, headings, rows)
    groups = [
        [
            f"{row.side}: {row.group}" + " advantage" * (row.by == "advantage"),
            plain(row.sequences),
            thousandths(row.value),
            plain(row.entropy),
        ]
        for row in result.groups
    ]
    words = (
        "Sequences", "Number", "Sum of accounting shares, or of contributions (×10⁻³ nats/token)", "Entropy (nats/token)",
    )  # fmt: skip
    found += table_of("By how completions ended, and by the sign of the advantage.", words, groups)
    prompts = [] if result.evaluation is None else result.evaluation.prompts
    frame = prompt_frame([row.prompt for row in prompts])
    losing = [
        [str(row.prompt_index), one_line(frame.own_part(row.prompt), 160, "both"), thousandths(row.contribution)]
        for row in prompts[:_PROMPTS_SHOWN]
    ]
    columns = (("Evaluation prompt", False), ("Prompt text", False), ("Contribution (×10⁻³ nats/token)", True))
    if losing:
        found.append(Table("The reverse view: evaluation prompts that lose most entropy.", columns, losing))
    return found


def _intervention(result: InterventionResult) -> list[Table]:
    names = {
        "split": "Accounting shares, split estimator (derivative of the measurement)",
        "fixed_prefix": "Accounting shares, fixed prefix (derivative of the measurement)",
        "rao_blackwell": "Accounting shares, Rao–Blackwell (those of the report)",
        "response": "Mean effects over halves (P and clipping answer)",
    }
    rows = [
        [
            names.get(name, name),
            with_ends(score.spearman, score.interval, plain, 3) if score.interval else score.reason or "not known",
            plain(score.pearson),
            *_line_of(score),
            plain(score.root_mean_square_error),
        ]
        for name, score in result.scores.items()
    ]
    headings = (
        "Prediction", "Linear datamodelling score [95%]", "Pearson", "Slope [95%]", "Intercept [95%], nats per token",
        "Error, nats per token",
    )  # fmt: skip
    found = table_of("Predicted against measured change over random halves of the training buffer.", headings, rows)
    removed = [
        [
            f"Without the {len(removal.sequences)} {label}",
            thousandths(removal.predicted_difference.get(result.headline)),
            thousandths(removal.difference),
        ]
        for removal, label in (
            (result.removals.lowering, "said to lower entropy most"),
            (result.removals.raising, "said to raise entropy most"),
        )
        if removal is not None
    ]
    random = result.removals.random
    if random is not None:
        label = f"Without {random.sequences} at random: standard deviation"
        removed.append([label, "–", thousandths(random.spread).lstrip("+")])
    headings = ("Real step", "Predicted difference (×10⁻³)", "Measured difference (×10⁻³)")
    return found + table_of("Against the step with all sequences, nats per token.", headings, removed)


def _line_of(score: ShareScore) -> list[str]:
    return [
        with_ends(score.slope, score.slope_interval, plain),
        with_ends(score.intercept, score.intercept_interval, signed),
    ]


def with_ends(
    value: float | None, ends: tuple[float, float] | None, form: Callable[[object, int], str], digits: int = 2
) -> str:
    """A number with its 95% interval, where it has one: ``0.98 [0.95, 0.99]``."""
    text = form(value, digits)
    return text if ends is None else f"{text} [{form(ends[0], 2)}, {form(ends[1], 2)}]"


def _prompt_structure(result: PromptStructureResult) -> list[Table]:
    train, buffers, groups = result.train, result.evaluation.raw, result.within_group

    def correctness(pairs: CorrectnessPairs, name: str) -> list[tuple[str, PairBlock, PairBlock, PermutationTest]]:
        return [
            (
                f"Within prompts: two correct against mixed, {name}",
                pairs.correct_correct,
                pairs.correct_wrong,
                pairs.test,
            ),
            (f"Within prompts: two wrong against mixed, {name}", pairs.wrong_wrong, pairs.correct_wrong, pairs.test),
        ]

    compared = [
        ("Same prompt against other prompts, cosine", train.cosine.same_prompt, train.cosine.cross_prompt, train.cosine.test),
        ("Same prompt against other prompts, raw K₁", train.raw.same_prompt, train.raw.cross_prompt, train.raw.test),
        ("The same between the two buffers, raw K₁", buffers.same_prompt, buffers.cross_prompt, buffers.test),
        *correctness(groups.cosine, "cosine"),
        *correctness(groups.raw, "raw K₁"),
    ]  # fmt: skip
    rows = [
        [label, plain(these.mean), plain(others.mean), plain(these.pairs), test.reason or _p(test.p_value)]
        for label, these, others, test in compared
    ]
    headings = ("Pairs", "Mean of these", "Mean of the others", "Number of these", "p (permutation)")
    note = "Mean kernel values over pairs of sequences; two rows within prompts share one test."
    counts = result.duplicates
    if counts.equal_pairs:
        note += (
            f" {counts.distinct} of {counts.sequences} training sequences are distinct: pairs of equal ones, "
            f"{counts.equal_pairs} in number, are left out."
        )
    found = table_of(note, headings, rows)
    single = result.single_batch
    parts = [
        ["Same sequence on both sides", thousandths(single.self.value)],
        ["Other sequences of the same prompt", thousandths(single.same_prompt.value)],
        ["Other prompts", thousandths(single.cross_prompt.value)],
        ["All: the training buffer in both roles", thousandths(single.value)],
        ["U-statistic over its prompts", thousandths_with_error(single.u_statistic)],
        ["Its bias: all minus U-statistic", thousandths_with_error(single.bias)],
        ["By the evaluation buffer", thousandths(single.evaluation_value)],
    ]
    headings = ("What the training buffer alone would predict", "δh of the batch part (×10⁻³ nats/token)")
    note = (
        "Where a single batch's prediction comes from; every row with the kernel's P, which need not be the step's own."
    )
    return found + table_of(note, headings, parts)


def _sequence_clustering(result: ClusteringResult) -> list[Table]:
    rows = [
        [
            plain(row.cluster),
            plain(row.size),
            f"{plain(row.main_prompt)} ({_percent(row.main_prompt_share)})",
            plain(row.mean_length),
            _percent(row.correct_share),
            plain(row.mean_cosine, 2),
            plain(row.medoid),
            ", ".join(f"{one_line(word, 24)} ({count})" for word, count in row.first_words),
        ]
        for row in result.clusters
    ]
    headings = (
        "Cluster", "Sequences", "Commonest prompt (share)", "Mean length", "Correct", "Mean cosine", "Most typical sequence",
        "First words",
    )  # fmt: skip
    found = table_of("The clusters, along the tree's order.", headings, rows)
    labels = {"prompt": "Prompt", "length": "Length", "correctness": "Correctness", "first_word": "First word"}
    rows = [
        [labels[name], entry.measure, plain(entry.value, 2), *map(_p, (entry.p_value, entry.p_within_prompt, entry.p_holm))]
        for name, entry in (result.shared or {}).items()
    ]  # fmt: skip
    headings = ("What members share", "Measure", "Value", "p", "p within prompts", "p, corrected for four")
    return found + table_of("How far the clusters go along with what is known of the sequences.", headings, rows)


def _baselines(result: BaselinesResult) -> list[Table]:
    signs = {True: "yes", False: "no", None: "–"}
    doubted = {row.actual for row in result.rows if row.reason == UNTRUSTED}  # of rows without a predictor as well
    rows = [
        [
            row.label,
            plus_minus(row.predicted, row.standard_error) if row.comparable_in_scale else signed(row.predicted),
            measured_cell(row.actual, row.actual_standard_error, row.actual not in doubted),
            plain(row.ratio) if row.comparable_in_scale else "–",
            "–" if row.z is None else f"{row.z:.1f}",
            signs[row.sign_agrees],
            note_cell(row.reason),
        ]
        for row in result.rows
    ]
    headings = ("Predictor", "Predicted", "Measured", "Measured / predicted", "z", "Same sign", "")
    return table_of(
        "Predictors of the step's change, nats per token; those on another scale by their sign alone.", headings, rows
    )


TABLES: dict[str, Callable[[Any], list[Table]]] = {
    "buffers": _buffers,
    "entropy_prediction": _entropy_prediction,
    "higher_order": _higher_order,
    "attribution": _attribution,
    "intervention": _intervention,
    "prompt_structure": _prompt_structure,
    "sequence_clustering": _sequence_clustering,
    "weighting_schemes": weighting_tables,
    "prices": price_tables,
    "baselines": _baselines,
}
