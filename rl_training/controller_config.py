"""Settings of the entropy controller, which changes training: it is off unless it is asked for."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rl_training.configuration import StrictModel


class EntropyControllerConfig(StrictModel):
    """Holds the entropy of held-out prompts at a target by an entropy bonus that is solved for at every step."""

    enabled: bool = False
    """Add the bonus. This changes training, and the console says so."""
    target: PositiveFloat | None = None
    """Nats per token to hold, at the beginning of a schedule; null: the entropy found at the first step."""
    schedule: Literal["constant", "linear", "cosine", "reward_gated"] = "constant"
    """`constant`; `linear`, `cosine`: to final_target in schedule_steps; `reward_gated`: linear, once reward_gate is reached."""
    final_target: PositiveFloat | None = None
    """Nats per token at the end of a schedule."""
    schedule_steps: PositiveInt | None = None
    """Steps that a schedule takes; null: all steps of the run (`reward_gated`: those that are left)."""
    reward_gate: float | None = None
    """`reward_gated`: the running mean of the training reward (kept by 0.9 a step) from which on the target moves."""
    band: NonNegativeFloat = 0.005
    """Nats per token: while entropy is planned to stay this near to the target nothing is added, and training is what it was."""
    horizon: PositiveInt = 16
    """Steps within which the target is to be reached; 1 asks the very next step for all of it."""
    alpha_min: float = Field(default=0.0, le=0.0)
    """Lowest coefficient of the bonus; below 0 entropy may be pressed down to the target as well."""
    alpha_max: PositiveFloat = 1.0
    """Highest coefficient of the bonus, in the sense of TRL's entropy_coef."""
    max_change: PositiveFloat = 0.02
    """Nats per token and step: a target that is further away is approached at this rate."""
    eval_sequences: int = Field(default=32, ge=2)
    """Sequences of held-out prompts that level and gradient of entropy are taken on at every step."""
    pool_age: PositiveInt = 8
    """Steps that such a sequence stays at most; half of them are drawn anew at a time."""
    advantage_decay: float = Field(default=0.8, ge=0.0, le=1.0)
    """Lambda of the advantages of the entropy to go in that gradient: less is quieter and nearer to 0; 1 is Rao-Blackwell's."""
    level_gain: float = Field(default=0.2, gt=0.0, le=1.0)
    """Part of the difference between the entropy seen and the one expected that the level takes over at each step."""
    bias_gain: float = Field(default=0.02, ge=0.0, le=1.0)
    """Part of it that goes into the running bias of the predictions."""
    bias_limit: NonNegativeFloat = 0.01
    """Nats per token and step that this bias, and the correction of plans for what they miss, may reach."""
    start_after: NonNegativeInt = 4
    """Steps of the optimizer before the first that is changed: P, and so every response, is noise in the first ones."""

    @model_validator(mode="after")
    def _schedule_is_complete(self) -> Self:
        if self.schedule == "constant" and not (self.final_target is self.schedule_steps is self.reward_gate is None):
            raise ValueError(
                "final_target, schedule_steps and reward_gate belong to a schedule: set schedule, or leave them out"
            )
        if self.schedule != "constant" and self.final_target is None:
            raise ValueError(f"schedule={self.schedule} needs final_target, in nats per token")
        if (self.schedule == "reward_gated") != (self.reward_gate is not None):
            raise ValueError("reward_gate and schedule=reward_gated belong together: set both, or neither")
        return self
