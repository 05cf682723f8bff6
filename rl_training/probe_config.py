"""Settings of the entropy probe. Presets are chosen by replay of recorded runs: benchmarks/results/probe_replay."""

from typing import Any, Literal, Self

from pydantic import ByteSize, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rl_training.configuration import StrictModel

WATCH_PRESETS: dict[str, dict[str, Any]] = {
    "default": {"eval_sequences": 40, "measure_every": 4, "predict_every": 16},
    "light": {"eval_sequences": 16, "measure_every": 4},
    "accurate": {"eval_sequences": 64, "measure_every": 2, "predict_every": 16},
}
"""Under `mode: watch`, the default."""

GRADIENT_PRESETS: dict[str, dict[str, Any]] = {
    "default": {"refresh_every": 2},
    "light": {"eval_sequences": 8, "refresh_every": 2},
    "accurate": {},
    "held_out": {"rollouts": "fresh", "eval_sequences": 32, "averaging": 0.0, "completions_per_prompt": 1},
}
"""Under the modes that predict every step."""

_MODES: dict[str, dict[str, Any]] = {
    "watch": {"estimator": "critic", "averaging": 0.0},
    "simple": {"rollouts": "current", "estimator": "split", "averaging": 0.75},
}

OWN_SEQUENCES: dict[str, Any] = {"rollouts": "current", "measure_every": 1}
"""What `mode: watch` falls back to where there are no prompts to draw from: the step's own, of which each has its own."""
MOST_OWN_SEQUENCES = 16


class EntropyProbeConfig(StrictModel):
    """The probe that measures, predicts and attributes each step's change of entropy while training runs."""

    enabled: bool = True
    """Attach the probe; training is bit-identical with it and without."""
    preset: Literal["default", "light", "accurate", "held_out"] = "default"
    """Settings that belong together, by measurement; single keys may be set beside them. `held_out` is of `mode: simple`."""
    mode: Literal["watch", "simple", "attribution"] = "watch"
    """`watch`: measured by forward passes, predicted now and then; `simple`: predicted every step; `attribution`: with shares."""
    log_every: PositiveInt = 1
    """Steps between two that are probed."""
    preconditioning: Literal["actual", "previous_step", "none"] = "actual"
    """`actual`: the step AdamW takes; `previous_step`: -lr P g with the P before it; `none`: a plain gradient step."""
    estimator: Literal["critic", "rao_blackwell", "split", "score_function", "fixed_prefix"] = "critic"
    """Estimator of the entropy gradient; `critic` (watch) and `split` (other modes): the measurement's own derivative."""
    rollouts: Literal["pool", "current", "previous_step", "fresh"] | None = None
    """Whose entropy: a pool of held-out sequences, the step's, the last step's, fresh ones; null: a pool if there are prompts."""
    pool_age: PositiveInt = 16
    """A pool: steps that a sequence stays at most; half of them are drawn anew at a time."""
    eval_sequences: int = Field(default=16, ge=2)
    """Completions on which each gradient of entropy is taken and each change measured."""
    completions_per_prompt: PositiveInt = 4
    """At most so many completions of one prompt among them (a pool takes distinct prompts)."""
    measure_every: PositiveInt | None = None
    """Steps that one measurement is over under `watch` (fewer where the policy moves fast); else: predicted steps between two."""
    refresh_every: PositiveInt = 1
    """`simple`, `attribution`: predicted steps between two gradients of entropy; in between the last one is used."""
    averaging: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Weight of a step's gradient relative to the next step's in the running average that predicts; 0: the newest alone."""
    predict_every: PositiveInt | None = None
    """`mode: watch`: probed steps between two predictions from a gradient of entropy (null: none)."""
    shares: bool = False
    """`mode: watch`: with each prediction the shares of the training sequences, as under `mode: attribution`."""
    parts_every: NonNegativeInt = 0
    """`mode: watch`: probed steps between two splits into batch, momentum and decay by trial moves of the weights (0: none)."""
    prices_every: NonNegativeInt = 0
    """`mode: watch`: predictions between two price lists of the coming step (0: none); `mode: prices` sets 4."""
    advantage_decay: float = Field(default=0.9, ge=0.0, le=1.0)
    """`mode: watch`: lambda of the advantages of the entropy to go; less is quieter and nearer to 0 than the truth."""
    critic_keep: float = Field(default=0.9, ge=0.0, le=1.0)
    """`mode: watch`: weight of a step's sequences relative to the next step's in the critic of the entropy to go."""
    bias_keep: float | None = Field(default=None, ge=0.0, le=1.0)
    """`mode: watch`: weight of a step's bias relative to the next step's in the running mean that is added back (null: none)."""
    entropy_floor: PositiveFloat | None = None
    """Nats per token: log in how many steps the entropy is forecast to be below it, with an 80% band (null: no forecast)."""
    memory_limit: ByteSize | None = None
    """What gradients, parts and copies of weights may take beside activations, e.g. 2GB; beyond it the setting is refused."""
    standard_error_folds: NonNegativeInt | None = None
    """Parts of the prompts whose spread is the error; 0, 1: none. Null: each prompt in `watch`, else 4 (2 beyond 50M)."""
    per_completion: bool = False
    """Log predicted changes in nats per completion as well, for one more backward pass."""
    predictors: bool = False
    """Log rival predictors beside: score function, without momentum, covariance (Cui et al.), STEER."""
    fused: bool = False
    """Take the score term from the training backward itself, over all the step's sequences (LoRA, on-policy, no KL)."""
    on_error: Literal["warn", "raise"] = "warn"
    """If the probe itself fails: `warn` says so once and turns it off, `raise` stops the run."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("mode") == "prices":
            data = {"prices_every": 4, "predict_every": 16, **data, "mode": "watch"}
        preset = data.get("preset", "default")
        mode = data.get("mode", "simple" if preset == "held_out" else "watch")
        watching = mode == "watch"
        presets = WATCH_PRESETS if watching else GRADIENT_PRESETS
        known = presets.get(preset, {}) if isinstance(preset, str) else {}
        return {"mode": mode, **_MODES["watch" if watching else "simple"], **known, **data}

    @property
    def wants_shares(self) -> bool:
        """Whether predictions come with shares of the training sequences."""
        return self.mode == "attribution" or self.shares

    @property
    def watched_for(self) -> int:
        """Steps that a held-out sequence is watched for at most, so that entropies of so many steps err alike."""
        return self.pool_age if self.rollouts == "pool" else 1

    @property
    def takes_gradients(self) -> bool:
        """Whether gradients of entropy are taken at all."""
        return self.mode != "watch" or self.predict_every is not None

    @property
    def keeps_gradients(self) -> bool:
        """Whether a prediction may rest on a gradient of an earlier step."""
        return self.averaging > 0 or (self.mode != "watch" and self.refresh_every > 1)

    @property
    def errors_over_prompts(self) -> bool:
        """Whether predictions have the errors of derivatives along the step, prompt by prompt, and not those of folds."""
        return self.mode == "watch" and (self.estimator, self.averaging, self.standard_error_folds) == (
            "critic",
            0.0,
            None,
        )

    @property
    def gradients_and_remedy(self) -> tuple[str, str]:
        """The setting that asks for gradients, as written, and what takes less memory."""
        if self.mode == "watch":
            return f"predict_every={self.predict_every}", "set predict_every=null, or standard_error_folds=0"
        return (
            f"mode={self.mode}",
            "use mode=watch with predict_every=null, which holds no gradient, or standard_error_folds=0",
        )

    def on_own_sequences(self) -> Self:
        """The same on the step's own sequences, which have to be distinct prompts' no longer."""
        fewer = {"eval_sequences": min(self.eval_sequences, MOST_OWN_SEQUENCES)}
        return self.model_copy(update={**OWN_SEQUENCES, **fewer})

    @model_validator(mode="after")
    def _settings_suit_the_mode(self) -> Self:
        watching = self.mode == "watch"
        if watching and self.preset == "held_out":
            raise ValueError("preset=held_out belongs to mode=simple; mode=watch watches held-out sequences by itself")
        for name, asked in (
            ("predict_every", self.predict_every is not None),
            ("estimator=critic", self.estimator == "critic"),
        ):
            if asked and not watching:
                raise ValueError(f"{name} belongs to mode=watch; with mode={self.mode} leave it out or set it to null")
        if not watching and (self.parts_every or self.shares or self.prices_every):
            raise ValueError(
                f"parts_every, shares and prices_every belong to mode=watch; with mode={self.mode} set them to 0, false and 0"
            )
        if self.prices_every and self.predict_every is None:
            raise ValueError(
                "prices_every counts predictions, and there are none: set predict_every, or prices_every=0"
            )
        if self.shares and self.predict_every is None:
            raise ValueError("shares come with predictions: set predict_every as well")
        if self.rollouts == "pool" and not watching:
            raise ValueError(f"rollouts=pool belongs to mode=watch; for mode={self.mode} use rollouts=fresh")
        if self.rollouts in ("pool", None) and self.bias_keep is not None:
            raise ValueError(
                "bias_keep takes steps for independent, which those of a pool are not: leave it out, or set rollouts=current"
            )
        if watching and self.fused:
            raise ValueError("fused belongs to the modes that predict every step: set mode=simple or fused=false")
        return self
