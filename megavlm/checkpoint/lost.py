"""What checkpoints of older versions may lack, and how it is said. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavlm.config import yaml12


def other_shape(checkpoint: Path, key: str, stored: Sequence[int], wanted: Sequence[int]) -> str:
    """Say why a tensor of a checkpoint has another shape than the model asks for.

    Before saves were proven, parallel layers in a plain container (the connectors ``linear`` and ``mlpNx_gelu``) were
    saved at TP > 1 as the first tensor-parallel rank's part alone.

    Args:
        checkpoint: where it is.
        key: of the tensor.
        stored: its shape there.
        wanted: the model's.
    """
    tp: Any = saved_at(checkpoint).get("tensor_model_parallel_size")
    other = [(there, here) for there, here in zip(stored, wanted, strict=False) if there != here]
    one_part = len(stored) == len(wanted) and type(tp) is int and tp > 1
    if one_part and len(other) == 1 and other[0][0] * tp == other[0][1]:
        return (
            f"{checkpoint}: {key} is lost: an older version, at tensor parallelism {tp}, wrote the first rank's part "
            f"alone ({list(stored)} of {list(wanted)}); take a checkpoint that was saved without tensor parallelism, "
            "or train anew"
        )
    return f"{checkpoint}: {key} has the shape {list(stored)}, the recipe's is {list(wanted)}"


def saved_at(checkpoint: Path) -> dict[str, Any]:
    """Return the ``parallel`` branch of the recipe that made a checkpoint; empty where that is not known."""
    return _branch(checkpoint, "parallel")


def weights_are_rounded(checkpoint: Path) -> bool:
    """Whether weights were kept in FP8, so that masters say more than these."""
    return bool(_branch(checkpoint, "engine").get("fp8_param_gather"))


def _branch(checkpoint: Path, name: str) -> dict[str, Any]:
    try:
        tree = yaml12.parse((checkpoint / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    branch = tree.get(name) if isinstance(tree, dict) else None
    return branch if isinstance(branch, dict) else {}
