"""Single parameters of a distributed checkpoint: every shape, Megatron-Core's own loader, and damage of all kinds."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megavlm.checkpoint import stream
from megavlm.checkpoint.safe import check_files, read_metadata
from megavlm.checkpoint.slots import METADATA, Slot
from megavlm.checkpoint.stream import CheckpointReader, ParameterToWrite, write_checkpoint
from megavlm.config.schema import ParallelConfig
from megavlm.parallel.state import process_groups

LAYERS, EXPERTS = 3, 24
SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "vector": (7,),
    "matrix": (10, 6),
    "conv": (4, 3, 2, 2),
    "one": (1, 1),
    "none": (0, 4),
}


def slots() -> dict[str, Slot]:
    """Every shape alone, and as three layers of a stack."""
    found = {name: Slot(name, shape) for name, shape in SHAPES.items()}
    for name, shape in SHAPES.items():
        found |= {f"{name}.{i}": Slot(f"layers.{name}", shape, i, LAYERS) for i in range(LAYERS)}
    # Experts of each layer, and of a layer among others that have none: more than are looked through one by one.
    experts = {"experts": EXPERTS}
    for i in range(EXPERTS):
        found |= {f"l{n} e{i}": Slot("layers.expert", (5, 6), n, LAYERS, expert=i, **experts) for n in range(LAYERS)}
        found[f"e{i}"] = Slot("layers.1.expert", (5, 6), expert=i, **experts)
    return found


def values(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(slot.shape, generator=generator).to(dtype) for name, slot in slots().items()}


def write(directory: Path, tensors: dict[str, Tensor], progress: Callable[[int], Any] = lambda _: None) -> Path:
    directory.mkdir()
    pieces = [
        ParameterToWrite(slot, tensors[name].dtype, lambda name=name: tensors[name]) for name, slot in slots().items()
    ]
    write_checkpoint(directory, pieces, progress)
    return directory


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 100, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_there_and_back(dtype: torch.dtype, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk_bytes)
    tensors, told = values(dtype), []
    reader = CheckpointReader(write(tmp_path / "m", tensors, told.append))
    assert sum(told) == sum(tensor.nbytes for tensor in tensors.values())
    for name, slot in slots().items():
        assert reader.dtype(slot) is dtype
        assert torch.equal(reader.read(slot), tensors[name]), name
    chunks = {key: len(entry.chunks) for key, entry in reader.tensors().items()}
    rows = {1 << 20: 1, 100: -(-10 // max(1, 100 // (6 * dtype.itemsize))), 1: 10}[chunk_bytes]
    assert chunks["matrix"] == rows and chunks["layers.matrix"] == LAYERS * rows
    assert chunks["none"] == 1 and chunks["scalar"] == 1
    shapes = {key: tuple(entry.size) for key, entry in reader.tensors().items()}
    assert shapes["layers.expert"] == (LAYERS, EXPERTS, 5, 6) and shapes["layers.1.expert"] == (EXPERTS, 5, 6)


def test_megatron_core_loads_any_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that cut across chunks and layers, as a rank of another layout asks for them."""
    monkeypatch.setattr(stream, "CHUNK_BYTES", 100)
    tensors = values()
    path = write(tmp_path / "m", tensors)
    check_files(path)

    def part(key: str, *offsets: tuple[int, int, int], stacked: int = 0) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(key, torch.zeros(5, 6), *offsets, prepend_axis_num=stacked, replica_id=0)

    state: dict[str, Any] = {f"matrix {half}": part("matrix", (0, half, 2)) for half in (0, 1)}
    for layer in range(LAYERS):
        for half in (0, 1):
            state[f"matrix.{layer} {half}"] = part("layers.matrix", (0, layer, 3), (1, half, 2), stacked=1)
        for expert in range(EXPERTS):
            places = (0, layer, LAYERS), (1, expert, EXPERTS)
            state[f"l{layer} e{expert}"] = part("layers.expert", *places, stacked=2)
    with process_groups(ParallelConfig(), 0):
        assert dist_checkpointing.load_content_metadata(str(path)) == METADATA
        loaded = dist_checkpointing.load(dict(state), str(path))
    for key in state:
        name, half = key.split()
        wanted = tensors[key] if key in tensors else tensors[name][5 * int(half) :][:5]
        assert torch.equal(loaded[key], wanted), key


def test_a_piece_must_be_what_it_says(tmp_path: Path) -> None:
    tensors = {**values(), "matrix": torch.zeros(10, 5)}
    with pytest.raises(AssertionError):
        write(tmp_path / "m", tensors)


@pytest.mark.parametrize(
    ("slot", "message"),
    [
        (Slot("absent", (2,)), "has no tensor absent; is it a checkpoint of another model"),
        (Slot("matrix", (10, 5)), r"matrix has the shape \[10, 6\], the recipe's is \[10, 5\]"),
        (Slot("layers.matrix", (10, 6), 0, 4), r"has the shape \[3, 10, 6\], the recipe's is \[4, 10, 6\]"),
        (Slot("matrix", (11, 6), vocabulary=True), r"\[10, 6\], the recipe's is \[11, 6\]"),
        (Slot("matrix", (9, 5), vocabulary=True), r"\[10, 6\], the recipe's is \[9, 5\]"),
    ],
)
def test_what_is_not_there(slot: Slot, message: str, tmp_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path / "m", values()))
    with pytest.raises(ValueError, match=message):
        reader.read(slot)


def test_rows_that_pad_a_vocabulary_are_left_out(tmp_path: Path) -> None:
    tensors = values()
    reader = CheckpointReader(write(tmp_path / "m", tensors))
    assert torch.equal(reader.read(Slot("matrix", (8, 6), vocabulary=True)), tensors["matrix"][:8])


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path / "m", values()))
    for key, place in (("layers.expert", (2, 7)), ("layers.1.expert", (7,))):
        chunks = reader.tensors()[key].chunks
        chunks[:] = [chunk for chunk in chunks if tuple(chunk.offsets[: len(place)]) != place]
    assert torch.equal(reader.read(slots()["l2 e6"]), values()["l2 e6"])
    for name, words in (("l2 e7", "layers.expert, layer 2, expert 7"), ("e7", "layers.1.expert, expert 7")):
        with pytest.raises(ValueError, match=f"{words} is not whole; save the checkpoint again"):
            reader.read(slots()[name])


def whole(reader: CheckpointReader) -> None:
    for slot in slots().values():
        reader.read(slot)


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.8])
def test_a_shard_that_is_cut(keep: float, tmp_path: Path) -> None:
    (file,) = write(tmp_path / "m", values()).glob("*.distcp")
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(ValueError, match="cannot be read, a file is damaged"):
        whole(CheckpointReader(tmp_path / "m"))


def test_a_shard_that_is_missing_or_a_folder_or_garbage(tmp_path: Path) -> None:
    (file,) = write(tmp_path / "m", values()).glob("*.distcp")
    size = file.stat().st_size
    file.unlink()
    with pytest.raises(ValueError, match="cannot be read, a file is damaged"):
        whole(CheckpointReader(tmp_path / "m"))
    file.write_bytes(bytes(range(256)) * (size // 256 + 1))
    with pytest.raises(ValueError, match="cannot be read, a file is damaged"):
        whole(CheckpointReader(tmp_path / "m"))
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match="cannot be read, a file is damaged"):
        whole(CheckpointReader(tmp_path / "m"))


def test_damage_anywhere_is_an_error_or_harmless(tmp_path: Path) -> None:
    """A flipped byte in what describes a tensor never ends in another exception or a wrong shape."""
    (file,) = write(tmp_path / "m", values()).glob("*.distcp")
    data = bytearray(file.read_bytes())
    generator = torch.Generator().manual_seed(0)
    for at in torch.randint(0, len(data), (25,), generator=generator).tolist():
        flipped = bytes(data[:at]) + bytes([data[at] ^ 0xFF]) + bytes(data[at + 1 :])
        file.write_bytes(flipped)
        reader = CheckpointReader(tmp_path / "m")
        for slot in slots().values():
            try:
                assert reader.read(slot).shape == slot.shape
            except ValueError as error:
                assert "a file is damaged" in str(error)


def change_index(path: Path, change: Callable[[Any], Any]) -> None:
    metadata = read_metadata(path)
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.storage_data.clear(),
        lambda m: [setattr(info, "length", 3) for info in m.storage_data.values()],
        lambda m: [setattr(info, "offset", 1 << 40) for info in m.storage_data.values()],
        lambda m: [setattr(info, "offset", -5) for info in m.storage_data.values()],
        lambda m: m.state_dict_metadata["matrix"].chunks.clear(),
        lambda m: [setattr(c, "sizes", torch.Size([3, 6])) for c in m.state_dict_metadata["matrix"].chunks],
        lambda m: setattr(m.state_dict_metadata["matrix"].properties, "dtype", torch.float64),
        lambda m: [setattr(info, "transform_descriptors", ["stream.zstd"]) for info in m.storage_data.values()],
    ],
)
def test_an_index_that_does_not_fit_its_files(change: Callable[[Any], Any], tmp_path: Path) -> None:
    path = write(tmp_path / "m", values())
    change_index(path, change)
    with pytest.raises(ValueError, match=r"damaged|not whole") as error:
        whole(CheckpointReader(path))
    assert str(path) in str(error.value)
