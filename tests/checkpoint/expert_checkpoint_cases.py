"""Short trainings of tiny models with experts, which save and load; started with ``ranks.run``."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from unittest import mock

from megavlm.parallel.device import prepare_device

prepare_device()

import run_cases  # noqa: E402
from tiny import IMAGE_TOKEN, tiny_recipe  # noqa: E402

from megavlm.checkpoint import saver  # noqa: E402
from megavlm.layers.experts import routers_of  # noqa: E402
from megavlm.parallel.state import process_groups  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402

VOCABULARY = 512
_SIZES: dict[str, Any] = {
    "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 16,
    "vocab_size": VOCABULARY, "num_layers": 4, "num_moe_experts": 4, "moe_ffn_hidden_size": 40,
}  # fmt: skip
STACKED: dict[str, Any] = {**_SIZES, "moe_aux_loss_coeff": 0.02}
"""Experts in all layers."""
BIASED: dict[str, Any] = _SIZES | {
    "moe_layer_freq": [0, 1, 1, 1], "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
    "moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_bias_update_rate": 0.01,
    "moe_shared_expert_intermediate_size": 48,
}  # fmt: skip
"""The first layer dense, the others with shared experts, groups and biases."""


def _recipe(language: dict[str, Any], layout: dict[str, Any], precision: str) -> dict[str, Any]:
    model = {
        "preset": "tiny",
        "vision": {"image_size": 32, "hidden_size": 48, "num_layers": 2, "ffn_hidden_size": 96}
        | {"num_attention_heads": 4, "positional_grid": 2},
        "connector": {"num_queries": 4, "head_dim": 16},
        "language": language,
    }
    return {"model": model, "parallel": {"transformer_impl": "torch", **layout}, "training": {"precision": precision}}


def train(
    language: dict[str, Any], layout: dict[str, Any], root: str, load: str | None, precision: str = "bf16",
    lr: float = 1e-3, lora: dict[str, Any] | None = None, base: str | None = None, alone: bool = False,
) -> list[float]:  # fmt: skip
    """Train two steps and save, or load and save at once; return the losses.

    ``lora`` stands beside ``base``, and is trained ``alone`` or beside the connector.
    """
    recipe = _recipe(language, layout, precision) | {"optimizer": {"lr": lr}}
    if lora is not None:
        frozen = {"vision": {"freeze": True}, "connector": {"freeze": alone}}
        recipe |= {"lora": lora, "checkpoint": {"load": base}, "modules": frozen}
    return run_cases.train(recipe, root, load, save_at=(2,))


def save_base(language: dict[str, Any], root: str) -> None:
    """Save weights that adapters may stand beside."""
    run_cases.train(_recipe(language, {}, "bf16"), root, save_at=(0,))


def save_while_biases_move(root: str) -> set[float]:
    """Save in a thread that writes when the experts' biases have moved; return what those of the checkpoint are."""
    recipe = tiny_recipe(**_recipe(BIASED, {}, "bf16"))
    moved, write = threading.Event(), saver.FileSystemWriterAsync.write_preloaded_data

    def late(*args: Any, **kwargs: Any) -> Any:
        moved.wait()
        return write(*args, **kwargs)

    with process_groups(recipe.parallel, 1):
        training = build_training(recipe, IMAGE_TOKEN)
        keeper = saver.Saver(Path(root), keep=1, asynchronous=True)
        with mock.patch.object(saver.FileSystemWriterAsync, "write_preloaded_data", late), training.settled():
            keeper.save(saver.State(training.modules, run={"step": 1}))
            assert keeper._job is not None
            keeper._job.claimed.wait()  # as the update does, behind which biases are moved
            for _, router in (one for chunk in training.chunks for one in routers_of(chunk)):
                assert router.expert_bias is not None
                router.expert_bias += 1
            moved.set()
            path = keeper.finish()
    assert path is not None
    biases = [one for key, one in run_cases.numbers(path).items() if key.endswith(".expert_bias")]
    return {value for one in biases for value in one.flatten().tolist()}
