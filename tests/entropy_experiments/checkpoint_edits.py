"""Changes to a checkpoint's files, with its record brought up to date: what a test changes is then not refused as damage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rl_training.run.checkpoint_digests import checkpoint_digests

SIDECAR = "entropy_experiments.json"


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def reseal(checkpoint: Path) -> None:
    """Record the digests of the files as they are now."""
    if (checkpoint / SIDECAR).exists():
        edit_json(checkpoint / SIDECAR, lambda record: record.update(sha256=checkpoint_digests(checkpoint)))


def edit_optimizer(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change optimizer.pt, and reseal."""
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    change(state)
    torch.save(state, checkpoint / "optimizer.pt")
    reseal(checkpoint)


def flip_byte(path: Path, place: float = 0.9) -> None:
    """One byte of a file, at this share of its length, changed."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0x40
    path.write_bytes(bytes(content))
