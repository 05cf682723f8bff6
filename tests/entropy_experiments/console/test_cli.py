"""The command line as a person types it: a round trip, and one clear line for every kind of bad input."""

import json
import os
import subprocess

import pytest

from tests.tiny_policy import save_tiny_policy
from tests.warm_python import UNPAINTED, warm_run

SMALL = [
    "entropy_analysis.eval_batch_size=8",
    "entropy_analysis.train_batch_size=8",
    "entropy_analysis.analysis.step_scales=[1.0]",
    "checkpoint.device=cpu",
]


def run(*arguments: object, cwd=None, prelude=UNPAINTED) -> subprocess.CompletedProcess:
    trust = (
        ["--trust"] if arguments[0] in ("analyze", "sweep", "doctor") else []
    )  # the tiny run's reward is the tests' own
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return warm_run("-m", "entropy_experiments", *arguments, *trust, env=environment, cwd=cwd, prelude=prelude)


def assert_one_clear_line(result: subprocess.CompletedProcess, *words: str) -> None:
    lines = [line for line in result.stderr.splitlines() if not line.startswith("analysis: ")]
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.long
def test_train_analyze_report_doctor(tmp_path):
    policy = save_tiny_policy(tmp_path / "policy")
    config = tmp_path / "train.yaml"
    config.write_text(f"""
model: {{name: {policy}, device: cpu}}
lora: {{r: 4, alpha: 8}}
task:
  name: chain_sum
  arguments: {{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}}
  size: 24
  heldout_size: 16
  reward: tests.tiny_policy:even_start_reward
rollouts: {{prompts_per_step: 4, completions_per_prompt: 4, max_completion_length: 8}}
training: {{steps: 1, save_every: 1, output_dir: {tmp_path}/run, report_to: [tensorboard]}}
entropy_probe: {{eval_sequences: 8, on_error: raise}}
""")
    trained = run("train", config, "training.steps=2", "training.save_every=2")
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.strip() == str(tmp_path / "run")
    assert "predicted" in trained.stderr and len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
    assert list((tmp_path / "run").rglob("events.out.tfevents.*")), "TensorBoard has nothing to show"

    healthy = run("doctor", tmp_path / "run")
    assert healthy.returncode == 0 and "can be analysed: kernel" in healthy.stdout

    analyzed = run("analyze", tmp_path / "run", *SMALL, f"output_dir={tmp_path}/results")
    assert analyzed.returncode == 0, analyzed.stderr
    report = analyzed.stdout.strip().splitlines()[-1]
    assert report.endswith("report.html") and "Self-checks: 11 of 11 passed" in analyzed.stderr
    folder = os.path.dirname(report)
    os.remove(report)
    rewritten = run("report", folder)
    assert rewritten.returncode == 0 and os.path.exists(report)
    again = run("analyze", tmp_path / "run", *SMALL, f"output_dir={tmp_path}/results")
    assert_one_clear_line(again, "--overwrite")


def test_help_names_every_command():
    result = run("--help")
    assert result.returncode == 0
    for command in ("train", "analyze", "price", "sweep", "compare", "explore", "report", "doctor", "demo"):
        assert command in result.stdout


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("entropy_analysis.eval_batch_size=0", ["eval_batch_size", "0"]),
        ("entropy_analysis.eval_batchsize=8", ["eval_batchsize", "eval_batch_size"]),
        ("entropy_analysis.sampling.completions_per_prompt=3", ["multiple", "3"]),
        ("seed=first", ["seed"]),
        ("nonsense", ["section.key=value"]),
    ],
)
def test_bad_configuration(tiny_run, tmp_path, override, words):
    result = run("analyze", tiny_run, override, f"output_dir={tmp_path}/out")
    assert_one_clear_line(result, *words)
    assert not (tmp_path / "out").exists()


def test_missing_things(tmp_path, tiny_run):
    assert_one_clear_line(run("analyze", tmp_path / "nothing"), "does not exist")
    assert_one_clear_line(run("analyze", tmp_path), "neither a checkpoint")
    assert_one_clear_line(run("analyze", tiny_run, "--config", tmp_path / "no.yaml"), "no.yaml")
    assert_one_clear_line(run("report", tmp_path), "not the results folder")
    assert_one_clear_line(run("train", tmp_path / "no.yaml"), "no.yaml")
    assert_one_clear_line(run("doctor", tmp_path / "nothing"), "does not exist")


def test_a_sampler_that_truncates_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "train.yaml").write_text("rollouts: {top_p: 0.9}\n")
    assert_one_clear_line(run("train", tmp_path / "train.yaml"), "top_p", "0.9")


def test_a_partial_checkpoint(checkpoint_copy):
    (checkpoint_copy / "optimizer.pt").unlink()
    result = run("doctor", checkpoint_copy)
    assert result.returncode == 1 and "preconditioning=none" in result.stdout
    assert_one_clear_line(run("analyze", checkpoint_copy), "optimizer.pt", "preconditioning=none")


def test_nan_logits_name_the_sequence(checkpoint_copy, tmp_path):
    """A base model that overflows: finite weights, logits that are not."""
    from transformers import AutoModelForCausalLM

    content = json.loads((checkpoint_copy / "entropy_experiments.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(content["model_name"])
    model.model.norm.weight.data.fill_(3e38)
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    from tests.tiny_policy import character_tokenizer

    character_tokenizer().save_pretrained(broken)
    result = run("analyze", checkpoint_copy, *SMALL, f"checkpoint.model={broken}", f"output_dir={tmp_path}/out")
    assert_one_clear_line(result, "NaN or infinite logits")
    assert not list((tmp_path / "out").rglob("*.part"))


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.long
def test_a_full_disk_leaves_nothing_half_written(tiny_run, small_disk):
    result = run("analyze", tiny_run, *SMALL, f"output_dir={small_disk}/results", prelude="")  # figures fill it
    assert_one_clear_line(result, "no space left")
    assert not list(small_disk.rglob("*checkpoint-4*"))
