"""Reading what a stranger may have written: pickles that may name nothing but the data types that belong there.

Torch's distributed checkpoints keep their index in ``.metadata``, a pickle, and torch loads it with plain
``pickle.load``. Here only the classes of that index are allowed; anything else is refused unopened.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

METADATA = ".metadata"
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
        FileNotFoundError: there is none.
        ValueError: it is damaged, names something that could run code, or a file outside of the directory.
    """
    path = checkpoint / METADATA
    with path.open("rb") as file:
        try:
            metadata = _Unpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
            files = {info.relative_path for info in metadata.storage_data.values()}
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"{path}: is no index of a checkpoint, and was not opened: {error}") from None
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"{path}: names the file {name!r} outside of its directory; take another copy")
    return metadata
