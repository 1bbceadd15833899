"""Which of PEFT's adapters compute what adapters compute here: an allow list of ``adapter_config.json``.

PEFT gains kinds of adapters with every release, and each is a key of this file. So a key is known and has a value that
is computed exactly, or is switched off, or the import ends with its name. The facts are those of PEFT 0.21
(``tuners/lora/{config,layer,variants}.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError

OFF: tuple[Any, ...] = (None, False, {}, [], "")
"""How a key is switched off."""

# What says where an adapter comes from, or which layers it is for, which its tensors say too.
_FREE = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern", "megatron_core",
    "modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "task_type",
}  # fmt: skip
# Beginnings that leave the base as it is. With the others (pissa, olora, corda, loftq, lora_ga) PEFT takes the first
# adapter off the base's weights when it loads, so that A and B are for other weights than the base's.
_BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica")
MERGE = "merge it into its base with PEFT (merge_and_unload, save_pretrained), and convert that"


@dataclass(frozen=True)
class Settings:
    """What an adapter's configuration says of what it computes."""

    rank: int
    alpha: float
    """What is added is multiplied by alpha / rank, whatever PEFT calls alpha."""
    dropout: float
    parameters: tuple[str, ...] = ()
    """Parameters that have adapters themselves (experts in one tensor), by ends of their names."""
    fused: bool = False
    """Adapters of ``gate_up_proj`` have twice the rank, and twice the alpha: one for gate and one for up."""


def read_settings(config: Mapping[str, Any], where: Path) -> Settings:
    """Check every key of an ``adapter_config.json``.

    Args:
        config: what it holds.
        where: the file, for messages.

    Raises:
        UserError: a line that names the first key that is not computed here, or has no sensible value.
    """
    if str(config.get("peft_type")).upper() != "LORA":
        raise UserError(f"{where}: peft_type is {_show(config.get('peft_type'))}; only LORA is supported")
    rank, alpha = config.get("r"), config.get("lora_alpha", 8)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"{where}: r is {_show(rank)}, which is no rank; restore the file")
    if not _number(alpha) or alpha <= 0:
        raise UserError(f"{where}: lora_alpha is {_show(alpha)}; it must be a number above 0")
    dropout = config.get("lora_dropout") or 0.0
    if not _number(dropout) or not 0 <= dropout < 1:
        raise UserError(f"{where}: lora_dropout is {_show(dropout)}; it must be from 0 to below 1")
    for key, value in config.items():
        if key in _FREE or key in ("peft_type", "r", "lora_alpha", "lora_dropout"):
            continue
        allowed = _ALLOWED.get(key, lambda value, _: value in OFF)
        if not allowed(value, config):
            raise UserError(f"{where}: {key} is {_show(value)}, which is not supported; {_remedy(key, value)}")
    scale = math.sqrt(rank) if config.get("use_rslora") else 1.0
    parameters = tuple(config.get("target_parameters") or ())
    return Settings(rank, float(alpha) * scale, float(dropout), parameters, bool(_doubled("r", config)))


def _begins_plainly(value: Any, _: Mapping[str, Any]) -> bool:
    return value in (True, False, None) or (isinstance(value, str) and value.lower() in _BEGINNINGS)


_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}


def _doubled(key: str, config: Mapping[str, Any]) -> set[str]:
    """Return the patterns of ``gate_up_proj`` that say twice of what ``key`` says."""
    found = config.get(_PATTERNS[key])
    patterns = found.items() if isinstance(found, Mapping) else ()
    return {name for name, value in patterns if name.endswith("gate_up_proj") and value == 2 * config.get(key, 8)}


def _same(key: str) -> Callable[[Any, Mapping[str, Any]], bool]:
    """Return the check of a pattern by layer: all that it says must be what ``key`` says.

    Or twice that of gate and up in one, where both patterns say so: alpha / rank is the same then.
    """

    def check(value: Any, config: Mapping[str, Any]) -> bool:
        if value in OFF or not isinstance(value, Mapping):
            return value in OFF
        twice = _doubled("r", config)
        twice = twice if twice == _doubled("lora_alpha", config) and not config.get("use_rslora") else set()
        return all(name in twice or v == config.get(key, 8) for name, v in value.items())

    return check


def _names(value: Any, _: Mapping[str, Any]) -> bool:
    return value in OFF or (isinstance(value, list) and all(isinstance(one, str) for one in value))


_ALLOWED: dict[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    "bias": lambda value, _: value in ("none", None),
    "use_rslora": lambda value, _: value in (True, False, None),
    "init_lora_weights": _begins_plainly,
    "eva_config": lambda value, config: value in OFF or config.get("init_lora_weights") == "eva",
    "rank_pattern": _same("r"),
    "alpha_pattern": _same("lora_alpha"),
    "target_parameters": _names,
}


def _remedy(key: str, value: Any) -> str:
    if key == "init_lora_weights":
        return (
            "PEFT changes the base's weights for it; save it as plain LoRA (save_pretrained with "
            f"path_initial_model_for_weight_conversion), or {MERGE}"
        )
    if key in ("layers_to_transform", "rank_pattern", "alpha_pattern"):
        return f"all layers have adapters of one rank and alpha here; {MERGE}"
    return MERGE


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
