"""The record that this project's trainer writes beside files of FSDP or DeepSpeed, carried into what is imported of them."""

from __future__ import annotations

from pathlib import Path

from entropy_experiments.checkpoints.imported import ImportedGroup
from rl_training.errors import UserError
from rl_training.run.checkpoint_digests import check_digests
from rl_training.run.sidecar import SIDECAR_NAME, read_sidecar, write_sidecar


def carry_record(source: Path, folder: Path, groups: list[ImportedGroup]) -> str | None:
    """Write the source's sidecar into an imported checkpoint, its groups in the optimizer's order.

    Digests stay behind: they were checked here, and `imported.json` has those of the files that were made.

    Args:
        source: The checkpoint's folder, as the trainer wrote it.
        folder: The imported checkpoint.
        groups: Of its optimizer; [] without one.

    Returns:
        Where it came from, None where there is none.

    Raises:
        UserError: For files that are not those of the record, and groups that are not the optimizer's.
    """
    sidecar = read_sidecar(source)
    if sidecar is None:
        return None
    check_digests(source, sidecar.sha256)
    recorded = {frozenset(names): rate for names, rate in
                zip(sidecar.optimizer_parameter_names, sidecar.learning_rates_used, strict=False) if names}  # fmt: skip
    names = [group.names for group in groups if group.names]
    if groups and {frozenset(own) for own in names} != recorded.keys():
        raise UserError(
            f"{source / SIDECAR_NAME} has other parameter groups than the optimizer's state: files of two checkpoints are mixed; "
            "copy it again, or delete the record to import without it"
        )
    update = {"sha256": {}, "rollouts_sha256": None}
    if groups:
        rates = [recorded.get(frozenset(group.names), group.lr) for group in groups]
        update |= {"optimizer_parameter_names": [group.names for group in groups], "learning_rates_used": rates}
    write_sidecar(folder, sidecar.model_copy(update=update))
    return str(source / SIDECAR_NAME)
