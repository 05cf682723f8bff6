"""Which check of the calibration stands for which error, interval, p-value or decision that the packages make.

A test (tests/test_calibrated_kinds.py) lists every function that makes one from the code, and asks for a line here; and for every
check that is named here to be in benchmarks/results/calibration. What carries or draws a number that another function made names
that function's check.
"""

from __future__ import annotations

PREDICTED, ENTROPY, MEASURED = "coverage of predicted", "coverage of entropy", "coverage of measured"
GIVEN, RULE = "coverage of measured on given tokens", "level of the agreement rule"
SUM = "coverage of a sum over 4 checkpoints, predicted, the same prompts"
SUM_APART = "coverage of a sum over 4 checkpoints, predicted, prompts of their own"
PAIRED = "coverage of a difference of two results, predicted, the same prompts"
APART = "coverage of a difference of two results, predicted, prompts of their own"
PROBED, FOLDS = "coverage of a sum of 12 probed steps with a running average", "coverage of 4 folds"
CORRELATION, NOISE = "coverage of a correlation, normal pairs", "coverage of the 95% interval"
ORDERS, EQUAL = "coverage of the second order", "coverage of where both orders are equal"
WEIGHTING, COURSE = "coverage of a weighting's change at equal length", "coverage of a change over training"
STRUCTURE, ALIGNMENT = "level of same prompt, raw", "level of kernel alignment"
BUFFERS, PARTS = "level of buffers, entropy", "level of naming the largest of two equal parts"
SHARE = "coverage of an accounting share"
U_STATISTIC = "coverage of the U-statistic of a single batch"

COVERED: dict[str, tuple[str, ...]] = {
    "fold_gradients.predict": (FOLDS,),
    "measurement._measure": (MEASURED, GIVEN),
    "token_ratios._with_error": (MEASURED,),
    "uncertainty.jackknife_over_prompts": ("coverage of what leaving out the costliest spares",),
    "adapters.higher_order": (PREDICTED,),
    "adapters.weighting_schemes": (RULE,),
    "baselines._known": (PREDICTED, MEASURED),
    "baselines._row": (RULE, MEASURED),
    "buffers._compare": (BUFFERS, "level of buffers, any of the quantities (Holm)"),
    "cluster_contents._association": ("level of what clusters share, lengths",),
    "clustering.choose_number": ("level of clusters, one cloud",),
    "entropy_prediction._comparison": (RULE, PREDICTED),
    "entropy_prediction._ends": (PREDICTED, MEASURED),
    "higher_order._orders": (EQUAL, ORDERS),
    "higher_order._ends": (ORDERS, "coverage of the first order of the curve"),
    "intervention._bootstrap_interval": ("coverage of the score over halves (LDS)",),
    "intervention._line": ("coverage of the slope of the response over halves",),
    "ledger._estimate": (SUM, SHARE),
    "ledger.run_ledger": (RULE,),
    "model_card._at": (ENTROPY,),
    "prices._estimate": (
        WEIGHTING,
        "coverage of a weighting's gain of reward",
        "coverage of a weighting's cost in entropy",
        "coverage of a weighting minus the run's, equal gain",
    ),
    "prompt_structure.permutation_test": (STRUCTURE, "level of correctness, raw"),
    "prompt_structure.single_batch_estimate": (U_STATISTIC,),
    "weighting_results.known": (WEIGHTING,),
    "weighting_schemes._estimates": (
        WEIGHTING,
        "coverage of a weighting's gain of reward",
        "coverage of a weighting's cost in entropy",
        "coverage of a weighting minus the run's, equal gain",
    ),
    "weighting_schemes._jackknife": (WEIGHTING,),
    "weighting_schemes._spared": ("coverage of what leaving out the costliest spares",),
    "differences._number": (ENTROPY,),
    "differences._difference": (APART, "level of a difference of two results, entropy, the same prompts"),
    "estimate_entries.interval_estimate": (ENTROPY, PAIRED, "coverage of the price of reward in entropy"),
    "estimate_entries.stored_estimate": (PREDICTED, ENTROPY),
    "estimate_entries.stored_measurement": (MEASURED,),
    "estimate_entries.ratio_estimate": (ENTROPY, "coverage of entropy per completion"),
    "estimates.known": (WEIGHTING,),
    "history.probed_sums": (PROBED, CORRELATION),
    "history._difference": (PROBED, RULE),
    "step_errors.over_prompts": (PREDICTED,),
    "left_out_evaluation_prompts.interval_columns": (SHARE, "coverage of the effect of leaving a sequence out"),
    "who_was_first._first": (SHARE, "the set named first holds the first"),
    "first_over_run.first_over_run": (SUM, "one that is named first is the first"),
    "leave_one_out.agreements": (RULE,),
    "leave_one_out.largest_parts": (PARTS,),
    "training_course._one": (COURSE,),
    "training_course.course": (COURSE,),
    "summarize._parts": (PREDICTED,),
    "summarize._scaled": (PREDICTED,),
    "summarize._entropy": (ENTROPY,),
    "summarize._actual": (MEASURED,),
    "lines.history_line": (FOLDS,),
    "higher_order.plot_higher_order": (MEASURED,),
    "evolution._shared": (CORRELATION,),
    "step.step_scaling": (PREDICTED, MEASURED),
    "structure._draw_single_batch": (U_STATISTIC,),
    "agreement._agreement": (RULE,),
    "agreement.compare": (RULE,),
    "agreement.told_from_zero": (PREDICTED, MEASURED),
    "evolution.known": (ENTROPY,),
    "correlation.correlation": (CORRELATION,),
    "jackknife_interval.ends_of": (PREDICTED,),
    "largest_part.largest_part": (PARTS,),
    "evaluation_products.estimate_with_error": (
        PREDICTED,
        "coverage of predicted per completion",
    ),
    "training_noise.to_json": (NOISE,),
    "training_noise.training_noise": (NOISE,),
    "entropy_law.fit_law": (
        "coverage of the law's slope",
        "coverage of reward at zero entropy",
        "level of a forecast called outside",
    ),
    "evolution._prediction": (CORRELATION,),
    "evolution_rows._mean_reward": ("coverage of a change of mean reward",),
    "zero_or_one.of_zeros_and_ones": ("coverage of a mean reward of zeros and ones",),
    "left_out_prompts.jackknifed": (PAIRED, "coverage of the price of reward in entropy"),
    "kernel_alignment.align_kernels": (ALIGNMENT,),
    "summed_changes.largest_of_sums": (PARTS,),
    "summed_changes.weighted_sum": (SUM, SUM_APART),
    "intervals.correlation_interval": (CORRELATION,),
    "intervals.interval": (FOLDS, PROBED),
    "history.totals": (PROBED, CORRELATION),
    "observation.entropy": (ENTROPY,),
    "step_prediction.predicted_parts": (FOLDS,),
    "watch._parts": (MEASURED,),
    "console._reach": (FOLDS, PREDICTED),
}
"""Module and function -> the checks that stand for what it makes; a check is named by how it begins."""

EXEMPT: dict[str, str] = {
    "buffers._mean": "bars of a figure that shows means over sequences; no difference is claimed by them",
    "buffers._describe": "a mean over sequences with its error, no interval of which is claimed",
    "clustering._stability": "quantiles of bootstraps, shown as such",
    "prompt_structure._block": "quartiles of a distribution",
    "exchanged_entries._outstanding": "a threshold with a margin, not an interval",
    "clustering._draw_cosines": "limits of an axis",
    "kernel.color_limit": "limits of a colour scale",
    "prices._ellipse": "drawn from two errors that have their checks; the caption says about 95%, and nothing is told from it",
    "fresh_samples.fresh_entropy_change": "no command offers it",
    "training_kernel._without_each": "an error beside a number, of which nothing is claimed",
}
"""Module and function -> why no check stands for it."""
