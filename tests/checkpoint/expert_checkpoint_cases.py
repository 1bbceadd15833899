"""Short trainings of tiny models with experts, which save and load; started with ``ranks.run``."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from unittest import mock

from megavlm.parallel.device import prepare_device

prepare_device()

import run_cases  # noqa: E402
import torch  # noqa: E402
from tiny import IMAGE_TOKEN, tiny_recipe  # noqa: E402

from megavlm.architectures.adapters import frozen_linears  # noqa: E402
from megavlm.checkpoint import saver  # noqa: E402
from megavlm.checkpoint.distributed import load, save_weights  # noqa: E402
from megavlm.config.help import to_yaml  # noqa: E402
from megavlm.config.lora import linear_of  # noqa: E402
from megavlm.layers.experts import routers_of  # noqa: E402
from megavlm.models.build import build_model, unwrap  # noqa: E402
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
        recipe["optimizer"]["adam_eps"] = 1e-5  # or the sign of what should be 0 would count as much as a gradient
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


WIDE: dict[str, Any] = {
    "hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 8, "num_query_groups": 8, "kv_channels": 32,
    "vocab_size": VOCABULARY, "num_layers": 2, "moe_layer_freq": [0, 1], "num_moe_experts": 4,
    "moe_ffn_hidden_size": 256, "moe_shared_expert_intermediate_size": 256, "init_method_std": 0.1,
}  # fmt: skip
"""Shards of whole groups of 64 x 256 weights at TP 2, of experts too."""


def save_bases(root: str) -> int:
    """Save weights, and what bitsandbytes makes of the linear ones in 4 bits; return how many these are."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    recipe, rounded = tiny_recipe(**_recipe(WIDE, {}, "fp32")), 0
    with process_groups(recipe.parallel, 1):
        modules = [unwrap(chunk) for chunk in build_model(recipe, IMAGE_TOKEN)]
        save_weights(Path(root) / "base", modules, recipe_yaml=to_yaml(recipe))
        with torch.no_grad():
            for name, weight in modules[0].named_parameters():
                if name.startswith("language.") and linear_of(name) is not None:
                    # What tensor parallelism cuts comes first, as the codes lie.
                    turned = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
                    whole = (weight.t() if turned else weight).contiguous()
                    made = dequantize_4bit(*quantize_4bit(whole, compress_statistics=True, quant_type="nf4"))
                    assert (made - whole).abs().max() > 0.001
                    weight.copy_(made.t() if turned else made)
                    rounded += 1
        save_weights(Path(root) / "rounded", modules, recipe_yaml=to_yaml(recipe))
    return rounded


def train_wide(root: str, jobs: list[tuple[str, dict[str, Any], str, str | None]]) -> list[list[float]]:
    """Train adapters of all linear layers: where to save, the layout, the base, ``lora.quantize``."""
    lora = {"rank": 4, "alpha": 16.0, "targets": ("all-linear",)}
    return [
        train(
            WIDE, layout, f"{root}/{name}", None, "fp32", 1e-2, lora | {"quantize": quantize},
            f"{root}/{base}/step-00000000",
        )
        for name, layout, base, quantize in jobs
    ]  # fmt: skip


def nf4_shares(root: str) -> dict[str, float]:
    """Return by layer how far weights in 4 bits are from those that this rank has of the same base, as a share.

    At TP 2, of MLPs without a gate and of a model with gates and experts.
    """
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    plain = {key: value for key, value in WIDE.items() if "moe" not in key}
    found = {}
    for name, language in (("ungated", plain | {"gated_linear_unit": False, "activation": "gelu"}), ("gated", WIDE)):
        recipe = tiny_recipe(**_recipe(language, layout, "fp32"))
        base = str(Path(root) / name / "step-00000000")
        lora = {"rank": 2, "targets": ("all-linear",), "quantize": "nf4"}
        quantised = tiny_recipe(**_recipe(language, layout, "fp32") | {"lora": lora, "checkpoint": {"load": base}})
        with process_groups(recipe.parallel, 1):
            modules = [unwrap(chunk) for chunk in build_model(recipe, IMAGE_TOKEN)]
            save_weights(Path(root) / name, modules, recipe_yaml=to_yaml(recipe))
            own = dict(modules[0].named_parameters())
            other = unwrap(build_model(quantised, IMAGE_TOKEN)[0])
            load(Path(base), modules=[other])
            for number, place, linear in frozen_linears(other.language):
                whole = own[f"language.decoder.layers.{number}.{place}.weight"].detach()
                apart = (linear.nf4.dequantise() - whole).norm() / whole.norm()
                found[f"{name} {number} {place}"] = float(apart)
    return found
