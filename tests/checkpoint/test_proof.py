"""A save that goes wrong in any way is not published, says which tensor it is, and leaves the checkpoint before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import proof_cases
import pytest
import ranks
import torch

from megavlm.checkpoint.checksum import checksum, checksum_of

MODEL: dict[str, Any] = {
    "preset": "tiny",
    "vision": {"image_size": 32, "patch_size": 16, "hidden_size": 48, "num_layers": 2, "num_attention_heads": 4}
    | {"ffn_hidden_size": 96, "positional_grid": 2},
    "connector": {"preset": "mlp2x_gelu"},
    "language": {"hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 4}
    | {"kv_channels": 16, "vocab_size": 517, "vocab_divisor": 1, "tie_word_embeddings": True},
}
BUCKETS = {"overlap_grad_reduce": True, "ddp_bucket_size": 5000}
PROJ = "language.decoder.layers.self_attention.linear_proj.weight"
SAID = {
    "rolled": (f"optimizer.state.exp_avg.{PROJ}", "are others in the file"),
    "neighbours": (f"optimizer.state.exp_avg.{PROJ}", "are others in the file"),
    "confused": (f"optimizer.state.exp_avg_sq.{PROJ}", "are others in the file"),
    "zeroed": (f"optimizer.state.param.{PROJ}", "are not the masters of the weight"),
    "another rank": ("optimizer.state.exp_avg.", "are others in the file"),
    "weight": ("self_attention.linear_proj.weight", "are not the masters of the weight"),
    "misshapen": ("exp_avg.language.decoder.final_layernorm.weight", "has the shape [128] in the checkpoint"),
    "masters": ("optimizer.state.param.vision.conv1.weight", "are not the masters of the weight"),
    "padding": ("Megatron-Core says: 'vision.conv1.weight'", "data corruption"),
    "left out": ("connector.layers.0.weight", "would not be in the checkpoint"),
    "layers": (PROJ, "would be saved as layer 3 of 4, but is 2 of 4"),
    "file": ("vision.conv1.weight", "(and 1 more)"),
    "header": ("vision.conv1.weight", "Bad CRC-32"),
}


@pytest.mark.dist
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_wrong_is_named_and_not_published(asynchronous: bool, tmp_path: Path) -> None:
    """Three data-parallel ranks with padded buckets, bf16; the first rank writes."""
    training = {"global_batch_size": 3, "precision": "bf16"}
    recipe = {"model": MODEL, "parallel": BUCKETS, "training": training}
    names = list(proof_cases.FAULTS) if not asynchronous else ["rolled", "another rank", "masters", "padding", "file"]
    said = ranks.run(proof_cases.faults, recipe, str(tmp_path), names, asynchronous=asynchronous, world=3)
    for name in set(names) - {"log"}:
        text = said[0][name]
        assert text.startswith("ProofError: step-00000002 would not hold what was to be saved"), text
        assert all(part in text for part in SAID[name]), text
        assert all(name in other for other in said)  # all ranks fail alike
    if not asynchronous:
        assert "another rank" in said[0]["log"] and "X can lead to data corruption" in said[1]["log"]


@pytest.mark.dist
@pytest.mark.parametrize("parallel", [{}, {"use_distributed_optimizer": False}])
def test_an_update_waits_until_memory_is_known(parallel: dict[str, Any], tmp_path: Path) -> None:
    recipe = {"model": MODEL, "parallel": parallel, "training": {"precision": "bf16"}}
    ((found_taken, left),) = ranks.run(proof_cases.step_while_claims_are_taken, recipe, str(tmp_path))
    assert found_taken == [True, True] and left == ["latest", "step-00000002"]


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plain_optimizer_too(precision: str, tmp_path: Path) -> None:
    """Its moments are the live ones, and its masters have another name."""
    recipe = {"model": MODEL, "parallel": {"use_distributed_optimizer": False}, "training": {"precision": precision}}
    names = ["rolled", "confused", "left out", "file"]
    (said,) = ranks.run(proof_cases.faults, recipe, str(tmp_path), names, asynchronous=True, world=1)
    assert sorted(said) == sorted(names) and all(text.startswith("ProofError") for text in said.values())


@pytest.mark.dist
def test_a_parallel_layer_that_is_stored_as_the_first_ranks_part(tmp_path: Path) -> None:
    """As before containers were asked; also tensor-parallel parts that change places."""
    recipe = {"model": MODEL, "parallel": {"tensor_model_parallel_size": 2}}
    names = ["container", "exchanged"]
    said = ranks.run(proof_cases.faults, recipe, str(tmp_path), names, world=2)[0]
    assert (
        "connector.layers.0.weight: has the shape [32, 48] in the checkpoint, but the model's is [64, 48]"
        in (said["container"])
    )
    assert "linear_proj.weight: a part begins at" in said["exchanged"]


@pytest.mark.dist
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_the_run_does_what_the_recipe_says(policy: str, run_data: Any, tmp_path: Path) -> None:
    words = [f"checkpoint.on_error={policy}", "checkpoint.save_interval=2", "logging.tensorboard=false"]
    words += ["training.train_steps=6", "parallel.tensor_model_parallel_size=2", "model.connector.preset=resampler"]
    output = tmp_path / "run"
    code, said = ranks.run(proof_cases.run_with_a_bad_save, run_data.words(output, *words)[1:], 4, world=2)[0]
    kept = sorted(path.name for path in (output / "checkpoints").iterdir())
    if policy == "stop":
        assert code is None and "step-00000004 would not hold what was to be saved" in said
        assert kept == ["latest", "step-00000002"]
    else:
        assert code == 0 and kept == ["latest", "step-00000002", "step-00000006"]


def test_a_checksum_sees_every_change_of_value_and_place() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 3, 8, 4096, 8192, 40_001):
        one = torch.randn(count, generator=generator)
        found = checksum(one)
        assert found == checksum(one.clone())
        last = one.clone()
        last.view(torch.int32)[-1] ^= 1
        assert checksum(last) != found
        if count > 1:
            assert checksum(one.roll(1)) != found
            assert checksum(one.flip(0)) != found
            assert checksum(one[:-1]) != found
    assert checksum(torch.zeros(4)) != checksum(torch.zeros(5))
    rows = torch.randn(6, 7, generator=generator).bfloat16()
    assert checksum(rows) != checksum(rows.t().contiguous()) == checksum(rows.t())


def test_a_checksum_of_a_file_begins_anywhere() -> None:
    values = torch.arange(20_000, dtype=torch.int16)
    numbers = values.numpy().tobytes()
    for start in (0, 1, 3, 8):
        assert checksum_of(memoryview(b"x" * start + numbers + b"y"), start, len(numbers)) == checksum(values)
