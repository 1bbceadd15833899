"""What ranks do with the package that ``test_outside_package`` installs: they read its entry point as a new process."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megavlm.architectures.context import BuildContext
from megavlm.cli import main
from megavlm.config.load import load_recipe
from megavlm.families.presets import expand_presets
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.state import process_groups
from megavlm.planning.flops import step_flops
from megavlm.planning.layout import layout_of
from megavlm.planning.parameters import chunk_parameters
from megavlm.training import metrics


def commands(*lines: Sequence[object], peak: float | None = None) -> None:
    """Run ``megavlm`` with each of ``lines``, which must do well.

    Args:
        lines: words of the command line.
        peak: operations per second that the device is said to have, as CPUs have no known number.
    """
    if peak is not None:
        metrics.peak_flops = lambda _precision: peak
    for words in lines:
        assert main([str(word) for word in words]) == 0, words


def counted(recipe: str, *overrides: str) -> tuple[list[int], list[int], int]:
    """Return the sizes of the parameters by plan and as built, and the operations of a step."""
    own = load_recipe(recipe, overrides, expand_presets)
    layout = layout_of(own, 1)
    with process_groups(own.parallel, 1), torch.device("meta"):
        model = VisionLanguageModel(own.model, BuildContext(own.parallel, initialize=False), 0)
        built = sorted(p.numel() for p in model.parameters())
    planned = sorted(p.elements for p in chunk_parameters(own, layout, layout.chunks[0]))
    return planned, built, step_flops(own, tokens=100, squared_lengths=5000, images=3)
