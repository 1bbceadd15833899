"""Train the shipped recipes, shrunk, one after another in one job of four processes. Run under torchrun.

Arguments: a JSON file with ``root`` (a small prepared data set and tokenizer) and ``runs``: name, recipe, overrides; a
JSON file to write, with what happened in each run.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402

from megavlm.checkpoint.paths import with_tokenizer_of_load  # noqa: E402
from megavlm.config.checks import check_paths, check_recipe  # noqa: E402
from megavlm.config.load import load_recipe  # noqa: E402
from megavlm.config.schema import Recipe  # noqa: E402
from megavlm.data.tokenizer import load_tokenizer  # noqa: E402
from megavlm.families.presets import expand_presets  # noqa: E402
from megavlm.models.build import MODULES  # noqa: E402
from megavlm.parallel.layout import describe  # noqa: E402
from megavlm.parallel.output import holding  # noqa: E402
from megavlm.parallel.state import any_rank, process_groups  # noqa: E402
from megavlm.training.loop import Trainer  # noqa: E402

RANKS = 4
Weights = dict[str, torch.Tensor]


def weights(trainer: Trainer) -> Weights:
    """Return a copy of this rank's weights, by module and name."""
    return {name: p.detach().clone() for module in trainer.training.modules for name, p in module.named_parameters()}


def differ(before: Weights, after: Weights, module: str) -> bool:
    """Whether a module's weights differ on some rank; a collective."""
    names = [name for name in before if name.startswith(f"{module}.")]
    return any_rank(any(not torch.equal(before[name], after[name]) for name in names))


def fingerprint(trainer: Trainer) -> dict[str, list[float]]:
    """Return the sum and the sum of squares of each module's weights, the same at every layout; a collective."""
    sums = torch.zeros(len(MODULES), 2, dtype=torch.float64)
    for name, p in ((n, p) for module in trainer.training.modules for n, p in module.named_parameters()):
        if ".lora_" in name:  # adapters stand beside the weights of the stage before
            continue
        sharded = getattr(p, "tensor_model_parallel", False)
        if mpu.get_data_parallel_rank() == 0 and (sharded or mpu.get_tensor_model_parallel_rank() == 0):
            values = p.detach().double()
            sums[MODULES.index(name.partition(".")[0])] += torch.stack([values.sum(), values.square().sum()])
    dist.all_reduce(sums)
    return dict(zip(MODULES, sums.tolist(), strict=True))


def rates(trainer: Trainer) -> list[float]:
    """Return the peak learning rates of all parameter groups of all ranks; a collective."""
    own = {group["max_lr"] for group in trainer.training.optimizer.param_groups if group["params"]}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return sorted(set().union(*gathered))


def prepare(name: str, overrides: list[str]) -> Recipe:
    """Load and check as ``megavlm train`` does."""
    recipe = load_recipe(name, overrides, expand_presets)
    check_recipe(recipe, RANKS)
    check_paths(recipe)
    return with_tokenizer_of_load(recipe)


def train(recipe: Recipe) -> dict[str, Any]:
    """Run one recipe; return what the test asks about."""
    with (
        process_groups(recipe.parallel, recipe.training.seed),
        holding(recipe.output_dir, "train", "output_dir", 60) as lock,
    ):
        assert recipe.data.tokenizer is not None
        trainer = Trainer(recipe, load_tokenizer(recipe.data.tokenizer), lock)
        try:
            found: dict[str, Any] = {
                "layout": describe(recipe.parallel, RANKS),
                "starts_at": trainer.progress.step,
                "parent": str(trainer.parent),
                "rates": rates(trainer),
            }
            before = weights(trainer)
            found["first_weights"] = fingerprint(trainer)
            found["exit_code"] = trainer.train()
            with trainer.training.settled():
                after = weights(trainer)
                found["last_weights"] = fingerprint(trainer)
            found["trained"] = [module for module in MODULES if differ(before, after, module)]
        finally:
            trainer.close()
    return found


def main() -> None:
    """Run all."""
    job = json.loads(Path(sys.argv[1]).read_text())
    results: dict[str, Any] = {}
    for run in job["runs"]:
        print("run:", run["name"], flush=True)
        start = time.perf_counter()
        results[run["name"]] = train(prepare(run["recipe"], run["overrides"]))
        results[run["name"]]["seconds"] = time.perf_counter() - start
        if os.environ["RANK"] == "0":
            Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
