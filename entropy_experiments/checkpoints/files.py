"""What tells a checkpoint from another one in its place: its files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any


def fingerprint(checkpoint: Path) -> dict[str, Any]:
    """{"files": name -> [bytes, SHA-256]} of every file in the folder, JSON-able."""
    files: dict[str, Any] = {}
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        files[str(path.relative_to(checkpoint))] = [path.stat().st_size, digest]
    return {"files": files}
