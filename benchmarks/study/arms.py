"""The arms of the study: each a real trainer of TRL with the settings that its name stands for.

    dr_grpo       the base of all others: advantages centred, a constant divisor
    grpo          divided by their deviation and by each completion's length
    rloo          TRL's RLOOTrainer
    clip_higher   epsilon_high 0.28                                                  DAPO
    bonus         entropy_coef, tuned on a seed of its own                           (tune.py)
    adaptive      use_adaptive_entropy: the coefficient moves by +-0.005             Skywork-OR1, TRL
    clip_cov      no gradient on 0.02% of tokens of highest covariance               Cui et al. 2025
    kl_cov        a KL penalty on those of highest covariance                        Cui et al. 2025
    leave_out     without the sequences that cost most entropy, as many as the target takes  (leaving_out.py)
    controller    attach_entropy_controller, with the same target as `adaptive`

A generation of 128 sequences is trained on in two steps of the optimizer, so that ratios are not all 1 and bounds on them act.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from benchmarks.study.covariance import CovarianceTrainer
from benchmarks.study.leaving_out import LeavingOutTrainer
from benchmarks.study.tasks import Task, right
from rl_training.controller_config import EntropyControllerConfig
from rl_training.integrations.entropy_controller import attach_entropy_controller
from rl_training.models.load import load_model_and_tokenizer

RATE, DECAY, SEQUENCES, GROUP = 2e-4, 0.01, 64, 8


@dataclass(frozen=True)
class Arm:
    """Attributes:
    settings: of the trainer, beside the common ones. kind: which trainer.
    controller: settings of the entropy controller, None for none. targeted: whether `entropy_target` is set to the task's.
    """

    name: str
    kind: str = "grpo"
    settings: dict[str, Any] = field(default_factory=dict)
    controller: dict[str, Any] | None = None
    targeted: bool = False


_DR = {"loss_type": "dr_grpo", "scale_rewards": "none"}
ADAPTIVE = {"use_adaptive_entropy": True}
ARMS = {
    arm.name: arm
    for arm in (
        Arm("dr_grpo", settings=_DR),
        Arm("controller", settings=_DR, controller={"alpha_min": -0.1, "alpha_max": 0.2}),
        Arm("adaptive", settings={**_DR, **ADAPTIVE}, targeted=True),
        Arm("bonus", settings={**_DR, "entropy_coef": 0.01}),
        Arm("grpo", settings={"loss_type": "grpo", "scale_rewards": "group"}),
        Arm("rloo", "rloo"),
        Arm("clip_higher", settings={**_DR, "epsilon_high": 0.28}),
        Arm("clip_cov", "clip_cov", _DR),
        Arm("kl_cov", "kl_cov", _DR),
        Arm("leave_out", "leave_out", _DR),
    )
}


def _grpo(kind: type[GRPOTrainer]) -> Any:
    def make(model: Any, settings: dict[str, Any], reward: Any, dataset: Any, tokenizer: Any) -> Any:
        return kind(model, reward, args=GRPOConfig(**settings), train_dataset=dataset, processing_class=tokenizer)

    return make


def _rloo(model: Any, settings: dict[str, Any], reward: Any, dataset: Any, tokenizer: Any) -> Any:
    return RLOOTrainer(model, reward, args=RLOOConfig(**settings), train_dataset=dataset, processing_class=tokenizer)


_TRAINERS = {
    "grpo": _grpo(GRPOTrainer),
    "rloo": _rloo,
    "clip_cov": _grpo(CovarianceTrainer.of("clip_cov")),
    "kl_cov": _grpo(CovarianceTrainer.of("kl_cov")),
    "leave_out": _grpo(LeavingOutTrainer),
}


def make_trainer(arm: Arm, task: Task, seed: int, steps: int, folder: Path, **overrides: Any) -> Any:
    """A trainer that is ready to train, with the arm's controller if it has one.

    Args:
        overrides: settings of the trainer in place of the arm's; `controller_...` of its controller's.
    """
    model, tokenizer = load_model_and_tokenizer(str(task.policy()), device="cpu")
    model.requires_grad_(True)
    of_controller = {k.removeprefix("controller_"): v for k, v in overrides.items() if k.startswith("controller_")}
    settings = {**arm.settings, **{k: v for k, v in overrides.items() if not k.startswith("controller_")}}
    if arm.targeted:
        settings = {"entropy_target": task.target, **settings}
    common = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "max_steps": steps,
        "seed": seed,
        "learning_rate": RATE,
        "weight_decay": DECAY,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": SEQUENCES,
        "steps_per_generation": 2,
        "num_generations": GROUP,
        "max_completion_length": task.longest,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "beta": 0.0,
    }
    given = (right, task.dataset(), tokenizer)
    torch.manual_seed(seed)
    trainer = _TRAINERS[arm.kind](model, {**common, **settings}, *given)
    if isinstance(trainer, LeavingOutTrainer):
        trainer.watch(task)
    if arm.controller is not None:
        wanted = {"target": task.target, **arm.controller, **of_controller}
        rows = task.rows()[1][256:]
        attach_entropy_controller(trainer, None, EntropyControllerConfig(**wanted), rows, console=False)
    return trainer
