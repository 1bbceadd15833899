"""What a few ranks do at layouts where they share key/value heads: train, save again, answer prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import torch  # noqa: E402
from generate_prompts import VOCABULARY, prompts  # noqa: E402
from lora_worker import fill  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from tiny import IMAGE_TOKEN, SEQUENCE_LENGTH, random_packs, tiny_recipe  # noqa: E402

from megavlm.checkpoint import distributed as checkpoint  # noqa: E402
from megavlm.checkpoint.saver import Saver, State  # noqa: E402
from megavlm.config.help import to_yaml  # noqa: E402
from megavlm.config.load import load_recipe  # noqa: E402
from megavlm.config.schema import Recipe  # noqa: E402
from megavlm.data.device_batch import Batch, make_batch  # noqa: E402
from megavlm.families.presets import expand_presets  # noqa: E402
from megavlm.inference.generate import generate  # noqa: E402
from megavlm.inference.sampling import Sampling  # noqa: E402
from megavlm.models.build import build_model, unwrap  # noqa: E402
from megavlm.parallel.state import is_first_stage, process_groups  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.step import train_step  # noqa: E402

Job = dict[str, Any]


def run_jobs(jobs: list[Job]) -> list[Any]:
    """Do one after the other; return what each gives on this rank."""
    kinds = {"train": train, "save_again": save_again, "answer": answer}
    return [kinds[job["kind"]](job) for job in jobs]


def train(job: Job) -> dict[str, Any]:
    """Train from ``weights`` (made if they are not there); the gradients of the first step go to ``gradients``.

    Optional: ``load`` is a run to go on from, ``save`` where to save with optimizer state, ``steps``.
    """
    recipe = tiny_recipe(**job["recipe"])
    with process_groups(recipe.parallel, recipe.training.seed):
        weights = Path(job["weights"])
        if not weights.exists():
            plain = tiny_recipe(**{name: branch for name, branch in job["recipe"].items() if name != "lora"})
            modules = [unwrap(chunk) for chunk in build_model(plain, IMAGE_TOKEN)]
            checkpoint.save_weights(weights.parent, modules, recipe_yaml=to_yaml(plain))
        training = build_training(recipe, IMAGE_TOKEN)
        if "load" in job:
            checkpoint.load(
                Path(job["load"]), modules=training.modules, optimizer=training.optimizer, scheduler=training.scheduler
            )
        else:
            checkpoint.load(weights, modules=training.modules)
            if recipe.lora.rank is not None:
                fill(training.modules)
            training.optimizer.reload_model_params()
        parameters = [p for module in training.modules for p in module.parameters()]
        found: dict[str, Any] = {
            "parameters": sum(p.numel() for p in parameters),
            "learning": sum(p.numel() for p in parameters if p.requires_grad),
            "stage": mpu.get_pipeline_model_parallel_rank(),
        }
        results = []
        for step in range(job.get("steps", 2)):
            training.scheduler.step(1)
            results.append(train_step(training.chunks, training.optimizer, _batches(recipe, step), num_sources=1))
            if step == 0 and "gradients" in job:
                save_gradients(training.modules, recipe, Path(job["gradients"]))
        if "save" in job:
            with training.settled():
                state = State(training.modules, training.optimizer, training.scheduler, run={"step": 3})
                Saver(Path(job["save"]), keep=1).save(state)
        return found | {"loss": [one.loss for one in results], "grad_norm": [one.grad_norm for one in results]}


def _batches(recipe: Recipe, step: int) -> list[Batch]:
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    mine = random_packs(recipe.training.global_batch_size, seed=step)[rank::size]
    cpu = torch.device("cpu")
    return [make_batch(pack, torch.from_numpy(pixels) if is_first_stage() else None, cpu) for pack, pixels in mine]


def save_gradients(modules: list[Any], recipe: Recipe, root: Path) -> None:
    """Save the last step's gradients in place of the weights, so that those of all layouts can be compared.

    Those of frozen weights are zero; the others are whole on every replica (with the plain optimizer), and clipped.
    """
    parameters = [p for module in modules for p in module.parameters()]
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter))
        Saver(root, keep=1).save(State(modules, run={"step": 0}, recipe_yaml=to_yaml(recipe)))
        for parameter, values in zip(parameters, kept, strict=True):
            parameter.copy_(values)


def save_again(job: Job) -> str:
    """Load a checkpoint, or adapters and their base, at another layout and save it at once; return where."""
    recipe = load_recipe(Path(job["load"]) / "recipe.yaml", job["words"], expand_presets)
    with process_groups(recipe.parallel, 1):
        modules = [unwrap(chunk) for chunk in build_model(recipe, job["image_token"])]
        checkpoint.load(Path(job["load"]), modules=modules)
        base = Path(job["base"]) if "base" in job else None
        state = State(modules, run={"step": 1}, recipe_yaml=to_yaml(recipe), parent=Path(job["load"]), base=base)
        return str(Saver(Path(job["save"]), keep=1).save(state))


def answer(job: Job) -> list[list[list[int]]]:
    """Return greedy answers and sampled ones."""
    recipe = tiny_recipe(**job["recipe"])
    with process_groups(recipe.parallel, 3):
        chunks = build_model(recipe, IMAGE_TOKEN)
        checkpoint.load(Path(job["weights"]), modules=[unwrap(chunk) for chunk in chunks])
        sampled = Sampling(temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=4)
        answers = [
            generate(
                chunks, prompts(), max_new_tokens=6, stop_ids=[VOCABULARY - 1], vocab_size=VOCABULARY,
                pack_length=SEQUENCE_LENGTH, **options,
            )
            for options in ({}, {"sampling": sampled})
        ]  # fmt: skip
        return answers
