"""A model whose layers attend to pictures, on ranks: trained, and answering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from levels_cases import LENGTH, NEW, VOCABULARY, fill  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from tiles_cases import shared  # noqa: E402
from tiny import IMAGE_TOKEN, tiny_recipe  # noqa: E402

from megavlm.checkpoint import distributed as checkpoint  # noqa: E402
from megavlm.config.help import to_yaml  # noqa: E402
from megavlm.config.schema import Recipe  # noqa: E402
from megavlm.data.batch import IGNORE_INDEX, Pack  # noqa: E402
from megavlm.data.chat import EncodedSample  # noqa: E402
from megavlm.data.media import ImagePlan, arrange, plan_of  # noqa: E402
from megavlm.data.packing import PackableSample, build_pack  # noqa: E402
from megavlm.data.spans import spans_of  # noqa: E402
from megavlm.inference.generate import generate, pack_prompts  # noqa: E402
from megavlm.inference.option_losses import option_losses  # noqa: E402
from megavlm.inference.prompt import Prompt  # noqa: E402
from megavlm.models.build import build_model, unwrap  # noqa: E402
from megavlm.parallel.state import process_groups  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.step import train_step  # noqa: E402

STD = {"init_method_std": 0.15}


def recipe(
    freeze: tuple[str, ...] = (),
    language: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    **parallel: Any,
) -> Recipe:
    """Return a model of 8 language layers, of which the second, fourth and seventh attend to pictures."""
    model = {
        "preset": "tiny",
        "vision": {
            "preset": "mllama_vit", "image_size": 28, "patch_size": 14, "hidden_size": 48, "num_layers": 2,
            "num_global_layers": 1, "num_attention_heads": 4, "ffn_hidden_size": 96, "intermediate_layers": (1,), **STD,
        },
        "connector": {"preset": "linear", **STD},
        "language": {
            "preset": "llama", "hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 8, "vocab_size": 512,
            "output_vocab_size": 504, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16,
            "max_position_embeddings": 2048, "cross_attention_layers": (1, 3, 6), **STD, **(language or {}),
        },
        "image": {"kind": "canvas_tiles", "resample": "bilinear"},
    }  # fmt: skip
    data = {"train": [{"path": "unused"}], "tokenizer": "unused", "sequence_length": LENGTH}
    modules = {part: {"freeze": True} for part in freeze}
    return tiny_recipe(model=model, data=data, parallel=parallel, modules=modules, lora=lora or {})


def sample(plan: ImagePlan, seed: int, sizes: list[tuple[int, int]], *, beside: bool = False) -> Any:
    """Return a sample that shows pictures of these sizes, without words between where ``beside``; and patches."""
    rng = np.random.default_rng(seed)
    layouts = [plan.plan(*size, len(sizes)) for size in sizes]
    parts = [rng.integers(0, IMAGE_TOKEN, 6)]
    for number, layout in enumerate(layouts):
        words = 0 if beside and number < len(layouts) - 1 else 5
        parts += [np.full(layout.tokens, IMAGE_TOKEN), rng.integers(0, IMAGE_TOKEN, words)]
    tokens = np.concatenate(parts).astype(np.int64)
    labels = np.where((tokens == IMAGE_TOKEN) | (rng.random(len(tokens)) < 0.3), IGNORE_INDEX, tokens)
    rows = sum(plan.pixels_of(layout)[0] for layout in layouts)
    pixels = rng.integers(0, 256, (rows, *plan.row), dtype=np.uint8)
    made = PackableSample(
        EncodedSample(tokens, labels, len(sizes)), (b"",) * len(sizes), f"s/{seed}", 0,
        shapes=tuple(layout.shape for layout in layouts), views=len(layouts),
    )  # fmt: skip
    return made, pixels


def packs(made: Recipe, count: int, seed: int) -> list[tuple[Pack, np.ndarray]]:
    """Return packs of three samples, one of them without pictures; every third pack has none at all."""
    plan, found = plan_of(made.model), []
    for index in range(count):
        kinds: list[list[tuple[int, int]]] = [[(60, 20)], [], [(9, 9), (30, 55)]] if index % 3 != 1 else [[], []]
        each = [sample(plan, 100 * seed + 10 * index + k, sizes, beside=index == 0) for k, sizes in enumerate(kinds)]
        pixels = np.concatenate([pixels for _, pixels in each])
        pack = build_pack([one for one, _ in each], LENGTH, 3, plan, spans=spans_of(made.model, IMAGE_TOKEN))
        found.append((pack, pixels))
    return found


def train(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train two steps for each of ``jobs``; return losses, gradient norms, and the weights' change by part."""
    return [_train(job) for job in jobs]


def _train(job: dict[str, Any]) -> dict[str, Any]:
    made = recipe(job.get("freeze", ()), lora=job.get("lora"), **job["parallel"])
    plan = plan_of(made.model)
    with process_groups(made.parallel, made.training.seed):
        training = build_training(made, IMAGE_TOKEN)
        weights = Path(job["weights"])
        if not weights.exists():
            with torch.no_grad():
                for name, parameter in training.modules[0].named_parameters():
                    if name.endswith("gate"):
                        parameter.fill_(0.7)
            checkpoint.save_weights(weights.parent, training.modules, recipe_yaml=to_yaml(made))
        checkpoint.load(weights, modules=training.modules)
        for module in training.modules:
            fill(module)
        training.optimizer.reload_model_params()
        results = []
        for step in range(2):
            rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
            batches = shared(plan, packs(made, 4, step)[rank::size])
            training.scheduler.step(1)
            results.append(train_step(training.chunks, training.optimizer, batches, num_sources=1))
        gates = {}
        for module in training.modules:
            first = module.language.decoder.layers[0].layer_number - 1
            for name, parameter in module.named_parameters():
                if ".cross_attn" in name or ("_layernorm" in name and "cross" in name):
                    number, rest = name.removeprefix("language.decoder.layers.").split(".", 1)
                    gates[f"{int(number) + first}.{rest}"] = parameter.detach().double().flatten()[:4].tolist()
        return {"loss": [one.loss for one in results], "norm": [one.grad_norm for one in results], "gates": gates}


def prompts(made: Recipe) -> list[Prompt]:
    """Return prompts with none, one and two pictures, one of which ends with a picture."""
    plan, found = plan_of(made.model), []
    for seed, sizes in ((1, [(9, 9)]), (2, []), (3, [(60, 9), (9, 60)]), (4, [(30, 30)])):
        one, pixels = sample(plan, seed, sizes, beside=seed == 3)
        tokens = one.encoded.tokens[: -5 if seed == 4 else None]
        arrangement = arrange(plan, [plan.plan(*size, len(sizes)) for size in sizes]) if sizes else None
        found.append(Prompt(tokens, torch.from_numpy(pixels), arrangement))
    return found


def answer(jobs: list[dict[str, Any]]) -> list[Any]:
    """Answer the prompts for each of ``jobs``; with ``plain`` in the plainest way, one pass for each token."""
    return [_answer(job) for job in jobs]


def _answer(job: dict[str, Any]) -> Any:
    made = recipe(**job["parallel"])
    with process_groups(made.parallel, 3):
        chunks = build_model(made, IMAGE_TOKEN)
        checkpoint.load(Path(job["weights"]), modules=[unwrap(chunk) for chunk in chunks])
        asked = prompts(made)
        if job.get("plain"):
            return [_plain(chunks[0].eval(), prompt) for prompt in asked]
        losses = option_losses(chunks, asked, [[[5, 7], [9]]] * 4, vocab_size=504, pack_length=LENGTH)
        told = generate(
            chunks, asked, max_new_tokens=NEW, stop_ids=[VOCABULARY - 1], vocab_size=VOCABULARY, pack_length=LENGTH
        )
        return told, losses


@torch.no_grad()
def _plain(model: Any, prompt: Prompt) -> list[int]:
    grid = None if prompt.arrangement is None else torch.from_numpy(prompt.arrangement.grid)
    for _ in range(NEW):
        batch = pack_prompts([prompt], len(prompt), None, model.two_way_spans)
        logits = model(**{**batch.inputs(), "images": prompt.images, "image_grid": grid})
        token = int(logits[0, -1, :VOCABULARY].argmax())
        if token == VOCABULARY - 1:
            break
        prompt.answer.append(token)
    return prompt.answer
