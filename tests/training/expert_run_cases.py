"""Steps of a tiny model with experts at one layout or another, all from the same weights."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset  # noqa: E402
from tiny import IMAGE_TOKEN, random_packs, tiny_recipe  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from megavlm.checkpoint.distributed import load as load_checkpoint  # noqa: E402
from megavlm.checkpoint.distributed import save_weights  # noqa: E402
from megavlm.checkpoint.paths import resolve  # noqa: E402
from megavlm.cli import main  # noqa: E402
from megavlm.config.help import to_yaml  # noqa: E402
from megavlm.config.load import load_recipe  # noqa: E402
from megavlm.config.schema import Recipe  # noqa: E402
from megavlm.data.decoders import make_decoder  # noqa: E402
from megavlm.data.device_batch import Batch, context_length, make_batch  # noqa: E402
from megavlm.data.tokenizer import tokenizer_of  # noqa: E402
from megavlm.families.presets import expand_presets  # noqa: E402
from megavlm.layers.experts import routers_of  # noqa: E402
from megavlm.models.build import build_model, unwrap  # noqa: E402
from megavlm.parallel import pipeline  # noqa: E402
from megavlm.parallel.state import is_first_stage, process_groups  # noqa: E402
from megavlm.training.build import TrainingModel, build_training  # noqa: E402
from megavlm.training.heldout import read_held_out  # noqa: E402
from megavlm.training.panel import answer_held_out, answer_panel  # noqa: E402
from megavlm.training.step import StepResult, run_batches, train_step  # noqa: E402

EXPERTS = 8
LAYERS = "language.decoder.layers."
ALL: dict[str, Any] = {
    "num_moe_experts": EXPERTS, "moe_ffn_hidden_size": 32, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.02,
    "moe_z_loss_coeff": 1e-3, "num_layers": 4,
}  # fmt: skip
"""Experts in all layers, losses of balance and z."""
MIXED = ALL | {
    "moe_layer_freq": [0, 1, 1, 1], "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
    "moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_topk": 2, "moe_router_bias_update_rate": 0.01,
    "moe_shared_expert_intermediate_size": 48, "moe_shared_expert_gate": True, "moe_expert_capacity_factor": 1.25,
}  # fmt: skip
"""The first layer dense, the others with shared experts, biases, groups, and experts that are full at some time."""


def recipe_of(language: dict[str, Any], **branches: dict[str, Any]) -> Recipe:
    """Return the tiny recipe with ``language``'s keys over its own."""
    plain = tiny_recipe()
    model = {
        "preset": "tiny",
        "vision": {"image_size": 32, "hidden_size": 48, "num_layers": 2, "ffn_hidden_size": 96}
        | {"num_attention_heads": 4, "positional_grid": 2},
        "connector": {"num_queries": plain.model.connector.num_queries, "head_dim": 16},
        "language": {"hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 4}
        | {"kv_channels": 16, **language},
    }
    optimizer = {"adam_eps": 1e-5}  # or the sign of what should be 0 would move weights as far as a gradient does
    return tiny_recipe(**{"model": model, "optimizer": optimizer, **branches})


def batches_of(recipe: Recipe, step: int) -> list[Batch]:
    """Return this replica's packs of a step."""
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    mine = random_packs(recipe.training.global_batch_size, seed=step)[rank::size]
    cpu, length = torch.device("cpu"), context_length(pack.cu_seqlens for pack, _ in mine)
    return [
        make_batch(pack, torch.from_numpy(pixels) if is_first_stage() else None, cpu, length=length)
        for pack, pixels in mine
    ]


def parameters_of(training: TrainingModel) -> dict[str, nn.Parameter]:
    """Return this rank's parameters by the names that one process has."""
    found = {}
    for module in training.modules:
        first = get_transformer_layer_offset(module.language.config, module.vp_stage)
        for name, parameter in module.named_parameters():
            parts = name.split(".")
            if name.startswith(LAYERS):
                parts[3] = str(int(parts[3]) + first)
            if "local_experts" in parts:
                at = parts.index("local_experts") + 1
                local = EXPERTS // mpu.get_expert_model_parallel_world_size()
                parts[at] = str(int(parts[at]) + mpu.get_expert_model_parallel_rank() * local)
            found[".".join(parts)] = parameter
    return found


def share_of(whole: Tensor, name: str, parameter: Any) -> Tensor:
    """Return this rank's part of a tensor; a vocabulary is padded with rows that learn nothing."""
    rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    if "local_experts" in name:
        rank, size = mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_tensor_parallel_world_size()
    if not getattr(parameter, "tensor_model_parallel", False) or size == 1:
        return whole
    axis = parameter.partition_dim
    missing = parameter.shape[axis] * size - whole.shape[axis]
    whole = F.pad(whole, (*[0, 0] * (whole.dim() - 1), 0, missing)) if missing else whole
    return torch.cat([half.chunk(size, axis)[rank] for half in whole.chunk(parameter.partition_stride, axis)], axis)


def start(training: TrainingModel, folder: Path) -> None:
    """Give all layouts the same weights, whose shapes the first one, of one process, writes down."""
    shapes, own = folder / "shapes.pt", parameters_of(training)
    if not shapes.exists():
        torch.save({name: parameter.shape for name, parameter in own.items()}, shapes)
    known = torch.load(shapes)
    with torch.no_grad():
        for name, parameter in own.items():
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
            draw = torch.randn(known[name], generator=torch.Generator().manual_seed(seed))
            whole = 1 + 0.1 * draw if parameter.dim() == 1 and "norm" in name else 0.1 * draw
            if "word_embeddings" in name or "output_layer" in name:
                whole[500:] = 0
            parameter.copy_(share_of(whole, name, parameter))
    training.optimizer.reload_model_params()


def train(folder: str, language: dict[str, Any], branches: dict[str, Any], steps: int = 5) -> dict[str, Any]:
    """Train; the first call of a ``folder`` leaves its parameters there, and all others are compared with them.

    The adapters of a run that has some begin with numbers, too.
    """
    Path(folder).mkdir(exist_ok=True)
    recipe, after = recipe_of(language, **branches), Path(folder) / "after.pt"
    with process_groups(recipe.parallel, recipe.training.seed):
        training = build_training(recipe, IMAGE_TOKEN)
        start(training, Path(folder))
        results: list[StepResult] = []
        for step in range(steps):
            training.scheduler.step(1)
            results.append(train_step(training.chunks, training.optimizer, batches_of(recipe, step), num_sources=1))
        with training.settled():
            own = {name: parameter.detach().clone() for name, parameter in parameters_of(training).items()}
        first = not after.exists()
        if first:
            torch.save(own, after)
        known, marks = torch.load(after), parameters_of(training)
        apart = {
            name: float((share_of(known[name], name, marks[name]) - value).abs().max()) for name, value in own.items()
        }
        biases = {
            layer: router.expert_bias.tolist()
            for chunk in training.chunks
            for layer, router in routers_of(unwrap(chunk))
            if router.expert_bias is not None
        }
        assert all(one.skipped is None and one.experts is not None for one in results)
        return {
            "loss": [one.loss for one in results],
            "grad_norm": [one.grad_norm for one in results],
            "loads": [one.experts.loads.tolist() for one in results if one.experts],
            "dropped": [one.experts.dropped.tolist() for one in results if one.experts],
            "losses": [one.experts.losses.flatten().tolist() for one in results if one.experts],
            "biases": biases,
            "moved": sorted(
                {
                    name.partition(".layers.")[2].partition(".")[2] or name
                    for name, one in own.items()
                    if marks[name].requires_grad
                }
            ),
            "apart": max(apart.values()),
            "worst": max(apart, key=lambda name: apart[name]),
        }


def train_all(jobs: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Train one after the other in one start of ranks."""
    return [train(*job) for job in jobs]


def losses_of(checkpoint: str, words: list[str]) -> list[float]:
    """Return the validation losses of a checkpoint's model on some packs."""
    path = resolve(Path(checkpoint))
    recipe = load_recipe(path / "recipe.yaml", words, expand_presets)
    with process_groups(recipe.parallel, 1):
        chunks = build_model(recipe, IMAGE_TOKEN)
        load_checkpoint(path, modules=[unwrap(chunk) for chunk in chunks])
        with pipeline.evaluating(chunks):
            return [
                float(run_batches(chunks, [batch], num_sources=1, forward_only=True)[0, 0])
                for batch in batches_of(recipe, 0)
            ]


def panel_of(checkpoint: str, words: list[str]) -> tuple[list[list[int]], list[list[int]], str]:
    """Return what a panel asks of a checkpoint's model, its answers, and a digest of its picture; "" for no picture.

    The first call, of one process, leaves the packs beside the run: the first replica's depend on how many there are.
    """
    kept = Path(checkpoint) / "held_out.pickle"
    path = resolve(Path(checkpoint))
    recipe = load_recipe(path / "recipe.yaml", words, expand_presets)
    with process_groups(recipe.parallel, 1):
        tokenizer = tokenizer_of(recipe)
        chunks = build_model(recipe, tokenizer.imgpad_id)
        load_checkpoint(path, modules=[unwrap(chunk) for chunk in chunks])
        if not kept.exists():
            kept.write_bytes(pickle.dumps(read_held_out(recipe, tokenizer, make_decoder())[0].packs))
        packs = pickle.loads(kept.read_bytes()) if dist.get_rank() == 0 else None
        questions, answers = answer_held_out(chunks, packs, recipe, tokenizer)
        picture = answer_panel(chunks, packs, recipe, tokenizer)
    digest = "" if picture is None else hashlib.sha256(picture.numpy().tobytes()).hexdigest()
    return [one.prompt.tolist() for one in questions], answers, digest


def upcycled(folder: str) -> dict[str, Any]:
    """Save a dense model, make one with experts of it by the command; return what both compute and hold."""
    root = Path(folder)
    recipe = recipe_of({"num_layers": 4})
    with process_groups(recipe.parallel, 5):
        modules = [unwrap(chunk) for chunk in build_model(recipe, IMAGE_TOKEN)]
        save_weights(root / "dense" / "checkpoints", modules, recipe_yaml=to_yaml(recipe))
    words = [f"model.language.num_moe_experts={EXPERTS}", "model.language.moe_layer_freq=[0, 1, 0, 1]"]
    assert main(["upcycle", str(root / "dense"), f"--out={root / 'moe'}", *words]) == 0
    new = load_recipe(root / "moe" / "recipe.yaml", [], expand_presets)
    with process_groups(new.parallel, 1):
        model = unwrap(build_model(new, IMAGE_TOKEN)[0])
        load_checkpoint(root / "moe", modules=[model])
        dense = dict(modules[0].named_parameters())
        same = 0
        for layer in (1, 3):
            for expert in model.language.decoder.layers[layer].mlp.experts.local_experts:
                whole = f"{LAYERS}{layer}.mlp.linear_fc"
                same += torch.equal(expert.linear_fc1.weight, dense[f"{whole}1.weight"])
                assert torch.equal(expert.linear_fc2.weight, dense[f"{whole}2.weight"])
        routers = min(float(router.weight.std()) for _, router in routers_of(model))
    return {
        "dense": losses_of(str(root / "dense"), []), "loss": losses_of(str(root / "moe"), []), "same": same,
        "routers": routers,
    }  # fmt: skip
