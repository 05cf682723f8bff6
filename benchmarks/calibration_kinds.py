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
U_STATISTIC = "coverage of the U-statistic of a single batch"

COVERED: dict[str, tuple[str, ...]] = {
    "entropy_core.fold_gradients.predict": (FOLDS,),
    "entropy_core.measurement._measure": (MEASURED, GIVEN),
    "entropy_core.token_ratios.token_ratio_change": (MEASURED,),
    "entropy_core.uncertainty.jackknife_over_prompts": ("coverage of what leaving out the costliest spares",),
    "entropy_experiments.analyses.adapters.higher_order": (PREDICTED,),
    "entropy_experiments.analyses.adapters.weighting_schemes": (RULE,),
    "entropy_experiments.analyses.baselines._known": (PREDICTED, MEASURED),
    "entropy_experiments.analyses.baselines._row": (RULE, MEASURED),
    "entropy_experiments.analyses.buffers._compare": (BUFFERS, "level of buffers, any of the quantities (Holm)"),
    "entropy_experiments.analyses.cluster_contents._association": ("level of what clusters share, lengths",),
    "entropy_experiments.analyses.clustering.choose_number": ("level of clusters, one cloud",),
    "entropy_experiments.analyses.entropy_prediction._comparison": (RULE, PREDICTED),
    "entropy_experiments.analyses.entropy_prediction._measurement": (MEASURED,),
    "entropy_experiments.analyses.entropy_prediction._row": (PREDICTED,),
    "entropy_experiments.analyses.higher_order._equality": (EQUAL,),
    "entropy_experiments.analyses.higher_order._orders": (ORDERS, "coverage of the first order of the curve"),
    "entropy_experiments.analyses.higher_order._with_fit_error": (ORDERS,),
    "entropy_experiments.analyses.intervention._bootstrap_interval": ("coverage of the score over halves (LDS)",),
    "entropy_experiments.analyses.intervention._line": ("coverage of the slope of the response over halves",),
    "entropy_experiments.analyses.prompt_structure.permutation_test": (STRUCTURE, "level of correctness, raw"),
    "entropy_experiments.analyses.prompt_structure.single_batch_estimate": (U_STATISTIC,),
    "entropy_experiments.analyses.weighting_schemes._against": (RULE,),
    "entropy_experiments.analyses.weighting_schemes._estimates": (
        WEIGHTING,
        "coverage of a weighting's gain of reward",
        "coverage of a weighting's cost in entropy",
        "coverage of a weighting minus the run's, equal gain",
    ),
    "entropy_experiments.analyses.weighting_schemes._jackknife": (WEIGHTING,),
    "entropy_experiments.analyses.weighting_schemes._spared": ("coverage of what leaving out the costliest spares",),
    "entropy_experiments.compare.differences._difference": (APART,),
    "entropy_experiments.compare.differences._number": (ENTROPY, PREDICTED),
    "entropy_experiments.compare.differences._paired_difference": (PAIRED,),
    "entropy_experiments.compare.differences._value": (ENTROPY,),
    "entropy_experiments.compare.differences.told_from_zero": (
        "level of a difference of two results, entropy, the same prompts",
    ),
    "entropy_experiments.records.estimate_entries.estimate_entry": (PREDICTED, ENTROPY),
    "entropy_experiments.records.estimate_entries.measurement_entry": (MEASURED,),
    "entropy_experiments.records.estimate_entries.ratio_entry": (ENTROPY, "coverage of entropy per completion"),
    "entropy_experiments.records.estimates.known": (WEIGHTING,),
    "entropy_experiments.records.history.probed_sums": (PROBED, CORRELATION),
    "entropy_experiments.records.leave_one_out.agreements": (RULE,),
    "entropy_experiments.records.leave_one_out.largest_parts": (PARTS,),
    "entropy_experiments.records.training_course._one": (COURSE,),
    "entropy_experiments.records.training_course.course": (COURSE,),
    "entropy_experiments.records.writer._estimates": (PREDICTED,),
    "entropy_experiments.records.writer._scaled": (PREDICTED,),
    "entropy_experiments.records.writer.summarize": (ENTROPY,),
    "entropy_experiments.report.figures.bars.bars_of_columns": (FOLDS,),
    "entropy_experiments.report.figures.higher_order.plot_higher_order": (MEASURED,),
    "entropy_experiments.report.figures.history._shared": (CORRELATION,),
    "entropy_experiments.report.figures.step.plot_predicted_vs_actual": (PREDICTED, MEASURED),
    "entropy_experiments.report.figures.structure._draw_single_batch": (U_STATISTIC,),
    "entropy_experiments.report.interactive.predicted.predicted_vs_actual": (PREDICTED, MEASURED),
    "entropy_experiments.report.outcome.same_prompt_effect": (STRUCTURE,),
    "entropy_experiments.statistics.agreement._agreement": (RULE,),
    "entropy_experiments.statistics.agreement.compare": (RULE,),
    "entropy_experiments.statistics.agreement.told_from_zero": (PREDICTED, MEASURED),
    "entropy_experiments.statistics.confidence.known": (FOLDS,),
    "entropy_experiments.statistics.correlation.correlation": (CORRELATION,),
    "entropy_experiments.statistics.jackknife_interval.ends_of": (PREDICTED,),
    "entropy_experiments.statistics.largest_part.largest_part": (PARTS,),
    "entropy_experiments.statistics.paired_differences.agreements_of_folder": (RULE,),
    "entropy_experiments.step.predictions_left_out.estimate_with_error": (
        PREDICTED,
        "coverage of predicted per completion",
    ),
    "entropy_experiments.step.training_noise.to_json": (NOISE,),
    "entropy_experiments.step.training_noise.training_noise": (NOISE,),
    "entropy_experiments.sweep.evolution.entropy_law.reach": (
        "coverage of the law's slope",
        "coverage of reward at zero entropy",
        "level of a forecast called outside",
    ),
    "entropy_experiments.sweep.evolution.evolution._change": (ALIGNMENT,),
    "entropy_experiments.sweep.evolution.evolution._prediction": (CORRELATION,),
    "entropy_experiments.sweep.evolution.evolution_rows._mean_reward": ("coverage of a change of mean reward",),
    "entropy_experiments.sweep.evolution.kernel_alignment.align_kernels": (ALIGNMENT,),
    "entropy_experiments.sweep.evolution.left_out_prompts.jackknifed": (
        PAIRED,
        "coverage of the price of reward in entropy",
    ),
    "entropy_experiments.sweep.evolution.summed_changes._of_independent": (SUM_APART,),
    "entropy_experiments.sweep.evolution.summed_changes.weighted_sum": (SUM,),
    "rl_training.intervals.correlation_interval": (CORRELATION,),
    "rl_training.intervals.interval": (FOLDS, PROBED),
    "rl_training.probe.history.totals": (PROBED, CORRELATION),
    "rl_training.probe.observation.entropy": (ENTROPY,),
    "rl_training.probe.step_prediction.predicted_parts": (FOLDS,),
    "rl_training.run.console._reach": (FOLDS,),
}
"""Function -> the checks that stand for what it makes; a check is named by how it begins."""

EXEMPT: dict[str, str] = {
    "entropy_experiments.analyses.buffers._describe": "a mean over sequences with its error, no interval of which is claimed",
    "entropy_experiments.analyses.clustering._stability": "quantiles of bootstraps, shown as such",
    "entropy_experiments.analyses.prompt_structure._block": "quartiles of a distribution",
    "entropy_experiments.checkpoints.exchanged_entries._outstanding": "a threshold with a margin, not an interval",
    "entropy_experiments.report.figures.clustering._draw_cosines": "limits of an axis",
    "entropy_experiments.report.figures.kernel.color_limit": "limits of a colour scale",
    "entropy_experiments.step.fresh_samples.fresh_entropy_change": "no command offers it",
    "entropy_experiments.sweep.evolution.training_kernel._without_each": "an error beside a number, of which nothing is claimed",
}
"""Function -> why no check stands for it."""
