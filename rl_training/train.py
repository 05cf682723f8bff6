"""One training run from a configuration: model, task, trainer, probe, console; the run folder is
what it leaves.

<output_dir>/config.yaml              resolved, replayable
<output_dir>/checkpoint-<step>/       the Hugging Face Trainer's own, plus the sidecar entropy_experiments.json
<output_dir>/rollouts/step-*.parquet  every step's sequences, kept and rejected
<output_dir>/recorded_steps/          what each step's metrics were made of, for an audit of the log
<output_dir>/metrics.jsonl            everything logged, one line a step
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback

from entropy_core.processes import Processes
from rl_training.algs.dr_grpo import DrGRPOConfig, DrGRPOTrainer
from rl_training.config import TrainConfig
from rl_training.configuration import dump_config
from rl_training.errors import UserError
from rl_training.integrations.entropy_controller import EntropyControllerCallback, attach_entropy_controller
from rl_training.integrations.step_recorder import record_steps
from rl_training.integrations.trl import EntropyProbeCallback, attach_entropy_probe
from rl_training.models.load import add_lora, load_model_and_tokenizer
from rl_training.prompts.limited_templates import limited_templates
from rl_training.run.console import ConsoleCallback, MetricsFile
from rl_training.run.folder_lock import run_folder_locked
from rl_training.run.launched import world_size
from rl_training.run.run_files import CONFIG_NAME, ConfigFile, remove_records, tidy
from rl_training.run.start import find_start, is_done
from rl_training.run.training_memory import training_memory
from rl_training.tasks.task import Task, load_task


def build_trainer(config: TrainConfig) -> tuple[DrGRPOTrainer, Task]:
    """The trainer of a configuration with its probe attached, ready to train, and its task."""
    task = load_task(config.task)
    model, tokenizer = load_model_and_tokenizer(config.model.name, config.model.dtype, config.model.device)
    if config.lora.enabled:
        model = add_lora(model, config.lora, config.training.seed)
    else:
        model.requires_grad_(True)
    training_memory(model, config.training.memory_limit)
    args = trainer_arguments(config, on_cpu=model.device.type == "cpu")
    trainer = DrGRPOTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        reward_funcs=list(task.reward_functions),
        train_dataset=_dataset(task),
        task=config.task.model_dump(mode="json"),
        model_name=config.model.name,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if config.entropy_controller.enabled:
        attach_entropy_controller(trainer, None, config.entropy_controller, task.heldout, console=False)
    if config.entropy_probe.enabled:
        attach_entropy_probe(trainer, config.entropy_probe, task.heldout, console=False)
    return trainer, task


def _dataset(task: Task) -> Dataset:
    try:
        return Dataset.from_list(task.train)
    except (pa.ArrowException, OverflowError) as error:
        raise UserError(
            f"{task.name}: a further key is of another type from line to line ({error}): give it one type throughout"
        ) from error


def trainer_arguments(config: TrainConfig, on_cpu: bool) -> DrGRPOConfig:
    """TRL's arguments for a configuration.

    Raises:
        UserError: the buffer does not divide among processes, or into micro-batches.
    """
    processes = world_size()
    rollouts, optimizer, buffer, run = config.rollouts, config.optimizer, config.training_buffer, config.training
    sequences = rollouts.prompts_per_step * rollouts.completions_per_prompt
    if rollouts.prompts_per_step % processes:
        raise UserError(
            f"{processes} processes cannot share {rollouts.prompts_per_step} prompts a step evenly: set "
            "rollouts.prompts_per_step to a multiple of their number"
        )
    micro = min(optimizer.micro_batch_size, sequences // processes)
    if micro < 1 or sequences % (micro * processes):
        raise UserError(
            f"a buffer of {sequences} sequences does not divide into micro-batches of {micro} on {processes} process(es): "
            "change optimizer.micro_batch_size or rollouts.prompts_per_step"
        )
    if optimizer.warmup_steps and optimizer.lr_scheduler == "constant":
        raise UserError("optimizer.warmup_steps needs a schedule that warms up: set optimizer.lr_scheduler")
    return DrGRPOConfig(
        output_dir=run.output_dir,
        max_steps=run.steps,
        save_steps=run.save_every,
        seed=run.seed,
        report_to=list(run.report_to),
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=on_cpu,
        bf16=False,
        logging_nan_inf_filter=False,
        gradient_checkpointing=run.gradient_checkpointing,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=sequences // (micro * processes),
        num_generations=rollouts.completions_per_prompt,
        max_completion_length=rollouts.max_completion_length,
        temperature=rollouts.temperature,
        top_p=rollouts.top_p,
        top_k=rollouts.top_k,
        optim="adamw_torch",
        learning_rate=optimizer.learning_rate,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        lr_scheduler_type=optimizer.lr_scheduler,
        warmup_steps=optimizer.warmup_steps,
        length_normalizer=config.algorithm.length_normalizer,
        difficulty_weighting=buffer.difficulty_weighting,
        reject_zero_advantage=buffer.reject_zero_advantage,
        max_refill_rounds=buffer.max_refill_rounds,
        pass_threshold=buffer.pass_threshold,
    )


def run_training(config: TrainConfig, quiet: bool = False, resume: bool = False) -> Path:
    """Train, and return the run folder.

    Args:
        resume: go on from the folder's newest checkpoint, or begin anew where it has none.

    Raises:
        UserError: where the folder holds a run already (unless resuming) or something else, another
            process is training into it, or the checkpoint to go on from is damaged, of another run
            or of other settings.
    """
    folder = Path(config.training.output_dir)
    with run_folder_locked(folder), limited_templates():
        if resume and is_done(config):
            tidy(folder)
            warnings.warn(f"{folder}: all {config.training.steps} steps are done already", stacklevel=2)
            return folder
        return _train(config, folder, quiet, resume)


def _train(config: TrainConfig, folder: Path, quiet: bool, resume: bool) -> Path:
    start = find_start(config, resume)
    trainer, task = build_trainer(config)
    written = ConfigFile(folder / CONFIG_NAME, dump_config(config))
    trainer.add_callback(written)
    trainer.add_callback(MetricsFile(folder / "metrics.jsonl"))
    record_steps(trainer)
    callbacks = trainer.callback_handler.callbacks
    probes = [c for c in callbacks if isinstance(c, EntropyProbeCallback)]
    told = [c for c in callbacks if isinstance(c, EntropyControllerCallback)] + probes
    described = [task.describe(), training_memory(trainer.model).describe(), *(c.describe() for c in told)]
    console = ConsoleCallback("\n".join(described), bool(probes))
    if not quiet:
        trainer.add_callback(console)
    try:
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
    except SystemExit as error:  # a run that ends here has saved nothing since its last checkpoint: never status 0
        raise UserError(
            f"something called exit() at step {trainer.state.global_step + 1} of training (a reward function, a callback?)"
        ) from error
    finally:
        console.close()
        if start is None and not written.done and trainer.is_world_process_zero():
            remove_records(folder)  # of a run that was refused, or ended, before its first step
    _save_last(trainer, folder)
    return folder


def _save_last(trainer: Any, folder: Path) -> None:
    """Where the first process does not find the last step's checkpoint: all save, or none, whatever disk each of them sees."""
    saved = Processes.world().from_root((folder / f"checkpoint-{trainer.state.global_step}").exists)
    if not saved:
        trainer._save_checkpoint(trainer.model, trial=None)
