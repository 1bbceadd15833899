"""Short trainings of models whose tower or connector every tensor-parallel rank holds whole; see test_replicas."""

from __future__ import annotations

from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import job_files  # noqa: E402
import torch  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from tiny import IMAGE_TOKEN, random_packs, tiny_recipe  # noqa: E402

from megavlm.data.device_batch import Batch, make_batch  # noqa: E402
from megavlm.models.build import unwrap  # noqa: E402
from megavlm.parallel.state import is_first_stage, process_groups  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.step import train_step  # noqa: E402

Job = dict[str, Any]
STEPS = 3


def run_jobs(jobs: dict[str, Job]) -> dict[str, dict[str, Any]]:
    """Do one after the other; return by name what each gives on this rank."""
    return {name: run(job) for name, job in jobs.items()}


def run(job: Job) -> dict[str, Any]:
    """Train from ``weights`` (made if they are not there) and save, or ``load`` a run and save it again at once."""
    recipe = tiny_recipe(**job["recipe"])
    with process_groups(recipe.parallel, recipe.training.seed):
        job_files.make_weights(job, lambda branches: tiny_recipe(**branches))
        torch.manual_seed(recipe.training.seed)
        training = build_training(recipe, IMAGE_TOKEN)
        found: dict[str, Any] = {"stage": mpu.get_pipeline_model_parallel_rank(), "built": weights_of(training.modules)}
        job_files.load(job, training, recipe)
        if "weights" in job:
            found["features"] = features(training)
            results = []
            for step in range(STEPS):
                training.scheduler.step(1)
                results.append(train_step(training.chunks, training.optimizer, batches(recipe, step), num_sources=1))
            found |= {"loss": [one.loss for one in results], "grad_norm": [one.grad_norm for one in results]}
        parameters = [p for module in training.modules for p in module.parameters()]
        found["parameters"] = sum(p.numel() for p in parameters)
        found["learning"] = sum(p.numel() for p in parameters if p.requires_grad)
        with training.settled():
            found["copies"] = weights_of(training.modules, cut=False)
            job_files.save(job, training, recipe, STEPS)
    return found


def batches(recipe: Any, step: int) -> list[Batch]:
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    mine = random_packs(recipe.training.global_batch_size, seed=step)[rank::size]
    cpu = torch.device("cpu")
    return [make_batch(pack, torch.from_numpy(pixels) if is_first_stage() else None, cpu) for pack, pixels in mine]


def features(training: Any) -> dict[int, torch.Tensor] | None:
    """Return the features of one and of three pictures without gradients, as generation asks for them."""
    module = unwrap(training.chunks[0])
    if module.vision is None:
        return None
    pixels = torch.from_numpy(random_packs(1)[0][1])[:1].expand(3, -1, -1, -1) // torch.tensor([1, 2, 3]).view(
        3, 1, 1, 1
    )
    with torch.no_grad():
        assert module.encode_images(pixels[:0]) is None
        return {count: module.encode_images(pixels[:count].to(torch.uint8)).float() for count in (1, 3)}


def weights_of(modules: list[Any], *, cut: bool = True) -> dict[str, bytes]:
    """Return the weights of tower and connector on this rank, ``cut`` ones among them."""
    return {
        name: parameter.detach().float().numpy().tobytes()
        for module in modules
        for name, parameter in module.named_parameters()
        if name.split(".")[0] in ("vision", "connector")
        and (cut or not getattr(parameter, "tensor_model_parallel", False))
    }
