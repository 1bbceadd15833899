"""A directory of Hugging Face weights, opened without loading them.

Safetensors (one file, or shards with an index), ``pytorch_model*.bin``, and the loose files that CodeFuse-VLM keeps its
parts in (``visual.bin``, ``mm_projector.bin``). A tensor of a folder (xtuner's ``projector``), or of one of
MiniGPT-4's files, is called ``projector/name``. Files are memory-mapped; pickles are read with ``weights_only=True``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megavlm.config.errors import MissingFileError, UserError
from megavlm.config.json_object import read_json
from megavlm.weights.kinds import LANGUAGE, OUTSIDE, TRAINED, pieces_of, what_is
from megavlm.weights.pickles import load_weights

CONFIG = "config.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# In this order: a directory may have the weights twice, and safetensors is what Transformers takes.
_WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "visual.bin",
    "mm_projector.bin",
)
_PICKLES = (".bin", ".pt", ".pth")
_POINTER = b"version https://git-lfs.github.com/spec/"
_ENDINGS = (".incomplete", ".part", ".aria2", ".crdownload")
"""Of files that the Hugging Face hub's client, and others, have not downloaded whole."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that has not been loaded."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    """A torch type, or the name of one that is not floating point."""
    file: Path


class Source:
    """The tensors and the configuration of a directory, or of a single weight file.

    Args:
        path: a directory in the layout of the Hugging Face hub, or a ``.safetensors``, ``.bin`` or ``.pt`` file.
        feature_layer: for a tower alone, whose configuration does not say it: the layer whose features are taken,
            as an index of Transformers' ``hidden_states``, several, or ``last_hidden_state``. LLaVA's is -2.

    Raises:
        MissingFileError: there is nothing at the path.
        UserError: a shard that the index names is missing, a file is damaged, or a pickle would run code.
    """

    def __init__(self, path: Path, feature_layer: int | str | Sequence[int] = -2) -> None:
        self.feature_layer = feature_layer
        if not path.exists():
            raise MissingFileError(f"{path}: no such file or directory")
        self.path = path
        self.directory = path if path.is_dir() else path.parent
        self.config = _read_configs(self.directory)
        self._open: dict[Path, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        # Of a checkpoint in pieces: each folder of weights, by its name.
        self.pieces = {name: Source(piece) for name, piece in (pieces_of(path) if path.is_dir() else {}).items()}
        whole = not {LANGUAGE, TRAINED}.isdisjoint(self.pieces)
        self.settings: dict[str, Any] = {}
        """What a trainer's file says of its run beside the weights (``config``)."""
        self.made: dict[str, str] = {}
        """Tensors that no file has, and what they are instead: see :meth:`make`."""
        self._makers: dict[str, Callable[[], Tensor]] = {}
        for file, expected in ({} if whole else self._files(path)).items():
            self._add(file, expected)
        for name, piece in self.pieces.items():
            self.tensors |= {f"{name}/{tensor}": info for tensor, info in piece.tensors.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def folders(self) -> dict[str, Path]:
        """Directories of small files, by the folder that a checkpoint of ours keeps them in: "" for the tokenizer's."""
        own = {name: piece.path for name, piece in self.pieces.items() if piece.path.is_dir()}
        text = own.pop(LANGUAGE, self.directory)
        return {"": text, **own, **({OUTSIDE: self.directory} if text != self.directory else {})}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor.

        Raises:
            UserError: there is none of that name.
        """
        if name not in self.tensors:
            raise UserError(f"{self.path}: has no tensor {name}; is the checkpoint whole?")
        return self.tensors[name].shape

    def get(self, name: str) -> Tensor:
        """Return a tensor, a view of the mapped file where possible.

        Raises:
            UserError: the file is damaged.
        """
        if name in self._makers:
            return self._makers[name]()
        folder, _, own = name.rpartition("/")
        if folder in self.pieces:
            return self.pieces[folder].get(own)
        handle = self._open[self.tensors[name].file]
        if isinstance(handle, Mapping):
            return handle[name]
        try:
            return handle.get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise UserError(f"{self.tensors[name].file}: {name} cannot be read: {error}") from None

    def make(self, name: str, shape: tuple[int, ...], why: str, maker: Callable[[Tensor], Any]) -> None:
        """Add a tensor that no file has, as the code that reads such checkpoints has it then, in fp32.

        Args:
            name: of the tensor.
            shape: its shape.
            why: what it is, for the report.
            maker: fills it, when it is read first.
        """
        self.tensors[name] = TensorInfo(shape, torch.float32, self.path)
        self.made[name] = why

        @functools.cache
        def made() -> Tensor:
            tensor = torch.empty(shape)
            maker(tensor)
            return tensor

        self._makers[name] = made

    def size_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(torch.Size(t.shape).numel() * _itemsize(t.dtype) for t in self.tensors.values())

    def _files(self, path: Path) -> dict[Path, list[str] | None]:
        """Return the weight files, each with the names that an index promises in it."""
        if path.is_file():
            return {path: None}
        for name in _WEIGHTS:
            if (path / name).is_file():
                return _read_index(path / name) if name.endswith(".index.json") else {path / name: None}
        there = what_is(path)
        raise UserError(
            f"{path}: holds no weights{_unfinished(path)}; "
            f"{f'it is {there}' if there else 'looked for ' + ', '.join(_WEIGHTS)}"
        )

    def _add(self, file: Path, expected: list[str] | None) -> None:
        check_pointer(file)
        if file.suffix in _PICKLES:
            handle, found, self.settings = _open_pickle(file)
        else:
            handle, found = _open_safetensors(file)
        self._open[file] = handle
        for name in expected or ():
            if name not in found:
                raise UserError(f"{file}: lacks {name}, which the index promises; download the file again")
        for name, info in found.items():
            if name in self.tensors:
                raise UserError(f"{file}: {name} is in {self.tensors[name].file.name} as well; remove one of the two")
            self.tensors[name] = info


def check_pointer(file: Path) -> None:
    """Check that a file is itself, and not what Git LFS leaves in its place until it is pulled.

    Raises:
        UserError: it is a pointer.
    """
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise UserError(
                f"{file}: is a pointer of Git LFS, not the file that it stands for; run git lfs pull there, or "
                "download the directory with hf download"
            )


def _unfinished(directory: Path) -> str:
    """Return the words that say that a download is not finished; empty where none is seen."""
    for folder in (directory, directory / ".cache" / "huggingface" / "download", directory.parent.parent / "blobs"):
        found = sorted(path for ending in _ENDINGS for path in folder.glob(f"*{ending}"))
        if found:
            return f" (a download is not finished: {found[0]})"
    return ""


def _itemsize(dtype: torch.dtype | str) -> int:
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 1


def _read_configs(directory: Path) -> dict[str, Any]:
    """Return ``config.json``, with ``visual_config.json`` of CodeFuse-VLM under its name."""
    config: dict[str, Any] = {}
    if (directory / CONFIG).is_file():
        config = read_json(directory / CONFIG)
    for path in (directory / "visual_config.json", directory / "Qwen-VL-visual" / "visual_config.json"):
        if path.is_file():
            config.setdefault("visual_config", read_json(path))
    return config


def _read_index(index: Path) -> dict[Path, list[str] | None]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map; download the file again")
    files: dict[Path, list[str] | None] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"{index}: names the file {shard!r}, outside of its directory")
        file = index.parent / shard
        if not file.is_file():
            raise UserError(f"{file}: missing, though {index.name} names it{_unfinished(index.parent)}; download it")
        names = files.setdefault(file, [])
        assert names is not None
        names.append(name)
    return files


def _open_safetensors(file: Path) -> tuple[Any, dict[str, TensorInfo]]:
    try:
        handle = safe_open(file, framework="pt")
        found = {}
        for name in handle.keys():  # noqa: SIM118 - no mapping
            piece = handle.get_slice(name)
            kind = piece.get_dtype()
            found[name] = TensorInfo(tuple(piece.get_shape()), _DTYPES.get(kind, kind), file)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: truncated, or no safetensors file ({error}); download it again") from None
    return handle, found


def _flat(state: dict[Any, Any]) -> dict[Any, Any]:
    """Return tensors of dictionaries by part (Cobra: ``projector``, ``llm_backbone``) under one name each."""
    if not state or not all(isinstance(part, dict) for part in state.values()):
        return state
    return {f"{name}.{key}": value for name, part in state.items() for key, value in part.items()}


def _open_pickle(file: Path) -> tuple[dict[str, Tensor], dict[str, TensorInfo], dict[str, Any]]:
    state = load_weights(file, mmap=True)
    settings: dict[str, Any] = {}
    for key in ("state_dict", "model"):  # trainers put the run beside the weights
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            settings = state["config"] if isinstance(state.get("config"), dict) else {}
            state = state[key]
            break
    state = _flat(state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"{file}: holds no dictionary of tensors by name")
    state = {name: value.detach() for name, value in state.items()}  # some are parameters
    found = {}
    for name, value in state.items():
        dtype = value.dtype if value.dtype in _DTYPES.values() else str(value.dtype)
        found[name] = TensorInfo(tuple(value.shape), dtype, file)
    return state, found, settings
