"""Reading Hugging Face directories: what is damaged is refused, with the file's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import hf_makers
import pytest
import torch
from hf_makers import Canary
from safetensors.torch import save_file

from megavlm.weights.source import Source

FIRST, INDEX = "model-00001-of-00002.safetensors", "model.safetensors.index.json"


def change_index(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index["weight_map"])
        (directory / INDEX).write_text(json.dumps(index))

    return damage


def cut(name: str, keep: Callable[[int], int]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[: keep(len(data))])

    return damage


def twice(directory: Path) -> None:
    name = "lm_head.weight"
    for file in directory.glob("*.safetensors"):
        tensors = {**hf_makers.load_file(file), name: torch.zeros(120, 128)}
        save_file(tensors, file)


def write(name: str, text: str | bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(text if isinstance(text, bytes) else text.encode())


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "header-cut": (cut(FIRST, lambda size: 100), f"{FIRST}: truncated"),
    "length-cut": (cut(FIRST, lambda size: 5), f"{FIRST}: truncated"),
    "data-cut": (cut(FIRST, lambda size: size - 1), f"{FIRST}: truncated"),
    "empty": (cut(FIRST, lambda size: 0), f"{FIRST}: truncated"),
    "a-page-of-html": (write(FIRST, "<html>" * 100), f"{FIRST}: truncated, or no safetensors file"),
    "shard-missing": (lambda d: (d / FIRST).unlink(), f"{FIRST}: missing, though {INDEX} names it"),
    "shard-is-a-folder": (lambda d: ((d / FIRST).unlink(), (d / FIRST).mkdir()), f"{FIRST}: missing"),
    "index-points-outside": (
        change_index(lambda m: m.update(x="../secret.safetensors")),
        f"{INDEX}: names the file '../secret.safetensors', outside",
    ),
    "index-points-to-the-root": (
        change_index(lambda m: m.update(x="/etc/passwd")), f"{INDEX}: names the file '/etc/passwd', outside",
    ),
    "index-points-up": (change_index(lambda m: m.update(x="..")), "missing, though"),
    "index-names-a-number": (change_index(lambda m: m.update(x=3)), f"{INDEX}: names the file 3"),
    "index-promises-more": (
        change_index(lambda m: m.update(ghost=FIRST)), f"{FIRST}: lacks ghost, which the index promises",
    ),
    "index-is-empty": (change_index(lambda m: m.clear()), f"{INDEX}: has no weight_map"),
    "the-same-tensor-twice": (twice, "lm_head.weight is in model-"),
    "index-broken": (write(INDEX, '{"weight_map": {'), f"{INDEX}: not valid JSON"),
    "index-a-list": (write(INDEX, "[]"), f"{INDEX}: must hold a JSON object"),
    "index-nested-too-deep": (write(INDEX, "[" * 100_000), f"{INDEX}: not valid JSON"),
    "config-broken": (write("config.json", '{"model_type": "qwen"'), "config.json: not valid JSON"),
    "config-not-text": (write("config.json", b"\xff\xfe\x00"), "config.json: not valid JSON"),
    "config-empty": (write("config.json", ""), "config.json: not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_by_name(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    directory = hf_makers.write_sharded(tmp_path / "hf")
    assert len(Source(directory).tensors) == len(hf_makers.state())
    damage(directory)
    with pytest.raises(ValueError) as error:
        Source(directory)
    assert message in str(error.value) and str(directory) in str(error.value) and "\n" not in str(error.value)


def test_shards_may_be_links_as_in_the_hub_s_cache(tmp_path: Path) -> None:
    directory = hf_makers.write_sharded(tmp_path / "hf")
    (tmp_path / "blobs").mkdir()
    for file in directory.glob("*.safetensors"):
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(tmp_path / "blobs" / file.name)
    source = Source(directory)
    assert all(torch.equal(source.get(name), value) for name, value in hf_makers.state().items())


PICKLES = ("pytorch_model.bin", "visual.bin", "mm_projector.bin")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_that_runs_code_is_not_run(name: str, legacy: bool, tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    state = {"w": torch.zeros(2), "x": Canary(canary)}
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=r"which could run code.*it was not opened") as error:
            Source(path)
        assert str(tmp_path / name) in str(error.value)
    assert not canary.exists()


def test_damaged_pickles_are_refused_wherever_they_are_cut(tmp_path: Path) -> None:
    for legacy in (False, True):
        file = tmp_path / "pytorch_model.bin"
        torch.save({"w": torch.ones(300), "b": torch.ones(3)}, file, _use_new_zipfile_serialization=not legacy)
        assert set(Source(file).tensors) == {"w", "b"}
        data = file.read_bytes()
        generator = torch.Generator().manual_seed(0)
        cuts = [0, 1, 2, 10, *torch.randint(10, len(data) - 1, (40,), generator=generator).tolist(), len(data) - 1]
        for size in cuts:
            file.write_bytes(data[:size])
            with pytest.raises(ValueError, match=r"pytorch_model\.bin: "):
                Source(file)


@pytest.mark.parametrize(
    "state", [[torch.zeros(1)], {"w": 3}, {3: torch.zeros(1)}, torch.zeros(1), {"state_dict": {"w": "x"}}]
)
def test_a_pickle_of_something_else(state: object, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no dictionary of tensors by name"):
        Source(tmp_path)


def test_parameters_and_nested_states_are_read(tmp_path: Path) -> None:
    state = {"w": torch.nn.Parameter(torch.ones(2, 3)), "n": torch.zeros(1, dtype=torch.int64)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "pytorch_model.bin")
    source = Source(tmp_path)
    assert source.shape("w") == (2, 3) and not source.get("w").requires_grad
    assert source.tensors["n"].dtype == "torch.int64"
    with pytest.raises(ValueError, match="has no tensor absent"):
        source.shape("absent")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Source(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no weights; looked for"):
        Source(tmp_path)
