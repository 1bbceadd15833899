"""Adapters in a file of ``torch.save`` that MiniGPT-v2's trainer wrote, beside what else was trained.

github.com/Vision-CAIR/MiniGPT-4 @ d94738a7: ``runners/runner_base.py`` (``_save_checkpoint``) keeps what was trained,
under its code's names; ``models/base_model.py`` (``init_llm``) puts adapters on the language model. Alpha and dropout
stand in its settings alone; those of ``minigpt_v2.yaml`` and ``minigpt_v2.py`` are taken where the file has none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megavlm.checkpoint.hf.peft_config import Settings
from megavlm.config.errors import UserError
from megavlm.weights.pickles import load_weights

_ALPHA, _DROPOUT = 16, 0.05
APART = {
    f"llama_proj{number or ''}.{kind}": f"connector.layers.{max(number - 1, 0)}.{kind}"
    for number in (0, 2)
    for kind in ("weight", "bias")
}
"""What is trained beside the adapters, and what it is called here; TinyGPT-V's second layer is ``llama_proj2``."""
_NORMS = {
    "input_layernorm": "input_layernorm", "self_attn.q_layernorm": "self_attention.q_layernorm",
    "self_attn.k_layernorm": "self_attention.k_layernorm", "post_layernorm": "self_attn_bda.norm",
}  # fmt: skip
_TEXT = r"llama_model\.base_model\.model\.model\."
_NORM = re.compile(_TEXT + r"(layers\.[0-9]+\.)(.*)\.weight")
_NAME = re.compile(r"llama_model\.(base_model\.model\..*\.lora_[AB])\.(?:default\.)?weight")


def read_minigpt(file: Path) -> tuple[Settings, dict[str, Any], dict[str, Any]]:
    """Return what adapters compute, their tensors by PEFT's names, and by ours what was trained beside them.

    Raises:
        UserError: there are none, or they are of several ranks.
    """
    whole = load_weights(file)
    state = whole.get("model") if isinstance(whole, dict) else None
    named = {name: _NAME.fullmatch(str(name)) for name in state} if isinstance(state, Mapping) else {}
    found = {f"{match[1]}.weight": state[name] for name, match in named.items() if match}  # type: ignore[index]
    ranks = {value.shape[0] for name, value in found.items() if ".lora_A." in name and isinstance(value, Tensor)}
    if len(ranks) != 1:
        what = f"adapters of the ranks {sorted(ranks)}" if ranks else "no adapters of MiniGPT-v2 (llama_model.*.lora_A)"
        raise UserError(f"{file}: holds {what}; give such a file, or a directory that PEFT saved")
    config = whole.get("config")
    told = config.get("model") if isinstance(config, Mapping) else None
    told = told if isinstance(told, Mapping) else {}
    alpha, dropout = told.get("lora_alpha", _ALPHA), told.get("lora_dropout", _DROPOUT)
    if not _number(alpha) or alpha <= 0 or not _number(dropout) or not 0 <= dropout < 1:
        raise UserError(f"{file}: its config has lora_alpha {str(alpha)[:40]!r} and lora_dropout {str(dropout)[:40]!r}")
    beside = {ours: state[name] for name in state if (ours := _ours(str(name)))}  # type: ignore[index, union-attr]
    return Settings(ranks.pop(), float(alpha), float(dropout)), found, beside


def _ours(name: str) -> str | None:
    """Return what is called here what was trained beside adapters; None for anything else."""
    if re.fullmatch(_TEXT + r"final_layernorm\.weight", name):
        return "language.decoder.final_layernorm.weight"
    if (found := _NORM.fullmatch(name)) and found[2] in _NORMS:
        return f"language.decoder.{found[1]}{_NORMS[found[2]]}.weight"
    return APART.get(name)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
