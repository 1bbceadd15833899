"""What a plan sets, and the command that trains with it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavlm.config.schema import Recipe
from megavlm.config.vision import APART_KEYS
from megavlm.planning.layout import GPUS_PER_NODE
from megavlm.planning.search import Plan

KEYS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "context_parallel_size",
    "sequence_parallel",
    "use_distributed_optimizer",
    "overlap_grad_reduce",
    "overlap_param_gather",
    "recompute_granularity",
    "recompute_num_layers",
    "vision_placement",
    *APART_KEYS,
)
"""The keys of ``parallel`` that a plan sets."""
EXPERT_KEYS = ("expert_model_parallel_size", "expert_tensor_parallel_size")
"""And those that it sets of a model with experts."""


def overrides(plan: Plan) -> dict[str, Any]:
    """Return the recipe's branches that the plan sets."""
    keys = (*KEYS, *EXPERT_KEYS) if any(plan.recipe.model.language.expert_layers) else KEYS
    return {"parallel": {key: getattr(plan.recipe.parallel, key) for key in keys}}


def launch_line(plan: Plan, recipe: Recipe, name: str, words: Sequence[str], file: Path | None = None) -> list[str]:
    """Return the command that trains with a plan, in pieces that belong on one line each.

    Args:
        plan: the layout.
        recipe: the recipe as it was given; only what the plan changes is set.
        name: how the command line called it.
        words: the user's own overrides.
        file: where the plan's overrides were written, if they were.
    """
    nodes, per_node = nodes_of(plan.layout.gpus)
    start = f"torchrun --nproc-per-node {per_node}"
    if nodes > 1:  # on each node, with one of them as HOST
        start = (
            f"torchrun --nnodes {nodes} --nproc-per-node {per_node} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
            " --rdzv-id RUN"
        )
    pieces = [start, f"-m megavlm train {shlex.quote(name)}"]
    if words:
        pieces.append(shlex.join(words))
    if file is not None:
        return [*pieces, f"--overrides {shlex.quote(str(file))}"]
    own = overrides(plan)["parallel"]
    changed = {key: value for key, value in own.items() if value != getattr(recipe.parallel, key)}
    return [*pieces, *(f"parallel.{key}={_word(value)}" for key, value in changed.items())]


def nodes_of(gpus: int) -> tuple[int, int]:
    """Return nodes, and GPUs of each: as few nodes as can have equally many, at most eight."""
    per_node = max(n for n in range(1, GPUS_PER_NODE + 1) if gpus % n == 0)
    return gpus // per_node, per_node


def _word(value: Any) -> str:
    """Return a value as the command line reads it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
