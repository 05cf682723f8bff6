"""The trainer: exact gradients, the filtered buffer, checkpoints that resume bit by bit, a probe that changes nothing."""

import math
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import score_coefficients
from entropy_core.gradients import batch_gradients, trainable_parameters
from entropy_core.weighting import sequence_weights
from rl_training.algs.dr_grpo import DrGRPOConfig
from rl_training.errors import UserError
from rl_training.run.rollouts import read_rollouts
from rl_training.run.sidecar import read_sidecar
from rl_training.train import build_trainer, run_training
from tests.tiny_policy import tiny_train_config


class GradientSpy(TrainerCallback):
    """Keeps the first step's parameters and clipped gradients, by name."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.gradients, self.parameters = model, {}, {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.gradients:
            for name, p in trainable_parameters(self.model).items():
                self.gradients[name], self.parameters[name] = p.grad.clone(), p.detach().clone()


@pytest.mark.long
@pytest.mark.parametrize(
    ("normalizer", "micro_batch"), [("constant", 16), ("constant", 4), ("prompt_longest", 16), ("prompt_longest", 4)]
)
def test_the_loss_gradient_is_minus_the_recorded_weights_times_the_score_rows(
    tiny_policy, tmp_path, normalizer, micro_batch
):
    config = tiny_train_config(
        tiny_policy,
        tmp_path / "run",
        algorithm={"length_normalizer": normalizer},
        rollouts={"prompts_per_step": 8, "completions_per_prompt": 2, "max_completion_length": 64},
        optimizer={"micro_batch_size": micro_batch, "max_grad_norm": 1e9},
        training={"steps": 1, "save_every": 1},
        entropy_probe={"enabled": False},
    )
    trainer, _ = build_trainer(config)
    spy = GradientSpy(trainer.model)
    trainer.add_callback(spy)
    trainer.train()
    with torch.no_grad():
        for name, p in trainable_parameters(trainer.model).items():
            p.copy_(spy.parameters[name])
    rows = [row for row in read_rollouts(tmp_path / "run", 1) if row.status != "rejected"]
    assert len(rows) == 16
    longest: dict[int, int] = {}
    for r in rows:
        longest[r.prompt_index] = max(longest.get(r.prompt_index, 0), len(r.completion_ids))
    assert len(longest) == 8 and min(longest.values()) < 64 and len(set(longest.values())) > 1, "nothing to tell apart"
    batch = SequenceBatch.from_sequences(
        [r.prompt_ids for r in rows], [r.completion_ids for r in rows], [r.prompt_index for r in rows], 0
    )
    weights = torch.tensor([r.weight for r in rows], dtype=torch.float64)
    expected = sequence_weights(
        torch.tensor([r.reward for r in rows]),
        batch.prompt_index,
        batch.completion_lengths,
        "dr_grpo",
        64,
        normalizer,
    )
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-9)
    ours = batch_gradients(trainer.model, batch, [score_coefficients(batch, -weights)])[0]
    left = torch.cat([g.flatten() for g in spy.gradients.values()]).double()
    right = torch.cat([ours[name].flatten() for name in spy.gradients]).double()
    assert right.norm() > 0
    cosine = torch.dot(left, right) / (left.norm() * right.norm())
    assert cosine >= 0.9999999, (
        f"cosine {cosine}: a normaliser misses gradient accumulation, or advantages were shuffled"
    )
    assert abs(left.norm() / right.norm() - 1) < 1e-5, "the loss divides by another number than the weights"


def test_prompt_ids_travel_with_their_sequences_through_the_shuffle(tiny_policy, tmp_path):
    config = tiny_train_config(
        tiny_policy, tmp_path / "run", training={"steps": 1, "save_every": 1}, entropy_probe={"enabled": False}
    )
    trainer, task = build_trainer(config)
    seen, original = [], trainer.compute_loss

    def spy(model, inputs, *args, **kwargs):
        seen.append({key: inputs[key].clone() for key in ("prompt_ids", "prompt_mask", "prompt_index")})
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    tokenizer, prompts = trainer.processing_class, {row["prompt_index"]: row["prompt"] for row in task.train}
    order = [int(i) for part in seen for i in part["prompt_index"]]
    assert len(order) == 16 and order != sorted(order, key=order.index), "not shuffled, so this shows nothing"
    for part in seen:
        for ids, mask, index in zip(part["prompt_ids"], part["prompt_mask"], part["prompt_index"], strict=True):
            expected = tokenizer.apply_chat_template(prompts[int(index)], add_generation_prompt=True, return_dict=True)
            assert ids[mask.bool()].tolist() == expected["input_ids"]


def test_trained_groups_have_reward_differences_and_counts_add_up(tiny_policy, tmp_path):
    config = tiny_train_config(tiny_policy, tmp_path / "run", training={"steps": 2}, entropy_probe={"enabled": False})
    trainer, _ = build_trainer(config)
    trainer.train()
    for step in (1, 2):
        rows = read_rollouts(tmp_path / "run", step)
        logged = next(entry for entry in trainer.state.log_history if entry.get("step") == step)
        assert len(rows) == logged["buffer/generated"]
        for status in ("trained", "filler", "rejected"):
            assert sum(row.status == status for row in rows) == logged[f"buffer/{status}"]
        groups: dict[int, set] = {}
        for row in rows:
            if row.status == "trained":
                groups.setdefault(row.prompt_index, set()).add(row.reward)
            elif row.status == "filler":
                assert row.weight == 0.0
        assert groups and all(len(rewards) > 1 for rewards in groups.values())


def test_where_nothing_gives_gradient_the_buffer_is_filler_and_the_policy_stays(tiny_policy, tmp_path):
    config = tiny_train_config(
        tiny_policy,
        tmp_path / "run",
        task={"reward": "tests.rl_training.algs.test_dr_grpo:always_right"},
        training={"steps": 1, "save_every": 1},
        training_buffer={"max_refill_rounds": 1},
        entropy_probe={"enabled": False},
    )
    trainer, _ = build_trainer(config)
    before = {name: p.detach().clone() for name, p in trainable_parameters(trainer.model).items()}
    trainer.train()
    rows = read_rollouts(tmp_path / "run", 1)
    assert {row.status for row in rows} == {"filler", "rejected"}
    assert len(rows) == 2 * 16 and sum(row.status == "filler" for row in rows) == 16
    assert all(torch.equal(p, before[name]) for name, p in trainable_parameters(trainer.model).items())


def always_right(prompts, completions, **columns):
    return [1.0] * len(completions)


def adapter(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoint-{step}" / "adapter_model.safetensors")


@pytest.mark.long
def test_a_resumed_run_is_bit_identical_to_an_undisturbed_one(tiny_policy, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_training(tiny_train_config(tiny_policy, whole, training={"steps": 4}), quiet=True)
    run_training(tiny_train_config(tiny_policy, halves, training={"steps": 2}), quiet=True)
    resumed = {"steps": 4, "resume_from_checkpoint": str(halves / "checkpoint-2")}
    run_training(tiny_train_config(tiny_policy, halves, training=resumed), quiet=True)
    left, right = adapter(whole, 4), adapter(halves, 4)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, (
        f"{len(different)} tensors differ after resuming, e.g. {different[0]}: some random stream is not saved"
    )
    assert read_rollouts(whole, 4) == read_rollouts(halves, 4)
    assert len((halves / "metrics.jsonl").read_text().splitlines()) == 4
    assert torch.equal(
        torch.load(whole / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"][3]["exp_avg_sq"],
        torch.load(halves / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"][3]["exp_avg_sq"],
    )


@pytest.mark.long
def test_training_is_bit_identical_with_the_probe_on_and_off(tiny_policy, tmp_path):
    runs = {}
    for enabled in (True, False):
        runs[enabled] = tmp_path / str(enabled)
        config = tiny_train_config(
            tiny_policy, runs[enabled], training={"steps": 3}, entropy_probe={"enabled": enabled}
        )
        run_training(config, quiet=True)
    on, off = adapter(runs[True], 3), adapter(runs[False], 3)
    assert all(torch.equal(on[name], off[name]) for name in off), (
        "the probe consumed a random number or left a gradient"
    )
    assert read_rollouts(runs[True], 3) == read_rollouts(runs[False], 3)


def test_probe_predicts_what_the_step_does_and_its_parts_add_up(tiny_policy, tmp_path):
    config = tiny_train_config(
        tiny_policy,
        tmp_path / "run",
        optimizer={"learning_rate": 2e-4, "weight_decay": 0.1},
        training={"steps": 3},
        entropy_probe={
            "mode": "simple",
            "preset": "accurate",
            "rollouts": "fresh",
            "eval_sequences": 32,
            "completions_per_prompt": 2,
        },
    )
    trainer, _ = build_trainer(config)
    trainer.train()
    probed = [e for e in trainer.state.log_history if "entropy_probe/predicted" in e]
    assert len(probed) == 3
    for entry in probed:
        p = {
            key.removeprefix("entropy_probe/"): value
            for key, value in entry.items()
            if key.startswith("entropy_probe/")
        }
        assert p["predicted"] != 0
        assert p["batch"] + p["momentum"] + p["decay"] == pytest.approx(p["predicted"], rel=1e-3, abs=1e-8)
        # split is the exact derivative of the reweighted measurement: at this step size they agree but for curvature
        assert p["measured"] == pytest.approx(p["same_tokens"], rel=0.15, abs=2e-5), (
            "wrong sign, scale or a missing momentum"
        )
        assert 16 <= p["ess"] <= 32.001
    assert probed[0]["entropy_probe/momentum"] == 0.0 and probed[2]["entropy_probe/momentum"] != 0.0


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_failing_probe_is_loud_and_stops_nothing_but_itself(tiny_policy, tmp_path, monkeypatch, on_error):
    from rl_training.probe import observed_passes

    def broken(*args, **kwargs):
        raise TypeError("planted")

    monkeypatch.setattr(observed_passes, "fold_gradients", broken)
    config = tiny_train_config(tiny_policy, tmp_path / "run", entropy_probe={"on_error": on_error})
    trainer, _ = build_trainer(config)
    if on_error == "raise":
        with pytest.raises(TypeError, match="planted"):
            trainer.train()
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    loud = [w for w in caught if "entropy probe failed" in str(w.message)]
    assert len(loud) == 1 and "planted" in str(loud[0].message)
    assert trainer.state.global_step == 2


def test_checkpoint_says_what_optimizer_pt_does_not(tiny_policy, tmp_path):
    run = run_training(
        tiny_train_config(
            tiny_policy, tmp_path / "run", optimizer={"lr_scheduler": "linear"}, entropy_probe={"enabled": False}
        ),
        quiet=True,
    )
    sidecar = read_sidecar(run / "checkpoint-2")
    state = torch.load(run / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert sidecar is not None and sidecar.step == 2
    assert [len(names) for names in sidecar.optimizer_parameter_names] == [
        len(g["params"]) for g in state["param_groups"]
    ]
    assert state["param_groups"][0]["lr"] == 0.0, "the saved group already holds the end of the schedule"
    assert sidecar.learning_rates_used[0] == pytest.approx(5e-4)
    assert sidecar.sampling.temperature == 1.0 and sidecar.sampling.max_completion_length == 8
    assert sum(sidecar.pass_rates["passes"]) + sum(sidecar.pass_rates["failures"]) > 0


def test_an_existing_run_is_not_overwritten(tiny_policy, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        run_training(tiny_train_config(tiny_policy, tmp_path / "run"), quiet=True)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("top_p", 0.9),
        ("top_k", 50),
        ("beta", 0.04),
        ("num_iterations", 2),
        ("scale_rewards", "group"),
        ("min_p", 0.1),
        ("max_grad_norm", None),
        ("max_grad_norm", math.inf),
        ("max_grad_norm", -1.0),
        ("max_grad_norm", math.nan),
    ],  # fmt: skip
)
def test_settings_under_which_the_weights_would_not_be_exact_are_refused(tmp_path, setting, value):
    with pytest.raises(UserError, match=setting):
        DrGRPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            num_generations=4,
            per_device_train_batch_size=8,
            **{setting: value},
        )


@pytest.mark.long
def test_resuming_never_mixes_two_runs(tiny_policy, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for run in (first, second):
        config = tiny_train_config(tiny_policy, run, training={"steps": 2}, entropy_probe={"enabled": False})
        run_training(config, quiet=True)
    before = (second / "metrics.jsonl").read_text()

    def resume(checkpoint, output, steps=4):
        settings = {"steps": steps, "resume_from_checkpoint": str(checkpoint)}
        run_training(
            tiny_train_config(tiny_policy, output, training=settings, entropy_probe={"enabled": False}), quiet=True
        )

    with pytest.raises(UserError, match="another run"):
        resume(first / "checkpoint-2", second)
    assert (second / "metrics.jsonl").read_text() == before
    with pytest.raises(UserError, match="has done 2 steps already"):
        resume(first / "checkpoint-2", first, steps=2)
    resume(first / "checkpoint-2", first)
    with pytest.raises(UserError, match="later than"):
        resume(first / "checkpoint-2", first)
    with (second / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 3, "lo')  # the run was killed while it wrote this line
    resume(second / "checkpoint-2", second)
    assert len((second / "metrics.jsonl").read_text().splitlines()) == 4
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "entropy_experiments.json"):
        path = second / "checkpoint-4" / name
        whole = path.read_bytes()
        path.unlink()
        with pytest.raises(UserError, match=path.stem):
            resume(second / "checkpoint-4", second, steps=5)
        for damaged in (whole[:-9], pickle.dumps(print)):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=path.stem):
                resume(second / "checkpoint-4", second, steps=5)
        path.write_bytes(whole)


def test_diverging_training_ends_in_one_clear_line(tiny_policy, tmp_path):
    config = tiny_train_config(
        tiny_policy,
        tmp_path / "run",
        optimizer={"learning_rate": 1e20},
        training={"steps": 3},
        entropy_probe={"enabled": False},
    )
    with pytest.raises(UserError, match="diverged"):
        run_training(config, quiet=True)


def test_unscorable_completions_neither_pass_nor_fail(tiny_policy, tmp_path):
    """A group of one scored completion and three None has no reward differences, whatever 0 would suggest."""
    from datasets import Dataset

    from rl_training.algs.dr_grpo import DrGRPOTrainer
    from rl_training.config import LoraConfig
    from rl_training.models.load import add_lora, load_model_and_tokenizer

    model, tokenizer = load_model_and_tokenizer(str(tiny_policy), device="cpu")
    args = DrGRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=4,
        max_refill_rounds=0,
        gradient_checkpointing=False,
        report_to=[],
    )
    trainer = DrGRPOTrainer(
        model=add_lora(model, LoraConfig(r=2)),
        args=args,
        processing_class=tokenizer,
        reward_funcs=[lambda completions, **_: [1.0, None, None, None] * (len(completions) // 4)],
        train_dataset=Dataset.from_list([{"prompt": f"{i}", "prompt_index": i} for i in range(4)]),
    )
    trainer.train()
    assert trainer.state.log_history[0]["buffer/filler"] == 8
    assert trainer.pass_rates.failures.sum() == 0 and trainer.pass_rates.passes.sum() == 2


@pytest.mark.parametrize(
    "settings",
    [{"entropy_coef": 0.1}, {"optim": "adafactor"}, {"generation_kwargs": {"top_p": 0.5}}],
)
def test_further_settings_that_would_break_the_analysis_are_refused(tmp_path, settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        DrGRPOConfig(
            output_dir=str(tmp_path), use_cpu=True, num_generations=4, per_device_train_batch_size=8, **settings
        )
