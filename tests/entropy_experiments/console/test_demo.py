"""The demo itself runs in minutes and is run by hand; what is tested is that a second one leaves the first alone."""

from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.console.demo import (
    ANALYSIS_CONFIG,
    ANALYSIS_OVERRIDES,
    TRAIN_CONFIG,
    TRAIN_OVERRIDES,
    next_free_folder,
)
from rl_training.config import TrainConfig
from rl_training.configuration import load_config


def test_a_second_demo_is_a_second_run(tmp_path):
    assert next_free_folder(tmp_path) == tmp_path / "demo-1"
    (tmp_path / "demo-1").mkdir()
    assert next_free_folder(tmp_path) == tmp_path / "demo-2"


def test_the_demos_configurations_are_valid_and_show_every_key():
    train = load_config(TrainConfig, TRAIN_CONFIG)
    assert train.model.name == "smollm2-135m" and train.entropy_probe.enabled
    load_config(TrainConfig, TRAIN_CONFIG, TRAIN_OVERRIDES)
    load_config(FisherAnalysisConfig, ANALYSIS_CONFIG, ANALYSIS_OVERRIDES)
    assert load_config(FisherAnalysisConfig, ANALYSIS_CONFIG) == FisherAnalysisConfig(), (
        "the YAML differs from the defaults"
    )
