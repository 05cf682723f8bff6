"""The charts draw the numbers they are given: artists are read back and compared with the data."""

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy import stats

from entropy_experiments.records.estimates import Estimate, Measurement
from entropy_experiments.records.record import validated
from entropy_experiments.records.summary import StepParts
from entropy_experiments.report.figures.plots import (
    caption_of,
    plot_attribution,
    plot_entropy_split,
    plot_kernel_heatmap,
    plot_predicted_vs_actual,
    plot_training_history,
    png_bytes,
)
from entropy_experiments.report.interactive.predicted import predicted_vs_actual
from tests.entropy_experiments.results_fixture import make_history, make_sequences, make_summary
from tests.entropy_experiments.whole_summary import history_of

T31, T3 = (float(stats.t.ppf(0.975, freedom)) for freedom in (31, 3))


@pytest.fixture(scope="module")
def summary():
    rows, _, _ = make_sequences(np.random.default_rng(0))
    return make_summary(rows)


def line(axes, label):
    """(x, y) of the line or error-bar container with this label."""
    for container in axes.containers:
        if container.get_label() == label:
            return container[0].get_data()
    return next(artist for artist in axes.lines if artist.get_label() == label).get_data()


def texts(figure):
    return " ".join(text.get_text() for axes in figure.axes for text in axes.texts)


def bar_spans(container):
    """(low, high) of every error bar of an errorbar container."""
    return [(segment[0, 1], segment[1, 1]) for segment in container[2][0].get_segments() if segment.size]


# ---- kernel


def test_heatmap_orders_rows_and_columns_by_prompt_and_keeps_order_within_a_prompt():
    kernel = np.arange(12.0).reshape(3, 4)
    figure = plot_kernel_heatmap(kernel, [2, 0, 2], [1, 0, 1, 0])
    drawn = figure.axes[0].images[0].get_array()
    np.testing.assert_array_equal(drawn, kernel[[1, 0, 2]][:, [1, 3, 0, 2]])


def test_heatmap_scale_is_symmetric_clipped_and_says_so():
    kernel = np.random.default_rng(0).normal(size=(20, 30))
    kernel[0, 0] = -1e6
    figure = plot_kernel_heatmap(kernel, np.repeat(np.arange(5), 4), np.repeat(np.arange(5), 6), percentile=98)
    image = figure.axes[0].images[0]
    limit = np.percentile(np.abs(kernel), 98)
    assert image.get_clim() == pytest.approx((-limit, limit)), "colour scale is not symmetric about 0"
    label = figure.axes[1].get_ylabel()
    assert "percentile 98" in label and f"{limit:.3g}" in label
    assert f"{(np.abs(kernel) > limit).sum()} of 600 entries lie beyond" in caption_of(figure)


def test_heatmap_draws_prompt_boundaries_on_both_axes():
    axes = plot_kernel_heatmap(np.ones((6, 8)), [0, 0, 0, 1, 1, 1], [0] * 2 + [1] * 4 + [7] * 2).axes[0]
    vertical = sorted(line.get_xdata()[0] for line in axes.lines if line.get_xdata()[0] == line.get_xdata()[1])
    horizontal = [line.get_ydata()[0] for line in axes.lines if line.get_ydata()[0] == line.get_ydata()[1]]
    assert vertical == [1.5, 5.5] and horizontal == [2.5]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "7"]


def test_heatmap_with_one_row_a_prompt_is_not_a_grid_of_lines():
    axes = plot_kernel_heatmap(np.ones((50, 4)), np.arange(50), [0, 0, 0, 0]).axes[0]
    assert not axes.lines and len(axes.get_yticklabels()) <= 12


def test_heatmap_of_many_prompts_leaves_out_the_lines_and_says_so():
    figure = plot_kernel_heatmap(np.ones((4, 400)), [0, 0, 1, 1], np.repeat(np.arange(200), 2))
    assert len(figure.axes[0].lines) == 1 and "more than 101 prompts" in caption_of(figure)


def test_heatmap_masks_and_counts_entries_that_are_not_finite():
    kernel = np.ones((3, 3))
    kernel[1, 2], kernel[0, 0] = np.nan, np.inf
    figure = plot_kernel_heatmap(kernel, [0, 0, 0], [0, 0, 0])
    assert np.ma.count_masked(figure.axes[0].images[0].get_array()) == 2
    assert "Not finite, and drawn grey: 2" in caption_of(figure)


@pytest.mark.parametrize("kernel", [np.zeros((2, 2)), np.full((1, 1), 3.0), np.zeros((0, 4)), np.full((2, 2), np.nan)])
def test_heatmap_of_degenerate_kernels_can_be_saved(kernel):
    assert png_bytes(plot_kernel_heatmap(kernel, range(kernel.shape[0]), range(kernel.shape[1])))


def test_heatmap_refuses_prompts_of_another_kernel():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        plot_kernel_heatmap(np.ones((2, 3)), [0, 1], [0, 1])


# ---- the step


def test_predicted_and_measured_over_scale(summary):
    rows = list(reversed(summary["scaling"]))
    figure = plot_predicted_vs_actual(
        rows, predicted_standard_error=0.018, actual_standard_error=0.022, degrees_of_freedom=31
    )
    left, right = figure.axes
    scales, predicted = line(left, "predicted (first order)")
    np.testing.assert_allclose(scales, [0.0625, 0.125, 0.25, 0.5, 1.0])
    np.testing.assert_allclose(predicted, -0.074 * scales)
    measured = next(c for c in left.containers if c.get_label() == "measured (reweighted)")
    np.testing.assert_allclose(measured[0].get_ydata(), [row["actual_snis"] for row in summary["scaling"]])
    low, high = bar_spans(measured)[-1]
    assert (high - low) / 2 == pytest.approx(T31 * 0.022), "error bars are not Student's 95% intervals"
    band = left.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(-0.074 - T31 * 0.018)
    np.testing.assert_allclose(
        line(right, "same sample on both sides")[1],
        [row["actual_snis"] / row["predicted_split"] for row in summary["scaling"]],
    )


def test_the_ends_of_stored_intervals_are_drawn_before_errors():
    row = {"predicted": -0.2, "predicted_low": -0.7, "predicted_high": -0.1, "actual_snis": -0.3, "actual_snis_low": -0.9,
           "actual_snis_high": -0.25, "actual_snis_standard_error": 0.01}  # fmt: skip
    untrusted = {"actual_snis_low": None, "actual_snis_high": None}
    rows = [{"scale": 1.0, **row}, {"scale": 2.0, **row, **untrusted}]
    left = plot_predicted_vs_actual(rows, predicted_standard_error=0.01, degrees_of_freedom=31).axes[0]
    measured = next(c for c in left.containers if c.get_label() == "measured (reweighted)")
    assert bar_spans(measured)[0] == pytest.approx((-0.9, -0.25)), "a symmetric bar in place of the stored interval"
    assert not np.isfinite(np.asarray(bar_spans(measured)[1:], dtype=float)).any(), "an untrusted measurement has a bar"
    band = left.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((-0.7, -0.1))
    plot = predicted_vs_actual(rows, predicted_standard_error=0.01, degrees_of_freedom=31)
    trace = next(trace for trace in plot["data"] if trace["name"] == "measured (reweighted)")
    assert trace["error_y"]["arrayminus"] == pytest.approx([0.6, None]) and "[−0.90, −0.25]" in trace["customdata"][0]


def test_ratio_to_a_zero_prediction_is_left_out_not_clamped():
    rows = [{"scale": s, "predicted": 0.0, "actual_snis": -0.01 * s} for s in (0.5, 1.0)]
    figure = plot_predicted_vs_actual(rows)
    assert "no ratio" in texts(figure)


def test_ratio_keeps_its_sign_and_marks_what_leaves_the_panel():
    rows = [
        {"scale": 0.5, "predicted": -0.01, "actual_snis": 0.005},
        {"scale": 1.0, "predicted": -0.01, "actual_snis": 0.2},
    ]
    right = plot_predicted_vs_actual(rows).axes[1]
    ratios = line(right, "measured / predicted")[1]
    assert ratios[0] == pytest.approx(-0.5) and np.isnan(ratios[1])
    assert "-20.0" in [text.get_text() for text in right.texts]


@pytest.mark.parametrize("rows", [[], [{}], [{"scale": None, "predicted": 1.0}], [{"scale": 1.0, "predicted": "x"}]])
def test_scaling_without_data_says_so(rows):
    assert "no data" in texts(plot_predicted_vs_actual(rows))


def test_split_bars_carry_values_and_errors(summary):
    parts = summary["predicted"]["rao_blackwell"]
    axes = plot_entropy_split(*change(summary)).axes[0]
    bars = [container for container in axes.containers if hasattr(container, "patches")]
    heights = [container.patches[0].get_height() for container in bars]
    wanted = [parts[key]["value"] for key in ("batch", "momentum", "weight_decay", "total")] + [-0.08]
    np.testing.assert_allclose(heights, wanted)
    assert sum(heights[:3]) == pytest.approx(heights[3])
    low, high = bar_spans(bars[4].errorbar)[0]
    assert (high - low) / 2 == pytest.approx(T31 * 0.022)


def test_split_without_data_says_so(summary):
    assert "no data" in texts(plot_entropy_split(None))
    nothing = Estimate(value=None, standard_error=None)
    assert "no data" in texts(plot_entropy_split(StepParts(**dict.fromkeys(StepParts.model_fields, nothing))))
    assert "no data" in texts(plot_entropy_split(*change(summary)[:1])), "of the measured change"


def change(summary):
    """The predicted and the measured change as records."""
    parts = validated(StepParts, summary["predicted"]["rao_blackwell"], "summary.json")
    return parts, validated(Measurement, summary["actual"]["snis"], "summary.json")


# ---- history


def test_history_draws_every_series():
    history = make_history()
    top, middle, bottom = plot_training_history(history_of(history), analysed_step=8).axes
    np.testing.assert_allclose(line(top, "entropy, sequences trained on")[1], [row["entropy"] for row in history])
    np.testing.assert_allclose(line(middle, "reward")[1], [row["reward"] for row in history])
    np.testing.assert_allclose(line(bottom, "predicted change")[1], [row["probe/predicted"] for row in history])
    np.testing.assert_allclose(line(bottom, "measured change")[1], [row["probe/measured"] for row in history])
    predicted = next(c for c in bottom.containers if c.get_label() == "predicted change")
    low, high = bar_spans(predicted)[0]
    assert (high - low) / 2 == pytest.approx(T3 * 0.02)


def test_history_with_gaps_keeps_the_other_points():
    history = make_history()
    history[3]["probe/predicted"], history[4]["entropy"], history[5] = None, None, {"step": 5}
    top, _, bottom = plot_training_history(history_of(history)).axes
    assert np.isnan(line(top, "entropy, sequences trained on")[1][[4, 5]]).all()
    assert np.isfinite(line(bottom, "predicted change")[1]).sum() == len(history) - 2


def test_empty_history_says_no_data():
    figure = plot_training_history([])
    assert "no data" in texts(figure) and "empty" in caption_of(figure)


@pytest.mark.parametrize("steps", [1, 2])
def test_short_histories_can_be_saved(steps):
    figure = plot_training_history(history_of(make_history(steps)))
    assert png_bytes(figure)


def test_long_history_is_drawn_as_lines_with_a_band():
    history = make_history(61)
    top, _, bottom = plot_training_history(history_of(history)).axes
    np.testing.assert_allclose(line(bottom, "measured change")[1], [row["probe/measured"] for row in history])
    band = bottom.collections[0].get_paths()[0].vertices[:, 1]
    wanted = max(row["probe/predicted"] + T3 * 0.02 for row in history)
    assert band.max() == pytest.approx(wanted) and top.lines[0].get_markersize() == 0


def test_history_without_probe_keeps_its_step_axis():
    figure = plot_training_history(history_of([{"step": 1, "entropy": 2.0}, {"step": 2, "entropy": 1.5}]))
    assert "no predicted or measured" in texts(figure)
    png_bytes(figure)
    bottom = figure.axes[2]
    assert bottom.xaxis.get_visible() and bottom.axison, "the only labelled step axis vanished with the empty panel"


# ---- attribution


def test_attribution_is_sorted_and_its_legend_sums_by_advantage():
    shares = np.array([1e-3, -4e-3, 0.5e-3, -2e-3])
    figure = plot_attribution(shares, [1, 1, 0, 0], [0, 1, 0, 1], sequence_index=[10, 11, 12, 13])
    left, right = figure.axes
    np.testing.assert_allclose([bar.get_height() for bar in left.patches], [-4, -2, 0.5, 1])
    legend = [text.get_text() for text in left.get_legend().get_texts()]
    assert legend == [
        "better than its group (advantage > 0):\n2 sequences, sum −3.00",
        "worse than its group (advantage < 0):\n2 sequences, sum −1.50",
    ]
    names = [label.get_text() for label in right.get_yticklabels()]
    assert names[0] == "sequence 11 · prompt 1 · reward 1" and names[-1] == "sequence 10 · prompt 0 · reward 1"
    assert "−4.50 ×10⁻³" in caption_of(figure)


def test_attribution_leaves_out_missing_shares_and_says_how_many():
    figure = plot_attribution([np.nan, -1e-3], [0, 1], [0, 0])
    assert len(figure.axes[0].patches) == 1 and "1 sequence without a finite share" in caption_of(figure)
    assert "no data" in texts(plot_attribution([], [], []))


def test_attribution_refuses_arrays_of_different_lengths():
    with pytest.raises(ValueError, match="rewards has 1 entries, delta_h 2"):
        plot_attribution([0.1, 0.2], [1], [0, 0])


# ---- all of them


def test_figures_are_the_same_bytes_whatever_the_users_settings(summary):
    def draw():
        return png_bytes(plot_entropy_split(*change(summary)))

    plain = draw()
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "pink", "savefig.dpi": 30}):
        assert draw() == plain


def test_no_text_of_a_figure_leaves_it(summary):
    figures = [
        plot_kernel_heatmap(1e5 * np.random.default_rng(0).normal(size=(32, 64)), range(32), np.repeat(range(8), 8)),
        plot_predicted_vs_actual(summary["scaling"]),
        plot_entropy_split(*change(summary)),
        plot_training_history(history_of(make_history())),
        plot_attribution(np.linspace(-1e-3, 1e-3, 64), np.arange(64) % 2, np.arange(64) // 8),
    ]
    for figure in figures:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer, frame = canvas.get_renderer(), figure.bbox
        artists = [
            *figure.texts,
            *(a for axes in figure.axes for a in (axes.xaxis.label, axes.yaxis.label, axes.title)),
        ]
        for artist in artists:
            if artist.get_text():
                box = artist.get_window_extent(renderer)
                inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= frame.x1 + 1 and box.y1 <= frame.y1 + 1
                assert inside, f"cut off: {artist.get_text()!r}"
