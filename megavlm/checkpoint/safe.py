"""Reading what a stranger may have written: pickles that may name nothing but the data types that belong there.

Torch's distributed checkpoints keep their index in ``.metadata``, a pickle, and torch loads it with plain
``pickle.load``. Here only the classes of that index are allowed; anything else is refused unopened. What the index
calls an object rather than a tensor is a pickle too, which torch would run: nothing here ever asks for one.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from megavlm.config.errors import UserError
from megavlm.config.json_object import read_json
from megavlm.parallel.megatron_versions import CHECKPOINT_DEFAULTS
from megavlm.weights.pickles import first_line, load_weights

METADATA = ".metadata"
_COMMON, _CONFIG = "common.pt", "metadata.json"
_BACKENDS = {"sharded_backend": "torch_dist", "common_backend": "torch"}
_CHECKPOINT = "torch.distributed.checkpoint."
_ALLOWED = {
    (_CHECKPOINT + "metadata", name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    # Megatron-Core keeps the plans of all ranks in the index.
    *((_CHECKPOINT + "planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    (_CHECKPOINT + "planner", "BytesIOWriteData"),
    (_CHECKPOINT + "filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in it")


def read_metadata(checkpoint: Path) -> Metadata:
    """Return the index of the distributed checkpoint in ``checkpoint``, without running anything from it.

    Raises:
        MissingFileError: there is none.
        UserError: it is damaged, names something that could run code, or a file outside of the directory.
    """
    path = checkpoint / METADATA
    with path.open("rb") as file:
        try:
            metadata = _Unpickler(file).load()
            files = _files(metadata)
        except Exception as error:  # a damaged pickle can raise anything
            reason = first_line(error)
            raise UserError(f"{path}: is no index of a checkpoint, and was not opened: {reason}") from None
    for name in files:
        if Path(name).name != name or name in ("", ".."):
            raise UserError(f"{path}: names the file {name!r} outside of its directory; take another copy")
    return metadata


def _files(metadata: Any) -> set[str]:
    """Return the files that an index names.

    Raises:
        UnpicklingError: it is none.
    """
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
    for key, entry in metadata.state_dict_metadata.items():
        well = isinstance(key, str) and isinstance(entry, TensorStorageMetadata | BytesStorageMetadata)
        if well and isinstance(entry, TensorStorageMetadata):
            well = isinstance(entry.size, torch.Size) and isinstance(entry.properties.dtype, torch.dtype)
        if not well:
            raise pickle.UnpicklingError(f"its entry {key!r} is neither a tensor nor an object")
    files = {info.relative_path for info in metadata.storage_data.values()}
    if not all(isinstance(name, str) for name in files):
        raise pickle.UnpicklingError("a file's name is no text")
    return files


def check_files(checkpoint: Path) -> None:
    """Check the small files that Megatron-Core reads beside the tensors: their format, and that nothing in them runs.

    Raises:
        MissingFileError: one is missing.
        UserError: one is damaged, or names something that could run code.
    """
    path = checkpoint / _CONFIG
    config = read_json(path)
    config = CHECKPOINT_DEFAULTS | config
    if any(config.get(key) != value for key, value in _BACKENDS.items()):
        raise UserError(f"{path}: is not of a checkpoint in Megatron-Core's torch_dist format")
    load_weights(checkpoint / _COMMON)


def check_tensors(checkpoint: Path, metadata: Metadata, keys: Iterable[str]) -> None:
    """Check that what is about to be loaded are tensors.

    Raises:
        UserError: the checkpoint has an object under one of ``keys``.
    """
    wanted = tuple(keys)
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata) and key.startswith(wanted):
            raise UserError(
                f"{checkpoint / METADATA}: {key} is an object, which could run code, where a tensor belongs;"
                " it was not opened"
            )


def behind(error: Exception) -> Exception:
    """Return the OSError that ``error`` follows from, or itself: torch's writer says something else of a full disk."""
    one: BaseException | None = error
    while one is not None and not isinstance(one, OSError):
        one = one.__cause__ or one.__context__
    return one if isinstance(one, OSError) else error
