"""Sequences that a trainer trains on again: weighted by the scores they had when they were drawn, and never by guesswork."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer

from rl_training.config import EntropyProbeConfig
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.models.load import load_model_and_tokenizer
from rl_training.premises.drawn_policies import DrawnPolicies
from rl_training.sequences import RolloutSequence
from tests.rl_training.integrations.test_trl_integration import make_trainer
from tests.tiny_policy import save_tiny_policy

RATE = 3e-3  # far enough in one step for weights to matter


def score(model: torch.nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
    """S of one sequence, from its logits alone."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    return float(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum())


def tokens_of(batch: dict[str, Tensor]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    pairs = []
    for i in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        pairs.append((tuple(prompt.tolist()), tuple(completion.tolist())))
    return pairs


def run(trainer: GRPOTrainer, **probe: object) -> tuple[list[tuple[float, float]], list[str]]:
    """(effective sample size by the probe, by hand) of every observed step, and the probe's warnings.

    By hand: the score of every sequence right after it was generated, and today's, one sequence at a time.
    """
    config = EntropyProbeConfig(
        **{"mode": "simple", "preset": "accurate", "on_error": "raise", "eval_sequences": 8, **probe}
    )
    callback = attach_entropy_probe(trainer, config, console=False)
    drawn: dict[tuple, float] = {}
    wanted, found = [], []
    generate, observe = trainer._generate, callback._probe.observe
    model = trainer.model

    def generating(*args, **kwargs):
        out = generate(*args, **kwargs)
        for prompt, completion in zip(out[0], out[1], strict=True):
            drawn.setdefault((tuple(prompt), tuple(completion)), score(model, tuple(prompt), tuple(completion)))
        return out

    def observing(batch, *rest, **named):
        weights = []
        for n in range(len(batch)):
            prompt = tuple(batch.input_ids[n][batch.prompt_mask[n]].tolist())
            completion = tuple(batch.input_ids[n][batch.completion_mask[n]].tolist())
            weights.append(score(model, prompt, completion) - drawn[prompt, completion])
        w = torch.tensor(weights).double().softmax(0)
        wanted.append(float(1 / w.square().sum()))
        seen = observe(batch, *rest, **named)
        found.append(callback._probe._observation.effective_size())
        return seen

    trainer._generate, callback._probe.observe = generating, observing
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(w.message) for w in seen if "the entropy probe" in str(w.message)]
    return list(zip(found, wanted, strict=True)), said


def check(sizes: list[tuple[float, float]], stale: list[int], count: int = 8) -> None:
    assert [found for found, _ in sizes] == pytest.approx([wanted for _, wanted in sizes], rel=2e-3), sizes
    for step, (_, wanted) in enumerate(sizes):
        assert (wanted < 0.97 * count) == (step in stale), f"step {step}: {sizes}"


@pytest.mark.parametrize(
    ("settings", "probe", "stale"),
    [
        ({"num_iterations": 3}, {}, [1, 2, 4, 5]),
        ({"num_iterations": 3}, {"refresh_every": 2}, [1, 2]),  # steps 0, 2, 4
        ({"num_iterations": 2}, {"log_every": 2}, [0, 1, 2]),  # steps 1, 3, 5: each of a generation that was not probed
        (
            {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
            {},
            [1, 3, 5],
        ),
        ({"num_iterations": 2}, {"rollouts": "previous_step"}, [0, 1, 2, 3, 4]),
    ],
    ids=["iterations", "refreshed", "logged", "generations", "previous_step"],
)
def test_trls_own_reuse_is_weighted_by_scores_at_the_drawing(tiny_policy, tmp_path, settings, probe, stale):
    trainer = make_trainer(
        tiny_policy, tmp_path, max_steps=6, learning_rate=RATE, lr_scheduler_type="constant", **settings
    )
    sizes, said = run(trainer, **probe)
    assert not said, said
    check(sizes, stale)


class Replaying(GRPOTrainer):
    """Every third generation is the one of two steps ago."""

    def _generate_and_score_completions(self, inputs):
        kept = self.__dict__.setdefault("kept", [])
        if len(kept) % 3 == 2:
            out = kept[-2]
        else:
            out = super()._generate_and_score_completions(inputs)
        kept.append(out)
        return dict(out)


class HalfReplaying(Replaying):
    """Half of it is."""

    def _generate_and_score_completions(self, inputs):
        kept = self.__dict__.setdefault("kept", [])
        out = dict(GRPOTrainer._generate_and_score_completions(self, inputs))
        if len(kept) % 3 == 2:
            old = kept[-2]
            for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"):
                width = max(old[name].shape[-1], out[name].shape[-1])
                halves = ((old, slice(8)), (out, slice(8, 16)))
                out[name] = torch.cat([_wide(v[name][part], width, "prompt" in name) for v, part in halves])
        kept.append(out)
        return out


def _wide(values: Tensor, width: int, left: bool) -> Tensor:
    if values.dim() < 2:
        return values
    missing = width - values.shape[1]
    return torch.nn.functional.pad(values, (missing, 0) if left else (0, missing))


class Delaying(GRPOTrainer):
    """Each step trains on what was generated two steps before, so that most batches are new when they are trained on."""

    def _generate_and_score_completions(self, inputs):
        kept = self.__dict__.setdefault("kept", [])
        kept.append(super()._generate_and_score_completions(inputs))
        return dict(kept[max(0, len(kept) - 3)])


def test_batches_that_wait_before_they_are_trained_on_are_weighted_too(tiny_policy, tmp_path):
    trainer = make_trainer(tiny_policy, tmp_path, max_steps=6, learning_rate=RATE, lr_scheduler_type="constant")
    trainer.__class__ = Delaying
    sizes, said = run(trainer, eval_sequences=16)
    assert not said, said
    check(sizes, [1, 2, 3, 4, 5], 16)


class Skipping(Delaying):
    """The third step trains on a batch of the second that was never passed through the model."""

    def _generate_and_score_completions(self, inputs):
        kept = self.__dict__.setdefault("kept", [])
        if len(kept) == 3:
            return dict(kept[2])
        kept.append(GRPOTrainer._generate_and_score_completions(self, inputs))
        if len(kept) == 2:
            kept.append(GRPOTrainer._generate_and_score_completions(self, inputs))
        return dict(kept[min(1, len(kept) - 1)])


def test_a_batch_that_was_generated_and_set_aside_unscored_is_not_taken_for_todays(tiny_policy, tmp_path):
    trainer = make_trainer(tiny_policy, tmp_path, max_steps=3, learning_rate=RATE, lr_scheduler_type="constant")
    trainer.__class__ = Skipping
    sizes, said = run(trainer, eval_sequences=16)
    assert len(sizes) == 2 and all(found == pytest.approx(16) for _, found in sizes), sizes
    assert len(said) == 1 and "made no pass over" in said[0], said


@pytest.mark.parametrize("kind", [Replaying, HalfReplaying])
def test_a_trainer_that_trains_on_an_earlier_steps_batch_is_found_out(tiny_policy, tmp_path, kind):
    trainer = make_trainer(tiny_policy, tmp_path, max_steps=6, learning_rate=RATE, lr_scheduler_type="constant")
    trainer.__class__ = kind
    sizes, said = run(trainer, eval_sequences=16)
    assert not said, said
    check(sizes, [2, 5], 16)


def test_replays_of_what_was_never_scored_are_not_measured(tiny_policy, tmp_path):
    trainer = make_trainer(tiny_policy, tmp_path, max_steps=6, learning_rate=RATE, lr_scheduler_type="constant")
    trainer.__class__ = Replaying
    sizes, said = run(trainer, eval_sequences=8, refresh_every=2)  # steps 0, 2 (a replay of 0, half of it known), 4
    check(sizes, [1])
    trainer = make_trainer(
        tiny_policy, tmp_path / "never", max_steps=6, learning_rate=RATE, lr_scheduler_type="constant"
    )
    trainer.__class__ = Replaying
    sizes, said = run(trainer, log_every=3)  # steps 2 and 5 alone, replays both
    assert not sizes[:1] or len(sizes) == 1
    assert len(said) == 1 and "made no pass over" in said[0], said


def test_recorded_log_probabilities_in_half_precision_are_not_taken(tmp_path):
    """Long completions, bfloat16, a policy of large logits that does not move: all sequences count alike."""
    policy = save_tiny_policy(tmp_path / "policy", scale=20.0)
    trainer = make_trainer(
        policy, tmp_path, max_steps=4, learning_rate=1e-9, num_iterations=2, bf16=True, max_completion_length=150
    )
    recorded: list[Tensor] = []
    alone = load_model_and_tokenizer(str(policy), device="cpu")[0]  # outside of mixed precision
    compute_loss = trainer.compute_loss

    def watching(model, inputs, *args, **kwargs):
        recorded.append((inputs["old_per_token_logps"].double() * inputs["completion_mask"]).sum(1))
        own = torch.tensor([score(alone, *pair) for pair in tokens_of(inputs)])
        recorded[-1] = recorded[-1] - own.double()
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watching
    config = EntropyProbeConfig(mode="simple", preset="accurate", on_error="raise")
    callback = attach_entropy_probe(trainer, config, console=False)
    trainer.train()
    for change in callback.history:
        assert change.effective_sample_size > 15.99 and change.measured.effective_sample_size > 15.99
    by_record = [float(1 / (-off).softmax(0).square().sum()) for off in recorded]
    assert len(recorded) == 4 and min(by_record) < 14, (
        f"the records are as good as our own, the test is blind: {by_record}"
    )


# ---------------------------------------------------------------------- the memory alone
def sequence(prompt: int, completion: int, recorded: float | None = None) -> RolloutSequence:
    return RolloutSequence((prompt,), (completion, 7), drawn_score=recorded)


def test_a_likely_completion_that_comes_again_is_no_replay_unless_the_unlikely_are():
    memory = DrawnPolicies()
    first = [sequence(1, c) for c in range(4)]
    memory.remember(first, torch.tensor([-2.0, -30.0, -31.0, -32.0]), step=0)
    again = [sequence(1, 0), sequence(1, 9), sequence(1, 10)]
    found = memory.drawn(again, torch.tensor([-0.1, -30.0, -30.0]), step=1)
    assert found.scores is None and found.places == [0, 1, 2] and found.replayed == 0, "drawn again by today's policy"
    found = memory.drawn(first, torch.tensor([-0.1, -29.0, -31.0, -40.0]), step=1)
    assert found.scores.tolist() == [-2.0, -30.0, -31.0, -32.0] and found.replayed == 4
    found = memory.drawn(first[1:2] + again[1:], torch.tensor([-29.0, -30.0, -30.0]), step=1)
    assert found.scores.tolist() == [-30.0, -30.0, -30.0] and found.replayed == 1, "one old among new ones"
    many = DrawnPolicies()
    many.note([sequence(1, c) for c in range(1000)], 0)
    assert many.drawn([sequence(1, 5)], torch.tensor([-12.0]), 1).replayed == 0, "one of a thousand may well come again"
    assert many.drawn([sequence(1, 5)], torch.tensor([-20.0]), 1).unknown == 1, "seen, and never scored"


def test_a_score_is_of_the_step_in_which_its_sequence_was_first_seen():
    memory = DrawnPolicies()
    memory.note([sequence(1, 1)], 0)
    memory.remember([sequence(1, 1), sequence(1, 2)], torch.tensor([-30.0, -31.0]), 1)
    assert memory.known([sequence(1, 1), sequence(1, 2)], 2) == [sequence(1, 2)]
    assert memory.known([sequence(1, 2)], 1) == [], "of this very step"


def test_records_are_taken_where_they_were_seen_to_agree_and_doubted_where_not():
    fine, coarse = DrawnPolicies(), DrawnPolicies()
    today = torch.tensor([-30.0, -40.0])
    assert fine.drawn([sequence(1, 1, -30.001), sequence(1, 2, -40.0)], today, 0).scores is None
    found = fine.drawn([sequence(1, 3, -32.0), sequence(1, 4, -39.0)], today, 1)
    assert found.scores.tolist() == pytest.approx([-32.0, -39.0]) and not found.doubtful
    assert coarse.drawn([sequence(1, 1, -31.0), sequence(1, 2, -39.0)], today, 0).scores is None
    assert coarse.drawn([sequence(1, 3, -29.0), sequence(1, 4, -41.0)], today, 1).scores is None
    assert coarse.drawn([sequence(1, 5, -36.0), sequence(1, 6, -31.0)], today, 1).doubtful


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("rl_training.premises.drawn_policies._MOST_REMEMBERED", 10)
    memory = DrawnPolicies()
    for step in range(20):
        memory.remember([sequence(step, 1)], torch.tensor([-30.0]), step)
    assert len(memory._seen) == 10 and memory.known([sequence(0, 1)], 30) == [] != memory.known([sequence(19, 1)], 30)
    assert not math.isnan(memory._seen[next(iter(memory._seen))].score)
