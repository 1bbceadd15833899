"""Transformers' own class of a checkpoint, without running code of the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError

_REMEDIES = {
    "check": "compare with logits that its own code stored: megavlm convert verify",
    "int4": "export the model as a family that it has one for (llava, internvl, .. with megatron-to-hf --family)",
}
"""What to do without it, by the action of ``megavlm convert``."""


def transformers_class(directory: Path, action: str) -> Any:
    """Return the configuration that Transformers reads.

    Args:
        directory: Hugging Face directory.
        action: of ``megavlm convert``, which the message names.

    Raises:
        UserError: Transformers is not installed, or has no class for such a checkpoint.
    """
    try:
        import transformers  # noqa: PLC0415 - optional
    except ImportError:
        raise UserError(f"convert {action} needs Transformers: pip install 'megavlm[check]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        transformers.AutoModelForImageTextToText._model_mapping[type(config)]
    except (KeyError, ValueError, OSError) as error:
        raise UserError(
            f"{directory}: Transformers {transformers.__version__} has no class of its own that loads it, and code of "
            f"the checkpoint is not run ({first_line(error)}); {_REMEDIES[action]}"
        ) from None
    return config


def complete_processor(processor: Any, config: Any) -> None:
    """Tell LLaVA's processor what it counts slots by, where the checkpoint is older than its processor_config.json."""
    if getattr(processor, "patch_size", 0) is None:
        clip = config.vision_config.model_type.startswith("clip")
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = int(clip)


def first_line(error: BaseException) -> str:
    """Return what an error of a foreign library says, short."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
