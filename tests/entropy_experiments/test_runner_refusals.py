"""What an analysis refuses, in one clear line and with nothing left behind; and checkpoints that are not of the usual kind."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from entropy_experiments.checkpoint_loader import load_checkpoint
from entropy_experiments.entropy_runner import run_fisher_analysis
from entropy_experiments.kernel import options as kernel_options
from entropy_experiments.kernel.row_passes import RowPasses
from rl_training.errors import UserError
from tests.entropy_experiments.checkpoint_edits import reseal
from tests.entropy_experiments.small_analysis import config


@pytest.fixture(scope="module")
def analysis(small_analysis):
    return small_analysis


def test_without_optimizer_state_only_the_plain_step_is_analysed(checkpoint_copy, tmp_path):
    (checkpoint_copy / "optimizer.pt").unlink()
    with pytest.raises(UserError, match="preconditioning=none"):
        run_fisher_analysis(checkpoint_copy, config(), folder=tmp_path / "no")
    plain = "entropy_analysis.fisher_kernel.preconditioning=none"
    result = run_fisher_analysis(checkpoint_copy, config(plain), folder=tmp_path / "plain")
    assert result.summary.predicted["rao_blackwell"].momentum.value == 0.0
    assert not result.failed_checks


def test_a_plain_trl_checkpoint_needs_to_be_told_task_and_sampling(checkpoint_copy, tiny_run, tmp_path):
    sidecar = json.loads((checkpoint_copy / "entropy_experiments.json").read_text())
    (checkpoint_copy / "entropy_experiments.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint\.task"):
        run_fisher_analysis(checkpoint_copy, config(), folder=tmp_path / "no")
    task = f"checkpoint.task={json.dumps(sidecar['task'])}"
    with pytest.raises(UserError, match=r"sampling\.temperature"):
        run_fisher_analysis(checkpoint_copy, config(task), folder=tmp_path / "no")
    told = config(
        task,
        "entropy_analysis.sampling.temperature=1.0",
        "entropy_analysis.sampling.max_completion_length=8",
        "entropy_analysis.sampling.completions_per_prompt=4",
    )
    foreign = run_fisher_analysis(checkpoint_copy, told, folder=tmp_path / "foreign")
    assert not foreign.failed_checks
    assert foreign.summary.attribution.horizon_factor > 1


def test_optimizer_entries_permuted_within_a_shape_are_refused(checkpoint_copy, tmp_path):
    path = checkpoint_copy / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    by_shape: dict = {}
    for number, entry in state["state"].items():
        by_shape.setdefault(tuple(entry["exp_avg"].shape), []).append(number)
    entries = dict(state["state"])
    for numbers in by_shape.values():
        for left, right in zip(numbers, numbers[1:] + numbers[:1], strict=True):
            state["state"][left] = entries[right]
    torch.save(state, path)
    reseal(checkpoint_copy)
    with pytest.raises(UserError, match="nothing is analysed"):
        run_fisher_analysis(checkpoint_copy, config(), folder=tmp_path / "no")
    assert not list(tmp_path.glob("no*")), "something half-written was left behind"


def test_no_prompt_with_mixed_rewards(checkpoint_copy, tmp_path):
    path = checkpoint_copy / "entropy_experiments.json"
    content = json.loads(path.read_text())
    content["task"]["reward"] = "tests.rl_training.algs.test_dr_grpo:always_right"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no prompt with mixed rewards"):
        run_fisher_analysis(checkpoint_copy, config(), folder=tmp_path / "no")
    assert not list(tmp_path.glob("no*"))


@pytest.mark.long
def test_an_existing_folder_is_kept_unless_asked(analysis, tiny_run, tmp_path):
    target = tmp_path / "mine"
    shutil.copytree(analysis.folder, target)
    (target / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        run_fisher_analysis(tiny_run, config(), folder=target)
    with pytest.raises(UserError, match="holds note.txt, which no analysis wrote"):
        run_fisher_analysis(tiny_run, config(), folder=target, overwrite=True)
    assert (target / "note.txt").exists()
    (target / "note.txt").unlink()
    (target / "report.html").write_text("old")
    run_fisher_analysis(tiny_run, config(), folder=target, overwrite=True)
    assert (target / "report.html").read_text() != "old" and [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.long
@pytest.mark.parametrize("keep_going", [False, True])
def test_a_failed_self_check_fails_the_run_unless_told_otherwise(tiny_run, tmp_path, monkeypatch, keep_going):
    """A kernel that is twice too large: two checks see it, by finite differences and by autograd."""
    original = RowPasses.products
    monkeypatch.setattr(RowPasses, "products", lambda *arguments: 2 * original(*arguments))
    target = tmp_path / "checked"
    if not keep_going:
        with pytest.raises(UserError, match="self-check failed"):
            run_fisher_analysis(tiny_run, config(), folder=target)
        assert not target.exists() and not list(tmp_path.glob("*.part"))
        return
    result = run_fisher_analysis(tiny_run, config(), folder=target, keep_going=True)
    failed = {check.name for check in result.failed_checks}
    assert {"K w = finite difference", "entropy kernel = autograd"} <= failed
    assert "FAILED" in (target / "report.html").read_text()


def test_another_sampling_than_the_runs_is_refused(tiny_run, tmp_path):
    for override in ("temperature=0.3", "max_completion_length=4"):
        with pytest.raises(UserError, match=override.split("=")[0]):
            run_fisher_analysis(tiny_run, config(f"entropy_analysis.sampling.{override}"), folder=tmp_path / "no")


def test_a_recorded_buffer_that_shares_prompts_with_the_evaluation_is_refused(tiny_run, tmp_path):
    shared = ["train_prompts=from_run", "eval_split=train"]
    overrides = [f"entropy_analysis.sampling.{override}" for override in shared]
    every_prompt = "entropy_analysis.eval_batch_size=24"
    with pytest.raises(UserError, match="same_prompts=true"):
        run_fisher_analysis(tiny_run, config(*overrides, every_prompt), folder=tmp_path / "no")
    both = config(*overrides, "entropy_analysis.sampling.same_prompts=true")
    assert not run_fisher_analysis(tiny_run, both, folder=tmp_path / "shared").failed_checks


def test_groups_that_could_not_be_had_still_count_in_n(tiny_run, tmp_path, monkeypatch):
    """Two of four prompts give gradient: N stays 16, so weights are those of the run, not twice as large."""
    from entropy_experiments import double_sampling

    original = double_sampling.collect_filtered

    def half(*args, **kwargs):
        buffer, counts = original(*args, **kwargs)
        return buffer.select(range(len(buffer) // 2)), counts

    monkeypatch.setattr(double_sampling, "collect_filtered", half)
    result = run_fisher_analysis(tiny_run, config(), folder=tmp_path / "half")
    training = result.training
    assert len(training.rollouts) == 8
    expected = training.advantages / (16 * 8)
    torch.testing.assert_close(training.weights, expected)


def test_a_checkpoint_cut_short_while_saving_is_not_taken_for_a_foreign_one(tiny_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    (copy / "checkpoint-4" / "entropy_experiments.json").unlink()
    with pytest.raises(UserError, match="cut short"):
        run_fisher_analysis(copy, config(), folder=tmp_path / "no")


def test_half_an_adapter_is_refused(checkpoint_copy, tmp_path):
    from safetensors.torch import save_file

    path = checkpoint_copy / "adapter_model.safetensors"
    weights = {name: w for name, w in load_file(path).items() if "layers.1" not in name}
    save_file(weights, path)
    reseal(checkpoint_copy)
    with pytest.raises(UserError, match="is partial: it has no .*layers.1"):
        run_fisher_analysis(checkpoint_copy, config(), folder=tmp_path / "no")


def test_rows_that_do_not_fit_into_memory_are_refused_before_they_are_made(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_options, "free_memory", lambda device: 1000)
    with pytest.raises(UserError, match="too small for one row"):
        run_fisher_analysis(tiny_run, config(), folder=tmp_path / "no")
    assert not list(tmp_path.glob("no*"))


def test_half_a_launchers_environment_is_refused_rather_than_racing(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE=2 .* start it by accelerate launch or torchrun"):
        run_fisher_analysis(tiny_run, config(), folder=tmp_path / "no")


@pytest.mark.long
def test_parameters_adam_never_saw_are_not_let_rule_the_kernel(tmp_path):
    """After one LoRA step every lora_A has v = 0 and P = 1/eps there: the check names the remedy, which works."""
    from rl_training.train import run_training
    from tests.tiny_policy import save_tiny_policy, tiny_train_config

    policy = save_tiny_policy(tmp_path / "policy")
    run = run_training(
        tiny_train_config(
            policy, tmp_path / "run", training={"steps": 1, "save_every": 1}, entropy_probe={"enabled": False}
        ),
        quiet=True,
    )
    with pytest.raises(UserError, match="preconditioning=step"):
        run_fisher_analysis(run, config(), folder=tmp_path / "no")
    result = run_fisher_analysis(
        run, config("entropy_analysis.fisher_kernel.preconditioning=step"), folder=tmp_path / "step"
    )
    assert not result.failed_checks


def test_a_collapsed_policy_is_no_broken_sampler():
    """At 0.02 nats the rare tokens are absent from 64 sequences; the policy's own variance knows of them."""
    from entropy_core.scores import TokenStatistics
    from entropy_experiments.run.self_checks import surprisal_z_score

    p = 0.002
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    variance = p * np.log(p) ** 2 + (1 - p) * np.log(1 - p) ** 2 - entropy**2
    rng, scores = np.random.default_rng(0), []
    for _ in range(300):
        rare = rng.random((64, 3)) < p
        logprobs = np.where(rare, np.log(p), np.log(1 - p))
        ones = np.ones((64, 3))
        statistics = TokenStatistics(*(torch.tensor(x) for x in (logprobs, entropy * ones, variance * ones)))
        scores.append(surprisal_z_score(statistics))
    assert np.mean(np.array(scores) > 4) < 0.05, "an honest sampler is called broken"
    wrong = TokenStatistics(*(torch.tensor(x) for x in (0.5 * logprobs - 0.5, entropy * ones, variance * ones)))
    assert surprisal_z_score(wrong) > 4


@pytest.mark.long
def test_gpt2_and_qwen2_checkpoints_are_analysed_too(tmp_path):
    """Biases, Conv1D, learned positions and tied weights, fully trained: names, rows, split and kernel agree."""
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    from rl_training.train import run_training
    from tests.tiny_policy import character_tokenizer, tiny_train_config

    tokenizer = character_tokenizer()
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    models = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **special)),
        "qwen2": Qwen2ForCausalLM(
            Qwen2Config(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                **special,
            )
        ),
    }
    for name, model in models.items():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(5)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        run = run_training(
            tiny_train_config(
                tmp_path / name,
                tmp_path / f"run-{name}",
                lora={"enabled": False},
                training={"steps": 3, "save_every": 3},
                optimizer={"learning_rate": 2e-4},
            ),
            quiet=True,
        )
        step_p = config("entropy_analysis.fisher_kernel.preconditioning=step")
        result = run_fisher_analysis(run, step_p, folder=tmp_path / f"analysis-{name}")
        assert not result.failed_checks, name


def test_a_checkpoint_of_trls_own_trainer_is_analysed(tmp_path):
    """GRPOTrainer itself, with a linear schedule whose saved rate is the next step's: names rebuilt, rate from the log."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from rl_training.config import LoraConfig, TaskConfig
    from rl_training.models.load import add_lora, load_model_and_tokenizer
    from rl_training.tasks.task import load_task
    from tests.tiny_policy import save_tiny_policy

    settings = {
        "name": "chain_sum",
        "arguments": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        "size": 24,
        "heldout_size": 16,
        "reward": "tests.tiny_policy:even_start_reward",
    }
    task = load_task(TaskConfig(**settings))
    model, tokenizer = load_model_and_tokenizer(str(save_tiny_policy(tmp_path / "policy")), device="cpu")
    arguments = GRPOConfig(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        bf16=False,
        max_steps=4,
        save_steps=4,
        logging_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=8,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        add_lora(model, LoraConfig(r=4)),
        task.reward_functions,
        args=arguments,
        train_dataset=Dataset.from_list(task.train),
        processing_class=tokenizer,
    )
    trainer.train()
    told = [
        f"checkpoint.task={json.dumps(settings)}",
        "entropy_analysis.sampling.temperature=1.0",
        "entropy_analysis.sampling.max_completion_length=8",
        "entropy_analysis.sampling.completions_per_prompt=4",
    ]
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.record.sidecar is None
    rates = [state.lr for state in checkpoint.optimizer.values()]
    assert rates == pytest.approx([2.5e-4] * len(rates)), "the last step's rate, not the next one's 0"
    saved = {id(p): trainer.optimizer.state[p]["exp_avg_sq"] for p in trainer.model.parameters() if p.requires_grad}
    for (name, ours), theirs in zip(checkpoint.model.named_parameters(), trainer.model.named_parameters(), strict=True):
        if ours.requires_grad:
            assert theirs[0] == name
            assert torch.equal(checkpoint.optimizer[name].exp_avg_sq, saved[id(theirs[1])])
    result = run_fisher_analysis(tmp_path / "run", config(*told), folder=tmp_path / "analysis")
    assert not result.failed_checks and result.summary.predicted["rao_blackwell"].momentum.value != 0
