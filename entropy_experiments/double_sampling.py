"""Two independent buffers at a checkpoint: a filtered training buffer and an unfiltered evaluation buffer.

One batch in both roles would add the t = t' terms (K(t, t) > 0) and bias every delta H. The evaluation buffer is drawn
without looking at any reward; rewards are filled in afterwards, for the report alone. Either side may be sequences of one's
own or recorded ones instead (entropy_experiments/buffers/custom.py, buffers/dumps). See docs/theory/double-sampling.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from entropy_core.weighting import advantages, sequence_weights
from entropy_experiments.buffers.apart import require_other_prompts, require_other_sequences
from entropy_experiments.buffers.custom import (
    PromptNumbers,
    given_rollouts,
    read_custom_sequences,
    reference_rollouts,
)
from entropy_experiments.buffers.dumps.given import GivenSide, Side, advantage_weights, given_side
from entropy_experiments.buffers.dumps.read import is_dump
from entropy_experiments.buffers.sampling_plan import SamplingPlan
from entropy_experiments.buffers.saved import (
    recorded_evaluation,
    recorded_training,
    refuse_drawing,
    refuse_foreign,
    refuse_other_vocabulary,
)
from entropy_experiments.checkpoint_loader import Checkpoint
from entropy_experiments.config import BuffersConfig, FisherAnalysisConfig
from entropy_experiments.run.reporter import SILENT, Reporter
from rl_training.errors import UserError
from rl_training.filtered_buffer import CollectionCounts, FilterRules, GroupsWanted, collect_filtered
from rl_training.sampling import Policy, Rollouts, draw, score
from rl_training.tasks.difficulty import PassRates

# Offsets that keep the random streams of the two buffers apart for one seed.
_TRAINING_STREAM, _EVALUATION_STREAM = 1_000_003, 2_000_003


@dataclass(frozen=True)
class TrainingBuffer:
    """Columns of the kernel, each sequence with its advantage and weight, and what their collection cost.

    notes: what has to be said of recorded sequences, on either side.
    """

    rollouts: Rollouts
    counts: CollectionCounts
    notes: tuple[str, ...] = ()

    @property
    def advantages(self) -> torch.Tensor | None:
        """(N,) float64 A_i; None where a sequence has none (given sequences without rewards)."""
        return _known(s.advantage for s in self.rollouts)

    @property
    def weights(self) -> torch.Tensor | None:
        """(N,) float64 w_i; None for given sequences that have neither weights nor rewards: then there is no step."""
        return _known(s.weight for s in self.rollouts)


def _known(values: Iterable[float]) -> torch.Tensor | None:
    found = torch.tensor(list(values), dtype=torch.float64)
    return None if bool(found.isnan().any()) else found


class Buffers(NamedTuple):
    """Rows and columns of the kernel."""

    evaluation: Rollouts
    training: TrainingBuffer


def draw_buffers(
    checkpoint: Checkpoint,
    plan: SamplingPlan,
    config: FisherAnalysisConfig,
    reporter: Reporter = SILENT,
) -> Buffers:
    """Draw, or read, both buffers as `entropy_analysis.sampling` says; no prompt is in both unless same_prompts says so.

    The evaluation prompts are chosen before the training buffer is drawn, so that no reward influences them.

    Raises:
        UserError: for files with bad lines, prompts that are not available, and buffers that share prompts unasked.
    """
    sampling = config.entropy_analysis.sampling
    refuse_drawing(checkpoint, sampling)
    evaluation, training, notes = given_buffers(checkpoint, plan, config)
    reporter.stage("drawing the training buffer")
    if evaluation is not None:
        rows = evaluation.prompt_row
    else:
        rows = choose_evaluation_rows(plan, config, training.rollouts.prompt_index if training else ())
    if training is None:
        training = sample_training_batch(checkpoint, plan, config, [] if sampling.same_prompts else rows)
    refuse_foreign(training.rollouts, sampling)
    if not sampling.same_prompts:
        require_other_prompts(rows, training.rollouts, sampling)
    reporter.stage("drawing the evaluation buffer")
    if evaluation is None:
        rows = rows_of(training.rollouts, config) if sampling.same_prompts else rows
        evaluation = sample_evaluation_batch(checkpoint, plan, config, rows)
    require_other_sequences(evaluation, training.rollouts, sampling)
    for rollouts in (evaluation, training.rollouts):
        refuse_other_vocabulary(checkpoint, rollouts)
    training = replace(training, notes=(*notes, *training.notes))
    for note in training.notes:
        reporter.note(note)
    return Buffers(evaluation, training)


def given_buffers(
    checkpoint: Checkpoint, plan: SamplingPlan, config: FisherAnalysisConfig
) -> tuple[Rollouts | None, TrainingBuffer | None, tuple[str, ...]]:
    """(evaluation, training, what has to be said of the first): sides that a file or the run's own step holds; None: drawn."""
    sampling = config.entropy_analysis.sampling
    numbers = PromptNumbers([*plan.task.train, *plan.task.heldout])
    evaluation = training = None
    notes: tuple[str, ...] = ()
    if sampling.eval_sequences_path is not None:
        evaluation, notes = custom_evaluation(checkpoint, plan, config, numbers)
    if sampling.train_sequences_path is not None:
        training = custom_training(checkpoint, plan, config, numbers)
    if sampling.eval_prompts == "from_run":
        if sampling.train_prompts == "from_run":
            training = sample_training_batch(checkpoint, plan, config, [])
        evaluation = recorded_evaluation(checkpoint, plan, config, training.rollouts.prompt_index if training else ())
    return evaluation, training, notes


def choose_evaluation_rows(
    plan: SamplingPlan, config: FisherAnalysisConfig, keep_out: Collection[int] = ()
) -> list[dict[str, Any]]:
    """Task rows of the evaluation buffer, chosen before the training buffer is drawn, so that no reward influences them.

    Args:
        keep_out: numbers of prompts that are not taken, those of a given training buffer.

    Returns:
        As many rows as the buffer needs; none under same_prompts, where they are the training buffer's own.

    Raises:
        UserError: when the split has no prompts.
    """
    sampling = config.entropy_analysis.sampling
    if sampling.same_prompts:
        return []
    split = plan.task.heldout if sampling.eval_split == "heldout" else plan.task.train
    pool = [row for row in split if row["prompt_index"] not in keep_out]
    if not pool:
        raise UserError(
            f"the task has no {sampling.eval_split} prompts for the evaluation buffer: give it a larger heldout_size, or set "
            "entropy_analysis.sampling.eval_split=train"
        )
    return _arranged(pool, config)


def rows_of(training: Rollouts, config: FisherAnalysisConfig) -> list[dict[str, Any]]:
    """The training buffer's own prompts, for an evaluation buffer of fresh completions of them."""
    return _arranged(list({row["prompt_index"]: row for row in training.prompt_row}.values()), config)


def _arranged(pool: list[dict[str, Any]], config: FisherAnalysisConfig) -> list[dict[str, Any]]:
    """As many rows as the buffer needs: distinct prompts first, then the same again (not for references: they are equal)."""
    settings = config.entropy_analysis
    count = -(-settings.eval_batch_size // settings.sampling.eval_completions_per_prompt)
    if settings.sampling.eval_completions == "reference":
        count = min(count, len(pool))
    order = np.arange(len(pool))
    if settings.sampling.eval_prompts == "random":
        order = np.random.default_rng(config.seed + _EVALUATION_STREAM).permutation(len(pool))
    return [pool[i] for i in np.resize(order, count)]


def sample_evaluation_batch(
    checkpoint: Checkpoint,
    plan: SamplingPlan,
    config: FisherAnalysisConfig,
    rows: list[dict[str, Any]],
) -> Rollouts:
    """The unfiltered buffer: completions of `rows`, sampled or their references; rewards are not used."""
    settings = config.entropy_analysis
    if settings.sampling.eval_completions == "reference":
        return reference_rollouts(checkpoint.tokenizer, rows, plan, "evaluation")
    each, seed = settings.sampling.eval_completions_per_prompt, config.seed + _EVALUATION_STREAM + 1
    rollouts = draw(checkpoint.model, checkpoint.tokenizer, rows, each, plan.sampling_config, seed, "evaluation")
    return rollouts[: settings.eval_batch_size]


def sample_training_batch(
    checkpoint: Checkpoint,
    plan: SamplingPlan,
    config: FisherAnalysisConfig,
    keep_out: list[dict[str, Any]],
) -> TrainingBuffer:
    """The filtered buffer, by the run's own pass rates and rules, with Dr. GRPO's weights; `keep_out` are not drawn.

    N in the weights is the buffer's size as asked for, as in training: groups that could not be had carry no gradient. With
    train_completions=reference: the prompts' own answers, without weights.

    Args:
        keep_out: task rows whose prompts are not drawn, those of the evaluation buffer.

    Raises:
        UserError: when no training prompt is left, or none gives gradient.
    """
    settings, record = config.entropy_analysis, checkpoint.record
    if settings.sampling.train_prompts == "from_run":
        return _buffer_of_run(record.run_dir, record.step, plan)
    excluded = {row["prompt_index"] for row in keep_out}
    places = [i for i, row in enumerate(plan.task.train) if row["prompt_index"] not in excluded]
    if not places:
        raise UserError("no training prompt is left beside the evaluation buffer: give the task a larger size")
    fixed = settings.sampling.train_prompts == "fixed_set"
    if settings.sampling.train_completions == "reference":
        order = places if fixed else np.random.default_rng(config.seed + _TRAINING_STREAM).permutation(places)
        rows = [plan.task.train[i] for i in order[: settings.train_batch_size]]
        answers = reference_rollouts(checkpoint.tokenizer, rows, plan, "trained")
        return TrainingBuffer(answers, CollectionCounts(kept=len(answers)))
    prompts = settings.train_batch_size // plan.completions_per_prompt
    places = places[:prompts] if fixed else places
    rates, rules = _filter_of_run(checkpoint, len(plan.task.train))
    if fixed:
        rules = replace(rules, difficulty_weighting=False)
    rollouts, counts = collect_filtered(
        Policy(checkpoint.model, checkpoint.tokenizer, plan.sampling_config),
        [plan.task.train[i] for i in places],
        lambda drawn: score(drawn, plan.task.reward_functions, plan.trainer_state),
        rates.subset(places),
        GroupsWanted(min(prompts, len(places)), plan.completions_per_prompt),
        config.seed + _TRAINING_STREAM,
        replace(rules, max_refill_rounds=0 if fixed else settings.sampling.max_refill_rounds),
    )
    gains, weights = _dr_grpo(rollouts, plan, settings.sampling)
    weights = weights * (len(rollouts) / settings.train_batch_size)
    return TrainingBuffer(rollouts.with_values(advantage=gains.tolist(), weight=weights.tolist()), counts)


def _filter_of_run(checkpoint: Checkpoint, prompts: int) -> tuple[PassRates, FilterRules]:
    """Pass rates and rules that the run itself chose prompts by; evenly drawn and filtered where it recorded none."""
    rates, sidecar = PassRates(prompts), checkpoint.record.sidecar
    if sidecar is None:
        return rates, FilterRules()
    if len(sidecar.pass_rates["passes"]) == rates.size:
        rates.load_state_dict(sidecar.pass_rates)
    return rates, FilterRules(sidecar.algorithm.difficulty_weighting, sidecar.algorithm.reject_zero_advantage)


def _dr_grpo(
    rollouts: Rollouts, plan: SamplingPlan, sampling: BuffersConfig, groups: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, weights) of scored rollouts, N their number; both 0 for a completion that no function judged, as in TRL, and
    the weight of one that the run masked out. groups: (N,) which ones share a mean, where not those of one prompt.
    """
    judged = torch.tensor([r is not None for r in rollouts.reward])
    rewards = torch.tensor([0.0 if r is None else float(r) for r in rollouts.reward], dtype=torch.float64)
    index = torch.tensor(rollouts.prompt_index) if groups is None else groups
    for prompt in index[~judged].unique():  # the mean of the others leaves their advantages as they are
        group = index == prompt
        rewards[group & ~judged] = rewards[group & judged].mean() if bool((group & judged).any()) else 0.0
    lengths = torch.tensor(rollouts.lengths)
    weights = sequence_weights(
        rewards, index, lengths, "dr_grpo", plan.sampling_config.max_completion_length, plan.length_normalizer
    )
    return advantages(rewards, index, "dr_grpo") * judged, _masked(weights, rollouts, plan, sampling) * judged


def _masked(weights: torch.Tensor, rollouts: Rollouts, plan: SamplingPlan, sampling: BuffersConfig) -> torch.Tensor:
    """The weights, 0 for completions that were cut where the run masked these out."""
    if not sampling.mask_truncated_completions:
        return weights
    # TRL's own rule: the last token, whoever wrote it, is neither an end of sequence nor padding.
    ends = {*plan.sampling_config.eos_token_ids, plan.sampling_config.pad_token_id}
    return weights * torch.tensor([float(ids[-1] in ends) for ids in rollouts.completion_ids])


def custom_evaluation(
    checkpoint: Checkpoint, plan: SamplingPlan, config: FisherAnalysisConfig, numbers: PromptNumbers
) -> tuple[Rollouts, tuple[str, ...]]:
    """(rows that the user gives, what has to be said of them). Raises UserError for a file with bad lines."""
    path = Path(config.entropy_analysis.sampling.eval_sequences_path or "")
    if is_dump(path):
        given = _recorded(checkpoint, plan, config, numbers, "evaluation")
        return given.rollouts, tuple(given.notes)
    sequences = read_custom_sequences(path, plan.system_prompt)
    rows = numbers.rows(path, sequences)
    texts, rewards = [s.completion for s in sequences], [s.reward for s in sequences]
    segments = [s.segments for s in sequences]
    return given_rollouts(checkpoint.tokenizer, rows, texts, plan, "evaluation", rewards, segments), ()


def _recorded(
    checkpoint: Checkpoint, plan: SamplingPlan, config: FisherAnalysisConfig, numbers: PromptNumbers, side: Side
) -> GivenSide:
    settings = config.entropy_analysis
    sampling, evaluation = settings.sampling, side == "evaluation"
    path = sampling.eval_sequences_path if evaluation else sampling.train_sequences_path
    step = sampling.eval_sequences_step if evaluation else sampling.train_sequences_step
    drawn = evaluation and sampling.eval_sequences_drawn
    batch_size = settings.fisher_kernel.token_batch_size
    return given_side(checkpoint, plan, Path(path or ""), numbers, side, step, drawn, batch_size)


def custom_training(
    checkpoint: Checkpoint, plan: SamplingPlan, config: FisherAnalysisConfig, numbers: PromptNumbers
) -> TrainingBuffer:
    """Columns that the user gives: with the file's weights, else those of its advantages, else with Dr. GRPO's from its rewards,
    else without weights.

    Raises UserError for a file with bad lines, or whose weights are all 0.
    """
    sampling = config.entropy_analysis.sampling
    path = Path(sampling.train_sequences_path or "")
    groups, notes = None, ()
    if is_dump(path):
        given = _recorded(checkpoint, plan, config, numbers, "training")
        rollouts, groups, notes = given.rollouts, given.groups, tuple(given.notes)
        if given.advantages is not None and given.weights is None:
            weights = _masked(advantage_weights(given, plan), rollouts, plan, sampling)
            rollouts = rollouts.with_values(weight=weights.tolist())
    else:
        sequences = read_custom_sequences(path, plan.system_prompt)
        rows = numbers.rows(path, sequences)
        texts, rewards = [s.completion for s in sequences], [s.reward for s in sequences]
        segments = [s.segments for s in sequences]
        rollouts = given_rollouts(checkpoint.tokenizer, rows, texts, plan, "trained", rewards, segments)
        if sequences[0].weight is not None:
            rollouts = rollouts.with_values(weight=[s.weight for s in sequences])
    given_weights = TrainingBuffer(rollouts, CollectionCounts()).weights
    if None not in rollouts.reward and TrainingBuffer(rollouts, CollectionCounts()).advantages is None:
        gains, found = _dr_grpo(rollouts, plan, sampling, groups)
        rollouts = rollouts.with_values(
            advantage=gains.tolist(), weight=(found if given_weights is None else given_weights).tolist()
        )
    training = TrainingBuffer(rollouts, CollectionCounts(kept=len(rollouts)), notes)
    if training.weights is not None and not bool(training.weights.any()):
        from_rewards = given_weights is None
        why = "the rewards of each prompt are all equal" if from_rewards else "every weight is 0"
        raise UserError(
            f"{path}: {why}, so there is no step to analyse; leave {'rewards' if from_rewards else 'weights'} out for the kernel "
            "alone"
        )
    return training


def score_for_the_reader(rollouts: Rollouts, plan: SamplingPlan) -> Rollouts:
    """An evaluation buffer with rewards: those of the task's own prompts that had none yet are filled in."""
    known = {row["prompt_index"] for row in (*plan.task.train, *plan.task.heldout)}
    missing = [i for i, s in enumerate(rollouts) if s.reward is None and s.prompt_index in known]
    scored = score(rollouts.select(missing), plan.task.reward_functions, plan.trainer_state)
    rewards = rollouts.reward
    for i, sequence in zip(missing, scored, strict=True):
        rewards[i] = sequence.reward
    return rollouts.with_values(reward=rewards)


def evaluation_set(config: FisherAnalysisConfig, evaluation: Rollouts) -> dict[str, Any]:
    """What draws this evaluation buffer again: its prompts in order, and the seeds of their choice and of the completions."""
    sampling = config.entropy_analysis.sampling
    drawn = sampling.analysis_draws_rows and sampling.eval_prompts != "from_run"
    return {
        "source": sampling.eval_sequences_path
        or ("rollouts of the run's next step" if sampling.eval_prompts == "from_run" else None)
        or f"{'training prompts' if sampling.same_prompts else sampling.eval_split}",
        "prompts": None if sampling.eval_sequences_path else sampling.eval_prompts,
        "completions": "given" if sampling.eval_sequences_path else sampling.eval_completions,
        "seed": config.seed,
        "prompt_seed": config.seed + _EVALUATION_STREAM if sampling.eval_prompts == "random" else None,
        "completion_seed": config.seed + _EVALUATION_STREAM + 1 if drawn else None,
        "prompt_index": list(evaluation.prompt_index),
    }


def _buffer_of_run(run_dir: Path, step: int, plan: SamplingPlan) -> TrainingBuffer:
    rollouts, recorded = recorded_training(run_dir, step, plan)
    of = Counter(s.status for s in recorded)
    counts = CollectionCounts(
        rounds=1 + max(s.round for s in recorded),
        generated=len(recorded),
        rejected=of["rejected"],
        filler=of["filler"],
        kept=of["trained"],
    )
    return TrainingBuffer(rollouts, counts)
