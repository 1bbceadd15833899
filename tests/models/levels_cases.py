"""A model with positions of three numbers and a deepstack, on ranks: trained, and answering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from tiles_cases import picture_samples, shared  # noqa: E402
from tiny import IMAGE_TOKEN, tiny_recipe  # noqa: E402

from megavlm.architectures.adapters import frozen_linears  # noqa: E402
from megavlm.checkpoint import distributed as checkpoint  # noqa: E402
from megavlm.checkpoint.saver import Saver, State  # noqa: E402
from megavlm.config.help import to_yaml  # noqa: E402
from megavlm.config.schema import Recipe  # noqa: E402
from megavlm.data.batch import Pack  # noqa: E402
from megavlm.data.media import ImagePlan, plan_of  # noqa: E402
from megavlm.data.packing import build_pack  # noqa: E402
from megavlm.data.positions import OwnPositions, own_grids, positions_of  # noqa: E402
from megavlm.data.spans import TwoWaySpans, spans_of  # noqa: E402
from megavlm.inference.generate import generate, pack_prompts  # noqa: E402
from megavlm.inference.prompt import Prompt  # noqa: E402
from megavlm.models.build import build_model, unwrap  # noqa: E402
from megavlm.parallel.state import process_groups  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.step import train_step  # noqa: E402

LENGTH, VOCABULARY, NEW = 96, 480, 6
STD = {"init_method_std": 0.15}


QWEN3 = {"preset": "qwen3", "rotary_sections": (3, 3, 2), "rotary_sections_interleaved": True}
COG = {"preset": "llama", "num_query_groups": 4, "visual_expert": True, "image_positions": "shared"}
"""Weights for image tokens, and positions that they share."""
AGENT: dict[str, Any] = {
    "levels": (),
    "language": {**COG, "cross_hidden_size": 24, "cross_compute_hidden_size": 32},
    "front": {
        "vision": {
            "preset": "eva02_pair", "image_size": 16, "patch_size": 8, "hidden_size": 48, "num_layers": 2,
            "num_attention_heads": 4, "ffn_hidden_size": 96, "positional_grid": 2, "high_image_size": 32,
            "high_patch_size": 8, "high_hidden_size": 24, "high_num_layers": 1, "high_num_attention_heads": 2,
            "high_ffn_hidden_size": 48, "high_positional_grid": 4, "high_to": "layers", **STD,
            "high_init_method_std": 0.15,
        },
        "connector": {"preset": "glu", "ffn_hidden_size": 96, **STD},
        "image": {"kind": "squash_pair"},
    },
}  # fmt: skip
"""The same, and attention to the features of a second tower, which are narrower than the stream."""
GLM = {"preset": "glm4", "rotary_sections": (1, 2, 1)}
"""Half of each head turned, in neighbouring pairs; four norms a layer."""


def recipe(
    levels: tuple[int, ...] = (1, 2, 0),
    language: dict[str, Any] = QWEN3,
    front: Any = None,
    lora: dict[str, Any] | None = None,
    **parallel: Any,
) -> Recipe:
    """Return a model of 4 language layers whose first ones take the outputs of the tower's layers ``levels``.

    ``front`` is what else stands in front of them; with ``lora``, the rest of the model is frozen.
    """
    model = {
        "preset": "tiny",
        "vision": {"image_size": 32, "hidden_size": 48, "num_layers": 3, "ffn_hidden_size": 96, **STD}
        | {"num_attention_heads": 4, "positional_grid": 2, "deepstack_layers": levels},
        "connector": {"preset": "mlp2x_gelu", **STD},
        "language": {"hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 4, "vocab_size": 512, **STD}
        | {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16, "max_position_embeddings": 2048}
        | language,
    } | (front or {})
    data = {"train": [{"path": "unused"}], "tokenizer": "unused", "sequence_length": LENGTH}
    frozen = {part: {"freeze": lora is not None} for part in ("vision", "connector")}
    return tiny_recipe(model=model, data=data, parallel=parallel, lora=lora or {}, modules=frozen)


def packs(
    plan: ImagePlan, own: OwnPositions | None, count: int, seed: int, spans: TwoWaySpans | None = None
) -> list[tuple[Pack, np.ndarray]]:
    """Return packs of two samples; every third has no picture."""
    found = []
    for index in range(count):
        kinds: list[list[tuple[int, int]]] = [[(9, 9)], [(9, 9), (9, 9)]] if index % 3 != 1 else [[], []]
        made = [picture_samples(plan, 100 * seed + 10 * index + k, sizes) for k, sizes in enumerate(kinds)]
        pixels = np.concatenate([pixels for _, pixels in made])
        found.append((build_pack([sample for sample, _ in made], LENGTH, 3, plan, own, spans), pixels))
    return found


def train(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train two steps for each of ``jobs``; return losses, gradient norms, and what travels."""
    return [_train(job) for job in jobs]


def _train(job: dict[str, Any]) -> dict[str, Any]:
    made = recipe(**job["model"], **job["parallel"])
    plan, own = plan_of(made.model), positions_of(made.model, IMAGE_TOKEN)
    spans = spans_of(made.model, IMAGE_TOKEN)
    with process_groups(made.parallel, made.training.seed):
        training = build_training(made, IMAGE_TOKEN)
        weights = Path(job["weights"])
        if not weights.exists():
            checkpoint.save_weights(weights.parent, training.modules, recipe_yaml=to_yaml(made))
        if job.get("resumed"):
            checkpoint.load(
                Path(job["resumed"]), modules=training.modules, optimizer=training.optimizer,
                scheduler=training.scheduler,
            )  # fmt: skip
        else:
            checkpoint.load(weights, modules=training.modules)
            for module in training.modules if made.lora.rank is not None else ():
                fill(module)
            training.optimizer.reload_model_params()
        results, saved = [], None
        for step in job.get("steps", range(2)):
            rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
            batches = shared(plan, packs(plan, own, 4, step, spans)[rank::size])
            training.scheduler.step(1)
            results.append(train_step(training.chunks, training.optimizer, batches, num_sources=1))
        if made.parallel.overlap_param_gather:
            for chunk in training.chunks:  # the last step's weights, which no forward pass waits for
                chunk.disable_forward_pre_hook(param_sync=True)
        if job.get("saved"):
            state = State(
                training.modules, training.optimizer, training.scheduler, run={"step": 1}, recipe_yaml=to_yaml(made),
                base=weights,
            )  # fmt: skip
            saved = str(Saver(Path(job["saved"]), keep=9).save(state))
        sums = {}
        for module in training.modules:
            for name, parameter in module.named_parameters():
                if name.startswith(("connector.", "vision.")) or ".vision." in name:
                    # After two steps: what was added to the weights is what the gradients were.
                    value = parameter.detach().double().pow(2).sum()
                    if getattr(parameter, "tensor_model_parallel", False):
                        dist.all_reduce(value, group=mpu.get_tensor_model_parallel_group())
                    sums[name] = float(value)
        return {
            "loss": [one.loss for one in results],
            "norm": [one.grad_norm for one in results],
            "sums": sums,
            "carried": training.modules[0].streams.carried,
            "saved": saved,
        }


@torch.no_grad()
def fill(module: Any) -> None:
    """Give the adapters' B values that are the same at every layout, so that all of their gradients count at once."""
    rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    for number, name, linear in frozen_linears(module.language):
        if linear.adapter is None:
            continue
        own, cut = linear.lora_b, getattr(linear.lora_b, "tensor_model_parallel", False)
        generator = torch.Generator().manual_seed(100 * number + len(name))
        whole = torch.randn(own.size(0) * (size if cut else 1), own.size(1), generator=generator) * 0.1
        halves = whole.chunk(2) if linear.adapter.cut_in_halves else [whole]
        own.copy_(torch.cat([half.chunk(size)[rank] for half in halves]) if cut else whole)


def prompts(made: Recipe) -> list[Prompt]:
    """Return prompts with none, one and two pictures, one of which ends with a picture."""
    plan, found = plan_of(made.model), []
    for seed, sizes in ((1, [(9, 9)]), (2, []), (3, [(9, 9), (9, 9)]), (4, [(9, 9)])):
        sample, pixels = picture_samples(plan, seed, sizes)
        tokens = sample.encoded.tokens[: -5 if seed == 4 else None]
        grids = own_grids(made.model, [plan.plan(*size) for size in sizes])
        found.append(Prompt(tokens, torch.from_numpy(pixels), grids=grids))
    return found


def answer(jobs: list[dict[str, Any]]) -> list[list[list[int]]]:
    """Answer the prompts for each of ``jobs``; with ``plain`` in the plainest way, one pass for each token."""
    return [_answer(job) for job in jobs]


def _answer(job: dict[str, Any]) -> list[list[int]]:
    made = recipe(**job["model"], **job["parallel"])
    with process_groups(made.parallel, 3):
        chunks = build_model(made, IMAGE_TOKEN)
        checkpoint.load(Path(job["weights"]), modules=[unwrap(chunk) for chunk in chunks])
        asked = prompts(made)
        if job.get("plain"):
            return [_plain(chunks[0].eval(), prompt) for prompt in asked]
        return generate(
            chunks, asked, max_new_tokens=NEW, stop_ids=[VOCABULARY - 1], vocab_size=VOCABULARY, pack_length=LENGTH
        )


@torch.no_grad()
def _plain(model: Any, prompt: Prompt) -> list[int]:
    for _ in range(NEW):
        batch = pack_prompts([prompt], len(prompt), model.own_positions, model.two_way_spans)
        logits = model(**{**batch.inputs(), "images": prompt.images})
        token = int(logits[0, -1, :VOCABULARY].argmax())
        if token == VOCABULARY - 1:
            break
        prompt.answer.append(token)
    return prompt.answer
