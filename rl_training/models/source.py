"""From the name of a model to the folder or hub id that transformers loads."""

from pathlib import Path

from rl_training.errors import UserError
from rl_training.models.gguf import converted_folder, find_bundled_gguf

BUNDLED_MODEL = "smollm2-135m"


def resolve_source(name: str, cache_dir: Path | None = None) -> str:
    """Return a local folder with a whole model, converted from GGUF where need be, or a hub id as
    it stands.

    Raises:
        UserError: if `name` is neither, or a folder or file of another kind, which is then named.
    """
    if name == BUNDLED_MODEL:
        return str(converted_folder(find_bundled_gguf(), cache_dir))
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"model.name {name} is a file, but no .gguf: name the model's folder")
        return str(converted_folder(path.resolve(), cache_dir))
    if path.is_dir():
        return str(_check_model_folder(path))
    if path.is_absolute() or path.suffix == ".gguf" or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"model.name {name}: no such file or folder (looked in {Path.cwd()})")
    return name


def is_on_the_hub(name: str) -> bool:
    """Whether `name` can only be a model id of the hub, and the hub may be asked."""
    from huggingface_hub import constants

    try:
        local = Path(resolve_source(name)).exists()
    except UserError:
        return False
    return not local and not constants.HF_HUB_OFFLINE


def _check_model_folder(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"model.name {path} holds LoRA adapters, not a whole model: load it as a checkpoint; "
            "to train it further, set training.resume_from_checkpoint to it and model.name to its base model"
        )
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs:
        raise UserError(f"model.name {path} is a folder with a GGUF file: name the file, {ggufs[0]}")
    checkpoints = sorted(path.glob("checkpoint-*"))
    hint = f": did you mean {checkpoints[-1]}?" if checkpoints else ", so it is no model folder"
    raise UserError(f"model.name {path} has no config.json{hint}")
