"""Writing safetensors: shards, index and alignment, read back by the safetensors library and by Transformers."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from megavlm.checkpoint.hf.sink import Entry, ShardedWriter

State = dict[str, Tensor]


def write(directory: Path, state: State, shard_bytes: int = 1 << 40) -> ShardedWriter:
    directory.mkdir(exist_ok=True)
    writer = ShardedWriter(directory, [Entry(n, tuple(t.shape), t.dtype) for n, t in state.items()], shard_bytes)
    told: list[int] = []
    for name, tensor in state.items():
        writer.put(name, tensor, told.append)
    writer.close()
    assert told == [tensor.nbytes for tensor in state.values()]
    return writer


def same(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype is b[name].dtype and value.shape == b[name].shape, name
        assert torch.equal(value.view(-1).view(torch.uint8), b[name].contiguous().view(-1).view(torch.uint8)), name


def mixed() -> State:
    """Every type, a view that is not contiguous, no dimensions, no elements, NaN and infinity."""
    return {
        "f64": torch.randn(3, dtype=torch.float64),
        "f32": torch.tensor([float("nan"), float("inf"), -0.0]),
        "turned": torch.randn(4, 6).T,
        "scalar": torch.tensor(2.5),
        "bf16": torch.randn(5, 3).bfloat16(),
        "f16": torch.randn(7).half(),
        "none": torch.zeros(0, 4),
        "last": torch.randn(3).half(),
    }


def test_one_file(tmp_path: Path) -> None:
    state = mixed()
    write(tmp_path, state)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    same(load_file(tmp_path / "model.safetensors"), state)


def test_the_data_starts_aligned(tmp_path: Path) -> None:
    for length in range(1, 9):
        write(tmp_path, {"n" * length: torch.ones(2)})
        (header,) = struct.unpack("<Q", (tmp_path / "model.safetensors").read_bytes()[:8])
        assert header % 8 == 0


def test_shards_and_index(tmp_path: Path) -> None:
    state = {f"t{i}": torch.randn(size) for i, size in enumerate((10, 20, 70, 5, 5, 5, 30, 1))}
    writer = write(tmp_path, state, shard_bytes=160)
    assert [[e.name for e in shard] for shard in writer.shards] == [
        ["t0", "t1"],
        ["t2"],
        ["t3", "t4", "t5"],
        ["t6", "t7"],
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert files == set(index["weight_map"].values()) == {f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)}
    loaded = {}
    for file in sorted(files):
        own = load_file(tmp_path / file)
        assert all(index["weight_map"][name] == file for name in own)
        loaded |= own
    same(loaded, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_bytes", [20_000, 1 << 30])
def test_transformers_loads_it(dtype: torch.dtype, shard_bytes: int, tmp_path: Path) -> None:
    config = Qwen2Config(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, dtype=dtype)  # fmt: skip
    model = Qwen2ForCausalLM(config).to(dtype)
    config.save_pretrained(tmp_path)
    write(tmp_path, {n: t.detach() for n, t in model.state_dict().items()}, shard_bytes)
    back, info = Qwen2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same(dict(back.state_dict()), dict(model.state_dict()))


def test_what_is_put_must_be_what_was_announced(tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path, [Entry("a", (2,), torch.float32), Entry("b", (2,), torch.float32)])
    with pytest.raises(AssertionError):
        writer.put("b", torch.ones(2))
    writer = ShardedWriter(tmp_path, [Entry("a", (2,), torch.float32), Entry("b", (2,), torch.float32)])
    writer.put("a", torch.ones(2))
    with pytest.raises(AssertionError, match="b was not written"):
        writer.close()
    writer.abort()
