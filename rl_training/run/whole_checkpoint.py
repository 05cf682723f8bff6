"""A checkpoint appears whole or not at all: the Trainer writes into `checkpoint-N.part`, which is renamed when it is complete.

A run that is killed while it saves leaves a folder of that name, which nothing takes for a checkpoint (its name is no number) and
the next start removes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer_utils import rotate_checkpoints

from rl_training.errors import ResumableError
from rl_training.files import PART, flush, refuse_link, replace_folder
from rl_training.run.disk import disk_is_full


@contextmanager
def saved_whole(trainer: Any) -> Iterator[Path]:
    """Around a Trainer's `_save_checkpoint`: yields the folder in which it then finds its files, not yet under their name.

    Every process of a launch enters it. A checkpoint of this step that is there is replaced once the new one is whole. Where
    saving fails, nothing is left.

    Raises:
        ResumableError: where the disk is full.
    """
    run, name = Path(trainer.args.output_dir), f"checkpoint-{trainer.state.global_step}"
    if trainer.args.push_to_hub:  # uploads go on in the background, from the path that was saved to
        yield run / name
        return
    place, wait = run / f"{name}{PART}", trainer.accelerator.wait_for_everyone
    if trainer.args.should_save:
        _remove(place)
    wait()
    trainer._get_output_dir = lambda trial: str(place)
    try:
        yield place / name
        wait()
        if trainer.args.should_save:
            _own_path(trainer.state, place, run)
            _put(place / name, run / name)
            _remove(place)
            rotate_checkpoints(
                str(run), trainer.args.save_total_limit, trainer.state.best_model_checkpoint, use_mtime=True
            )
        wait()
    except BaseException as error:
        if trainer.args.should_save:
            _remove(place)
        if disk_is_full(error):
            raise ResumableError(
                f"no space left on the disk of {run / name}: this checkpoint was not kept; free some and resume from the one "
                "before, with --resume"
            ) from error
        raise
    finally:
        del trainer._get_output_dir


def remove_unfinished_checkpoints(run: Path) -> None:
    """Remove what killed runs were saving, once nobody writes there any more."""
    for place in run.glob(f"checkpoint-*{PART}"):
        _remove(place)


def _own_path(state: Any, place: Path, run: Path) -> None:
    """The best checkpoint, where it is this one, by the name that it is about to get."""
    best = state.best_model_checkpoint
    if best is not None and Path(best).parent == place:
        state.best_model_checkpoint = str(run / Path(best).name)
        state.save_to_json(str(place / Path(best).name / "trainer_state.json"))


def _put(part: Path, folder: Path) -> None:
    for path in part.rglob("*"):
        flush(path)
    replace_folder(part, folder)


def _remove(place: Path) -> None:
    refuse_link(place)
    shutil.rmtree(place, ignore_errors=True)
