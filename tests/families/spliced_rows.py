"""The rows in :mod:`whole_rows` of families whose reference is :class:`spliced_models.Spliced`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from spliced_models import SplicedSource
from tinyllava_models import TINYLLAVA, tinyllava
from whole import Lack, Published, Stage, WholeFamily

NO_CLASS = Lack("Transformers has no class for it: answers are held against the written-out one, in `source`")
COUNTED = Lack("no class to build: counted from its parts' classes in test_spliced_families.py")
BY_LANGUAGE = Lack("by language model and tokenizer: test_spliced_families.py")
_ALIGN = Stage(("connector",), 1e-3, 2179, 256, 2048, 728, template="llava_plain")
_SFT = Stage(("connector", "language"), 2e-5, 5195, 128, 2048, 728)


def staged(preset: str, names: tuple[str, ...], stages: tuple[Stage, ...]) -> dict[str, Stage]:
    """Return stages, each of which starts from the one before."""
    found: dict[str, Stage] = {}
    for name, stage in zip(names, stages, strict=True):
        found[f"{preset}/{name}"] = replace(stage, after=next(reversed(found), None))
    return found


def spliced_rows(header: str, targets: tuple[str, ...], planner: Mapping[str, float]) -> dict[str, WholeFamily]:
    """Return the rows; arguments are what rows share: ``headers``, ``lora``, ``planner``."""
    return {
        "tinyllava": WholeFamily(
            checkpoints=tuple(TINYLLAVA),
            template=BY_LANGUAGE,
            image={"kind": "squash"},
            source=SplicedSource("tinyllava", tinyllava, "squash", "factory"),
            uneven=SplicedSource(
                "tinyllava",
                lambda: tinyllava(
                    "llama", text_keys={"num_key_value_heads": 1},
                    vision_keys={"num_attention_heads": 3, "intermediate_size": 75},
                ),
                "squash", "factory",
            ),
            others={
                "stablelm, clip, padded": SplicedSource(
                    "tinyllava", lambda: tinyllava("stablelm", clip=True, image_aspect_ratio="pad"), "pad", "factory"
                ),
                "all patches": SplicedSource(
                    "tinyllava", lambda: tinyllava("llama", vision_feature_select_strategy="cls_patch"), "squash",
                    "factory",
                ),
            },
            answers=NO_CLASS,
            lora=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
            presets={
                "tinyllava_1_5b": Published(1_504_351_520),
                "tinyllava_2_0b": Published(2_048_818_464),
                "tinyllava_3_1b": Published(3_186_937_120),
            },
            built=COUNTED,
            recipes={
                **staged("tinyllava_1_5b", ("pretrain", "sft"), (_ALIGN, _SFT)),
                **staged(
                    "tinyllava_2_0b", ("pretrain", "sft"),
                    (replace(_ALIGN, template="llava_plain_no_bos"), _SFT),
                ),
                **staged(
                    "tinyllava_3_1b", ("pretrain", "share", "sft"),
                    (
                        replace(_ALIGN, length=3072, template="llava_plain_no_bos"),
                        Stage(("connector", "language"), 2e-5, 4867, 256, 3072, 728, template="llava_plain_no_bos"),
                        replace(_SFT, length=3072),
                    ),
                ),
            },
            headers=header,
            planner=planner,
        ),
    }  # fmt: skip
