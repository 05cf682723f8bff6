"""What a user does, with planted sources: train a little, analyse the checkpoint, keep going. Prints what spoke up, as JSON.

`python -m tests.mutations.user_run FOLDER [RUN]`: with RUN, a finished run of sound sources, nothing is trained.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from pathlib import Path


def user_run(folder: Path, run: Path | None) -> dict[str, list[str]]:
    """{"refused": lines of refusals, "checks": names of failed self-checks}."""
    from entropy_experiments.buffers import recorded_task
    from entropy_experiments.entropy_runner import run_fisher_analysis
    from rl_training.train import run_training
    from tests.entropy_experiments.small_analysis import config
    from tests.tiny_policy import save_tiny_policy, tiny_train_config
    from tests.unpainted import paint_nothing

    paint_nothing()
    recorded_task.why_trust_is_needed = lambda task: None
    found: dict[str, list[str]] = {"refused": [], "checks": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if run is None:
                settings = tiny_train_config(
                    save_tiny_policy(folder / "policy"), folder / "run", training={"steps": 4, "save_every": 4},
                    rollouts={"temperature": 0.8}, entropy_probe={"enabled": False},
                    optimizer={"max_grad_norm": 0.05, "weight_decay": 0.1, "lr_scheduler": "linear", "learning_rate": 1e-3},
                )  # fmt: skip
                run = run_training(settings, quiet=True)
            sizes = ("entropy_analysis.eval_batch_size=64", "entropy_analysis.train_batch_size=32")
            done = run_fisher_analysis(run, config(*sizes), folder=folder / "results", keep_going=True)
            found["checks"] = [check.name for check in done.failed_checks]
        except Exception as error:  # a refusal, or whatever the fault brings about: a user sees one line
            found["refused"].append(f"{' '.join(str(error).split())[:200]}")
    return found


def main() -> None:
    import torch

    torch.set_num_threads(1)
    run = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        found = user_run(Path(sys.argv[1]), run)
    print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
