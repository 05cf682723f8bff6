"""The dashboards: every metric that a chart names is one that the probe documents, and TensorBoard serves the layout."""

import re
from pathlib import Path
from types import SimpleNamespace

from tensorboard.backend.event_processing import event_accumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata
from torch.utils.tensorboard import SummaryWriter
from transformers.integrations import TensorBoardCallback

from rl_training.integrations.dashboards import CHARTS, TensorBoardLayout, tensorboard_layout

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "trl.md"


def documented() -> set[str]:
    """Metrics in the guide's table, `a`, `b` and `…_se` of one row spelled out."""
    names: set[str] = set()
    for row in re.findall(r"^\| (`entropy_probe/.*)$", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        listed = [name.removeprefix("entropy_probe/") for name in re.findall(r"`([^`]+)`", row)]
        plain = [name for name in listed if not name.startswith("…")]
        names |= {*plain, *(name + end.removeprefix("…") for name in plain for end in listed if end.startswith("…"))}
    return names


def test_charts_are_of_metrics_that_the_guide_documents() -> None:
    for chart in CHARTS:
        assert set(chart.metrics) <= documented(), (chart.title, set(chart.metrics) - documented())
        assert not chart.band or len(chart.metrics) == 3


def test_tensorboard_reads_the_layout_beside_the_metrics(tmp_path: Path) -> None:
    logger = TensorBoardCallback(SummaryWriter(log_dir=str(tmp_path)))
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[object(), logger]))
    TensorBoardLayout(trainer).on_train_begin(None, None, None)
    logger.tb_writer.add_scalar("train/entropy_probe/predicted", -0.1, 1)
    logger.tb_writer.close()
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert metadata.CONFIG_SUMMARY_TAG in events.Tags()["tensors"], "TensorBoard looks for its layout under this tag"
    (stored,) = events.Tensors(metadata.CONFIG_SUMMARY_TAG)
    layout = layout_pb2.Layout.FromString(stored.tensor_proto.string_val[0])
    charts = {chart.title: chart for chart in layout.category[0].chart}
    assert layout.category[0].title == "Entropy probe" and list(charts) == list(tensorboard_layout()["Entropy probe"])
    assert "train/entropy_probe/predicted" in charts["Change by a step: predicted, measured"].multiline.tag
    band = charts["Entropy without its noise, 80% band"].margin.series[0]
    assert (band.value, band.lower, band.upper) == tuple(CHARTS[1].tags)


def test_a_trainer_without_tensorboard_is_left_alone() -> None:
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[TensorBoardCallback()]))
    TensorBoardLayout(trainer).on_train_begin(None, None, None)
