"""Weights that a short training of several layouts begins with, and the checkpoint that it leaves.

A job has ``recipe`` (branches), ``save``, and ``weights`` (made if they are not there) or ``load``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import torch  # noqa: E402
from lora_worker import fill  # noqa: E402
from tiny import IMAGE_TOKEN  # noqa: E402

from megavlm.checkpoint import distributed as checkpoint  # noqa: E402
from megavlm.checkpoint.saver import Saver, State  # noqa: E402
from megavlm.config.help import to_yaml  # noqa: E402
from megavlm.config.schema import Recipe  # noqa: E402
from megavlm.models.build import build_model, unwrap  # noqa: E402
from megavlm.training.build import TrainingModel  # noqa: E402
from megavlm.training.optimizer import recipe_settings_kept  # noqa: E402

Job = dict[str, Any]


def make_weights(job: Job, make: Callable[[dict[str, Any]], Recipe]) -> None:
    """Write the weights of a job that names some which are not there: those of its model without adapters."""
    if "weights" in job and not Path(job["weights"]).exists():
        plain = make({name: branch for name, branch in job["recipe"].items() if name != "lora"})
        modules = [unwrap(chunk) for chunk in build_model(plain, IMAGE_TOKEN)]
        with torch.no_grad():
            for module in modules:
                for name, parameter in module.named_parameters():
                    if name.endswith("_bda.gate"):  # which begins closed: nothing behind it would learn
                        parameter.fill_(0.7)
        checkpoint.save_weights(Path(job["weights"]).parent, modules, recipe_yaml=to_yaml(plain))


def load(job: Job, training: TrainingModel, recipe: Recipe) -> None:
    """Load the run that a job goes on from, or the weights that it begins with."""
    if "load" in job:
        with recipe_settings_kept(training.optimizer):
            checkpoint.load(
                Path(job["load"]), modules=training.modules, optimizer=training.optimizer, scheduler=training.scheduler
            )
        return
    checkpoint.load(Path(job["weights"]), modules=training.modules)
    if recipe.lora.rank is not None:
        fill(training.modules)
    training.optimizer.reload_model_params()


def save(job: Job, training: TrainingModel, recipe: Recipe, step: int) -> None:
    """Save where a job stands; inside of ``training.settled()``."""
    state = State(training.modules, training.optimizer, training.scheduler, run={"step": step})
    state.recipe_yaml = to_yaml(recipe)
    Saver(Path(job["save"]), keep=1).save(state)
