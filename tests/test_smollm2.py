"""The real model, once: SmolLM2-135M trains a step under the probe, and its checkpoint is analysed."""

import json

import pytest

from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.entropy_runner import run_fisher_analysis
from entropy_experiments.records.record import json_of
from rl_training.config import TrainConfig
from rl_training.configuration import load_config
from rl_training.train import run_training


@pytest.mark.long
@pytest.mark.model
def test_smollm2_trains_and_is_analysed(tmp_path):
    small = [
        "rollouts.prompts_per_step=4",
        "rollouts.completions_per_prompt=4",
        "rollouts.max_completion_length=12",
        "optimizer.micro_batch_size=8",
        "training.steps=2",
        "training.save_every=2",
        "training.report_to=[]",
        f"training.output_dir={tmp_path}/run",
        "entropy_probe.eval_sequences=12",
        "entropy_probe.on_error=raise",
        "training_buffer.max_refill_rounds=3",
    ]
    run = run_training(load_config(TrainConfig, "rl_training/cfg/testconfig.yaml", small), quiet=True)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    assert 1.2 < steps[0]["entropy_probe/entropy"] < 2.8, "SmolLM2-Instruct starts near 1.9 nats per token"
    analysis = run_fisher_analysis(
        run,
        load_config(
            FisherAnalysisConfig,
            None,
            [
                "entropy_analysis.eval_batch_size=12",
                "entropy_analysis.train_batch_size=12",
                "entropy_analysis.analysis.step_scales=[1.0]",
                "entropy_analysis.analysis.intervention_subsets=3",
                "entropy_analysis.analysis.weighting_steps=false",
                "entropy_analysis.analysis.fresh_scales=[]",
            ],
        ),
        folder=tmp_path / "analysis",
    )
    assert not analysis.failed_checks
    actual = json_of(analysis.summary.actual.snis)
    predicted = json_of(analysis.summary.predicted["split"].total)
    assert abs(actual["value"] - predicted["value"]) < 3 * (actual["standard_error"] + predicted["standard_error"])
    assert analysis.numbers.kernels is not None and analysis.numbers.kernels.fisher.shape == (12, 12)
