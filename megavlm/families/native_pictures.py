"""How pictures of their own size become pixels: the files of Qwen2-VL's and GLM-4.1V's image processors.

Read, and written after a training. :mod:`megavlm.families.preprocessor` has those of squares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of
from megavlm.data.plans_native import NativePlan
from megavlm.families.common import expect
from megavlm.families.preprocessor import (
    GEOMETRY,
    PREPROCESSOR,
    native_sizes,
    normalisation,
    processor_files,
    resampling,
)
from megavlm.weights.source import Source

Tree = dict[str, Any]

PROCESSORS = (
    "Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil", "Qwen2_5_VLImageProcessor",
)  # fmt: skip
_MINE = (*GEOMETRY, "min_pixels", "max_pixels", "patch_size", "merge_size", "temporal_patch_size")
_PATCHES = {
    "patch_size": "patch_size",
    "merge_size": "spatial_merge_size",
    "temporal_patch_size": "temporal_patch_size",
}
"""Keys of the processor, and of the tower."""


def native_pictures(
    source: Source,
    vision: Mapping[str, Any],
    processors: Sequence[str] = PROCESSORS,
    sizes: Callable[[Tree, str], Tree] = native_sizes,
) -> tuple[Tree, Tree]:
    """Return ``model.image`` as a checkpoint's own files say it, and what they say of ``model.vision``.

    Args:
        source: the checkpoint.
        vision: the tower, by config.json.
        processors: what the image processor may be called.
        sizes: reads how large pictures are, of a file's keys and its name.

    Returns:
        Both empty where there is no file.

    Raises:
        UserError: pictures are treated in a way that is not done here, two files disagree, or the processor makes other
            patches than the tower takes.
    """
    told = [(path, tree) for path, tree in processor_files(source, areas=True) if any(key in tree for key in _MINE)]
    branches = []
    for path, tree in told:
        where = str(path)
        expect(tree, where, do_resize=True, do_convert_rgb=True, do_center_crop=False, do_pad=False)
        expect(tree, where, image_processor_type=tuple(processors))
        for key, ours in _PATCHES.items():
            if tree.get(key, vision[ours]) != vision[ours]:
                raise UserError(
                    f"{where}: {key} is {tree[key]!r}, but config.json's tower has {vision[ours]}; correct one"
                )
        branches.append({"kind": "native", "resample": resampling(tree, where), **sizes(tree, where)})
    if not branches:
        return {}, {}
    if branches[-1] != branches[0]:
        raise UserError(
            f"{told[-1][0]}: pictures become {branches[-1]}, but by {told[0][0]} {branches[0]}; correct one"
        )
    return branches[0], normalisation(source, None)


def trained_native(model: ModelConfig, old: Mapping[str, Any], processors: Sequence[str] = PROCESSORS) -> Tree:
    """Return the keys of ``preprocessor_config.json`` that say how large pictures are, after a training.

    Args:
        model: the model.
        old: the file as it was.
        processors: what the image processor may be called; the first where it was called otherwise.
    """
    plan, vision, kind = plan_of(model), model.vision, old.get("image_processor_type")
    assert isinstance(plan, NativePlan)
    if model.image.kind != "native":
        raise UserError(f"model.image: {model.image.kind} has no {PREPROCESSOR} in this family; choose native")
    return {
        "image_processor_type": kind if kind in processors else processors[0], "max_pixels": plan.max_pixels,
        "merge_size": vision.spatial_merge_size, "min_pixels": plan.min_pixels, "patch_size": vision.patch_size,
        "size": {"longest_edge": plan.max_pixels, "shortest_edge": plan.min_pixels},
        "temporal_patch_size": vision.temporal_patch_size,
    }  # fmt: skip
