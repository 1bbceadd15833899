"""Trains adapters for some steps at one layout from a base; writes losses, gradient norms, and what changed.

Run under torchrun with a JSON list of jobs, each with: ``recipe`` (branches for tests.tiny), ``base`` (checkpoint; made
here if it does not exist), ``out``, and optionally ``save`` (a directory of checkpoints), ``load`` (adapters to go on
from), ``first`` (number of the first step), ``fill`` (give B random values, so that every gradient counts at once).
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from tiny import IMAGE_TOKEN, random_packs, tiny_recipe  # noqa: E402

from megavlm.architectures.adapters import frozen_linears, trained_keys  # noqa: E402
from megavlm.checkpoint import distributed as checkpoint  # noqa: E402
from megavlm.checkpoint.saver import Saver, State  # noqa: E402
from megavlm.config.help import to_yaml  # noqa: E402
from megavlm.data.device_batch import make_batch  # noqa: E402
from megavlm.layers.lora import LORA  # noqa: E402
from megavlm.models.build import build_model, unwrap  # noqa: E402
from megavlm.parallel.state import is_first_stage, process_groups  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.step import train_step  # noqa: E402


def digests(modules: list[Any]) -> dict[str, str]:
    """Return a digest of every parameter of this rank."""
    found = {}
    for i, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            found[f"{i}.{name}"] = digest(parameter)
    return found


def digest(parameter: torch.Tensor) -> str:
    return hashlib.sha256(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


PARTS = {"vision.": "vision", "connector.": "connector", "language.embedding.": "embedding"}
PARTS |= {"language.output_layer.": "head", "language.": "language"}


def part_of(key: str) -> str:
    """Return what a parameter of :func:`digests` belongs to."""
    name = key.partition(".")[2]
    if name.rpartition(".")[2] in LORA:
        return "adapters"
    if "norm" in name and name.startswith("language.") and name.endswith(".weight"):
        return "norms"
    return next(part for start, part in PARTS.items() if name.startswith(start))


def draws(modules: list[Any]) -> dict[str, list[str]]:
    """Return, by kind, digests of what every rank keeps of ones after an adapter's dropout."""
    layer = next(iter(frozen_linears(modules[0].language)))[2]
    found: dict[str, list[str]] = {}
    for kind in ("alike", "apart"):
        mine = digest(layer._dropped(torch.ones(4096), same_on_all_ranks=kind == "alike"))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        found[kind] = everyone
    return found


def replicas_agree(modules: list[Any]) -> bool:
    """Whether adapters and norms that each tensor-parallel rank has whole are the same on all, bit for bit."""
    mine = "".join(
        digest(parameter)
        for module in modules
        for name, parameter in module.named_parameters()
        if (name.rpartition(".")[2] in LORA or "norm" in name)
        and not getattr(parameter, "tensor_model_parallel", False)
    )
    group = mpu.get_tensor_model_parallel_group()
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, mine, group=group)
    return len(set(found)) == 1


def fill(modules: list[Any]) -> None:
    """Give B values that depend on its whole row alone, so that they are the same at every layout."""
    rank = mpu.get_tensor_model_parallel_rank()
    for module in modules:
        for layer in module.language.decoder.layers:
            for name, parameter in layer.named_parameters():
                if name.endswith("lora_b"):
                    cut = getattr(parameter, "tensor_model_parallel", False)
                    rows = parameter.shape[0] * (mpu.get_tensor_model_parallel_world_size() if cut else 1)
                    generator = torch.Generator().manual_seed(layer.layer_number)
                    whole = torch.randn(rows, parameter.shape[1], generator=generator) * 0.05
                    if "fc1" in name and cut and rows % 2 == 0 and module.language.decoder:
                        gate, up = (half.chunk(rows // parameter.shape[0])[rank] for half in whole.chunk(2))
                        adapter = layer.mlp.linear_fc1.adapter
                        both = adapter.halves and (adapter.count == 2 or len(adapter.sizes) == 1)
                        own = torch.cat([gate, up]) if both else whole.chunk(rows // parameter.shape[0])[rank]
                    else:
                        own = whole.chunk(rows // parameter.shape[0])[rank] if cut else whole
                    with torch.no_grad():
                        parameter.copy_(own)


def main() -> None:
    """Do all jobs."""
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)


def run(job: dict[str, Any]) -> None:
    """Train and write."""
    recipe = tiny_recipe(**job["recipe"])
    with process_groups(recipe.parallel, recipe.training.seed):
        base = Path(job["base"])
        if not base.exists():
            plain = tiny_recipe(**{key: value for key, value in job["recipe"].items() if key != "lora"})
            modules = [unwrap(chunk) for chunk in build_model(plain, IMAGE_TOKEN)]
            checkpoint.save_weights(base.parent, modules, recipe_yaml=to_yaml(plain))
        training = build_training(recipe, IMAGE_TOKEN)
        if job.get("load"):
            checkpoint.load(
                Path(job["load"]), modules=training.modules, optimizer=training.optimizer, scheduler=training.scheduler
            )
        else:
            checkpoint.load(base, modules=training.modules)
            if job.get("fill"):
                fill(training.modules)
            training.optimizer.reload_model_params()
        before, drawn = digests(training.modules), {}
        learns = {f"{i}.{name}" for i, module in enumerate(training.modules) for name in trained_keys(module)}
        if job.get("draws"):
            drawn = draws(training.modules)
        data_rank, data_size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        losses, norms = [], []
        first = job.get("first", 0)
        for step in range(first, first + recipe.training.train_steps):
            mine = random_packs(recipe.training.global_batch_size, seed=step)[data_rank::data_size]
            batches = [
                make_batch(pack, torch.from_numpy(pixels) if is_first_stage() else None, torch.device("cpu"))
                for pack, pixels in mine
            ]
            training.scheduler.step(1)
            result = train_step(training.chunks, training.optimizer, batches, num_sources=1)
            losses.append(result.loss)
            norms.append(result.grad_norm)
        with training.settled():
            after = digests(training.modules)
            changed = {key for key in before if before[key] != after[key]}
            mine = (replicas_agree(training.modules) and changed <= learns < set(before), {*map(part_of, changed)})
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
            saved = None
            if job.get("save"):
                state = State(
                    training.modules, training.optimizer, training.scheduler, run={"step": first + len(losses)},
                    recipe_yaml=to_yaml(recipe), base=base,
                )  # fmt: skip
                saved = str(Saver(Path(job["save"]), keep=9).save(state))
        if dist.get_rank() == 0:
            counts = sum(p.numel() for m in training.modules for p in m.parameters() if p.requires_grad)
            kept = sum(layer.weight.numel() for m in training.modules for *_, layer in frozen_linears(m.language))
            out = {
                "full_precision_kept": kept,
                "loss": losses,
                "grad_norm": norms,
                "frozen_same": all(one for one, _ in everyone),
                "changed": sorted(set().union(*(parts for _, parts in everyone))),
                "draws": drawn,
                "learning": counts,
                "saved": saved,
            }
            Path(job["out"]).write_text(json.dumps(out))


if __name__ == "__main__":
    main()
