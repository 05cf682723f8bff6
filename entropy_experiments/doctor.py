"""What is in a checkpoint, what can be analysed from it, and what is missing and how to get it."""

from __future__ import annotations

from pathlib import Path

from entropy_experiments.checkpoint_loader import missing_parts, read_json, read_trainer_state, resolve_checkpoint
from entropy_experiments.recorded_law import law_of
from rl_training.algs.rollout_record import rollouts_path
from rl_training.checkpoint_format import read_sidecar
from rl_training.task_trust import REMEDY, why_trust_is_needed


def examine(path: str | Path, trust: bool = False) -> tuple[list[str], bool]:
    """Lines for a person, and whether a full analysis can run. Loads no model, opens and imports nothing that
    the record names. trust: as in the analysis.

    Raises UserError where the path holds no checkpoint at all, or its sidecar is broken.
    """
    folder = resolve_checkpoint(path)
    lines = [f"checkpoint {folder}"]
    state_path = folder / "trainer_state.json"
    if state_path.exists():
        state = read_trainer_state(folder)
        lines.append(f"  step {state['global_step']} of {state.get('max_steps', '?')}")
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        content = read_json(adapter)
        lines.append(
            f"  adapter: {content.get('peft_type')} r={content.get('r')} on {content.get('base_model_name_or_path')}"
        )
    else:
        lines.append("  whole model (no adapter)")
    sidecar = read_sidecar(folder)
    if sidecar is None:
        lines.append(
            "  no sidecar: written by plain TRL. Optimizer names are rebuilt and verified; give checkpoint.task, "
            "sampling.temperature and sampling.max_completion_length in the analysis configuration"
        )
    else:
        s = sidecar.sampling
        count = sum(map(len, sidecar.optimizer_parameter_names))
        precision = (
            sidecar.dtype if sidecar.mixed_precision == "no" else f"{sidecar.dtype} under {sidecar.mixed_precision}"
        )
        lines.append(f"  sidecar: {sidecar.model_name}, {precision}, {count} optimizer entries named")
        lines += [f"  sampling: {line}" for line in law_of(folder, s)]
        lines.append(f"  learning rate of its last step: {', '.join(f'{r:g}' for r in sidecar.learning_rates_used)}")
        step = rollouts_path(folder.parent, sidecar.step)
        recorded = "recorded" if step.exists() else "not recorded (train_prompts: from_run is not possible)"
        lines.append(f"  sequences of its last step: {recorded}")
    missing = missing_parts(folder)
    if sidecar is not None and sidecar.task is not None and not trust and (why := why_trust_is_needed(sidecar.task)):
        missing.append(f"your trust: its record names {why}: {REMEDY}")
    lines.extend(f"  MISSING {line}" for line in missing)
    without_optimizer = [line for line in missing if not line.startswith("optimizer.pt")]
    if not missing:
        lines.append("can be analysed: kernel, prediction split into batch, momentum and decay, attribution")
    elif not without_optimizer:
        lines.append("can be analysed without Adam's preconditioner only (fisher_kernel.preconditioning=none)")
    else:
        lines.append("cannot be analysed as it is")
    return lines, not missing
