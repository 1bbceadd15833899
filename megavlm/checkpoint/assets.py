"""The small files of a Hugging Face directory (configuration, tokenizer), kept in a checkpoint's ``hf`` folder.

They travel with every checkpoint that is trained from there, so that an export has them. They are copied and never
executed, Python files of remote code included.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.config.json_object import read_json
from megavlm.data.tokenizer import TOKENIZER_FILES, files_of, find_tokenizer
from megavlm.weights.kinds import OUTSIDE, pieces_of

FOLDER = "hf"
"""Of a checkpoint's directory."""
RECORD = "conversion.json"
"""In that folder: what the converter knows of where the weights come from."""
_KINDS: dict[str, tuple[type, ...]] = {
    "family": (str,),
    "home": (str,),
    "rows": (int,),
    "style": (str,),
    "feature_layer": (int, str, list),
    "tokens": (dict,),
    "model": (dict,),
    "origin": (dict,),
    "ignored": (dict,),
    "carried": (list,),
    "initialised": (list,),
}
CARRIED = "carried"
"""In that folder: tensors that the model has no parameter for."""
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".tar"}
_LARGEST = 64 << 20
# Files that go along with a tokenizer and are not its own.
_KEPT = ("preprocessor_config.json", "processor_config.json", "generation_config.json")


def small_files(directory: Path) -> list[Path]:
    """Return the files of ``directory`` that belong to a model and are no weights."""
    return sorted(
        path
        for path in directory.iterdir()
        if path.is_file()
        and path.suffix not in _WEIGHTS
        and not path.name.endswith(".index.json")
        and not path.name.startswith(".")
        and path.stat().st_size <= _LARGEST
    )


def copy_files(files: list[Path], to: Path) -> None:
    """Copy ``files`` into the directory ``to``, contents only."""
    to.mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.copyfile(path, to / path.name)


def copy_folders(folder: Path, to: Path) -> None:
    """Copy the small files of a checkpoint in pieces back to where they lay (:attr:`Source.folders`)."""
    for name in (*pieces_of(folder), OUTSIDE):
        if (folder / name).is_dir():
            copy_files(small_files(folder / name), to if name == OUTSIDE else to / name)


def write_record(checkpoint: Path, record: dict[str, Any]) -> None:
    """Write the record into a checkpoint's folder."""
    (checkpoint / FOLDER).mkdir(exist_ok=True)
    (checkpoint / FOLDER / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(checkpoint: Path) -> dict[str, Any]:
    """Return the record of a checkpoint, empty for one that was not made from a Hugging Face directory.

    Raises:
        UserError: it is damaged.
    """
    path = checkpoint / FOLDER / RECORD
    if not path.is_file():
        return {}
    record = read_json(path)
    for key, kinds in _KINDS.items():
        if not isinstance(record.get(key), (*kinds, type(None))):
            raise UserError(f"{path}: {key} is {record[key]!r}; convert the checkpoint again, or restore the file")
    return record


def inherit(parent: Path | None, tokenizer: Path | None, checkpoint: Path) -> None:
    """Give ``checkpoint`` a folder: that of the one it was trained from, with the run's tokenizer.

    Carried tensors are hard links where the file system has them. The small files are copies: people edit them.
    """
    source, folder = parent / FOLDER if parent is not None else None, checkpoint / FOLDER
    if source is not None and source.is_dir():
        shutil.copytree(source, folder, copy_function=_link_or_copy)
    if tokenizer is None:
        return
    there = find_tokenizer(folder) if folder.is_dir() else None
    if there is not None and there.read_bytes() == tokenizer.read_bytes():
        return
    # The run was given another one: that of the parent would say other ids than the weights were trained with.
    for path in tokenizer_files(folder) if folder.is_dir() else ():
        if path.name not in _KEPT:
            path.unlink()
    copy_files(files_of(tokenizer), folder)


def tokenizer_files(directory: Path) -> list[Path]:
    """Return the files of ``directory`` that belong to its tokenizer."""
    return sorted({path for pattern in TOKENIZER_FILES for path in directory.glob(pattern) if path.is_file()})


def _link_or_copy(source: str, target: str) -> None:
    if Path(source).parent.name == CARRIED:
        try:
            os.link(source, target)
            return
        except OSError:  # another file system
            pass
    shutil.copyfile(source, target)
