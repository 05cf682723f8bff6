"""`summary.json`: the numbers of one analysis. Changes of entropy are in nats per token unless a field says otherwise."""

from __future__ import annotations

from typing import Literal

from entropy_experiments.records.analysis_results import AnalysesRecord
from entropy_experiments.records.estimates import Estimate, LargestPartRecord, Measurement, NoiseOverBuffers
from entropy_experiments.records.leaving_out import LeavingOut
from entropy_experiments.records.precision_results import TrainingPrecisionRecord
from entropy_experiments.records.record import Count, Finite, Nonnegative, Number, Probability, Record, Rows
from entropy_experiments.records.run_record import CheckpointRecord
from entropy_experiments.records.step_results import Estimator
from entropy_experiments.statistics.agreement import Agreement
from entropy_experiments.statistics.estimand import Estimand, measure_of

RESULTS_FORMAT = 2
"""summary.json's "format_version". 1: folders that do not say."""


class EntropyRecord(Record):
    """Entropy of the policy, from the evaluation buffer."""

    per_token: Estimate
    """Nats per token: sum over tokens over their number."""
    per_completion: Estimate
    """Nats per completion."""
    surprisal_per_completion: Estimate
    """Mean of -log-probability, nats per completion: another estimate of the same."""


class StepParts(Record):
    """A predicted change and its parts, which add up to it."""

    total: Estimate
    """By the whole step."""
    batch: Estimate
    """By this batch's gradient."""
    momentum: Estimate
    """By the momentum of earlier batches."""
    weight_decay: Estimate
    """By weight decay."""


class Parts(Record):
    """A change of entropy by the parts of steps."""

    batch: Estimate
    """By this step's batch."""
    momentum: Estimate
    """By the momentum of earlier batches."""
    weight_decay: Estimate
    """By weight decay."""


class ActualRecord(Record):
    """The measured change at the whole step; empty where none was measured."""

    snis: Measurement | None = None
    """Change of the policy's entropy, by reweighting its own tokens; null where the texts were given."""
    fixed_prefix: Measurement | None = None
    """Change of entropy on the given tokens: another quantity."""


class AgreementRecord(Record):
    """A prediction against the measurement of the same quantity."""

    difference: Finite
    """Predicted - measured."""
    standard_error: Nonnegative
    """Of the difference, prompts left out of both sides at once."""
    degrees_of_freedom: Nonnegative
    """Behind that error."""
    z: Nonnegative
    """|difference| over its standard error."""
    p_value: Probability
    """Two-sided."""
    low: Finite
    """Lower end of the 95% interval of the difference."""
    high: Finite
    """Upper end."""
    paired: bool
    """Whether prompts were left out of both sides at once."""
    agrees: bool
    """Whether that interval holds 0."""

    def known(self) -> Agreement | None:
        """The same for sentences; None where the difference has no known error."""
        error, freedom, z, p_value = self.standard_error, self.degrees_of_freedom, self.z, self.p_value
        if error is None or freedom is None or z is None or p_value is None:
            return None
        return Agreement(self.difference, error, freedom, z, p_value, self.low, self.high, self.paired)


class ScaleRow(Record):
    """Prediction and measurement at one scale of the step."""

    scale: Finite
    """Times the step."""
    actual_fixed_prefix: Number
    """Measured change on the given tokens."""
    predicted_fixed_prefix: Number
    """Predicted change on the given tokens."""
    predicted: Number = None
    """Predicted change of the policy's entropy, Rao-Blackwell. This and what follows: absent where the texts were given."""
    predicted_standard_error: Nonnegative = None
    """Of that."""
    predicted_low: Number = None
    """Lower end of its 95% interval."""
    predicted_high: Number = None
    """Upper end."""
    predicted_split: Number = None
    """Predicted by the split estimator, the derivative of the measurement."""
    actual_snis: Number = None
    """Measured change of the policy's entropy."""
    actual_snis_standard_error: Nonnegative = None
    """Of that."""
    actual_snis_low: Number = None
    """Lower end of its 95% interval."""
    actual_snis_high: Number = None
    """Upper end."""
    ess: Nonnegative = None
    """Effective sample size, in sequences."""


PreconditionerName = Literal["checkpoint", "step", "none"]


class StepRecord(Record):
    """The analysed step; null where there is none (training sequences without weights)."""

    delta_h_batch: Number
    """The step's batch part."""
    sum_of_shares: Number
    """Sum of the sequences' shares, which is the same."""
    horizon_factor: Number
    """A batch's change over the life of the momentum buffer over that in its own step."""
    preconditioner: PreconditionerName
    """P of the shares: "step", or "none" for a plain gradient step."""
    kernel_preconditioner: PreconditionerName
    """P of the kernel."""
    gradient_norm: Nonnegative
    """Norm of the loss gradient before clipping."""
    clip_coefficient: Nonnegative
    """What the gradient was multiplied by."""
    step_factor: Number
    """Share = step_factor x weight x <grad h, P dS>."""


class KernelRecord(Record):
    """The kernel K1 between the buffers, nats^2 x P."""

    n_eval: Count
    """Evaluation sequences."""
    n_train: Count
    """Training sequences."""
    mean: Number
    """Mean entry."""
    mean_abs: Number
    """Mean absolute entry."""
    same_prompt_pairs: Count
    """Pairs of one prompt."""
    same_prompt_mean: Number
    """Their mean; null without such pairs."""
    cross_prompt_mean: Number
    """Mean of the others; null without such pairs."""
    same_prompts: bool
    """Whether both buffers were drawn from the same prompts on purpose."""


class BufferRecord(Record):
    """One buffer."""

    prompts: Count
    """Prompts."""
    sequences: Count
    """Sequences."""
    mean_reward: Number
    """Of those with a reward."""
    mean_length: Nonnegative
    """Tokens."""


class TrainingBufferRecord(BufferRecord):
    """The training buffer, with how it was filled."""

    rounds: Count
    """Rounds of drawing."""
    generated: Count
    """Sequences that were drawn."""
    rejected: Count
    """Those of prompts whose completions were rewarded alike, left out."""
    kept: Count
    """Those that were kept."""
    filler: Count
    """Sequences taken in to fill the buffer all the same."""


class SamplingRecord(Record):
    """Both buffers."""

    evaluation: BufferRecord
    """The evaluation buffer."""
    training: TrainingBufferRecord
    """The training buffer."""
    notes: Rows[str] = ()
    """What has to be said of sequences that a trainer recorded: their source, what their tokens rest on, and whether their
    recorded log-probabilities are the policy's."""


class SamplingConfigRecord(Record):
    """How completions are drawn."""

    temperature: Finite
    """Of the softmax."""
    max_completion_length: Count
    """Tokens."""


class TrainingSettings(Record):
    """How the run was trained."""

    scheme: str
    """Weighting scheme."""
    length_normalizer: str
    """What dr_grpo divides by."""
    difficulty_weighting: bool
    """Whether prompts are weighted by difficulty."""
    reject_zero_advantage: bool
    """Whether prompts rewarded alike are left out."""
    max_grad_norm: Number
    """Clipping; null: none."""
    learning_rate: Number
    """Of the first parameter group."""
    prompts_per_step: Count
    """Prompts a step."""
    completions_per_prompt: Count
    """Completions a prompt."""


class PolicyRecord(Record):
    """What must be alike for two analyses to be compared."""

    tokenizer: str
    """Fingerprint of the vocabulary."""
    sampling_config: SamplingConfigRecord
    """How completions are drawn."""
    task: str
    """The task in words."""
    training: TrainingSettings | None
    """How the run was trained; null where that is not recorded."""


class KernelModules(Record):
    """Which parameters the kernel's rows are formed of."""

    parameters: Count
    """How many."""
    trainable: Count
    """Of how many that are trained."""
    patterns: Rows[str] | None
    """Shell patterns of their names; null: all."""
    left_out_share: Number
    """Share of the predicted change by the parameters left out; null where none is."""


class GradientRows(Record):
    """How per-sequence gradients were formed."""

    method: str
    """By hooks in one pass, or one sequence after the other."""
    reason: str | None
    """Why the latter."""


class Summary(Record):
    """summary.json."""

    format_version: Literal[2]
    """Version of this format."""
    checkpoint: CheckpointRecord
    """The analysed checkpoint."""
    entropy: EntropyRecord
    """The policy's entropy."""
    predicted: dict[Estimator, StepParts]
    """Predicted change by estimator, nats per token; empty without a step."""
    predicted_per_completion: dict[Estimator, StepParts]
    """The same in nats per completion."""
    actual: ActualRecord
    """Measured change."""
    agreement: dict[Estimator, AgreementRecord]
    """Estimator -> its total against the measurement of the same quantity."""
    largest_part: dict[Estimator, LargestPartRecord] = {}
    """Estimator -> the largest part of the predicted change, by the paired difference; absent in older folders."""
    scaling: Rows[ScaleRow]
    """Prediction and measurement by scale of the step."""
    attribution: StepRecord
    """The step and its shares."""
    training_noise: NoiseOverBuffers | None
    """Spread of the predicted change over training buffers; null where it is not known."""
    training_precision: TrainingPrecisionRecord | None = None
    """What the run's own precision changes; null where it was trained in the analysis' own, absent in older folders."""
    rows_drawn: bool
    """Whether the policy drew the evaluation sequences; else predictions are of the fixed prefix alone."""
    step_analysed: bool
    """Whether there is a step."""
    kernel: KernelRecord | None
    """The kernel; null where it was not computed."""
    sampling: SamplingRecord
    """Both buffers."""
    leaving_out: LeavingOut | None
    """What leaving sequences out of the step does."""
    policy: PolicyRecord
    """The policy."""
    kernel_modules: KernelModules
    """The kernel's parameters."""
    gradient_rows: GradientRows
    """How rows were formed."""
    analyses: AnalysesRecord
    """One entry an analysis."""

    @property
    def estimand(self) -> Estimand:
        """What predictions and measurements are of."""
        return Estimand.of(self.rows_drawn)

    @property
    def estimator(self) -> Estimator | None:
        """The first estimator of the estimand's measured quantity that has a predicted total."""
        for name in self.estimand.estimators:
            parts = self.predicted.get(name)
            if measure_of(name) == self.estimand.measure and parts is not None and parts.total.value is not None:
                return name
        return None

    @property
    def prediction(self) -> StepParts | None:
        """The predicted change by that estimator."""
        return None if self.estimator is None else self.predicted[self.estimator]

    @property
    def compared(self) -> Agreement | None:
        """That prediction against the measured change; None where their difference has no known error."""
        found = None if self.estimator is None else self.agreement_of(self.estimator)
        return None if found is None else found.known()

    def agreement_of(self, estimator: Estimator) -> AgreementRecord | None:
        """An estimator's prediction against the measurement of the same quantity; None where that is not to be trusted."""
        measured = self.actual.snis if measure_of(estimator) == "snis" else self.actual.fixed_prefix
        return None if measured is None or not measured.trustworthy else self.agreement.get(estimator)

    @property
    def measured(self) -> Measurement | None:
        """The measured change of the same quantity."""
        return self.actual.snis if self.estimand.measure == "snis" else self.actual.fixed_prefix
