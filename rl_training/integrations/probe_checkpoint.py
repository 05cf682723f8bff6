"""The probe's state inside a trainer's checkpoints, so that a resumed run is probed as if it had not been stopped.

Two methods of the trainer are wrapped and called as they were: the one by which every process saves its random state beside the
others' (`entropy_probe-<rank>.probe` goes there too), and the one that loads the optimizer. What `mode: watch` has learned is
in `trainer_state.json` (rl_training.probe.watch_state).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from entropy_core.gradients import trainable_parameters
from entropy_core.passes.prefix_sharing import PrefixSharing
from entropy_core.processes import Processes
from rl_training.algs.entropy_probe import SimpleEntropyProbe
from rl_training.config import EntropyProbeConfig
from rl_training.integrations.watched_sequences import WatchedSequences
from rl_training.premises.surprisal_check import SamplerWatch
from rl_training.probe.probe_state import ProbeState, read_state, state_path, write_state
from rl_training.sequences import RolloutSequence

_OF_THE_GRADIENT = ("estimator", "averaging", "rollouts", "per_completion", "predictors", "fused")


@dataclass(frozen=True)
class Probed:
    """What watches beside a trainer; `layouts`: how rows are laid out, which decides how numbers are rounded."""

    model: nn.Module
    probe: SimpleEntropyProbe
    sequences: WatchedSequences
    sampler: SamplerWatch
    layouts: tuple[PrefixSharing, ...]


class ProbeCheckpoint:
    """Call `begin` when training begins. `carried`: sequences whose gradient the next step takes (`rollouts: previous_step`)."""

    def __init__(self, trainer: Any, config: EntropyProbeConfig, probed: Probed, sharing: Processes) -> None:
        self._trainer, self._config, self._probed, self._sharing = trainer, config, probed, sharing
        self._probe, self._sequences = probed.probe, probed.sequences
        self.carried: list[RolloutSequence] = []
        self.off = False
        """Whether the probe has failed, so that there is nothing to go on from."""
        self._loaded: Path | None = None
        save, load = trainer._save_rng_state, trainer._load_optimizer_and_scheduler

        def saving(output_dir: Any, *args: Any, **kwargs: Any) -> Any:
            found = save(output_dir, *args, **kwargs)
            self._save(Path(output_dir))
            return found

        def loading(checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
            found = load(checkpoint, *args, **kwargs)
            self._loaded = None if checkpoint is None else Path(checkpoint)
            return found

        trainer._save_rng_state, trainer._load_optimizer_and_scheduler = saving, loading

    @property
    def _own(self) -> bool:
        """Whether what is watched is the trainer's own sequences, which it may train on again."""
        return self._config.rollouts in ("current", "previous_step")

    @property
    def _settings(self) -> dict[str, Any]:
        values = {name: getattr(self._config, name) for name in _OF_THE_GRADIENT}
        return {**values, "folds": self._probe.folds, "processes": self._trainer.accelerator.num_processes}

    def _save(self, checkpoint: Path) -> None:
        state = self._probe.state()
        if self.off:
            return
        if self._own:
            state.tensors, state.values = self._sequences.state()
        # What only readers and losses need stays behind: it may be anything.
        bare = [replace(s, prompt_row=None, token_weights=None, sampler_logprobs=None) for s in self.carried]
        state.values |= {
            "step": self._trainer.state.global_step,
            "carried": [s.to_json() for s in bare],
            "sampler": self._probed.sampler.state(),
            "layouts": [layout.state() for layout in self._probed.layouts],
        }
        write_state(state_path(checkpoint, self._trainer.accelerator.process_index), state, self._settings)

    def begin(self, step: int) -> None:
        """A run begins after `step`: load what the checkpoint holds that it is resumed from, if it is."""
        folder, self._loaded = self._loaded, None
        if folder is None:
            return
        self._probe.reset()
        self.carried = []
        path, device = state_path(folder, self._trainer.accelerator.process_index), self._trainer.accelerator.device
        there, anew = path.exists(), self._learned()
        if not self._sharing.any(there, device) and not (self._own or self._config.keeps_gradients):
            return
        trouble = None
        try:
            if there:
                self._load(path, step)
            else:
                trouble = "the checkpoint holds no record of the probe's averages (it is of an older release, or was not probed)"
        except (ValueError, TypeError, OSError) as error:
            trouble = f"the checkpoint's record {path.name} cannot be gone on from ({error})"
        # All processes, or none: they decide alike only from the same.
        if self._sharing.any(trouble is not None, device):
            self._probe.reset()
            self.carried = []
            self._learn(anew)
            warnings.warn(
                f"the entropy probe: {trouble or 'the record of another process is damaged'}: averages of gradients begin anew, "
                "so that the first predictions differ from those of a run that was not stopped",
                RuntimeWarning,
                stacklevel=2,
            )

    def _learned(self) -> tuple[list[Any], list[Any], tuple[dict[str, Tensor], dict[str, Any]]]:
        """What passes and steps have taught, but for gradients."""
        return (
            [layout.state() for layout in self._probed.layouts],
            self._probed.sampler.state(),
            self._sequences.state(),
        )

    def _learn(self, learned: tuple[list[Any], list[Any], tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
        layouts, sampler, sequences = learned
        for layout, known in zip(self._probed.layouts, layouts, strict=True):
            layout.load(known)
        self._probed.sampler.load(sampler)
        self._sequences.load(*sequences)

    def _load(self, path: Path, step: int) -> None:
        parameters = trainable_parameters(self._probed.model)
        state = read_state(path, self._settings, parameters, self._config.averaging, self._sharing)
        if state.values.get("step") != step:
            raise ValueError(f"it is of step {state.values.get('step')!r}")
        carried, layouts = state.values.get("carried"), state.values.get("layouts")
        if not isinstance(carried, list) or not isinstance(layouts, list) or len(layouts) != len(self._probed.layouts):
            raise ValueError("it is incomplete")
        found = [_carried(values) for values in carried]
        for layout, known in zip(self._probed.layouts, layouts, strict=True):
            layout.load(known)
        self._probed.sampler.load(state.values.get("sampler"))
        if self._own:
            self._sequences.load(state.tensors, state.values)
        self._probe.load(ProbeState(state.averages, state.steps_since, state.no_parts))
        self.carried = found


def _carried(values: Any) -> RolloutSequence:
    if not isinstance(values, Mapping):
        raise ValueError("a sequence is no record")
    found = RolloutSequence.from_json(values)
    for ids in (found.prompt_ids, found.completion_ids):
        if not (isinstance(ids, tuple) and ids and all(isinstance(t, int) and t >= 0 for t in ids)):
            raise ValueError("the tokens of a sequence are not tokens")
    return found
