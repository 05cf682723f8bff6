"""A checkpoint's account of its sampling: what is refused by name, and prompts that are no longer those of the run."""

import json
from types import SimpleNamespace

import pytest

from entropy_experiments.buffers.recorded_sampling import (
    recorded_departures,
    recorded_sampling,
    refuse_another_distribution,
)
from entropy_experiments.buffers.sampling_plan import plan_sampling
from entropy_experiments.checkpoint_loader import load_checkpoint
from entropy_experiments.config import FisherAnalysisConfig
from entropy_experiments.console.doctor import examine
from rl_training.errors import UserError
from rl_training.run.sidecar import SIDECAR_NAME, SidecarSampling, read_sidecar
from rl_training.train import run_training
from tests.tiny_policy import save_tiny_policy, tiny_train_config

PLAIN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 8, "eos_token_id": [1]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampling") / "run"
    tiny_policy = save_tiny_policy(tmp_path_factory.mktemp("sampling_policy") / "policy")
    config = tiny_train_config(
        tiny_policy, folder, training={"steps": 1, "save_every": 1}, entropy_probe={"enabled": False}
    )
    run_training(config, quiet=True)
    return folder / "checkpoint-1"


def sampling(generation, **more):
    fixed = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_completion_length": 8,
        "eos_token_ids": [1],
        "pad_token_id": 0,
    }
    return SidecarSampling(prompts_per_step=4, completions_per_prompt=4, generation=generation, **fixed, **more)


@pytest.mark.parametrize(
    "more",
    [
        {"top_k": 5}, {"min_p": 0.1}, {"do_sample": False}, {"temperature": 0.5}, {"max_new_tokens": 4},
        {"eos_token_id": [1, 9]}, {"later": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_recorded_setting_of_another_distribution_is_refused_by_name(more):
    recorded = sampling({**PLAIN, **more})
    assert [d.name for d in recorded_departures(recorded)] == list(more)
    assert any("another distribution" in line and next(iter(more)) in line for line in recorded_sampling(recorded))
    record = SimpleNamespace(sidecar=SimpleNamespace(sampling=recorded), path="checkpoint-1")
    with pytest.raises(UserError, match=next(iter(more))):
        refuse_another_distribution(SimpleNamespace(record=record, model=SimpleNamespace()))


def test_recorded_noise_is_refused_and_an_old_record_is_not():
    assert recorded_departures(sampling(PLAIN)) == recorded_departures(sampling({})) == []
    assert [d.value for d in recorded_departures(sampling(PLAIN, training_noise=["jitter_noise=0.1"]))] == [
        "jitter_noise=0.1"
    ]


def test_a_run_records_its_sampling_and_is_analysed_by_it(run):
    recorded = read_sidecar(run).sampling
    assert recorded.generation["max_new_tokens"] == 8 and recorded.generation["top_k"] == 0
    assert len(recorded.chat_template_sha256) == 64 and recorded.training_noise == []
    assert plan_sampling(load_checkpoint(run), FisherAnalysisConfig()).sampling_config.eos_token_ids == (1,)
    assert any("softmax(logits / 1)" in line for line in examine(run)[0])


def test_another_template_than_the_runs_is_refused(run):
    checkpoint = load_checkpoint(run)
    checkpoint.tokenizer.chat_template += "!"
    with pytest.raises(UserError, match=r"chat template .*put back the tokenizer files"):
        plan_sampling(checkpoint, FisherAnalysisConfig())


def test_prompts_that_are_not_those_of_the_run_are_refused(run, tmp_path):
    """The digest is right, and the prompts are others all the same: the record names other arguments."""
    path = run / SIDECAR_NAME
    text = path.read_text()
    data = json.loads(text)
    data["task"]["system_prompt"], data["own_sha256"] = "Be brief.", None
    try:
        path.write_text(json.dumps(data))
        with pytest.raises(UserError, match=r"prompt \d+ of the task.*not what the run trained on"):
            plan_sampling(load_checkpoint(run), FisherAnalysisConfig())
    finally:
        path.write_text(text)
