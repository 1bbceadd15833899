"""What must be equal on two tensor-parallel ranks: parts of a model, and the loss over a padded vocabulary."""

from __future__ import annotations

from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import convolution_cases  # noqa: E402
import packed_cases  # noqa: E402
import reducer_cases  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import tower_cases  # noqa: E402
import transformers_cases  # noqa: E402
from connector_cases import CASES, compare  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region  # noqa: E402
from samples import losses, pack, recipe, sample  # noqa: E402
from tiny import IMAGE_TOKEN  # noqa: E402

from megavlm.config.schema import ParallelConfig  # noqa: E402
from megavlm.data.batch import IGNORE_INDEX  # noqa: E402
from megavlm.models.build import build_model, unwrap  # noqa: E402
from megavlm.models.front import encode  # noqa: E402
from megavlm.parallel.state import process_groups  # noqa: E402


def padded_vocabulary() -> None:
    """Compare losses with a softmax over the real vocabulary.

    512 + 5 rows are padded to 768 at TP 2: the second rank holds 384 rows, 133 of them real.
    """
    made = recipe(parallel={"tensor_model_parallel_size": 2}, language={"vocab_size": 517})
    model = unwrap(build_model(made, IMAGE_TOKEN)[0])
    assert model.language.output_layer.weight.size(0) == 384
    batch = pack([sample(1, 17, 1), sample(2, 30)])
    got = losses(model, batch)
    with torch.no_grad():
        logits = model(
            tokens=batch.tokens,
            position_ids=batch.position_ids,
            packed_seq_params=batch.packed_seq_params,
            images=batch.images,
        )
        whole = gather_from_tensor_model_parallel_region(logits)[0]
        assert whole[:, 517:].isneginf().all()
        expected = F.cross_entropy(whole[:, :517], batch.labels[0], reduction="none", ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    gradient = model.language.output_layer.weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    if mpu.get_tensor_model_parallel_rank() == 1:
        assert gradient[133:].abs().max() == 0
        assert gradient[:133].abs().min(dim=1).values.max() > 0


def shares_of_pictures(replicas: frozenset[str], pictures: int, connector: dict[str, Any] | None = None) -> None:
    """Pictures of any size, cut over ranks that hold tower or connector whole, give what one rank makes of them all."""
    tower = {
        "preset": "qwen2_5_vl_vit", "patch_size": 4, "window_size": 24, "hidden_size": 48, "num_layers": 2,
        "num_attention_heads": 3 if "vision" in replicas else 4, "ffn_hidden_size": 64, "full_attention_layers": [1],
        "image_size": 32,
    }  # fmt: skip
    held = {part: {"tensor_parallel": "replicate"} for part in replicas}
    tree = {
        "preset": "tiny", "image": {"kind": "native"}, "vision": {**tower, **held.get("vision", {})},
        "connector": {**(connector or {"preset": "patch_merger"}), **held.get("connector", {})},
        "language": {"hidden_size": 64},
    }  # fmt: skip
    made = recipe(model=tree, parallel={"tensor_model_parallel_size": 2})
    model = unwrap(build_model(made, IMAGE_TOKEN)[0])
    assert model.replicas == replicas
    grid = packed_cases.GRID[:pictures]
    pixels = torch.randn(int(grid.prod(1).sum()), 96, generator=torch.Generator().manual_seed(4))
    parts = [getattr(model, part) for part in sorted(replicas)]
    found = []
    for kept in (frozenset[str](), replicas):
        features = encode(model.vision, model.connector, pixels, grid, trains_vision=True, replicas=kept)
        weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(5))
        (features * weights).sum().backward()
        # That of the keys' bias is zero, but for roundings: it moves all scores of a query alike.
        own = [p for part in parts for name, p in part.named_parameters() if name != "linear_k.bias"]
        gradients = [p.grad.clone() for p in own]
        for gradient in gradients if kept else ():
            torch.distributed.all_reduce(gradient, group=mpu.get_tensor_model_parallel_group())
        found.append([features.detach(), *gradients])
        model.zero_grad()
    for got, expected in zip(found[1], found[0], strict=True):
        transformers_cases.close(got, expected, f"{sorted(replicas)}, {pictures} pictures")


if __name__ == "__main__":
    with process_groups(ParallelConfig(tensor_model_parallel_size=2), seed=1):
        for case in CASES:
            compare(case, 2, mpu.get_tensor_model_parallel_rank())
            print(f"<{case}>")
        for case in reducer_cases.CASES:
            reducer_cases.compare(case, 2, mpu.get_tensor_model_parallel_rank())
            print(f"<{case}>")
        for case in transformers_cases.CASES:
            transformers_cases.compare(case)
            print(f"<{case}>")
        for case in tower_cases.CASES:
            tower_cases.compare(case)
            print(f"<{case}>")
        for case, compare_tower in convolution_cases.CASES.items():
            compare_tower()
            print(f"<{case}>")
        for case in packed_cases.PACKED:
            packed_cases.compare_packed(case)
            print(f"<{case}>")
        for count in (1, 5):
            shares_of_pictures(frozenset({"vision", "connector"}), count)
        shares_of_pictures(frozenset({"vision"}), 4)
        queries = {"preset": "resampler_2d", "num_queries": 3, "head_dim": 16}
        for parts, count in (({"vision", "connector"}, 5), ({"connector"}, 4), ({"connector"}, 1), ({"vision"}, 5)):
            shares_of_pictures(frozenset(parts), count, queries)
        print("<pictures>")
        padded_vocabulary()
        print("<vocabulary>")
