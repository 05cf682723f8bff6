"""Stored result of the analysis prices: what each intervention would do to entropy and to reward in the analysed step."""

from __future__ import annotations

from entropy_experiments.records.estimates import StudentEstimate
from entropy_experiments.records.record import Count, Number, Record, Result, Rows


class MeasuredStep(Record):
    """What the real step does to the same evaluation sequences, reweighted to the policy after it."""

    entropy: Number
    """Measured change of entropy, nats per token."""
    reward: Number
    """Measured change of mean reward."""
    effective_sample_size: Number
    """Of the importance weights, in sequences; below half of them the two are not to be trusted."""

    def trusted(self, sequences: int) -> bool | None:
        """Whether the effective sample is at least half of so many sequences; None where it is not known."""
        return None if self.effective_sample_size is None else self.effective_sample_size >= sequences / 2


class PriceRow(Record):
    """One intervention. Where it is not priced, `reason` stands in place of all numbers."""

    name: str
    """Its name."""
    label: str
    """Its name in words."""
    reason: str | None = None
    """Why it is not priced; absent where it is."""
    entropy: StudentEstimate | None = None
    """Predicted change of entropy in the step, nats per token."""
    reward: StudentEstimate | None = None
    """Predicted change of mean reward on evaluation prompts; null: they have no rewards, or equal ones."""
    entropy_minus_run: StudentEstimate | None = None
    """Change of entropy less that of the step as trained, by the paired difference, nats per token."""
    reward_minus_run: StudentEstimate | None = None
    """Change of reward less that of the step as trained, by the paired difference."""
    reward_per_nat: StudentEstimate | None = None
    """Change of reward for a nat of entropy kept: reward_minus_run over entropy_minus_run; known where the latter is above 0."""
    covariance: Number = None
    """Between the two paired differences, jackknife, nats per token times reward: the tilt of their ellipse."""
    coefficient: Number = None
    """Of an intervention whose coefficient was solved for."""
    measured: MeasuredStep | None = None
    """What the real step did; absent where none was taken."""


class PricesResult(Result):
    """analyses.prices: what could be done in place of this step, and what would it cost?"""

    rows: Rows[PriceRow]
    """One entry an intervention, the step as trained first."""
    alike: Rows[str]
    """Names of the interventions that keep at least `keeps` of the entropy lost as trained and whose reward per nat is not
    significantly below that of the best of them, the best first; empty where there is none, or no reward."""
    keeps: Number
    """Part of the entropy lost as trained that an intervention must be predicted to keep to be compared."""
    reward_note: str | None = None
    """Why there is no change of reward."""
    n_eval: Count
    """Evaluation sequences."""
    eval_prompts: Count
    """Evaluation prompts, over which errors are."""
    judged_prompts: Count
    """Evaluation prompts that sequences of highest cost were not chosen on: those that leaving them out is judged on."""
