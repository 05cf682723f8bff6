"""Dr. GRPO on TRL's GRPOTrainer, with a filtered training buffer and checkpoints that can be
analysed.

    L = -(1/N) sum_i (1/L_i) sum_k A_i log pi(a_ik | c_ik) ,       A_i = r_i - mean of its group,
    L_i = max_completion_length ("constant") or the longest completion of i's prompt ("prompt_longest")

Departures from TRL's default GRPO: advantages are not divided by their standard deviation; no KL
term, no off-policy reuse, no truncation of the sampled distribution, no dropout, so that the ratio
is 1 and the gradient is exactly -sum_i w_i dS_i with w_i = A_i / (N L_i) (entropy_core.weighting).
Departures from TRL's sampling: prompts are drawn by difficulty, groups whose rewards are all equal
are rejected and refilled for a stated number of rounds, and each step's sequences are recorded.

Source: Liu et al. 2025, "Understanding R1-Zero-Like Training".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from trl import GRPOConfig, GRPOTrainer

from entropy_core.weighting import longest_of_prompt
from rl_training.algs.buffer_reward import reward_of_all_prompts
from rl_training.algs.run_description import LearningRateRecorder, describe_run, run_facts
from rl_training.algs.trainer_arguments import refuse_arguments
from rl_training.algs.training_buffer import GeneratedGroup, merge_rounds
from rl_training.errors import UserError
from rl_training.filtered_buffer import has_reward_differences
from rl_training.generation.drawn_tokens import completion_of_row, loss_mask
from rl_training.generation.model_inputs import TEXT_INPUTS, beyond_text, refusal, row_beyond_text
from rl_training.models.adapter_initialisation import REMEDY, unrepeatable_initialisation
from rl_training.premises.premise_guard import PremiseGuard
from rl_training.premises.reward_range import TrainedAtAll, check_rewards, without_weight
from rl_training.premises.sampling_check import SamplingGuard
from rl_training.run.model_card import write_model_card
from rl_training.run.resume import ELSEWHERE
from rl_training.run.rollouts import write_rollouts
from rl_training.run.sidecar import read_sidecar, write_sidecar
from rl_training.run.trainer_files import check_entries_fit
from rl_training.run.whole_checkpoint import saved_whole
from rl_training.sequences import RolloutSequence
from rl_training.tasks.difficulty import PassRates, mean_reward


@dataclass
class DrGRPOConfig(GRPOConfig):
    """GRPOConfig with Dr. GRPO's settings and those of the training buffer."""

    loss_type: str = "dr_grpo"
    scale_rewards: str = "none"
    beta: float = 0.0
    top_k: int = 0
    bf16: bool | None = False
    disable_dropout: bool = True
    length_normalizer: str = field(default="constant", metadata={"help": "constant or prompt_longest"})
    difficulty_weighting: bool = field(default=True, metadata={"help": "draw prompts by expected reward variance"})
    reject_zero_advantage: bool = field(default=True, metadata={"help": "reject groups whose rewards are all equal"})
    max_refill_rounds: int = field(default=2, metadata={"help": "rounds in which rejected groups are replaced"})
    pass_threshold: float = field(default=0.5, metadata={"help": "reward at which a completion counts as solved"})
    router_aux_loss_coef: float | None = 0.0
    on_failed_premise: str = field(default="raise", metadata={"help": "raise or warn where the loss holds more"})

    # What Dr. GRPO requires of each setting, so that the weights w_i are exact.
    _REQUIRED = {
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "beta": 0.0,
        "num_iterations": 1,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "disable_dropout": True,
        "mask_truncated_completions": False,
        "top_entropy_quantile": 1.0,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "router_aux_loss_coef": 0.0,
        "multi_objective_aggregation": "sum_then_normalize",
    }
    _ADAMW = ("adamw_torch", "adamw_torch_fused")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, required in self._REQUIRED.items():
            if getattr(self, name) != required:
                raise UserError(
                    f"{name}={getattr(self, name)!r}: Dr. GRPO as it is analysed here needs {name}={required!r}"
                )
        if str(getattr(self.optim, "value", self.optim)) not in self._ADAMW:
            raise UserError(
                f"optim={self.optim!r}: only the step of {' or '.join(self._ADAMW)} can be split and analysed"
            )
        refuse_arguments(self)
        if self.steps_per_generation != self.gradient_accumulation_steps:
            raise UserError(
                f"steps_per_generation={self.steps_per_generation} but gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}: every step must train on sequences of its own policy; make them equal"
            )
        if self.length_normalizer not in ("constant", "prompt_longest"):
            raise UserError(f"length_normalizer={self.length_normalizer!r}: choose 'constant' or 'prompt_longest'")
        if self.on_failed_premise not in ("raise", "warn"):
            raise UserError(f"on_failed_premise={self.on_failed_premise!r}: choose 'raise' or 'warn'")
        if self.max_refill_rounds < 0:
            raise UserError(f"max_refill_rounds={self.max_refill_rounds}: it counts rounds, so 0 or more")
        local = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if local % self.num_generations:
            raise UserError(
                f"each process trains on {local} sequences a step, which is not a multiple of the {self.num_generations} "
                "completions of a prompt: change per_device_train_batch_size or gradient_accumulation_steps"
            )


class DrGRPOTrainer(GRPOTrainer):
    """Trains by Dr.

    GRPO on a filtered buffer; see the module's docstring. `args` is a DrGRPOConfig.

    train_dataset: columns `prompt` (text or chat messages), `prompt_index` (int, unique) and what
    the rewards need. task: the task's configuration, written into checkpoints so that an analysis
    can draw from the same task. model_name: the name the base model is loaded by again, where that
    is not its path.
    """

    args: DrGRPOConfig

    def __init__(
        self, *args: Any, task: dict[str, Any] | None = None, model_name: str | None = None, **kwargs: Any
    ) -> None:
        self._rewards_of_round: torch.Tensor | None = None
        self.unfiltered_rollouts: list[RolloutSequence] = []
        """This process's newest sequences before any was rejected: those of the first round of the
        last generation.
        """
        self._task, self._model_name = task, model_name
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, DrGRPOConfig):
            raise UserError("DrGRPOTrainer takes a DrGRPOConfig as `args`, since plain GRPOConfig has other defaults")
        if "prompt_index" not in self.train_dataset.column_names:
            raise UserError(
                "train_dataset has no column 'prompt_index': number the prompts, so that sequences can be traced"
            )
        if (kind := row_beyond_text(self.train_dataset[0])) is not None:
            raise UserError(refusal([kind], "DrGRPOTrainer"))
        self.pass_rates = PassRates(len(self.train_dataset), self.args.pass_threshold)
        self._learning_rates = LearningRateRecorder()
        self.add_callback(self._learning_rates)
        self._trained_at_all = TrainedAtAll()
        self.add_callback(self._trained_at_all)
        adapter = next(iter(getattr(self.accelerator.unwrap_model(self.model), "peft_config", {}).values()), None)
        if adapter is not None and (name := unrepeatable_initialisation(adapter)) is not None:
            raise UserError(f"init_lora_weights={name!r}: a checkpoint would be another policy at each load; {REMEDY}")
        self._guard = PremiseGuard(self, self.args.on_failed_premise)
        self.add_callback(self._guard)
        self._sampling_guard = SamplingGuard(self)
        self.add_callback(self._sampling_guard)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self._guard.expect(inputs["sequence_weight"][:, None] * loss_mask(inputs))
        return super().compute_loss(model, inputs, *args, **kwargs)

    # ------------------------------------------------------------------ the training buffer
    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        check_rewards(rewards, self.reward_func_names, self.reward_weights)
        local = slice(
            self.accelerator.process_index * len(prompts), (self.accelerator.process_index + 1) * len(prompts)
        )
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        total[rewards.isnan().all(1)] = torch.nan  # not scorable: TRL gives it no advantage, and so no say here
        self._rewards_of_round = total[local].cpu()
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        size, needed = self.num_generations, len(inputs) // self.num_generations
        outputs: list[dict[str, Any]] = []
        groups: list[GeneratedGroup] = []
        seen: list[int] = []
        for number in range(1 + self.args.max_refill_rounds):
            missing = needed - sum(group.status == "trained" for group in groups)
            most_missing = int(self.accelerator.gather(torch.tensor([missing], device=self.accelerator.device)).max())
            if most_missing == 0:
                break
            # Every process draws as many groups as the neediest, for generation and rewards are
            # collective calls.
            rng = np.random.default_rng(
                (self.args.seed, self.state.global_step, number, self.accelerator.process_index)
            )
            drawn, chances = self.pass_rates.draw(most_missing, rng, seen, self.args.difficulty_weighting)
            seen.extend(drawn)
            rows = [self.train_dataset[i] for i in drawn for _ in range(size)]
            outputs.append(self._generate_round(rows))
            groups.extend(self._judge_round(number, drawn, chances, needed, groups))
            self._share_pass_rates([g for g in groups if g.round == number])
        kept = self._fill(groups, needed)
        chosen = [(group.round, row) for group in kept for row in group.rows]
        output = merge_rounds(outputs, chosen, self._tokenizer.pad_token_id)
        self._finish(output, outputs, kept, groups)
        return output

    def _generate_round(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        try:
            output = super()._generate_and_score_completions(rows)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise UserError(
                f"the policy gave NaN or infinite logits at step {self.state.global_step + 1}: training has diverged; lower the "
                "learning rate, or go on from an earlier checkpoint"
            ) from error
        if more := beyond_text(output, TEXT_INPUTS):
            raise UserError(refusal(sorted(more), "DrGRPOTrainer"))
        self._sampling_guard.check_round(rows, output)
        return output

    def _judge_round(
        self, number: int, drawn: list[int], chances: list[float], needed: int, earlier: list[GeneratedGroup]
    ) -> list[GeneratedGroup]:
        assert self._rewards_of_round is not None
        rewards = self._rewards_of_round.view(len(drawn), self.num_generations).tolist()
        room = needed - sum(group.status == "trained" for group in earlier)
        judged = []
        for place, (prompt, chance, group_rewards) in enumerate(zip(drawn, chances, rewards, strict=True)):
            wanted = not self.args.reject_zero_advantage or has_reward_differences(group_rewards)
            status = "trained" if wanted and room > 0 else "rejected"
            room -= status == "trained"
            rows = range(place * self.num_generations, (place + 1) * self.num_generations)
            judged.append(GeneratedGroup(number, rows, prompt, chance, group_rewards, status))
        return judged

    def _share_pass_rates(self, groups: list[GeneratedGroup]) -> None:
        for prompt, rewards in gather_object([(group.prompt, group.rewards) for group in groups]):
            self.pass_rates.update(prompt, rewards)

    def _fill(self, groups: list[GeneratedGroup], needed: int) -> list[GeneratedGroup]:
        kept = [group for group in groups if group.status == "trained"]
        for group in groups:
            if len(kept) == needed:
                break
            if group.status == "rejected":
                group.status = "filler"
                kept.append(group)
        return kept

    def _finish(
        self,
        output: dict[str, Any],
        outputs: list[dict[str, Any]],
        kept: list[GeneratedGroup],
        groups: list[GeneratedGroup],
    ) -> None:
        """Put prompt ids beside every sequence, apply the length normaliser, log and record the
        buffer.
        """
        dataset = self.train_dataset
        device = output["advantages"].device
        index = [int(dataset[group.prompt]["prompt_index"]) for group in kept for _ in group.rows]
        output["prompt_index"] = torch.tensor(index, device=device)  # travels with each sequence through TRL's shuffle
        lengths = loss_mask(output).sum(1)
        constant = float(self.max_completion_length)
        divisor = torch.full_like(output["advantages"], constant)
        if self.args.length_normalizer == "prompt_longest":
            divisor = longest_of_prompt(lengths, output["prompt_index"]).to(divisor)
        count = len(lengths) * self.accelerator.num_processes
        filler = [group.status == "filler" for group in kept for _ in group.rows]
        plain = output["advantages"].masked_fill(torch.tensor(filler, device=device), 0.0)  # exactly, not to rounding
        weights = plain / (count * divisor)
        for group, empty in zip(kept, without_weight(weights, len(kept)), strict=True):
            group.status = "filler" if empty else group.status  # what has no weight was not trained
        # TRL divides by N * max_completion_length; at ratio 1 the loss is linear in the advantage,
        # so this makes it L_i.
        output["advantages"] = plain * (constant / divisor)
        output["sequence_weight"] = weights  # beside the loss, to be checked against it
        self._log_buffer(kept, groups)
        self._record(outputs, kept, groups, plain.tolist(), weights.tolist())

    def _log_buffer(self, kept: list[GeneratedGroup], groups: list[GeneratedGroup]) -> None:
        everything = gather_object([(g.round, g.status, mean_reward(g.rewards), len(g.rewards)) for g in groups])
        first = gather_object([(mean_reward(g.rewards), g.draw_probability) for g in groups if g.round == 0])
        sequences = {
            s: sum(n for _, status, _, n in everything if status == s) for s in ("trained", "filler", "rejected")
        }
        self._trained_at_all.note(sequences["trained"])
        metrics = {
            "rounds": 1 + max(number for number, *_ in everything),
            "generated": sum(sequences.values()),
            **sequences,
            "reward_first_round": mean_reward([reward for number, _, reward, _ in everything if number == 0]),
            "reward_trained": mean_reward([reward for _, status, reward, _ in everything if status != "rejected"]),
            **reward_of_all_prompts(*zip(*first, strict=True)),
        }
        for name, value in metrics.items():
            self._metrics["train"][f"buffer/{name}"].append(float(value))

    def _record(
        self,
        outputs: list[dict[str, Any]],
        kept: list[GeneratedGroup],
        groups: list[GeneratedGroup],
        advantages: list[float],
        weights: list[float],
    ) -> None:
        place_in_buffer = {id(group): place for place, group in enumerate(kept)}
        sequences: list[RolloutSequence] = []
        for group in groups:
            output, place = outputs[group.round], place_in_buffer.get(id(group))
            for k, row in enumerate(group.rows):
                tokens, drawn = completion_of_row(output, row)
                in_buffer = None if place is None else place * self.num_generations + k
                prompt = output["prompt_ids"][row][output["prompt_mask"][row].bool()].tolist()
                sequences.append(
                    RolloutSequence(
                        tuple(prompt),
                        tuple(tokens),
                        advantage=math.nan if in_buffer is None else advantages[in_buffer],
                        weight=math.nan if in_buffer is None else weights[in_buffer],
                        draw_probability=group.draw_probability,
                        drawn=drawn,
                        prompt_index=int(self.train_dataset[group.prompt]["prompt_index"]),
                        completion=self._tokenizer.decode(tokens, skip_special_tokens=True),
                        reward=None if math.isnan(group.rewards[k]) else group.rewards[k],
                        status=group.status,
                        step=self.state.global_step + 1,
                        round=group.round,
                        rank=self.accelerator.process_index,
                    )
                )
        self.unfiltered_rollouts = [s for s in sequences if s.round == 0 and s.length]
        everywhere = gather_object(sequences)
        if self.accelerator.is_main_process:
            write_rollouts(Path(self.args.output_dir), self.state.global_step + 1, everywhere)

    # ------------------------------------------------------------------ checkpoints
    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        with saved_whole(self) as folder:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every process writes its random state, and has it in the digests
            if self.args.should_save:
                rates = self._learning_rates.used
                record = describe_run(folder, self, rates, self._model_name, self._task, self.pass_rates)
                write_sidecar(folder, record)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        """README.md of the run, in place of TRL's, which names no base where that is not on a hub."""
        if self.is_world_process_zero():
            base, facts = run_facts(self, self._model_name, self._task)
            write_model_card(Path(self.args.output_dir), base, facts, self.state.log_history)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        check_entries_fit(Path(checkpoint) / "optimizer.pt", self.optimizer, ELSEWHERE)
        sidecar = read_sidecar(Path(checkpoint))
        if sidecar is None:
            raise UserError(
                f"{checkpoint} has no sidecar: it was not written by DrGRPOTrainer, so its pass rates are unknown; start a "
                "new run from its weights instead of resuming"
            )
        try:
            self.pass_rates.load_state_dict(sidecar.pass_rates)
        except ValueError as error:
            raise UserError(str(error)) from error
