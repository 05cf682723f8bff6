"""Completions with tokens that the policy did not draw, and models that get more than tokens, in a GRPOTrainer's steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOTrainer

from entropy_core.batch import SequenceBatch
from entropy_core.entropy import score_coefficients
from entropy_core.gradients import batch_gradients, trainable_parameters
from entropy_core.weighting import sequence_weights
from rl_training.config import EntropyProbeConfig
from rl_training.errors import UserError
from rl_training.generation.drawn_tokens import GeneratedMasks
from rl_training.generation.model_inputs import row_beyond_text
from rl_training.generation.rollout_sequences import to_training_sequences
from rl_training.integrations.trl import attach_entropy_probe
from rl_training.integrations.trl_rollouts import StepRollouts
from rl_training.run.rollouts import SCHEMA, read_rollouts, rollouts_path
from rl_training.sampling import SamplingConfig
from rl_training.sequences import RolloutSequence
from rl_training.train import build_trainer
from tests.oracle.comparison import assert_named_close
from tests.oracle.environment import drawn_terms
from tests.rl_training.integrations.test_trl_integration import check_same_tokens, logged, make_trainer
from tests.rl_training.integrations.test_trl_rollouts import fake_trainer, micro_batch, pass_through
from tests.rl_training.two_turns import two_turns
from tests.tiny_policy import tiny_train_config

SAMPLING = SamplingConfig(1.0, 12, (1,), 0)


# ---------------------------------------------------------------- micro-batches by hand
def with_tools() -> dict[str, torch.Tensor]:
    """Completions of 3 and 5 tokens: the second's middle ones and the last came from a tool."""
    inputs = micro_batch([3, 5])
    inputs["tool_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 1, 0]])
    return inputs


@pytest.mark.parametrize(
    ("loss_type", "divisors"), [("dr_grpo", (8, 8)), ("grpo", (6, 4)), ("bnpo", (5, 5)), ("dapo", (5, 5))]
)
def test_foreign_tokens_are_handed_over_as_such_and_count_in_no_length(loss_type: str, divisors: tuple) -> None:
    trainer = fake_trainer(loss_type)
    _, trained = pass_through(trainer, StepRollouts(trainer), [with_tools()])
    assert [s.completion_ids for s in trained] == [(10, 11, 12), (15, 16, 17, 18, 19)], (
        "foreign tokens are conditioned on"
    )
    assert [s.drawn for s in trained] == [None, (True, False, False, True, False)]
    assert [s.weight for s in trained] == pytest.approx([1.5 / divisors[0], -0.5 / divisors[1]])


def test_scores_and_token_advantages_are_over_drawn_tokens() -> None:
    inputs = with_tools()
    inputs["old_per_token_logps"] = torch.full((2, 5), -0.5)
    inputs["advantages"] = torch.tensor([[1.0, 3.0, 2.0, 9.0, 9.0], [1.0, 7.0, 7.0, 5.0, 7.0]])
    trainer = fake_trainer()
    _, trained = pass_through(trainer, StepRollouts(trainer), [inputs])
    assert [s.drawn_score for s in trained] == [-1.5, -1.0] and [s.advantage for s in trained] == [2.0, 3.0]


def test_a_sequence_in_which_nothing_was_drawn_is_left_out() -> None:
    inputs = with_tools()
    inputs["tool_mask"][1] = 0
    trainer = fake_trainer()
    generated, trained = pass_through(trainer, StepRollouts(trainer), [inputs])
    assert [s.completion_ids for s in generated] == [(10, 11, 12)] and generated == trained


def test_cut_completions_that_are_masked_out_keep_their_drawn_tokens() -> None:
    """Of the second both masks are emptied; its end is known by the padding, its drawn tokens from generation."""
    inputs, trainer = with_tools(), fake_trainer()
    trainer.args.mask_truncated_completions = True
    trainer.processing_class = SimpleNamespace(pad_token_id=0)
    drawn = [[1, 1, 1], [1, 0, 0, 1]]
    trainer._generate = lambda prompts: ([], [[10, 11, 12], [15, 16, 17, 18]], drawn, [], None, {}, None, [])
    rollouts = StepRollouts(trainer)
    trainer._generate([])
    inputs["completion_ids"][1, 4] = 0
    for name in ("completion_mask", "tool_mask"):
        inputs[name][1] = 0
    _, trained = pass_through(trainer, rollouts, [inputs])
    assert trained[1].completion_ids == (15, 16, 17, 18) and trained[1].drawn == (True, False, False, True)
    assert trained[1].weight == 0.0
    unknown = GeneratedMasks(SimpleNamespace(args=SimpleNamespace(mask_truncated_completions=True)))
    with pytest.raises(ValueError, match="mask_truncated_completions=False"):
        unknown.of([15, 16, 17, 18])


def test_a_short_masked_completion_ends_before_its_padding() -> None:
    inputs, trainer = micro_batch([2, 4]), fake_trainer()
    trainer.processing_class = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    inputs["completion_mask"][0] = 0
    _, trained = pass_through(trainer, StepRollouts(trainer), [inputs])
    assert trained[0].completion_ids == (10, 11), "padding was taken for drawn tokens"


@pytest.mark.parametrize(
    "name", ["pixel_values", "input_features", "image_sizes", "num_images", "encoder_input_ids", "token_type_ids"]
)
def test_inputs_beyond_text_are_refused_by_name(name: str) -> None:
    trainer = fake_trainer()
    inputs = {**micro_batch([2, 4]), name: [1, 1] if name == "num_images" else torch.ones(2, 8)}
    with pytest.raises(ValueError, match=name):
        pass_through(trainer, StepRollouts(trainer), [inputs])
    harmless = {**micro_batch([2, 4]), "token_type_ids": torch.zeros(2, 8), "image_sizes": None, "num_images": []}
    assert len(pass_through(trainer, StepRollouts(trainer), [harmless])[1]) == 2


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "2+2="}, None),
        ({"prompt": [{"role": "user", "content": "2+2="}]}, None),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "2+2="}]}], "image": None}, None),
        ({"prompt": [{"role": "user", "content": [{"type": "video", "video": "a"}]}]}, "video"),
        ({"prompt": "What is it?", "images": ["a"]}, "images"),
        ({"prompt": "What is said?", "audio": [0.1]}, "audio"),
    ],
)
def test_rows_of_more_than_text_are_told(row: dict, kind: str | None) -> None:
    assert row_beyond_text(row) == kind


# ---------------------------------------------------------------- TRL's own trainer
class BeforeTheStep(TrainerCallback):
    """Hands the step's sequences to `look` before the optimizer moves."""

    def __init__(self, trainer: GRPOTrainer, look: Any) -> None:
        self.rollouts, self.look = StepRollouts(trainer), look

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rollouts.clear()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look(self.rollouts.take()[1])


def with_environment(trainer: GRPOTrainer) -> GRPOTrainer:
    trainer.rollout_func = two_turns
    return trainer


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo", "bnpo", "dapo"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "cut_ones_masked"])
def test_minus_the_weights_times_the_scores_is_the_trainers_own_gradient(
    tiny_policy, tmp_path, loss_type: str, masked: bool
) -> None:
    trainer = make_trainer(
        tiny_policy, tmp_path, loss_type=loss_type, max_steps=1, max_grad_norm=1e9, gradient_accumulation_steps=2,
        max_completion_length=12, mask_truncated_completions=masked,
    )  # fmt: skip
    found: dict[str, Any] = {}

    def look(sequences: list[RolloutSequence]) -> None:
        assert len(sequences) == 32
        kinds = {(s.drawn is None, s.drawn is not None and s.drawn[-1]) for s in sequences}
        assert len(kinds) >= 2 and any(s.drawn is not None for s in sequences), "the environment was silent"
        training = to_training_sequences(sequences, SAMPLING, torch.device("cpu"))
        formula = torch.tensor([s.weight for s in sequences], dtype=torch.float64)
        assert training.weights is not None and bool((formula == 0).any()) >= masked
        read = formula[:, None] * training.batch.completion_mask
        torch.testing.assert_close(training.weights, read, rtol=1e-5, atol=1e-9)
        model = trainer.accelerator.unwrap_model(trainer.model)
        found["real"] = {name: p.grad.clone() for name, p in trainable_parameters(model).items()}
        objective = score_coefficients(training.batch, -formula)
        found["rebuilt"] = batch_gradients(model, training.batch, [objective])[0]

    trainer.add_callback(BeforeTheStep(with_environment(trainer), look))
    trainer.train()
    assert_named_close(found["rebuilt"], found["real"], 1e-4, "foreign tokens, or a normaliser of the loss")


@pytest.mark.parametrize("probe", [{}, {"mode": "attribution", "fused": True}], ids=["plain", "attribution_fused"])
def test_the_probe_goes_on_through_tool_results(tiny_policy, tmp_path, probe: dict) -> None:
    lora = bool(probe)  # the score term comes out of adapters
    trainer = with_environment(
        make_trainer(tiny_policy, tmp_path, lora=lora, loss_type="dr_grpo", max_completion_length=12)
    )
    entropies = []

    def look(sequences: list[RolloutSequence]) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for s in sequences:
                mask = list(s.drawn or [True] * len(s.completion_ids))
                terms = drawn_terms(model, list(s.prompt_ids), list(s.completion_ids), mask)[1]
                sums += torch.tensor([float(terms.double().sum()), len(terms)], dtype=torch.float64)
        entropies.append(float(sums[0] / sums[1]))

    trainer.add_callback(BeforeTheStep(trainer, look))
    config = EntropyProbeConfig(
        **{"mode": "simple", "preset": "accurate", "on_error": "raise", "eval_sequences": 16, **probe}
    )
    callback = attach_entropy_probe(trainer, config, console=False)
    trainer.train()
    entries = logged(trainer)
    assert [entry["entropy"] for entry in entries] == pytest.approx(entropies, rel=1e-5)
    if not probe:
        check_same_tokens(entries)
        return
    for change in callback.history:
        assert change.shares is not None and float(change.shares.abs().sum()) > 0


def test_fresh_rollouts_cannot_run_an_environment(tiny_policy, tmp_path) -> None:
    config = EntropyProbeConfig(mode="simple", preset="accurate", rollouts="fresh")
    with pytest.raises(UserError, match=r"rollout_func.*rollouts=current"):
        attach_entropy_probe(with_environment(make_trainer(tiny_policy, tmp_path)), config, console=False)
    with pytest.raises(UserError, match="images"):
        trainer = make_trainer(tiny_policy, tmp_path)
        trainer.train_dataset = Dataset.from_list([{"prompt": "a", "images": ["b"]}])
        attach_entropy_probe(trainer, config, console=False)


@pytest.mark.parametrize(
    ("name", "values", "refused"),
    [
        ("token_type_ids", lambda ids: torch.ones_like(ids), True),
        ("token_type_ids", lambda ids: torch.zeros_like(ids), False),
        ("mm_token_type_ids", lambda ids: ids % 2, True),
        ("marks_of_a_judge", lambda ids: torch.ones(len(ids)), False),
    ],
)
def test_what_a_model_gets_beside_tokens_is_seen_at_its_call(
    tiny_policy, tmp_path, name: str, values: Any, refused: bool
) -> None:
    """An input that never reaches the model is nobody's business; one that does is refused by its name."""
    trainer = make_trainer(tiny_policy, tmp_path, max_steps=1)
    original = trainer._generate_and_score_completions

    def with_more(inputs: Any) -> Any:
        output = original(inputs)
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        return {**output, name: values(ids)}

    trainer._generate_and_score_completions = with_more
    attach_entropy_probe(trainer, EntropyProbeConfig(mode="simple", preset="accurate", on_error="warn"), console=False)
    if refused:
        with pytest.warns(RuntimeWarning, match=f"gets {name} beside its tokens"):
            trainer.train()
    else:
        trainer.train()
    assert bool(logged(trainer)[0]) is not refused, "training goes on, with or without the probe"


def test_what_a_wrapper_of_the_model_adds_is_seen_too(tiny_policy, tmp_path) -> None:
    """A trainer that calls its model with embeddings of its own making."""
    model = make_trainer(tiny_policy, tmp_path, max_steps=1).model.train()
    fake = fake_trainer()
    fake.compute_loss = lambda m, inputs: m(inputs_embeds=m.get_input_embeddings()(inputs["completion_ids"]))
    fake.model, fake.accelerator.unwrap_model = model, lambda m: m
    rollouts = StepRollouts(fake)
    fake.compute_loss(model, micro_batch([2, 4]))
    with pytest.raises(ValueError, match="inputs_embeds"):
        rollouts.take()


# ---------------------------------------------------------------- DrGRPOTrainer
@pytest.mark.long
@pytest.mark.parametrize("normalizer", ["constant", "prompt_longest"])
def test_dr_grpo_trains_on_tool_results_and_records_which_tokens_were_drawn(tiny_policy, tmp_path, normalizer) -> None:
    config = tiny_train_config(
        tiny_policy, tmp_path / "run",
        algorithm={"length_normalizer": normalizer},
        rollouts={"prompts_per_step": 8, "completions_per_prompt": 2, "max_completion_length": 12},
        optimizer={"micro_batch_size": 4, "max_grad_norm": 1e9},
        training={"steps": 2, "save_every": 2},
        entropy_probe={"mode": "simple", "preset": "accurate", "rollouts": "current", "eval_sequences": 16},
    )  # fmt: skip
    trainer, _ = build_trainer(config)
    trainer.rollout_func = two_turns
    before: dict[str, Any] = {}

    def look(sequences: list[RolloutSequence]) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        before.setdefault("real", {n: p.grad.clone() for n, p in trainable_parameters(model).items()})
        before.setdefault("weights", {n: p.detach().clone() for n, p in trainable_parameters(model).items()})

    trainer.add_callback(BeforeTheStep(trainer, look))
    trainer.train()
    rows = [row for row in read_rollouts(tmp_path / "run", 1) if row.status != "rejected"]
    drawn = [row.drawn for row in rows]
    assert sum(mask is not None and not all(mask) for mask in drawn) > 4
    batch = SequenceBatch.from_sequences(
        [r.prompt_ids for r in rows], [r.completion_ids for r in rows], [r.prompt_index for r in rows], 0,
        drawn=drawn,
    )  # fmt: skip
    weights = torch.tensor([r.weight for r in rows], dtype=torch.float64)
    rewards = torch.tensor([r.reward for r in rows])
    lengths = batch.completion_lengths
    wanted = sequence_weights(rewards, batch.prompt_index, lengths, "dr_grpo", 12, normalizer)
    torch.testing.assert_close(weights, wanted, rtol=1e-5, atol=1e-9)
    model = trainer.accelerator.unwrap_model(trainer.model)
    with torch.no_grad():
        for name, p in trainable_parameters(model).items():
            p.copy_(before["weights"][name])
    rebuilt = batch_gradients(model, batch, [score_coefficients(batch, -weights)])[0]
    assert_named_close(rebuilt, before["real"], 1e-4, "the trainer's gradient is not −Σ w ∇S over drawn tokens")
    first = [row for row in read_rollouts(tmp_path / "run", 2) if row.round == 0]
    assert trainer.unfiltered_rollouts == first
    assert len(logged(trainer)) == 2


def test_dr_grpo_refuses_what_it_would_drop(tiny_policy, tmp_path, monkeypatch) -> None:
    config = tiny_train_config(tiny_policy, tmp_path / "run", entropy_probe={"enabled": False})
    trainer, _ = build_trainer(config)
    original = GRPOTrainer._generate_and_score_completions

    def with_images(self: Any, rows: Any) -> Any:
        return {**original(self, rows), "pixel_values": torch.ones(3, 4), "num_images": [1] * len(rows)}

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", with_images)
    with pytest.raises(UserError, match="num_images, pixel_values"):
        trainer.train()


def test_rollouts_of_older_runs_are_read(tmp_path) -> None:
    old = pa.schema([field for field in SCHEMA if field.name != "completion_mask"])
    row = {"step": 1, "round": 0, "rank": 0, "status": "trained", "prompt_index": 0, "draw_probability": 0.1}
    row |= {
        "prompt_ids": [3],
        "completion_ids": [1, 2],
        "completion": "a",
        "reward": 1.0,
        "advantage": 0.5,
        "weight": 0.1,
    }
    assert set(row) == set(old.names)
    path = rollouts_path(tmp_path, 1)
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist([row], schema=old), path)
    assert read_rollouts(tmp_path, 1)[0].completion_ids == (1, 2)
