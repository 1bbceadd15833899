"""A vision-language model on Mamba, on ranks: trained, with adapters and without, and answering.

Packs have segments of one and two positions, which are shorter than the convolution, and several pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from tiny import IMAGE_SIZE, IMAGE_TOKEN, TOKENS_PER_IMAGE, tiny_recipe  # noqa: E402

from megavlm.checkpoint import distributed as checkpoint  # noqa: E402
from megavlm.config.help import to_yaml  # noqa: E402
from megavlm.config.schema import Recipe  # noqa: E402
from megavlm.data.batch import IGNORE_INDEX, make_pack  # noqa: E402
from megavlm.data.device_batch import Batch, make_batch  # noqa: E402
from megavlm.inference.generate import generate, pack_prompts  # noqa: E402
from megavlm.inference.prompt import Prompt  # noqa: E402
from megavlm.models.build import build_model, unwrap  # noqa: E402
from megavlm.parallel.state import is_first_stage, process_groups  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.step import train_step  # noqa: E402

LANGUAGE = {"preset": "tiny_mamba", "hidden_size": 64, "intermediate_size": 128, "time_step_rank": 5}
LANGUAGE |= {"init_method_std": 0.15}
LENGTHS = ((1, 30, 2, 25, 1, 20), (40, 1, 1, 3, 44), (2, 70))
"""Of the segments of packs, which padding fills up to ``PACK``."""
PACK, VOCABULARY, NEW = 96, 480, 5
STOPS = list(range(0, VOCABULARY, 6))
"""So many that answers end at different steps."""


def recipe(job: dict[str, Any]) -> Recipe:
    """Return the recipe of a job: its branches over the tiny model's."""
    branches = {name: job[name] for name in ("parallel", "lora", "modules", "training") if name in job}
    return tiny_recipe(model={"preset": "tiny", "language": LANGUAGE}, **branches)


def ids_of(rng: np.random.Generator, length: int, pictures: int) -> np.ndarray:
    """Return text with pictures in it, one after the other from the second position on."""
    ids = rng.integers(0, VOCABULARY, length)
    for k in range(pictures):
        ids[1 + k * (TOKENS_PER_IMAGE + 1) :][:TOKENS_PER_IMAGE] = IMAGE_TOKEN
    return ids


def batches(step: int, places: list[int]) -> list[Batch]:
    """Return those packs of a step of four that this replica has; the second has no picture."""
    found = []
    for index in places:
        rng = np.random.default_rng(100 * step + index)
        counts = [0 if index == 1 or length < 12 else int(rng.integers(0, 3)) for length in LENGTHS[index % 3]]
        ids = [ids_of(rng, n, k) for n, k in zip(LENGTHS[index % 3], counts, strict=True)]
        labels = [np.where((one == IMAGE_TOKEN) | (rng.random(len(one)) < 0.3), IGNORE_INDEX, one) for one in ids]
        pixels = rng.integers(0, 256, (sum(counts), 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
        shown = torch.from_numpy(pixels) if is_first_stage() else None
        found.append(make_batch(make_pack(ids, PACK, labels=labels), shown, torch.device("cpu")))
    return found


def train(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train three steps for each of ``jobs``; return losses, gradient norms, and squares of what was trained."""
    return [_train(job) for job in jobs]


def _train(job: dict[str, Any]) -> dict[str, Any]:
    made = recipe(job)
    with process_groups(made.parallel, made.training.seed):
        weights = Path(job["weights"])
        if not weights.exists():
            modules = [unwrap(chunk) for chunk in build_model(recipe({}), IMAGE_TOKEN)]
            checkpoint.save_weights(weights.parent, modules, recipe_yaml=to_yaml(recipe({})))
        training = build_training(made, IMAGE_TOKEN)
        checkpoint.load(weights, modules=training.modules)
        training.optimizer.reload_model_params()
        results = []
        for step in range(3):
            rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
            training.scheduler.step(1)
            mine = batches(step, list(range(4))[rank::size])
            results.append(train_step(training.chunks, training.optimizer, mine, num_sources=1))
        with training.settled():  # with overlap_param_gather the last step's weights are still on their way
            sums = _sums(training.modules)
        return {
            "loss": [one.loss for one in results],
            "norm": [one.grad_norm for one in results],
            "sums": sums,
        }


def _sums(modules: list[Any]) -> dict[str, float]:
    """Return the sum of squares of each kind of parameter over all layers that has been trained."""
    found: dict[str, torch.Tensor] = {}
    for module in modules:
        for name, parameter in module.named_parameters():
            if ".layers." in name and name.startswith("language.") and parameter.requires_grad:
                kind = name.split(".layers.")[1].partition(".")[2]
                value = parameter.detach().double().pow(2).sum()
                if getattr(parameter, "tensor_model_parallel", False):
                    dist.all_reduce(value, group=mpu.get_tensor_model_parallel_group())
                found[kind] = found.get(kind, torch.zeros((), dtype=torch.float64)) + value
    for value in found.values():
        dist.all_reduce(value, group=mpu.get_pipeline_model_parallel_group())
    return {kind: float(value) for kind, value in sorted(found.items())}


def prompts() -> list[Prompt]:
    """Return prompts of one, two and three positions, and longer ones with and without pictures."""
    found = []
    for seed, (length, pictures) in enumerate(((1, 0), (30, 2), (2, 0), (3, 0), (17, 0), (24, 1))):
        rng = np.random.default_rng(seed)
        pixels = torch.from_numpy(rng.integers(0, 256, (pictures, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8))
        found.append(Prompt(ids_of(rng, length, pictures), pixels))
    return found


def answer(jobs: list[dict[str, Any]]) -> list[list[list[int]]]:
    """Answer the prompts for each of ``jobs``; with ``plain`` by a pass over everything for each token."""
    return [_answer(job) for job in jobs]


def _answer(job: dict[str, Any]) -> list[list[int]]:
    made = recipe(job)
    with process_groups(made.parallel, 3):
        chunks = build_model(made, IMAGE_TOKEN)
        checkpoint.load(Path(job["weights"]), modules=[unwrap(chunk) for chunk in chunks])
        if job.get("plain"):
            return [_plain(chunks[0].eval(), prompt) for prompt in prompts()]
        return generate(chunks, prompts(), max_new_tokens=NEW, stop_ids=STOPS, vocab_size=VOCABULARY, pack_length=PACK)


@torch.no_grad()
def _plain(model: Any, prompt: Prompt) -> list[int]:
    for _ in range(NEW):
        batch = pack_prompts([prompt], len(prompt))
        logits = model(**{**batch.inputs(), "images": prompt.images if len(prompt.images) else None})
        token = int(logits[0, -1, :VOCABULARY].argmax())
        if token in STOPS:
            break
        prompt.answer.append(token)
    return prompt.answer
