"""Record what each step of a GRPOTrainer generated and trained on, so that its log can be audited
afterwards.

Three methods of the trainer are wrapped and called as they were: `_generate` (tokens before any
selection), `_calculate_rewards` and `compute_loss` (what is in the loss, by micro-batch). No random
number is drawn and no tensor changed.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rl_training.errors import UserError
from rl_training.generation.description import SettledSampling, describe_sampling
from rl_training.generation.drawn_tokens import drawn_masks, loss_mask
from rl_training.prompts.text_tokenizer import text_tokenizer
from rl_training.run.step_record import GENERATED, LOSS, RunSettings, write_settings, write_step


def record_steps(trainer: Any) -> StepRecorder:
    """Write `<output_dir>/recorded_steps/` while `trainer`, any GRPOTrainer of TRL, trains:
    `entropy-experiments audit` reads it.

    Call it before `trainer.train()`, once. Of a run that is to be audited checkpoints are needed as
    well (`save_steps`).
    """
    recorder = StepRecorder(trainer)
    trainer.add_callback(recorder)
    return recorder


class StepRecorder(TrainerCallback):
    """One file a step (rl_training/run/step_record.py), written by the main process when the
    optimizer has stepped.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._rounds: list[list[dict[str, Any]]] = []
        self._micro_batches: list[dict[str, Any]] = []
        self._settled, self._ended = SettledSampling(trainer), False
        self._wrap("_generate", self._after_generation)
        self._wrap("_calculate_rewards", self._after_rewards)
        self._wrap("compute_loss", self._before_loss, before=True)

    def _wrap(self, name: str, note: Any, before: bool = False) -> None:
        original = getattr(self._trainer, name)

        def noting(*args: Any, **kwargs: Any) -> Any:
            if before:
                note(*args, **kwargs)
                return original(*args, **kwargs)
            found = original(*args, **kwargs)
            if self._trainer.model.training:
                note(found)
            return found

        setattr(self._trainer, name, noting)

    # ------------------------------------------------------------------ what passes by
    def _after_generation(self, generated: Any) -> None:
        """Keep what one generation returned.

        Args:
            generated: (prompt ids, completion ids, masks of drawn tokens or None, ..., the
                sampler's log-probabilities, ...).
        """
        prompts, completions, masks = *generated[:2], drawn_masks(generated)
        scores = generated[4] if len(generated) > 4 else None
        rows = []
        for n, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            found: list[float] = [] if scores is None or scores[n] is None else list(scores[n])
            rows.append(
                {
                    "part": GENERATED,
                    "batch": len(self._rounds),
                    "prompt_ids": [int(t) for t in prompt],
                    "completion_ids": [int(t) for t in completion],
                    "mask": [True] * len(completion) if masks is None else masks[n],
                    "width": max(map(len, completions)),
                    "sampler_logprobs": [_number(v) for v in found] if len(found) == len(completion) else None,
                }
            )
        self._rounds.append(rows)

    def _after_rewards(self, rewards: Any) -> None:
        """Keep the rewards of one generation.

        Args:
            rewards: (n of all processes, reward functions).
        """
        if not self._rounds:
            return
        rows, rank = self._rounds[-1], self._trainer.accelerator.process_index
        for row, values in zip(rows, rewards[rank * len(rows) : (rank + 1) * len(rows)].tolist(), strict=True):
            row["rewards"] = [_number(value) for value in values]

    def _before_loss(self, model: Any, inputs: dict[str, Any], *_args: Any, **_kwargs: Any) -> None:
        if model.training:  # turned into lists after the step: training is not held up by copies from the device
            names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "advantages")
            self._micro_batches.append({name: inputs[name] for name in names if inputs.get(name) is not None})

    # ------------------------------------------------------------------ the run
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        self._rounds, self._micro_batches = [], []
        self._settled, self._ended = SettledSampling(self._trainer), False
        if self._trainer.accelerator.is_main_process:
            write_settings(Path(str(args.output_dir)), settings_of(self._trainer))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        """What is recorded says how the whole run drew: it ends before a step that draws otherwise."""
        if self._ended:
            return
        try:
            self._settled.hold(state.global_step + 1)
        except UserError as error:
            self._ended = True
            warnings.warn(f"steps are recorded no longer: {error}", RuntimeWarning, stacklevel=2)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_kwargs: Any
    ) -> None:
        if self._ended:
            self._rounds, self._micro_batches = [], []
            return
        rows = [row for generated in self._rounds for row in generated]
        rows += [row for number, inputs in enumerate(self._micro_batches) for row in _loss_rows(number, inputs)]
        self._rounds, self._micro_batches = [], []
        rank = self._trainer.accelerator.process_index
        everything = gather_object([{**row, "rank": rank} for row in rows])
        if self._trainer.accelerator.is_main_process:
            write_step(Path(str(args.output_dir)), state.global_step, everything)


def _loss_rows(number: int, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Padding is left out; of a completion that is masked out as a whole, which cannot be told from
    its tokens, it stays in.
    """
    in_loss, attended = loss_mask(inputs).cpu(), inputs["completion_mask"].bool().cpu()
    prompts, prompt_masks = inputs["prompt_ids"].cpu(), inputs["prompt_mask"].bool().cpu()
    advantages = inputs.get("advantages")
    of_sequences = advantages.tolist() if advantages is not None and advantages.dim() == 1 else [None] * len(prompts)
    rows = []
    for n, ids in enumerate(inputs["completion_ids"].cpu()):
        kept = attended[n] if bool(attended[n].any()) else attended[n] | True
        rows.append(
            {
                "part": LOSS,
                "batch": number,
                "prompt_ids": prompts[n][prompt_masks[n]].tolist(),
                "completion_ids": ids[kept].tolist(),
                "mask": in_loss[n][kept].tolist(),
                "width": len(ids),
                "advantage": _number(of_sequences[n]),
            }
        )
    return rows


def settings_of(trainer: Any) -> RunSettings:
    """The settings that decide how `trainer` makes its metrics."""
    args, sampling = trainer.args, describe_sampling(trainer)
    tokenizer = text_tokenizer(trainer.processing_class)
    model = trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return RunSettings(
        temperature=float(args.temperature),
        max_completion_length=int(args.max_completion_length),
        eos_token_ids=sorted(set(getattr(trainer, "eos_token_ids", None) or sampling.eos_token_ids)),
        pad_token_id=int(tokenizer.pad_token_id),
        completions_per_prompt=int(args.num_generations),
        reward_names=list(trainer.reward_func_names),
        reward_weights=[float(weight) for weight in trainer.reward_weights],
        mixed_precision=str(trainer.accelerator.mixed_precision),
        mask_truncated_completions=bool(args.mask_truncated_completions),
        beta=float(args.beta),
        dtype=str(base.dtype).removeprefix("torch."),
        model_name=str(getattr(trainer, "_model_name", None) or getattr(base.config, "_name_or_path", "") or ""),
        sampler_departures=[f"{d.name}={d.value!r}" for d in sampling.departures],
    )


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)
