"""Nothing that lies in a checkpoint is run: not by the converters, and not by loading for training or parity."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_makers
import pytest
import torch
from hf_makers import SMALL, Canary
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megavlm.checkpoint import distributed
from megavlm.checkpoint.safe import read_metadata
from megavlm.cli import main
from megavlm.config.load import load_recipe
from megavlm.families.presets import expand_presets
from megavlm.models.build import build_model, unwrap
from megavlm.parallel.state import process_groups


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """The file that a canary touches."""
    return tmp_path / "ran"


def load(checkpoint: Path) -> Any:
    """Load as training does; return the model."""
    recipe = load_recipe(checkpoint / "recipe.yaml", [], expand_presets)
    with process_groups(recipe.parallel, 1):
        model = unwrap(build_model(recipe, SMALL.image_token)[0])
        distributed.load(checkpoint, modules=[model])
        return model


def write_metadata(checkpoint: Path, change: Callable[[Any], Any]) -> None:
    metadata = read_metadata(checkpoint)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(change(metadata) or metadata))


def object_for_a_tensor(checkpoint: Path, key: str, thing: object) -> None:
    """Have ``key`` be an object: torch's own loader unpickles those without asking."""
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    file = checkpoint / "__9_0.distcp"
    file.write_bytes(buffer.getvalue())

    def change(metadata: Any) -> None:
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(key)] = _StorageInfo(file.name, 0, file.stat().st_size)

    write_metadata(checkpoint, change)


def refused_everywhere(checkpoint: Path, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every command refuses it in one line, and so does loading it for training."""
    reference = tmp_path / "reference.safetensors"
    hf_makers.save_file({"s0.input_ids": torch.arange(20)[None]}, reference)
    commands = {
        "inspect": [str(checkpoint)],
        "megatron-to-hf": ["--megatron", str(checkpoint), "--out", str(tmp_path / "out")],
        "verify": ["--megatron", str(checkpoint), "--reference", str(reference)],
    }
    for action, words in commands.items():
        assert main(["convert", action, *words]) == 2, action
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1 and message in error[0] and str(checkpoint) in error[0], (action, error)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    with pytest.raises(ValueError, match=message):
        load(checkpoint)


def test_a_sound_checkpoint_loads(checkpoint: Path) -> None:
    model = load(checkpoint)
    embedding = hf_makers.state()["transformer.wte.weight"]
    assert torch.equal(model.language.embedding.word_embeddings.weight[: len(embedding)], embedding)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_an_index_that_runs_code(
    protocol: int, checkpoint: Path, canary: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if protocol == 4:  # inside of a proper index, too
        write_metadata(checkpoint, lambda m: m.state_dict_metadata.update(x=Canary(canary)))
    else:
        (checkpoint / ".metadata").write_bytes(pickle.dumps(Canary(canary), protocol=protocol))
    refused_everywhere(checkpoint, "is no index of a checkpoint, and was not opened", capsys, tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80\x04", b"garbage", pickle.dumps({"a": 1}), pickle.dumps(None), b"cos\nsystem\n(S'true'\ntR.",
     b"cbuiltins\neval\n(S'1'\ntR.", b"ctorch\nload\n(S'x'\ntR.", b"\x80\x04\x8c\x05torch\x8c\nhub.load\x93."],
)  # fmt: skip
def test_an_index_that_is_none(data: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(ValueError, match=r"\.metadata: is no index of a checkpoint, and was not opened"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".", ""])
def test_an_index_that_names_files_elsewhere(name: str, checkpoint: Path) -> None:
    def change(metadata: Any) -> None:
        first = next(iter(metadata.storage_data.values()))
        first.relative_path = name

    write_metadata(checkpoint, change)
    with pytest.raises(ValueError, match="outside of its directory; take another copy"):
        read_metadata(checkpoint)


def test_odd_entries_of_the_index(checkpoint: Path) -> None:
    good = (checkpoint / ".metadata").read_bytes()
    for change in (
        lambda m: m.state_dict_metadata.update(x=3),
        lambda m: m.state_dict_metadata.update({3: BytesStorageMetadata()}),
        lambda m: setattr(next(iter(m.state_dict_metadata.values())), "size", 3),
        lambda m: setattr(next(iter(m.storage_data.values())), "relative_path", 3),
        lambda m: setattr(m, "storage_data", None),
    ):
        (checkpoint / ".metadata").write_bytes(good)
        write_metadata(checkpoint, change)
        with pytest.raises(ValueError, match="is no index of a checkpoint"):
            read_metadata(checkpoint)


def test_common_values_that_run_code(
    checkpoint: Path, canary: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = checkpoint / "common.pt"
    torch.save({"content_metadata": Canary(canary)}, common)
    with pytest.raises(ValueError, match=r"common\.pt: damaged, or a pickle with more than tensors"):
        load(checkpoint)
    # Even where the environment asks torch to trust everything.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ValueError, match=r"common\.pt: damaged, or a pickle with more than tensors"):
        load(checkpoint)
    assert not canary.exists()
    for damage in (b"", b"x" * 50):
        common.write_bytes(damage)
        with pytest.raises(ValueError, match=r"common\.pt: "):
            load(checkpoint)
    common.unlink()
    with pytest.raises(FileNotFoundError):
        load(checkpoint)


@pytest.mark.parametrize(
    "key",
    [
        "language.embedding.word_embeddings.weight",
        "language.decoder.layers.mlp.linear_fc1.weight",
        "connector.query",
    ],
)
def test_objects_in_the_place_of_tensors(key: str, checkpoint: Path, canary: Path) -> None:
    object_for_a_tensor(checkpoint, key, [Canary(canary)])
    with pytest.raises(ValueError, match=f"{key} is an object, which could run code, where a tensor belongs"):
        load(checkpoint)
    assert not canary.exists()


def test_extra_state_of_layers_is_not_opened(checkpoint: Path, canary: Path) -> None:
    """Megatron-Core's layers ask for it where the checkpoint has it; a scale for FP8 is a pickle in a pickle."""
    object_for_a_tensor(checkpoint, "connector.linear_q._extra_state/shard_0_1", [Canary(canary)])
    load(checkpoint)
    assert not canary.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sharded_backend": "zarr", "common_backend": "torch"}', "{}"])
def test_another_format(text: str, checkpoint: Path) -> None:
    (checkpoint / "metadata.json").write_text(text)
    with pytest.raises(ValueError, match=r"metadata\.json: "):
        load(checkpoint)


@pytest.mark.parametrize("keep", [0, 1000, -1])
def test_a_shard_that_is_cut(keep: int, checkpoint: Path) -> None:
    (file,) = checkpoint.glob("*.distcp")
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    with pytest.raises(ValueError, match="is damaged, or of another model") as error:
        load(checkpoint)
    assert str(checkpoint) in str(error.value) and "\n" not in str(error.value)
    file.unlink()
    with pytest.raises(ValueError, match="is damaged, or of another model"):
        load(checkpoint)


def test_a_tensor_that_is_missing_or_has_another_shape(checkpoint: Path) -> None:
    good = (checkpoint / ".metadata").read_bytes()
    write_metadata(checkpoint, lambda m: m.state_dict_metadata.pop("connector.query") and None)
    with pytest.raises(ValueError, match=r"is of another model.*|.*connector\.query"):
        load(checkpoint)
    (checkpoint / ".metadata").write_bytes(good)
    write_metadata(checkpoint, lambda m: setattr(m.state_dict_metadata["connector.query"], "size", torch.Size([9, 64])))
    with pytest.raises(ValueError, match=r"connector\.query"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hf/conversion.json", "{"),
        ("hf/conversion.json", "[]"),
        ("hf/conversion.json", json.dumps({"family": ["qwen_vl"]})),
        ("hf/conversion.json", json.dumps({"tokens": 3})),
        ("recipe.yaml", "model: ["),
        ("recipe.yaml", "- 3"),
        ("recipe.yaml", "output_dir: x"),
        ("recipe.yaml", "model: {vision: 3}"),
        ("recipe.yaml", "!!python/object/apply:os.system ['touch {ran}']"),
    ],
)
def test_garbage_beside_the_tensors(
    name: str, text: str, checkpoint: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / name).write_text(text.replace("{ran}", str(canary)))
    out = checkpoint.with_name("out")
    assert main(["convert", "megatron-to-hf", "--megatron", str(checkpoint), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(checkpoint / name) in error
    assert not out.exists() and not canary.exists()


@pytest.mark.parametrize("text", ["", "{", "3"])
def test_a_broken_run_json(text: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "run.json").write_text(text)
    assert main(["convert", "inspect", str(checkpoint)]) == 2
    assert f"{checkpoint}/run.json: " in capsys.readouterr().err
