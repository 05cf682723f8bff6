"""The names that checkpoints' pickles may hold, and what stands for each: plain data, none of it
executed.

Tensors become `StoredTensor`, which says where the values lie; everything else is a dict, a list, a
number or a `Record`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from entropy_experiments.checkpoints.readers.inert_pickle import Call, Damaged, Name, Record
from entropy_experiments.checkpoints.readers.stored_tensor import StoredTensor

DTENSOR = "torch.distributed.tensor DTensor"
_MOST_DIMENSIONS = 16
_DTYPES = (
    "float32 float64 float16 bfloat16 uint8 int8 int16 int32 int64 bool float8_e4m3fn float8_e5m2 complex64".split()
)
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


def dtype_of(name: Any) -> torch.dtype:
    """The dtype that a file names. Raises Damaged for what is none."""
    text = name.text if isinstance(name, Name) else ""
    if not text.startswith("torch ") or text[6:] not in _DTYPES:
        raise Damaged("a tensor of it has no dtype")
    return getattr(torch, text[6:])


def sizes(value: Any) -> tuple[int, ...]:
    """A shape, an offset or strides. Raises Damaged where it is none."""
    value = tuple(value) if isinstance(value, list) else value
    if not isinstance(value, tuple) or len(value) > _MOST_DIMENSIONS or not all(type(n) is int for n in value):
        raise Damaged("a tensor of it has no shape")
    if any(n < 0 for n in value) or math.prod(max(n, 1) for n in value) > 1 << 48:
        raise Damaged("a tensor of it is larger than any")
    return value


def _dict(items: Any = ()) -> dict[Any, Any]:
    """OrderedDict and its kin: empty here, filled by the opcodes that follow."""
    if items not in ((), []):
        raise Damaged("a dictionary of it is made from something")
    return {}


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_rest: Any) -> StoredTensor:
    if not isinstance(storage, StoredTensor) or type(offset) is not int:
        raise Damaged("a tensor of it has no values")
    return storage.view(offset, sizes(size), sizes(stride))


def _tensor_of_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_rest: Any
) -> StoredTensor:
    if not isinstance(storage, StoredTensor) or type(offset) is not int:
        raise Damaged("a tensor of it has no values")
    return storage.as_dtype(dtype_of(dtype)).view(offset, sizes(size), sizes(stride))


def _parameter(data: Any, *_rest: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise Damaged("a parameter of it is no tensor")
    return data


def _wrapper(_cls: Any, *_rest: Any) -> None:
    """The shell of a DTensor; its content comes with the state."""


def _subclass(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A DTensor by its state; a plain tensor with attributes, as ZeRO-3 has, without them. Others
    are refused.
    """
    name = kind.text if isinstance(kind, Name) else ""
    if name in _DTENSORS:
        return Record(DTENSOR, (), state)
    rebuild = _TENSORS.get(function.text) if isinstance(function, Name) else None
    if (
        name in _PLAIN
        and rebuild is not None
        and rebuild in (_tensor, _tensor_of_dtype, _parameter)
        and isinstance(arguments, tuple)
    ):
        return rebuild(*arguments)
    raise Damaged(f"a tensor of it is a {name[:80] or 'something'}, which is not read")


def _size(items: Any = ()) -> tuple[int, ...]:
    return sizes(items)


def _text(value: Any = "", *_rest: Any) -> str:
    return str(value) if isinstance(value, str) else ""


_DTENSORS = frozenset({DTENSOR, "torch.distributed._tensor.api DTensor", "torch.distributed.tensor._api DTensor"})
_PLAIN = frozenset({"torch Tensor", "torch._tensor Tensor", "torch.nn.parameter Parameter"})
_PLACEMENTS = "torch.distributed.tensor.placement_types"
_OLD_PLACEMENTS = "torch.distributed._tensor.placement_types"

_TENSORS: dict[str, Call | None] = {
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_parameter_with_state": _parameter,
    **dict.fromkeys(_PLAIN),
    "torch._utils _rebuild_wrapper_subclass": _wrapper,
    "torch._tensor _rebuild_from_type_v2": _subclass,
    "torch.serialization _get_layout": _text,
    "torch Size": _size,
    "torch device": _text,
    "torch strided": None,
    "collections OrderedDict": _dict,
    "collections defaultdict": lambda *_: {},
    "builtins dict": _dict,
    "builtins list": lambda *_: [],
    "builtins set": lambda items=(): list(items),
    "__builtin__ set": lambda items=(): list(items),
    **{f"torch {name}": None for name in _DTYPES},
    **{f"torch {name}": None for name in STORAGES},
    **{f"torch.storage {name}": None for name in ("UntypedStorage", "TypedStorage")},
    **dict.fromkeys(_DTENSORS),
}
_DISTRIBUTED: dict[str, Call | None] = dict.fromkeys(
    [
        "torch.distributed._mesh_layout _FlatLayout",
        "torch.distributed._mesh_layout _MeshLayout",
        "torch.distributed.device_mesh DeviceMesh",
        "torch.distributed._tensor.device_mesh DeviceMesh",
        "torch.distributed.tensor._dtensor_spec DTensorSpec",
        "torch.distributed.tensor._dtensor_spec ShardOrderEntry",
        "torch.distributed.tensor._dtensor_spec TensorMeta",
        "torch.distributed._tensor.placement_types DTensorSpec",
        "torch.distributed._tensor.placement_types TensorMeta",
        *(
            f"{module} {name}"
            for module in (_PLACEMENTS, _OLD_PLACEMENTS)
            for name in ("Shard", "Replicate", "Partial", "_StridedShard")
        ),
    ]
)
# What lies beside tensors in the files of DeepSpeed, and in states of schedules and of random numbers.
_BESIDE: dict[str, Call | None] = dict.fromkeys(
    [
        "argparse Namespace",
        "types SimpleNamespace",
        "deepspeed.runtime.fp16.loss_scaler LossScaler",
        "deepspeed.runtime.fp16.loss_scaler DynamicLossScaler",
        "deepspeed.runtime.zero.config ZeroStageEnum",
        "deepspeed.utils.tensor_fragment fragment_address",
        "deepspeed.utils.tensor_fragment tensor_fragment",
        "numpy.core.multiarray _reconstruct",
        "numpy._core.multiarray _reconstruct",
        "numpy.core.multiarray scalar",
        "numpy._core.multiarray scalar",
        "numpy ndarray",
        "numpy dtype",
        "_codecs encode",
        "transformers.trainer_utils SchedulerType",
    ]
)
_DCP = "torch.distributed.checkpoint.metadata"

CHECKPOINT_NAMES: Mapping[str, Call | None] = {**_TENSORS, **_DISTRIBUTED, **_BESIDE}
"""Of files that torch.save wrote."""
METADATA_NAMES: Mapping[str, Call | None] = {
    "torch Size": _size,
    "torch.serialization _get_layout": _text,
    "collections OrderedDict": _dict,
    "builtins set": lambda items=(): list(items),
    "pathlib PosixPath": None,
    "pathlib WindowsPath": None,
    "pathlib._local PosixPath": None,
    **{f"torch {name}": None for name in _DTYPES},
    **{
        f"{_DCP} {name}": None
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    },
    "torch.distributed.checkpoint.filesystem _StorageInfo": None,
}
"""Of the description of a torch DCP folder."""
